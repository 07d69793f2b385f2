"""A slot of pinned memory that several readers fill at once.

    extent of a file -> stretches() -> each read by one reader -> whoever brings the last one knows that all are there

So a few slots are being filled at any time, however many readers there are, and the others are left for what waits for
the link. All cuts but the ends are at multiples of the alignment in the file, so that each stretch can be read past the
page cache; whether it is, is decided once for all of them, because it decides where in the slot they go.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from dormouse.store.pack import ALIGNMENT, aligned
from dormouse.transfer.plan import Extent
from dormouse.transfer.source_files import SourceFile

STRETCH_BYTES = 8 << 20
"""Usually. Large enough that Python's share of a read is small: 16 readers have one interpreter."""

_LEAST = 256 << 10


def step(room: int, readers: int, position: int, count: int) -> int:
    """About how long the stretches of parcel `position` of `count` are. `room`: bytes in all slots, of which all
    readers fill about a quarter at once. The first parcels come in shorter ones, so that the link has to wait less for
    them, and the last, so that all readers end at about the same time."""
    from_end = min(position, count - 1 - position)
    share = 4 if from_end < 2 else 2 if from_end < 4 else 1
    return max(_LEAST, min(STRETCH_BYTES, room // (4 * readers)) // share)


def most_readers(length: int, parcels: int) -> int:
    """How many readers have something to do at most, for so many bytes in so many parcels."""
    return length // _LEAST + parcels


def stretches(offset: int, length: int, about: int) -> Iterator[tuple[int, int]]:
    """Begins and ends, of about the same length each."""
    lead = offset % ALIGNMENT
    count = max(1, round(length / about))
    size = aligned(-(-(lead + length) // count))
    end = offset + length
    for begin in range(offset - lead, end, size):
        yield max(begin, offset), min(begin + size, end)


class Filling:
    """One slot, `room`, and the extent that comes into it in so many `parts`. Readers may share it."""

    def __init__(self, file: SourceFile, extent: Extent, room: memoryview, parts: int) -> None:
        self._file = file
        self._extent = extent
        self._room = room
        self._left = parts
        self._direct: bool | None = None
        self._lock = threading.Lock()

    def read(self, begin: int, end: int) -> int | None:
        """Read one stretch. When it was the last to come: where in the slot the extent begins."""
        direct = self._is_direct()
        lead = self._file.lead(self._extent.offset, direct=direct)
        at = lead + begin - self._extent.offset - self._file.lead(begin, direct=direct)
        self._file.read_around(self._room[at:], begin, end - begin, direct=direct)
        with self._lock:
            self._left -= 1
            return None if self._left else lead

    def _is_direct(self) -> bool:
        with self._lock:
            if self._direct is None:
                self._direct = self._file.prefers_direct(self._extent.offset, self._extent.length)
            return self._direct
