"""The links of the simulated nodes, and what the view of schedule/ is told of them.

transfers on links.py's links -> refresh -> Cluster.set_link: bytes queued, transfers under way
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from dormouse.schedule.cluster import Cluster
from dormouse.sim.events import Clock
from dormouse.sim.links import Flow, Link, Network
from dormouse.sim.worker import Worker

_REFRESH = 0.001  # for each busy link, so many seconds between two looks at all of them: many cost more and matter less


@dataclass(slots=True)
class Shared:
    """A transfer into a node's DRAM for which others wait: what they do when its bytes are there, or when it was cut
    off."""

    flow: Flow
    link: str
    waiting: dict[Worker, tuple[Callable[[], None], Callable[[], None]]] = field(default_factory=dict)


class Wires:
    """All of them, each made when something first moves over it. `shared` are transfers by (node, key)."""

    def __init__(self, view: Cluster, clock: Clock) -> None:
        self.network = Network(clock)
        self._view = view
        self._clock = clock
        self._links: dict[tuple[str, str], Link] = {}
        self._busy: dict[Link, None] = {}
        self._refreshed = 0.0
        self.shared: dict[tuple[str, str], Shared] = {}

    def link(self, node: str, name: str) -> Link:
        """The simulated link behind one of the view's."""
        found = self._links.get((node, name))
        if found is None:
            seen = self._view.link(node, name)
            found = self._links[node, name] = Link(node, name, seen.rate, fifo=seen.fifo)
        return found

    @property
    def links(self) -> Iterable[Link]:
        return self._links.values()

    def lose(self, node: str) -> None:
        """A node is gone, and nothing moves on its links any more: the view is told nothing of them."""
        for links in (self.network.touched, self._busy):
            for link in [one for one in links if one.node == node]:
                assert not link.flows
                del links[link]

    def refresh(self) -> None:
        """Tell the view what is under way on links where that has changed, and now and then on all that are busy."""
        touched, now = self.network.touched, self._clock.now
        for link in touched:
            if link.flows:
                self._busy[link] = None
            else:
                self._busy.pop(link, None)
                self._view.set_link(link.node, link.name, 0, 0)
        due = now - self._refreshed >= len(self._busy) * _REFRESH
        if due:
            self._refreshed = now
        for link in list(self._busy if due else touched):
            if link.flows:
                self._view.set_link(link.node, link.name, int(link.queued(now)), len(link.flows))
        for (node, key), one in self.shared.items() if due else ():
            self._view.expect(key, node, one.link, int(one.flow.left_at(now)))
        touched.clear()
