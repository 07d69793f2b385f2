"""Links that transfers share: the network card of a node, its disk, the PCIe link of a GPU.

    start(bytes, path, done) -> Flow;  done() is called when the last byte has arrived

A path is links and the share of the bytes that each carries (the PCIe links of four GPUs a quarter each). A transfer
runs through all of them at once (it is a pipeline), each link gives each of its transfers an equal part of its rate,
and the narrowest part is the transfer's rate. A link that is `fifo` serves one after the other instead, in the order
in which they were started; a transfer moves while it is the first on all such links of its path.

What a transfer can't use of its part goes to nobody, so rates are a little lower than max-min fair ones and never add
up to more than a link has. Rates change only when a transfer starts or ends; in between nothing is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dormouse.sim.events import Clock, Event

_CLOSE = 1e-9

Way = tuple[tuple["Link", float], ...]
"""Links, and the share of a transfer's bytes that each carries."""


class Link:
    """`rate` in bytes per second. `carried` counts the bytes of transfers that ended or were cut off."""

    __slots__ = ("carried", "fifo", "flows", "name", "node", "rate")

    def __init__(self, node: str, name: str, rate: float, *, fifo: bool = False) -> None:
        if not 0 < rate < math.inf:
            raise ValueError(f"link {name} of {node} has the rate {rate}")
        self.node = node
        self.name = name
        self.rate = rate
        self.fifo = fifo
        self.flows: dict[Flow, float] = {}
        self.carried = 0.0

    def queued(self, now: float) -> float:
        """Bytes still to come over it."""
        return sum(flow.left_at(now) * part for flow, part in self.flows.items())


class Flow:
    """A transfer under way. `cap` is the most that its reader or writer can do by itself, in bytes per second."""

    __slots__ = ("cap", "done", "event", "left", "path", "rate", "since", "size")

    def __init__(self, size: float, path: Way, cap: float, done: Callable[[], None]) -> None:
        self.size = size
        self.left = size
        self.path = path
        self.cap = cap
        self.done = done
        self.rate = 0.0
        self.since = 0.0
        self.event: Event | None = None

    def left_at(self, now: float) -> float:
        return max(self.left - self.rate * (now - self.since), 0.0)


class Network:
    """All transfers of a simulation. `begun` counts their bytes, `delivered` those of the ones that ended, `dropped`
    what had come of those cut off."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.begun = 0.0
        self.delivered = 0.0
        self.dropped = 0.0
        self.touched: dict[
            Link, None
        ] = {}  # links on which a transfer has started or ended; whoever reads it clears it

    def start(self, size: float, path: Way, done: Callable[[], None], cap: float = math.inf) -> Flow:
        """Begin a transfer; `done` is called from the clock, never from here."""
        flow = Flow(float(size), path, cap, done)
        self.begun += flow.size
        flow.since = self.clock.now
        for link, part in path:
            link.flows[flow] = part
            self.touched[link] = None
        self._share(flow.path, flow)
        return flow

    def stop(self, flow: Flow) -> float:
        """Cut a transfer off; the bytes that had arrived."""
        if flow.event is None:
            return 0.0
        flow.event.cancel()
        came = flow.size - flow.left_at(self.clock.now)
        self.dropped += came
        self._end(flow, came)
        return came

    def _end(self, flow: Flow, came: float) -> None:
        flow.event = None
        for link, part in flow.path:
            del link.flows[flow]
            link.carried += came * part
            self.touched[link] = None
        self._share(flow.path, None)

    def _arrived(self, flow: Flow) -> None:
        self.delivered += flow.size
        self._end(flow, flow.size)
        flow.done()

    def _share(self, way: Way, new: Flow | None) -> None:
        """New rates for all whose part of one of these links has changed."""
        if new is not None:
            self._set_rate(new)
        seen: set[Flow] = set() if new is None else {new}
        for link, _part in way:
            for flow in link.flows:
                if flow not in seen:
                    seen.add(flow)
                    self._set_rate(flow)

    def _set_rate(self, flow: Flow) -> None:
        rate = flow.cap
        for link, part in flow.path:
            if not link.fifo:
                rate = min(rate, link.rate / len(link.flows) / part)
            elif next(iter(link.flows)) is flow:
                rate = min(rate, link.rate / part)
            else:
                rate = 0.0
        if flow.event is not None and abs(rate - flow.rate) <= _CLOSE * flow.rate:
            return
        now = self.clock.now
        flow.left = flow.left_at(now)
        flow.since = now
        flow.rate = rate
        if flow.event is not None:
            flow.event.cancel()
        due = now if not flow.left else now + flow.left / rate if rate else math.inf
        flow.event = self.clock.at(due, self._arrived, flow)
