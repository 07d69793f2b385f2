"""Bytes of files on their way to GPUs, through pinned memory.

    as they are stored:  Flow, the caller's: stretches of files -> read by many threads of the C library at once
                         -> in order, over the link
    the CPU decodes:     Carrier, one for each of some threads: read, decoded in plain memory, piece by piece sent

A piece of pinned memory is filled again when its bytes have crossed the link. All together are few and small enough to
stay in the processor's cache: what was just read is taken from there, not from memory. (On a Xeon of 2023, 16 threads
copied 81 GB/s out of the page cache into 128 MiB of pinned memory, and 47 GB/s into 512 MiB.)
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

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
from dormouse.transfer.source_files import PendingRead, SourceFiles, room_for

BLOCK_BYTES = 6 << 20
"""Pinned memory is taken in blocks of this size, all alike, so that later loads use them again."""

SENT_BLOCKS = 4
"""Of a flow, beside those that are being read into: what crosses the link."""

_LEAST = 64 << 10

Marks = list[list[Mark]]


class Shares(NamedTuple):
    """How many carriers there are, with a block each; how many blocks a flow has; and the size of a block."""

    carriers: int
    flow: int
    block_bytes: int


def most_reads(lengths: Iterable[int]) -> int:
    """How many reads parcels of so many bytes are, at most."""
    return sum(-(-length // BLOCK_BYTES) + 1 for length in lengths)


def shared_out(budget: int, *, carriers: int, reads: int) -> Shares:
    """The pinned memory of a load, shared out among at most so many carriers, and a flow that has at most so many reads
    under way (0: there is none). Raises ConfigError when there is not enough."""
    flow = min(reads + SENT_BLOCKS, max(2, budget // 2 // _LEAST)) if reads else 0
    carriers = min(carriers, max(1, budget // _LEAST - flow))
    size = min(BLOCK_BYTES, budget // max(1, carriers + flow))
    size -= size % (2 * ALIGNMENT)
    if not size and carriers + flow:
        raise ConfigError(f"{budget} bytes of pinned memory are too few for a load", remedy="Allow more pinned memory")
    return Shares(carriers, flow, size)


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


def _send(
    piece: _Piece, begin: int, end: int, offset: int, parcel: Parcel, lanes: Sequence[Lane], streams: Sequence[Any]
) -> list[Mark]:
    """Bytes `begin` to `end` of a parcel, which begin `offset` bytes into the piece. For each part of the parcel, where
    they have come."""
    source = Source(begin, end, piece.tensor, offset)
    piece.marks = [lanes[part.device].take(part, source, streams[part.device]) for part in parcel.parts]
    return piece.marks


class Flow:
    """Brings parcels in order, and reads ahead of what is asked for. Used by one thread; a context manager, at whose
    end no read is under way. `blocks`: pinned, of which `size` bytes each are used; `streams`: one of each device."""

    def __init__(
        self,
        parcels: Sequence[Parcel],
        blocks: Sequence[PinnedMemory],
        size: int,
        streams: Sequence[Any],
        files: SourceFiles,
    ) -> None:
        self._size = size
        self._streams = streams
        self._files = files
        self._turns = max(1, len(blocks) - min(SENT_BLOCKS, len(blocks) // 2))
        self._free = [_Piece(block.view[:size]) for block in blocks]
        self._reading: deque[tuple[PendingRead, _Piece]] = deque()
        self._sent: deque[_Piece] = deque()
        self._ahead = self._begun(parcels)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for read, _piece in self._reading:
            read.settle()

    def read_ahead(self) -> None:
        """Begin as many reads as there may be."""
        while len(self._reading) < self._turns and next(self._ahead, False):
            pass

    def bring(self, parcel: Parcel, lanes: Sequence[Lane]) -> Marks:
        """The next parcel. Returns the marks at which it has come, for each of its parts."""
        marks: Marks = [[] for _ in parcel.parts]
        start = parcel.extent.offset
        for begin, end in stretches(start, parcel.extent.length, self._size):
            self.read_ahead()
            read, piece = self._reading[0]
            lead = read.finish()
            self._reading.popleft()
            sent = _send(piece, begin - start, end - start, lead, parcel, lanes, self._streams)
            self._sent.append(piece)
            for taken, mark in zip(marks, sent, strict=True):
                taken.append(mark)
        return marks

    def _begun(self, parcels: Sequence[Parcel]) -> Iterator[bool]:
        """Begin one read after the other."""
        turns = itertools.cycle(range(self._turns))
        for extent in (parcel.extent for parcel in parcels):
            file = self._files[extent.file]
            direct = file.prefers_direct(extent.offset, extent.length)
            for begin, end in stretches(extent.offset, extent.length, self._size):
                piece = self._piece()
                read = file.begin(piece.view, begin, end - begin, direct=direct, turn=next(turns))
                self._reading.append((read, piece))
                yield True

    def _piece(self) -> _Piece:
        """A free one, or that which was sent first, when its bytes have crossed the link."""
        if self._free:
            return self._free.pop()
        piece = self._sent.popleft()
        for mark in piece.marks:
            mark.wait()
        return piece


class Carrier:
    """Brings parcels that the CPU decodes. Used by one thread. `block`: pinned, of which `size` bytes are used;
    `streams`: one of each device."""

    def __init__(
        self, block: PinnedMemory, size: int, streams: Sequence[Any], files: SourceFiles, checker: Checker
    ) -> None:
        self._size = size // 2
        self._pieces = itertools.cycle([_Piece(block.view[: self._size]), _Piece(block.view[self._size : size])])
        self._streams = streams
        self._files = files
        self._checker = checker
        self._own: dict[str, memoryview] = {}

    def carry(self, parcel: Parcel, lanes: Callable[[], Sequence[Lane]]) -> Marks:
        """Read, check and decode a parcel, and bring its plain bytes to the devices that want them; `lanes` tells each
        device's, when they are there. Returns the marks at which the bytes have come, for each part of the parcel."""
        extent = parcel.extent
        stored = read_stored(extent, self._files, self._memory("stored", room_for(extent.offset, extent.length)))
        marks: Marks = [[] for _ in parcel.parts]
        for each, start in zip(extent.pieces, parcel.starts, strict=True):
            at = each.offset - extent.offset
            found = stored[at : at + each.stored_length]
            self._checker.check(each, found)
            plain = self._memory("plain", each.plain_length)[: each.plain_length]
            self._checker.decode_into(each, found, plain)
            for begin in range(0, len(plain), self._size):
                sent = self._bring(plain[begin : begin + self._size], start + begin, parcel, lanes())
                for taken, mark in zip(marks, sent, strict=True):
                    taken.append(mark)
        return marks

    def _bring(self, plain: memoryview, begin: int, parcel: Parcel, lanes: Sequence[Lane]) -> list[Mark]:
        piece = next(self._pieces)
        for mark in piece.marks:
            mark.wait()
        piece.view[: len(plain)] = plain
        return _send(piece, begin, begin + len(plain), 0, parcel, lanes, self._streams)

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
