"""How much of a file the kernel has in memory: the difference between a start that reads and one that does not.

The page cache is no tier: nothing in it is ours, and it can be gone the next moment. But whoever says how long a start
will take must know whether its files are there. `cachestat` (Linux 6.5) tells so without touching them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

_CACHESTAT = 451  # the same on all architectures
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Stretch:
    """A part of a file."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class OnDisk:
    """The chunks of a snapshot or a checkpoint: their bytes, plain and stored, and where these lie."""

    plain_bytes: int
    stored_bytes: int
    stretches: tuple[Stretch, ...]


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Counts(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "written_back", "evicted", "evicted_lately")
    )


@cache
def _syscall() -> Any:
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    return function


def cached_bytes(stretches: Iterable[Stretch]) -> int | None:
    """The bytes of them that are in memory, in whole pages; None where the kernel does not tell. A file that is gone
    has none. Blocks for microseconds a file."""
    total = 0
    for path, parts in groupby(stretches, key=lambda part: part.path):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            for part in parts:
                pages = _cached_pages(fd, part)
                if pages is None:
                    return None
                total += pages * _PAGE
        finally:
            os.close(fd)
    return total


def _cached_pages(fd: int, part: Stretch) -> int | None:
    if part.length <= 0:
        return 0
    where, counts = _Range(part.offset, part.length), _Counts()
    if _syscall()(_CACHESTAT, fd, ctypes.byref(where), ctypes.byref(counts), 0) != 0:
        return None
    return int(counts.cached)


def joined(stretches: Iterable[Stretch], gap: int = _PAGE) -> tuple[Stretch, ...]:
    """The same by file and offset; those with less than `gap` between them as one."""
    found: list[Stretch] = []
    for part in sorted(stretches, key=lambda one: (one.path, one.offset)):
        last = found[-1] if found else None
        if last is not None and last.path == part.path and part.offset <= last.offset + last.length + gap:
            end = max(last.offset + last.length, part.offset + part.length)
            found[-1] = Stretch(last.path, last.offset, end - last.offset)
        else:
            found.append(part)
    return tuple(found)
