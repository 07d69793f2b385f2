"""How fast a folder's disk is read: writes a file there, reads it back past the page cache, removes it."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SIZE = 256 << 20
_BLOCK = 8 << 20
_THREADS = 4


@dataclass(frozen=True)
class Reading:
    """The rate. `direct` is False where the file system has no O_DIRECT; the page cache was then dropped first."""

    bytes_per_second: float
    direct: bool


def measure(folder: Path, size: int = SIZE) -> Reading:
    """Read `size` bytes (a multiple of 8 MiB) from a file in `folder` that is gone afterwards. Raises OSError."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".dormouse-speed-") as file:
        for _ in range(size // _BLOCK):
            file.write(os.urandom(_BLOCK))  # a disk may compress, or store equal blocks once
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            fd, direct = os.open(file.name, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fd, direct = os.open(file.name, os.O_RDONLY | os.O_CLOEXEC), False
        try:
            return Reading(size / _read_all(fd, size), direct)
        finally:
            os.close(fd)


def _read_all(fd: int, size: int) -> float:
    """Seconds it takes several threads to read everything once."""

    def read(first: int) -> None:
        with mmap.mmap(-1, _BLOCK) as block:  # O_DIRECT wants aligned memory
            for offset in range(first * _BLOCK, size, _THREADS * _BLOCK):
                if os.preadv(fd, [block], offset) != _BLOCK:
                    raise OSError(errno.EIO, "the file is shorter than what was written")

    start = time.perf_counter()
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(read, range(_THREADS)))
    return time.perf_counter() - start
