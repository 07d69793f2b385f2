"""Memory for bytes in motion: blocks on huge pages, and the C library told to keep what freed chunk buffers had.

The codecs allocate their output. By default glibc gives every freed megabyte back to the kernel, and the next one then
costs 256 page faults: two thirds of the time of decoding LZ4. What is kept is bounded: so much per heap, and few heaps
(by default glibc makes up to eight per core, one for each new thread). These are settings of the whole process: only
entry points of processes that are ours make them (the command, the host service), never what a program imports.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGEST_FROM_HEAP = 32 << 20  # glibc accepts no more; a chunk and its worst expansion fit
_KEPT_PER_HEAP = 16 << 20
_HEAPS = 2
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@cache
def keep_freed_memory() -> None:
    """Make the settings, for an entry point to call. C libraries without it (musl) work as they did."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_PER_HEAP)
        mallopt(_M_ARENA_MAX, _HEAPS)


def anonymous(size: int) -> mmap.mmap:
    """New memory of zeros that begins at a page, on huge pages where the kernel has them: to fill it then takes half
    the CPU time. Raises OSError."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    advise_huge(memory)
    return memory


def huge_pages_on_request() -> bool:
    """Whether this kernel has huge pages where they are asked for, and there alone."""
    try:
        return "[madvise]" in _HUGE_PAGES.read_text()
    except FileNotFoundError:
        return False  # a kernel without them, which would refuse the request too


def advise_huge(memory: mmap.mmap) -> None:
    """Have huge pages behind new memory where the kernel has them."""
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        log.info("no huge pages for %d bytes of memory: %s", len(memory), error)
