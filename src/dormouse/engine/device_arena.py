"""The worker's addresses on a GPU: the node's weights, and memory of its own that need not outlive a sleep.

    map(handles)    imports the weights and puts memory behind all scratch, at the addresses these had before
    unmap()         waits for the GPU, then takes all of it away; the addresses stay reserved
    allocate(size)  scratch: memory of this worker, whose *contents* each unmap() loses

So pointers stay valid from one sleep to the next, captured CUDA graphs with them, and while nothing is mapped the
process holds no memory of the GPU but its context's. After map() scratch has any content: whoever keeps something in it
(KV cache, graph pools, activations) writes before it reads. Weights are shared with other workers and must not be
written to; the driver does not keep anybody from it.

`scratch_pool` makes torch put tensors there. Torch calls back for whole blocks (2 MiB and more) and keeps them cached;
it holds a lock of its own meanwhile, and the callback needs the interpreter's: so only one thread may use CUDA tensors
(free them, too) while another one can make the pool grow.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dormouse.engine.arena import Weights
from dormouse.transfer.cuda_driver import Driver
from dormouse.transfer.handles import SegmentHandle

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
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.address, False), "version": 3}


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
        self._reports: list[int] = []
        self._lock = threading.RLock()
        self._pool: torch.cuda.MemPool | None = None
        self._callbacks: tuple[Any, ...] = ()

    @property
    def weights(self) -> DeviceWeights | None:
        """The segment with the model's weights, None before any was mapped."""
        return self._slots[0] if self._slots else None

    @property
    def mapped(self) -> bool:
        """Whether something is behind the addresses. With no weights, scratch is there from the beginning."""
        return self._mapped

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
        raise NotImplementedError

    def wait(self) -> None:
        """Block until every mapped segment is filled. Raises what the filling failed with; then nothing is mapped any
        more, so that nobody computes with half of the weights."""
        raise NotImplementedError

    def unmap(self) -> None:
        """Wait for the GPU, then give back weights and scratch; the addresses stay reserved. Idempotent."""
        raise NotImplementedError

    def allocate(self, size: int) -> int:
        """The address of new scratch. Raises HostError when the GPU has no memory for it."""
        raise NotImplementedError

    def free(self, address: int) -> None:
        """Give back scratch, and its addresses, once the GPU is done with it."""
        raise NotImplementedError

    def scratch_pool(self) -> torch.cuda.MemPool:
        """For `with torch.cuda.use_mem_pool(pool)`: tensors made within are in scratch. Always the same one."""
        raise NotImplementedError
