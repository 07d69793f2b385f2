"""Carries out what a keep-alive policy says about idle replicas, and has models made ready before they are asked for.

    a worker became idle -> steps of schedule/keepalive.py -> at their times: it dozes, ends, or leaves the DRAM tier
    next_prewarm -> prewarm -> a start on free memory

One rule is the simulator's own, because peers have it: an idle replica stays as long as its start took.
"""

from __future__ import annotations

from collections.abc import Sequence

from dormouse.schedule.cluster import Replica, Request, State, Tier
from dormouse.schedule.keepalive import Policy, Step, Warm
from dormouse.schedule.place import place
from dormouse.schedule.room import Eviction
from dormouse.sim.carry import begin
from dormouse.sim.events import Event
from dormouse.sim.worker import Worker
from dormouse.sim.world import World

_NEVER = 1e12


class Keeper:
    """For one world. `policy` is None for the simulator's own rule. `prewarms` is whether what it plans is done."""

    def __init__(self, world: World, policy: Policy | None, *, prewarms: bool) -> None:
        self.world = world
        self.policy = policy
        self._prewarms = prewarms
        self._asked: dict[str, int] = {}
        self._timer: Event | None = None
        self._timer_at = _NEVER

    def on_request(self, model: str) -> None:
        if self.policy is not None:
            self._asked[model] = self._asked.get(model, 0) + 1
            self.policy.on_request(model, self.world.now)
            self._look_ahead()

    def became_idle(self, worker: Worker) -> None:
        """Plan what happens to it while nobody asks."""
        if self.policy is None:
            self.world.plan_step(worker, self.world.now + worker.start_seconds, self._end)
            return
        replica = self.world.view.replica(worker.name)
        for step in self.policy.on_idle(replica, self.world.view, self.world.now):
            self._plan(worker, step)
        self._look_ahead()

    def going(self, worker: Worker) -> None:
        """It is about to end."""
        if self.policy is not None and worker.name in self.world.view:
            self.policy.on_gone(self.world.view.replica(worker.name), self.world.view, self.world.now)

    def starting(self, model: str, evictions: Sequence[Eviction]) -> None:
        """A start of it begins, and these go for it."""
        if self.policy is not None:
            evicted = [self.world.view.replica(one.replica) for one in evictions]
            self.policy.on_start(model, evicted, self.world.now)

    def worth(self, replica: Replica) -> float:
        """What an idle replica is worth to its model, in seconds."""
        assert self.policy is not None
        return self.policy.worth(replica, self.world.view, self.world.now)

    def _plan(self, worker: Worker, step: Step) -> None:
        if step.at >= _NEVER:
            return
        if step.to == "nothing":
            asked = self._asked.get(worker.model.name, 0)
            self.world.clock.at(max(step.at, self.world.now), self._forget, worker, asked)
        else:
            self.world.plan_step(worker, step.at, self._doze if step.to == "sleep" else self._end)

    def _doze(self, worker: Worker) -> None:
        if worker.idle and worker.state is State.HOT and worker.model.gpus:
            self.world.doze(worker)
            self.world.control.changed()

    def _end(self, worker: Worker) -> None:
        if worker.idle:
            self.world.end(worker)
            self.world.control.changed()

    def _forget(self, worker: Worker, asked: int) -> None:
        """Nobody has asked since: its bytes leave the DRAM tier."""
        model = worker.model
        if self._asked.get(model.name, 0) != asked:
            return
        if worker.name in self.world.workers:
            self._end(worker)
        for part in (model.weights, model.image):
            if part is not None:
                self.world.tiers.forget(part.key, worker.node, Tier.DRAM)

    # --- ahead of requests

    def _look_ahead(self) -> None:
        following = self.policy.next_prewarm() if self.policy and self._prewarms else None
        if following is None or following >= self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = max(following, self.world.now)
        self._timer = self.world.clock.at(self._timer_at, self._prewarm)

    def _prewarm(self) -> None:
        assert self.policy is not None
        self._timer, self._timer_at = None, _NEVER
        for warm in self.policy.prewarm(self.world.now):
            self._make_ready(warm)
        self._look_ahead()

    def _make_ready(self, warm: Warm) -> None:
        """Where placement would put a request for it, if nobody has to go for that."""
        world = self.world
        there = world.by_model.get(warm.model, {}).values()
        if any(worker.state is not State.SLEEPING for worker in there):
            return
        world.wires.refresh()
        decision = place(Request(f"warm {warm.model}", warm.model, world.now), world.view, world.estimator, world.now)
        option = decision.chosen
        if option is None or option.action != "start" or option.evict or option.migrate:
            return
        world.counts.prewarms += 1
        begin(world, warm.model, option)
