"""Address ranges of a worker: the same after every sleep, shared while mapped, empty while not."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dormouse.engine.arena import BASE, Arena, Attached, Weights
from dormouse.errors import DamagedError, EngineError
from dormouse.transfer.handles import SegmentHandle, send_report
from dormouse.transfer.segment import Segment

_bases = itertools.count(BASE + (2 << 40), 1 << 40)


@pytest.fixture
def arena() -> Arena:
    return Arena(next(_bases))


def segment_of(data: bytes) -> Segment:
    segment = Segment.create("test", len(data))
    segment.write(0, data)
    return segment


def content(weights: Weights | None) -> bytes:
    assert weights is not None
    return bytes(weights.array())


def protections(weights: Weights | None) -> set[str]:
    """How the kernel sees the range."""
    assert weights is not None
    found = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin < weights.address + weights.size and end > weights.address:
            found.add(line.split()[1])
    return found


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_segment_comes_back_at_the_same_address(arena: Arena) -> None:
    data = os.urandom(3 << 20)
    segment = segment_of(data)
    before = descriptors()
    arena.map([segment.handle(None)])
    address = arena.weights
    assert content(address) == data and protections(address) == {"r--s"} and arena.mapped
    arena.unmap()
    assert protections(address) == {"---p"} and not arena.mapped  # still taken: nothing else can move in
    arena.map([segment.handle(None)])
    assert arena.weights == address and content(address) == data
    assert descriptors() == before
    arena.unmap()
    segment.close()


def test_a_mapping_sees_what_is_written_until_the_segment_is_sealed(arena: Arena) -> None:
    segment = Segment.create("test", 1 << 20)
    reading, writing = os.pipe()
    arena.map([segment.handle(reading)])
    assert set(content(arena.weights)) == {0}
    segment.write(5, b"dormouse")
    segment.seal()
    send_report(writing, None)
    arena.wait()
    assert content(arena.weights)[5:13] == b"dormouse"
    with pytest.raises(Exception, match="not permitted"):
        segment.write(0, b"x")
    arena.unmap()
    segment.close()


def test_a_writer_dies_instead_of_changing_what_others_share() -> None:
    program = (
        "import ctypes; from dormouse.engine.arena import Arena; from dormouse.transfer.segment import Segment\n"
        "s = Segment.create('t', 4096); s.write(0, b'a'); a = Arena(); a.map([s.handle(None)])\n"
        "ctypes.memset(a.weights.address, 98, 1)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGSEGV


def test_a_mapping_can_not_be_made_writable(arena: Arena) -> None:
    segment = segment_of(b"a" * 4096)
    arena.map([segment.handle(None)])
    assert arena.weights is not None
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(arena.weights.address), ctypes.c_size_t(4096), 3) == -1
    arena.unmap()
    segment.close()


def test_what_the_filling_failed_with_is_raised(arena: Arena) -> None:
    segment = Segment.create("test", 4096)
    for error in (DamagedError("chunk 1 is damaged", remedy="Import it again"), None):
        reading, writing = os.pipe()
        arena.map([segment.handle(reading)])
        if error is not None:
            send_report(writing, error)
            with pytest.raises(DamagedError, match=r"chunk 1 is damaged\. Import it again"):
                arena.wait()
        else:
            os.close(writing)  # whoever filled it has died
            with pytest.raises(EngineError, match="ended before it was done"):
                arena.wait()
        arena.unmap()
    segment.close()


def test_after_a_failed_filling_nothing_is_mapped(arena: Arena) -> None:
    segment = segment_of(bytes(1 << 20))
    reading, writing = os.pipe()
    arena.map([segment.handle(reading)])
    send_report(writing, DamagedError("a chunk is damaged"))
    with pytest.raises(DamagedError):
        arena.wait()
    assert not arena.mapped and protections(arena.weights) == {"---p"}
    segment.close()


def test_other_segments_than_before_are_refused(arena: Arena) -> None:
    small, large = segment_of(b"a" * 4096), segment_of(b"b" * 8192)
    arena.map([small.handle(None)])
    before = descriptors()
    for handles in ([large.handle(None)], [], [small.handle(None), large.handle(None)]):
        with pytest.raises(EngineError, match="other weights than it was started with"):
            arena.map(handles)
    with pytest.raises(EngineError, match="of kind 'cuda'"):
        Arena(next(_bases)).map([SegmentHandle("cuda", 4096, os.dup(0))])
    with pytest.raises(EngineError, match="smaller than the 8192 bytes announced"):
        Arena(next(_bases)).map([SegmentHandle("memfd", 8192, small.handle(None).memory)])
    assert descriptors() == before
    arena.unmap()
    small.close()
    large.close()


def test_a_taken_address_is_an_error(arena: Arena) -> None:
    segment = segment_of(b"a" * 4096)
    arena.map([segment.handle(None)])
    assert arena.weights is not None
    with pytest.raises(EngineError, match="can't be mapped at address"):
        Arena(arena.weights.address).map([segment.handle(None)])
    arena.unmap()
    segment.close()


def test_a_reservation_costs_nothing(arena: Arena) -> None:
    huge = Segment.create("test", 64 << 30)
    arena.map([huge.handle(None)])
    arena.unmap()
    assert protections(arena.weights) == {"---p"}
    huge.close()


def test_an_attached_segment_is_read_only_and_leaves_nothing_behind() -> None:
    segment = segment_of(b"adapter" * 1000)
    handle = segment.handle(None)
    attached = Attached(handle)
    assert handle.memory == -1, "the descriptor is closed"
    segment.close()
    weights = attached.weights
    assert content(weights) == b"adapter" * 1000
    assert protections(weights) == {"r--s"}
    attached.close()
    attached.close()
    assert "r--s" not in protections(weights)


def test_what_can_not_be_attached_is_refused_and_closed() -> None:
    segment = segment_of(b"x" * 100)
    for wrong, said in (({"kind": "cuda"}, "kind 'cuda'"), ({"size": 101}, "smaller than the 101 bytes")):
        own = segment.handle(None)
        handle = SegmentHandle(**{"kind": own.kind, "size": own.size, "memory": own.memory, **wrong})
        with pytest.raises(EngineError, match=said):
            Attached(handle)
        with pytest.raises(OSError):
            os.fstat(own.memory)
    segment.close()
