"""Tells the C library to keep the memory of freed chunk buffers.

The codecs allocate their output. By default glibc gives every freed megabyte back to the kernel, and the next one then
costs 256 page faults: two thirds of the time of decoding LZ4. What is kept is bounded: so much per heap, and few heaps
(by default glibc makes up to eight per core, one for each new thread). Settings of the whole process, made once.
"""

from __future__ import annotations

import ctypes
from functools import cache

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGEST_FROM_HEAP = 32 << 20  # glibc accepts no more; a chunk and its worst expansion fit
_KEPT_PER_HEAP = 16 << 20
_HEAPS = 2


@cache
def keep_freed_memory() -> None:
    """Make the setting. C libraries without it (musl) work as they did."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_FROM_HEAP)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_PER_HEAP)
        mallopt(_M_ARENA_MAX, _HEAPS)
