"""The simulated cluster: what happens when a decision is carried out.

    start, wake, assign, end, doze, preempt, migrate  ->  transfers, phases, tokens  ->  the view of schedule/, records

A `World` has no opinions. A `Control` (control.py, peers.py) decides, the world lets it happen and tells it afterwards.
The one account of memory is schedule's `Cluster`, which refuses whatever does not fit, so no policy can cheat here.

A start runs as `Cluster.plan` says: weights come over their links while the process comes back (its image over its own
links, then a phase of fixed length), then follows the phase `ready`. Tokens of a request come at a fixed pace, however
many requests run beside it.
"""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from dormouse.schedule.cluster import (
    Cluster,
    ModelCost,
    Move,
    Replica,
    Request,
    Running,
    StartPath,
    State,
    Tier,
)
from dormouse.schedule.estimate import Estimator, Observed, Transferred, shared
from dormouse.sim.events import Clock, Event
from dormouse.sim.links import Flow, Link, Network, Way
from dormouse.sim.scenario import Loading, Phases


@dataclass(eq=False, slots=True)
class Job:
    """A request under way. `started_by` is how the replica that it waited for became ready. `lost` is how long it stood
    still after it had begun (preempted or migrated)."""

    request: Request
    tokens_in: int
    tokens_out: int
    worker: Worker | None = None
    began: float = math.nan  # for the first time
    resumed: float = math.nan  # for the last time
    tokens_done: int = 0
    stopped: float = math.nan
    lost: float = 0.0
    started_by: StartPath = "hot"
    first_token: float = math.nan
    ended: float = math.nan
    given_up: bool = False
    finish: Event | None = None
    deadline: Event | None = None


@dataclass(eq=False, slots=True)
class Worker:
    """A replica. `queue` are jobs that wait for it; `moving_to` is the worker that takes its jobs when it is ready."""

    name: str
    model: ModelCost
    node: str
    gpus: tuple[int, ...]
    path: StartPath
    state: State
    since: float
    predicted: float | None = None
    ready_at: float = 0.0
    running: dict[str, Job] = field(default_factory=dict)
    views: dict[str, Running] = field(default_factory=dict)
    queue: deque[Job] = field(default_factory=deque)
    begun: float = 0.0
    flows: list[Flow] = field(default_factory=list)
    pending: int = 0
    event: Event | None = None
    transfers: list[Transferred] = field(default_factory=list)
    phases: list[tuple[str, float]] = field(default_factory=list)
    weights_from: Tier | None = None
    takes_over: Worker | None = None
    moving_to: Worker | None = None
    steps: list[Event] = field(default_factory=list)
    placed_at: float = 0.0
    pinned: bool = False
    start_seconds: float = 0.0
    then: Callable[[], None] | None = None  # once it has moved away

    @property
    def idle(self) -> bool:
        """It does nothing and nothing is to come."""
        return not (self.running or self.queue or self.takes_over or self.moving_to) and self.state in (
            State.HOT,
            State.SLEEPING,
        )

    @property
    def room(self) -> int:
        """How many more requests it could run now."""
        if self.moving_to or self.state not in (State.HOT, State.BUSY):
            return 0
        return self.model.slots - len(self.running)


class Control(Protocol):
    """Who decides. `changed` comes after anything that may make room for those who wait."""

    def submit(self, job: Job) -> None: ...

    def changed(self) -> None: ...

    def became_idle(self, worker: Worker) -> None: ...

    def going(self, worker: Worker) -> None: ...

    def gave_up(self, job: Job) -> None: ...

    def finished(self, job: Job) -> None: ...


@dataclass(slots=True)
class Counts:
    """What a run adds up. Seconds of GPUs are those that a replica has them; of these, `busy` is with a request."""

    gpu_seconds: float = 0.0
    gpu_busy_seconds: float = 0.0
    process_byte_seconds: float = 0.0
    tier_byte_seconds: float = 0.0
    starts: dict[str, int] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    evictions: int = 0
    preemptions: int = 0
    migrations: int = 0
    prewarms: int = 0


_REFRESH = 0.001  # for each busy link, so many seconds between two looks at all of them: many cost more and matter less

PATHS: tuple[StartPath, ...] = ("hot", "sleep", "snapshot", "template", "cold")
_PATH_NUMBER = {path: number for number, path in enumerate(PATHS)}


class Records:
    """What every request met, as columns: when it came, seconds until it began (plus those it stood still later),
    seconds to its first token, seconds in all, and how its replica had become ready. Of one that was given up, the
    seconds are those that it waited."""

    def __init__(self) -> None:
        self.arrived = array("d")
        self.start = array("d")
        self.first = array("d")
        self.total = array("d")
        self.path = array("b")
        self.given_up = array("b")

    def __len__(self) -> int:
        return len(self.arrived)

    def add(self, job: Job) -> None:
        arrived = job.request.arrived
        total = job.ended - arrived
        self.arrived.append(arrived)
        self.start.append(total if job.given_up else job.began - arrived + job.lost)
        self.first.append(total if job.given_up else job.first_token - arrived)
        self.total.append(total)
        self.path.append(_PATH_NUMBER[job.started_by])
        self.given_up.append(job.given_up)


@dataclass(frozen=True, slots=True)
class Span:
    """A GPU's time, for the picture."""

    node: str
    gpu: int
    model: str
    begin: float
    end: float
    what: str


class Store:
    """One tier of one node: the least recently used goes. What is larger than the tier never comes in."""

    __slots__ = ("_keys", "limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._keys: OrderedDict[str, int] = OrderedDict()

    def touch(self, key: str) -> None:
        if key in self._keys:
            self._keys.move_to_end(key)

    def add(self, key: str, size: int) -> list[str] | None:
        """What went for it; None when it does not come in."""
        if key in self._keys:
            self._keys.move_to_end(key)
            return []
        if size > self.limit:
            return None
        gone: list[str] = []
        while self.used + size > self.limit:
            old, freed = self._keys.popitem(last=False)
            self.used -= freed
            gone.append(old)
        self._keys[key] = size
        self.used += size
        return gone

    def drop(self, key: str) -> bool:
        size = self._keys.pop(key, None)
        self.used -= size or 0
        return size is not None


@dataclass(frozen=True, slots=True)
class Habits:
    """How the system under test starts things."""

    loading: Loading
    paths: dict[str, Phases]
    noise: float
    timeout: float


class World:
    """See the module. All public calls may be made by a control at any time but from within `Control.finished`."""

    def __init__(self, cluster: Cluster, habits: Habits, random: np.random.Generator, *, spans: bool = False) -> None:
        self.clock = Clock()
        self.view = cluster
        self.habits = habits
        self.estimator = Estimator()
        self.network = Network(self.clock)
        self.counts = Counts()
        self.records = Records()
        self.workers: dict[str, Worker] = {}
        self.by_model: dict[str, dict[str, Worker]] = {}
        self.spans: list[Span] | None = [] if spans else None
        self.control: Control
        self._random = random
        self._number = 0
        self._links: dict[tuple[str, str], Link] = {}
        self._busy: dict[Link, None] = {}
        self._refreshed = 0.0
        self._stores: dict[tuple[str, Tier], Store] = {}
        self._tier_used = 0
        self._tier_since = 0.0
        self._tokens: dict[str, tuple[int, int]] = {}
        for name in cluster.nodes:
            node = cluster.node(name)
            self._stores[name, Tier.DRAM] = Store(node.dram_tier)
            self._stores[name, Tier.DISK] = Store(node.disk_tier)

    @property
    def now(self) -> float:
        return self.clock.now

    # --- bytes

    def keep(self, key: str, size: int, node: str, tier: Tier) -> bool:
        """Put an artifact into a tier of a node; whether it is there."""
        store = self._stores[node, tier]
        before = store.used
        gone = store.add(key, size)
        if gone is None:
            return False
        for old in gone:
            self.view.lose(old, node, tier)
        self.view.hold(key, node, tier)
        if tier is Tier.DRAM:
            self._count_tier(store.used - before)
        return True

    def forget(self, key: str, node: str, tier: Tier) -> None:
        """Take an artifact out of a tier of a node."""
        store = self._stores[node, tier]
        before = store.used
        if store.drop(key):
            self.view.lose(key, node, tier)
            if tier is Tier.DRAM:
                self._count_tier(store.used - before)

    def _count_tier(self, more: int) -> None:
        self.counts.tier_byte_seconds += self._tier_used * (self.now - self._tier_since)
        self._tier_since = self.now
        self._tier_used += more

    def link(self, node: str, name: str) -> Link:
        """The simulated link behind one of the view's."""
        found = self._links.get((node, name))
        if found is None:
            seen = self.view.link(node, name)
            found = self._links[node, name] = Link(node, name, seen.rate, fifo=seen.fifo)
        return found

    def refresh_links(self) -> None:
        """Tell the view what is under way on links where that has changed, and now and then on all that are busy."""
        touched = self.network.touched
        for link in touched:
            if link.flows:
                self._busy[link] = None
            else:
                self._busy.pop(link, None)
                self.view.set_link(link.node, link.name, 0, 0)
        due = self.now - self._refreshed >= len(self._busy) * _REFRESH
        if due:
            self._refreshed = self.now
        for link in list(self._busy if due else touched):
            if link.flows:
                self.view.set_link(link.node, link.name, int(link.queued(self.now)), len(link.flows))
        touched.clear()

    # --- starts

    def start(
        self, model: ModelCost, node: str, gpus: tuple[int, ...], path: StartPath, predicted: float | None = None
    ) -> Worker:
        """A new replica. The view refuses it when it does not fit."""
        self._number += 1
        worker = Worker(f"w{self._number}", model, node, gpus, path, State.STARTING, self.now, predicted)
        worker.begun = worker.placed_at = self.now
        worker.ready_at = self.now + (predicted or 0.0)
        self._show(worker)
        self.workers[worker.name] = worker
        self.by_model.setdefault(model.name, {})[worker.name] = worker
        self._begin_start(worker)
        return worker

    def wake(self, worker: Worker, predicted: float | None = None) -> None:
        """A replica whose process sleeps gets its weights again."""
        assert worker.state is State.SLEEPING
        self._account(worker)
        worker.path, worker.predicted = "sleep", predicted
        worker.state, worker.since, worker.begun = State.STARTING, self.now, self.now
        worker.ready_at = self.now + (predicted or 0.0)
        self._cancel_steps(worker)
        self._show(worker)
        self._begin_start(worker)

    def _begin_start(self, worker: Worker) -> None:
        plan = self.view.plan(worker.model, worker.node, worker.path, worker.gpus)
        if plan is None:
            raise ValueError(f"{worker.model.name} can't start by {worker.path} on {worker.node}")
        self.counts.starts[worker.path] = self.counts.starts.get(worker.path, 0) + 1
        worker.transfers, worker.phases, worker.flows = [], [], []
        worker.pending = 2
        worker.weights_from = plan.weights.source if plan.weights else None
        if plan.image is None:
            self._process(worker)
        else:  # before the weights: it is small, and much waits for it
            self._bring(worker, plan.image, lambda: self._process(worker), beside=plan.weights)
        if plan.weights is None:
            self._part_done(worker)
        else:
            self._bring_weights(worker, plan.weights, plan.image)

    def _bring_weights(self, worker: Worker, move: Move, beside: Move | None) -> None:
        loading = self.habits.loading
        cap = loading.rate * max(len(worker.gpus), 1) if loading.rate else math.inf
        if move.source is not Tier.REMOTE or not loading.download_first:
            self._bring(worker, move, lambda: self._part_done(worker), cap, beside)
            return
        first = Move("weights", move.key, move.size, Tier.REMOTE, move.links[:1])
        second = Move("weights", move.key, move.size, Tier.DISK, ("disk", *move.links[1:]))
        self._bring(worker, first, lambda: self._bring(worker, second, lambda: self._part_done(worker), cap))

    def _bring(
        self,
        worker: Worker,
        move: Move,
        then: Callable[[], None],
        cap: float = math.inf,
        beside: Move | None = None,
    ) -> None:
        node = worker.node
        slowest, size, ahead = self._slowest(node, move)
        ahead += shared(beside, slowest, size)
        began = self.now
        way: Way = tuple((self.link(node, name), move.size_on(name) / move.size) for name in move.links)

        def done() -> None:
            worker.flows.remove(flow)
            tier = move.source.name.lower()
            self.counts.moved[tier] = self.counts.moved.get(tier, 0.0) + move.size
            worker.transfers.append(Transferred(move.name, (slowest,), size, self.now - began, ahead))
            self._arrived(node, move)
            then()

        flow = self.network.start(move.size, way, done, cap)
        worker.flows.append(flow)

    def _slowest(self, node: str, move: Move) -> tuple[str, int, int]:
        """The link of its way that should take longest, the bytes that go over it, and those before them."""
        found: list[tuple[float, str, int, int]] = []
        for name in move.links:
            seen, size = self.view.link(node, name), move.size_on(name)
            ahead = seen.ahead(size)
            found.append(((ahead + size) / seen.rate, name, size, ahead))
        return max(found)[1:]

    def _arrived(self, node: str, move: Move) -> None:
        loading = self.habits.loading
        for tier in (Tier.DISK, Tier.DRAM):
            self._stores[node, tier].touch(move.key)
        if move.source is Tier.REMOTE and loading.keep_on_disk:
            self.keep(move.key, move.size, node, Tier.DISK)
        if loading.keep_in_dram and move.links != ("network",):
            self.keep(move.key, move.size, node, Tier.DRAM)

    def _phase(self, worker: Worker, name: str, seconds: float, then: Callable[[Worker], None]) -> None:
        if self.habits.noise and seconds:
            seconds *= math.exp(self._random.normal(0.0, self.habits.noise))
        worker.phases.append((name, seconds))
        worker.event = self.clock.at(self.now + seconds, then, worker)

    def _process(self, worker: Worker) -> None:
        self._phase(worker, "process", self.habits.paths[worker.path].process, self._part_done)

    def _part_done(self, worker: Worker) -> None:
        worker.pending -= 1
        if not worker.pending:
            self._phase(worker, "ready", self.habits.paths[worker.path].ready, self._ready)

    def _ready(self, worker: Worker) -> None:
        self._account(worker)
        worker.event = None
        worker.state, worker.since = State.HOT, self.now
        worker.start_seconds = self.now - worker.begun
        self._observe(worker)
        if worker.takes_over:
            self._take_over(worker, worker.takes_over)
        self._pull(worker)
        self._show(worker)
        self._settle(worker)
        self.control.changed()

    def _observe(self, worker: Worker) -> None:
        phases = tuple((name, seconds) for name, seconds in worker.phases if name in ("process", "ready"))
        started = Observed(
            worker.model.name,
            worker.model.engine,
            worker.node,
            worker.path,
            self.now - worker.begun,
            tuple(worker.transfers),
            phases,  # type: ignore[arg-type]
            worker.predicted,
            self.view.node(worker.node).kind,
        )
        self.estimator.observe(started, self.view)

    # --- requests

    def assign(self, job: Job, worker: Worker) -> None:
        """The job is this worker's: it begins now, or waits for it."""
        job.worker = worker
        ready = worker.state in (State.HOT, State.BUSY)
        if math.isnan(job.began):
            job.started_by = "hot" if ready else worker.path
        self._cancel_steps(worker)
        if ready and not worker.queue and worker.room > 0:
            self._run(job, worker)
        else:
            worker.queue.append(job)
            self.expect_deadline(job)
        self._show(worker)

    def expect_deadline(self, job: Job) -> None:
        """The job waits: from now on it may be given up."""
        if job.deadline is None and math.isnan(job.began):
            at = job.request.arrived + self.habits.timeout
            job.deadline = self.clock.at(max(at, self.now), self._give_up, job)

    def _give_up(self, job: Job) -> None:
        job.given_up, job.ended, job.deadline = True, self.now, None
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
            job.first_token = now + prefill + worker.model.token_seconds
        else:
            job.lost += now - job.stopped
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
        worker.state, worker.since = State.SLEEPING, self.now
        self._show(worker)

    def end(self, worker: Worker) -> None:
        """An idle or starting replica goes. Its memory is free at once."""
        assert not (worker.running or worker.queue or worker.takes_over or worker.moving_to)
        self._cancel_steps(worker)
        self.control.going(worker)
        if worker.event:
            worker.event.cancel()
        for flow in list(worker.flows):
            self.network.stop(flow)
        self._account(worker)
        self.view.drop(worker.name)
        del self.workers[worker.name], self.by_model[worker.model.name][worker.name]

    def preempt(self, worker: Worker) -> list[Job]:
        """A running replica goes. The jobs it had must begin again elsewhere: what they had so far is lost."""
        self.counts.preemptions += 1
        jobs = [*worker.running.values(), *worker.queue]
        for job in list(worker.running.values()):
            assert job.finish is not None
            job.finish.cancel()
            job.stopped, job.tokens_done = self.now, 0
            self._leave(job, worker)
        worker.queue.clear()
        for job in jobs:
            job.worker = None
        self.end(worker)
        return jobs

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
            assert job.finish is not None
            job.finish.cancel()
            job.stopped = self.now
            pace = old.model.token_seconds
            made = int((self.now - job.resumed) / pace) if pace and self.now > job.resumed else 0
            job.tokens_done = min(job.tokens_done + made, job.tokens_out)
            self._leave(job, old)
            worker.queue.append(job)
        worker.queue.extend(old.queue)
        old.queue.clear()
        if worker.state is not State.STARTING:
            self._pull(worker)
        self.end(old)
        if old.then:
            old.then()

    # --- the view and the sums

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
        worker.placed_at = self.now

    def close(self) -> None:
        """Add up to the end."""
        for worker in self.workers.values():
            self._account(worker)
        self._count_tier(0)
