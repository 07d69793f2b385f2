"""Load plans: what is read from where, and where its plain bytes go. Pure data; no file is touched here.

    pieces (chunks of a checkpoint, runs of a plain file) -> plan() -> extents of many pieces -> load_host | load_device

A piece is coded as a whole and decoded as a whole; its plain bytes, or parts of them, go to one or more places in the
destinations (one block of memory per device), which are zeros before where nothing goes (`LoadPlan.gaps`): so chunks of
zeros are not read, and only their signatures are checked. Pieces that lie side by side in a file are read at once, as
one extent of at most `extent_bytes`. Plain bytes without a signature may be cut anywhere: a long run of them becomes
several pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from dormouse.errors import DamagedError, StoreError
from dormouse.store.chunk import Digest
from dormouse.store.codec import Codec
from dormouse.store.files import VERIFY_REMEDY
from dormouse.store.pack import ALIGNMENT, StoredChunk, aligned, makes_sense

EXTENT_BYTES = 33 << 20
"""One read, one copy to the device, one launch of the decoder: large enough that Python's share is small. Six chunks of
8 MiB of bfloat16 fit in, coded, or four that are not."""


class Copy(NamedTuple):
    """`rows` runs of `row_bytes` bytes: from `source` on in a piece's plain bytes, `source_pitch` apart, to `target` on
    in the destination number `device`, `target_pitch` apart."""

    device: int
    source: int
    target: int
    row_bytes: int
    rows: int = 1
    source_pitch: int = 0
    target_pitch: int = 0

    def fits(self, plain_length: int, sizes: Sequence[int]) -> bool:
        """Whether it stays within a piece of `plain_length` and the destinations."""
        device, source, target, row_bytes, rows, source_pitch, target_pitch = self
        return (
            0 <= device < len(sizes)
            and source >= 0 <= target
            and row_bytes >= 0 < rows
            and source_pitch >= 0 <= target_pitch
            and source + (rows - 1) * source_pitch + row_bytes <= plain_length
            and target + (rows - 1) * target_pitch + row_bytes <= sizes[device]
        )


class Piece(NamedTuple):
    """Stored bytes that are decoded as one. `file` is an index into the plan's files; `chunk` is what its signature is
    checked against, None for bytes of a plain file, which has none."""

    file: int
    offset: int
    stored_length: int
    plain_length: int
    codec: int
    chunk: StoredChunk | None
    copies: tuple[Copy, ...]

    @property
    def end(self) -> int:
        """Where its bytes end in the file."""
        return self.offset + self.stored_length

    @property
    def whole(self) -> Copy | None:
        """The one place that all plain bytes go to as they are, if that is so."""
        return whole_copy(self.plain_length, self.copies)


def whole_copy(plain_length: int, copies: Sequence[Copy]) -> Copy | None:
    """The only one of `copies`, when it takes all plain bytes as they are."""
    copy = copies[0]
    alone = len(copies) == 1 and copy.rows == 1 and copy.source == 0 and copy.row_bytes == plain_length
    return copy if alone else None


class Extent(NamedTuple):
    """Bytes of a file that are read at once, with the pieces in them, by offset."""

    file: int
    offset: int
    length: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class LoadPlan:
    """`sizes`: of the destinations, in bytes. `zeros`: pieces of nothing but zeros, of which nothing is read."""

    files: tuple[Path, ...]
    extents: tuple[Extent, ...]
    sizes: tuple[int, ...]
    zeros: tuple[Piece, ...] = ()

    @property
    def stored_bytes(self) -> int:
        """What is read."""
        return sum(extent.length for extent in self.extents)

    @property
    def ours(self) -> tuple[bool, ...]:
        """Which of the files are packs of a store."""
        packs = {piece.file for extent in self.extents for piece in extent.pieces if piece.chunk is not None}
        return tuple(number in packs for number in range(len(self.files)))

    def require(self, sizes: Sequence[int]) -> None:
        """Raises StoreError unless the destinations have these sizes and every copy stays within piece and destination:
        what carries out a plan on a GPU checks nothing any more."""
        if tuple(sizes) != self.sizes:
            raise StoreError(f"a load needs memory of {self.sizes} bytes and was given {tuple(sizes)}")
        for extent in self.extents:
            for piece in extent.pieces:
                for copy in piece.copies:
                    if not copy.fits(piece.plain_length, self.sizes):
                        raise StoreError(f"a copy out of {self.files[piece.file]} at {piece.offset} leaves its memory")

    def gaps(self, device: int) -> list[tuple[int, int]]:
        """Begins and ends of what of a destination may be left as it was: nothing is written there, or only rows with
        room between them."""
        written = sorted(
            (copy.target, copy.target + copy.row_bytes)
            for extent in self.extents
            for piece in extent.pieces
            for copy in piece.copies
            if copy.device == device and copy.rows == 1
        )
        gaps, end = [], 0
        for low, high in (*written, (self.sizes[device], self.sizes[device])):
            if low > end:
                gaps.append((end, low))
            end = max(end, high)
        return gaps

    @property
    def plain_bytes(self) -> int:
        """What the pieces that are read decode to."""
        return sum(piece.plain_length for extent in self.extents for piece in extent.pieces)


def stored_pieces(
    placed: Iterable[tuple[StoredChunk, Sequence[Copy]]], pack: Callable[[StoredChunk], Path]
) -> tuple[list[Path], list[Piece]]:
    """Files and pieces for `plan`: one piece per chunk, however often it is needed. `pack` tells a chunk's pack. Raises
    DamagedError for a chunk that no writer can have made."""
    chunks: dict[Digest, tuple[StoredChunk, list[Copy]]] = {}
    for chunk, wanted in placed:
        if not makes_sense(chunk):
            raise DamagedError(
                f"chunk {chunk.digest.hex()} in {pack(chunk)} is damaged: its row of the index makes no sense",
                remedy=VERIFY_REMEDY,
            )
        chunks.setdefault(chunk.digest, (chunk, []))[1].extend(wanted)
    packs: dict[int, Path] = {}
    for chunk, _copies in chunks.values():
        if chunk.pack not in packs:
            packs[chunk.pack] = pack(chunk)
    numbers = {pack: number for number, pack in enumerate(packs)}
    pieces = []
    for chunk, copies in chunks.values():
        _digest, _mac, number, offset, stored_length, plain_length, codec = chunk
        pieces.append(Piece(numbers[number], offset, stored_length, plain_length, codec, chunk, tuple(copies)))
    return list(packs.values()), pieces


def plan(
    files: Sequence[Path], pieces: Iterable[Piece], sizes: Sequence[int], *, extent_bytes: int = EXTENT_BYTES
) -> LoadPlan:
    """Join neighbours into extents, in file order. A coded piece longer than `extent_bytes` is an extent of its own."""
    zeros: list[Piece] = []
    read: list[Piece] = []
    for piece in pieces:
        if piece.codec == Codec.ZERO:
            zeros.append(piece)
        else:
            read += _cut(piece, extent_bytes)
    return LoadPlan(tuple(files), tuple(join(read, extent_bytes)), tuple(sizes), tuple(zeros))


def join(pieces: Iterable[Piece], extent_bytes: int, plain_bytes: int | None = None) -> Iterator[Extent]:
    """Extents of at most `extent_bytes`, whose pieces decode to at most `plain_bytes`; a piece that is longer stands
    alone."""
    run: list[Piece] = []
    number = begin = end = plain = 0
    for piece in sorted(pieces, key=attrgetter("file", "offset")):
        near = piece.file == number and end <= piece.offset <= aligned(end) + ALIGNMENT
        plain += piece.plain_length
        if run and not (near and piece.end - begin <= extent_bytes and (plain_bytes is None or plain <= plain_bytes)):
            yield Extent(number, begin, end - begin, tuple(run))
            run = []
        if not run:
            number, begin, plain = piece.file, piece.offset, piece.plain_length
        end = piece.end
        run.append(piece)
    if run:
        yield Extent(number, begin, end - begin, tuple(run))


def gathered(extents: Iterable[Extent], extent_bytes: int) -> Iterator[Extent]:
    """The same extents, those that follow each other in a file as one of at most `extent_bytes`."""
    last: Extent | None = None
    for extent in extents:
        if last is None:
            last = extent
            continue
        end = last.offset + last.length
        near = extent.file == last.file and end <= extent.offset <= aligned(end) + ALIGNMENT
        length = extent.offset + extent.length - last.offset
        if near and length <= extent_bytes:
            last = Extent(last.file, last.offset, length, last.pieces + extent.pieces)
        else:
            yield last
            last = extent
    if last is not None:
        yield last


def split(extent: Extent, extent_bytes: int) -> Iterator[Extent]:
    """The same in extents of at most `extent_bytes`, as far as its pieces allow."""
    return join((part for piece in extent.pieces for part in _cut(piece, extent_bytes)), extent_bytes)


def _cut(piece: Piece, extent_bytes: int) -> Sequence[Piece]:
    """The piece; or, if nothing keeps its bytes together, its parts between multiples of `extent_bytes` in the file, so
    that all extents but a file's first and last begin and end at such. What goes nowhere is left out."""
    if piece.chunk is not None or piece.codec != Codec.RAW:
        return (piece,)
    parts = []
    begin = piece.offset
    while begin < piece.end:
        end = min(piece.end, (begin // extent_bytes + 1) * extent_bytes)
        copies = tuple(clipped(piece.copies, begin - piece.offset, end - piece.offset))
        if copies:
            parts.append(
                piece._replace(offset=begin, stored_length=end - begin, plain_length=end - begin, copies=copies)
            )
        begin = end
    return parts


def clipped(copies: Iterable[Copy], begin: int, end: int) -> Iterator[Copy]:
    """What of `copies` lies between `begin` and `end` of the plain bytes, counted from `begin`."""
    for copy in copies:
        if copy.rows == 1:  # as most are
            part = _part(copy, 0, 0, begin, end)
            if part.row_bytes > 0:
                yield part
            continue
        pitch = copy.source_pitch or copy.row_bytes
        first = max(0, -(-(begin - copy.source - copy.row_bytes + 1) // pitch))  # the first row that ends after `begin`
        until = min(copy.rows, -(-(end - copy.source) // pitch))  # the first row that begins at `end` or after
        inner = [
            row
            for row in (first, until - 1)
            if first <= row < until and _part(copy, pitch, row, begin, end).row_bytes < copy.row_bytes
        ]
        for row in sorted(set(inner)):
            yield _part(copy, pitch, row, begin, end)
        first, until = first + (first in inner), until - (until - 1 in inner)
        if first < until:
            yield copy._replace(
                source=copy.source + first * pitch - begin,
                target=copy.target + first * copy.target_pitch,
                rows=until - first,
            )


def _part(copy: Copy, pitch: int, row: int, begin: int, end: int) -> Copy:
    """Of one row, what lies between `begin` and `end`."""
    at = copy.source + row * pitch
    low, high = max(at, begin), min(at + copy.row_bytes, end)
    return Copy(copy.device, low - begin, copy.target + row * copy.target_pitch + low - at, high - low)
