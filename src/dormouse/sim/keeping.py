"""Carries out what a keep-alive policy says about idle replicas, and has models made ready before they are asked for.

    a worker became idle -> steps of schedule/keepalive.py -> at their times: it dozes, or goes

Two rules are the simulator's own, because peers have them: a fixed time, and as long as the last start took.
"""

from __future__ import annotations

from collections.abc import Callable

from dormouse.schedule.cluster import Tier
from dormouse.schedule.keepalive import Policy, Step
from dormouse.sim.scenario import KeepAliveRule
from dormouse.sim.world import Worker, World


class Keeper:
    """For one world. `policy` is None for the simulator's own rules."""

    def __init__(self, world: World, rule: KeepAliveRule, policy: Policy | None) -> None:
        self.world = world
        self.rule = rule
        self.policy = policy

    def on_request(self, model: str) -> None:
        if self.policy is not None:
            self.policy.on_request(model, self.world.now)

    def became_idle(self, worker: Worker) -> None:
        """Plan what happens to it while nobody asks."""
        if self.policy is None:
            seconds = worker.start_seconds if self.rule.policy == "load" else self.rule.seconds
            if seconds < 1e12:
                self.world.plan_step(worker, self.world.now + seconds, self.world.end)
            return
        replica = self.world.view.replica(worker.name)
        for step in self.policy.on_idle(replica, self.world.view, self.world.now):
            if step.at < 1e12:
                self.world.plan_step(worker, step.at, self._doer(step))

    def _doer(self, step: Step) -> Callable[[Worker], None]:
        def do(worker: Worker) -> None:
            if worker.name not in self.world.workers or not worker.idle:
                return
            if step.to == "sleep":
                if worker.state.value == "hot" and worker.model.gpus:
                    self.world.doze(worker)
            elif step.to in ("snapshot", "nothing"):
                self._end(worker, step)
            self.world.control.changed()

        return do

    def _end(self, worker: Worker, step: Step) -> None:
        self.world.end(worker)
        if step.to == "nothing":
            others = self.world.by_model.get(worker.model.name)
            if not others:
                self.world.forget(worker.model.weights.key, worker.node, Tier.DRAM)
                if worker.model.image:
                    self.world.forget(worker.model.image.key, worker.node, Tier.DRAM)
