"""Readers that each bring stretches of files to GPUs: every byte in its place however they are cut, and errors end all
of them."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.transfer.fake_gpu import FakeGpu, FakePinner
from tests.transfer.load_tools import mixed, plain_file, reversed_parts, stored, weights

from dormouse.errors import ConfigError, DamagedError, StoreError
from dormouse.store.codec import Codec
from dormouse.store.key import Key
from dormouse.store.pack import ALIGNMENT
from dormouse.store.store import Store
from dormouse.transfer import carrier, pinned, source_files
from dormouse.transfer.carrier import BLOCK_BYTES, SENT_BLOCKS, shared_out, stretches
from dormouse.transfer.load_device import carry_out
from dormouse.transfer.parallel_reads import Read
from dormouse.transfer.plan import LoadPlan
from dormouse.transfer.report import LoadReport
from dormouse.transfer.source_files import SourceFile, room_for


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small files have many."""
    monkeypatch.setattr(carrier, "_LEAST", 2 * ALIGNMENT)
    monkeypatch.setattr(carrier, "BLOCK_BYTES", 8 * ALIGNMENT)


@pytest.fixture(params=["direct", "cached"])
def direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether files are read past the page cache, by readers in any case."""
    wanted: bool = request.param == "direct"
    monkeypatch.setattr(SourceFile, "is_resident", lambda _self, _offset, _length: not wanted)
    return wanted


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    pinned.free_pinned()
    before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    yield
    pinned.free_pinned()
    assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == before


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as store:
        yield store


def load(
    plan: LoadPlan,
    key: Key | None = None,
    *,
    kernels: bool = True,
    threads: int = 5,
    pinned_bytes: int = 1 << 20,
    cancelled: threading.Event | None = None,
) -> tuple[bytes, LoadReport]:
    memory = torch.zeros(plan.sizes[0], dtype=torch.uint8)
    report = carry_out(
        plan,
        [memory],
        [FakeGpu(late=True)],
        FakePinner(),
        kernels=kernels,
        key=key,
        threads=threads,
        pinned_bytes=pinned_bytes,
        cancelled=cancelled,
    )
    return memory.numpy().tobytes(), report


@given(offset=st.integers(0, 1 << 40), length=st.integers(1, 40 << 20), pages=st.integers(1, 2048))
def test_stretches_are_all_of_it_and_can_be_read_past_the_page_cache(offset: int, length: int, pages: int) -> None:
    parts = list(stretches(offset, length, pages * ALIGNMENT))
    assert parts[0][0] == offset and parts[-1][1] == offset + length
    assert all(low < high for low, high in parts)
    assert all(end == begin and end % ALIGNMENT == 0 for (_, end), (begin, _) in pairwise(parts))
    assert max(room_for(low, high - low) for low, high in parts) <= pages * ALIGNMENT


@given(budget=st.integers(0, 1 << 30), carriers=st.integers(0, 64), reads=st.integers(0, 64))
def test_pinned_memory_is_shared_out(budget: int, carriers: int, reads: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(carrier, "_LEAST", 64 << 10)
        patch.setattr(carrier, "BLOCK_BYTES", BLOCK_BYTES)
        try:
            shares = shared_out(budget, carriers=carriers, reads=reads)
        except ConfigError as error:
            assert budget < 6 * ALIGNMENT and str(budget) in str(error)
            return
    blocks = shares.carriers + shares.flow
    assert blocks * shares.block_bytes <= budget or not blocks
    assert shares.block_bytes % (2 * ALIGNMENT) == 0 and shares.block_bytes <= BLOCK_BYTES
    assert (shares.carriers > 0, shares.flow > 0) == (carriers > 0, reads > 0)
    wanted = carriers + (reads + SENT_BLOCKS if reads else 0)
    assert not wanted or budget < wanted * BLOCK_BYTES or (blocks, shares.block_bytes) == (wanted, BLOCK_BYTES)


@pytest.mark.parametrize("pinned_bytes", [64 << 10, 300_000, 8 << 20])
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_plain_files(tmp_path: Path, direct: bool, threads: int, pinned_bytes: int) -> None:
    content = random.Random(threads).randbytes(1_500_001)
    cuts = [17, 4096, 700_000, 1_499_999]
    plan = plain_file(tmp_path / "plain", content, cuts)
    for _ in range(3):
        found, report = load(plan, threads=threads, pinned_bytes=pinned_bytes)
        assert found == reversed_parts(content, cuts)
        assert 0 < report.peak_pinned_bytes <= pinned_bytes
        read, other = (report.direct_bytes, report.cached_bytes)[:: 1 if direct else -1]
        assert other == 0 and read >= plan.stored_bytes


@pytest.mark.parametrize("kernels", [False, True])
def test_chunks_of_every_coding(store: Store, direct: bool, kernels: bool) -> None:
    """What the CPU decodes is one reader's, among the others."""
    chunks = stored(store, mixed(8, 60))
    for threads in (1, 3, 16):
        found, _report = load(chunks.plan(extent_bytes=150_000), chunks.key, kernels=kernels, threads=threads)
        assert found == chunks.content


def test_little_pinned_memory_is_enough_for_any_number_of_readers(store: Store) -> None:
    chunks = stored(store, [(weights(at, 100_000), Codec.BF16) for at in range(12)])
    plan = chunks.plan(extent_bytes=90_000)
    for threads in (1, 2, 16):
        found, report = load(plan, chunks.key, threads=threads, pinned_bytes=120_000)
        assert found == chunks.content
        assert report.peak_pinned_bytes <= 120_000


@pytest.mark.parametrize("failing", [0, 1, 5, 20])
@pytest.mark.parametrize("pinned_bytes", [120_000, 1 << 20])
def test_a_stretch_that_fails_ends_all(
    store: Store, monkeypatch: pytest.MonkeyPatch, direct: bool, failing: int, pinned_bytes: int
) -> None:
    chunks = stored(store, [(weights(at, 100_000), Codec.BF16) for at in range(12)])
    calls = iter(range(1000))

    class Sometimes(Read):
        def wait(self) -> int:
            if next(calls) == failing:
                raise OSError(5, "Input/output error")
            return super().wait()

    monkeypatch.setattr(source_files, "Read", Sometimes)
    with pytest.raises(DamagedError, match="pack is damaged: the disk can't read it"):
        load(chunks.plan(extent_bytes=90_000), chunks.key, pinned_bytes=pinned_bytes)


def test_what_can_not_be_read_past_the_page_cache_is_read_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused(Read):
        def wait(self) -> int:
            super().wait()
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(SourceFile, "is_resident", lambda _self, _offset, _length: False)
    monkeypatch.setattr(source_files, "Read", Refused)
    content = random.Random(1).randbytes(300_001)
    found, report = load(plain_file(tmp_path / "plain", content, []))
    assert found == content
    assert (report.direct_bytes, report.cached_bytes) == (0, len(content))


@pytest.mark.parametrize("left", [0, 1, 300_000, 999_999])
def test_a_file_that_became_short_is_named_with_its_end(tmp_path: Path, direct: bool, left: int) -> None:
    plan = plain_file(tmp_path / "plain", random.Random(1).randbytes(1_000_000), [])
    os.truncate(tmp_path / "plain", left)
    with pytest.raises(DamagedError, match=f"plain is damaged: it ends at {left}, and was to go on to"):
        load(plan, threads=8)


@pytest.mark.parametrize("at", [0, 1, 7, 30])
def test_cancel_between_two_parcels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool, at: int) -> None:
    plan = plain_file(tmp_path / "plain", random.Random(1).randbytes(3_000_000), [])
    cancelled, calls = threading.Event(), iter(range(1000))

    class Counted(Read):
        def wait(self) -> int:
            if next(calls) == at:
                cancelled.set()
            return super().wait()

    monkeypatch.setattr(source_files, "Read", Counted)
    monkeypatch.setattr("dormouse.transfer.load_device.AT_ONCE", 100_000)
    with pytest.raises(StoreError, match="not needed any more"):
        load(plan, pinned_bytes=300_000, cancelled=cancelled)
    assert next(calls) < 60


def test_many_reads_are_under_way_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    content = random.Random(1).randbytes(64 * ALIGNMENT)
    plan = plain_file(tmp_path / "plain", content, [])
    under_way, most = [0], [0]

    class Counted(Read):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])

        def wait(self) -> int:
            under_way[0] -= 1
            return super().wait()

    monkeypatch.setattr(source_files, "Read", Counted)
    found, _report = load(plan, threads=4)
    assert found == content
    assert (under_way, most) == ([0], [4])
