"""The worker's addresses on a GPU: the node's weights, and memory of its own that need not outlive a sleep.

    map(handles)    imports the weights and puts memory behind all scratch, at the addresses these had before
    unmap()         waits for the GPU, then takes all of it away; the addresses stay reserved
    allocate(size)  scratch: memory of this worker, whose *contents* each unmap() loses

So pointers stay valid from one sleep to the next, captured CUDA graphs with them, and while nothing is mapped the
process holds no memory of the GPU but its context's. After map() scratch has any content: whoever keeps something in it
(KV cache, graph pools, activations) writes before it reads. Weights are shared with other workers and mapped for
reading alone: a stray write ends this process's CUDA context. Where a driver can't do that they can be written to,
which is logged and told to the node (`writable`).

`scratch_pool` makes torch put tensors there. Torch calls back for whole blocks (2 MiB and more) and keeps them cached;
it holds a lock of its own meanwhile, and the callback needs the interpreter's: so only one thread may use CUDA tensors
(free them, too) while another one can make the pool grow.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dormouse.engine.arena import Weights
from dormouse.errors import DormouseError, EngineError
from dormouse.transfer.cuda_driver import Driver, array_interface
from dormouse.transfer.handles import CUDA, Filled, SegmentHandle, await_reports

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class DeviceWeights(Weights):
    """A segment on a GPU: `torch.as_tensor(weights, device=...)` is a tensor of its bytes without a copy, valid at
    every time at which the arena is mapped."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return array_interface(self.address, self.size)


class DeviceArena:
    """The memory of one worker on one GPU. A lock keeps scratch right when torch calls from another thread; map, wait
    and unmap are the worker's main thread's, while nothing runs on the GPU."""

    def __init__(self, driver: Driver, ordinal: int) -> None:
        """Raises HostError where there is no such GPU."""
        self._driver = driver
        self._ordinal = ordinal
        self._uuid = driver.device(ordinal).uuid
        self._granularity = driver.granularity(ordinal)
        self._slots: list[DeviceWeights] = []
        self._scratch: dict[int, int] = {}  # address -> size, in the order in which it was asked for
        self._mapped = True
        self._writable = False
        self._reports: list[int] = []
        self._lock = threading.RLock()
        self._pool: torch.cuda.MemPool | None = None

    @property
    def weights(self) -> DeviceWeights | None:
        """The segment with the model's weights, None before any was mapped."""
        return self._slots[0] if self._slots else None

    @property
    def mapped(self) -> bool:
        """Whether something is behind the addresses. With no weights, scratch is there from the beginning."""
        return self._mapped

    @property
    def writable(self) -> bool:
        """Whether this worker could write to the weights, because the driver does not map for reading alone."""
        return self._writable

    @property
    def device_bytes(self) -> int:
        """What weights and scratch take while they are mapped."""
        return sum(self._rounded(slot.size) for slot in self._slots) + self.scratch_bytes

    @property
    def scratch_bytes(self) -> int:
        """What all scratch takes while it is mapped."""
        with self._lock:
            return sum(self._scratch.values())

    def map(self, handles: Sequence[SegmentHandle]) -> None:
        """Put the weights behind their addresses, taking these the first time, and new memory behind those of scratch;
        close the handles.

        Raises EngineError when the segments are not those that the addresses were taken for, HostError when the GPU
        lacks memory; nothing is mapped then.
        """
        try:
            with self._lock, contextlib.ExitStack() as undo:
                self._reserve_slots(handles)
                self._writable = False
                for slot, handle in zip(self._slots, handles, strict=True):
                    memory = self._driver.adopt(handle.memory, self._ordinal)
                    if not self._put(slot.address, self._rounded(slot.size), memory, read_only=True):
                        self._writable = True
                    undo.callback(self._driver.unmap, slot.address, self._rounded(slot.size))
                if not self._mapped:
                    for address, size in self._scratch.items():
                        self._put(address, size, self._new(size))
                        undo.callback(self._driver.unmap, address, size)
                self._reports += [os.dup(handle.report) for handle in handles if handle.report is not None]
                self._mapped = True
                undo.pop_all()
        finally:
            for handle in handles:
                handle.close()

    def wait(self) -> list[Filled]:
        """Block until every mapped segment is filled; how those were that were not full already. Raises what the
        filling failed with; then nothing is mapped any more, so that nobody computes with half of the weights."""
        try:
            return await_reports(self._reports)
        except BaseException:
            self.unmap()
            raise

    def unmap(self) -> None:
        """Wait for the GPU, then give back weights and scratch; the addresses stay reserved. Idempotent."""
        with self._lock:
            if self._mapped:
                self._driver.synchronize(self._ordinal)
                self._mapped = False
                with contextlib.ExitStack() as each:  # one that fails does not keep the others
                    for slot in self._slots:
                        each.callback(self._driver.unmap, slot.address, self._rounded(slot.size))
                    for address, size in self._scratch.items():
                        each.callback(self._driver.unmap, address, size)
            while self._reports:
                os.close(self._reports.pop())

    def allocate(self, size: int) -> int:
        """The address of new scratch. Raises HostError when the GPU has no memory for it, EngineError while nothing is
        mapped."""
        size = self._rounded(size)
        with self._lock:
            if not self._mapped:
                raise EngineError("a worker that sleeps can't have memory of the GPU", remedy="Wake it first")
            address = self._driver.reserve(size, self._ordinal)
            try:
                self._put(address, size, self._new(size))
            except BaseException:
                self._driver.give_back(address, size)
                raise
            self._scratch[address] = size
            return address

    def free(self, address: int) -> None:
        """Give back scratch, and its addresses, once the GPU is done with it. Raises EngineError for an address that is
        none of it."""
        with self._lock:
            size = self._scratch.get(address)
            if size is None:
                raise EngineError(f"there is no scratch at {address:#x}")
            if self._mapped:
                self._driver.synchronize(self._ordinal)
                self._driver.unmap(address, size)
            del self._scratch[address]
            self._driver.give_back(address, size)

    def scratch_pool(self) -> torch.cuda.MemPool:
        """For `with torch.cuda.use_mem_pool(pool)`: tensors made within are in scratch. Always the same one; it keeps
        this arena until the process ends."""
        if self._pool is None:
            import torch

            callbacks = _ALLOCATE(self._called_to_allocate), _FREE(self._called_to_free)
            for callback in callbacks:  # torch may call until the very end, when all else has been torn down
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(callback))
            allocate, free = (ctypes.cast(callback, ctypes.c_void_p).value or 0 for callback in callbacks)
            self._pool = torch.cuda.MemPool(torch._C._cuda_customAllocator(allocate, free))
        return self._pool

    def _called_to_allocate(self, size: int, ordinal: int, _stream: int | None) -> int | None:
        """What torch calls. It takes None for "out of memory", frees what it caches, and asks once more."""
        try:
            if ordinal != self._ordinal:
                raise EngineError(f"this worker has GPU {self._ordinal}, scratch was asked for on GPU {ordinal}")
            return self.allocate(size)
        except DormouseError as error:
            log.warning("no scratch: %s", error)
        except Exception:
            log.exception("allocating %d bytes of scratch failed", size)
        return None

    def _called_to_free(self, address: int | None, size: int, _ordinal: int, _stream: int | None) -> None:
        try:
            if address:
                self.free(address)
        except Exception:
            log.exception("freeing %d bytes of scratch failed; they stay with this worker", size)

    def _reserve_slots(self, handles: Sequence[SegmentHandle]) -> None:
        for handle in handles:
            if handle.kind != CUDA:
                raise EngineError(
                    f"a worker on GPU {self._ordinal} can't map a segment of kind {handle.kind!r}",
                    remedy="This is a defect of Dormouse; please report it",
                )
        if self._slots and [slot.size for slot in self._slots] != [handle.size for handle in handles]:
            raise EngineError("the worker was sent other weights than it was started with")
        for handle in handles[len(self._slots) :]:
            if handle.device != self._uuid:  # later it may differ: a snapshot can wake on another GPU
                raise EngineError(
                    f"the weights are on {handle.device}, this worker's GPU {self._ordinal} is {self._uuid}",
                    remedy="Give node and workers the same CUDA_VISIBLE_DEVICES",
                )
            address = self._driver.reserve(self._rounded(handle.size), self._ordinal)
            self._slots.append(DeviceWeights(address, handle.size))

    def _new(self, size: int) -> int:
        return self._driver.create(size, self._ordinal, shared=False)

    def _put(self, address: int, size: int, memory: int, *, read_only: bool = False) -> bool:
        """Map memory that only the mapping keeps from now on; whether it is as asked for."""
        try:
            return self._driver.map(address, size, memory, self._ordinal, read_only=read_only)
        finally:
            self._driver.release(memory)

    def _rounded(self, size: int) -> int:
        return -(-size // self._granularity) * self._granularity
