"""Chunks read into memory of the caller: the same bytes as ever, or an error that names the chunk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from store_tools import commit, noise, text

from dormouse.errors import DamagedError
from dormouse.store.codec import Codec
from dormouse.store.store import Store

WEIGHTS = (np.random.default_rng(1).normal(0, 0.02, 100_000).astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
SUBJECTS = [
    (Codec.RAW, noise(1, 70_001)),
    (Codec.ZERO, bytes(5000)),
    (Codec.LZ4, text(2, 30_000)),
    (Codec.ZSTD, text(3, 30_000)),
    (Codec.BF16, WEIGHTS),
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as opened:
        yield opened


@pytest.mark.parametrize(("codec", "plain"), SUBJECTS, ids=lambda value: getattr(value, "name", ""))
def test_a_chunk_is_read_into_the_middle_of_other_memory(store: Store, codec: Codec, plain: bytes) -> None:
    refs = commit(store, "a", [plain], codec)
    memory = bytearray(b"x" * (len(plain) + 20))
    with store.reader() as reader:
        (chunk,) = reader.locate(refs)
        assert chunk.codec == codec
        reader.plain_into(chunk, memoryview(memory)[10:-10])
        assert reader.plain(chunk) == plain
    assert memory == b"x" * 10 + plain + b"x" * 10


@pytest.mark.parametrize(
    ("codec", "plain"),
    [subject for subject in SUBJECTS if subject[0] is not Codec.ZERO],  # nothing is stored that could be damaged
    ids=lambda value: getattr(value, "name", ""),
)
def test_damage_is_named_and_the_chunk_is_stored_afresh(
    store: Store, tmp_path: Path, codec: Codec, plain: bytes
) -> None:
    refs = commit(store, "a", [plain], codec)
    with store.reader() as reader:
        (chunk,) = reader.locate(refs)
        with (tmp_path / "store" / "packs" / "00000001.pack").open("r+b") as file:
            file.seek(chunk.offset + chunk.stored_length // 2)
            file.write(b"damaged")
        out = memoryview(bytearray(len(plain)))
        with pytest.raises(DamagedError, match=f"chunk {refs[0].hex()} in .*00000001.pack is damaged"):
            reader.plain_into(chunk, out)
    commit(store, "b", [plain], codec)
    with store.reader() as reader:
        reader.plain_into(reader.locate(refs)[0], out)
    assert out == plain


def test_memory_of_another_size_is_the_callers_mistake(store: Store) -> None:
    refs = commit(store, "a", [noise(1, 100)])
    with store.reader() as reader:
        (chunk,) = reader.locate(refs)
        for length in (0, 99, 101):
            with pytest.raises(ValueError, match="for a chunk of 100"):
                reader.plain_into(chunk, memoryview(bytearray(length)))
        assert reader.plain(chunk) == noise(1, 100)
