"""Pinned memory: blocks of this machine's memory that GPUs read without a copy.

    borrow(size) -> PinnedMemory (made, or kept from an earlier load) -> give_back | free_pinned

Making it is what takes long (a third of a second per fresh GiB), so blocks are kept for later loads until `free_pinned`
or the end of the process: KEPT_BYTES at most, those that were longest unused go first. A forked child keeps none, for a
GPU is not its to use. Huge pages and touching the memory before it is pinned, by several threads if it is large,
take most of that time away.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import logging
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from dormouse.errors import HostError
from dormouse.transfer.budget import default_threads
from dormouse.transfer.memory import anonymous

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14
_PART = 32 << 20
KEPT_BYTES = 512 << 20
"""The most memory that is kept for later loads."""


class Pinner(Protocol):
    """Makes memory known to the GPUs and unknown again."""

    def pin(self, address: int, size: int) -> None:
        """Raises HostError."""

    def unpin(self, address: int) -> None:
        """Raises HostError."""


class CudaPinner:
    """The CUDA runtime, as torch has loaded it. What is pinned is so for all GPUs; but pinning uses a `device`, by
    default that of the thread, and takes memory of one that was not in use yet."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device

    def pin(self, address: int, size: int) -> None:
        portable = 1
        with self._cudart() as cudart:
            _check(cudart.cudaHostRegister(address, size, portable), f"pinning {size} bytes of memory")

    def unpin(self, address: int) -> None:
        with self._cudart() as cudart:
            _check(cudart.cudaHostUnregister(address), "unpinning memory")

    @contextlib.contextmanager
    def _cudart(self) -> Iterator[Any]:
        import torch

        with torch.cuda.device(self._device) if self._device is not None else contextlib.nullcontext():
            yield torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check(result: Any, doing: str) -> None:
    code = int(result)
    if code != 0:
        raise HostError(f"{doing} failed: CUDA error {code}", remedy="Allow less pinned memory, or free some memory")


class PinnedMemory:
    """A block of memory, touched, on huge pages where the kernel has them, and pinned if there is a `pinner`."""

    def __init__(self, size: int, pinner: Pinner | None) -> None:
        self.size = size
        self._pinner = pinner
        try:
            self._map: mmap.mmap | None = anonymous(size)
        except OSError as error:
            raise _no_memory(size, error) from error
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        try:
            _touch(self.address, size)
            if pinner is not None:
                pinner.pin(self.address, size)
        except BaseException:
            self._pinner = None
            self.close()
            raise

    def close(self) -> None:
        """Give the memory back; nothing may use it any more. Idempotent."""
        memory, self._map = self._map, None
        if memory is None:
            return
        try:
            if self._pinner is not None:
                self._pinner.unpin(self.address)
        finally:
            self.view.release()
            memory.close()


def _touch(address: int, size: int) -> None:
    """Have the kernel give all of the memory, by several threads at once if it is much."""
    parts = range(0, size, _PART)

    def touch(at: int) -> int:
        return _populate(address + at, min(_PART, size - at))

    if len(parts) <= 2:  # a reader's, which are made side by side
        _touched(size, map(touch, parts))
        return
    with ThreadPoolExecutor(max(1, min(default_threads(), len(parts))), thread_name_prefix="touch") as pool:
        _touched(size, pool.map(touch, parts))


def _touched(size: int, codes: Iterable[int]) -> None:
    for code in codes:
        if code in (errno.ENOMEM, errno.EFAULT):
            raise _no_memory(size, OSError(code, os.strerror(code)))
        if code:  # an older kernel: the memory comes when it is used
            log.info("memory can't be touched in advance: %s", os.strerror(code))
            return


def _populate(address: int, size: int) -> int:
    return 0 if _madvise()(address, size, _POPULATE_WRITE) == 0 else ctypes.get_errno()


@cache
def _madvise() -> ctypes._NamedFuncPointer:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _no_memory(size: int, error: OSError) -> HostError:
    return HostError(
        f"there are no {size} bytes of memory for transfers: {error.strerror}",
        remedy="Allow less pinned memory, or free some memory",
    )


_idle: list[PinnedMemory] = []
_abandoned: list[PinnedMemory] = []
_lock = threading.Lock()


def borrow(size: int, pinner: Pinner) -> PinnedMemory:
    """Pinned memory of at least `size` bytes, for one load at a time. Raises HostError."""
    with _lock:
        fitting = [memory for memory in _idle if memory.size >= size]
        if fitting:
            found = min(fitting, key=lambda memory: memory.size)
            _idle.remove(found)
            return found
        outgrown, _idle[:] = list(_idle), []  # smaller ones would only add up
    for memory in outgrown:
        memory.close()
    return PinnedMemory(size, pinner)


def give_back(memory: PinnedMemory) -> None:
    """Keep the memory for the next load. No copy out of it may be under way."""
    surplus = []
    with _lock:
        _idle.append(memory)
        kept = sum(each.size for each in _idle)
        while kept > KEPT_BYTES:
            surplus.append(_idle.pop(0))
            kept -= surplus[-1].size
    for each in surplus:
        try:
            each.close()
        except (HostError, BufferError) as error:  # the load that gives back is done, this is no failure of it
            log.warning("%d bytes of pinned memory are freed later than they should be: %s", each.size, error)


def abandon(memory: PinnedMemory) -> None:
    """Never use or free it again: a GPU that has failed may still be reading it."""
    _abandoned.append(memory)
    log.error("%d bytes of pinned memory are lost until this process ends", memory.size)


def idle_bytes() -> int:
    """Pinned memory that is kept and not in use."""
    with _lock:
        return sum(memory.size for memory in _idle)


@atexit.register
def free_pinned() -> None:
    """Give all memory back that no load is using."""
    with _lock:
        freed, _idle[:] = list(_idle), []
    for memory in freed:
        try:
            memory.close()
        except (HostError, BufferError) as error:  # at the end of the process the driver may be gone before us
            log.debug("%s", error)


def _forget_all() -> None:
    """In a forked child: the blocks are the parent's, and CUDA can't be asked to unpin them; their memory goes with
    the mapping."""
    _idle.clear()
    _lock.release()


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forget_all)
