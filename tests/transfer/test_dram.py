"""The DRAM tier: what is held is found by every plan, never more than the budget, and gone when it is closed."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.transfer.fake_gpu import FakeGpu, FakePinner
from tests.transfer.load_tools import Stored, cut_by, mixed, plain_file, shards, stored, weights

from dormouse.errors import BusyError, DamagedError, HostError, StoreError
from dormouse.store.codec import Codec
from dormouse.store.store import Store
from dormouse.transfer import pinned
from dormouse.transfer.dram import DramTier
from dormouse.transfer.load_device import carry_out, load_device
from dormouse.transfer.plan import Copy, LoadPlan
from dormouse.transfer.report import LoadReport
from dormouse.transfer.slabs import Room, Slabs

SLAB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as store:
        yield store


@pytest.fixture
def tier() -> Iterator[DramTier]:
    pinner = FakePinner()
    with DramTier(4 * SLAB, True, slab_bytes=SLAB, pinner=pinner) as tier:
        yield tier
        assert sum(pinner.pinned.values()) == tier.taken_bytes <= 4 * SLAB
    assert not pinner.pinned


def model(store: Store, seed: int, megabytes: float = 1.0) -> Stored:
    """Chunks that come to so many coded megabytes, about."""
    count = int(megabytes * (1 << 20) * 1.5 / 100_000)
    return stored(store, [(weights(seed * 1000 + at, 100_000), Codec.BF16) for at in range(count)], f"m{seed}")


def coded_bytes(plan: LoadPlan) -> int:
    """Of all its chunks."""
    return sum(piece.stored_length for extent in plan.extents for piece in extent.pieces)


def load(plan: LoadPlan, chunks: Stored, tier: DramTier) -> tuple[list[bytes], LoadReport]:
    memory = [torch.zeros(size, dtype=torch.uint8) for size in plan.sizes]
    gpus = [FakeGpu(late=True) for _ in memory]
    report = carry_out(plan, memory, gpus, FakePinner(), kernels=True, key=chunks.key, tier=tier, threads=2)
    pinned.free_pinned()
    return [each.numpy().tobytes() for each in memory], report


def test_what_is_held_comes_from_there_and_is_not_read(store: Store, tier: DramTier) -> None:
    chunks = model(store, 1)
    plan = chunks.plan(extent_bytes=300_000)
    report = tier.hold(plan, chunks.key)
    assert report.stored_bytes == report.read_bytes == plan.stored_bytes
    found, loaded = load(plan, chunks, tier)
    assert found == [chunks.content]
    assert (loaded.tier_bytes, loaded.direct_bytes, loaded.cached_bytes) == (coded_bytes(plan), 0, 0)
    assert loaded.peak_pinned_bytes == 0
    assert tier.hold(plan, chunks.key).read_bytes == 0


def test_plans_that_cut_a_model_differently_find_its_chunks(store: Store, tier: DramTier) -> None:
    chunks = model(store, 1)
    tier.hold(chunks.plan(extent_bytes=130_000), chunks.key)
    copies, sizes = shards(chunks.plains, 2)
    plan = chunks.plan_of(copies, sizes, extent_bytes=400_000)
    found, loaded = load(plan, chunks, tier)
    assert found == cut_by(chunks.plains, copies, sizes)
    assert loaded.direct_bytes + loaded.cached_bytes == 0 and loaded.tier_bytes > 0


@pytest.mark.parametrize("at_once", [1, 150_000, 64 << 20])
def test_what_is_held_in_part_is_read_in_part(
    store: Store, tier: DramTier, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("dormouse.transfer.tier_held._AT_ONCE", at_once)
    chunks = stored(store, mixed(7, 40))
    plan = chunks.plan(extent_bytes=100_000)
    half = LoadPlan(plan.files, plan.extents[::2], plan.sizes)
    tier.hold(half, chunks.key)
    found, loaded = load(plan, chunks, tier)
    assert found == [chunks.content]
    assert 0 < loaded.tier_bytes < plan.stored_bytes


def test_the_model_used_longest_ago_makes_room(store: Store, tier: DramTier) -> None:
    models = [model(store, seed, 1.02) for seed in range(4)]  # of which three fit
    plans = [each.plan(extent_bytes=200_000) for each in models]
    for each, plan in zip(models[:3], plans, strict=False):
        tier.hold(plan, each.key)
    load(plans[0], models[0], tier)  # the second is now the oldest
    tier.hold(plans[3], models[3].key)
    assert tier.taken_bytes <= tier.budget_bytes
    assert load(plans[0], models[0], tier)[1].tier_bytes == coded_bytes(plans[0])
    found, loaded = load(plans[1], models[1], tier)
    assert found == [models[1].content]
    assert loaded.tier_bytes < coded_bytes(plans[1])


def test_what_came_in_a_second_time_stays_when_the_first_goes(store: Store) -> None:
    """An extent that was here in part is read as a whole. What of it was here is known by its new place from then on:
    the old one is nobody's, and makes room."""
    size = 48_000
    plains = [(random.Random(at).randbytes(size), Codec.RAW) for at in range(6)]
    chunks = stored(store, plains)
    plan = chunks.plan(extent_bytes=2 * 49_152)
    assert len(plan.extents) == 3
    one = chunks.plan_of([[Copy(0, 0, 0, size)], *([] for _ in range(5))], [size])
    with DramTier(7 * 49_152, False, slab_bytes=7 * 49_152) as tier:
        tier.hold(one, chunks.key)  # 1 of 7
        tier.hold(plan, chunks.key)  # 6 more: 7 of 7
        other = stored(store, [(random.Random(9).randbytes(size), Codec.RAW)], "n")
        tier.hold(other.plan(), other.key)  # the first one's old place is all that has to go
        assert _read(load(plan, chunks, tier)[1]) == 0
        assert _read(load(other.plan(), other, tier)[1]) == 0


def test_a_hold_holds_all_it_says(store: Store) -> None:
    """Also where there is only just room for the plan, and a part of it was here before."""
    size = 48_000
    chunks = stored(store, [(random.Random(at).randbytes(size), Codec.RAW) for at in range(6)])
    plan = chunks.plan(extent_bytes=2 * 49_152)
    one = chunks.plan_of([[Copy(0, 0, 0, size)], *([] for _ in range(5))], [size])
    with DramTier(6 * 49_152, False, slab_bytes=6 * 49_152) as tier:
        tier.hold(one, chunks.key)
        assert tier.hold(plan, chunks.key, threads=1).stored_bytes == plan.stored_bytes
        found, loaded = load(plan, chunks, tier)
        assert found == [chunks.content]
        assert _read(loaded) == 0


def _read(report: LoadReport) -> int:
    return report.direct_bytes + report.cached_bytes


def test_what_is_in_use_makes_no_room(store: Store, tier: DramTier) -> None:
    first, second = model(store, 1, 2.5), model(store, 2, 2.5)
    plan = first.plan(extent_bytes=200_000)
    tier.hold(plan, first.key)
    with tier.borrow(plan.extents) as runs:
        assert all(runs)
        with pytest.raises(BusyError, match="all it holds is in use"):
            tier.hold(second.plan(extent_bytes=200_000), second.key)
        with pytest.raises(BusyError, match="in use by a load"):
            tier.close()
    assert load(plan, first, tier)[0] == [first.content]
    tier.hold(second.plan(extent_bytes=200_000), second.key)


def test_a_model_larger_than_the_tier_is_refused_before_anything_goes(store: Store, tier: DramTier) -> None:
    small, large = model(store, 1), model(store, 2, 5)
    plan = small.plan(extent_bytes=200_000)
    tier.hold(plan, small.key)
    with pytest.raises(StoreError, match="do not fit into the 4194304"):
        tier.hold(large.plan(extent_bytes=200_000), large.key)
    with pytest.raises(StoreError, match="do not fit"):
        tier.hold(large.plan(), large.key)
    assert load(plan, small, tier)[1].tier_bytes == coded_bytes(plan)


def test_a_damaged_chunk_is_named_and_not_held(store: Store, tier: DramTier) -> None:
    chunks = model(store, 1)
    said = chunks.damage(4)
    plan = chunks.plan(extent_bytes=100_000)
    with pytest.raises(DamagedError, match=said):
        tier.hold(plan, chunks.key)
    with tier.borrow(plan.extents) as runs:
        assert None in runs
    held = tier.held_bytes
    with pytest.raises(DamagedError, match=said):
        tier.hold(plan, chunks.key)
    assert tier.held_bytes >= held


def test_bytes_without_a_signature_are_not_held(tmp_path: Path, store: Store, tier: DramTier) -> None:
    plan = plain_file(tmp_path / "plain", bytes(10_000), [])
    assert tier.hold(plan, store.key) == (0, 0)
    assert tier.held_bytes == 0


def test_a_cancelled_hold_and_a_closed_tier(store: Store, tier: DramTier) -> None:
    chunks = model(store, 1)
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(StoreError, match="not needed any more"):
        tier.hold(chunks.plan(extent_bytes=100_000), chunks.key, cancelled=cancelled)
    tier.close()
    tier.close()
    with pytest.raises(StoreError, match="closed"):
        tier.hold(chunks.plan(extent_bytes=100_000), chunks.key)


def test_memory_damaged_in_the_tier_is_told_apart(store: Store, tier: DramTier) -> None:
    chunks = model(store, 1)
    plan = chunks.plan(extent_bytes=200_000)
    tier.hold(plan, chunks.key)
    with tier.borrow(plan.extents[:1]) as (runs,):
        assert runs is not None
        runs[0].memory[runs[0].offset] ^= 255
    with pytest.raises(HostError, match="damaged in the DRAM tier, not on the disk"):
        load(plan, chunks, tier)
    found, loaded = load(plan, chunks, tier)  # as the error's remedy says
    assert found == [chunks.content]
    assert _read(loaded) > 0
    tier.hold(plan, chunks.key)
    assert _read(load(plan, chunks, tier)[1]) == 0


def test_what_is_kept_goes_with_the_first_of_its_chunks(store: Store) -> None:
    size = 48_000
    chunks = stored(store, [(random.Random(at).randbytes(size), Codec.RAW) for at in range(6)])
    plan = chunks.plan(extent_bytes=2 * 49_152)
    last = LoadPlan(plan.files, plan.extents[2:], plan.sizes)
    with DramTier(6 * 49_152, False, slab_bytes=6 * 49_152) as tier:

        def keep(plan: LoadPlan) -> None:
            with tier.lend(plan.extents) as lent:
                assert None not in lent.found
                tier.keep(len(plan.extents), "worked out", lent)

        def is_kept(plan: LoadPlan) -> bool:
            with tier.kept(len(plan.extents)) as kept:
                return kept == "worked out"

        tier.hold(plan, chunks.key)
        keep(plan)
        keep(last)
        assert is_kept(plan) and is_kept(last)
        tier.forget(plan.extents[0])
        assert not is_kept(plan) and is_kept(last)
        with tier.lend(last.extents) as lent:
            tier.forget(plan.extents[2])
            tier.keep("late", "worked out", lent)  # with places that are not those any more
        with tier.kept("late") as kept:
            assert kept is None
        assert not is_kept(last)
        tier.hold(plan, chunks.key)
        keep(plan)
        with tier.kept(3):
            other = stored(store, [(random.Random(9).randbytes(size), Codec.RAW)], "n")
            with pytest.raises(BusyError):
                tier.hold(other.plan(), other.key)
        tier.hold(other.plan(), other.key)
        assert not is_kept(plan)


def test_as_many_are_kept_as_are_allowed(store: Store, tier: DramTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dormouse.transfer.dram._KEPT", 2)
    chunks = model(store, 1)
    plan = chunks.plan(extent_bytes=200_000)
    tier.hold(plan, chunks.key)
    with tier.lend(plan.extents) as lent:
        for name in "abac":
            tier.keep(name, name, lent)

    def kept(name: str) -> str | None:
        with tier.kept(name) as value:
            return value  # type: ignore[no-any-return]

    assert [kept(name) for name in "abc"] == ["a", None, "c"]


def test_many_threads_hold_and_load_at_once(store: Store, tier: DramTier) -> None:
    models = [model(store, seed, 0.6) for seed in range(8)]
    plans = [each.plan(extent_bytes=100_000) for each in models]
    errors: list[BaseException] = []

    def use(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(6):
                at = chance.randrange(len(models))
                tier.hold(plans[at], models[at].key, threads=2)
                with tier.borrow(plans[at].extents) as runs:
                    for extent, found in zip(plans[at].extents, runs, strict=True):
                        for run in found or ():
                            _right(models[at], extent, run)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert tier.taken_bytes <= tier.budget_bytes


def _right(chunks: Stored, extent: object, run: object) -> None:
    content = chunks.pack().read_bytes()
    begin = extent.offset + run.begin  # type: ignore[attr-defined]
    length = run.end - run.begin  # type: ignore[attr-defined]
    at = run.offset  # type: ignore[attr-defined]
    found = run.memory[at : at + length]  # type: ignore[attr-defined]
    for piece in extent.pieces:  # type: ignore[attr-defined]
        low = piece.offset - begin
        if low >= 0 and low + piece.stored_length <= length:
            assert found[low : low + piece.stored_length] == content[piece.offset : piece.end]


@given(st.lists(st.one_of(st.integers(1, 60_000), st.integers(-9, -1)), max_size=60))
def test_rooms_never_overlap_and_come_back(steps: list[int]) -> None:
    slabs = Slabs(200_000, 65_536, None)
    rooms: list[Room] = []
    for step in steps:
        if step > 0:
            room = slabs.take(step)
            if room is not None:
                assert room.size >= step and room.offset + room.size <= slabs.slab_bytes
                assert all(
                    room.slab != other.slab
                    or room.offset >= other.offset + other.size
                    or other.offset >= room.offset + room.size
                    for other in rooms
                )
                rooms.append(room)
        elif rooms:
            slabs.give(rooms.pop(step % len(rooms)))
    assert slabs.taken_bytes <= 200_000
    for room in rooms:
        slabs.give(room)
    if rooms:
        assert slabs.take(slabs.slab_bytes) is not None
    slabs.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_from_the_tier_to_a_gpu(store: Store) -> None:
    chunks = stored(store, mixed(3, 60))
    plan = chunks.plan(extent_bytes=300_000)
    with DramTier(64 << 20, True, slab_bytes=16 << 20) as tier:
        tier.hold(plan, chunks.key)
        memory = torch.zeros(plan.sizes[0], dtype=torch.uint8, device="cuda")
        report = load_device(plan, [memory], key=chunks.key, tier=tier)
        assert memory.cpu().numpy().tobytes() == chunks.content
        assert report.tier_bytes > 0
