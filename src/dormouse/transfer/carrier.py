"""One reader's way from files to GPUs: pinned memory of its own, and streams of its own.

    a stretch of a file -> read into one of two pieces of pinned memory -> over the link, on the reader's stream
    a parcel that the CPU decodes -> read and decoded in plain memory -> piece by piece the same way

While the link takes one piece, the reader fills the other, and neither asks anyone. The pieces are few and small, so
that all of them together stay in the processor's cache: what was just read is taken from there, not from memory. (16
threads copied 81 GB/s out of the page cache into 128 MiB, 47 GB/s into 512 MiB.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from dormouse.errors import ConfigError
from dormouse.store.pack import ALIGNMENT, aligned
from dormouse.transfer.device_plan import Parcel
from dormouse.transfer.gpus import Mark
from dormouse.transfer.lane import Lane, Source
from dormouse.transfer.memory import anonymous
from dormouse.transfer.pieces import Checker
from dormouse.transfer.pinned import PinnedMemory
from dormouse.transfer.plan import Extent
from dormouse.transfer.source_files import SourceFiles, room_for

PIECE_BYTES = 4 << 20
"""Large enough that Python's share of a read is small: all readers have one interpreter."""

PIECES = 2
_LEAST = 64 << 10


class Pieces(NamedTuple):
    """How many readers there are, and how large the pieces of each."""

    readers: int
    size: int


def shared_out(budget: int, threads: int) -> Pieces:
    """The pinned memory of a load, shared out among at most so many readers. Raises ConfigError when there is not
    enough for one."""
    readers = max(1, min(threads, budget // (PIECES * _LEAST)))
    size = min(PIECE_BYTES, budget // (PIECES * readers) // ALIGNMENT * ALIGNMENT)
    if size < 2 * ALIGNMENT:
        raise ConfigError(
            f"{budget} bytes of pinned memory are too few: a load needs {2 * PIECES * ALIGNMENT} at least",
            remedy="Allow more pinned memory",
        )
    return Pieces(readers, size)


def stretches(offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
    """Begins and ends of what is read at once: at most so many bytes (a multiple of the alignment), all of about the
    same length, cut at multiples of the alignment in the file, so that each can be read past the page cache."""
    lead = offset % ALIGNMENT
    count = -(-(lead + length) // most)
    size = aligned(-(-(lead + length) // count))
    end = offset + length
    for begin in range(offset - lead, end, size):
        yield max(begin, offset), min(begin + size, end)


class _Piece:
    """`marks`: where the GPUs are through with it."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.tensor = torch.frombuffer(view, dtype=torch.uint8)
        self.marks: list[Mark] = []


class Carrier:
    """Used by one thread. `memory`: pinned, for its pieces; `streams`: one of each device."""

    def __init__(
        self, memory: PinnedMemory, size: int, streams: Sequence[Any], files: SourceFiles, checker: Checker
    ) -> None:
        self._pieces = [_Piece(memory.view[n * size : (n + 1) * size]) for n in range(PIECES)]
        self._size = size
        self._streams = streams
        self._files = files
        self._checker = checker
        self._own: dict[str, memoryview] = {}
        self._turn = 0

    def carry(
        self, parcel: Parcel, begin: int, end: int, lanes: Callable[[], Sequence[Lane]], *, direct: bool
    ) -> list[list[Mark]]:
        """Bring bytes `begin` to `end` of the parcel's file, read past the page cache if `direct`, to the devices that
        want them; `lanes` tells each device's, when they are there. Returns for each part of the parcel the marks at
        which its bytes have come."""
        piece = self._free_piece()
        file = self._files[parcel.extent.file]
        file.read_around(piece.view, begin, end - begin, direct=direct)
        offset = parcel.extent.offset
        source = Source(begin - offset, end - offset, piece.tensor, file.lead(begin, direct=direct))
        return self._send(piece, parcel, source, lanes(), [[] for _ in parcel.parts])

    def carry_decoded(self, parcel: Parcel, lanes: Callable[[], Sequence[Lane]]) -> list[list[Mark]]:
        """Read, check and decode a parcel here, and bring its plain bytes to the devices."""
        extent = parcel.extent
        stored = read_stored(extent, self._files, self._memory("stored", room_for(extent.offset, extent.length)))
        marks: list[list[Mark]] = [[] for _ in parcel.parts]
        for each, start in zip(extent.pieces, parcel.starts, strict=True):
            at = each.offset - extent.offset
            found = stored[at : at + each.stored_length]
            self._checker.check(each, found)
            plain = self._memory("plain", each.plain_length)[: each.plain_length]
            self._checker.decode_into(each, found, plain)
            for begin in range(0, len(plain), self._size):
                part = plain[begin : begin + self._size]
                piece = self._free_piece()
                piece.view[: len(part)] = part
                source = Source(start + begin, start + begin + len(part), piece.tensor, 0)
                self._send(piece, parcel, source, lanes(), marks)
        return marks

    def _send(
        self, piece: _Piece, parcel: Parcel, source: Source, lanes: Sequence[Lane], marks: list[list[Mark]]
    ) -> list[list[Mark]]:
        for part, taken in zip(parcel.parts, marks, strict=True):
            taken.append(lanes[part.device].take(part, source, self._streams[part.device]))
            piece.marks.append(taken[-1])
        return marks

    def _free_piece(self) -> _Piece:
        """The piece whose bytes were sent first; waits until they have crossed the link."""
        self._turn = (self._turn + 1) % PIECES
        piece = self._pieces[self._turn]
        while piece.marks:
            piece.marks.pop().wait()
        return piece

    def _memory(self, what: str, length: int) -> memoryview:
        """Plain memory of this reader, which begins at a page."""
        memory = self._own.get(what)
        if memory is None or len(memory) < length:
            memory = self._own[what] = memoryview(anonymous(length))
        return memory


def read_stored(extent: Extent, files: SourceFiles, room: memoryview) -> memoryview:
    """The stored bytes of an extent, in `room`, which begins at a page."""
    file = files[extent.file]
    direct = file.prefers_direct(extent.offset, extent.length)
    return file.read_around(room, extent.offset, extent.length, direct=direct)


def check_again(extent: Extent, files: SourceFiles, checker: Checker) -> None:
    """Check and decode on the CPU. Raises DamagedError that names the chunk."""
    stored = read_stored(extent, files, memoryview(anonymous(room_for(extent.offset, extent.length))))
    for piece in extent.pieces:
        at = piece.offset - extent.offset
        found = stored[at : at + piece.stored_length]
        checker.check(piece, found)
        checker.decoded(piece, found)
