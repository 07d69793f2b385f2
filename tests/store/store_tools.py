"""What the store's tests share."""

from __future__ import annotations

import random
from collections.abc import Sequence

from dormouse.store.chunk import Digest
from dormouse.store.codec import Codec
from dormouse.store.store import Manifest, Store


def commit(store: Store, manifest_id: str, plains: Sequence[bytes], codec: Codec = Codec.LZ4) -> list[Digest]:
    """Put the chunks and commit them under an id."""
    with store.begin() as transaction:
        refs = [transaction.put(plain, codec=codec) for plain in plains]
        transaction.commit(Manifest(manifest_id, "snapshot", "model", 1.5, b"body of " + manifest_id.encode(), refs))
    return refs


def noise(seed: int, length: int) -> bytes:
    """Bytes that do not compress."""
    return random.Random(seed).randbytes(length)


def text(seed: int, length: int) -> bytes:
    """Bytes that do compress."""
    words = [random.Random(seed + at).randbytes(4) for at in range(16)]
    return b"".join(random.Random(seed).choices(words, k=-(-length // 4)))[:length]


def zeros(_seed: int, length: int) -> bytes:
    """Bytes that need no room."""
    return bytes(length)
