"""Load plans: whatever is joined or cut, every plain byte goes where it was said to go, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dormouse.store.codec import Codec
from dormouse.transfer.plan import Copy, LoadPlan, Piece, plan, split

FILE = bytes(range(1, 251)) * 40
SPACE = 30_000


@st.composite
def copies(draw: st.DrawFn, length: int, room: range) -> Copy:
    """A copy out of `length` plain bytes into a part of the destination."""
    if draw(st.booleans()):
        source = draw(st.integers(0, length - 1))
        return Copy(0, source, room.start, draw(st.integers(1, min(length - source, len(room)))))
    row = draw(st.integers(1, max(1, min(length, len(room)) // 3)))
    pitch = row + draw(st.integers(0, 20))
    target_pitch = row + draw(st.integers(0, 20))
    rows = min((length - row) // pitch, (len(room) - row) // target_pitch) + 1
    source = draw(st.integers(0, length - (rows - 1) * pitch - row))
    return Copy(0, source, room.start, row, rows, pitch, target_pitch)


@st.composite
def pieces(draw: st.DrawFn) -> list[Piece]:
    """Neighbours in one file, some of which nothing keeps together, each with one or two copies."""
    found: list[Piece] = []
    offset = target = 0
    for _ in range(draw(st.integers(1, 6))):
        offset += draw(st.sampled_from([0, 0, 3, 5000]))
        length = draw(st.integers(1, 900))
        if offset + length > len(FILE):
            break
        said = []
        for _ in range(draw(st.integers(1, 2))):
            said.append(draw(copies(length, range(target, target + 2500))))
            target += 2500
        found.append(Piece(0, offset, length, length, Codec.RAW, None, tuple(said)))
        offset += length
    return found


def naive(pieces: list[Piece] | tuple[Piece, ...]) -> bytes:
    """The destination, byte after byte."""
    space = bytearray(SPACE)
    for piece in pieces:
        for copy in piece.copies:
            for row in range(copy.rows):
                for at in range(copy.row_bytes):
                    source = copy.source + row * copy.source_pitch + at
                    assert source < piece.plain_length
                    space[copy.target + row * copy.target_pitch + at] = FILE[piece.offset + source]
    return bytes(space)


def carried_out(made: LoadPlan) -> bytes:
    return naive([piece for extent in made.extents for piece in extent.pieces])


@given(said=pieces(), extent_bytes=st.integers(1, 2000))
def test_every_byte_goes_where_it_was_said_to_go(said: list[Piece], extent_bytes: int) -> None:
    made = plan([Path("f")], said, [SPACE], extent_bytes=extent_bytes)
    assert carried_out(made) == naive(said)
    end = 0
    for extent in made.extents:
        assert 0 < extent.length <= extent_bytes and extent.offset >= end
        end = extent.offset + extent.length
        assert extent.pieces[0].offset == extent.offset and extent.pieces[-1].end == end


@given(said=pieces())
def test_gaps_are_what_nothing_may_be_written_to(said: list[Piece]) -> None:
    made = plan([Path("f")], said, [SPACE])
    space = np.full(SPACE, 0xAB, np.uint8)
    end = -1
    for low, high in made.gaps(0):
        assert end < low < high
        space[low:high], end = 0, high
    for piece in said:
        for copy in piece.copies:
            for row in range(copy.rows):
                at = copy.source + row * copy.source_pitch + piece.offset
                target = copy.target + row * copy.target_pitch
                space[target : target + copy.row_bytes] = list(FILE[at : at + copy.row_bytes])
    assert space.tobytes() == naive(said)


@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=8), extent_bytes=st.integers(1, 6000))
def test_coded_pieces_are_joined_but_never_cut(lengths: list[int], extent_bytes: int) -> None:
    said = [
        Piece(0, 4096 * at, length, length, Codec.LZ4, None, (Copy(0, 0, 4096 * at, length),))
        for at, length in enumerate(lengths)
    ]
    made = plan([Path("f")], reversed(said), [4096 * len(said)], extent_bytes=extent_bytes)
    assert [piece for extent in made.extents for piece in extent.pieces] == said
    assert all(extent.length <= extent_bytes or len(extent.pieces) == 1 for extent in made.extents)


@given(said=pieces(), small=st.integers(1, 500))
def test_extents_can_be_split_further(said: list[Piece], small: int) -> None:
    made = plan([Path("f")], said, [SPACE], extent_bytes=2000)
    parts = [part for extent in made.extents for part in split(extent, small)]
    assert all(part.length <= small for part in parts)
    assert naive([piece for part in parts for piece in part.pieces]) == naive(said)


def test_zeros_are_not_read() -> None:
    zeros = Piece(0, 0, 0, 100, Codec.ZERO, None, (Copy(0, 0, 0, 100),))
    made = plan([Path("f")], [zeros], [100])
    assert not made.extents and made.zeros == (zeros,) and made.stored_bytes == 0


def test_what_goes_nowhere_is_not_read() -> None:
    """A shard that takes the first bytes of each long row of a plain file reads no extent between them."""
    column = Piece(0, 0, 8000, 8000, Codec.RAW, None, (Copy(0, 0, 0, 10, 2, 4000, 10),))
    made = plan([Path("f")], [column], [20], extent_bytes=1000)
    assert [extent.offset for extent in made.extents] == [0, 4000]
