"""The keeper: the process of `dormouse run` and `dormouse restore`, which owns a job's replicas while they run.

    signals, ends, captures --> one queue --> the main thread decides: pass on, wait on, or end with an exit code
    streams: a thread each      control socket: a thread per request      published ports: one thread

When the keeper ends, in whatever way, its cells end with it, and with them every process of the job.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dormouse.data_dir import DataDir
from dormouse.errors import ConfigError, DormouseError, HostError, NotFoundError, SnapshotError
from dormouse.jobs.control import Answer, ControlSocket, Request, error_answer, error_in
from dormouse.jobs.publish import MakeSocket, Publisher
from dormouse.jobs.record import JobRecord, Stream, shown
from dormouse.jobs.replica import (
    CaptureOptions,
    Cells,
    Replica,
    StoredJob,
    Tools,
    announce_restore,
    capture_replica,
    environment_of_jobs,
    start,
)
from dormouse.jobs.streams import FileSink, Input, LogSink, NumberedSink, Output, Sink, say
from dormouse.snapshot.work_folder import criu_folders, sweep_work_folders
from dormouse.store.store import Store
from dormouse.trace import Operation, steps_json

log = logging.getLogger(__name__)

_PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# What a terminal would send to the whole foreground group, of which the job's processes are not.
_TO_ALL = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
_ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
_RESTORES_AT_ONCE = 4
MAX_OPERATIONS = 64
"""Restores and captures that a keeper remembers the steps of."""


@dataclass(frozen=True)
class Exited:
    """A replica's first process has ended with this code (negative: a signal), or with None its cell failed."""

    number: int
    code: int | None


@dataclass(frozen=True)
class Captured:
    """A replica is a snapshot now and no longer runs."""

    number: int
    snapshot_id: str


@dataclass(frozen=True)
class Finished:
    """A piece of work beside the main thread is done."""


Event = Exited | Captured | Finished | signal.Signals


class GivenUp(SnapshotError):
    """A signal came while the job was being restored; nothing is left of it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"the restore was given up: {number.name}", remedy="Restore it again")
        self.number = number


class Keeper:
    """One job with its replicas. `tell` shows a line to the user."""

    def __init__(
        self, data_dir: DataDir, record: JobRecord, *, log_path: Path | None, tell: Callable[[str], None]
    ) -> None:
        self.record = record
        self._data_dir = data_dir
        self._log_path = log_path
        self._tell = tell
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._replicas: dict[int, Replica] = {}
        self._outputs: list[Output] = []
        self._capturing: dict[int, threading.Lock] = {}
        self._codes: dict[int, int] = {}
        self._caught: list[signal.Signals] = []
        self._complete = False
        self._operations: deque[Operation] = deque(maxlen=MAX_OPERATIONS)
        sweep_work_folders(criu_folders(data_dir.run))
        with contextlib.ExitStack() as stack:
            self._control = ControlSocket(data_dir, record.name)
            stack.callback(self._control.close)
            self._publisher = Publisher(record.publish)
            stack.callback(self._publisher.close)
            self._control.serve(self._handle)  # from now on, as a restore may take its time
            self._stack = stack.pop_all()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_exception: object) -> None:
        for replica in self._replicas.values():
            replica.home.close()
        for number in self._caught:
            signal.signal(number, signal.SIG_DFL)  # a reader of our output may be slow; who has no patience ends us
        for output in self._outputs:
            output.join()
        self._stack.close()

    def run(self, argv: Sequence[str], cwd: Path) -> None:
        """Start the job's program."""
        self._catch_signals()
        self._adopt([start(self.record, argv, environment_of_jobs(), cwd)])

    def restore(
        self, stored: StoredJob, count: int, timeout: float, hook_timeout: float, gpus: Sequence[str] = ()
    ) -> None:
        """Bring `count` replicas back, or none: raises the first error, or GivenUp when a signal ends it before."""
        self._catch_signals()
        cells = Cells()
        ended_by: list[signal.Signals] = []

        def give_up(number: signal.Signals) -> None:
            if number in _ENDING and not ended_by:
                ended_by.append(number)
                cells.give_up()

        with (
            Tools.find(self._data_dir, timeout) as tools,
            Store.open(self._data_dir.store) as store,
            ThreadPoolExecutor(_RESTORES_AT_ONCE) as pool,
        ):
            calls = [
                pool.submit(stored.restore, number, self.record, store, tools, cells, gpus)
                for number in range(1, count + 1)
            ]
            self._beside(calls, give_up)
        errors = [error for call in calls if (error := call.exception()) is not None]
        replicas = [call.result() for call in calls if call.exception() is None]
        if ended_by or errors:
            for replica in replicas:
                replica.home.close()
                replica.pipes.close()
            raise GivenUp(ended_by[0]) if ended_by else errors[0]
        self._note_restores(replicas)
        self._adopt(replicas)
        with ThreadPoolExecutor(1) as pool:
            self._beside([pool.submit(self._announce, replicas, hook_timeout)], self._pass_on)

    def _note_restores(self, replicas: Sequence[Replica]) -> None:
        for replica in replicas:
            assert replica.restored is not None
            name = f"{self.record.name}#{replica.number}"
            self._operations.append(
                Operation("restore", name, replica.snapshot_id or "", time.time(), replica.restored)
            )

    def operations(self) -> list[Operation]:
        """The latest restores and captures, oldest first."""
        return list(self._operations)

    def _announce(self, replicas: Sequence[Replica], hook_timeout: float) -> None:
        for replica in replicas:
            for problem in announce_restore(replica, hook_timeout):
                self._tell(f"warning: {problem}")

    def _beside(self, calls: Sequence[Future[Any]], on_signal: Callable[[signal.Signals], None]) -> None:
        """Wait for all of these, and attend to signals meanwhile. Other events are kept for later."""
        for call in calls:
            call.add_done_callback(lambda _call: self._events.put(Finished()))
        later: list[Event] = []
        unfinished = len(calls)
        while unfinished:
            match self._events.get():
                case Finished():
                    unfinished -= 1
                case signal.Signals() as number:
                    on_signal(number)
                case other:
                    later.append(other)
        for event in later:
            self._events.put(event)

    def wait(self) -> int:
        """Serve until every replica has ended; the exit code for the command."""
        running = set(self._replicas)
        while running:
            event = self._events.get()
            match event:
                case signal.Signals():
                    self._pass_on(event)
                case Captured(number, snapshot_id):
                    running.discard(number)
                    self._codes[number] = 0
                    self._tell(f"captured as {snapshot_id}")
                case Exited(number, code) if number in running:
                    running.discard(number)
                    self._codes[number] = exit_status(code)
                    self._replicas[number].home.close()
                    if code is None:
                        self._tell(f"replica {number} has gone with its cell")
        return next((code for code in self._codes.values() if code), 0)

    @property
    def pids(self) -> list[int]:
        """The replicas' first processes, as the host sees them."""
        return [_outer_pid(replica) for _number, replica in sorted(self._replicas.items())]

    @property
    def addresses(self) -> list[str]:
        """Where published ports can be reached."""
        return self._publisher.addresses

    def _catch_signals(self) -> None:
        """From now on signals are events, but for those that whoever started us wants ignored (nohup, a shell's
        background jobs). Only the main thread may do this."""
        self._caught = [number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]
        for number in self._caught:
            signal.signal(number, lambda caught, _frame: self._events.put(signal.Signals(caught)))

    def _adopt(self, replicas: Sequence[Replica]) -> None:
        several = len(replicas) > 1
        sinks = self._sinks()
        for replica in replicas:
            self._capturing[replica.number] = threading.Lock()
            self._replicas[replica.number] = replica
            ours = replica.pipes.ours
            for stream, plain in sinks.items():
                sink = NumberedSink(replica.number, plain) if several else plain
                self._outputs.append(Output(ours.pop(stream), sink))
            source = 0 if not several and self._log_path is None else None
            replica.feed = Input(ours.pop("stdin"), source, replica.record.pending_input)
            threading.Thread(target=self._watch, args=(replica,), name="job-watch", daemon=True).start()
        self._publisher.start(self._targets)
        self._complete = True

    def _sinks(self) -> dict[Stream, Sink]:
        if self._log_path is None:
            return {"stdout": FileSink(1), "stderr": FileSink(2)}
        both = LogSink(self._log_path, also=(1, 2))  # where a detached keeper's own words go
        return {"stdout": both, "stderr": both}

    def _targets(self) -> list[MakeSocket]:
        return [
            replica.home.inner_socket for number, replica in sorted(self._replicas.items()) if number not in self._codes
        ]

    def _watch(self, replica: Replica) -> None:
        try:
            code = replica.home.wait(replica.pid, None)
        except SnapshotError:
            code = None
        with self._capturing[replica.number]:  # a capture that ends the replica says so first
            self._events.put(Exited(replica.number, code))

    def _pass_on(self, number: signal.Signals) -> None:
        for replica in self._replicas.values():
            if replica.number in self._codes:
                continue
            with contextlib.suppress(ProcessLookupError, SnapshotError):
                pid = replica.home.outer_pid(replica.pid)
                if number in _TO_ALL and os.getpgid(pid) == pid:
                    os.killpg(pid, number)
                else:
                    os.kill(pid, number)

    # Requests

    def _handle(self, request: Request, still_there: Callable[[], bool]) -> Answer:
        match request.verb:
            case "status":
                return self._status()
            case "checkpoint":
                return self._checkpoint(request, still_there)
            case "trace":
                return {"operations": msgspec.to_builtins(list(self._operations))}
            case "stop":
                self._events.put(signal.SIGTERM)
                return {}
            case "kill":
                self._events.put(signal.SIGTERM)  # which gives up a restore under way
                for replica in list(self._replicas.values()):
                    replica.home.close()
                return {}
            case verb:
                raise ConfigError(f"a keeper knows no {verb}", remedy="Is it of another version? Restart the job")

    def _status(self) -> Answer:
        return {
            "name": self.record.name,
            "keeper": os.getpid(),
            "state": "runs" if self._complete else "starts",
            "argv": self.record.argv,
            "replicas": [
                {"number": number, "pid": _outer_pid(replica)}
                for number, replica in sorted(self._replicas.items())
                if number not in self._codes
            ],
            "network": self.record.network,
            "published": self.addresses,
            "log": shown(str(self._log_path)) if self._log_path is not None else None,
        }

    def _checkpoint(self, request: Request, still_there: Callable[[], bool]) -> Answer:
        replica = self._chosen(request.replica)
        lock = self._capturing[replica.number]
        if not lock.acquire(blocking=False):
            raise SnapshotError(f"a capture of job {self.record.name} is already under way", remedy="Wait for it")
        try:
            if replica.number in self._codes:
                raise SnapshotError(f"job {self.record.name} has just ended")
            options = CaptureOptions(
                leave_running=request.leave_running,
                close_connections=request.close_connections,
                hook_timeout=request.hook_timeout,
                still_wanted=still_there,
            )
            with Tools.find(self._data_dir, request.timeout) as tools, Store.open(self._data_dir.store) as store:
                result = capture_replica(replica, store, tools, options)
            self._operations.append(
                Operation("capture", self.record.name, result.snapshot_id, time.time(), result.phases)
            )
            if not request.leave_running:
                self._events.put(Captured(replica.number, result.snapshot_id))
        finally:
            lock.release()
        return {
            "id": result.snapshot_id,
            "name": self.record.name,
            "raw_bytes": result.raw_bytes,
            "stored_bytes": result.stored_bytes,
            "phases": steps_json(result.phases),
            "left_running": request.leave_running,
        }

    def _chosen(self, number: int | None) -> Replica:
        if not self._complete:
            raise SnapshotError(f"job {self.record.name} is still being started", remedy="Try again once it runs")
        running = {number: replica for number, replica in self._replicas.items() if number not in self._codes}
        if number is None and len(running) == 1:
            return next(iter(running.values()))
        if number is None:
            raise ConfigError(
                f"job {self.record.name} has {len(running)} replicas", remedy="Name one of them with --replica NUMBER"
            )
        if number not in running:
            raise NotFoundError(f"job {self.record.name} has no replica {number}", remedy="See `dormouse jobs`")
        return running[number]


def exit_status(code: int | None) -> int:
    """What the shell shows for a program that ended so."""
    if code is None:
        return 128 + signal.SIGKILL
    return 128 - code if code < 0 else code


def _outer_pid(replica: Replica) -> int:
    try:
        return replica.home.outer_pid(replica.pid)
    except SnapshotError:
        return 0


def require_root() -> None:
    """Raises HostError."""
    if os.geteuid() != 0:
        raise HostError("cells and CRIU need root", remedy="Run it as root, for example with sudo")


def in_background(log_path: Path, work: Callable[[Callable[[Answer], None]], int]) -> Answer:
    """Run `work` in a child of its own session that outlives us; returns what it reports by its argument once the job
    runs. Raises the error it ends with before that. Fork it before any thread is started."""
    reading, writing = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it was closed when we were started
            stream.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 70
        try:
            os.setsid()
            code = _background(log_path, work, writing)
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe, _passed_to(child):
        data = pipe.read()
    if not data:
        os.waitpid(child, 0)
        raise SnapshotError("the job's keeper ended before the job ran", remedy=f"See {log_path}")
    answer: Answer = msgspec.json.decode(data)
    if "error" in answer:
        os.waitpid(child, 0)
        raise error_in(answer)
    return answer


@contextlib.contextmanager
def _passed_to(child: int) -> Iterator[None]:
    """What would end us ends the keeper instead, as long as its job does not run; it says so, and we end."""

    def end(_number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in _ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _background(log_path: Path, work: Callable[[Callable[[Answer], None]], int], writing: int) -> int:
    null = os.open(os.devnull, os.O_RDWR)
    output = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, source in ((0, null), (1, output), (2, output)):
        os.dup2(source, number)
    reported = False

    def report(answer: Answer) -> None:
        nonlocal reported
        reported = True
        with contextlib.suppress(BrokenPipeError):  # who started us has gone; the job need not
            os.write(writing, msgspec.json.encode(answer))
        os.close(writing)

    try:
        return work(report)
    except DormouseError as error:
        say(2, f"error: {error}")
        if not reported:
            report(error_answer(error))
        return error.exit_code
    except Exception as error:
        FileSink(2).write(traceback.format_exc().encode(errors="backslashreplace"))
        if not reported:
            words = ascii(f"unexpected {type(error).__name__}: {error}")
            report(error_answer(SnapshotError(words, remedy=f"See {log_path}")))
        raise
