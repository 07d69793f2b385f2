"""Codecs never lose, never grow what they store, and never turn bad bytes into plain ones."""

from __future__ import annotations

import pytest
import zstandard
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from dormouse.errors import DamagedError
from dormouse.store.chunk import MAX_CHUNK, digest_of, is_zero
from dormouse.store.codec import Codec, decode, encode

codecs = st.sampled_from(Codec)
plains = st.one_of(
    st.binary(max_size=2000),
    st.builds(lambda part, times: part * times, st.binary(min_size=1, max_size=20), st.integers(1, 5000)),
    st.builds(lambda length, tail: bytes(length) + tail, st.integers(0, 200_000), st.binary(max_size=3)),
)


@given(plains, codecs)
def test_what_is_encoded_decodes_to_the_same_and_never_takes_more(plain: bytes, codec: Codec) -> None:
    used, stored = encode(plain, codec)
    assert len(stored) <= len(plain)
    assert used in (Codec.ZERO, Codec.RAW) or len(stored) * 8 <= len(plain) * 7
    assert decode(used, stored, len(plain)) == plain


@given(plains)
def test_the_name_of_a_chunk_is_its_blake3_also_when_it_is_zero(plain: bytes) -> None:
    assert digest_of(plain) == blake3(plain).digest()
    assert is_zero(memoryview(plain)) == (not any(plain))


@pytest.mark.parametrize("codec", Codec)
def test_zeros_have_no_payload_whatever_the_codec(codec: Codec) -> None:
    assert encode(bytes(100_000), codec) == (Codec.ZERO, b"")


def test_bytes_that_do_not_compress_are_stored_raw() -> None:
    plain = blake3(b"seed").digest(length=10_000)
    for codec in (Codec.LZ4, Codec.ZSTD):
        used, stored = encode(plain, codec)
        assert used is Codec.RAW
        assert stored is plain


@given(st.integers(-1, 300), st.binary(max_size=300), st.integers(-5, 5000))
def test_any_bytes_decode_to_the_announced_length_or_to_an_error(codec: int, stored: bytes, length: int) -> None:
    try:
        plain = decode(codec, stored, length)
    except DamagedError:
        return
    assert len(plain) == length


@given(plains, st.sampled_from([Codec.LZ4, Codec.ZSTD]), st.integers(-2, 2), st.data())
def test_a_changed_or_misdeclared_payload_never_gives_another_length(
    plain: bytes, codec: Codec, off: int, data: st.DataObject
) -> None:
    used, stored = encode(plain, codec)
    changed = bytearray(stored)
    if changed:
        changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = decode(used, bytes(changed), len(plain) + off)
    except DamagedError:
        return
    assert len(found) == len(plain) + off


def test_a_frame_that_announces_more_than_its_chunk_is_refused_before_memory_is_taken() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    with pytest.raises(DamagedError, match="announces"):
        decode(Codec.ZSTD, bomb, 1000)
    with pytest.raises(DamagedError, match="at most"):
        decode(Codec.LZ4, b"\0", MAX_CHUNK + 1)


def test_bytes_after_a_zstd_frame_are_refused() -> None:
    used, stored = encode(b"abc" * 1000, Codec.ZSTD)
    with pytest.raises(DamagedError, match="zstd"):
        decode(used, bytes(stored) + b"x", 3000)
