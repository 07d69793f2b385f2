"""Carries out what one replica's state machine decides: operations on the host service and the worker's link.

    request -> Replica.handle -> effects -> tasks here -> Done | Failed -> Replica.handle -> ...

Everything runs on the node's event loop. At most one operation task exists at a time; however it ends, its outcome
goes back to the machine, so no waiter depends on a task that was forgotten.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dormouse.config import ModelConfig, devices_of
from dormouse.engine.messages import Delta, Finished, Load, Loaded, Prompt, Resumed, Sampling
from dormouse.errors import DeadlineError, DormouseError, EngineError, HostError, StoreError
from dormouse.node import canary
from dormouse.node import replica as machine
from dormouse.node.adapters import Fitting, Served
from dormouse.node.forecast import Expected, Standing
from dormouse.node.link import WorkerLink
from dormouse.node.memory import (
    context_bytes,
    engine_bytes,
    estimate,
    gpu_estimate,
    oom_kills,
    own_bytes,
    resident_bytes,
)
from dormouse.node.parts import Host, Model, Observer
from dormouse.node.replica import Replica, Start, State, Stay
from dormouse.phases import Phases
from dormouse.schedule.cluster import StartPath
from dormouse.snapshot.capture import SNAPSHOT_KIND
from dormouse.snapshot.service import CaptureResult, WorkerHandle

log = logging.getLogger(__name__)


class AbandonedError(Exception):
    """A start was given up while it waited for memory, because nobody waits for it any more."""


@dataclass(frozen=True)
class Surroundings:
    """What a runner shares with the node's other runners."""

    host: Host
    observers: list[Observer]
    step_timeout: float
    processes_stay: bool
    make_room: Callable[[Runner], Awaitable[None]]
    may_doze: Callable[[Runner, int], bool]
    stay: Callable[[Runner], Stay]
    going: Callable[[Runner], None]
    is_pinned: Callable[[Runner], bool]
    captured_beside: Callable[[Runner], bool]
    foresee: Callable[[Runner, StartPath], Awaitable[Expected | None]]
    came_true: Callable[[Runner, Expected | None, Phases], None]
    missed: Callable[[Runner, BaseException], None]
    failed: Callable[[Runner, DormouseError], None]
    dozed: Callable[[], object]
    changed: Callable[[], None]
    captured: Callable[[str, str, str], None]
    quarantine: Callable[[str, DormouseError], None]
    discard: Callable[[str], None]
    wall_clock: Callable[[], float]


class Lease:
    """A ready replica in the hands of one request. `start` says how it became ready, `adapter` with which of its
    adapters it answers."""

    def __init__(self, model: Model, context: int, start: Start, link: WorkerLink) -> None:
        self.adapter: str | None = None
        self.model = model
        self.context = context
        self.start = start
        self._link = link
        self._streams: list[AsyncIterator[Delta | Finished]] = []

    def generate(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Delta | Finished]:
        """Token events, the last one a `Finished`. Raises RequestError or EngineError while iterating."""
        stream = self._link.generate(prompt, sampling, self.adapter)
        self._streams.append(stream)
        return stream

    async def end(self) -> None:
        """Cancel what has not finished."""
        for stream in self._streams:
            assert isinstance(stream, AsyncGenerator)
            await stream.aclose()


class Runner:
    """One replica of a model together with its worker."""

    def __init__(
        self,
        name: str,
        model: Model,
        settings: ModelConfig,
        around: Surroundings,
        *,
        key: dict[str, str],
        template_key: dict[str, str],
        snapshot_id: str | None,
        canary_of: Callable[[str], Awaitable[str | None]],
        log_path: Path,
    ) -> None:
        self.name = name
        self.model = model
        self.admitted = False
        self._around = around
        self._key = key
        self._template_key = template_key
        self._canary_of = canary_of
        self._answers: dict[str, str | None] = {}
        self._canary: str | None = None
        self._log_path = log_path
        self._loop = asyncio.get_running_loop()
        self._load = Load(
            engine=settings.engine or model.engine,
            path=str(model.path),
            device=devices_of(settings.device)[0],
            threads=settings.threads,
            context=settings.context,
            kv_tokens=settings.kv_tokens,
            kv_share=settings.kv_share,
        )
        self.replica = Replica(
            name,
            stay=lambda _now: around.stay(self),
            max_concurrent=settings.max_concurrent,
            snapshots=settings.snapshot,
            snapshot_id=snapshot_id,
            now=self._loop.time(),
            dozes=settings.sleep and around.processes_stay,
            captured_beside=lambda: around.captured_beside(self),
        )
        self.slots = settings.max_concurrent
        self._wants_snapshot = settings.snapshot
        self._numbers = itertools.count(1)
        self._futures: dict[int, asyncio.Future[Lease]] = {}
        self._handle: WorkerHandle | None = None
        self._link: WorkerLink | None = None
        self._fitting: Fitting | None = None
        self._operation: asyncio.Task[machine.Done] | None = None
        self._giving_back: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._parking = Phases()
        self._restored = self._judged = False
        self._oom_kills = 0
        self.expected = self._peak = estimate(model, self._load.engine)
        self.devices = devices_of(settings.device)
        self.gpu_bytes = gpu_estimate(model, self._load.engine) if self.gpu else 0
        self._parked_bytes = engine_bytes(self._load.engine)

    # For the node

    @property
    def gpu(self) -> str | None:
        """The GPU that it is on, or was last; None on the CPU."""
        return self._load.device if self._load.device != "cpu" else None

    def move_to(self, device: str) -> None:
        """Start there next. Only for one that has no process and is not about to have one."""
        assert device in self.devices
        self._load = msgspec.structs.replace(self._load, device=device)

    @property
    def load(self) -> int:
        """Requests that it has, those that wait included."""
        return self.replica.in_flight + self.replica.waiting

    @property
    def shared_bytes(self) -> int:
        """Of what it takes: weights that replicas of the model on the same device share."""
        return self.model.weight_bytes if self.model.checkpoint is not None else 0

    @property
    def resident_bytes(self) -> int:
        """What its process has now, shared pages included."""
        return resident_bytes(self._handle.pid) if self._handle is not None else 0

    @property
    def held(self) -> int:
        """Bytes to count for its worker now: what it takes, and at least what such a model is expected to take."""
        held = max(self.expected, self.resident_bytes)
        self._peak = max(self._peak, held)
        return held

    @property
    def dozing_bytes(self) -> int:
        """What its parked process takes, as long as no room has been made for more."""
        return own_bytes(self._handle.pid) if self._handle is not None and not self.admitted else 0

    @property
    def engine(self) -> str:
        """The name of what runs it."""
        return self._load.engine

    @property
    def dozing_gpu_bytes(self) -> int:
        """What its parked process takes of its GPU, as long as no room has been made for more."""
        parked = self.gpu is not None and self._handle is not None and not self.admitted
        return context_bytes(self._load.engine) if parked else 0

    @property
    def peak(self) -> int:
        """The most it has been seen to take, and at least what is expected: room to be made for it where there is."""
        return max(self._peak, self.held)

    @property
    def pinned(self) -> bool:
        """Whether it is ready and only an explicit `Sleep` puts it to sleep."""
        return self.replica.state is State.READY and self._around.is_pinned(self)

    @property
    def waits_for_room(self) -> bool:
        """Whether it is to start, and has no memory yet."""
        return not self.admitted and self.replica.state in (State.WAKING, State.RESTORING, State.STARTING)

    def standing(self, shift: float) -> Standing:
        """For the view of schedule/, whose clock is `shift` ahead of the event loop's."""
        replica = self.replica
        pinned = self.pinned
        held = (self.held if pinned else self.peak) if self.admitted else self.dozing_bytes
        return Standing(
            name=self.name,
            model=self.model.name,
            engine=self.engine,
            checkpoint=self.model.checkpoint,
            weight_bytes=self.model.weight_bytes,
            gpu=self.gpu,
            devices=self.devices,
            slots=self.slots,
            doing=replica.state,
            since=(replica.since if replica.idle_since is None else replica.idle_since) + shift,
            running=tuple(began + shift for began in replica.running_since),
            waiting=replica.waiting,
            pinned=pinned,
            snapshot_id=replica.snapshot_id,
            template_id=replica.template_id,
            host_bytes=held,
            gpu_bytes=self.gpu_bytes if self.admitted else self.dozing_gpu_bytes,
            needs_host=self.expected,
            needs_gpu=self.gpu_bytes,
            process_bytes=self._parked_bytes,
            context_bytes=context_bytes(self.engine) if self.gpu else 0,
        )

    def replan(self) -> None:
        """How long it stays has to be asked anew."""
        self._dispatch(machine.Replan())

    def since(self, wall_time: float) -> float:
        """Since when it is in its state, in seconds of Unix time."""
        return wall_time - (self._loop.time() - self.replica.since)

    def enter(self, since: float | None = None) -> tuple[int, asyncio.Future[Lease]]:
        """Ask for it, or have asked `since` then; the number is for `release`, also when the future fails (with
        StoppingError or what a start raised) or is not waited for."""
        waiter = next(self._numbers)
        lease = self._futures[waiter] = self._loop.create_future()
        self._dispatch(machine.Request(waiter, since))
        return waiter, lease

    def release(self, waiter: int) -> None:
        """The request is over."""
        lease = self._futures.pop(waiter)
        if lease.done() and not lease.cancelled():
            lease.exception()  # nobody may have looked at it
        self._dispatch(machine.Leave(waiter))

    async def need_adapter(self, served: Served) -> None:
        """Have an adapter in the worker, of which the caller holds a lease. Raises what kept it from being loaded."""
        if self._fitting is None:
            raise EngineError(f"the worker of {self.model.name} has gone", remedy="Try again")
        await self._fitting.need(served)

    async def drop_adapter(self, served: Served, *, shared: bool) -> None:
        """Let go of an adapter that no request uses, and of its segment unless that is `shared`: one of the other name
        may be filling. A worker that is being parked or has been gets no message: it has none left when it goes on."""
        if self._fitting is not None and self.replica.state is State.READY:
            await self._fitting.drop(served)
        if not shared:
            await self._around.host.drop_segment(self._handle, served.adapter.checkpoint)

    def press(self, *, capture: bool = False, keep: bool = False) -> None:
        """Sleep as soon as no request runs; `capture`: and make a new snapshot; `keep`: the process may stay."""
        self._dispatch(machine.Sleep(capture, keep))

    def note(self, event: machine.Offer | machine.Renew | machine.Withdraw | machine.OfferTemplate) -> None:
        """Which snapshot or template there is."""
        self._dispatch(event)

    def shut_down(self) -> None:
        """Fail all waiters and end the worker."""
        self._dispatch(machine.Shutdown())

    async def abort(self) -> None:
        """Give up the operation under way; the caller ends all workers next."""
        if self._timer is not None:
            self._timer.cancel()
        if self._operation is not None:
            self._operation.cancel()
            await asyncio.wait([self._operation])
        if self._giving_back is not None:
            self._giving_back.cancel()
            await asyncio.wait([self._giving_back])
        if self._fitting is not None:
            await self._fitting.close()
        if self._link is not None:
            await self._link.close()

    @property
    def missing_snapshot(self) -> DormouseError | None:
        """Why this model has no snapshot although it should have one."""
        return self.replica.last_error if self._wants_snapshot and self.replica.snapshot_id is None else None

    # Effects

    def _dispatch(self, event: machine.Event) -> None:
        for effect in self.replica.handle(event, self._loop.time()):
            self._carry_out(effect)
        if self.replica.state is State.DOZING and self.admitted:
            self._doze()
        if self._timer is not None:
            self._timer.cancel()
        deadline = self.replica.deadline
        self._timer = self._loop.call_at(deadline, self._dispatch, machine.Tick()) if deadline is not None else None
        self._around.changed()

    def _carry_out(self, effect: machine.Effect) -> None:
        match effect:
            case machine.Serve():
                self._serve(effect)
            case machine.Fail():
                self._around.failed(self, effect.error)
                if not (future := self._futures[effect.waiter]).done():
                    future.set_exception(effect.error)
            case machine.Ready() | machine.Fallback() | machine.Retry() | machine.CaptureFailed() | machine.GiveUp():
                self._tell(effect)
            case machine.Quarantine():
                self._tell(effect)
                self._around.quarantine(effect.snapshot_id, effect.error)
            case machine.Discard():
                self._around.discard(effect.template_id)
            case _:
                assert self._operation is None
                if isinstance(effect, machine.Stop) or effect == machine.Capture(keep=False):
                    self._around.going(self)
                self._operation = self._loop.create_task(self._work(effect))
                self._operation.add_done_callback(self._ended)

    def _tell(self, effect: machine.Told) -> None:
        name, who = self.model.name, self.name
        match effect:
            case machine.Ready():
                log.info("model %s is ready: %s (%s)", who, effect.start, effect.phases)
                for observer in self._around.observers:
                    observer.started(name, effect.start, effect.phases)
            case machine.Fallback():
                what = f"{effect.path} {effect.snapshot_id}" if effect.snapshot_id else "the process that dozed"
                log.warning("%s of model %s was not used: %s", what, who, effect.error)
                for observer in self._around.observers:
                    observer.fell_back(name, effect.path, effect.error)
            case machine.Retry():
                log.warning("snapshot %s of model %s gets one more try: %s", effect.snapshot_id, who, effect.error)
                for observer in self._around.observers:
                    observer.retried(name, effect.error)
            case machine.Quarantine():
                log.error("%s is quarantined for model %s: %s", effect.snapshot_id, who, effect.error)
                for observer in self._around.observers:
                    observer.quarantined(name, effect.error)
            case machine.CaptureFailed():
                log.warning("model %s was not captured: %s", who, effect.error)
                for observer in self._around.observers:
                    observer.capture_failed(name, effect.error)
            case machine.GiveUp():
                log.error(
                    "%d snapshots of model %s in a row were bad: it is captured no more until `dormouse snapshot %s`",
                    *(effect.quarantined, name, name),
                )

    def _work(self, operation: machine.Operation) -> Coroutine[Any, Any, machine.Done]:
        match operation:
            case machine.StartCold() | machine.Restore() | machine.RestoreTemplate() | machine.Wake():
                return self._bring_up(operation)
            case machine.Quiesce():
                return self._quiesce()
            case machine.Capture():
                return self._capture(keep=operation.keep)
            case machine.Resume():
                return self._resume()
            case machine.Stop():
                return self._stop()

    def _serve(self, effect: machine.Serve) -> None:
        assert self._link is not None
        future = self._futures[effect.waiter]
        if not future.done():
            context = min(self.model.context, self._load.context or self.model.context)
            future.set_result(Lease(self.model, context, effect.start, self._link))

    def _ended(self, operation: asyncio.Task[machine.Done]) -> None:
        self._operation = None
        if operation.cancelled():
            return
        outcome = self._outcome(operation)
        self._dispatch(outcome)
        if isinstance(outcome, machine.Done) and outcome.snapshot_id is not None:  # now that this one uses it
            self._around.captured(SNAPSHOT_KIND, self.model.name, outcome.snapshot_id)
        link = self._link
        if self.replica.state is State.DOZING and link is None:
            self._dispatch(machine.WorkerDied(self.replica.last_error or self._given_up()))
        if self.replica.state in (State.READY, State.DOZING) and link is not None and link.lost is not None:
            self._dispatch(machine.WorkerDied(self._of_the_host(link.lost)))

    def _outcome(self, operation: asyncio.Task[machine.Done]) -> machine.Done | machine.Failed | machine.Abandoned:
        error = operation.exception()
        if error is None:
            return operation.result()
        if isinstance(error, AbandonedError):
            return machine.Abandoned()
        if isinstance(error, TimeoutError):
            message = f"{self.replica.state} model {self.model.name} took longer than {self._around.step_timeout:g} s"
            error = DeadlineError(message, remedy="Raise start_timeout, or look into the worker's log")
        elif not isinstance(error, DormouseError):
            log.error("%s of model %s failed", self.replica.state, self.name, exc_info=error)
            error = EngineError(f"internal error while {self.replica.state} model {self.model.name}: {error!r}")
        if self.replica.state in (State.STARTING, State.QUIESCING, State.RESUMING, State.STOPPING):
            log.error("model %s, %s: %s", self.name, self.replica.state, error)
        if self.replica.state is State.STARTING:
            for observer in self._around.observers:
                observer.start_failed(self.model.name, error)
        return machine.Failed(error, restored=self._restored)

    # Operations

    async def _bring_up(self, operation: machine.Starting) -> machine.Done:
        phases = Phases()
        self._restored = self._judged = False
        if not isinstance(operation, machine.Wake):
            await self._end_worker()
        with phases.time("room"):
            await self._room_for(operation)
        self._oom_kills = oom_kills()
        if self._giving_back is not None:
            await asyncio.wait([self._giving_back])  # else nobody knows where its weights are
        expected = await self._around.foresee(self, machine.path_of(operation))
        try:
            async with asyncio.timeout(self._around.step_timeout):
                match operation:
                    case machine.StartCold():
                        await self._start_cold(phases)
                    case machine.Restore():
                        await self._restore(operation.snapshot_id, phases)
                    case machine.RestoreTemplate():
                        await self._start_from_template(operation.template_id, phases)
                    case machine.Wake():
                        await self._wake(phases)
        except BaseException as error:
            self._around.missed(self, error)
            await self._end_worker()
            raise
        self._around.came_true(self, expected, phases)
        return machine.Done(phases=phases, proven=self._judged)

    async def _room_for(self, operation: machine.Starting) -> None:
        try:
            await self._around.make_room(self)
        except AbandonedError:
            raise
        except DormouseError:
            if isinstance(operation, machine.Wake):
                await self._end_worker()  # what another path starts must find no process
            raise

    async def _wake(self, phases: Phases) -> None:
        """Weights for the process that dozes, and on it goes: nothing of it was away, so no canary is asked."""
        link = self._link
        if link is None:
            raise self._given_up()
        with phases.time("segments"):
            await self._have_segments(link)
        with phases.time("resume"), self._judging_ends():
            resumed = await link.resume(str(self._log_path))
        self._note_gpu(resumed)
        phases.nest("resume", resumed.phases, track="worker")

    async def _have_segments(self, link: WorkerLink) -> None:
        """Take those of the model anew, if they have been given back."""
        if self._giving_back is None:
            return
        await asyncio.wait([self._giving_back])
        assert self._handle is not None
        if self.model.checkpoint is not None:
            segment = await self._around.host.take_segment(
                self._handle, self.model.checkpoint, adapter=False, device=self._load.device
            )
            link.take_segments([segment])
        self._giving_back = None

    def _doze(self) -> None:
        """The process is parked and stays: let go of what it holds besides its own memory."""
        assert self._link is not None and self._handle is not None
        self.admitted = False
        self._link.give_back_segments()
        self._giving_back = asyncio.create_task(self._give_back(self._handle), name=f"give back {self.name}")
        log.info("model %s sleeps, its process stays: %d bytes", self.name, self.dozing_bytes)
        self._around.dozed()

    async def _give_back(self, handle: WorkerHandle) -> None:
        try:
            async with asyncio.timeout(self._around.step_timeout):
                await self._around.host.drop_segments(handle)
        except (DormouseError, TimeoutError) as error:  # they stay with the worker: memory, but nothing wrong
            log.warning("the weights of model %s were not given back: %s", self.name, error)
        self._around.changed()

    def _given_up(self) -> EngineError:
        return EngineError(f"the worker of {self.model.name} was given up with its capture")

    async def _start_cold(self, phases: Phases) -> None:
        with phases.time("host"):
            self._handle = await self._around.host.start_worker(
                log_path=self._log_path, checkpoint=self.model.checkpoint, device=self._load.device
            )
        link = await self._connect(self._handle, fresh=True)
        with phases.time("load"):
            loaded = await self._loaded(link)
        phases.nest("host", self._handle.phases, track="host")
        phases.nest("load", loaded.phases, track="worker")

    async def _loaded(self, link: WorkerLink) -> Loaded:
        loaded = await link.load(self._load)
        self._note_gpu(loaded)
        return loaded

    def _note_gpu(self, told: Loaded | Resumed) -> None:
        """The worker has told what it takes of its GPU while it is awake, and whether its weights are protected."""
        if told.device_bytes:
            self.gpu_bytes = told.device_bytes + context_bytes(self._load.engine)
        if told.writable:
            log.warning("the worker of model %s could write to weights that others share", self.name)
            for observer in self._around.observers:
                observer.unprotected(self.model.name)

    async def _restore(self, snapshot_id: str, phases: Phases) -> None:
        expected = asyncio.create_task(self._answer_of(snapshot_id))
        try:
            with self._judging_ends():
                await self._restore_and_judge(snapshot_id, expected, phases)
        finally:
            expected.cancel()
            await asyncio.gather(expected, return_exceptions=True)

    async def _restore_and_judge(self, snapshot_id: str, expected: asyncio.Task[str | None], phases: Phases) -> None:
        with phases.time("host"):
            self._handle = await self._around.host.restore(
                snapshot_id, key=self._key, checkpoint=self.model.checkpoint, device=self._load.device
            )
        link = await self._connect(self._handle, fresh=False)
        with phases.time("resume"):
            resumed = await self._resume_restored(link)
        self._note_gpu(resumed)
        with phases.time("canary", track="canary"):
            if (answer := await expected) is not None:
                what = f"snapshot {snapshot_id} of {self.model.name}"
                await canary.judge(link, answer, what, tokens=canary.tokens_on(self._load.device))
                self._judged = True
        phases.nest("host", self._handle.phases, track="host")
        phases.nest("resume", resumed.phases, track="worker")

    async def _resume_restored(self, link: WorkerLink) -> Resumed:
        try:
            return await link.resume(str(self._log_path))
        except StoreError:
            self._restored = True  # the process is back: it is the model's weights that can't be read
            raise

    async def _answer_of(self, snapshot_id: str) -> str | None:
        """What the canary answered before this snapshot was made."""
        if snapshot_id not in self._answers:
            self._answers = {snapshot_id: await self._canary_of(snapshot_id)}
        return self._answers[snapshot_id]

    async def _start_from_template(self, template_id: str, phases: Phases) -> None:
        with phases.time("host"):
            self._handle = await self._around.host.restore(
                template_id, key=self._template_key, checkpoint=self.model.checkpoint, device=self._load.device
            )
        link = await self._connect(self._handle, fresh=False)
        with phases.time("resume"), self._judging_ends():
            await link.resume(str(self._log_path))
        self._restored = True
        with phases.time("load"):
            loaded = await self._loaded(link)
        phases.nest("host", self._handle.phases, track="host")
        phases.nest("load", loaded.phases, track="worker")

    async def _connect(self, handle: WorkerHandle, *, fresh: bool) -> WorkerLink:
        self._link = await WorkerLink.open(
            self.model.name, handle.control, fresh=fresh, on_lost=self._lost, segments=handle.segments
        )
        self._fitting = Fitting(
            self._around.host, handle, self._link, self._around.observers, copies=self._load.device != "cpu"
        )
        return self._link

    def _lost(self, error: DormouseError) -> None:
        if self.replica.state is State.READY:
            log.error("model %s: %s", self.name, error)
        self._dispatch(machine.WorkerDied(self._of_the_host(error)))

    @contextlib.contextmanager
    def _judging_ends(self) -> Iterator[None]:
        try:
            yield
        except EngineError as error:
            if (blamed := self._of_the_host(error)) is error:
                raise
            raise blamed from error

    def _of_the_host(self, error: DormouseError) -> DormouseError:
        """The end of a worker as the host's fault, if the kernel has killed for want of memory since it was started."""
        if not isinstance(error, EngineError) or oom_kills() == self._oom_kills:
            return error
        return HostError(
            f"{error.message}, and the kernel has killed processes for want of memory meanwhile",
            remedy="Lower `memory`, or look into the kernel's log for what else takes it",
        )

    async def _quiesce(self) -> machine.Done:
        assert self._link is not None and self._fitting is not None
        self._peak = self.peak
        phases = self._parking = Phases()
        async with asyncio.timeout(self._around.step_timeout):
            await self._fitting.settle()
            if self.replica.wants_capture or self._canary is None:
                with phases.time("canary", track="canary"):
                    self._canary = await canary.ask(self._link, tokens=canary.tokens_on(self._load.device))
            with phases.time("quiesce"):
                quiesced = await self._link.quiesce()
            self._fitting.taken_away()
        phases.nest("quiesce", quiesced.phases, track="worker")
        own = own_bytes(self._handle.pid) if self._handle is not None else 0
        self._parked_bytes = own or self._parked_bytes
        return machine.Done(phases=phases, keep=self._around.may_doze(self, own))

    async def _capture(self, *, keep: bool) -> machine.Done:
        assert self._link is not None and self._handle is not None
        phases = self._parking  # what went before belongs to it
        try:
            async with asyncio.timeout(self._around.step_timeout):
                with phases.time("host"):
                    result = await self._around.host.capture(
                        self._handle, model=self.model.name, key=self._full_key(), keep=keep
                    )
        except TimeoutError:
            await self._end_worker()  # the capture may yet go on: its worker must never serve again
            raise
        phases.nest("host", result.phases, track="host")
        self._answers = {result.snapshot_id: self._canary}
        if not keep:
            self._handle = None
            await self._end_worker()
        self._tell_captured(result, phases)
        return machine.Done(snapshot_id=result.snapshot_id, phases=phases)

    def _full_key(self) -> dict[str, str]:
        """The key as it is stored with a snapshot."""
        return self._key | ({canary.FIELD: self._canary} if self._canary is not None else {})

    def _tell_captured(self, result: CaptureResult, phases: Phases) -> None:
        name = self.model.name
        log.info(
            "model %s is captured as %s: %d bytes raw, %d stored (%s)",
            *(name, result.snapshot_id, result.raw_bytes, result.stored_bytes, phases),
        )
        for observer in self._around.observers:
            observer.captured(name, result, phases)

    async def _resume(self) -> machine.Done:
        if self._link is None:
            raise self._given_up()
        async with asyncio.timeout(self._around.step_timeout):
            await self._have_segments(self._link)
            resumed = await self._link.resume(str(self._log_path))
        self.admitted = True
        return machine.Done(phases=resumed.phases)

    async def _stop(self) -> machine.Done:
        await self._end_worker()
        return machine.Done()

    async def _end_worker(self) -> None:
        """Make sure that no worker is left. A worker that could not be stopped is tried again by the next call."""
        if self._giving_back is not None:
            await asyncio.wait([self._giving_back])
            self._giving_back = None
        if self._fitting is not None:
            await self._fitting.close()
            self._fitting = None
        if self._link is not None:
            await self._link.close()
            self._link = None
        if self._handle is not None:
            self._peak = self.peak
            async with asyncio.timeout(self._around.step_timeout):
                await self._around.host.stop_worker(self._handle)
            self._handle = None
        self.admitted = False
