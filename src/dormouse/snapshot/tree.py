"""A process tree that can be captured, or has been restored: where it lives, and what ties it to the outside."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from dormouse.snapshot.cell import Spawned


class External(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A descriptor of the tree whose other end is outside: a unix socket or a pipe, by the inode CRIU knows it by."""

    kind: Literal["socket", "pipe"]
    inode: int


class Home(Protocol):
    """Where a tree lives and CRIU runs: a `Cell`, see there for what each call promises."""

    def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        fds: Mapping[int, int] | None = None,
        control: int | None = None,
        cwd: str = "/",
    ) -> Spawned: ...

    def wait(self, pid: int, timeout: float | None) -> int | None: ...

    def outer_pid(self, pid: int) -> int: ...

    def processes(self) -> list[int]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class ProcessTree:
    """`pid` is the root's as CRIU sees it in `home`; `snapshot_id` the snapshot it was restored from, if any; `gpu` the
    UUID of the GPU it computes on, if that is known: it may have others open."""

    home: Home
    pid: int
    externals: tuple[External, ...] = ()
    snapshot_id: str | None = None
    gpu: str | None = None


def stopped_processes(home: Home) -> list[int]:
    """The (host) pids of those that are stopped (job control, SIGSTOP)."""
    stopped = []
    for pid in home.processes():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
            stopped += [pid] if state == "T" else []
    return stopped


def continue_tree(home: Home, *, but: Iterable[int] = ()) -> None:
    """Send SIGCONT to every process of a tree, except for the (host) pids in `but`: what is stopped runs on."""
    for pid in set(home.processes()).difference(but):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
