"""Loads into GPU memory: every byte in its place whatever the device does when, bounded, and nothing left behind."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.transfer.fake_gpu import FakeGpu, FakePinner, InterpretedGpu
from tests.transfer.load_tools import cut_by, mixed, plain_file, reversed_parts, shards, stored, weights

from dormouse.errors import ConfigError, DamagedError, HostError, StoreError
from dormouse.store.codec import Codec
from dormouse.store.key import Key
from dormouse.store.store import Store
from dormouse.transfer import pinned, source_files
from dormouse.transfer.gpus import translated
from dormouse.transfer.lane import copy_rows
from dormouse.transfer.load_device import carry_out, load_device
from dormouse.transfer.parallel_reads import Read
from dormouse.transfer.plan import Copy, LoadPlan
from dormouse.transfer.report import LoadReport

DONE = "FakeStream.finish.<locals>.<lambda>"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as store:
        yield store


@pytest.fixture
def pinner() -> Iterator[FakePinner]:
    """Whatever a test does, all that it pinned comes back."""
    pinned.free_pinned()
    pinner = FakePinner()
    yield pinner
    assert sum(pinner.pinned.values()) == pinned.idle_bytes()
    pinned.free_pinned()
    assert not pinner.pinned


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves a thread or a descriptor; but CUDA opens descriptors as it likes."""
    cuda = request.node.get_closest_marker("gpu") is not None
    before = threading.active_count(), 0 if cuda else _descriptors()
    yield
    assert (threading.active_count(), 0 if cuda else _descriptors()) == before


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def loaded(
    plan: LoadPlan, gpus: Sequence[FakeGpu], pinner: FakePinner, key: Key | None, **options: Any
) -> tuple[list[bytes], LoadReport]:
    memory = [torch.zeros(size, dtype=torch.uint8) for size in plan.sizes]
    options.setdefault("kernels", True)
    options.setdefault("threads", 3)
    report = carry_out(plan, memory, gpus, pinner, key=key, **options)
    return [each.numpy().tobytes() for each in memory], report


@pytest.fixture(autouse=True)
def little_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small plans have many parcels."""
    monkeypatch.setattr("dormouse.transfer.load_device.AT_ONCE", 100_000)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("pinned_bytes", [512 << 10, 64 << 20])
def test_chunks_of_every_coding(store: Store, pinner: FakePinner, late: bool, kernels: bool, pinned_bytes: int) -> None:
    chunks = stored(store, mixed(1, 60))
    gpu = FakeGpu(late=late)
    found, report = loaded(
        chunks.plan(extent_bytes=100_000), [gpu], pinner, chunks.key, kernels=kernels, pinned_bytes=pinned_bytes
    )
    assert found == [chunks.content]
    assert report.decoded_on == ("device" if kernels else "host")
    assert 0 < report.peak_pinned_bytes <= pinned_bytes
    assert sum(pinner.pinned.values()) <= pinned_bytes


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_shards_on_several_devices(store: Store, pinner: FakePinner, devices: int, kernels: bool, late: bool) -> None:
    chunks = stored(store, mixed(2, 30))
    copies, sizes = shards(chunks.plains, devices)
    plan = chunks.plan_of(copies, sizes, extent_bytes=90_000)
    found, report = loaded(plan, [FakeGpu(late=late) for _ in sizes], pinner, chunks.key, kernels=kernels)
    assert found == cut_by(chunks.plains, copies, sizes)
    assert report.direct_bytes + report.cached_bytes <= plan.stored_bytes  # read once, whoever needs it


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    length=st.integers(1, 300_000),
    cuts=st.lists(st.integers(1, 300_000), max_size=6),
    late=st.booleans(),
    pinned_bytes=st.sampled_from([16 << 10, 64 << 10, 8 << 20]),
)
def test_plain_files_of_any_shape(
    tmp_path: Path, pinner: FakePinner, length: int, cuts: list[int], late: bool, pinned_bytes: int
) -> None:
    content = random.Random(length).randbytes(length)
    cuts = [cut for cut in cuts if cut < length]
    made = plain_file(tmp_path / "plain", content, cuts)
    found, report = loaded(made, [FakeGpu(late=late)], pinner, None, pinned_bytes=pinned_bytes)
    assert found == [reversed_parts(content, cuts)]
    assert report.peak_pinned_bytes <= pinned_bytes
    pinned.free_pinned()


def test_pinned_memory_is_kept_for_the_next_load(store: Store, pinner: FakePinner) -> None:
    chunks = stored(store, mixed(3, 20))
    before: set[int] = set()
    for _ in range(3):
        loaded(chunks.plan(), [FakeGpu()], pinner, chunks.key, pinned_bytes=1 << 20)
        assert before <= set(pinner.pinned)
        assert 0 < sum(pinner.pinned.values()) <= 1 << 20
        before = set(pinner.pinned)


def test_no_more_slots_are_pinned_than_are_under_way(store: Store, pinner: FakePinner) -> None:
    chunks = stored(store, [(weights(at, 100_000), Codec.BF16) for at in range(12)])
    _found, report = loaded(chunks.plan(extent_bytes=80_000), [FakeGpu()], pinner, chunks.key, threads=1)
    assert report.peak_pinned_bytes == sum(pinner.pinned.values())
    assert len(pinner.pinned) <= 12


def test_too_little_pinned_memory_says_so(store: Store, pinner: FakePinner) -> None:
    chunks = stored(store, [(weights(1, 1 << 20), Codec.BF16)])
    with pytest.raises(ConfigError, match="10000 bytes of pinned memory are too few"):
        loaded(chunks.plan(), [FakeGpu()], pinner, chunks.key, pinned_bytes=10_000)


@pytest.mark.parametrize("codec", [Codec.BF16, Codec.RAW, Codec.ZSTD])
@pytest.mark.parametrize("kernels", [False, True])
def test_a_damaged_chunk_is_named(store: Store, pinner: FakePinner, codec: Codec, kernels: bool) -> None:
    content = (b"text " * 20_000) if codec is Codec.ZSTD else b""
    chunks = stored(store, [(content + weights(at, 100_000), codec) for at in range(12)])
    said = chunks.damage(7)
    with pytest.raises(DamagedError, match=said):
        loaded(chunks.plan(extent_bytes=300_000), [FakeGpu(late=True)], pinner, chunks.key, kernels=kernels)


def test_what_is_damaged_only_on_the_device_is_told_apart(
    store: Store, pinner: FakePinner, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = stored(store, [(weights(at, 100_000), Codec.BF16) for at in range(3)])
    monkeypatch.setattr("tests.transfer.fake_gpu.FakeCheck._check", lambda _self, _task, _memory, word: word.fill_(1))
    with pytest.raises(HostError, match="damaged on the GPU, not on the disk"):
        loaded(chunks.plan(), [FakeGpu()], pinner, chunks.key)


@pytest.mark.parametrize("kernels", [False, True])
def test_chunks_are_not_taken_unchecked_where_there_is_no_key(store: Store, pinner: FakePinner, kernels: bool) -> None:
    chunks = stored(store, [(weights(at, 100_000), Codec.BF16) for at in range(3)])
    with pytest.raises(StoreError, match="can't be loaded without its key"):
        loaded(chunks.plan(), [FakeGpu()], pinner, None, kernels=kernels)


@pytest.mark.parametrize("fail_at", [1, 3, 12])
@pytest.mark.parametrize("late", [False, True])
def test_a_device_that_fails_ends_all(store: Store, pinner: FakePinner, fail_at: int, late: bool) -> None:
    chunks = stored(store, [(weights(at, 100_000), Codec.BF16) for at in range(12)])
    with pytest.raises(HostError, match="GPU failed during the load: CUDA error: an illegal"), translated():
        loaded(
            chunks.plan(extent_bytes=80_000),
            [FakeGpu(fail_at=fail_at, late=late)],
            pinner,
            chunks.key,
            pinned_bytes=400_000,
        )


def test_what_a_dead_device_may_still_read_is_never_used_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what others were given is waited for."""
    abandoned: list[pinned.PinnedMemory] = []
    monkeypatch.setattr(pinned, "_abandoned", abandoned)
    pinned.free_pinned()
    pinner = FakePinner()
    chunks = stored(store, [(weights(at, 100_000), Codec.BF16) for at in range(12)])
    copies, sizes = shards(chunks.plains, 2)
    dead, alive = FakeGpu(late=True, fail_at=3, dies=True), FakeGpu(late=True)
    with pytest.raises(HostError, match="GPU failed during the load: CUDA error: an illegal"), translated():
        loaded(chunks.plan_of(copies, sizes, extent_bytes=80_000), [dead, alive], pinner, chunks.key)
    assert [memory.address for memory in abandoned] == list(pinner.pinned)
    assert pinned.idle_bytes() == 0
    undone = [stream for stream in alive.streams if any(job.__qualname__ != DONE for job in stream.work)]
    assert alive.streams and not undone
    for stream in dead.streams:
        stream.work.clear()  # what it was to copy
    for block in abandoned:
        with contextlib.suppress(BufferError):  # the error still has the load's frames, as `load_device` leaves it not
            block.close()


def test_an_error_without_a_word_is_told_by_its_name() -> None:
    with pytest.raises(HostError, match="failed during the load: RuntimeError"), translated():
        raise RuntimeError


@pytest.mark.parametrize("limit", [10, 100_000, 150_000])
def test_a_device_without_memory(store: Store, pinner: FakePinner, limit: int) -> None:
    chunks = stored(store, [(weights(at, 100_000), Codec.BF16) for at in range(12)])
    with pytest.raises(HostError, match="GPU has no memory for the load: CUDA out of memory"), translated():
        loaded(chunks.plan(extent_bytes=80_000), [FakeGpu(memory_limit=limit)], pinner, chunks.key)


def test_memory_that_can_not_be_pinned(store: Store) -> None:
    pinned.free_pinned()
    chunks = stored(store, mixed(4, 5))
    with pytest.raises(HostError, match="pinning failed"):
        loaded(chunks.plan(), [FakeGpu()], FakePinner(fails=True), chunks.key)
    assert pinned.idle_bytes() == 0


@pytest.mark.parametrize("failing", [0, 3, 11])
def test_a_read_that_fails_ends_all(
    store: Store, pinner: FakePinner, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    chunks = stored(store, [(weights(at, 100_000), Codec.BF16) for at in range(12)])
    calls = iter(range(1000))

    class Sometimes(Read):
        def wait(self) -> int:
            if next(calls) == failing:
                raise OSError(5, "Input/output error")
            return super().wait()

    monkeypatch.setattr(source_files, "Read", Sometimes)
    with pytest.raises(DamagedError, match="the disk can't read it"):
        loaded(chunks.plan(extent_bytes=80_000), [FakeGpu(late=True)], pinner, chunks.key, pinned_bytes=400_000)


@pytest.mark.parametrize("late", [False, True])
def test_cancel_in_the_middle(store: Store, pinner: FakePinner, late: bool) -> None:
    chunks = stored(store, [(weights(at, 100_000), Codec.BF16) for at in range(20)])
    cancelled = threading.Event()
    seen: list[int] = []

    def progress(done: int, _total: int) -> None:
        seen.append(done)
        cancelled.set()

    with pytest.raises(StoreError, match="not needed any more"):
        loaded(
            chunks.plan(extent_bytes=80_000),
            [FakeGpu(late=late)],
            pinner,
            chunks.key,
            pinned_bytes=400_000,
            progress=progress,
            cancelled=cancelled,
        )
    assert max(seen) < len(chunks.content)


def test_progress_goes_up_to_all_of_it(store: Store, pinner: FakePinner) -> None:
    chunks = stored(store, mixed(5, 30))
    seen: list[tuple[int, int]] = []
    plan = chunks.plan(extent_bytes=50_000)
    loaded(plan, [FakeGpu()], pinner, chunks.key, progress=lambda *now: seen.append(now))
    assert seen == sorted(seen) and seen[-1] == (plan.plain_bytes, plan.plain_bytes)


def test_progress_that_fails_ends_all(store: Store, pinner: FakePinner) -> None:
    chunks = stored(store, mixed(5, 30))

    def progress(_done: int, _total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loaded(chunks.plan(extent_bytes=50_000), [FakeGpu()], pinner, chunks.key, progress=progress)


@given(st.data())
def test_rows_are_copied_in_words_of_any_width(data: st.DataObject) -> None:
    step = data.draw(st.sampled_from([1, 2, 4, 8, 16]))
    source = torch.arange(20_000, dtype=torch.int32).to(torch.uint8)[data.draw(st.integers(0, 3)) * step :]
    target = torch.zeros(20_000, dtype=torch.uint8)[data.draw(st.integers(0, 3)) * step :]
    number = st.integers(0, 20).map(lambda n: n * step)
    width = data.draw(st.integers(1, 12)) * step
    copy = Copy(
        0,
        data.draw(number),
        data.draw(number),
        width,
        data.draw(st.integers(1, 20)),
        width + data.draw(number),
        width + data.draw(number),
    )
    plain = source.numpy().tobytes()
    copy_rows(source, target, copy)
    assert [target.numpy().tobytes()] == cut_by([plain], [[copy]], [len(target)])


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton, and TRITON_INTERPRET=1",
)
def test_the_kernels_behind_it(store: Store, pinner: FakePinner) -> None:
    """Tables, alignments and places are what the real kernels expect."""
    kinds = [(weights(1, 32_768), Codec.BF16), (random.Random(1).randbytes(901), Codec.RAW), (b"ab" * 999, Codec.LZ4)]
    chunks = stored(store, kinds)
    found, _report = loaded(chunks.plan(), [InterpretedGpu()], pinner, chunks.key)
    assert found == [chunks.content]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("pinned_bytes", [1 << 20, 512 << 20])
def test_chunks_of_every_coding_on_a_gpu(store: Store, pinned_bytes: int) -> None:
    chunks = stored(store, mixed(1, 60))
    before = torch.cuda.memory_allocated()
    plan = chunks.plan(extent_bytes=300_000)
    memory = torch.zeros(plan.sizes[0], dtype=torch.uint8, device="cuda")
    report = load_device(plan, [memory], key=chunks.key, pinned_bytes=pinned_bytes)
    assert memory.cpu().numpy().tobytes() == chunks.content
    assert report.peak_pinned_bytes <= pinned_bytes
    del memory
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@needs_gpu
def test_shards_on_a_gpu(store: Store) -> None:
    """Two destinations on one GPU are as good as two GPUs."""
    chunks = stored(store, mixed(2, 30))
    copies, sizes = shards(chunks.plains, 2)
    memory = [torch.zeros(size, dtype=torch.uint8, device="cuda") for size in sizes]
    load_device(chunks.plan_of(copies, sizes, extent_bytes=90_000), memory, key=chunks.key)
    assert [each.cpu().numpy().tobytes() for each in memory] == cut_by(chunks.plains, copies, sizes)


@pytest.mark.gpu
@needs_gpu
def test_a_plain_file_on_a_gpu(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(5_000_001)
    made = plain_file(tmp_path / "plain", content, [17, 1_000_000, 3_333_333])
    memory = torch.zeros(len(content), dtype=torch.uint8, device="cuda")
    load_device(made, [memory], key=None)
    assert memory.cpu().numpy().tobytes() == reversed_parts(content, [17, 1_000_000, 3_333_333])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("codec", [Codec.BF16, Codec.RAW])
def test_a_damaged_chunk_is_named_on_a_gpu(store: Store, codec: Codec) -> None:
    chunks = stored(store, [(weights(at, 1 << 20), codec) for at in range(12)])
    said = chunks.damage(7)
    before = torch.cuda.memory_allocated()
    memory = torch.zeros(12 << 20, dtype=torch.uint8, device="cuda")
    with pytest.raises(DamagedError, match=said):
        load_device(chunks.plan(), [memory], key=chunks.key)
    del memory
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_without_memory_is_left_as_it_was(store: Store) -> None:
    chunks = stored(store, [(weights(at, 1 << 20), Codec.BF16) for at in range(12)])
    memory = torch.zeros(12 << 20, dtype=torch.uint8, device="cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (4 << 20)) / total)
    try:
        with pytest.raises(HostError, match="has no memory"):
            load_device(chunks.plan(), [memory], key=chunks.key)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.cuda.memory_allocated() == before
