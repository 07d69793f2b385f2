"""Plans for devices: what is made in short of the common case is what the long way makes of it."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from dormouse.store.chunk import Digest
from dormouse.store.codec import Codec
from dormouse.store.pack import ALIGNMENT, StoredChunk, aligned
from dormouse.transfer import device_plan
from dormouse.transfer.device_plan import pack
from dormouse.transfer.plan import Copy, LoadPlan, Piece, plan

CODECS = [Codec.BF16] * 6 + [Codec.FP32, Codec.FP8_E5M2, Codec.RAW, Codec.LZ4]


@st.composite
def plans(draw: st.DrawFn) -> LoadPlan:
    """Chunks side by side, most of them coded floats that go to one device as they are."""
    chance = draw(st.randoms(use_true_random=False))
    odd = draw(st.sampled_from([0.0, 0.0, 0.1]))
    devices = draw(st.integers(1, 2))
    pieces, offset, target = [], ALIGNMENT, 0
    for number in range(draw(st.integers(1, 30))):
        codec = chance.choice(CODECS) if chance.random() < odd else Codec.BF16
        stored = chance.randrange(1, 9000)
        plain = stored if codec == Codec.RAW else stored * 2
        chunk = StoredChunk(Digest(bytes([number] * 32)), bytes([number] * 16), 1, offset, stored, plain, codec)
        copies = [Copy(number * devices // 40, 0, target, plain)]
        if chance.random() < odd:
            copies.append(Copy(chance.randrange(devices), 0, target + plain, plain // 2))
        at = offset + chance.choice([8, 32]) * (chance.random() < odd)
        signed = chance.random() >= odd or codec != Codec.RAW
        pieces.append(Piece(0, at, stored, plain, codec, chunk if signed else None, tuple(copies)))
        offset += aligned(stored) + ALIGNMENT * chance.choice([1, 1, 40])
        target += plain * 2
    return plan([Path("pack")], pieces, [target] * devices, extent_bytes=draw(st.sampled_from([10_000, 50_000])))


@given(plans(), st.integers(0, 10))
def test_the_short_way_makes_what_the_long_way_makes(made: LoadPlan, held: int) -> None:
    short = pack(made, kernels=True, plain_bytes=30_000, held=held)
    with patch.object(device_plan, "_simple", lambda *_: None):
        assert pack(made, kernels=True, plain_bytes=30_000, held=held) == short


@given(plans())
def test_what_is_held_is_not_checked_again(made: LoadPlan) -> None:
    packed = pack(made, kernels=True, held=len(made.extents))
    assert all(parcel.host or parcel.held is not None for parcel in packed.parcels)
    assert not any(tables.checks for tables in packed.tables)
