"""Our own way to run a cluster: schedule's queue and placement, as they are, carried out in the simulated world.

submit -> Queue.dispatch -> Decision -> commit: evict, migrate, wake, start, assign
"""

from __future__ import annotations

from collections.abc import Sequence

from dormouse.schedule.place import Decision, Migration, Option
from dormouse.schedule.queue import Queue
from dormouse.sim.carry import begin, evict
from dormouse.sim.keeping import Keeper
from dormouse.sim.worker import Job, Worker
from dormouse.sim.world import World

_PAUSE = 50e-6
"""Seconds for each node."""


class Ours:
    """See the module."""

    def __init__(self, world: World, keeper: Keeper, queue: Queue) -> None:
        self.world = world
        self.keeper = keeper
        self.queue = queue
        self.decided = 0
        self._jobs: dict[str, Job] = {}
        self._planned = False
        self._worth = keeper.worth if keeper.policy is not None else None
        self._pause = min(_PAUSE * len(list(world.view.nodes)), 0.05)

    def submit(self, job: Job) -> None:
        self.keeper.on_request(job.request.model)
        self._jobs[job.request.name] = job
        self.queue.push(job.request)
        model = job.request.model
        if len(self._jobs) == 1:
            self._dispatch()
        elif self.world.view.takes_now(model) and self.queue.waiting(model) == 1:
            self._dispatch(only=model)
        if job.request.name in self._jobs:
            self.changed()
        if job.request.name in self._jobs:
            self.world.expect_deadline(job)

    def changed(self) -> None:
        """While requests wait, changes are looked at together, a little later: there are many in a large cluster."""
        if self._jobs and not self._planned:
            self._planned = True
            self.world.clock.at(self.world.now + self._pause, self._dispatch_planned)

    def _dispatch_planned(self) -> None:
        self._planned = False
        self._dispatch()

    def _dispatch(self, only: str | None = None) -> None:
        if self._jobs:
            world = self.world
            world.wires.refresh()
            self.queue.dispatch(world.view, world.estimator, world.now, self._commit, self._worth, only)

    def became_idle(self, worker: Worker) -> None:
        self.keeper.became_idle(worker)

    def going(self, worker: Worker) -> None:
        self.keeper.going(worker)

    def gave_up(self, job: Job) -> None:
        if self._jobs.pop(job.request.name, None):
            self.queue.remove(job.request.name, self.world.view)
        else:
            self.queue.finished(job.request)

    def lost(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._jobs[job.request.name] = job
            self.queue.finished(job.request)
            self.queue.push(job.request)
            self.world.expect_deadline(job)

    def finished(self, job: Job) -> None:
        self.queue.finished(job.request)

    def _commit(self, decision: Decision) -> None:
        """Carry out a decision. One to wait comes only when its migrations are to begin: its request stays queued."""
        option = decision.chosen
        assert option is not None
        self.decided += 1
        if option.action == "start":
            self.keeper.starting(decision.request.model, option.evict)
        evict(self.world, option)
        for move in option.migrate:
            self.world.migrate(self.world.workers[move.replica], self._destination(move))
        if option.action != "wait":
            self._take(self._jobs.pop(decision.request.name), option)

    def _take(self, job: Job, option: Option) -> None:
        if option.action == "queue":
            assert option.replica is not None
            self.world.assign(job, self.world.workers[option.replica])
        else:
            self.world.assign(job, begin(self.world, job.request.model, option))
            self.world.wires.refresh()

    def _destination(self, move: Migration) -> Worker:
        if move.reuse is not None:
            return self.world.workers[move.reuse]
        model = self.world.workers[move.replica].model
        return self.world.start(model, move.node, move.gpus, move.path)
