"""Turns at the GPU for tests that run in several processes: those that measure its memory run alone.

Tests with the marker `gpu` share a lock file; those marked `gpu(alone=True)` have it to themselves. Who waits for all
others to end keeps new ones from beginning (the gate), so that it does not wait for ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PATIENCE = 300.0


@contextlib.contextmanager
def turn(*, alone: bool, folder: Path | None = None, patience: float = _PATIENCE) -> Iterator[None]:
    """Within, the GPU is this process's, or shared with those that do not measure. Raises TimeoutError."""
    where = folder or Path(tempfile.gettempdir())
    deadline = time.monotonic() + patience
    with _open(where / f"dormouse-gpu-{os.getuid()}.lock") as lock:
        with _open(where / f"dormouse-gpu-{os.getuid()}.gate") as gate:
            _lock(gate, fcntl.LOCK_EX, deadline)
            _lock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH, deadline)
        yield


@contextlib.contextmanager
def _open(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, how: int, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError("no turn at the GPU: another test does not end") from None
            time.sleep(0.02)
        else:
            return
