"""Segments on a GPU: memory apart from any address, which other processes map by a descriptor, filled here.

    create -> (mapped here, too) -> tensor(): load_device -> handle() -> ... -> close

The memory lives as long as somebody has the descriptor or a mapping: workers keep what they have mapped, whatever
becomes of the process that made it.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from dormouse.transfer.cuda_driver import Driver, array_interface
from dormouse.transfer.handles import CUDA, SegmentHandle

if TYPE_CHECKING:
    import torch


class DeviceSegment:
    """One block of a GPU's memory of any content; gone when it is closed here and unmapped everywhere."""

    def __init__(self, driver: Driver, ordinal: int, size: int) -> None:
        """Raises HostError when the GPU has no memory for it."""
        self.size = size
        self.ordinal = ordinal
        self._driver = driver
        self._device = driver.device(ordinal)
        granularity = driver.granularity(ordinal)
        self.taken = -(-size // granularity) * granularity
        with contextlib.ExitStack() as undo:
            memory = driver.create(self.taken, ordinal, shared=True)
            try:
                self._descriptor = driver.export(memory)
                undo.callback(os.close, self._descriptor)
                self.address = driver.reserve(self.taken, ordinal)
                undo.callback(driver.give_back, self.address, self.taken)
                driver.map(self.address, self.taken, memory, ordinal)
            finally:
                driver.release(memory)  # descriptor and mapping keep it
            undo.pop_all()

    def tensor(self) -> torch.Tensor:
        """Its bytes, to write to; not used any more once it is closed."""
        import torch

        return torch.as_tensor(_Bytes(self.address, self.size), device=torch.device("cuda", self.ordinal))

    def handle(self, report: int | None) -> SegmentHandle:
        """What a worker needs to map it; `report` is the pipe to go with it while it is still being filled."""
        return SegmentHandle(CUDA, self.size, os.dup(self._descriptor), report, self._device.uuid)

    def close(self) -> None:
        """Let go of it; the GPU must have done all that concerns it. Idempotent. Raises HostError."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        with contextlib.ExitStack() as each:
            each.callback(os.close, descriptor)
            each.callback(self._driver.give_back, self.address, self.taken)
            each.callback(self._driver.unmap, self.address, self.taken)


class _Bytes:
    """What torch makes a tensor of."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = array_interface(address, size)
