"""How large pieces of memory are stored: by what they look like, and by what the disk and the cores do."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dormouse.store.codec import FLOATS, Codec, encode
from dormouse.transfer import bulk_codec
from dormouse.transfer.bulk_codec import BulkCodec, Rates, floats_pay, guess

SIZE = 4 << 20
FAST = Rates(write=10e9, read=20e9, encode=0.4e9, decode=1e9)
SLOW = Rates(write=1e9, read=3e9, encode=0.4e9, decode=1e9)
_NUMBERS = np.random.default_rng(1).standard_normal(SIZE // 2, np.float32) * np.float32(0.02)


def view(array: np.ndarray) -> memoryview:  # type: ignore[type-arg]
    return memoryview(array.tobytes()[:SIZE])


CONTENTS = {
    "bf16": (view((_NUMBERS.view(np.uint32) >> 16).astype(np.uint16)), Codec.BF16),
    "fp32": (view(_NUMBERS), Codec.FP32),
    "text": (memoryview(b"".join(b"%09d the dormouse slept, " % n for n in range(SIZE // 20))[:SIZE]), Codec.LZ4),
    "noise": (memoryview(os.urandom(SIZE)), Codec.RAW),
    "halves of zeros": (memoryview((bytes(2048) + os.urandom(2048)) * (SIZE // 4096)), Codec.LZ4),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_piece_is_stored_as_what_it_is(kind: str) -> None:
    plain, expected = CONTENTS[kind]
    codec, stored = guess(plain)
    assert codec == expected
    used, payload = encode(plain, codec)
    assert used == expected
    assert len(payload) / SIZE == pytest.approx(stored, abs=0.04 if codec in FLOATS else 0.2)


def test_floats_are_coded_where_the_disk_is_slow_and_left_raw_where_it_is_not() -> None:
    plain, _codec = CONTENTS["bf16"]
    asked: list[Path] = []

    def rates(found: Rates) -> BulkCodec:
        return BulkCodec(Path("/a"), threads=16, measure=lambda folder: asked.append(folder) or found)

    assert rates(SLOW)(plain) == Codec.BF16
    assert rates(FAST)(plain) == Codec.RAW
    assert asked == [Path("/a")] * 2
    assert rates(FAST)(CONTENTS["text"][0]) == Codec.LZ4
    assert rates(SLOW)(CONTENTS["noise"][0]) == Codec.RAW
    assert len(asked) == 2  # nothing is measured for what are no floats


speeds = st.floats(1e7, 1e11)


@given(st.builds(Rates, speeds, speeds, speeds, speeds), st.integers(1, 64), st.floats(0.1, 0.865))
def test_what_pays_is_never_slower_than_raw(rates: Rates, threads: int, stored: float) -> None:
    if floats_pay(rates, threads, stored):
        size = 1e9
        coded = max(size * stored / rates.write, size / (rates.encode * threads))
        assert coded <= size / rates.write
        assert max(size * stored / rates.read, size / (rates.decode * threads)) <= size / rates.read * 1.001
    assert not floats_pay(Rates(float("inf"), float("inf"), rates.encode, rates.decode), threads, stored)


def test_a_disk_is_measured_once_and_nothing_is_left_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_codec, "_known", {})
    monkeypatch.setattr(bulk_codec, "_PROBE_BYTES", 1 << 20)
    found = bulk_codec.measured_rates(tmp_path)
    assert all(0 < rate < float("inf") for rate in found)
    assert bulk_codec.measured_rates(tmp_path) is found
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_can_not_be_measured_gets_raw_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_folder: Path) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bulk_codec, "_known", {})
    monkeypatch.setattr(bulk_codec, "_nameless_file", refuse)
    assert BulkCodec(tmp_path)(CONTENTS["bf16"][0]) == Codec.RAW
