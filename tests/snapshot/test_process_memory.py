"""Reading and writing a process's memory where it is easy and where it is not. The process is this one."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dormouse.errors import SnapshotError
from dormouse.snapshot.criu_images import PAGE
from dormouse.snapshot.memory_map import FULL, PAGES, WINDOW
from dormouse.snapshot.process_memory import ProcessMemory

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@pytest.fixture
def window() -> Iterator[int]:
    """The address of a window of this process, page i of which is full of bytes i."""
    area = _libc.mmap(None, 2 * WINDOW, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    start = -(-area // WINDOW) * WINDOW
    for i in range(PAGES):
        ctypes.memset(start + i * PAGE, i, PAGE)
    yield start
    _libc.munmap(area, 2 * WINDOW)


def fresh() -> memoryview:
    return memoryview(bytearray(WINDOW))


EVERY_OTHER = sum(1 << i for i in range(0, PAGES, 2))


@pytest.mark.parametrize("mask", [FULL, 1, 1 << 255, EVERY_OTHER, 0b1011])
def test_pages_are_read_and_written_by_mask(window: int, mask: int) -> None:
    chosen = [i for i in range(PAGES) if mask >> i & 1]
    with ProcessMemory(os.getpid()) as memory:
        buffer = fresh()
        assert memory.read(window // WINDOW, mask, buffer) == len(chosen) * PAGE
        assert buffer[: len(chosen) * PAGE].tobytes() == b"".join(bytes([i]) * PAGE for i in chosen)
        memory.write(window // WINDOW, mask, memoryview(b"".join(bytes([255 - i]) * PAGE for i in chosen)))
    for i in range(PAGES):
        assert ctypes.string_at(window + i * PAGE, PAGE) == bytes([255 - i if i in chosen else i]) * PAGE


@pytest.mark.parametrize("protection", [mmap.PROT_READ, 0])
def test_protected_pages_are_read_and_written_all_the_same(window: int, protection: int) -> None:
    _libc.mprotect(window + 10 * PAGE, 3 * PAGE, protection)
    with ProcessMemory(os.getpid()) as memory:
        buffer = fresh()
        memory.read(window // WINDOW, FULL, buffer)
        assert buffer.tobytes() == b"".join(bytes([i]) * PAGE for i in range(PAGES))
        memory.write(window // WINDOW, FULL, memoryview(b"x" * WINDOW))
    _libc.mprotect(window + 10 * PAGE, 3 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
    assert ctypes.string_at(window, WINDOW) == b"x" * WINDOW


def test_a_hole_is_an_error_whatever_failed_before(window: int) -> None:
    _libc.munmap(window + 100 * PAGE, PAGE)
    with ProcessMemory(os.getpid()) as memory:
        ctypes.set_errno(errno.ESRCH)  # a part is read, which sets no errno
        with pytest.raises(SnapshotError, match="could not be read: Input/output error"):
            memory.read(window // WINDOW, FULL, fresh())
        with pytest.raises(SnapshotError, match="could not be written: Input/output error"):
            memory.write(window // WINDOW, FULL, fresh())


def test_an_errno_of_before_does_not_stop_the_slow_way(window: int) -> None:
    _libc.mprotect(window + 10 * PAGE, 3 * PAGE, 0)
    with ProcessMemory(os.getpid()) as memory:
        ctypes.set_errno(errno.ESRCH)
        assert memory.read(window // WINDOW, FULL, fresh()) == WINDOW
    _libc.mprotect(window + 10 * PAGE, 3 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE)


def test_a_process_that_dies_is_an_error() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with ProcessMemory(child.pid) as memory:
        start, _end = next(memory.anonymous())
        child.send_signal(signal.SIGKILL)
        child.wait()
        with pytest.raises(SnapshotError, match=r"No such process|ended early"):
            memory.read(start // WINDOW, 1 << start % WINDOW // PAGE, fresh())
        with pytest.raises(SnapshotError, match="could not be listed"):
            list(memory.anonymous())
    with pytest.raises(SnapshotError, match="could not be opened"):
        ProcessMemory(child.pid)


def test_only_memory_of_no_file_is_anonymous(window: int) -> None:
    with mmap.mmap(-1, PAGE) as shared, ProcessMemory(os.getpid()) as memory:
        at = ctypes.addressof(ctypes.c_char.from_buffer(shared))
        found = list(memory.anonymous())
        code = ctypes.cast(_libc.getpid, ctypes.c_void_p).value
    assert any(start <= window < end for start, end in found)
    assert not any(start <= place < end for start, end in found for place in (at, code))
