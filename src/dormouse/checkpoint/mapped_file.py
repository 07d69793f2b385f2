"""A file mapped privately into memory: what is written to it stays in this process, what is only read is shared with
the page cache and every other process that maps it.

    map_file(open file) -> mapping -> populate(mapping): threads bring its pages in, many at once -> every page is there

A mapping without a copy is what tensors of a safetensors file on the CPU are made of. Brought in by `populate`, a file
of 1.6 GB took 0.6 to 0.8 s from a disk where touching it page by page, or reading ahead first, took 0.9 to 1.3 s: the
advice for huge pages makes the kernel read 2 MiB at once into pages of that size, and sixteen threads keep the disk
busy. With the file in memory already it costs 10 to 30 ms, and saves more than that in page faults. It also turns a
page that the disk can't give into an error, where a touch would end the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import sys
import threading
from pathlib import Path

from dormouse import host_memory
from dormouse.errors import DamagedError, HostError
from dormouse.transfer.crew import Crew
from dormouse.transfer.report import Progress

log = logging.getLogger(__name__)

_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
_THREADS = 16  # they wait for the disk
_RUN = 16 << 20  # of each thread, so that the kernel sees sequential reads
_STEP = 2 << 20  # of each call: one huge page


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
    path: Path,
    *,
    progress: Progress | None = None,
    cancelled: threading.Event | None = None,
) -> None:
    """Bring every page in. Raises DamagedError for one that can't be read, StoreError when cancelled.

    A file that is larger than the free memory is left to be read page by page as it is used; so is every file where
    the kernel is older than 5.14. Both are logged.
    """
    if len(mapping) > host_memory.available():
        log.warning("%s is larger than the free memory; its pages are read when they are used", path)
        return
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    bringing = _Bringing(mapping, path, progress)
    runs = range(0, len(mapping), _RUN)
    threads = min(_THREADS, len(runs))
    with Crew(runs, bringing.run, threads=threads, name="map", cancelled=cancelled) as crew:
        crew.wait()


class _Bringing:
    """One populating: the threads' common state."""

    def __init__(self, mapping: mmap.mmap, path: Path, progress: Progress | None) -> None:
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self._size = len(mapping)
        self._path = path
        self._progress = progress or (lambda _done, _total: None)
        self._lock = threading.Lock()
        self._done = 0
        self._able = True

    def run(self, begin: int) -> None:
        """Bring in one run of pages."""
        end = min(begin + _RUN, self._size)
        for at in range(begin, end, _STEP):
            if self._able:
                self._step(at, min(_STEP, end - at))
        with self._lock:
            self._done += end - begin
            self._progress(self._done, self._size)

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
