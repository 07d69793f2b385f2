"""How others place requests, as far as their papers tell; each small enough to read.

* `any`: Ray Serve extended to scale from zero, as the ServerlessLLM paper compares with: a free replica of the model,
  or a new one on the emptiest node.
* `random`: the paper's serverless scheduler: a new replica on any node with room, whatever lies there.
* `locality-preempt`: Shepherd-like: the node where loading is shortest by estimate; if that is full and another one has
  room but is slower, a running replica there is preempted and its requests begin again.
* `locality-migrate`: ServerlessLLM (Fu et al., OSDI 2024, section 6): the same choice, but the running replica moves to
  another node when that and the load together are shorter than loading elsewhere.

All of them serve in order of arrival, give a replica to a waiting request of its model first, and let a request wait
when no node has room.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from dormouse.schedule.cluster import ModelCost, State, Tier
from dormouse.sim.keeping import Keeper
from dormouse.sim.rooms import Room, room_on
from dormouse.sim.worker import Job, Worker
from dormouse.sim.world import World

_SMALL = 64
_MOST_FAILURES = 32
_MOST_TRIED = 256


@dataclass(frozen=True, slots=True)
class Place:
    node: str
    room: Room
    seconds: float = 0.0


class Peer(ABC):
    """The part all of them share; `_place` is what they differ in."""

    def __init__(self, world: World, keeper: Keeper, *, evict_idle: bool, random: np.random.Generator) -> None:
        self.world = world
        self.keeper = keeper
        self.evict = evict_idle
        self.random = random
        self.waiting: OrderedDict[str, Job] = OrderedDict()
        self._asked_for: Counter[str] = Counter()  # by requests that wait

    @property
    def nodes(self) -> list[str]:
        return list(self.world.view.nodes)

    # --- what the world tells

    def submit(self, job: Job) -> None:
        self.keeper.on_request(job.request.model)
        if self._asked_for[job.request.model] or not self._serve(job):
            self._wait(job)

    def changed(self) -> None:
        failed: set[str] = set()
        for name, job in list(islice(self.waiting.items(), _MOST_TRIED)):
            if name not in self.waiting or job.request.model in failed:
                continue
            if self._serve(job):
                self._no_longer_waits(job)
            else:
                failed.add(job.request.model)
                if len(failed) >= _MOST_FAILURES:
                    return

    def became_idle(self, worker: Worker) -> None:
        self.keeper.became_idle(worker)

    def going(self, worker: Worker) -> None:
        self.keeper.going(worker)

    def gave_up(self, job: Job) -> None:
        self._no_longer_waits(job)

    def lost(self, jobs: Sequence[Job]) -> None:
        for job in reversed(jobs):
            self._wait(job, first=True)

    def finished(self, job: Job) -> None:  # noqa: B027
        """Nothing to count."""

    # --- serving

    def _wait(self, job: Job, *, first: bool = False) -> None:
        self.waiting[job.request.name] = job
        self._asked_for[job.request.model] += 1
        if first:
            self.waiting.move_to_end(job.request.name, last=False)
        self.world.expect_deadline(job)

    def _no_longer_waits(self, job: Job) -> None:
        if self.waiting.pop(job.request.name, None):
            self._asked_for[job.request.model] -= 1

    def _serve(self, job: Job) -> bool:
        """Let it run or start something for it; False when there is no place."""
        ready = self._ready_one(job.request.model)
        if ready is not None:
            self.world.assign(job, ready)
            return True
        if self.world.view.has_all(job.request.model):
            return False
        self.world.wires.refresh()
        return self._place(job, self.world.view.model(job.request.model))

    def _ready_one(self, model: str) -> Worker | None:
        """A replica with a slot for it: one that is ready, or one that is starting."""
        workers = self.world.by_model.get(model, {}).values()
        ready = [one for one in workers if one.room > 0 and not one.queue]
        if ready:
            return max(ready, key=lambda one: one.since)
        coming = (one for one in workers if one.state is State.STARTING and len(one.queue) < one.model.slots)
        return next((one for one in coming if not one.takes_over), None)

    @abstractmethod
    def _place(self, job: Job, model: ModelCost) -> bool:
        """Start something for it; False when there is no place."""

    def _start(self, job: Job, model: ModelCost, place: Place) -> None:
        for name in place.room.victims:
            self.world.counts.evictions += 1
            self.world.end(self.world.workers[name])
        worker = self.world.start(model, place.node, place.room.gpus, "cold", place.seconds or None)
        self.world.assign(job, worker)

    def _load_seconds(self, model: ModelCost, node: str, gpus: tuple[int, ...]) -> float:
        plan = self.world.view.plan(model, node, "cold", gpus)
        if plan is None:
            return float("inf")
        phases = self.world.habits.paths["cold"]
        fixed = phases.process + phases.ready
        return fixed + (self.world.estimator.move_seconds(node, plan.weights, self.world.view) if plan.weights else 0.0)

    def _places(self, model: ModelCost, nodes: Iterable[str]) -> list[Place]:
        """Where it fits, the quickest first; what need not evict goes before what must."""
        found: list[Place] = []
        for node in nodes:
            room = room_on(self.world.view, node, model, evict=self.evict)
            if room is not None:
                found.append(Place(node, room, self._load_seconds(model, node, room.gpus)))
        found.sort(key=lambda place: (place.seconds, bool(place.room.victims), place.node))
        return found


class AnyNode(Peer):
    """See the module: `any`."""

    def _place(self, job: Job, model: ModelCost) -> bool:
        view = self.world.view
        for ranking in (view.most_free(model.gpus), view.most_spare(model.gpus) if self.evict else ()):
            for _free, node in ranking:
                room = room_on(view, node, model, evict=self.evict)
                if room is not None:
                    self._start(job, model, Place(node, room))
                    return True
                break
        return False


class RandomNode(Peer):
    """See the module: `random`."""

    def _place(self, job: Job, model: ModelCost) -> bool:
        nodes = self.nodes
        order = self.random.permutation(len(nodes))
        for evict in (False, True) if self.evict else (False,):
            for index in order:
                room = room_on(self.world.view, nodes[index], model, evict=evict)
                if room is not None:
                    self._start(job, model, Place(nodes[index], room))
                    return True
        return False


class Nearest(Peer):
    """See the module: `locality-preempt`, and what `locality-migrate` shares with it."""

    def _place(self, job: Job, model: ModelCost) -> bool:
        places = self._places(model, self._candidates(model))
        if not places:
            return False
        best = places[0]
        for node in self._candidates(model):
            if self._free_up(job, model, node, best):
                return True
        self._start(job, model, best)
        return True

    def _candidates(self, model: ModelCost) -> list[str]:
        if len(self.nodes) <= _SMALL:
            return self.nodes
        view = self.world.view
        held = [node for tier in (Tier.DRAM, Tier.DISK) for node in view.holders(model.weights.key, tier)]
        near = (node for _free, node in view.most_free(model.gpus))
        return list(dict.fromkeys([*held[:16], *(node for node, _ in zip(near, range(16), strict=False))]))

    def _free_up(self, job: Job, model: ModelCost, node: str, best: Place) -> bool:
        """Preempt on a node that is quicker than the best one with room."""
        if room_on(self.world.view, node, model, evict=self.evict) is not None:
            return False
        for victim in self._victims(model, node):
            seconds = self._load_seconds(model, node, victim.gpus[: model.gpus])
            if seconds < best.seconds:
                self._preempt(job, model, node, victim)
                return True
        return False

    def _victims(self, model: ModelCost, node: str) -> list[Worker]:
        """Running replicas on a node each of which has room enough for the model by itself."""
        view, workers = self.world.view, self.world.workers
        free = view.free(node)
        fits = []
        for replica in view.replicas_on(node):
            worker = workers[replica.name]
            if not worker.running or worker.moving_to or worker.takes_over or worker.queue or worker.pinned:
                continue
            there = sum(free[gpu] + worker.model.device_bytes >= model.device_bytes for gpu in worker.gpus)
            if there >= model.gpus and view.free_host(node) + worker.model.host_bytes >= model.host_bytes:
                fits.append(worker)
        return sorted(fits, key=lambda worker: -worker.since)

    def _preempt(self, job: Job, model: ModelCost, node: str, victim: Worker) -> None:
        returned = self.world.preempt(victim)
        for one in reversed(returned):
            self._wait(one, first=True)
        self._start(job, model, Place(node, Room(victim.gpus[: model.gpus])))
        for one in returned:
            if self._serve(one):
                self._no_longer_waits(one)


class Migrating(Nearest):
    """See the module: `locality-migrate`."""

    def _free_up(self, job: Job, model: ModelCost, node: str, best: Place) -> bool:
        if room_on(self.world.view, node, model, evict=self.evict) is not None:
            return False
        for victim in self._victims(model, node):
            if self.world.view.has_all(victim.model.name):
                continue
            others = [other for other in self._candidates(victim.model) if other != node]
            to = next(iter(self._places(victim.model, others)), None)
            if to is None:
                continue
            seconds = to.seconds + self._recompute(victim) + self._load_seconds(model, node, victim.gpus[: model.gpus])
            if seconds < best.seconds:
                self._migrate(job, model, victim, to)
                return True
        return False

    def _recompute(self, victim: Worker) -> float:
        tokens = sum(job.tokens_in + job.tokens_done for job in victim.running.values())
        return tokens * victim.model.prefill_seconds

    def _migrate(self, job: Job, model: ModelCost, victim: Worker, to: Place) -> None:
        for name in to.room.victims:
            self.world.counts.evictions += 1
            self.world.end(self.world.workers[name])
        other = self.world.start(victim.model, to.node, to.room.gpus, "cold", to.seconds)
        self.world.expect_deadline(job)
        node, gpus = victim.node, victim.gpus[: model.gpus]

        def moved() -> None:
            if job.given_up:
                return
            there = node in self.world.view.nodes and victim.name not in self.world.workers
            if not there or room_on(self.world.view, node, model, evict=False) is None:
                self.submit(job)
            else:
                self._start(job, model, Place(node, Room(gpus)))

        self.world.migrate(victim, other, moved)


PEERS: dict[str, type[Peer]] = {
    "any": AnyNode,
    "random": RandomNode,
    "locality-preempt": Nearest,
    "locality-migrate": Migrating,
}
