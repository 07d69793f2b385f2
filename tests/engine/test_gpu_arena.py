"""Segments, arena and loader on a real GPU. Skipped, visibly, where there is none. Each test cleans up after itself,
and prints the figures it saw."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dormouse.checkpoint.loader import Loader, loader_command
from dormouse.checkpoint.models import open_model
from dormouse.checkpoint.pool import SegmentPool
from dormouse.data_dir import DataDir
from dormouse.engine.device_arena import DeviceArena
from dormouse.errors import HostError
from dormouse.store.store import Store
from dormouse.transfer.cuda_driver import Cuda
from dormouse.transfer.device_segment import DeviceSegment
from dormouse.transfer.handles import SegmentHandle, await_report
from tests.checkpoint.test_load import make_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]
alone = pytest.mark.gpu(alone=True)  # it measures the GPU's memory, or takes all of it

MIB = 1 << 20
SLACK = 32 * MIB  # what the driver takes for page tables and the like
PATIENCE = 15.0  # a process that was killed gives its memory back a little later

# Imports a segment by its descriptor, tells the digest of its bytes and what the GPU's free memory lost by mapping it.
CHILD = """
import hashlib, sys, torch
from dormouse.engine.device_arena import DeviceArena
from dormouse.transfer.cuda_driver import Cuda
from dormouse.transfer.handles import SegmentHandle
fd, size, uuid = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.zeros(1, device="cuda")
driver = Cuda()
arena = DeviceArena(driver, 0)
before = driver.free_and_total(0)[0]
arena.map([SegmentHandle("cuda", size, fd, None, uuid)])
lost = before - driver.free_and_total(0)[0]
found = torch.as_tensor(arena.weights, device="cuda")
assert found.data_ptr() == arena.weights.address
print(hashlib.blake2b(found.cpu().numpy().tobytes()).hexdigest(), lost, flush=True)
sys.stdin.readline()
again = hashlib.blake2b(torch.as_tensor(arena.weights, device="cuda").cpu().numpy().tobytes()).hexdigest()
print(again, flush=True)
"""


@pytest.fixture(scope="module")
def driver() -> Cuda:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    torch.zeros(1, device="cuda")
    return Cuda()


@pytest.fixture
def arena(driver: Cuda) -> Iterator[DeviceArena]:
    arena = DeviceArena(driver, 0)
    yield arena
    torch.cuda.empty_cache()
    arena.unmap()


def free(driver: Cuda) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return driver.free_and_total(0)[0]


def settles(driver: Cuda, before: int, taken: int = 0) -> None:
    """That `taken` bytes less are free than `before`, perhaps after a moment: processes of earlier tests may still be
    on their way out."""
    deadline = time.monotonic() + PATIENCE
    while abs(before - free(driver) - taken) >= SLACK:
        assert time.monotonic() < deadline, f"{before - free(driver)} bytes of the GPU went, not {taken}"
        time.sleep(0.05)


def calm(driver: Cuda) -> int:
    """The free bytes, once they do not change any more."""
    last, deadline = free(driver), time.monotonic() + PATIENCE
    while True:
        time.sleep(0.2)
        now = free(driver)
        if now == last or time.monotonic() > deadline:
            return now
        last = now


def filled(driver: Cuda, size: int, seed: int = 1) -> tuple[DeviceSegment, torch.Tensor]:
    """A segment with noise, and its content on the host."""
    segment = DeviceSegment(driver, 0, size)
    torch.manual_seed(seed)
    content = torch.randint(0, 256, (size,), dtype=torch.uint8)
    segment.tensor().copy_(content)
    torch.cuda.synchronize()
    return segment, content


def test_the_driver_tells_what_it_is(driver: Cuda) -> None:
    device = driver.device(0)
    told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False).stdout
    print(device, driver.granularity(0), driver.free_and_total(0), told)
    assert driver.granularity(0) >= 64 << 10
    assert not told or device.uuid in told
    with pytest.raises(HostError, match="CUDA_ERROR_INVALID_DEVICE"):
        driver.device(99)


@alone
def test_two_processes_see_the_same_bytes_of_one_copy(driver: Cuda) -> None:
    size = 512 * MIB + 77
    segment, content = filled(driver, size)
    expected = hashlib.blake2b(content.numpy().tobytes()).hexdigest()
    children = []
    try:
        for _ in range(2):
            handle = segment.handle(None)
            arguments = [sys.executable, "-c", CHILD, str(handle.memory), str(size), handle.device]
            children.append(
                subprocess.Popen(
                    arguments, pass_fds=[handle.memory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            handle.close()
        for child in children:
            assert child.stdout is not None
            digest, lost = child.stdout.readline().split()
            print("free memory lost by mapping 512 MiB:", lost)
            assert digest == expected
            assert int(lost) < SLACK  # (the other child's context may be made meanwhile: then this is too much)
        segment.close()  # they keep it
        for child in children:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline().strip() == expected
    finally:
        segment.close()
        for child in children:
            child.kill()
            child.communicate(timeout=60)


@alone
def test_a_closed_segment_gives_its_memory_back(driver: Cuda) -> None:
    before = calm(driver)
    segment = DeviceSegment(driver, 0, 2 << 30)
    settles(driver, before, 2 << 30)
    segment.close()
    settles(driver, before)


@alone
def test_tensors_of_the_pool_are_in_scratch_and_stay_where_they_are(driver: Cuda, arena: DeviceArena) -> None:
    before = calm(driver)
    pool = arena.scratch_pool()
    assert arena.scratch_pool() is pool and arena.scratch_bytes == 0
    with torch.cuda.use_mem_pool(pool):
        kept = torch.full((64 * MIB,), 7, dtype=torch.uint8, device="cuda")
        small = torch.zeros(10, device="cuda")
    outside = torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
    ranges = list(arena._scratch.items())
    print("blocks of scratch:", [(hex(address), size) for address, size in ranges])
    for tensor in (kept, small):
        assert any(a <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= a + s for a, s in ranges)
    assert not any(a <= outside.data_ptr() < a + s for a, s in ranges)
    del outside
    assert arena.scratch_bytes >= 64 * MIB
    settles(driver, before, arena.scratch_bytes)
    arena.unmap()
    settles(driver, before)
    arena.map([])
    assert list(arena._scratch.items()) == ranges
    kept.fill_(9)
    small.fill_(3)
    assert bool((kept == 9).all()) and small.sum().item() == 30
    del kept, small
    torch.cuda.empty_cache()
    print("scratch after everything was freed:", arena.scratch_bytes)


def test_a_process_that_has_a_pool_ends_in_order(driver: Cuda) -> None:
    program = (
        "import torch; from dormouse.engine.device_arena import DeviceArena\n"
        "from dormouse.transfer.cuda_driver import Cuda\n"
        "arena = DeviceArena(Cuda(), 0); pool = arena.scratch_pool()\n"
        "with torch.cuda.use_mem_pool(pool): kept = torch.ones(1000, device='cuda')\n"
        "print(kept.sum().item(), arena.scratch_bytes)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0 and done.stdout.startswith("1000.0") and not done.stderr


def test_a_graph_captured_before_a_sleep_replays_right_after_it(driver: Cuda, arena: DeviceArena) -> None:
    segment, content = filled(driver, 64 * MIB)
    try:
        arena.map([segment.handle(None)])
        weights = torch.as_tensor(arena.weights, device="cuda")
        with torch.cuda.use_mem_pool(arena.scratch_pool()):
            given, result = (torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda") for _ in range(2))
        given.fill_(1)
        torch.bitwise_xor(weights, given, out=result)  # what a first call loads must not be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.bitwise_xor(weights, given, out=result)
        for round in range(3):
            arena.unmap()
            arena.map([segment.handle(None)])
            given.fill_(round + 5)
            started = time.perf_counter()
            graph.replay()
            torch.cuda.synchronize()
            print(f"replay after sleep {round}: {(time.perf_counter() - started) * 1e3:.2f} ms")
            assert torch.equal(result.cpu(), content ^ (round + 5))
        del graph
    finally:
        arena.unmap()
        segment.close()


def test_scratch_may_grow_while_a_graph_is_captured(arena: DeviceArena) -> None:
    pool = arena.scratch_pool()
    given = torch.ones(8 * MIB, device="cuda")
    (given * 2).sum()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool.id):
        result = given * 2
    assert arena.scratch_bytes >= 32 * MIB, "a graph's memory is not taken from the pool"
    given.fill_(21)
    graph.replay()
    assert result.sum().item() == 42 * 8 * MIB
    arena.unmap()
    arena.map([])
    graph.replay()
    assert result.sum().item() == 42 * 8 * MIB
    del graph, result


@alone
def test_twenty_sleeps_leave_memory_as_it_was(driver: Cuda, arena: DeviceArena) -> None:
    segment, content = filled(driver, 1 << 30)
    try:
        arena.map([segment.handle(None)])
        addresses = [arena.allocate(size) for size in (2 * MIB, 20 * MIB, 4 << 30)]
        arena.unmap()
        before, opened = calm(driver), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        seconds = []
        for _ in range(20):
            handle = segment.handle(None)
            started = time.perf_counter()
            arena.map([handle])
            mapped = time.perf_counter()
            arena.unmap()
            seconds.append((mapped - started, time.perf_counter() - mapped))
        print("map and unmap of 1 GiB of weights and 4 GiB of scratch, ms:")
        print([(round(a * 1e3, 2), round(b * 1e3, 2)) for a, b in seconds])
        settles(driver, before)
        assert len(os.listdir("/proc/self/fd")) == opened  # noqa: PTH208
        arena.map([segment.handle(None)])
        assert torch.equal(torch.as_tensor(arena.weights, device="cuda")[: 32 * MIB].cpu(), content[: 32 * MIB])
        for address in addresses:
            arena.free(address)
        assert arena.scratch_bytes == 0
    finally:
        arena.unmap()
        segment.close()


@alone
def test_out_of_memory_at_a_wake_is_a_clear_error_and_leaves_nothing(driver: Cuda, arena: DeviceArena) -> None:
    segment, _content = filled(driver, 64 * MIB)
    taken = []
    try:
        arena.map([segment.handle(None)])
        arena.allocate(1 << 30)
        arena.unmap()
        rest = calm(driver) - (600 * MIB)
        taken.append(driver.create(rest // (2 * MIB) * (2 * MIB), 0, shared=False))
        before = free(driver)
        with pytest.raises(HostError, match="has no memory for") as caught:
            arena.map([segment.handle(None)])
        print(caught.value)
        assert not arena.mapped
        settles(driver, before)
        driver.release(taken.pop())
        arena.map([segment.handle(None)])
        assert arena.mapped
    finally:
        for memory in taken:
            driver.release(memory)
        arena.unmap()
        segment.close()


def test_torch_raises_its_own_error_when_scratch_has_no_room(driver: Cuda, arena: DeviceArena) -> None:
    total = driver.free_and_total(0)[1]
    with torch.cuda.use_mem_pool(arena.scratch_pool()), pytest.raises(torch.OutOfMemoryError):
        torch.empty(2 * total, dtype=torch.uint8, device="cuda")
    with torch.cuda.use_mem_pool(arena.scratch_pool()):
        assert torch.ones(5, device="cuda").sum().item() == 5


# Writes to the weights it has mapped. What then happens to its CUDA context is nobody else's business.
VANDAL = """
import sys, torch
from dormouse.engine.device_arena import DeviceArena
from dormouse.transfer.cuda_driver import Cuda
from dormouse.transfer.handles import SegmentHandle
fd, size, uuid = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.zeros(1, device="cuda")
arena = DeviceArena(Cuda(), 0)
arena.map([SegmentHandle("cuda", size, fd, None, uuid)])
weights = torch.as_tensor(arena.weights, device="cuda")
print("read", int(weights.sum(dtype=torch.int64)), "writable", arena.writable, flush=True)
try:
    weights.fill_(7)
    torch.cuda.synchronize()
    print("written", flush=True)
except RuntimeError as error:
    print("refused", str(error).splitlines()[0], flush=True)
import os
os._exit(0)
"""


def test_a_stray_write_does_not_reach_weights_that_others_share(driver: Cuda) -> None:
    segment, content = filled(driver, 64 * MIB)
    handle = segment.handle(None)
    try:
        arguments = [sys.executable, "-c", VANDAL, str(handle.memory), str(handle.size), handle.device]
        done = subprocess.run(
            arguments, pass_fds=[handle.memory], capture_output=True, text=True, timeout=120, check=False
        )
        print(done.stdout, done.stderr[-2000:])
        assert f"read {int(content.sum(dtype=torch.int64))} " in done.stdout, "what is for reading can't be read"
        if "writable True" in done.stdout:
            pytest.skip("this driver maps nothing for reading only")
        assert "refused" in done.stdout
        assert torch.equal(segment.tensor().cpu(), content)
    finally:
        handle.close()
        segment.close()


def bytes_of(handle: SegmentHandle, driver: Cuda) -> bytes:
    arena = DeviceArena(driver, 0)
    arena.map([handle])
    arena.wait()
    found = torch.as_tensor(arena.weights, device="cuda").cpu().numpy().tobytes()
    arena.unmap()
    return found


def test_the_loader_brings_weights_from_disk_and_tier_and_gives_memory_back_when_killed(
    driver: Cuda, tmp_path: Path
) -> None:
    data = DataDir(tmp_path / "data").create()
    torch.manual_seed(1)
    tensors = {f"layer.{n}": torch.randn(4000, 2000).mul(0.02).bfloat16() for n in range(12)}
    make_checkpoint(data, "model", {"zeros": torch.zeros(1 << 20, dtype=torch.bfloat16), **tensors})
    checkpoint = open_model(data.models, "model").checkpoint or ""
    loader = Loader(loader_command(data.root, 1 << 30))
    try:
        with Store.open(data.store) as store:
            pool = SegmentPool(store, loader=loader)
            host = pool.take(checkpoint, "host")
            assert host.report is not None
            await_report(host.report)
            expected = os.pread(host.memory, host.size, 0)
            host.close()
            started = time.perf_counter()
            loader.warm("cuda:0")
            print(f"the loader is ready after {time.perf_counter() - started:.2f} s")
            before = free(driver)
            for round in range(3):
                started = time.perf_counter()
                handle = pool.take(checkpoint, f"user {round}", device="cuda:0")
                taken = time.perf_counter() - started
                assert bytes_of(handle, driver) == expected
                print(f"load {round}: {taken:.4f} s to a handle, {time.perf_counter() - started:.3f} s with all")
                pool.release(f"user {round}")
                print("hold:", loader.hold(checkpoint))
            told = loader.describe()
            print(told)
            assert told is not None and told.tier_held > 0 and told.gpus[0].segments == 0
            kept = pool.take(checkpoint, "kept", device="cuda:0")
            assert kept.report is not None
            await_report(kept.report)
            kept.forget_report()  # a pipe tells it once
            assert loader.pid is not None
            os.kill(loader.pid, signal.SIGKILL)
            deadline = time.monotonic() + PATIENCE
            while loader.pid is not None:
                assert time.monotonic() < deadline, "the death of the loader goes unnoticed"
                time.sleep(0.01)
            assert bytes_of(kept, driver) == expected  # what is handed out lives on
            assert bytes_of(pool.take(checkpoint, "next", device="cuda:0"), driver) == expected
            pool.release("next")
            print("free before and after, a loader's context apart:", before, free(driver))
    finally:
        loader.close()
