"""How a replica of the simulation becomes ready.

    begin -> transfers over links, phases -> the estimator, what lies in the tiers -> ready(worker)

A start runs as `Cluster.plan` says: weights come over their links while the process comes back (its image over its own
links, then a phase of fixed length), then follows the phase `ready`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dormouse.schedule.cluster import Cluster, Move, PhaseName, Tier
from dormouse.schedule.estimate import Estimator, Observed, Transferred, shared
from dormouse.sim.events import Clock
from dormouse.sim.links import Flow, Way
from dormouse.sim.records import Counts
from dormouse.sim.scenario import Loading, Phases
from dormouse.sim.tiers import Tiers
from dormouse.sim.wires import Shared, Wires
from dormouse.sim.worker import Worker


@dataclass(frozen=True, slots=True)
class Habits:
    """How the system under test starts things, and how long its users wait."""

    loading: Loading
    paths: dict[str, Phases]
    noise: float
    timeout: float


class Starts:
    """Those under way. `ready` is called when one has come to its end."""

    def __init__(
        self, view: Cluster, clock: Clock, habits: Habits, estimator: Estimator, counts: Counts,
        random: np.random.Generator, ready: Callable[[Worker], None],
    ) -> None:  # fmt: skip
        self.wires = Wires(view, clock)
        self.tiers = Tiers(view, clock)
        self._view = view
        self._clock = clock
        self._habits = habits
        self._estimator = estimator
        self._counts = counts
        self._random = random
        self._ready = ready

    def begin(self, worker: Worker) -> None:
        """By the path that the worker has."""
        plan = self._view.plan(worker.model, worker.node, worker.path, worker.gpus)
        if plan is None:
            raise ValueError(f"{worker.model.name} can't start by {worker.path} on {worker.node}")
        self._counts.starts[worker.path] = self._counts.starts.get(worker.path, 0) + 1
        worker.begun = self._clock.now
        worker.transfers, worker.phases, worker.flows = [], [], {}
        worker.pending = 2
        if plan.image is None:
            self._process(worker)
        else:  # before the weights: it is small, and much waits for it
            self._bring(worker, plan.image, lambda: self._process(worker), beside=plan.weights)
        if plan.weights is None:
            self._part_done(worker)
        else:
            self._bring_weights(worker, plan.weights, plan.image)

    def stop(self, worker: Worker) -> None:
        """It goes; what is under way for it ends."""
        if worker.event:
            worker.event.cancel()
        for other in self.wires.shared.values():
            other.waiting.pop(worker, None)
        flows, worker.flows = worker.flows, {}
        for flow, key in flows.items():
            self.wires.network.stop(flow)
            for _here, again in self._no_longer_shared(worker.node, key, flow):
                again()

    # --- bytes

    def _bring_weights(self, worker: Worker, move: Move, beside: Move | None) -> None:
        loading = self._habits.loading
        cap = loading.rate or math.inf
        if move.source is not Tier.REMOTE or not loading.download_first:
            self._bring(worker, move, lambda: self._part_done(worker), cap, beside)
            return
        first = Move("weights", move.key, move.size, Tier.REMOTE, move.links[:1])
        second = Move("weights", move.key, move.size, Tier.DISK, ("disk", *move.links[1:]))
        self._bring(worker, first, lambda: self._bring(worker, second, lambda: self._part_done(worker), cap))

    def _bring(
        self, worker: Worker, move: Move, then: Callable[[], None], cap: float = math.inf, beside: Move | None = None
    ) -> None:
        if move.behind:
            self._follow(worker, move, then, cap)
            return
        node = worker.node
        slowest, size, ahead = self._slowest(node, move)
        ahead += shared(beside, slowest, size)
        began = self._clock.now
        way: Way = tuple((self.wires.link(node, name), move.size_on(name) / move.size) for name in move.links)

        def done() -> None:
            del worker.flows[flow]
            tier = move.source.name.lower()
            self._counts.moved[tier] = self._counts.moved.get(tier, 0.0) + move.size
            worker.transfers.append(Transferred(move.name, (slowest,), size, self._clock.now - began, ahead))
            self._arrived(node, move)
            waiting = self._no_longer_shared(node, move.key, flow)
            then()
            for here, _again in waiting:
                here()

        flow = self.wires.network.start(move.size, way, done, cap)
        worker.flows[flow] = move.key
        near = move.source in (Tier.GPU, Tier.DRAM) or len(move.links) == 1
        if self._habits.loading.shared and not near and self.tiers.fits(move.size, node, Tier.DRAM):
            self.wires.shared[node, move.key] = Shared(flow, move.links[0])
            self._view.expect(move.key, node, move.links[0], move.size)

    def _follow(self, worker: Worker, move: Move, then: Callable[[], None], cap: float) -> None:
        """Wait for another's transfer of the same bytes into DRAM, then take them from there."""
        began = self._clock.now

        def here() -> None:
            self._bring(worker, replace(move, behind=None), came, cap)

        def came() -> None:
            worker.transfers.append(Transferred(move.name, (), 0, self._clock.now - began))
            then()

        def again() -> None:
            plan = self._view.plan(worker.model, worker.node, worker.path, worker.gpus)
            assert plan is not None
            other = plan.weights if move.name == "weights" else plan.image
            assert other is not None
            self._bring(worker, other, then, cap)

        self.wires.shared[worker.node, move.key].waiting[worker] = (here, again)

    def _no_longer_shared(self, node: str, key: str, flow: Flow) -> list[tuple[Callable[[], None], Callable[[], None]]]:
        """Those that waited for a transfer."""
        shared = self.wires.shared.get((node, key))
        if shared is None or shared.flow is not flow:
            return []
        del self.wires.shared[node, key]
        self._view.arrived(key, node)
        return list(shared.waiting.values())

    def _slowest(self, node: str, move: Move) -> tuple[str, int, int]:
        """The link of its way that should take longest, the bytes that go over it, and those before them."""
        found: list[tuple[float, str, int, int]] = []
        for name in move.links:
            seen, size = self._view.link(node, name), move.size_on(name)
            ahead = seen.ahead(size)
            found.append(((ahead + size) / seen.rate, name, size, ahead))
        return max(found)[1:]

    def _arrived(self, node: str, move: Move) -> None:
        loading = self._habits.loading
        self.tiers.touch(move.key, node)
        if move.source is Tier.REMOTE and loading.keep_on_disk:
            self.tiers.keep(move.key, move.size, node, Tier.DISK)
        if loading.keep_in_dram and move.links != ("network",):
            self.tiers.keep(move.key, move.size, node, Tier.DRAM)

    # --- phases

    def _phase(self, worker: Worker, name: PhaseName, seconds: float, then: Callable[[Worker], None]) -> None:
        if self._habits.noise and seconds:
            seconds *= math.exp(self._random.normal(0.0, self._habits.noise))
        worker.phases.append((name, seconds))
        worker.event = self._clock.at(self._clock.now + seconds, then, worker)

    def _process(self, worker: Worker) -> None:
        self._phase(worker, "process", self._habits.paths[worker.path].process, self._part_done)

    def _part_done(self, worker: Worker) -> None:
        worker.pending -= 1
        if not worker.pending:
            self._phase(worker, "ready", self._habits.paths[worker.path].ready, self._done)

    def _done(self, worker: Worker) -> None:
        worker.event = None
        worker.start_seconds = self._clock.now - worker.begun
        self._estimator.observe(
            Observed(
                worker.model.name,
                worker.model.engine,
                worker.node,
                worker.path,
                worker.start_seconds,
                tuple(worker.transfers),
                tuple(worker.phases),
                worker.predicted,
                self._view.node(worker.node).kind,
            ),
            self._view,
        )
        self._ready(worker)
