"""The simulated cluster: what happens when a decision is carried out.

    start, wake, assign, end, doze, preempt, migrate  ->  starts.py, tokens  ->  the view of schedule/, records

A `World` has no opinions. A `Control` (control.py, peers.py) decides, the world lets it happen and tells it afterwards.
The one account of memory is schedule's `Cluster`, which refuses whatever does not fit, so no policy can cheat here.
Tokens of a request come at a fixed pace, however many requests run beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from dormouse.schedule.cluster import Cluster, ModelCost, Node, Replica, Running, StartPath, State
from dormouse.schedule.estimate import Estimator
from dormouse.sim.events import Clock
from dormouse.sim.records import Counts, Records, Span
from dormouse.sim.starts import Habits, Starts
from dormouse.sim.worker import Job, Worker


class Control(Protocol):
    """Who decides. `changed` comes after anything that may make room for those who wait."""

    def submit(self, job: Job) -> None: ...

    def changed(self) -> None: ...

    def became_idle(self, worker: Worker) -> None: ...

    def going(self, worker: Worker) -> None: ...

    def gave_up(self, job: Job) -> None: ...

    def lost(self, jobs: Sequence[Job]) -> None:
        """A node was lost, and they have no place any more."""
        ...

    def finished(self, job: Job) -> None: ...


class World:
    """See the module. All public calls may be made by a control at any time but from within `Control.finished`."""

    def __init__(self, cluster: Cluster, habits: Habits, random: np.random.Generator, *, spans: bool = False) -> None:
        self.clock = Clock()
        self.view = cluster
        self.habits = habits
        self.estimator = Estimator()
        self.counts = Counts()
        self.records = Records()
        self.starts = Starts(cluster, self.clock, habits, self.estimator, self.counts, random, self._ready)
        self.wires = self.starts.wires
        self.tiers = self.starts.tiers
        self.workers: dict[str, Worker] = {}
        self.by_model: dict[str, dict[str, Worker]] = {}
        self.spans: list[Span] | None = [] if spans else None
        self.control: Control
        self._number = 0
        self._holding = 0
        self._away: dict[str, Node] = {}
        self._tokens: dict[str, tuple[int, int]] = {}

    @property
    def now(self) -> float:
        return self.clock.now

    # --- starts

    def start(
        self, model: ModelCost, node: str, gpus: tuple[int, ...], path: StartPath, predicted: float | None = None
    ) -> Worker:
        """A new replica. The view refuses it when it does not fit."""
        self._number += 1
        worker = Worker(f"w{self._number}", model, node, gpus, path, State.STARTING, self.now, predicted)
        worker.placed_at = self.now
        worker.pinned = model.pinned
        worker.ready_at = self.now + (predicted or 0.0)
        self._show(worker)
        self._hold(1)
        self.workers[worker.name] = worker
        self.by_model.setdefault(model.name, {})[worker.name] = worker
        self.starts.begin(worker)
        return worker

    def wake(self, worker: Worker, predicted: float | None = None) -> None:
        """A replica whose process sleeps gets its weights again."""
        assert worker.state is State.SLEEPING
        self._hold(1)
        self._account(worker)
        worker.path, worker.predicted = "sleep", predicted
        worker.state, worker.since = State.STARTING, self.now
        worker.ready_at = self.now + (predicted or 0.0)
        self._cancel_steps(worker)
        self._show(worker)
        self.starts.begin(worker)

    def _ready(self, worker: Worker) -> None:
        self._account(worker)
        worker.state, worker.since, worker.ready_since = State.HOT, self.now, self.now
        if worker.takes_over:
            self._take_over(worker, worker.takes_over)
        self._pull(worker)
        self._show(worker)
        self._settle(worker)
        self.control.changed()

    # --- requests

    def assign(self, job: Job, worker: Worker) -> None:
        """The job is this worker's: it begins now, or waits for it."""
        job.worker = worker
        ready = worker.state in (State.HOT, State.BUSY)
        if math.isnan(job.began):
            came_before = not ready or job.request.arrived < worker.ready_since
            job.started_by = worker.path if came_before else "hot"
        self._cancel_steps(worker)
        if ready and not worker.queue and worker.room > 0:
            self._run(job, worker)
        else:
            worker.queue.append(job)
            self.expect_deadline(job)
        self._show(worker)

    def expect_deadline(self, job: Job) -> None:
        """The job waits: from now on it may be given up."""
        if job.deadline is None:
            since = job.request.arrived if math.isnan(job.began) else job.stopped
            at = since + self.habits.timeout
            job.deadline = self.clock.at(max(at, self.now), self._give_up, job)

    def _give_up(self, job: Job) -> None:
        job.given_up, job.ended, job.deadline = True, self.now, None
        if not math.isnan(job.stopped):
            job.lost += self.now - job.stopped
        worker = job.worker
        if worker is not None:
            worker.queue.remove(job)
            job.worker = None
            self._show(worker)
            self._settle(worker)
        self.records.add(job)
        self.control.gave_up(job)

    def _pull(self, worker: Worker) -> None:
        while worker.queue and worker.room > 0:
            self._run(worker.queue.popleft(), worker)

    def _run(self, job: Job, worker: Worker) -> None:
        now = self.now
        if job.deadline is not None:
            job.deadline.cancel()
            job.deadline = None
        prefill = (job.tokens_in + job.tokens_done) * worker.model.prefill_seconds
        if math.isnan(job.began):
            job.began = now
        else:
            job.lost += now - job.stopped
        if math.isnan(job.first_token):
            job.first_token = now + prefill + worker.model.token_seconds
        job.worker = worker
        job.resumed = now + prefill
        left = job.tokens_out - job.tokens_done
        job.finish = self.clock.at(job.resumed + left * worker.model.token_seconds, self._finish, job)
        name = job.request.name
        if not worker.running:
            self._account(worker)
        worker.running[name] = job
        worker.views[name] = Running(name, now, job.tokens_done, job.request.expected_tokens, job.tokens_in)

    def _finish(self, job: Job) -> None:
        worker = job.worker
        assert worker is not None
        job.ended, job.finish, job.worker = self.now, None, None
        self._leave(job, worker)
        count, total = self._tokens.get(job.request.model, (0, 0))
        self._tokens[job.request.model] = (count + 1, total + job.tokens_out)
        self.records.add(job)
        self.control.finished(job)
        self._pull(worker)
        if worker.moving_to and not (worker.running or worker.queue):
            self._take_over(worker.moving_to, worker)
        else:
            self._show(worker)
            self._settle(worker)
        self.control.changed()

    def _leave(self, job: Job, worker: Worker) -> None:
        if len(worker.running) == 1:
            self._account(worker)
        del worker.running[job.request.name], worker.views[job.request.name]

    def expected_tokens(self, model: str) -> int:
        """How long an answer of a model is, from those that have ended."""
        count, total = self._tokens.get(model, (0, 0))
        return total // count if count else 128

    # --- going down

    def _settle(self, worker: Worker) -> None:
        """Tell the control when a worker has nothing more to do."""
        if worker.name in self.workers and worker.idle and worker.state is State.HOT and not worker.steps:
            self.control.became_idle(worker)

    def pin(self, worker: Worker, pinned: bool) -> None:
        """A pinned replica goes for nobody and stays, whatever keep-alive says."""
        worker.pinned = pinned
        self._cancel_steps(worker)
        self._show(worker)
        self._settle(worker)

    def plan_step(self, worker: Worker, at: float, step: Callable[[Worker], None]) -> None:
        """Something for an idle worker to do at a time, unless a request comes."""
        worker.steps.append(self.clock.at(max(at, self.now), step, worker))

    def _cancel_steps(self, worker: Worker) -> None:
        for event in worker.steps:
            event.cancel()
        worker.steps.clear()

    def doze(self, worker: Worker) -> None:
        """An idle replica gives back its GPUs and keeps its process; where nothing can sleep, it goes altogether."""
        assert worker.idle
        if "sleep" not in self.habits.paths:
            self.end(worker)
            return
        self._account(worker)
        self._hold(-1)
        worker.state, worker.since = State.SLEEPING, self.now
        self._show(worker)

    def end(self, worker: Worker) -> None:
        """An idle or starting replica goes. Its memory is free at once."""
        assert not (worker.running or worker.queue or worker.takes_over or worker.moving_to)
        self._remove(worker)

    def _remove(self, worker: Worker) -> None:
        self._cancel_steps(worker)
        if worker.state is not State.SLEEPING:
            self._hold(-1)
        self.control.going(worker)
        self.starts.stop(worker)
        self._account(worker)
        self.view.drop(worker.name)
        del self.workers[worker.name], self.by_model[worker.model.name][worker.name]

    def preempt(self, worker: Worker) -> list[Job]:
        """A running replica goes. The jobs it had must begin again elsewhere: what they had so far is lost."""
        self.counts.preemptions += 1
        jobs = self._take_jobs(worker)
        self.end(worker)
        return jobs

    def _take_jobs(self, worker: Worker) -> list[Job]:
        """All that it has, from now on nobody's. What ran begins again."""
        running = list(worker.running.values())
        for job in running:
            self._interrupt(job, worker)
            job.tokens_done = 0
        jobs = [*running, *worker.queue]
        worker.queue.clear()
        for job in jobs:
            job.worker = None
        return jobs

    def _interrupt(self, job: Job, worker: Worker) -> None:
        assert job.finish is not None
        job.finish.cancel()
        job.finish, job.stopped = None, self.now
        if job.first_token > self.now:
            job.first_token = math.nan
        self._leave(job, worker)

    # --- nodes

    def lose_node(self, name: str) -> None:
        """A node goes with all that runs there and all that it has in memory. Its requests begin again elsewhere, and
        what was moving to it or from it ends where it is."""
        self.counts.nodes_lost += 1
        workers = [self.workers[replica.name] for replica in self.view.replicas_on(name)]
        partners = [one for worker in workers if (one := self._part(worker)) and one.node != name]
        jobs = [job for worker in workers for job in self._take_jobs(worker)]
        for worker in workers:
            self._remove(worker)
        self.counts.placed_again += len(jobs)
        self._away[name] = self.view.node(name)
        self.view.remove_node(name)
        self.tiers.lose(name)
        self.wires.lose(name)
        self.control.lost(jobs)
        for worker in partners:
            self._go_on(worker)
        for worker in (*workers, *partners):
            then, worker.then = worker.then, None
            if then:
                then()
        self.control.changed()

    def return_node(self, name: str) -> None:
        """It is back, with what lies on its disk."""
        self.view.add_node(self._away.pop(name))
        self.tiers.come_back(name)
        self.control.changed()

    def _part(self, worker: Worker) -> Worker | None:
        """A worker is in no migration any more; with whom it was."""
        other = worker.moving_to or worker.takes_over
        if other:
            for one in (worker, other):
                one.moving_to = one.takes_over = None
        return other

    def _go_on(self, worker: Worker) -> None:
        """The node of the other half of a migration was lost."""
        self._pull(worker)
        self._show(worker)
        self._settle(worker)

    # --- migration

    def migrate(self, worker: Worker, to: Worker, then: Callable[[], None] | None = None) -> None:
        """What `worker` runs goes on in `to` as soon as that is ready. It ends when all has gone, and `then` is
        called."""
        self.counts.migrations += 1
        worker.moving_to, to.takes_over, worker.then = to, worker, then
        self._cancel_steps(to)
        if to.state in (State.HOT, State.BUSY):
            self._take_over(to, worker)
            self._show(to)
        else:
            self._show(worker)

    def _take_over(self, worker: Worker, old: Worker) -> None:
        worker.takes_over = None
        old.moving_to = None
        for job in list(old.running.values()):
            pace = old.model.token_seconds
            made = int((self.now - job.resumed) / pace) if pace and self.now > job.resumed else 0
            job.tokens_done = min(job.tokens_done + made, job.tokens_out)
            self._interrupt(job, old)
            worker.queue.append(job)
        worker.queue.extend(old.queue)
        old.queue.clear()
        if worker.state is not State.STARTING:
            self._pull(worker)
        self.end(old)
        if old.then:
            old.then()

    # --- the view and the sums

    def _hold(self, more: int) -> None:
        """So many more replicas are ready or starting."""
        self._holding += more
        self.counts.most_replicas = max(self.counts.most_replicas, self._holding)

    def _show(self, worker: Worker) -> None:
        """Tell the view how a worker is."""
        state = worker.state
        if state in (State.HOT, State.BUSY):
            state = worker.state = State.HOT if worker.room > 0 else State.BUSY
        self.view.put(
            Replica(
                worker.name,
                worker.model.name,
                worker.node,
                worker.gpus,
                state,
                worker.since,
                tuple(worker.views.values()),
                len(worker.queue) + (worker.takes_over is not None) + (worker.moving_to is not None),
                worker.ready_at,
                self._expected(worker),
                worker.pinned,
            )
        )

    def _expected(self, worker: Worker) -> float:
        """When it should be done with all that it has, as far as anybody could know: lengths are what they usually are,
        and one that is longer already is half done."""
        usual = self.expected_tokens(worker.model.name) * worker.model.token_seconds
        rounds = -(-len(worker.queue) // worker.model.slots)
        if worker.state is State.STARTING:
            return worker.ready_at + usual * max(rounds, 1)
        if not worker.running:
            return 0.0
        late = self.now + usual / 2
        return max(late, *(job.resumed + usual for job in worker.running.values())) + usual * rounds

    def _account(self, worker: Worker) -> None:
        """Add up what it had since the last time, before that changes."""
        seconds = self.now - worker.placed_at
        if worker.state is not State.SLEEPING:
            self.counts.gpu_seconds += seconds * len(worker.gpus)
            if worker.running:
                self.counts.gpu_busy_seconds += seconds * len(worker.gpus)
            if self.spans is not None and seconds > 0:
                what = "run" if worker.running else "start" if worker.state is State.STARTING else "idle"
                for gpu in worker.gpus:
                    span = Span(worker.node, gpu, worker.model.name, worker.placed_at, self.now, what)
                    self.spans.append(span)
        self.counts.process_byte_seconds += seconds * worker.model.process_bytes
        if not (worker.running or worker.queue):
            self._account_idle(worker, seconds)
        worker.placed_at = self.now

    def _account_idle(self, worker: Worker, seconds: float) -> None:
        model = worker.model
        if worker.state is State.SLEEPING:
            self.counts.asleep_byte_seconds += seconds * model.process_bytes
        else:
            self.counts.idle_gpu_byte_seconds += seconds * model.device_bytes * len(worker.gpus)
            self.counts.idle_host_byte_seconds += seconds * model.host_bytes

    def close(self) -> None:
        """Add up to the end."""
        for worker in self.workers.values():
            self._account(worker)
        self.counts.tier_byte_seconds = self.tiers.byte_seconds
