"""How long an idle replica keeps what it has, what is made ready before anybody asks, and who goes for others.

    requests and idle replicas -> Policy -> Steps (when to go down to what), pre-warms, worth of what is idle

The caller tells a policy of every request (`on_request`), of every replica that has nothing to do any more or has been
made ready ahead (`on_idle`, whose steps are void once it gets a request), of every one that is gone (`on_gone`), and of
who went for each start (`on_start`). At the times that `next_prewarm` tells it asks `prewarm`. Placement asks `worth`.
Policies of papers follow their papers' rules; `Expected` is our own.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from dormouse.schedule.cluster import DISK, NETWORK, Cluster, ModelCost, Replica, StartPath, State
from dormouse.schedule.estimate import Estimator
from dormouse.schedule.idle_times import Bins, IdleTimes

Layer = Literal["hot", "sleep", "snapshot", "nothing"]
LAYERS: tuple[Layer, ...] = ("hot", "sleep", "snapshot")

_GB = 1e9
_DAY = 86_400.0
_LAST = 32  # idle times from which a return is planned
_ENOUGH = 5
_EARLY, _LATE = 0.98, 1.02
_FIRST_START = 20.0  # seconds; what the oracle gives the first start of a model, whose length nobody knows yet
_MEMORY = 14_400.0  # seconds after which what starts cost and replicas held counts a third in the price of memory
_FIRST_COST = 50.0  # seconds of starts that the first price counts for
_HOST = 0.6  # a GB of the host counts for so much of one of a GPU
_SLACK = 64
_SOON = 60.0  # seconds; whoever is evicted and asked for later than that would probably have gone anyway
RELUCTANCE = 1e-3
"""Seconds for a GB: what an eviction counts in placement for policies that know only who goes first. So little that a
start goes where it is quickest, whoever must go for it; with 10, only where nothing is free does anybody go."""


BALANCE = 1.15
"""By how many per cent starts may cost more for one per cent less memory held by idle replicas, by default."""


@dataclass(frozen=True, slots=True)
class Step:
    """At `at` (absolute), an idle replica goes down to `to`. "snapshot" ends the process and keeps its image and
    weights near (in the node's DRAM tier); "nothing" lets these go from there too."""

    to: Layer
    at: float


Steps = tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Need:
    """Memory that something needs on a node: bytes of each of these GPUs, and of the host."""

    node: str
    gpus: tuple[int, ...]
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True)
class Warm:
    """Have a replica of `model` ready from `at` on; on_idle says for how long."""

    model: str
    at: float
    until: float


class Policy(Protocol):
    """Times are absolute. Nothing here names a replica that is not idle."""

    def on_request(self, model: str, now: float) -> None: ...

    def on_idle(self, replica: Replica, view: Cluster, now: float) -> Steps: ...

    def on_gone(self, replica: Replica, view: Cluster, now: float) -> None: ...

    def on_start(self, model: str, evicted: Sequence[Replica], now: float) -> None:
        """A replica of `model` starts or wakes for a request. These idle ones give up their GPUs, or all they have, for
        it."""

    def prewarm(self, now: float) -> list[Warm]:
        """Those due by now, each once. One whose model got a request meanwhile is none any more."""
        ...

    def next_prewarm(self) -> float | None:
        """When the next may be due."""
        ...

    def worth(self, replica: Replica, view: Cluster, now: float) -> float:
        """The seconds that somebody is expected to lose when an idle replica goes; for its bytes, it is the order of
        eviction."""
        ...

    def victims(self, need: Need, view: Cluster, now: float) -> tuple[str, ...] | None:
        """Replicas to end so that `need` fits; () when it fits already, None when it can't be."""
        ...


class Basic(ABC):
    """What all policies share: who goes, in the order of worth for bytes; and no pre-warming."""

    @abstractmethod
    def on_idle(self, replica: Replica, view: Cluster, now: float) -> Steps: ...

    @abstractmethod
    def worth(self, replica: Replica, view: Cluster, now: float) -> float: ...

    def on_request(self, model: str, now: float) -> None:  # noqa: B027
        """Nothing to learn."""

    def on_gone(self, replica: Replica, view: Cluster, now: float) -> None:  # noqa: B027
        """Nothing to forget."""

    def on_start(self, model: str, evicted: Sequence[Replica], now: float) -> None:  # noqa: B027
        """Nothing to learn."""

    def prewarm(self, now: float) -> list[Warm]:
        return []

    def next_prewarm(self) -> float | None:
        return None

    def victims(self, need: Need, view: Cluster, now: float) -> tuple[str, ...] | None:
        """The least worth for its bytes first, until there is room."""
        free = [max(need.device_bytes - view.free(need.node)[gpu], 0) for gpu in need.gpus]
        host = max(need.host_bytes - view.free_host(need.node), 0)
        idle = [(self._rank(one, view, now), one.name) for one in view.replicas_on(need.node) if one.idle]
        gone: list[str] = []
        for _rank, name in sorted(idle):
            device, of_host = view.takes(view.replica(name))
            on = view.replica(name).gpus if device else ()
            helps = [gpu in on and missing > 0 for gpu, missing in zip(need.gpus, free, strict=True)]
            if any(helps) or (host > 0 and of_host > 0):
                gone.append(name)
                free = [left - device * (gpu in on) for gpu, left in zip(need.gpus, free, strict=True)]
                host -= of_host
        return None if host > 0 or any(left > 0 for left in free) else tuple(gone)

    def _rank(self, replica: Replica, view: Cluster, now: float) -> float:
        return self.worth(replica, view, now) / max(held_bytes(replica, view), 1)


def held_bytes(replica: Replica, view: Cluster) -> int:
    """All the memory that a replica takes, of GPUs and host."""
    device, host = view.takes(replica)
    return device * len(replica.gpus) + host


class FixedTtl(Basic):
    """Every replica goes some time after its last request, whatever it is: what most platforms do. When memory is
    short, who has been idle longest goes first."""

    def __init__(self, ttl: float = 600.0, to: Layer = "snapshot", reluctance: float = RELUCTANCE) -> None:
        self._ttl, self._to, self._reluctance = ttl, to, reluctance

    def on_idle(self, replica: Replica, view: Cluster, now: float) -> Steps:
        return (Step(self._to, now + self._ttl),)

    def worth(self, replica: Replica, view: Cluster, now: float) -> float:
        return self._reluctance * held_bytes(replica, view) / _GB / (1.0 + max(now - replica.since, 0.0))


class Lru(FixedTtl):
    """Nothing goes before its memory is needed; then who has been idle longest."""

    def __init__(self, reluctance: float = RELUCTANCE) -> None:
        super().__init__(math.inf, reluctance=reluctance)

    def on_idle(self, replica: Replica, view: Cluster, now: float) -> Steps:
        return ()


class GreedyDual(Basic):
    """Greedy-dual-size-frequency: nothing goes before its memory is needed; then who has the least
    priority = clock + frequency * start seconds / size, with the clock at the priority of the last that went and the
    frequency counted while a model has any replica (Fuerst and Sharma, FaasCache, ASPLOS 2021)."""

    def __init__(self, estimator: Estimator, reluctance: float = RELUCTANCE) -> None:
        self._estimator = estimator
        self._reluctance = reluctance
        self._clock = 0.0
        self._frequency: dict[str, int] = {}
        self._clock_then: dict[str, float] = {}

    def on_request(self, model: str, now: float) -> None:
        self._frequency[model] = self._frequency.get(model, 0) + 1
        self._clock_then[model] = self._clock

    def on_idle(self, replica: Replica, view: Cluster, now: float) -> Steps:
        return ()

    def on_gone(self, replica: Replica, view: Cluster, now: float) -> None:
        self._clock = max(self._clock, self._priority(replica, view))
        if not any(other.name != replica.name for other in view.replicas_of(replica.model)):
            self._frequency.pop(replica.model, None)

    def worth(self, replica: Replica, view: Cluster, now: float) -> float:
        above = max(self._priority(replica, view) - self._clock, 0.0) + 1e-9
        return self._reluctance * above * held_bytes(replica, view) / _GB

    def _priority(self, replica: Replica, view: Cluster) -> float:
        seconds = self._estimator.return_seconds(view.model(replica.model))
        size = max(held_bytes(replica, view) / _GB, 1e-6)
        then = self._clock_then.get(replica.model, self._clock)
        return then + self._frequency.get(replica.model, 0) * seconds / size


class Planned(Basic):
    """What policies that pre-warm share: when each model became idle, and its planned window."""

    def __init__(self) -> None:
        self._idle_since: dict[str, float] = {}
        self._due: list[tuple[float, str, float]] = []
        self._plans: dict[str, Warm] = {}
        self._warming: dict[str, float] = {}

    def on_request(self, model: str, now: float) -> None:
        since = self._idle_since.pop(model, None)
        if since is not None:
            self.learn(model, max(now - since, 0.0), now)
        self._plans.pop(model, None)
        self._warming.pop(model, None)

    def learn(self, model: str, idle: float, now: float) -> None:
        """A model has been idle for so long."""

    def prewarm(self, now: float) -> list[Warm]:
        found = []
        while self._due and self._due[0][0] <= now:
            at, model, _until = heapq.heappop(self._due)
            plan = self._plans.get(model)
            if plan is not None and plan.at == at:
                del self._plans[model]
                self._warming[model] = plan.until
                found.append(plan)
        return found

    def next_prewarm(self) -> float | None:
        return self._due[0][0] if self._due else None

    def plan_warm(self, model: str, at: float, until: float) -> None:
        """Make it ready at `at`, unless somebody asks for it before."""
        self._plans[model] = Warm(model, at, until)
        heapq.heappush(self._due, (at, model, until))

    def begins_idle(self, model: str, now: float) -> float | None:
        """Note that a model is idle from now on; for one that was made ready ahead, until when it stays so."""
        self._idle_since.setdefault(model, now)
        return self._warming.pop(model, None)


class Histogram(Planned):
    """The hybrid histogram policy of Serverless in the Wild (Shahrad et al., ATC 2020): idle times in bins of one
    minute up to four hours; a replica goes at once and comes back at 0.9 times the 5th percentile (rounded down), to
    stay until 1.1 times the 99th (rounded up); with a head below one minute it stays from the start. While the
    histogram tells nothing (few idle times, or a coefficient of variation of its bins below 2) it stays for four hours.
    Where most idle times are longer than that, the paper fits ARIMA with margins of 15 %; here the median of the last
    idle times stands in for it."""

    def __init__(
        self,
        bin_seconds: float = 60.0,
        bins: int = 240,
        fallback: float | None = None,
        reluctance: float = RELUCTANCE,
    ) -> None:
        super().__init__()
        self._reluctance = reluctance
        self._edges = tuple(number * bin_seconds for number in range(bins + 1))
        self._fallback = self._edges[-1] if fallback is None else fallback
        self._bins: dict[str, Bins] = {}
        self._last: dict[str, deque[float]] = {}

    def learn(self, model: str, idle: float, now: float) -> None:
        self._bins.setdefault(model, Bins(self._edges)).add(idle)
        self._last.setdefault(model, deque(maxlen=16)).append(idle)

    def on_idle(self, replica: Replica, view: Cluster, now: float) -> Steps:
        until = self.begins_idle(replica.model, now)
        if until is not None:
            return (Step("snapshot", max(until, now)),)
        head, tail = self.windows(replica.model)
        if head <= 0.0:
            return (Step("snapshot", now + tail),)
        self.plan_warm(replica.model, now + head, now + tail)
        return (Step("snapshot", now),)

    def windows(self, model: str) -> tuple[float, float]:
        """From when to when after its last request a model is kept ready."""
        bins = self._bins.get(model)
        if bins is None or bins.total < 4:
            return 0.0, self._fallback
        if bins.beyond > 0.5:
            middle = sorted(self._last[model])[len(self._last[model]) // 2]
            return 0.85 * middle, 1.15 * middle
        if bins.variation() < 2.0:
            return 0.0, self._fallback
        return 0.9 * self._edges[bins.bin_at(0.05)], 1.1 * self._edges[bins.bin_at(0.99) + 1]

    def worth(self, replica: Replica, view: Cluster, now: float) -> float:
        return self._reluctance * held_bytes(replica, view) / _GB / (1.0 + max(now - replica.since, 0.0))


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What keeping a layer saves, compared with the next one down, and the bytes that it alone takes."""

    layer: Layer
    saves: float
    gpu_bytes: int
    host_bytes: int


def layer_costs(model: ModelCost, replica: Replica, view: Cluster, estimator: Estimator) -> tuple[LayerCost, ...]:
    """Of hot, sleep and snapshot (in the DRAM tier), on the replica's node with its links as they are now."""
    sleep, _ready_phases = _start(model, replica, view, estimator, ("sleep",))
    start, ready = _start(model, replica, view, estimator, ("snapshot", "template", "cold"))
    start = max(start, sleep)
    near = model.weights.coded_bytes + (model.image.coded_bytes if model.image else 0)
    far = DISK if DISK in view.node(replica.node).links else NETWORK
    fetched = max(estimator.link_seconds(replica.node, far, near, view) - (start - ready), 0.0)
    gpu = model.device_bytes * model.gpus
    return (
        LayerCost("hot", sleep, gpu, model.host_bytes - model.process_bytes),
        LayerCost("sleep", start - sleep, 0, model.process_bytes),
        LayerCost("snapshot", fetched, 0, near),
    )


def _start(
    model: ModelCost, replica: Replica, view: Cluster, estimator: Estimator, paths: Sequence[StartPath]
) -> tuple[float, float]:
    """The seconds of the quickest of these paths, and those of them that follow its transfers."""
    kind = view.node(replica.node).kind
    found = []
    for path in paths:
        plan = view.plan(model, replica.node, path, replica.gpus)
        if plan:
            after = sum(estimator.phase_seconds(model, path, name, kind) for name in ("ready", "rest"))
            found.append((estimator.estimate(model, replica.node, plan, view).mean, after))
    return min(found, default=(estimator.return_seconds(model), 0.0))


class Layered(Planned):
    """RainbowCake (Yu et al., ASPLOS 2024): an idle replica steps down layer by layer. A layer's time to live is
    min(beta, IAT): beta = alpha t / ((1 - alpha) m) from the seconds t that it saves and its memory m, and IAT the
    quantile -ln(1 - p) / rate of a Poisson process whose rate comes from the last arrivals. In the paper lower layers
    are shared by functions of a language, and so are their arrivals; here all layers are the model's own (an engine's
    template takes no memory while it waits). m is in GB; the host's memory counts for `host_price` of a GPU's."""

    def __init__(
        self,
        estimator: Estimator,
        alpha: float = 0.996,
        quantile: float = 0.8,
        window: int = 6,
        host_price: float = 0.1,
    ) -> None:
        super().__init__()
        self._estimator = estimator
        self._beta = alpha / (1.0 - alpha)
        self._factor = -math.log(1.0 - quantile)
        self._window = window
        self._host_price = host_price
        self._arrivals: dict[str, deque[float]] = {}

    def on_request(self, model: str, now: float) -> None:
        super().on_request(model, now)
        self._arrivals.setdefault(model, deque(maxlen=self._window)).append(now)

    def on_idle(self, replica: Replica, view: Cluster, now: float) -> Steps:
        self.begins_idle(replica.model, now)
        model = view.model(replica.model)
        costs = layer_costs(model, replica, view, self._estimator)
        rate = self._rate(model.name, now)
        at, steps = now, []
        downs: tuple[Layer, ...] = ("sleep", "snapshot", "nothing")
        for cost, to in zip(costs, downs, strict=True):
            at += self._ttl(cost, rate)
            steps.append(Step(to, at))
        return tuple(steps)

    def _ttl(self, cost: LayerCost, rate: float) -> float:
        memory = (cost.gpu_bytes + self._host_price * cost.host_bytes) / _GB
        beta = self._beta * cost.saves / max(memory, 1e-6)
        return min(beta, self._factor / rate if rate > 0.0 else math.inf)

    def _rate(self, model: str, now: float) -> float:
        """Arrivals a second, lately."""
        times = self._arrivals.get(model)
        return len(times) / (now - times[0]) if times and now > times[0] else 0.0

    def worth(self, replica: Replica, view: Cluster, now: float) -> float:
        back = self._estimator.return_seconds(view.model(replica.model))
        rate = self._rate(replica.model, now)
        return 0.1 * back * (1.0 - math.exp(-60.0 * rate))


@dataclass(frozen=True, slots=True)
class Prices:
    """What a GB is worth for a second, in seconds of somebody's start."""

    gpu: float = 3e-4
    host: float = 1.8e-4

    def of(self, cost: LayerCost) -> float:
        return (self.gpu * cost.gpu_bytes + self.host * cost.host_bytes) / _GB


class Balance:
    """The price of memory at which starts and idle replicas weigh alike: `share` * (what starts cost so far) / (what
    idle replicas held so far). Who keeps by it has `share` per cent more cost for the last per cent of memory that it
    saves, whatever the load, the models and the machines. Only starts of what was there before count, for no price
    could have spared the others. Of each model's replicas, the last that became idle is looked at, until it is asked
    for, goes for another, or the time that it stays ends."""

    def __init__(self, first: float, share: float) -> None:
        self._share = share
        self._cost = _FIRST_COST
        self._held = self._usual = share * _FIRST_COST / first
        self._now: float | None = None
        self._idle: dict[str, tuple[float, float, float]] = {}
        self._ends: list[tuple[float, str]] = []
        self._lost: dict[str, float] = {}
        self._holding = 0.0

    def price(self, now: float) -> float:
        """Seconds for a GB of GPU and second."""
        self._advance(now)
        return self._share * self._cost / self._held

    def hold(self, model: str, size: float, until: float, saves: float, now: float) -> None:
        """It is idle, holds so many GB, and a start of it would cost `saves`."""
        self.asked(model, now)
        self._lost.pop(model, None)
        self._idle[model] = (size, until, saves)
        self._holding += size
        heapq.heappush(self._ends, (until, model))
        if len(self._ends) > 2 * len(self._idle) + _SLACK:  # most are of those that were asked for in time
            self._ends = sorted((end, name) for name, (_size, end, _saves) in self._idle.items())

    def asked(self, model: str, now: float) -> None:
        """Somebody asks for it: it is idle no more, or must start."""
        self._advance(now)
        self._end(model, lost=False)

    def evict(self, model: str, now: float) -> None:
        """It goes for another, if it has not gone by itself."""
        self._advance(now)
        self._end(model, lost=True)

    def start(self, model: str, now: float) -> None:
        """It starts."""
        self._advance(now)
        self._cost += self._lost.pop(model, 0.0)

    def _end(self, model: str, *, lost: bool) -> None:
        found = self._idle.pop(model, None)
        if found:
            self._holding = self._holding - found[0] if self._idle else 0.0
            if lost:
                self._lost[model] = found[2]

    def _advance(self, now: float) -> None:
        """To now, by way of those that end before."""
        while self._ends and self._ends[0][0] <= now:
            until, model = heapq.heappop(self._ends)
            found = self._idle.get(model)
            if found and found[1] == until:
                self._pass(until)
                self._end(model, lost=True)
        self._pass(now)

    def _pass(self, now: float) -> None:
        seconds = max(now - self._now, 0.0) if self._now is not None else 0.0
        self._now = now if self._now is None else max(now, self._now)
        stays = math.exp(-seconds / _MEMORY)
        self._cost = _FIRST_COST + stays * (self._cost - _FIRST_COST)
        self._held = self._usual + stays * (self._held - self._usual) + self._holding * seconds


class Expected(Planned):
    """Ours: each layer is kept as long as what it is expected to save is worth its memory.

    A model's outlook (idle_times.py) says how soon it returns, as returns a second. A layer is worth its memory as long
    as returns a second * what a return saves >= price * bytes. What a start costs is its seconds, and `felt` more for
    that there is one at all. If the last idle times that were longer than that lie close together, the model comes back
    before the next one.

    Nobody sets the price of memory (unless `prices` are given): see `Balance`."""

    def __init__(
        self,
        estimator: Estimator,
        prices: Prices | None = None,
        *,
        balance: float = BALANCE,
        felt: float = 10.0,
        prior: float = 20.0,
    ) -> None:
        super().__init__()
        self._estimator = estimator
        self._fixed = prices
        self._balance = Balance(Prices().gpu, balance)
        self._felt = felt
        self._times = IdleTimes(prior=prior)
        self._last: dict[str, deque[float]] = {}

    def prices(self, now: float) -> Prices:
        """As they are now."""
        gpu = self._balance.price(now)
        return self._fixed or Prices(gpu, gpu * _HOST)

    def on_request(self, model: str, now: float) -> None:
        self._times.request(model, now)
        self._balance.asked(model, now)
        super().on_request(model, now)

    def learn(self, model: str, idle: float, now: float) -> None:
        self._times.ended(model, idle, now)
        self._last.setdefault(model, deque(maxlen=_LAST)).append(idle)

    def on_start(self, model: str, evicted: Sequence[Replica], now: float) -> None:
        self._balance.start(model, now)
        for one in evicted:
            self._balance.evict(one.model, now)

    def on_gone(self, replica: Replica, view: Cluster, now: float) -> None:
        self._balance.evict(replica.model, now)

    def _costs(self, costs: Sequence[LayerCost]) -> tuple[LayerCost, ...]:
        """That there is a start at all is what being hot saves."""
        return (replace(costs[0], saves=costs[0].saves + self._felt), *costs[1:])

    def _index(self, replica: Replica, now: float) -> float:
        age = max(now - self._idle_since.get(replica.model, replica.since), 0.0)
        return self._times.outlook(replica.model, now).index(age)

    def on_idle(self, replica: Replica, view: Cluster, now: float) -> Steps:
        until = self.begins_idle(replica.model, now)
        model = view.model(replica.model)
        costs = self._costs(layer_costs(model, replica, view, self._estimator))
        ahead, prices = self._times.outlook(replica.model, now), self.prices(now)
        began = self._idle_since[replica.model]
        ends, longest = [], now - began
        for cost in costs:  # a layer stays at least as long as what needs it
            longest = max(longest, ahead.until(prices.of(cost) / max(cost.saves, 1e-9), now - began))
            ends.append(longest)
        hot, sleep, snapshot = (began + end for end in ends)
        if until is not None:
            hot = max(until, now)  # it was made ready ahead
            sleep, snapshot = max(sleep, hot), max(snapshot, hot)
        else:
            self._plan_return(model, costs, prices, began, ends[0], ends[1])
        self._balance.hold(model.name, model.device_bytes * model.gpus / _GB, hot, costs[0].saves, now)
        return tuple(Step(*step) for step in (("sleep", hot), ("snapshot", sleep), ("nothing", snapshot)))

    def _plan_return(
        self,
        model: ModelCost,
        costs: tuple[LayerCost, ...],
        prices: Prices,
        began: float,
        asleep: float,
        gone: float,
    ) -> None:
        """Make it ready again before a time at which it is often asked for."""
        times = sorted(self._last.get(model.name, ()))
        after = bisect_right(times, asleep)
        layers = costs[:2] if after < len(times) and times[after] > gone else costs[:1]
        saves = sum(cost.saves for cost in layers)
        window = _return_window(times[after:], saves, sum(prices.of(cost) for cost in layers))
        if window:
            ahead = saves - self._felt  # the seconds of the start
            self.plan_warm(model.name, began + max(window[0] - ahead, asleep), began + window[1])

    def worth(self, replica: Replica, view: Cluster, now: float) -> float:
        """What its return takes, by the chance that it is asked for soon."""
        back = self._felt + self._estimator.return_seconds(view.model(replica.model))
        return back * -math.expm1(-_SOON * self._index(replica, now))


def _return_window(late: list[float], saves: float, price: float) -> tuple[float, float] | None:
    """A stretch of time in which so many of the `late` idle times (ascending) ended, close together, that having it
    ready then is worth its memory and that of the start. Of few the chance is thought less than it was."""
    best, found = 0.0, None
    for trimmed in {0, len(late) // 20, len(late) // 8}:
        inside = late[trimmed : len(late) - trimmed]
        if len(inside) < _ENOUGH:
            continue
        begin, end = _EARLY * inside[0], _LATE * inside[-1]
        held = sum(one - begin for one in inside) + trimmed * (end - begin) + saves * (len(inside) + trimmed)
        gain = saves * (len(inside) - len(inside) ** 0.5) - price * held
        if gain > best:
            best, found = gain, (begin, end)
    return found


class Oracle(Planned):
    """Knows all requests to come (for the simulator only): a replica goes at once, and is back when it is needed,
    unless it would be needed before it could be back. When memory is short, who is needed last goes first. A reference,
    not the best possible: which of two starts on one link should go first, it does not ask."""

    def __init__(self, arrivals: Mapping[str, Sequence[float]], estimator: Estimator) -> None:
        super().__init__()
        self._arrivals = arrivals
        self._estimator = estimator
        for model, (first, *_rest) in arrivals.items():
            self.plan_warm(model, max(first - _FIRST_START, 0.0), first)

    def on_idle(self, replica: Replica, view: Cluster, now: float) -> Steps:
        warmed = self.begins_idle(replica.model, now)
        following = self.next_request(replica.model, now)
        if following is None:
            return (Step("nothing", now),)
        costs = layer_costs(view.model(replica.model), replica, view, self._estimator)
        back = 1.5 * sum(cost.saves for cost in costs[:2])
        if warmed is not None or following - now <= 2.0 * back:
            return ()
        self.plan_warm(replica.model, following - back, following)
        return (Step("snapshot", now),)

    def next_request(self, model: str, now: float) -> float | None:
        times = self._arrivals.get(model, ())
        place = bisect_right(times, now)
        return times[place] if place < len(times) else None

    def worth(self, replica: Replica, view: Cluster, now: float) -> float:
        following = self.next_request(replica.model, now)
        if following is None:
            return 0.0
        back = self._estimator.return_seconds(view.model(replica.model))
        return back / (1.0 + following - now) * held_bytes(replica, view) / _GB


@dataclass(frozen=True, slots=True)
class Minimum:
    """At least so many replicas of a model stay ready: always, or on each day between two times of it (seconds; from
    after to: over midnight)."""

    replicas: int
    since: float = 0.0
    until: float = _DAY

    def borders(self) -> tuple[float, ...]:
        """The times of the day at which it begins and ends."""
        return (self.since % _DAY, self.until % _DAY) if self.until - self.since < _DAY else ()

    def holds(self, now: float) -> bool:
        second = now % _DAY
        if self.since <= self.until:
            return self.since <= second < self.until
        return second >= self.since or second < self.until


class Minima:
    """All of them, by model. Ask at each `next_border`: who keeps the cluster starts what is `missing`, and pins those
    that are to `stand`, so that nobody evicts them."""

    def __init__(self, minima: Mapping[str, Sequence[Minimum]]) -> None:
        self.by_model = minima

    def least(self, model: str, now: float) -> int:
        """The replicas that are to be ready now."""
        return max((one.replicas for one in self.by_model.get(model, ()) if one.holds(now)), default=0)

    def missing(self, view: Cluster, now: float) -> dict[str, int]:
        """How many replicas of each model must be started to have its minimum."""
        short = {model: self.least(model, now) - view.ready_count(model) for model in self.by_model}
        return {model: count for model, count in short.items() if count > 0}

    def next_border(self, now: float) -> float:
        """When one begins or ends next; infinity when none ever does."""
        day = now % _DAY
        borders = {edge for minima in self.by_model.values() for one in minima for edge in one.borders()}
        return now + min(((edge - day) % _DAY or _DAY for edge in borders), default=math.inf)


def standing(model: str, view: Cluster, least: int) -> frozenset[str]:
    """Which replicas of a model are its minimum: those that are it already, then those that are ready longest."""
    there = sorted(view.soonest(model), key=lambda one: (not one.pinned, one.state is State.STARTING, one.since))
    return frozenset(one.name for one in there[:least])


class Provisioned(Minima, Basic):
    """Another policy, and models of which some replicas are always ready, or at some times of the day."""

    def __init__(self, policy: Basic, minima: Mapping[str, Sequence[Minimum]]) -> None:
        super().__init__(minima)
        self._policy = policy

    def on_request(self, model: str, now: float) -> None:
        self._policy.on_request(model, now)

    def on_idle(self, replica: Replica, view: Cluster, now: float) -> Steps:
        steps = self._policy.on_idle(replica, view, now)
        return () if self._needed(replica, view, now) else steps

    def on_gone(self, replica: Replica, view: Cluster, now: float) -> None:
        self._policy.on_gone(replica, view, now)

    def on_start(self, model: str, evicted: Sequence[Replica], now: float) -> None:
        self._policy.on_start(model, evicted, now)

    def prewarm(self, now: float) -> list[Warm]:
        return self._policy.prewarm(now)

    def next_prewarm(self) -> float | None:
        return self._policy.next_prewarm()

    def worth(self, replica: Replica, view: Cluster, now: float) -> float:
        return math.inf if self._needed(replica, view, now) else self._policy.worth(replica, view, now)

    def _needed(self, replica: Replica, view: Cluster, now: float) -> bool:
        """Whether without it there would be too few. One that sleeps is none of them, as long as enough are ready."""
        least, ready = self.least(replica.model, now), view.ready_count(replica.model)
        return ready < least if replica.state is State.SLEEPING else ready <= least > 0
