"""A cell: the namespaces one worker or job lives in (PID, mount with a fresh /proc, network with `lo` up).

Own PIDs let one snapshot be restored many times at once, each copy under its old pid; CUDA needs a /proc that fits
those pids and a network namespace of its own for its abstract sockets. `Cell.create()` starts PID 1 (cell_init.py)
through util-linux's `unshare`; `spawn` has it start a process inside; `close` kills PID 1 and with it all the rest.
CRIU also runs inside, so a dump sees no foreign namespace.

Every method blocks, each with a deadline, and is safe to call from several threads. If the process that owns the
cell dies in whatever way, its end of the socket closes and the cell ends by itself.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dormouse.errors import HostError, SnapshotError
from dormouse.snapshot import cell_init

CONTROL_FD = 3
"""The number a worker's control socket has inside."""

_START_TIMEOUT = 20.0
_CLOSE_TIMEOUT = 30.0
_KEPT_EXITS = 4096
"""Exit codes remembered; most are of orphans that nobody asks about."""


def worker_pid_floor() -> int:
    """The pid below a worker's first one: high, so that criu's own processes never take it, yet below pid_max."""
    pid_max = int(Path("/proc/sys/kernel/pid_max").read_text())
    return min(99_999, pid_max // 2)


@dataclass(frozen=True)
class Spawned:
    """A process in a cell. `control` is the outer end of its control socket, `inode` the inner end's inode."""

    pid: int
    control: socket.socket | None
    inode: int | None


class Cell:
    """The owner's view of one cell."""

    def __init__(self, launcher: subprocess.Popen[bytes], own: socket.socket) -> None:
        self._launcher = launcher
        self._own = own
        self._ids = itertools.count()
        self._spawn_lock = threading.Lock()
        self._changed = threading.Condition()
        self._replies: dict[int, tuple[dict[str, Any], list[int]]] = {}
        self._exits: dict[int, int] = {}
        self._ended = False
        self._close_lock = threading.Lock()
        self._closed = False
        self._reader = threading.Thread(target=self._read, name="cell-reader", daemon=True)
        self._reader.start()

    @classmethod
    def create(cls, *, host_network: bool = False, tmpfs: Sequence[str] = ()) -> Self:
        """Make the namespaces and start PID 1. With `host_network` there is no network namespace of its own; each
        folder of `tmpfs` gets an empty tmpfs that only the cell sees. Raises HostError when this process may not."""
        unshare = shutil.which("unshare")
        if unshare is None:
            raise HostError("unshare is not installed", remedy="Install the package util-linux")
        own, inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with inner:
            launcher = subprocess.Popen(
                [
                    *(unshare, "--pid", "--mount", *(() if host_network else ("--net",)), "--fork", "--kill-child"),
                    *("--mount-proc", "--propagation", "private"),
                    *(sys.executable, "-I", "-S", cell_init.__file__, str(inner.fileno()), *tmpfs),
                ],
                pass_fds=(inner.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                env={"PATH": os.defpath},
                start_new_session=True,  # what a terminal sends to its foreground is the owner's business
            )
        return cls(launcher, own)

    @property
    def alive(self) -> bool:
        """Whether PID 1 runs."""
        return not self._ended

    def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        fds: Mapping[int, int] | None = None,
        control: int | None = None,
        pid_floor: int | None = None,
        cwd: str = "/",
        io_uring: bool = True,
    ) -> Spawned:
        """Start `argv` in the cell with descriptors {number inside: descriptor here} and nothing else open.

        With `control`, a new stream socket pair is made; its inner end gets that number. Without `io_uring`, that
        system call is denied to the process and all it starts. Raises SnapshotError.
        """
        fds = dict(fds or {})
        request = {
            "argv": list(argv),
            "env": dict(env),
            "fds": list(fds),
            "control": control,
            "pid_floor": pid_floor,
            "cwd": cwd,
            "io_uring": io_uring,
        }
        reply, received = self._ask(request, list(fds.values()), f"the start of {argv[0]}")
        if "error" in reply:
            raise SnapshotError(f"the cell could not start {argv[0]}: {reply['error']}")
        return Spawned(pid=reply["pid"], control=received, inode=reply["inode"])

    def inner_socket(self, family: int, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
        """A socket of the cell's network namespace, not yet connected: whatever it connects to is inside. Raises
        SnapshotError."""
        reply, received = self._ask({"socket": [family, kind, protocol]}, [], "the request for a socket")
        if received is None:
            raise SnapshotError(f"the cell could not make a socket: {reply.get('error')}")
        return received

    def _ask(self, request: dict[str, Any], fds: list[int], what: str) -> tuple[dict[str, Any], socket.socket | None]:
        identity = next(self._ids)
        try:
            with self._spawn_lock:
                cell_init.send(self._own, {"spawn": identity, **request}, fds)
        except OSError as error:
            raise self._broken(f"{what} could not be sent: {error}") from error
        with self._changed:
            answered = self._changed.wait_for(lambda: self._ended or identity in self._replies, _START_TIMEOUT)
            if not answered or identity not in self._replies:
                raise self._broken(f"no answer to {what}")
            reply, received = self._replies.pop(identity)
        return reply, socket.socket(fileno=received[0]) if received else None

    def wait(self, pid: int, timeout: float | None) -> int | None:
        """The exit code of a spawned process (negative: signal), None when it runs on after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or pid in self._exits, timeout)
            if pid in self._exits:
                return os.waitstatus_to_exitcode(self._exits[pid])
            if self._ended:
                raise self._broken(f"it ended while process {pid} ran")
            return None

    def outer_pid(self, pid: int) -> int:
        """The host's pid of the process that has `pid` in the cell. Raises SnapshotError when there is none."""
        for candidate in descendants(self._launcher.pid):
            if _namespace_pid(candidate) == pid:
                return candidate
        raise SnapshotError(f"process {pid} is not in its cell any more")

    def insider(self) -> int:
        """The host's pid of a process that is in the cell's namespaces and in no tree: PID 1."""
        return self.outer_pid(1)

    def processes(self) -> list[int]:
        """The host's pids of all processes in the cell but PID 1; none once it is closed."""
        if self._closed:
            return []  # the launcher's pid may be somebody else's by now
        return [pid for pid in descendants(self._launcher.pid) if _namespace_pid(pid) not in (None, 1)]

    def close(self) -> None:
        """Kill everything in the cell and wait until it is gone. Idempotent."""
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
        # With PID 1 the kernel ends the whole namespace; the launcher, its parent, returns when all of it is gone.
        for init in _children(self._launcher.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(init, signal.SIGKILL)
        try:
            self._launcher.wait(_CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._launcher.kill()
            self._launcher.wait()
        self._reader.join()
        self._own.close()
        if self._launcher.stderr is not None:
            self._launcher.stderr.close()

    def _read(self) -> None:
        while True:
            try:
                data, fds = cell_init.receive(self._own)
            except OSError:
                data, fds = b"", []
            with self._changed:
                if not data:
                    self._ended = True
                    self._changed.notify_all()
                    return
                message = json.loads(data)
                if "spawned" in message:
                    self._replies[message["spawned"]] = (message, fds)
                    self._exits.pop(message.get("pid"), None)  # of an earlier process that had the same pid
                else:
                    self._exits.pop(message["exited"], None)  # so that the new one counts as the youngest
                    self._exits[message["exited"]] = message["status"]
                    if len(self._exits) > _KEPT_EXITS:
                        del self._exits[next(iter(self._exits))]
                self._changed.notify_all()

    def _broken(self, what: str) -> SnapshotError:
        """The cell is unusable; PID 1's own words are the reason when it has any."""
        self._launcher.kill()
        stderr = self._launcher.stderr
        text = stderr.read().decode(errors="replace") if stderr is not None and not stderr.closed else ""
        words = [line.removeprefix("unshare: ") for line in text.splitlines() if "sigprocmask" not in line]
        return SnapshotError(
            f"the cell failed: {words[-1] if words else what}",
            remedy="Run `dormouse doctor`",
        )


def descendants(pid: int) -> list[int]:
    """Host pids of all children, grandchildren … of `pid`; those that end meanwhile are left out."""
    found = _children(pid)
    for child in found:
        found += _children(child)  # the list grows while it is walked
    return found


def _children(pid: int) -> list[int]:
    pids: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # also from listing: a process may end any time
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                pids += [int(word) for word in (thread / "children").read_text().split()]
    return pids


def _namespace_pid(pid: int) -> int | None:
    """The innermost pid of a process (`NSpid` in /proc/PID/status), None when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    line = next((line for line in status.splitlines() if line.startswith("NSpid:")), "")
    return int(line.split()[-1]) if line else None
