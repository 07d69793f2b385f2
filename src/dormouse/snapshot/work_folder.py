"""The folders CRIU works in: one per call, with our socket and CRIU's log, in a folder of the data folder's `run`.

Not in the system's temporary folder, which a cell may cover with a tmpfs of its own, while CRIU runs inside the cell.
Each is locked as long as its call lasts; who makes one deletes those that a killed process has left unlocked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dormouse.errors import HostError

_PREFIX = "call-"


def criu_folders(run: Path) -> Path:
    """Where they are made, below the data folder's `run`."""
    return run / "criu"


@contextlib.contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """An empty private folder in `parent`, deleted at the end. Raises HostError."""
    try:
        folder, lock = _make(parent)
    except OSError as error:
        raise HostError(
            f"CRIU can have no working folder in {parent}: {error.strerror}",
            remedy="Make room there, and see that this user may write to it",
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what is left is the next one's to sweep
        os.close(lock)


def _make(parent: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock."""
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(parent):  # so that no sweep comes between a folder and its lock
        _sweep(parent)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent.resolve()))
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def sweep_work_folders(parent: Path) -> None:
    """Delete what killed processes have left."""
    if parent.exists():
        with _locked(parent):
            _sweep(parent)


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):  # by name: nothing else is ours to delete
        with contextlib.suppress(FileNotFoundError), _opened(folder) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # in use
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with _opened(folder) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
