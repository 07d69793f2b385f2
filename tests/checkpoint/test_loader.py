"""The loader end to end, its GPUs made of this machine's memory: weights come whole, replicas share them, the tier
serves the next load, and its death is an error and no more than that."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dormouse.checkpoint.device_blocks import DeviceBlocks
from dormouse.checkpoint.loader import Loader
from dormouse.checkpoint.models import ImportedModel, open_model
from dormouse.checkpoint.pool import SegmentPool
from dormouse.data_dir import DataDir
from dormouse.engine.device_arena import DeviceArena
from dormouse.errors import EngineError, HostError, NotFoundError, StoreError
from dormouse.store.store import Store
from dormouse.transfer import pinned
from dormouse.transfer.dram import DramTier
from dormouse.transfer.handles import CUDA, SegmentHandle, await_report
from tests.checkpoint.fake_loader import FakeGpus
from tests.transfer.fake_driver import GRANULARITY, FakeDriver

from .test_load import make_checkpoint

MIB = 1 << 20


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    return DataDir(tmp_path / "data").create()


@pytest.fixture
def model(data: DataDir) -> ImportedModel:
    """Floats, which a GPU decodes, noise, and zeros, which nobody sends."""
    torch.manual_seed(1)
    layers = {f"layer.{n}": torch.randn(700, 500).mul(0.02).bfloat16() for n in range(12)}
    noise = torch.randint(-128, 128, (400, 1001), dtype=torch.int8)
    make_checkpoint(data, "model", {"zeros": torch.zeros(1 << 20, dtype=torch.bfloat16), **layers, "noise": noise})
    return open_model(data.models, "model")


@pytest.fixture
def store(data: DataDir, model: ImportedModel) -> Iterator[Store]:
    with Store.open(data.store) as store:
        yield store
    pinned.free_pinned()


def weights_of(store: Store, model: ImportedModel) -> bytes:
    """As the host's segment has them."""
    assert model.checkpoint is not None
    pool = SegmentPool(store)
    handle = pool.take(model.checkpoint, "reference")
    assert handle.report is not None
    await_report(handle.report)
    found = os.pread(handle.memory, handle.size, 0)
    handle.close()
    pool.release("reference")
    return found


def content(handle: SegmentHandle) -> bytes:
    """As a worker sees it."""
    arena = DeviceArena(FakeDriver(), 0)
    arena.map([handle])
    arena.wait()
    assert arena.weights is not None
    found = bytes(arena.weights.array())
    arena.unmap()
    return found


def command(data: DataDir, *options: str) -> list[str]:
    return [sys.executable, "-m", "tests.checkpoint.fake_loader", "--data-dir", str(data.root), *options]


@pytest.fixture
def start(data: DataDir, model: ImportedModel) -> Iterator[Callable[..., Loader]]:
    loaders: list[Loader] = []

    def begin(*options: str, call_seconds: float = 60.0) -> Loader:
        loaders.append(Loader(command(data, *options), call_seconds=call_seconds))
        return loaders[-1]

    yield begin
    for loader in loaders:
        loader.close()
    pinned.free_pinned()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# In this process


def test_weights_on_a_gpu_are_those_of_the_host_and_shared(store: Store, model: ImportedModel) -> None:
    driver = FakeDriver()
    blocks = DeviceBlocks(store, FakeGpus(driver), None)
    expected, checkpoint = weights_of(store, model), model.checkpoint or ""
    one, two = blocks.take(checkpoint, "one", "cuda"), blocks.take(checkpoint, "two", "cuda:0")
    assert (one.kind, one.size, one.device) == (CUDA, len(expected), driver.device(0).uuid)
    assert content(one) == content(two) == expected
    (gpu,) = blocks.gpus()
    taken = -(-len(expected) // GRANULARITY) * GRANULARITY
    assert driver.used == taken == gpu.segments and gpu.device == "cuda:0"
    blocks.release("one")
    assert driver.used == taken
    blocks.release("two")
    until(lambda: driver.used == 0)
    assert blocks.gpus()[0].segments == 0 and not driver.reserved


def test_each_gpu_has_its_own(store: Store, model: ImportedModel) -> None:
    driver = FakeDriver()
    blocks = DeviceBlocks(store, FakeGpus(driver), None)
    handles = [blocks.take(model.checkpoint or "", "one", device) for device in ("cuda:0", "cuda:1")]
    assert [handle.device for handle in handles] == [driver.device(0).uuid, driver.device(1).uuid]
    for handle in handles:
        assert handle.report is not None
        await_report(handle.report)
        handle.close()
    blocks.release("one")
    until(lambda: driver.used == 0)


def test_the_second_load_comes_from_the_tier(store: Store, model: ImportedModel) -> None:
    driver = FakeDriver()
    gpus = FakeGpus(driver)
    with DramTier(64 * MIB, pin=False, slab_bytes=16 * MIB) as tier:
        blocks = DeviceBlocks(store, gpus, tier)
        expected, checkpoint = weights_of(store, model), model.checkpoint or ""
        assert content(blocks.take(checkpoint, "one", "cuda")) == expected
        blocks.release("one")
        assert gpus.reports[0].tier_bytes == 0
        until(lambda: tier.held_bytes > 0 and blocks.hold(checkpoint).read_bytes == 0)
        assert content(blocks.take(checkpoint, "two", "cuda")) == expected
        blocks.release("two")
        assert gpus.reports[1].tier_bytes > 6_000_000
        assert gpus.reports[1].direct_bytes == gpus.reports[1].cached_bytes == 0
        blocks.forget(checkpoint)
        assert content(blocks.take(checkpoint, "three", "cuda")) == expected
        assert gpus.reports[2].tier_bytes == 0
        blocks.release("three")
        until(lambda: driver.used == 0)
        until(lambda: blocks.hold(checkpoint).read_bytes == 0)
        gc.collect()


def test_what_is_too_large_for_the_tier_is_loaded_all_the_same(store: Store, model: ImportedModel) -> None:
    with DramTier(MIB, pin=False, slab_bytes=MIB) as tier:
        blocks = DeviceBlocks(store, FakeGpus(FakeDriver()), tier)
        assert content(blocks.take(model.checkpoint or "", "one", "cuda")) == weights_of(store, model)
        until(lambda: blocks.tier_bytes()[3] == 1)
        with pytest.raises(StoreError, match="do not fit"):
            blocks.hold(model.checkpoint or "")
        blocks.release("one")


def test_a_gpu_without_room_says_so(store: Store, model: ImportedModel) -> None:
    blocks = DeviceBlocks(store, FakeGpus(FakeDriver(limit=GRANULARITY)), None)
    with pytest.raises(HostError, match="no memory"):
        blocks.take(model.checkpoint or "", "one", "cuda")
    assert blocks.gpus()[0].segments == 0


def test_a_segment_that_nobody_wants_any_more_is_freed_while_it_fills(store: Store, model: ImportedModel) -> None:
    driver = FakeDriver()
    blocks = DeviceBlocks(store, FakeGpus(driver, slow=True), None)
    handle = blocks.take(model.checkpoint or "", "one", "cuda")
    blocks.release("one")
    assert handle.report is not None
    with pytest.raises(StoreError):
        await_report(handle.report)
    handle.close()
    until(lambda: driver.used == 0)


# As a process


def test_a_loader_fills_what_workers_map(start: Callable[..., Loader], store: Store, model: ImportedModel) -> None:
    loader = start("--dram-tier", str(64 * MIB))
    assert loader.pid is None and loader.describe() is None
    pool = SegmentPool(store, loader=loader)
    expected, checkpoint = weights_of(store, model), model.checkpoint or ""
    loader.warm("cuda:0")
    assert content(pool.take(checkpoint, "one", device="cuda:0")) == expected
    assert content(pool.take(checkpoint, "two", device="cuda:0")) == expected
    assert loader.hold(checkpoint).stored_bytes > 0
    told = loader.describe()
    assert told is not None and told.tier_held > 0 and told.refused == 0
    assert [(gpu.device, gpu.segments) for gpu in told.gpus] == [("cuda:0", told.gpus[0].total - told.gpus[0].free)]
    pool.release("one")
    pool.release("two")
    after = loader.describe()
    assert after is not None and after.gpus[0].segments == 0
    loader.forget(checkpoint)


def test_errors_come_back_as_they_were(start: Callable[..., Loader], model: ImportedModel) -> None:
    loader = start("--limit", str(GRANULARITY))
    with pytest.raises(NotFoundError, match="there is no checkpoint nothing"):
        loader.take("nothing", "one", "cuda:0")
    with pytest.raises(HostError, match="no memory"):
        loader.take(model.checkpoint or "", "one", "cuda:0")
    with pytest.raises(HostError, match="GPU 9"):
        loader.warm("cuda:9")
    with pytest.raises(StoreError, match="no DRAM tier"):
        loader.hold(model.checkpoint or "")


def test_a_loader_that_is_killed_while_it_loads_is_an_error_and_the_next_take_works(
    start: Callable[..., Loader], store: Store, model: ImportedModel, data: DataDir, caplog: pytest.LogCaptureFixture
) -> None:
    loader = start("--slow")
    handle = loader.take(model.checkpoint or "", "one", "cuda:0")
    arena = DeviceArena(FakeDriver(), 0)
    arena.map([handle])
    assert loader.pid is not None
    os.kill(loader.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="ended before it was done"):
        arena.wait()
    until(lambda: loader.pid is None)
    loader.release("one")  # has nobody to tell
    loader._command = command(data)
    assert content(loader.take(model.checkpoint or "", "two", "cuda:0")) == weights_of(store, model)
    assert "the loader has died" in caplog.text


def test_what_a_worker_has_mapped_outlives_the_loader(
    start: Callable[..., Loader], store: Store, model: ImportedModel
) -> None:
    loader = start()
    arena = DeviceArena(FakeDriver(), 0)
    arena.map([loader.take(model.checkpoint or "", "one", "cuda:0")])
    arena.wait()
    assert loader.pid is not None
    os.kill(loader.pid, signal.SIGKILL)
    until(lambda: loader.pid is None)
    assert arena.weights is not None and bytes(arena.weights.array()) == weights_of(store, model)


def test_a_loader_that_does_not_answer_is_killed(start: Callable[..., Loader], model: ImportedModel) -> None:
    loader = start("--mute", call_seconds=0.5)
    with pytest.raises(HostError, match="did not answer"):
        loader.take(model.checkpoint or "", "one", "cuda:0")
    assert loader.pid is None


def test_a_loader_that_cannot_start_says_so(data: DataDir) -> None:
    loader = Loader(["/nonexistent/loader"])
    with pytest.raises(HostError, match="can't be started"):
        loader.warm("cuda:0")
    ends = Loader([sys.executable, "-c", "pass"])
    with pytest.raises(HostError, match="has ended"):
        ends.warm("cuda:0")
    ends.close()
    with pytest.raises(HostError, match="closed"):
        ends.warm("cuda:0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_the_real_loader_says_what_is_missing(data: DataDir, model: ImportedModel) -> None:
    from dormouse.checkpoint.loader import loader_command

    loader = Loader(loader_command(data.root, 0))
    with pytest.raises(HostError, match=r"cuda-bindings is missing|no NVIDIA driver"):
        loader.take(model.checkpoint or "", "one", "cuda:0")
    loader.close()


def test_the_loader_ends_with_its_parent(start: Callable[..., Loader]) -> None:
    loader = start("--slow")
    loader.warm("cuda:0")
    pid = loader.pid
    loader.close()
    assert pid is not None and not Path(f"/proc/{pid}").exists()
