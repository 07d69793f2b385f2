"""Bytes of files on their way to GPUs, through pinned memory. Two ways, for a thread that must ask for Python's lock
pays some 50 µs for each time, when others want it too:

    not in memory:      Carrier, one for each of many readers: a stretch of the file -> one of two pieces of its own
                        -> over the link, on a stream of its own
    in the page cache:  Copier, the caller's: the file, mapped -> by all processors in one call -> one of a few pieces
                        -> over the link
    the CPU decodes it: Carrier: read and decoded in plain memory, then piece by piece

While the link takes one piece, the next is filled. A copier's pieces are small enough to stay in the processor's cache
all together: what was just copied is taken from there, not from memory. (On a Xeon of 2023, 16 threads copied 81 GB/s
out of the page cache into 128 MiB of pinned memory, and 47 GB/s into 512 MiB.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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

BLOCK_BYTES = 17 << 20
"""Pinned memory is taken in blocks of this size, all alike, so that later loads use them again. One is a reader's, in
two pieces, or one of the copier's pieces: large enough that Python's share is small, and a quarter of a parcel."""

COPIER_BLOCKS = 6
_LEAST = 64 << 10

Marks = list[list[Mark]]


class Shares(NamedTuple):
    """How many readers there are, how many blocks the copier has (0: there is none), and the size of a block."""

    readers: int
    copier_blocks: int
    block_bytes: int

    @property
    def stretch_bytes(self) -> int:
        """What a reader reads at once."""
        return self.block_bytes // 2


def most_readers(lengths: Iterable[int]) -> int:
    """How many have something to do, for parcels of so many bytes each."""
    return sum(-(-length // (BLOCK_BYTES // 2)) for length in lengths)


def shared_out(budget: int, *, readers: int, copier: bool) -> Shares:
    """The pinned memory of a load, shared out among at most so many readers, and the copier if there is one. Raises
    ConfigError when there is not enough."""
    blocks = min(COPIER_BLOCKS, max(2, budget // 2 // _LEAST)) if copier else 0
    readers = min(readers, max(1, budget // _LEAST - blocks))
    size = min(BLOCK_BYTES, budget // max(1, readers + blocks))
    size -= size % (2 * ALIGNMENT)
    if not size:
        raise ConfigError(f"{budget} bytes of pinned memory are too few for a load", remedy="Allow more pinned memory")
    return Shares(readers, blocks, size)


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


class _Outlet:
    """Pinned memory in pieces that are filled and sent in turn, on one stream of each device. Used by one thread."""

    def __init__(self, pieces: Iterable[memoryview], streams: Sequence[Any]) -> None:
        self._pieces = [_Piece(view) for view in pieces]
        self.size = len(self._pieces[0].view)
        self._streams = streams
        self._turn = 0

    def piece(self) -> _Piece:
        """The one that was sent first; waits until its bytes have crossed the link."""
        self._turn = (self._turn + 1) % len(self._pieces)
        piece = self._pieces[self._turn]
        while piece.marks:
            piece.marks.pop().wait()
        return piece

    def send(
        self, piece: _Piece, begin: int, end: int, offset: int, parcel: Parcel, lanes: Sequence[Lane], marks: Marks
    ) -> None:
        """Bytes `begin` to `end` of a parcel, which begin `offset` bytes into the piece. Adds to `marks`, one list for
        each part of the parcel, where they have come."""
        source = Source(begin, end, piece.tensor, offset)
        for part, taken in zip(parcel.parts, marks, strict=True):
            taken.append(lanes[part.device].take(part, source, self._streams[part.device]))
            piece.marks.append(taken[-1])


class Copier:
    """Brings what the page cache holds. `blocks`: pinned, of which `size` bytes each are used; `streams`: one of each
    device."""

    def __init__(self, blocks: Sequence[PinnedMemory], size: int, streams: Sequence[Any], files: SourceFiles) -> None:
        self._outlet = _Outlet([block.view[:size] for block in blocks], streams)
        self._files = files

    def carry(self, parcel: Parcel, lanes: Sequence[Lane]) -> Marks:
        """Bring a parcel to the devices. Returns the marks at which it has come, for each of its parts."""
        marks: Marks = [[] for _ in parcel.parts]
        size = self._outlet.size
        for begin in range(0, parcel.length, size):
            length = min(size, parcel.length - begin)
            piece = self._outlet.piece()
            with self._files[parcel.extent.file].mapped(parcel.extent.offset + begin, length) as found:
                _copy(found, piece.tensor[:length])
            self._outlet.send(piece, begin, begin + length, 0, parcel, lanes, marks)
        return marks


def _copy(found: memoryview, target: torch.Tensor) -> None:
    """By all processors, if it is much."""
    target.copy_(torch.frombuffer(found, dtype=torch.uint8))


class Carrier:
    """Brings stretches, or whole parcels that the CPU decodes. Used by one thread. `block`: pinned, of which `size`
    bytes are used; `streams`: one of each device."""

    def __init__(
        self, block: PinnedMemory, size: int, streams: Sequence[Any], files: SourceFiles, checker: Checker
    ) -> None:
        self._outlet = _Outlet([block.view[: size // 2], block.view[size // 2 : size]], streams)
        self._files = files
        self._checker = checker
        self._own: dict[str, memoryview] = {}

    def carry(
        self, parcel: Parcel, begin: int, end: int, lanes: Callable[[], Sequence[Lane]], *, direct: bool
    ) -> Marks:
        """Bring bytes `begin` to `end` of the parcel's file, read past the page cache if `direct`, to the devices that
        want them; `lanes` tells each device's, when they are there. Returns the marks at which the bytes have come, for
        each part of the parcel."""
        piece = self._outlet.piece()
        file = self._files[parcel.extent.file]
        file.read_around(piece.view, begin, end - begin, direct=direct)
        offset = parcel.extent.offset
        marks: Marks = [[] for _ in parcel.parts]
        lead = file.lead(begin, direct=direct)
        self._outlet.send(piece, begin - offset, end - offset, lead, parcel, lanes(), marks)
        return marks

    def carry_decoded(self, parcel: Parcel, lanes: Callable[[], Sequence[Lane]]) -> Marks:
        """Read, check and decode a parcel here, and bring its plain bytes to the devices."""
        extent = parcel.extent
        stored = read_stored(extent, self._files, self._memory("stored", room_for(extent.offset, extent.length)))
        marks: Marks = [[] for _ in parcel.parts]
        for each, start in zip(extent.pieces, parcel.starts, strict=True):
            at = each.offset - extent.offset
            found = stored[at : at + each.stored_length]
            self._checker.check(each, found)
            plain = self._memory("plain", each.plain_length)[: each.plain_length]
            self._checker.decode_into(each, found, plain)
            for begin in range(0, len(plain), self._outlet.size):
                part = plain[begin : begin + self._outlet.size]
                piece = self._outlet.piece()
                piece.view[: len(part)] = part
                self._outlet.send(piece, start + begin, start + begin + len(part), 0, parcel, lanes(), marks)
        return marks

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
