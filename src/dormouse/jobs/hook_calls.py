"""Calls the hooks that programs of a tree have (dormouse/hooks.py, docs/processes.md): before a capture and after a
restore.

A process PID listens on the abstract unix socket `dormouse-hooks-PID`. We connect, send one line and wait for `ok` or
`error: why`, then until the program has closed its end, because a half-open connection would be in CRIU's way.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dormouse.errors import SnapshotError
from dormouse.jobs.survey import describe, status_field

log = logging.getLogger(__name__)

# The kernel shows zero bytes as "@". Some programs (Node.js before 22) fill the name up with them.
_SOCKET_NAME = re.compile(r"@dormouse-hooks-(\d+)@*")
_MAX_ANSWER = 4096
_LISTENING_FLAG = 0x10000
_REMEDY = "See the program's own log; --hook-timeout gives it more time"


@dataclass(frozen=True)
class HookSocket:
    """A process of the tree that listens: its pid on the host, and its socket's name as /proc/net/unix shows it."""

    pid: int
    name: str


@dataclass
class Hooks:
    """The hooks of one tree. `told` are those that were asked to get ready and must hear that life goes on."""

    pids: list[int]
    make_socket: Callable[[int], socket.socket]
    timeout: float
    told: list[HookSocket] = field(default_factory=list)

    def before_capture(self) -> None:
        """Ask every process that listens. Raises SnapshotError when one refuses or does not answer in time."""
        deadline = time.monotonic() + self.timeout
        for hook in self._listening():
            self.told.append(hook)
            self._call(hook, "before-capture", deadline)
        self._await_silence(deadline)

    def go_on(self) -> list[str]:
        """Tell those who got ready that they run on; what went wrong, in words."""
        told, self.told = self.told, []
        return self._tell(told)

    def after_restore(self) -> list[str]:
        """Tell all that listen; what went wrong, in words."""
        return self._tell(self._listening())

    def _tell(self, hooks: list[HookSocket]) -> list[str]:
        deadline = time.monotonic() + self.timeout
        problems = []
        for hook in hooks:
            try:
                self._call(hook, "after-restore", deadline)
            except SnapshotError as error:
                problems.append(error.message)
        return problems

    def _listening(self) -> list[HookSocket]:
        inside = {innermost_pid(pid): pid for pid in self.pids}
        names = {int(match[1]): name for name, listens in self._sockets() if listens
                 if (match := _SOCKET_NAME.fullmatch(name))}  # fmt: skip
        return [HookSocket(inside[pid], names[pid]) for pid in sorted(names) if pid in inside]

    def _sockets(self) -> list[tuple[str, bool]]:
        """(name, whether it listens) of the unix sockets the tree can see."""
        for pid in self.pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, OSError):
                return parse_unix(Path(f"/proc/{pid}/net/unix").read_text(errors="replace"))
        return []

    def _call(self, hook: HookSocket, line: str, deadline: float) -> None:
        with self.make_socket(socket.AF_UNIX) as connection:
            try:
                connection.settimeout(max(0.1, deadline - time.monotonic()))
                connection.connect(hook.name.replace("@", "\0"))
                if _peer_pid(connection) not in self.pids:
                    log.warning("the socket %s belongs to no process of the tree; it is left alone", hook.name)
                    return
                connection.sendall(line.encode() + b"\n")
                answer = _read_to_end(connection, deadline)
            except ConnectionRefusedError:
                return  # it has stopped listening since we looked
            except TimeoutError as error:
                raise SnapshotError(
                    f"process {describe(hook.pid)} did not answer {line} within {self.timeout:.0f} s", remedy=_REMEDY
                ) from error
            except OSError as error:
                raise SnapshotError(f"process {describe(hook.pid)} could not be told {line}: {error}") from error
        if answer != "ok":
            reason = answer.removeprefix("error:").strip() or "it gave no answer"
            raise SnapshotError(f"process {describe(hook.pid)} refused {line}: {reason}", remedy=_REMEDY)

    def _await_silence(self, deadline: float) -> None:
        """Until no connection of a hook is left open in the tree."""
        names = {hook.name for hook in self.told}
        while any(name in names and not listens for name, listens in self._sockets()):
            if time.monotonic() > deadline:
                raise SnapshotError(
                    "a program answered its hook and did not close the connection",
                    remedy="It must close its end after `ok` (docs/processes.md)",
                )
            time.sleep(0.01)


def innermost_pid(pid: int) -> int | None:
    """A process's pid in its own namespace."""
    field_text = status_field(pid, "NSpid")
    return int(field_text.split()[-1]) if field_text else None


def parse_unix(text: str) -> list[tuple[str, bool]]:
    """/proc/net/unix: (name, whether it listens) of those with a name."""
    found = []
    for line in text.splitlines()[1:]:
        words = line.split(maxsplit=7)
        if len(words) == 8:
            found.append((words[7], bool(int(words[3], 16) & _LISTENING_FLAG)))
    return found


def _peer_pid(connection: socket.socket) -> int:
    pid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


def _read_to_end(connection: socket.socket, deadline: float) -> str:
    """Raises TimeoutError when that takes until the deadline, however the bytes drip in."""
    data = b""
    while len(data) < _MAX_ANSWER:
        if (left := deadline - time.monotonic()) <= 0:
            raise TimeoutError
        connection.settimeout(left)
        if not (part := connection.recv(_MAX_ANSWER)):
            break
        data += part
    return data.decode(errors="replace").strip()
