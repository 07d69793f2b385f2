"""Loads that the DRAM tier keeps worked out: the same tensors as ever, from the tier alone, and never of what has gone,
moved or been damaged since."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dormouse
from dormouse import Shard
from dormouse.checkpoint import load as module
from dormouse.data_dir import DataDir
from dormouse.errors import BusyError, HostError, NotFoundError
from dormouse.store.store import Store
from dormouse.transfer import gpus, load_device, pinned
from dormouse.transfer.dram import DramTier
from dormouse.transfer.plan import LoadPlan
from dormouse.transfer.report import LoadReport
from tests.transfer.fake_gpu import FakeGpu, FakePinner

from .test_load import make_checkpoint
from .test_load_file import assert_same

SLAB = 4 << 20


class _EagerGpu(FakeGpu):
    """Does all at once, and leaves torch as it is: for several threads."""

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        yield

    def do(self, job: Callable[[], object]) -> None:
        job()


def some_weights(seed: int) -> dict[str, torch.Tensor]:
    """That a GPU decodes, all of them; nearly 4 MB when coded."""
    torch.manual_seed(seed)
    layers = {f"layer.{n}.{part}": torch.randn(300, 500) for n in range(8) for part in ("row", "column")}
    return {
        "zeros": torch.zeros(1 << 20, dtype=torch.bfloat16),
        **{name: tensor.mul(0.02).bfloat16() for name, tensor in layers.items()},
        "scale": torch.tensor(0.5),
        "noise": torch.randint(-128, 128, (400, 1001), dtype=torch.int8),
    }


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return some_weights(1)


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, torch.Tensor]) -> DataDir:
    folder = DataDir(tmp_path_factory.mktemp("home"))
    make_checkpoint(folder, "model", weights)
    return folder


@pytest.fixture
def home(shared_home: DataDir, tmp_path: Path) -> DataDir:
    """One that a test may do with as it likes."""
    return DataDir(Path(shutil.copytree(shared_home.root, tmp_path / "home")))


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[list[LoadPlan]]:
    """GPUs with kernels, made of CPU tensors; the plans they were given. Where a test needs a GPU, it gets that."""
    given: list[LoadPlan] = []
    if "gpu" in request.keywords:
        yield given
        return

    def on_fakes(plan: LoadPlan, blocks: list[torch.Tensor], **options: Any) -> LoadReport:
        given.append(plan)
        fakes = [_EagerGpu() for _block in blocks]
        return load_device.carry_out(plan, blocks, fakes, FakePinner(), kernels=True, **options)

    pinned.free_pinned()
    monkeypatch.setattr(load_device, "load_device", on_fakes)
    monkeypatch.setattr(gpus, "have_kernels", lambda: True)
    monkeypatch.setattr(module, "find_device", torch.device)
    monkeypatch.setattr(module, "_gpu_block", lambda size, _device: torch.full((size,), 0xAB, dtype=torch.uint8))
    yield given
    pinned.free_pinned()


@pytest.fixture
def tier() -> Iterator[DramTier]:
    with DramTier(2 * SLAB, pin=False, slab_bytes=SLAB) as tier:
        yield tier


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The stores that were opened."""
    found: list[Path] = []
    original = Store.open_to_read.__func__  # type: ignore[attr-defined]

    def opening(kind: type[Store], path: Path) -> Store:
        found.append(path)
        store: Store = original(kind, path)
        return store

    monkeypatch.setattr(Store, "open_to_read", classmethod(opening))
    return found


def on_gpu(home: DataDir, tier: DramTier | None, **options: Any) -> Any:
    return dormouse.load("model", device="cuda:0", data_dir=home.root, tier=tier, **options)


def hold(home: DataDir, tier: DramTier) -> None:
    dormouse.hold("model", tier, data_dir=home.root)


def test_what_was_held_is_loaded_without_the_store(
    home: DataDir, tier: DramTier, weights: dict[str, torch.Tensor], opened: list[Path]
) -> None:
    hold(home, tier)
    opened.clear()
    for _ in range(3):
        assert_same(on_gpu(home, tier), weights)
    assert not opened
    shutil.rmtree(home.store)
    assert_same(on_gpu(home, tier), weights)
    with pytest.raises(NotFoundError):
        on_gpu(home, None)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15, deadline=None)
@given(data=st.data())
def test_every_choice_is_the_same_with_and_without(
    shared_home: DataDir, weights: dict[str, torch.Tensor], data: st.DataObject
) -> None:
    names = data.draw(st.none() | st.lists(st.sampled_from(["*.row", "*.column", *weights]), unique=True))
    count = data.draw(st.integers(1, 3))
    cut = data.draw(st.sampled_from([None, Shard({"noise": 0}), Shard({"noise": 1})]))
    if cut is not None and names is not None and "noise" not in names:
        cut = None
    options: dict[str, Any] = {"device": ["cuda:0"] * count, "tensors": names, "shard": cut}
    with DramTier(2 * SLAB, pin=False, slab_bytes=SLAB) as tier:
        hold(shared_home, tier)
        plain = dormouse.load("model", data_dir=shared_home.root, **options)
        for _ in range(3):
            found = dormouse.load("model", data_dir=shared_home.root, tier=tier, **options)
            for one, other in zip(found, plain, strict=True):
                assert_same(one, other)


def test_another_choice_is_worked_out_once(home: DataDir, tier: DramTier, opened: list[Path]) -> None:
    hold(home, tier)
    for options in ({"tensors": ["*.row"]}, {"tensors": iter(["noise"])}, {"dtype": torch.float32}):
        on_gpu(home, tier, **options)
    assert len(opened) == 1 + 2  # a type is no other choice
    on_gpu(home, tier, tensors=["*.row"])
    on_gpu(home, tier, tensors=["noise"])
    assert len(opened) == 3


def test_what_made_room_is_read_again(
    home: DataDir, tier: DramTier, weights: dict[str, torch.Tensor], opened: list[Path]
) -> None:
    others = [some_weights(seed) for seed in (2, 3)]
    hold(home, tier)
    for number, other in enumerate(others):
        make_checkpoint(home, f"other{number}", other)
        dormouse.hold(f"other{number}", tier, data_dir=home.root)
    opened.clear()
    assert_same(on_gpu(home, tier), weights)
    assert opened
    for number, other in enumerate(others):
        assert_same(dormouse.load(f"other{number}", device="cuda:0", data_dir=home.root, tier=tier), other)
    hold(home, tier)
    opened.clear()
    assert_same(on_gpu(home, tier), weights)
    assert not opened


def test_what_is_damaged_is_told_and_forgotten(
    home: DataDir, tier: DramTier, weights: dict[str, torch.Tensor], plans: list[LoadPlan], opened: list[Path]
) -> None:
    hold(home, tier)
    on_gpu(home, tier)
    first = next(extent for extent in plans[-1].extents if extent.pieces[0].codec)
    with tier.borrow([first]) as (runs,):
        assert runs is not None
        runs[0].memory[runs[0].offset] ^= 255
    with pytest.raises(HostError, match="were damaged in the DRAM tier or on the GPU") as caught:
        on_gpu(home, tier)
    opened.clear()
    assert_same(on_gpu(home, tier), weights)  # as the remedy says
    assert opened
    assert "Load again" in caught.value.remedy
    tier.close()  # although the error is kept


def test_a_model_imported_anew_or_removed_is_noticed(
    home: DataDir, tier: DramTier, weights: dict[str, torch.Tensor]
) -> None:
    hold(home, tier)
    assert_same(on_gpu(home, tier), weights)
    shutil.rmtree(home.models / "model")
    with pytest.raises(NotFoundError, match="no model named"):
        on_gpu(home, tier)
    other = some_weights(7)
    make_checkpoint(home, "model", other)
    assert_same(on_gpu(home, tier), other)


def test_many_threads_load_at_once(home: DataDir, tier: DramTier, weights: dict[str, torch.Tensor]) -> None:
    other = some_weights(2)
    make_checkpoint(home, "other", other)
    hold(home, tier)
    errors: list[BaseException] = []

    def load() -> None:
        try:
            for _ in range(5):
                assert_same(on_gpu(home, tier), weights)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(5):  # makes room, if nobody loads just then
        with contextlib.suppress(BusyError):
            dormouse.hold("other", tier, data_dir=home.root)
    for thread in threads:
        thread.join()
    assert not errors
    assert_same(on_gpu(home, tier), weights)


def test_a_tier_is_not_closed_under_a_load_and_keeps_nothing_after(
    home: DataDir, tier: DramTier, weights: dict[str, torch.Tensor], opened: list[Path]
) -> None:
    hold(home, tier)
    refused = []

    def close(_done: int, _total: int) -> None:
        with pytest.raises(BusyError):
            tier.close()
        refused.append(True)

    assert_same(on_gpu(home, tier, progress=close), weights)
    assert refused
    tier.close()
    opened.clear()
    assert_same(on_gpu(home, tier), weights)
    assert opened


def test_a_cancelled_load_can_be_done_again(
    home: DataDir, tier: DramTier, weights: dict[str, torch.Tensor], opened: list[Path]
) -> None:
    hold(home, tier)
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(dormouse.errors.StoreError, match="given up"):
        on_gpu(home, tier, cancelled=cancelled)
    opened.clear()
    assert_same(on_gpu(home, tier), weights)
    assert not opened


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(home: DataDir, weights: dict[str, torch.Tensor], opened: list[Path]) -> None:
    with DramTier(2 * SLAB, pin=True, slab_bytes=SLAB) as tier:
        hold(home, tier)
        opened.clear()
        for _ in range(3):
            found = dormouse.load("model", device="cuda", data_dir=home.root, tier=tier)
            assert {tensor.device.type for tensor in found.values()} == {"cuda"}
            assert_same(found, weights)
        assert not opened
        with ThreadPoolExecutor(2) as pool:
            for found in pool.map(lambda _number: on_gpu(home, tier), range(4)):
                assert_same(found, weights)
