"""A worker's addresses on a GPU, above a driver made of memfds: the same after every sleep, with the weights behind
them again and scratch empty; nothing of the GPU held in between."""

from __future__ import annotations

import ctypes
import itertools
import os

import pytest

from dormouse.engine.arena import Weights
from dormouse.engine.device_arena import DeviceArena
from dormouse.errors import DamagedError, EngineError, HostError
from dormouse.transfer.handles import CUDA, MEMFD, SegmentHandle, send_report
from tests.engine.test_arena import protections
from tests.transfer.fake_driver import GRANULARITY, FakeDriver

MIB = 1 << 20


class Node:
    """What hands out weights: a driver of its own."""

    def __init__(self, data: bytes) -> None:
        self.driver = FakeDriver()
        self.size = len(data)
        rounded = -(-len(data) // GRANULARITY) * GRANULARITY
        self.memory = self.driver.create(rounded, 0, shared=True)
        os.pwrite(self.driver.export(self.memory), data, 0)

    def handle(self, report: int | None = None, ordinal: int = 0) -> SegmentHandle:
        uuid = self.driver.device(ordinal).uuid
        return SegmentHandle(CUDA, self.size, self.driver.export(self.memory), report, uuid)


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def arena(driver: FakeDriver) -> DeviceArena:
    return DeviceArena(driver, 0)


def content(weights: Weights | None) -> bytes:
    assert weights is not None
    return bytes(weights.array())


def scratch(address: int, size: int) -> ctypes.Array[ctypes.c_ubyte]:
    return (ctypes.c_ubyte * size).from_address(address)


def test_weights_come_back_at_the_same_address(arena: DeviceArena, driver: FakeDriver) -> None:
    data = os.urandom(3 * MIB + 5)
    node = Node(data)
    arena.map([node.handle()])
    first = arena.weights
    assert content(first) == data and arena.mapped and driver.used == 0
    for _ in range(5):
        arena.unmap()
        assert not arena.mapped and not driver.mapped
        arena.map([node.handle()])
        assert arena.weights == first and content(arena.weights) == data


@pytest.mark.parametrize("protects", [True, False])
def test_weights_are_for_reading_where_the_driver_can_do_that(
    arena: DeviceArena, driver: FakeDriver, protects: bool
) -> None:
    driver.protects = protects
    node = Node(bytes(100))
    for _ in range(2):
        arena.map([node.handle()])
        scratch = Weights(arena.allocate(1), 1)
        assert protections(arena.weights) == {"r--s" if protects else "rw-s"} and arena.writable is not protects
        assert protections(scratch) == {"rw-s"}
        arena.unmap()


def test_weights_are_an_array_for_torch(arena: DeviceArena) -> None:
    arena.map([Node(bytes(100)).handle()])
    assert arena.weights is not None
    interface = arena.weights.__cuda_array_interface__
    assert interface["shape"] == (100,) and interface["data"] == (arena.weights.address, False)


def test_scratch_keeps_its_addresses_and_loses_its_contents(arena: DeviceArena, driver: FakeDriver) -> None:
    node = Node(b"w" * 100)
    arena.map([node.handle()])
    addresses = [arena.allocate(size) for size in (1, 5 * MIB, GRANULARITY)]
    assert arena.scratch_bytes == driver.used == (2 + 6 + 2) * MIB
    scratch(addresses[1], 5 * MIB)[:4] = b"kept"
    arena.unmap()
    assert driver.used == 0 and not driver.mapped and arena.scratch_bytes == 10 * MIB
    arena.map([node.handle()])
    assert sorted(driver.mapped) == sorted([*addresses, arena.weights.address])  # type: ignore[union-attr]
    assert bytes(scratch(addresses[1], 4)) == bytes(4)
    scratch(addresses[2], GRANULARITY)[-1] = 1


def test_the_gpu_is_waited_for_before_memory_goes(arena: DeviceArena, driver: FakeDriver) -> None:
    address = arena.allocate(1)
    driver.calls.clear()
    arena.unmap()
    assert driver.calls == ["synchronize", "unmap"]
    arena.map([])
    driver.calls.clear()
    arena.free(address)
    assert driver.calls == ["synchronize", "unmap", "give_back"]


def test_scratch_may_be_given_back_while_nothing_is_mapped(arena: DeviceArena, driver: FakeDriver) -> None:
    address = arena.allocate(1)
    arena.unmap()
    with pytest.raises(EngineError, match="sleeps"):
        arena.allocate(1)
    arena.free(address)
    assert not driver.reserved
    with pytest.raises(EngineError, match="no scratch"):
        arena.free(address)


def test_out_of_memory_at_a_wake_leaves_nothing_mapped(arena: DeviceArena, driver: FakeDriver) -> None:
    node = Node(os.urandom(100))
    arena.map([node.handle()])
    for _ in range(3):
        arena.allocate(GRANULARITY)
    arena.unmap()
    driver.limit = 2 * GRANULARITY
    with pytest.raises(HostError, match="no memory"):
        arena.map([node.handle()])
    assert not driver.mapped and driver.used == 0 and not arena.mapped
    driver.limit = 3 * GRANULARITY
    arena.map([node.handle()])
    assert len(driver.mapped) == 4


def test_out_of_memory_for_scratch_takes_no_addresses(arena: DeviceArena, driver: FakeDriver) -> None:
    driver.limit = GRANULARITY
    with pytest.raises(HostError, match="no memory"):
        arena.allocate(GRANULARITY + 1)
    assert not driver.reserved and arena.scratch_bytes == 0


def test_torch_is_told_no_with_a_null_pointer(
    arena: DeviceArena, driver: FakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    driver.limit = GRANULARITY
    assert arena._called_to_allocate(3 * GRANULARITY, 0, None) is None and "no memory" in caplog.text
    assert arena._called_to_allocate(1, 3, None) is None and "GPU 3" in caplog.text
    address = arena._called_to_allocate(1, 0, None)
    assert address in driver.mapped
    arena._called_to_free(address, 1, 0, None)
    assert not driver.mapped
    arena._called_to_free(address, 1, 0, None)
    assert "they stay with this worker" in caplog.text


def test_no_descriptor_is_left(arena: DeviceArena) -> None:
    node = Node(bytes(10))
    opened = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    reading, writing = os.pipe()
    handles = [node.handle(reading)]
    send_report(writing, None)
    arena.map(handles)
    arena.wait()
    arena.unmap()
    assert len(os.listdir("/proc/self/fd")) == opened  # noqa: PTH208


def test_a_failed_filling_unmaps_and_tells_why(arena: DeviceArena, driver: FakeDriver) -> None:
    reading, writing = os.pipe()
    arena.map([Node(bytes(10)).handle(reading)])
    arena.allocate(1)
    send_report(writing, DamagedError("chunk 3 is damaged"))
    with pytest.raises(DamagedError, match="chunk 3"):
        arena.wait()
    assert not driver.mapped and not arena.mapped


def test_a_loader_that_dies_is_an_error(arena: DeviceArena) -> None:
    reading, writing = os.pipe()
    arena.map([Node(bytes(10)).handle(reading)])
    os.close(writing)
    with pytest.raises(EngineError, match="ended before it was done"):
        arena.wait()


def test_other_weights_are_refused(arena: DeviceArena) -> None:
    arena.map([Node(bytes(10)).handle()])
    arena.unmap()
    with pytest.raises(EngineError, match="other weights"):
        arena.map([Node(bytes(11)).handle()])


def test_weights_on_another_gpu_are_refused_at_first_and_taken_later(arena: DeviceArena) -> None:
    node = Node(bytes(10))
    with pytest.raises(EngineError, match="CUDA_VISIBLE_DEVICES"):
        arena.map([node.handle(ordinal=1)])
    arena.map([node.handle()])
    arena.unmap()
    arena.map([node.handle(ordinal=1)])  # a snapshot of GPU 0 that wakes on GPU 1


def test_segments_of_the_host_are_refused(arena: DeviceArena) -> None:
    handle = SegmentHandle(MEMFD, 10, os.memfd_create("x"))
    with pytest.raises(EngineError, match="memfd"):
        arena.map([handle])
    assert handle.memory == -1


def test_twenty_sleeps_hold_nothing_more(arena: DeviceArena, driver: FakeDriver) -> None:
    node = Node(bytes(10))
    arena.map([node.handle()])
    arena.allocate(GRANULARITY)
    opened, used = len(os.listdir("/proc/self/fd")), driver.used  # noqa: PTH208
    for _ in itertools.repeat(None, 20):
        arena.unmap()
        arena.map([node.handle()])
    assert (len(os.listdir("/proc/self/fd")), driver.used) == (opened, used)  # noqa: PTH208
