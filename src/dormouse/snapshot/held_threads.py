"""Holds the threads of stopped processes while one thread of each may run: CUDA's, which brings the GPU state back.

    stopped by CRIU --seize all threads but one--> SIGCONT --the one runs--> let go: all run on as if nothing was

CRIU leaves a restored tree in a group stop, and SIGCONT, the only way out of it, is for whole processes. So all other
threads are seized by ptrace while the stop lasts: each then sits in a stop of the tracer's, which SIGCONT does not end.
Detaching ends it, without a trace in the program.

ptrace belongs to one thread of the tracer, so a thread of its own does all of it. It also takes in what it is told of
traced threads that end: until then the kernel keeps them, and a process that is killed meanwhile would never be gone.
When the tracing process dies, however hard, the kernel detaches or, with `die_with_us`, kills the held processes:
nothing stays stopped for ever. (In a cell they die anyway; what was half restored must not run on.)
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from dormouse.errors import SnapshotError
from dormouse.snapshot.shortage import system_failure

_PTRACE_DETACH, _PTRACE_SEIZE, _PTRACE_INTERRUPT = 17, 0x4206, 0x4207
_PTRACE_GETSIGMASK, _PTRACE_SETSIGMASK = 0x420A, 0x420B
_PTRACE_O_EXITKILL = 1 << 20
_WALL, _WNOTHREAD = 0x40000000, 0x20000000
_MASK_SIZE = 8
_POLL = 0.001
_CALM_POLL = 0.005

# Faults of the thread itself must reach it; two signals are the C library's own, which programs never block.
_FAULTS = (signal.SIGTRAP, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS)
_UNBLOCKABLE = (signal.SIGKILL, signal.SIGSTOP, 32, 33)
_WAITING = ((1 << 64) - 1) & ~sum(1 << (number - 1) for number in (*_FAULTS, *_UNBLOCKABLE))
"""As a mask, the signals that a thread that may run must not take: their handlers are the program's code."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


@contextlib.contextmanager
def held_threads(runners: Mapping[int, int], *, timeout: float, die_with_us: bool = False) -> Iterator[None]:
    """Within, of each process in `runners` (host pid -> host thread id) only that thread may run; it takes no signals.

    The processes should be stopped when it begins, and the caller sends them SIGCONT within; what they are sent
    otherwise waits for the end. Threads that the runner makes are free. They must not be children of this process,
    which could lose their exit status. Raises SnapshotError when a thread can't be
    held, or not within `timeout` seconds; then none is.
    """
    tracer = _Tracer(runners, timeout, die_with_us)
    tracer.start()
    try:
        tracer.wait_until_held()
        yield
    finally:
        tracer.let_go()


def thread_ids(pid: int) -> list[int]:
    """The threads of a process, as the host sees them; none when it has ended."""
    try:
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))  # noqa: PTH208 - names only
    except (FileNotFoundError, ProcessLookupError):
        return []


def inner_id(pid: int, tid: int) -> int | None:
    """A thread's id in the innermost PID namespace it is in; None when it has ended."""
    words = _status(pid, tid).get("NSpid", "").split()
    return int(words[-1]) if words else None


def outer_thread(pid: int, inner: int) -> int:
    """The host's id of the thread that process `pid` knows as `inner`. Raises SnapshotError."""
    for tid in thread_ids(pid):
        if inner_id(pid, tid) == inner:
            return tid
    raise SnapshotError(f"process {pid} has no thread {inner} any more")


def _status(pid: int, tid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/task/{tid}/status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


class _Tracer(threading.Thread):
    """`_owner` has each traced thread's process, `_stops` those that have stopped, with the signal each was about to
    take (0: none), which it is given back."""

    def __init__(self, runners: Mapping[int, int], timeout: float, die_with_us: bool) -> None:
        super().__init__(name="ptrace", daemon=True)
        self._runners = dict(runners)
        self._deadline = time.monotonic() + timeout
        self._timeout = timeout
        self._options = _PTRACE_O_EXITKILL if die_with_us else 0
        self._owner: dict[int, int] = {}
        self._stops: dict[int, int] = {}
        self._masks: dict[int, bytes] = {}
        self._held = threading.Event()
        self._release = threading.Event()
        self._error: SnapshotError | None = None

    # The caller's side

    def wait_until_held(self) -> None:
        self._held.wait()
        self._raise()

    def let_go(self) -> None:
        self._release.set()
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    # The tracing thread's side

    def run(self) -> None:
        try:
            self._take()
            self._held.set()
            while not self._release.wait(_CALM_POLL):
                self._collect()
            self._deadline = time.monotonic() + self._timeout
            self._unmask()
        except SnapshotError as error:
            self._error = error
        except OSError as error:
            self._error = _failed("hold", error)
        except Exception as error:  # noqa: BLE001 - whoever waits must not take the threads for held
            self._error = SnapshotError(f"could not hold the threads of a process: {error!r}")
        finally:
            self._detach()
            self._held.set()

    def _take(self) -> None:
        for pid, runner in self._runners.items():
            while new := [tid for tid in thread_ids(pid) if tid not in self._owner and tid != runner]:
                seized = [self._seize(pid, tid) for tid in new]
                if not any(seized):
                    break
                self._wait_for_stops()
            self._mask(pid, runner)

    def _seize(self, pid: int, tid: int) -> bool:
        """Whether the thread is traced now; one that ends just then needs not be."""
        try:
            _ptrace(_PTRACE_SEIZE, tid, data=self._options)
        except OSError as error:
            gone = error.errno == errno.ESRCH or _status(pid, tid).get("State", "X")[0] in "ZX"
            if not gone:
                raise
            return False
        self._owner[tid] = pid
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile, of which we shall hear
            _ptrace(_PTRACE_INTERRUPT, tid)
        return True

    def _wait_for_stops(self) -> None:
        while True:
            self._collect()
            running = self._owner.keys() - self._stops.keys()
            if not running:
                return
            if time.monotonic() > self._deadline:
                tid = min(running)
                raise SnapshotError(
                    f"thread {tid} of process {self._owner[tid]} could not be held within {self._timeout:g} s",
                    remedy="It may be stuck in the kernel: see its /proc/PID/stack",
                )
            time.sleep(_POLL)

    def _collect(self) -> None:
        """Take in what the kernel has to tell of traced threads. None of another thread's children is touched."""
        while True:
            try:
                tid, status = os.waitpid(-1, _WALL | _WNOTHREAD | os.WNOHANG)
            except ChildProcessError:
                self._owner.clear()
                self._stops.clear()
                return
            if tid == 0:
                return
            if os.WIFSTOPPED(status):
                # With an event in the upper half it is a stop of ptrace's own making, else a signal about to be taken.
                self._stops[tid] = 0 if status >> 16 else os.WSTOPSIG(status)
            else:
                self._owner.pop(tid, None)
                self._stops.pop(tid, None)

    def _mask(self, pid: int, runner: int) -> None:
        """Have the runner's signals wait, unless they do already."""
        blocked = int(_status(pid, runner).get("SigBlk", "0"), 16)
        if blocked & _WAITING == _WAITING:
            return
        with self._stopped(pid, runner) as stopped:
            if stopped:
                self._masks[runner] = _signal_mask(runner)
                _set_signal_mask(runner, _WAITING.to_bytes(_MASK_SIZE, "little"))

    def _unmask(self) -> None:
        for pid, runner in self._runners.items():
            if runner in self._masks:
                with self._stopped(pid, runner) as stopped:
                    if stopped:
                        _set_signal_mask(runner, self._masks[runner])

    @contextlib.contextmanager
    def _stopped(self, pid: int, tid: int) -> Iterator[bool]:
        """Within, the thread is stopped, too; False when it has ended."""
        if self._seize(pid, tid):
            self._wait_for_stops()
        yield tid in self._stops
        self._detach_one(tid)

    def _detach(self) -> None:
        for tid in list(self._owner):
            self._detach_one(tid)

    def _detach_one(self, tid: int) -> None:
        # One that is not stopped can't be detached; it is when this thread, its tracer, ends.
        with contextlib.suppress(ProcessLookupError):
            if tid in self._owner:
                _ptrace(_PTRACE_DETACH, tid, data=self._stops.get(tid, 0))
                del self._owner[tid]
                self._stops.pop(tid, None)


def _ptrace(request: int, tid: int, address: int | None = None, data: int | None = None) -> None:
    """Raises OSError; ProcessLookupError when there is no such thread, or it is not stopped."""
    if _libc.ptrace(request, tid, address, data) == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _signal_mask(tid: int) -> bytes:
    buffer = ctypes.create_string_buffer(_MASK_SIZE)
    _ptrace(_PTRACE_GETSIGMASK, tid, _MASK_SIZE, ctypes.addressof(buffer))
    return buffer.raw


def _set_signal_mask(tid: int, mask: bytes) -> None:
    buffer = ctypes.create_string_buffer(mask, _MASK_SIZE)
    _ptrace(_PTRACE_SETSIGMASK, tid, _MASK_SIZE, ctypes.addressof(buffer))


def _failed(what: str, error: OSError) -> SnapshotError:
    failure = system_failure(
        f"could not {what} the threads of a process",
        error,
        remedy="Run as root, end debuggers and strace; a security module (Yama, SELinux) may forbid ptrace",
    )
    return failure if isinstance(failure, SnapshotError) else SnapshotError(failure.message, remedy=failure.remedy)
