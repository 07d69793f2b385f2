"""Capture of a process tree that no keeper owns: it lives in the host's own namespaces, and CRIU runs there too.

Its standard streams may be files, /dev/null, or pipes to somebody outside; the restored job gets new pipes to its
keeper for those. A pipe to outside at another descriptor, a terminal, or a foreign socket is refused. It is restored
into a cell like any job, by default one that keeps the host's network, so that its addresses stay what they were.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dormouse.errors import SnapshotError
from dormouse.jobs.record import JobRecord, Stream, made_up_name
from dormouse.jobs.replica import Replica
from dormouse.jobs.survey import (
    STANDARD_STREAMS,
    PipeEnds,
    Survey,
    pipe_ends,
    refuse_foreign,
    session_of,
    status_field,
    survey,
)
from dormouse.snapshot.cell import Spawned, descendants
from dormouse.snapshot.tree import External

_KILL_TIMEOUT = 30.0


class HostHome:
    """The host's namespaces as the home of the tree below one process."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        fds: Mapping[int, int] | None = None,
        control: int | None = None,
        cwd: str = "/",
    ) -> Spawned:
        """Start a program here; it can be given no descriptors and no control socket."""
        assert not fds and control is None
        try:
            process = subprocess.Popen(
                argv,
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C must not reach a CRIU at work
            )
        except OSError as error:
            raise SnapshotError(f"{argv[0]} could not be started: {error}") from error
        with self._lock:
            self._children[process.pid] = process
        return Spawned(process.pid, None, None)

    def wait(self, pid: int, timeout: float | None) -> int | None:
        """The exit code of a spawned process, None when it runs on after `timeout` seconds."""
        try:
            return self._children[pid].wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def outer_pid(self, pid: int) -> int:
        """The same. Raises SnapshotError when the process has ended."""
        if not Path(f"/proc/{pid}").exists():
            raise SnapshotError(f"process {pid} has ended")
        return pid

    def insider(self) -> int:
        """We ourselves."""
        return os.getpid()

    def processes(self) -> list[int]:
        """The tree's pids."""
        return [self._root, *descendants(self._root)] if Path(f"/proc/{self._root}").exists() else []

    def inner_socket(self, family: int, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
        """A socket."""
        return socket.socket(family, kind, protocol)

    def close(self) -> None:
        """Kill the tree, and what was spawned, and wait until it is gone."""
        for process in self._children.values():
            if process.poll() is None:
                process.kill()
                process.wait()
        waiting = []
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                waiting.append(os.pidfd_open(pid))
        for descriptor in waiting:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        deadline = time.monotonic() + _KILL_TIMEOUT
        for descriptor in waiting:
            # Readable once the process has ended; its parent may take its time to collect it.
            select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            os.close(descriptor)


def find_tree(pid: int, name: str | None) -> Replica:
    """The tree below `pid`, ready to be captured. Raises SnapshotError that says why it can't be."""
    refuse_foreign(pid)
    home = HostHome(pid)
    found = survey(home.processes(), home.inner_socket, home.insider())
    externals, streams = standard_pipes(found, pid, pipe_ends(found))
    argv = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
    record = JobRecord(
        name=name or made_up_name(status_field(pid, "Name") or argv[0]),
        argv=argv,
        network="host",
        streams=streams,
        shell_job=session_of(pid) not in found.pids,
    )
    return Replica(1, home, pid, record, externals)


def standard_pipes(
    found: Survey, root: int, pipes: Mapping[int, PipeEnds]
) -> tuple[tuple[External, ...], list[list[Stream]]]:
    """The pipes to outside that are standard streams of `root`. Raises SnapshotError for any other."""
    names: dict[int, list[Stream]] = {}
    numbers: dict[int, Stream] = {0: "stdin", 1: "stdout", 2: "stderr"}
    for item in found.descriptors:
        inode = item.inode
        if item.pid != root or item.number not in numbers or inode is None or inode not in pipes:
            continue
        if pipes[inode].outside or pipes[inode].one_sided:
            names.setdefault(inode, []).append(numbers[item.number])
    for other, ends in pipes.items():
        if ends.outside and other not in names:
            raise SnapshotError(
                f"{ends.items[0]} is a pipe to a process outside the tree",
                remedy=f"Only standard streams ({', '.join(STANDARD_STREAMS)} of the first process) may lead outside; "
                "capture a parent of both processes",
            )
    return tuple(External("pipe", inode) for inode in names), list(names.values())
