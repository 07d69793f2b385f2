"""Codecs: how a chunk's plain bytes are stored. A codec never loses: what saves less than 1/8 is stored raw, and
all-zero chunks have no payload at all. The heavy work runs without the GIL, so threads code in parallel.

Codecs of floating-point numbers (`FLOATS`) are for chunks of such numbers, and live in `floats`, which is imported when
the first such chunk turns up: it brings numpy, and a process without models needs none."""

from __future__ import annotations

import threading
from enum import IntEnum

import lz4.block
import zstandard

from dormouse.errors import DamagedError
from dormouse.store.chunk import MAX_CHUNK, ZEROS, Buffer, is_zero

_ZSTD_LEVEL = 1  # level 3 takes half as long again to code and saves another 6 % of the pages of an engine

_SAMPLES, _SAMPLE = 8, 4 << 10
_HOPELESS = 0.98
_GOOD = 0.8
_local = threading.local()


class Codec(IntEnum):
    """The number that stands in a pack for each coding."""

    RAW = 0
    ZERO = 1
    LZ4 = 2
    ZSTD = 3
    BF16 = 4
    FP16 = 5
    FP32 = 6
    FP8_E4M3 = 7
    FP8_E5M2 = 8


FLOATS = frozenset({Codec.BF16, Codec.FP16, Codec.FP32, Codec.FP8_E4M3, Codec.FP8_E5M2})


def encode(plain: Buffer, codec: Codec) -> tuple[Codec, Buffer]:
    """Code a chunk; returns the codec that was really used and the bytes to store (`plain` itself when raw). Numbers
    that their own codec gains too little on, such as repeated ones, are tried with LZ4."""
    if is_zero(plain):
        return Codec.ZERO, b""
    if codec in FLOATS:
        from dormouse.store import floats

        coded = floats.encode(plain, codec)
        return (codec, coded) if coded is not None else encode(plain, Codec.LZ4)
    if codec not in (Codec.LZ4, Codec.ZSTD) or _looks_incompressible(plain):
        return Codec.RAW, plain
    if codec is Codec.LZ4:
        stored: bytes = lz4.block.compress(plain, store_size=False)
    else:
        stored = _compressor().compress(plain)
    return (codec, stored) if len(stored) * 8 <= len(plain) * 7 else (Codec.RAW, plain)


def packs_well(plain: Buffer) -> bool:
    """Whether LZ4 gains much on a few samples."""
    return sampled_share(plain) <= _GOOD


def _looks_incompressible(plain: Buffer) -> bool:
    """Whether LZ4 gains next to nothing on a few samples. Weights in bfloat16 defeat it, but only after it has tried
    hard: that takes it ten times as long as what it gives up at once."""
    return memoryview(plain).nbytes >= _SAMPLES * _SAMPLE * 4 and sampled_share(plain) > _HOPELESS


def sampled_share(plain: Buffer) -> float:
    """What share of a few samples is left by LZ4."""
    view = memoryview(plain).cast("B")
    step = (len(view) - _SAMPLE) // (_SAMPLES - 1)
    sample = b"".join(view[at * step : at * step + _SAMPLE] for at in range(_SAMPLES))
    return len(lz4.block.compress(sample, store_size=False)) / len(sample)


def decode(codec: int, stored: Buffer, plain_length: int) -> Buffer:
    """The plain bytes, exactly `plain_length` of them (`stored` itself when raw, shared zeros when zero).

    Raises DamagedError for anything `encode` cannot have made; never allocates more than `plain_length` for output.
    """
    if not 0 <= plain_length <= MAX_CHUNK:
        raise DamagedError(f"a chunk claims {plain_length} plain bytes; at most {MAX_CHUNK} are allowed")
    if codec == Codec.ZERO:
        plain: Buffer = ZEROS[: 0 if stored else plain_length]
    elif codec == Codec.RAW:
        plain = stored
    elif codec == Codec.LZ4:
        plain = _decode_lz4(stored, plain_length)
    elif codec == Codec.ZSTD:
        plain = _decode_zstd(stored, plain_length)
    elif codec in FLOATS:
        from dormouse.store import floats

        plain = floats.decode(Codec(codec), stored, plain_length)
    else:
        raise DamagedError(f"a chunk has the unknown codec {codec}")
    if len(plain) != plain_length or (codec == Codec.ZERO and stored):
        raise DamagedError(f"a chunk decodes to {len(plain)} bytes instead of {plain_length}")
    return plain


def decode_into(codec: int, stored: Buffer, out: memoryview) -> None:
    """Write the plain bytes to `out`, which has exactly their length. Floating-point numbers are decoded in place;
    what the libraries of the other codecs return is copied. Raises DamagedError as `decode` does, and then `out` has
    any content."""
    if codec in FLOATS and len(out) <= MAX_CHUNK:
        from dormouse.store import floats

        floats.decode_into(Codec(codec), stored, out)
    else:
        out[:] = decode(codec, stored, len(out))


def _decode_lz4(stored: Buffer, plain_length: int) -> bytes:
    try:
        plain: bytes = lz4.block.decompress(stored, uncompressed_size=plain_length)
    except (lz4.block.LZ4BlockError, ValueError) as error:
        raise DamagedError(f"a chunk is not valid LZ4: {error}") from error
    return plain


def _decode_zstd(stored: Buffer, plain_length: int) -> bytes:
    try:
        # The library allocates what the frame announces, so the announcement is checked first.
        announced = zstandard.frame_content_size(stored)
        if announced != plain_length:
            raise DamagedError(f"a chunk's zstd frame announces {announced} bytes instead of {plain_length}")
        return _decompressor().decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamagedError(f"a chunk is not valid zstd: {error}") from error


def _compressor() -> zstandard.ZstdCompressor:
    """This thread's compressor: they hold large tables and serve one thread at a time."""
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
    made: zstandard.ZstdCompressor = _local.compressor
    return made


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_CHUNK)
    made: zstandard.ZstdDecompressor = _local.decompressor
    return made
