"""A file mapped privately into memory: what is written to it stays in this process, what is only read is shared with
the page cache and every other process that maps it.

    map_file(open file) -> mapping -> populate(mapping): threads bring its pages in, many at once -> every page is there

A mapping without a copy is what tensors of a safetensors file on the CPU are made of. Sixteen threads keep the disk
busy: a cold file of 1.6 GB took 1.4 s until every byte had been looked at, where reading ahead first, as the
safetensors library does, took 1.6 s. (Advice for huge pages made that 0.7 s at times, and 5 s on a virtual machine
whose host had yet to find the memory behind them; so it is not given.) What is in memory already is left alone: its
pages are mapped by the kernel, many at a time, when they are used, and that is faster than doing it ahead. A page that
the disk has to give and can't becomes an error here; later, it would end the process.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from dormouse import host_memory
from dormouse.errors import DamagedError, HostError
from dormouse.transfer.crew import Crew
from dormouse.transfer.report import Progress

log = logging.getLogger(__name__)

_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
_THREADS = 16  # they wait for the disk
_RUN = 16 << 20  # of each thread, so that the kernel sees sequential reads
_STEP = 2 << 20  # of each call


def map_file(descriptor: int, path: Path) -> mmap.mmap:
    """The whole file, which must not be empty. It may be written to; the file never changes by that."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    try:
        if sys.version_info >= (3, 13):  # before that, a mapping keeps a descriptor of its own
            return mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE, protection, trackfd=False)
        return mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE, protection)
    except (OSError, ValueError) as error:
        raise HostError(
            f"{path} can't be mapped into memory: {error}", remedy="Look for a limit on address space (`ulimit -v`)"
        ) from error


def populate(
    mapping: mmap.mmap,
    descriptor: int,
    path: Path,
    *,
    progress: Progress | None = None,
    cancelled: threading.Event | None = None,
) -> None:
    """Bring in every page that is not in memory yet. `descriptor` is the file's. Raises DamagedError for a page that
    can't be read, StoreError when cancelled.

    A file that is larger than the free memory is left to be read page by page as it is used; so is every file where
    the kernel is older than 5.14. Both are logged.
    """
    if len(mapping) > host_memory.available():
        log.warning("%s is larger than the free memory; its pages are read when they are used", path)
        return
    runs = _missing(descriptor, len(mapping))
    bringing = _Bringing(mapping, path, sum(map(len, runs)) * _STEP, progress)
    threads = min(_THREADS, len(runs))
    with Crew(runs, bringing.run, threads=threads, name="map", cancelled=cancelled) as crew:
        crew.wait()
    bringing.finish()


def _missing(descriptor: int, size: int) -> list[list[int]]:
    """The steps of a file, in runs, that the disk has to be asked for, as their first and last bytes tell: what is
    there in part is mostly there from the beginning, as is the step with the file's header."""
    runs = (range(begin, min(begin + _RUN, size), _STEP) for begin in range(0, size, _RUN))
    found = [[at for at in run if not _has_ends(descriptor, at, min(at + _STEP, size))] for run in runs]
    return [run for run in found if run]


def _has_ends(descriptor: int, begin: int, end: int) -> bool:
    return _is_there(descriptor, begin) and _is_there(descriptor, end - 1)


def _is_there(descriptor: int, offset: int) -> bool:
    """Whether a byte can be read without waiting for the disk."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:  # it would have to wait, or the file system can't tell
        return False


class _Bringing:
    """One populating: the threads' common state. `missing`: the bytes to bring in, about."""

    def __init__(self, mapping: mmap.mmap, path: Path, missing: int, progress: Progress | None) -> None:
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self._size = len(mapping)
        self._path = path
        self._progress = progress or (lambda _done, _total: None)
        self._lock = threading.Lock()
        self._done = max(0, self._size - missing)
        self._able = True

    def run(self, steps: Sequence[int]) -> None:
        """Bring in one run of pages."""
        for at in steps:
            length = min(_STEP, self._size - at)
            if self._able:
                self._step(at, length)
            with self._lock:
                self._done += length
        with self._lock:
            self._progress(min(self._done, self._size), self._size)

    def finish(self) -> None:
        """All is there."""
        self._progress(self._size, self._size)

    def _step(self, offset: int, length: int) -> None:
        if _madvise(self._address + offset, length, _POPULATE_READ) == 0:
            return
        code = ctypes.get_errno()
        if code == errno.EINVAL:  # the kernel does not know it
            self._able = False
            log.info("this kernel can't bring in pages of %s ahead; they are read when they are used", self._path)
        elif code == errno.ENOMEM:
            raise HostError(f"no memory for the pages of {self._path}", remedy="Free some memory")
        elif code not in (errno.EINTR, errno.EAGAIN):  # for these the page is read when it is used
            raise DamagedError(
                f"{self._path} can't be read at {offset}: {os.strerror(code)}",
                remedy="It was cut short meanwhile, or its disk fails; copy it again",
            )


_libc = ctypes.CDLL(None, use_errno=True)
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
