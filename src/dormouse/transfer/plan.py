"""Load plans: what is read from where, and where its plain bytes go. Pure data; no file is touched here.

    pieces (chunks of a checkpoint, runs of a plain file) -> plan() -> extents of many pieces -> load_host | load_device

A piece is coded as a whole and decoded as a whole; its plain bytes, or parts of them, go to one or more places in the
destinations (one block of memory per device), which are all zeros before: so chunks of zeros need no piece. Pieces that
lie side by side in a file are read at once, as one extent of at most `extent_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dormouse.store.pack import ALIGNMENT, StoredChunk, aligned

EXTENT_BYTES = 32 << 20
"""One read, one copy to the device, one launch of the decoder: large enough that Python's share is small."""


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
    def whole(self) -> Copy | None:
        """The one place that all plain bytes go to as they are, if that is so."""
        copy = self.copies[0]
        alone = len(self.copies) == 1 and copy.rows == 1 and copy.source == 0 and copy.row_bytes == self.plain_length
        return copy if alone else None


class Extent(NamedTuple):
    """Bytes of a file that are read at once, with the pieces in them, by offset."""

    file: int
    offset: int
    length: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class LoadPlan:
    """`sizes`: of the destinations, in bytes."""

    files: tuple[Path, ...]
    extents: tuple[Extent, ...]
    sizes: tuple[int, ...]

    @property
    def stored_bytes(self) -> int:
        """What is read."""
        return sum(extent.length for extent in self.extents)


def plan(
    files: Sequence[Path], pieces: Iterable[Piece], sizes: Sequence[int], *, extent_bytes: int = EXTENT_BYTES
) -> LoadPlan:
    """Join neighbours into extents, in file order. A piece longer than `extent_bytes` is an extent of its own."""
    extents: list[Extent] = []
    run: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: (piece.file, piece.offset)):
        if run and not _fits(run, piece, extent_bytes):
            extents.append(_extent(run))
            run = []
        run.append(piece)
    if run:
        extents.append(_extent(run))
    return LoadPlan(tuple(files), tuple(extents), tuple(sizes))


def _fits(run: Sequence[Piece], piece: Piece, extent_bytes: int) -> bool:
    first, last = run[0], run[-1]
    end = last.offset + last.stored_length
    near = piece.file == last.file and end <= piece.offset <= max(end, aligned(end)) + ALIGNMENT
    return near and piece.offset + piece.stored_length - first.offset <= extent_bytes


def _extent(run: Sequence[Piece]) -> Extent:
    first, last = run[0], run[-1]
    return Extent(first.file, first.offset, last.offset + last.stored_length - first.offset, tuple(run))
