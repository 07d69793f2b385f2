"""What a running node leaves in `data_dir/run`: `node.lock`, held as long as it lives and holding its pid; `node.json`,
its state for other commands (replaced atomically, removed at the end); `admin.sock`, its admin API. All are 0600."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from dormouse.errors import HostError

_LOCK = "node.lock"
_STATE = "node.json"
ADMIN_SOCKET = "admin.sock"
_TRIES = 5
_TRY_INTERVAL = 0.01


@dataclass(frozen=True)
class ModelStatus:
    """One model as `dormouse ls` and the metrics show it; `since` is in seconds of Unix time, `adapters` are the
    imported ones that are served, `replicas` the state of each replica that has a process, and of the first."""

    name: str
    state: str
    since: float
    in_flight: int
    waiting: int
    rss_bytes: int
    snapshot_id: str | None
    last_error: str | None
    adapters: tuple[str, ...] = ()
    replicas: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeState:
    """The published state. `address` is the gateway's URL, None before it listens."""

    pid: int
    started: float
    address: str | None
    models: list[ModelStatus]


@contextmanager
def hold_lock(run_dir: Path) -> Iterator[None]:
    """Be the only node of this data folder. Raises HostError that names the other one."""
    fd = os.open(run_dir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            _lock(fd)
        except BlockingIOError as error:
            pid = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            raise HostError(
                f"another node (pid {pid}) already serves {run_dir.parent}",
                remedy="Stop it first, or give this one another data_dir",
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def _lock(fd: int) -> None:
    """Take the lock. `read_node` holds it too, for microseconds, to see whether it is free: so try more than once."""
    for _ in range(_TRIES - 1):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_TRY_INTERVAL)
        else:
            return
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def publish(run_dir: Path, state: NodeState) -> None:
    """Replace the published state. Blocks."""
    temporary = run_dir / f"{_STATE}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(msgspec.json.encode(state))
    temporary.replace(run_dir / _STATE)


def withdraw(run_dir: Path) -> None:
    """Remove the published state. Blocks."""
    (run_dir / _STATE).unlink(missing_ok=True)


def read_node(run_dir: Path) -> NodeState | None:
    """The state of the node that runs now; None when none does. A dead node's leftovers are not believed. Blocks."""
    try:
        fd = os.open(run_dir / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        state = run_dir / _STATE
        return msgspec.json.decode(state.read_bytes(), type=NodeState) if state.exists() else None
    else:
        return None
    finally:
        os.close(fd)


@contextmanager
def short_path(folder: Path) -> Iterator[str]:
    """Another name of a folder, for socket addresses, which may have no more than 108 bytes."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
