"""The life of one model's replica as a pure state machine: events in, effects out, time as an argument.

    Request -> asleep -> restoring --Done--> ready -> quiescing -> capturing -> (Done: asleep)
                 |           | Failed          ^          |            | Failed
                 |           v                 |          v            v
                 +------> starting --Done------+------ resuming <------+        any of these -> stopping -> asleep

                                       ready -> quiescing (-> capturing) -> dozing -> waking --Done--> ready

A replica that is *dozing* has its process still, parked and without weights; one that is asleep has none. Whether the
process may stay is told with the end of the quiescing (`Done.keep`), when it is known what it takes.

A start takes the first path that is open: the process that dozes, its snapshot, a template of its engine (a worker
that has no model yet), or cold. A path that fails is told (`Fallback`) and the next one is taken, so a waiter never
gets one for another.

Each state but asleep, dozing and ready has exactly one operation under way; the runner (runner.py) carries it out and
reports `Done` or `Failed`. So there is never more than one worker, and a result can't be mistaken for another's. A
request holds a waiter's number from `Request` until `Leave`; every waiter gets exactly one `Serve` or `Fail`, unless it
leaves first.

Choices worth knowing:

- A request that arrives while the worker is being quiesced makes it resume at once: that takes milliseconds. One that
  arrives during the capture itself waits for the commit and the restore: a dump can't be interrupted safely, and with
  the snapshot committed the same wait is never paid again.
- A capture that fails leaves the worker there: it dozes where it may, else it runs on and the next attempt comes after
  twice the time it stays ready. After three failures the idle model is captured no more and its worker is stopped if it
  may not doze, for memory held by an idle model is what users pay for.
- A process that dozes is only a cache: `Sleep` (somebody needs its room) ends it at once, and its death costs nobody a
  request and no snapshot its good name.
- A snapshot that fails to restore, or whose worker dies before it has answered anyone, is tried once more and then
  quarantined: it is never used again, and the next idle time makes a new one. What is not the snapshot's fault (this
  host is out of something, the snapshot belongs to another host) never counts against it; damage does so at once.
  A worker whose canary was judged well proves its snapshot: that it dies later is not the snapshot's fault.
- Of several replicas that fall asleep and want a snapshot one is captured; the others go without, and use its one.
- A snapshot that can't be restored and has been replaced meanwhile (its space may be free by then) is followed by the
  newer one.
- Three snapshots quarantined in a row, none of them proven, are no accident: no more are made until somebody asks for
  one. Else a model whose captures are never good would be restored in vain, and captured, for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto

from dormouse.errors import (
    BusyError,
    DamagedError,
    DeadlineError,
    DormouseError,
    HostError,
    IncompatibleError,
    NotFoundError,
    StoppingError,
    StoreError,
    UntrustedError,
)
from dormouse.phases import Phases
from dormouse.schedule.cluster import StartPath

MAX_CAPTURE_FAILURES = 3
MAX_RESTORE_FAILURES = 2
MAX_QUARANTINES = 3
STOP_RETRY = 5.0


class State(StrEnum):
    """What the replica is doing now."""

    ASLEEP = "asleep"
    STARTING = "starting"
    RESTORING = "restoring"
    WAKING = "waking"
    READY = "ready"
    QUIESCING = "quiescing"
    CAPTURING = "capturing"
    DOZING = "dozing"
    RESUMING = "resuming"
    STOPPING = "stopping"


@dataclass(frozen=True)
class Start:
    """How the replica became ready for one request, and the seconds that took."""

    path: StartPath
    seconds: float

    def __str__(self) -> str:
        return f"{self.path}; {self.seconds:.3f}"


class Verdict(Enum):
    """What a failed restore says about the snapshot."""

    SUSPECT = auto()
    """It may be bad: once more, then never again."""
    BAD = auto()
    """It is bad: never again."""
    UNFIT = auto()
    """It is not for this host and these settings, or gone. Elsewhere or later it may be good."""
    INNOCENT = auto()
    """This host could not do it now, the store could not be read, or it was the model's weights."""


def judge(error: DormouseError) -> Verdict:
    """The verdict on a snapshot whose restore failed with this error."""
    match error:
        case IncompatibleError() | NotFoundError() | UntrustedError():
            return Verdict.UNFIT
        case DamagedError():
            return Verdict.BAD
        case HostError() | BusyError() | StoppingError() | StoreError():
            return Verdict.INNOCENT
    return Verdict.SUSPECT


# Events


@dataclass(frozen=True)
class Request:
    """Someone wants to use the model. `waiter` is a number never used before; `since`: it has waited elsewhere since
    then."""

    waiter: int
    since: float | None = None


@dataclass(frozen=True)
class Leave:
    """The waiter has finished, or has gone without waiting any longer."""

    waiter: int


@dataclass(frozen=True)
class Done:
    """The operation under way has succeeded; `snapshot_id` is a capture's. `proven`: the restored worker has answered
    a known question as it should. `keep`: there is room for the process that has been parked."""

    snapshot_id: str | None = None
    proven: bool = False
    keep: bool = False
    phases: Phases = field(default_factory=lambda: Phases(0.0))


@dataclass(frozen=True)
class Failed:
    """The operation under way has failed. After a failed start nothing runs; after a failed capture the worker is
    there. `restored`: a worker had been restored and answered, what failed came after that."""

    error: DormouseError
    restored: bool = False


@dataclass(frozen=True)
class Abandoned:
    """The start under way was given up before it did anything (a process that dozed is as it was): nobody wants it any
    more."""


@dataclass(frozen=True)
class WorkerDied:
    """The worker of a ready or dozing replica has ended by itself."""

    error: DormouseError


@dataclass(frozen=True)
class Sleep:
    """Sleep as soon as no request runs, whatever the keep-alive says; `capture`: and make a new snapshot; `keep`: the
    process may stay."""

    capture: bool = False
    keep: bool = False


@dataclass(frozen=True)
class Offer:
    """There is a snapshot of this model that may be used."""

    snapshot_id: str


@dataclass(frozen=True)
class Renew:
    """Another replica of the model has been captured: its snapshot takes the place of what this one would use."""

    snapshot_id: str


@dataclass(frozen=True)
class Withdraw:
    """A snapshot must not be used any more."""

    snapshot_id: str


@dataclass(frozen=True)
class OfferTemplate:
    """The template of the model's engine from now on; None: there is none."""

    template_id: str | None


@dataclass(frozen=True)
class Tick:
    """Time has passed: `deadline` may have come."""


@dataclass(frozen=True)
class Replan:
    """How long an idle replica stays has to be asked anew."""


@dataclass(frozen=True)
class Shutdown:
    """Stop now and for good."""


Event = (
    Request
    | Leave
    | Done
    | Failed
    | Abandoned
    | WorkerDied
    | Sleep
    | Offer
    | Renew
    | Withdraw
    | OfferTemplate
    | Tick
    | Replan
    | Shutdown
)


# Effects


@dataclass(frozen=True)
class StartCold:
    """Start a worker and load the model."""


@dataclass(frozen=True)
class Restore:
    """Restore a worker from a snapshot and resume it."""

    snapshot_id: str


@dataclass(frozen=True)
class RestoreTemplate:
    """Restore a worker without a model, resume it and load the model."""

    template_id: str


@dataclass(frozen=True)
class Wake:
    """Give the process that dozes its weights and resume it."""


@dataclass(frozen=True)
class Quiesce:
    """Ask the worker to park."""


@dataclass(frozen=True)
class Capture:
    """Capture the parked worker and end it; `keep`: leave it parked."""

    keep: bool = False


@dataclass(frozen=True)
class Resume:
    """Let the parked worker go on."""


@dataclass(frozen=True)
class Stop:
    """End the worker."""


@dataclass(frozen=True)
class Serve:
    """The replica is this waiter's to use until it leaves."""

    waiter: int
    start: Start


@dataclass(frozen=True)
class Fail:
    """The waiter can't be served."""

    waiter: int
    error: DormouseError


@dataclass(frozen=True)
class Ready:
    """Tell: a start has succeeded."""

    start: Start
    phases: Phases


@dataclass(frozen=True)
class Fallback:
    """Tell: a start path was not taken to its end, another follows if anyone still waits. `snapshot_id` is empty for a
    process that dozed."""

    path: StartPath
    snapshot_id: str
    error: DormouseError


@dataclass(frozen=True)
class Retry:
    """Tell: a snapshot has failed and gets one more chance."""

    snapshot_id: str
    error: DormouseError


@dataclass(frozen=True)
class Quarantine:
    """Remember: a snapshot or template must never be used again."""

    snapshot_id: str
    error: DormouseError


@dataclass(frozen=True)
class Discard:
    """Remember while this node runs: a template is not for this host, another must be made."""

    template_id: str


@dataclass(frozen=True)
class CaptureFailed:
    """Tell: no snapshot was made."""

    error: DormouseError


@dataclass(frozen=True)
class GiveUp:
    """Tell: too many snapshots were bad, no more are made until somebody asks for one."""

    quarantined: int


Starting = StartCold | Restore | RestoreTemplate | Wake
Operation = Starting | Quiesce | Capture | Resume | Stop
Told = Ready | Fallback | Retry | Quarantine | CaptureFailed | GiveUp
Effect = Operation | Serve | Fail | Told | Discard

_PATHS: Mapping[type[Starting], StartPath] = {
    StartCold: "cold",
    Restore: "snapshot",
    RestoreTemplate: "template",
    Wake: "sleep",
}
_STARTS_IN: Mapping[type[Starting], State] = {
    StartCold: State.STARTING,
    Restore: State.RESTORING,
    RestoreTemplate: State.RESTORING,
    Wake: State.WAKING,
}


@dataclass(frozen=True)
class Stay:
    """Until when an idle replica stays ready, and until when its process may doze after that; `inf`: until it is told
    otherwise, or its memory is needed."""

    hot_until: float = math.inf
    doze_until: float = math.inf


@dataclass(frozen=True)
class _Waiter:
    arrived: float
    starts: int


class Replica:
    """One model's replica. Not thread-safe: one event loop owns it. `stay` is asked whenever it has nothing to do any
    more, with the time and when the replica already says that it is idle; `captured_beside`: whether another replica of
    the model is being captured, whose snapshot will do."""

    def __init__(
        self,
        model: str,
        *,
        stay: Callable[[float], Stay],
        max_concurrent: int,
        snapshots: bool,
        snapshot_id: str | None,
        now: float,
        dozes: bool = False,
        captured_beside: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model = model
        self.state = State.ASLEEP
        self.since = now
        self.sleeps = 0
        self.snapshot_id = snapshot_id if snapshots else None
        self.template_id: str | None = None
        self.last_error: DormouseError | None = None
        self.idle_since: float | None = None
        self.stays = Stay()
        self.capturing = False
        """A snapshot of it is being made, or it is parked for that."""
        self._stay = stay
        self._captured_beside = captured_beside
        self._max_concurrent = max_concurrent
        self._snapshots = snapshots
        self._dozes = dozes
        self._waiters: dict[int, _Waiter] = {}
        self._running: dict[int, float] = {}
        self._attempt: Starting = StartCold()
        self._proven = True
        self._restore_failures = 0
        self._capture_failures = 0
        self._quarantines = 0
        self._pressed = self._kept_when_pressed = False
        self._keeping = False
        self._recapture = False
        self._closing = False
        self._began = now
        self._starts = 0
        self.ready_at: float | None = None
        self.last_start: Start | None = None
        self._retry_stop_at: float | None = None
        self._effects: list[Effect] = []

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiters)

    @property
    def in_flight(self) -> int:
        """Requests that use the worker."""
        return len(self._running)

    @property
    def running_since(self) -> tuple[float, ...]:
        """Since when it has each of them."""
        return tuple(self._running.values())

    def began(self, waiter: int) -> float | None:
        """Since when a request has the worker; None when it has not."""
        return self._running.get(waiter)

    @property
    def next_path(self) -> StartPath:
        """The path that a request would take now."""
        if self.state in (State.ASLEEP, State.STOPPING, State.CAPTURING):
            return path_of(self._first_path())
        return "sleep" if self.state is State.DOZING else "hot"

    @property
    def leaving(self) -> bool:
        """Its memory is about to be freed, or most of it."""
        return self.state in (State.QUIESCING, State.CAPTURING, State.STOPPING)

    @property
    def deadline(self) -> float | None:
        """When a `Tick` is due."""
        if self._retry_stop_at is not None:
            return self._retry_stop_at
        if self.state is State.DOZING:
            return self.stays.doze_until if math.isfinite(self.stays.doze_until) else None
        if self.state is not State.READY or self.idle_since is None or math.isinf(self.stays.hot_until):
            return None
        return self.idle_since + (self.stays.hot_until - self.idle_since) * (1 << self._capture_failures)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event; what is to be done about it comes back in order."""
        match event:
            case Request():
                self._request(event, now)
            case Leave():
                self._leave(event.waiter)
            case Done():
                self._done(event, now)
            case Failed():
                self._failed(event, now)
            case Abandoned():
                self._enter(State.DOZING if self.state is State.WAKING else State.ASLEEP, now)
            case WorkerDied():
                if self.state in (State.READY, State.DOZING):
                    self._worker_died(event.error, now)
            case Sleep():
                self._press(event)
            case Offer() | Renew() | Withdraw() | OfferTemplate() | Replan():
                self._take_note(event, now)
            case Shutdown():
                self._closing = True
                self._fail_waiters(shutting_down(self.model))
            case Tick():
                if self._retry_stop_at is not None and now >= self._retry_stop_at:
                    self._operate(State.STOPPING, Stop(), now)
        self._settle(now)
        effects, self._effects = self._effects, []
        return effects

    def _request(self, event: Request, now: float) -> None:
        if self._closing:
            self._effects.append(Fail(event.waiter, shutting_down(self.model)))
            return
        seen = self._starts
        if event.since is not None and self.ready_at is not None and event.since < self.ready_at:
            seen -= 1  # it has waited for the latest start
        self._waiters[event.waiter] = _Waiter(now if event.since is None else event.since, seen)

    def _leave(self, waiter: int) -> None:
        self._waiters.pop(waiter, None)
        if waiter in self._running:
            del self._running[waiter]
            self._prove()

    def _prove(self) -> None:
        """The worker is as it should be, and so was the snapshot it came from, if it came from one."""
        self._proven = True
        self._restore_failures = 0
        if isinstance(self._attempt, Restore):
            self._quarantines = 0

    def _press(self, event: Sleep) -> None:
        if self.state is State.ASLEEP or (self.state is State.DOZING and event.keep and not event.capture):
            return
        self._kept_when_pressed = event.keep and (self._kept_when_pressed or not self._pressed)
        self._pressed = True
        if event.capture:
            self._recapture = True
            self._capture_failures = self._quarantines = 0

    def _take_note(self, event: Offer | Renew | Withdraw | OfferTemplate | Replan, now: float) -> None:
        match event:
            case Replan():
                if self.state is State.READY and self.idle_since is not None:
                    self.stays = self._stay(now)
            case Offer():
                self._quarantines = 0
                if self._snapshots and self.snapshot_id is None:
                    self._use(event.snapshot_id)
            case Renew():
                if self._snapshots and self.snapshot_id != event.snapshot_id:
                    self._use(event.snapshot_id)
            case Withdraw():
                if self.snapshot_id == event.snapshot_id:
                    self._use(None)
            case OfferTemplate():
                self.template_id = event.template_id if self._snapshots else None

    def _use(self, snapshot_id: str | None) -> None:
        self.snapshot_id = snapshot_id
        self._restore_failures = 0

    def _worker_died(self, error: DormouseError, now: float) -> None:
        self.last_error = error
        attempt = self._attempt
        unproven = self.state is State.READY and not self._proven  # one that dozes did nothing
        if unproven and isinstance(attempt, Restore) and judge(error) is Verdict.SUSPECT:
            self._suspect(attempt.snapshot_id, error)
        self._operate(State.STOPPING, Stop(), now)

    def _done(self, event: Done, now: float) -> None:
        match self.state:
            case State.STARTING | State.RESTORING | State.WAKING:
                self._started(event, now)
            case State.QUIESCING:
                self._parked(event.keep, now)
            case State.CAPTURING:
                self._use(event.snapshot_id)
                self._capture_failures = 0
                self._recapture = False
                if self._keeping:
                    self._lie_down(now)
                else:
                    self._enter(State.ASLEEP, now)
            case State.RESUMING:
                self._enter(State.READY, now)
            case State.STOPPING:
                self._enter(State.ASLEEP, now)

    def _parked(self, room: bool, now: float) -> None:
        self._keeping = room and self._may_keep(now)
        if self._closing:
            self._operate(State.STOPPING, Stop(), now)
        elif self._waiters:
            self._operate(State.RESUMING, Resume(), now)
        elif self.wants_capture:
            self._operate(State.CAPTURING, Capture(keep=self._keeping), now)
        else:
            self._lie_down(now)

    def _lie_down(self, now: float) -> None:
        """The process is there and parked: it dozes if it still may."""
        if self._keeping and self._may_keep(now):
            self._enter(State.DOZING, now)
        else:
            self._operate(State.STOPPING, Stop(), now)

    def _started(self, event: Done, now: float) -> None:
        self.last_start = Start(_PATHS[type(self._attempt)], now - self._began)
        self.ready_at = now
        self._proven = False
        if event.proven:
            self._prove()
        self._starts += 1
        self.last_error = None
        self._effects.append(Ready(self.last_start, event.phases))
        self._enter(State.READY, now)

    def _failed(self, event: Failed, now: float) -> None:
        error = self.last_error = event.error
        match self.state:
            case State.RESTORING | State.WAKING:
                self._restore_failed(event, now)
            case State.STARTING:
                self._fail_waiters(error)
                self._enter(State.ASLEEP, now)
            case State.QUIESCING:
                if self.wants_capture:
                    self._capture_failed(error)
                self._operate(State.STOPPING, Stop(), now)
            case State.CAPTURING:
                self._capture_failed(error)
                if self._keeping and self._may_keep(now) and not self._waiters:
                    self._recapture = False
                    self._lie_down(now)
                elif self._waiters or not (self._pressed or self._closing):
                    self._operate(State.RESUMING, Resume(), now)
                else:
                    self._operate(State.STOPPING, Stop(), now)
            case State.RESUMING:
                self._operate(State.STOPPING, Stop(), now)
            case State.STOPPING:
                self._fail_waiters(error)
                self._retry_stop_at = now + STOP_RETRY

    def _restore_failed(self, event: Failed, now: float) -> None:
        attempt = self._attempt
        assert not isinstance(attempt, StartCold)
        again, following = False, self._first_path()
        match attempt:
            case Wake():
                self._effects.append(Fallback("sleep", "", event.error))
            case Restore():
                again = self._snapshot_failed(attempt.snapshot_id, event)
                following = self._after(attempt.snapshot_id, event)
            case RestoreTemplate():
                self._template_failed(attempt.template_id, event)
                following = StartCold()
        if not self._waiters:
            self._enter(State.ASLEEP, now)
        else:
            self._start(attempt if again else following, now)

    def _after(self, snapshot_id: str, event: Failed) -> Starting:
        """What follows a snapshot that is not tried again. One that took its place meanwhile does (it may have been
        removed for that one), unless the snapshot is not what was wrong."""
        innocent = event.restored or judge(event.error) is Verdict.INNOCENT
        if self.snapshot_id not in (None, snapshot_id) and not innocent:
            return self._first_path()
        return RestoreTemplate(self.template_id) if self.template_id else StartCold()

    def _snapshot_failed(self, snapshot_id: str, event: Failed) -> bool:
        """Whether to try it again at once."""
        error = event.error
        match Verdict.INNOCENT if event.restored else judge(error):
            case Verdict.SUSPECT:
                hopeful = self._suspect(snapshot_id, error)
                if hopeful and not isinstance(error, DeadlineError):  # who waits has waited long enough
                    return True
            case Verdict.BAD:
                self._quarantine(snapshot_id, error)
            case Verdict.UNFIT:
                self._forget(snapshot_id)
            case Verdict.INNOCENT:
                pass
        self._effects.append(Fallback("snapshot", snapshot_id, error))
        return False

    def _suspect(self, snapshot_id: str, error: DormouseError) -> bool:
        """Count a failure; whether the snapshot may be used once more."""
        if self.snapshot_id != snapshot_id:
            return False
        self._restore_failures += 1
        if self._restore_failures < MAX_RESTORE_FAILURES:
            self._effects.append(Retry(snapshot_id, error))
            return True
        self._quarantine(snapshot_id, error)
        return False

    def _quarantine(self, snapshot_id: str, error: DormouseError) -> None:
        self._effects.append(Quarantine(snapshot_id, error))
        self._forget(snapshot_id)
        self._quarantines += 1
        if self._quarantines == MAX_QUARANTINES:
            self._effects.append(GiveUp(self._quarantines))

    def _forget(self, snapshot_id: str) -> None:
        if self.snapshot_id == snapshot_id:
            self._use(None)

    def _template_failed(self, template_id: str, event: Failed) -> None:
        """A template costs little to make anew, so it gets no second chance; but one whose worker came up is not to
        blame for a model that can't be loaded."""
        verdict = judge(event.error)
        if verdict is Verdict.UNFIT and not event.restored:
            self._effects.append(Discard(template_id))
        elif verdict in (Verdict.SUSPECT, Verdict.BAD) and not event.restored:
            self._effects.append(Quarantine(template_id, event.error))
        if self.template_id == template_id and verdict is not Verdict.INNOCENT:
            self.template_id = None
        self._effects.append(Fallback("template", template_id, event.error))

    def _capture_failed(self, error: DormouseError) -> None:
        self._capture_failures += 1
        self._effects.append(CaptureFailed(error))

    def _settle(self, now: float) -> None:
        """What follows from the state alone, whichever event led to it."""
        if self.state is State.ASLEEP and self._waiters:
            self._began = now
            self._start(self._first_path(), now)
        elif self.state is State.DOZING:
            self._stir(now)
        elif self.state is State.READY and self._closing:
            self._operate(State.STOPPING, Stop(), now)
        elif self.state is State.READY:
            self._serve(now)
            if self._running:
                self.idle_since = None
                return
            if self.idle_since is None:
                self.idle_since = now
                self.stays = self._stay(now)
            deadline = self.deadline
            if self._pressed or (deadline is not None and now >= deadline):
                self._fall_asleep(now)

    def _first_path(self) -> Starting:
        """Where there is no process."""
        if self.snapshot_id is not None:
            return Restore(self.snapshot_id)
        return RestoreTemplate(self.template_id) if self.template_id is not None else StartCold()

    def _stir(self, now: float) -> None:
        """What a process that dozes is roused by."""
        if self._closing:
            self._operate(State.STOPPING, Stop(), now)
        elif self._waiters:
            self._began = now
            self._start(Wake(), now)
        elif self._recapture and self.wants_capture:
            self._keeping = False
            self._operate(State.CAPTURING, Capture(), now)
        elif not self._may_keep(now):
            self._operate(State.STOPPING, Stop(), now)
        else:
            self._pressed = self._kept_when_pressed = self._recapture = False

    def _serve(self, now: float) -> None:
        while self._waiters and len(self._running) < self._max_concurrent:
            number = next(iter(self._waiters))
            waiter = self._waiters.pop(number)
            self._running[number] = now
            start = self.last_start if waiter.starts < self._starts else None
            self._effects.append(Serve(number, start or Start("hot", now - waiter.arrived)))

    @property
    def wants_capture(self) -> bool:
        """Whether falling asleep makes a snapshot."""
        hopeful = self._capture_failures < MAX_CAPTURE_FAILURES and self._quarantines < MAX_QUARANTINES
        missing = self.snapshot_id is None and not self._captured_beside()
        return self._snapshots and hopeful and (missing or self._recapture)

    def _may_keep(self, now: float) -> bool:
        """Whether nobody wants the process gone."""
        wanted = now < self.stays.doze_until and (self._kept_when_pressed or not self._pressed)
        return self._dozes and not self._closing and wanted

    def _fall_asleep(self, now: float) -> None:
        if self.wants_capture or self._may_keep(now):
            self._operate(State.QUIESCING, Quiesce(), now)
        else:
            self._operate(State.STOPPING, Stop(), now)

    def _fail_waiters(self, error: DormouseError) -> None:
        self._effects += [Fail(waiter, error) for waiter in self._waiters]
        self._waiters.clear()

    def _start(self, attempt: Starting, now: float) -> None:
        self._attempt = attempt
        self._operate(_STARTS_IN[type(attempt)], attempt, now)

    def _operate(self, state: State, operation: Operation, now: float) -> None:
        self._enter(state, now)
        if state is State.STOPPING:
            self._running.clear()
        self._effects.append(operation)

    def _enter(self, state: State, now: float) -> None:
        self.state, self.since = state, now
        self.idle_since = None
        self._retry_stop_at = None
        self.capturing = state is State.CAPTURING or (state is State.QUIESCING and self.wants_capture)
        if state is State.ASLEEP:
            self._pressed = self._kept_when_pressed = self._recapture = False
        if state in (State.ASLEEP, State.DOZING):
            self.sleeps += 1


def path_of(operation: Starting) -> StartPath:
    """What an operation that starts it is called."""
    return _PATHS[type(operation)]


def shutting_down(model: str) -> StoppingError:
    """What a request gets that comes too late."""
    return StoppingError(f"the node is shutting down, model {model} is not started any more", remedy="Try again later")
