"""The worker's address ranges for segments: reserved once, mapped and unmapped as often as the worker sleeps and wakes.

    map(handles)    reserved range -> the segment's memory, shared and read-only; the descriptor is closed
    unmap()         mapped range   -> nothing behind it (PROT_NONE), but still taken
    wait()          blocks until the mapped segments are filled

Addresses never change while the process lives, snapshots included, so pointers into a segment (tensors, captured
graphs) stay valid across a sleep. A snapshot is taken while everything is unmapped: it then holds no byte of a segment
and no descriptor, and CRIU notes a reservation of any size as one line. A segment is whatever its descriptor's kind
maps with: a memfd by mmap here; memory of a GPU by the driver, into a range reserved in the same way (device_arena.py).

The mapping is read-only: a stray write ends the worker with SIGSEGV, and never reaches what other workers share.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dormouse.errors import EngineError
from dormouse.transfer.handles import MEMFD, Filled, SegmentHandle, await_reports

BASE = 0x3000_0000_0000
"""Where reservations begin: between what the kernel gives to programs and their heaps (above 0x5500…) and what it gives
to mappings (below 0x7fff…), and far from the low ranges that GPU drivers take."""

_ALIGNMENT = 2 << 20  # a huge page's, so that the kernel may use them
_MAP_NORESERVE = 0x4000
_MAP_FIXED = 0x10
_MAP_FIXED_NOREPLACE = 0x100000
_PROT_NONE = 0
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True)
class Weights:
    """One segment as an engine sees it: `size` readable bytes at `address`, with their values only after the arena's
    `wait`."""

    address: int
    size: int

    def array(self) -> ctypes.Array[ctypes.c_ubyte]:
        """The bytes as an array, for torch.frombuffer and memoryview. It claims to be writable; it is not."""
        return (ctypes.c_ubyte * self.size).from_address(self.address)


class SegmentArena(Protocol):
    """What a worker asks of its arena, this one or that of a GPU (device_arena.py). Used by one thread."""

    @property
    def weights(self) -> Weights | None:
        """The segment with the model's weights, None before any was mapped."""

    @property
    def mapped(self) -> bool:
        """Whether something is behind the addresses."""

    @property
    def device_bytes(self) -> int:
        """What is taken of a GPU while all is mapped."""

    @property
    def writable(self) -> bool:
        """Whether a stray write could reach the weights, which others share."""

    def map(self, handles: Sequence[SegmentHandle]) -> None:
        """Put segments behind the addresses, which are taken the first time, and close the handles."""

    def wait(self) -> list[Filled]:
        """Block until every mapped segment is filled; how those were that were not full already."""

    def unmap(self) -> None:
        """Take away what is behind the addresses; these stay."""


class Attached:
    """A filled segment that comes and goes while the model runs (an adapter's), at whatever address is free. No pointer
    into it outlives `close`, so nothing is reserved. May be closed by any thread."""

    def __init__(self, handle: SegmentHandle) -> None:
        """Map it read-only and close the handle. Raises EngineError."""
        try:
            _check(handle, handle.size)
            address = _mapped(None, handle.size, mmap.PROT_READ, mmap.MAP_SHARED, handle.memory)
        finally:
            handle.close()
        self.weights = Weights(address, handle.size)

    def close(self) -> None:
        """Unmap it. Idempotent."""
        weights, self.weights = self.weights, Weights(0, 0)
        if weights.size:
            _libc.munmap(weights.address, weights.size)


class Arena:
    """The segments of one process, in slots. Used by the worker's main thread alone."""

    def __init__(self, base: int = BASE) -> None:
        self._base = base
        self._slots: list[Weights] = []
        self._mapped = False
        self._reports: list[int] = []

    @property
    def weights(self) -> Weights | None:
        """The segment with the model's weights, None before any was mapped."""
        return self._slots[0] if self._slots else None

    @property
    def mapped(self) -> bool:
        """Whether something is behind the addresses."""
        return self._mapped or not self._slots

    @property
    def device_bytes(self) -> int:
        """Nothing: it is the machine's memory."""
        return 0

    @property
    def writable(self) -> bool:
        """Never: mappings of this machine's memory are for reading."""
        return False

    def map(self, handles: Sequence[SegmentHandle]) -> None:
        """Put segments behind the slots, reserving these the first time, and close the handles.

        Raises EngineError when the segments are not those that the slots were made for, or can't be mapped.
        """
        try:
            if self._slots and [slot.size for slot in self._slots] != [handle.size for handle in handles]:
                raise EngineError("the worker was sent other weights than it was started with")
            for handle in handles[len(self._slots) :]:
                self._slots.append(Weights(_reserve(self._end(), handle.size), handle.size))
            for slot, handle in zip(self._slots, handles, strict=True):
                _map_shared(slot, handle)
            self._mapped = True
            self._reports += [os.dup(handle.report) for handle in handles if handle.report is not None]
        finally:
            for handle in handles:
                handle.close()

    def wait(self) -> list[Filled]:
        """Block until every mapped segment is filled; how those were that were not full already. Raises what the
        filling failed with; then nothing is mapped any more, so that nobody looks at half of the weights."""
        try:
            return await_reports(self._reports)
        except BaseException:
            self.unmap()
            raise

    def unmap(self) -> None:
        """Take the segments away; their addresses stay reserved."""
        for slot in self._slots:
            _mmap(slot.address, slot.size, _PROT_NONE, _anonymous() | _MAP_FIXED, -1)
        self._mapped = False
        while self._reports:
            os.close(self._reports.pop())

    def _end(self) -> int:
        last = self._slots[-1] if self._slots else None
        return self._base if last is None else last.address + _rounded(last.size) + _ALIGNMENT


def _reserve(address: int, size: int) -> int:
    """Take an address range without memory behind it."""
    return _mmap(address, _rounded(size), _PROT_NONE, _anonymous() | _MAP_FIXED_NOREPLACE, -1)


def _check(handle: SegmentHandle, size: int) -> None:
    if handle.kind != MEMFD:
        raise EngineError(f"this worker can't map a segment of kind {handle.kind!r}", remedy="Run it on the CPU")
    if os.fstat(handle.memory).st_size < size:
        raise EngineError(f"a segment is smaller than the {size} bytes announced")


def _map_shared(slot: Weights, handle: SegmentHandle) -> None:
    _check(handle, slot.size)
    _mmap(slot.address, slot.size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, handle.memory)


def _mapped(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    found: int | None = _libc.mmap(address, size, protection, flags, fd, 0)
    if found == _FAILED or found is None:
        reason = os.strerror(ctypes.get_errno())
        place = f" at address {address:#x}" if address is not None else ""
        raise EngineError(
            f"{size} bytes can't be mapped{place}: {reason}",
            remedy="Look for a limit on address space (`ulimit -v`, vm.overcommit_memory)",
        )
    return found


def _mmap(address: int, size: int, protection: int, flags: int, fd: int) -> int:
    found = _mapped(address, size, protection, flags, fd)
    if found != address:  # MAP_FIXED_NOREPLACE is only a hint to kernels before 4.17
        raise EngineError(f"address {address:#x} is taken in this process", remedy="Use Linux 4.17 or newer")
    return found


def _anonymous() -> int:
    return mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
