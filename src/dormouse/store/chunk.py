"""Chunks: runs of plain bytes, named by their BLAKE3. All-zero runs are recognised first, because process images are
full of them and comparing is ten times cheaper than hashing."""

from __future__ import annotations

from functools import lru_cache
from typing import NewType

from blake3 import blake3

Digest = NewType("Digest", bytes)
"""The 32-byte BLAKE3 of a chunk's plain bytes."""

Buffer = bytes | bytearray | memoryview

DIGEST_SIZE = 32
MAX_CHUNK = 16 << 20

ZEROS = memoryview(bytes(MAX_CHUNK))
"""Shared read-only zeros. Never written, so the kernel backs them with its one zero page."""

_ZERO_BLOCK = bytearray(64 << 10)


def digest_of(plain: Buffer) -> Digest:
    """The name of a chunk. Releases the GIL while hashing."""
    return zero_digest(len(plain)) if is_zero(plain) else Digest(blake3(plain).digest())


@lru_cache(maxsize=64)
def zero_digest(length: int) -> Digest:
    """The name of `length` zero bytes."""
    return Digest(blake3(ZEROS[:length]).digest())


def is_zero(plain: Buffer) -> bool:
    """Whether all bytes are zero (also true of no bytes)."""
    view = memoryview(plain)
    step = len(_ZERO_BLOCK)
    whole = len(view) - len(view) % step
    # bytearray's comparison is one memcmp; memoryview's own goes element by element.
    return all(map(_ZERO_BLOCK.__eq__, (view[at : at + step] for at in range(0, whole, step)))) and (
        bytearray(len(view) - whole) == view[whole:]
    )
