"""What segments ask of CUDA's driver: memory apart from addresses. The one place of them that calls it.

    create -> export -> (a descriptor, to another process) -> adopt        memory, without an address
    reserve -> map -> unmap -> map … -> give_back                          addresses, with or without memory behind them

`Cuda` is the driver through `cuda.bindings`, which is imported when the first one is made; tests put another
`Driver` in its place. It runs in any thread: each call that needs a context makes the device's primary one (the one
torch uses) current for as long as it lasts. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

from dormouse.errors import HostError

log = logging.getLogger(__name__)

_FAILED = "Look at `nvidia-smi`; a process whose GPU has failed must be started anew"
_OUT_OF_MEMORY = "Put another model on this GPU to sleep, or give this one less memory (kv_tokens, context)"


@dataclass(frozen=True)
class Device:
    """One GPU of this process. `uuid` is the same in every process, the ordinal is not."""

    ordinal: int
    uuid: str


class Driver(Protocol):
    """All raise HostError. Memory handles are numbers; they hold no address."""

    def device(self, ordinal: int) -> Device:
        """The GPU of a number, initialising CUDA if it has not been."""

    def granularity(self, ordinal: int) -> int:
        """What sizes and addresses of its memory are multiples of."""

    def create(self, size: int, ordinal: int, *, shared: bool) -> int:
        """New memory of any content, without an address; `shared` if other processes may get it."""

    def export(self, memory: int) -> int:
        """A descriptor that stands for memory, which lives as long as the descriptor does."""

    def adopt(self, descriptor: int, ordinal: int) -> int:
        """Memory of another process, by its descriptor, which is still the caller's."""

    def release(self, memory: int) -> None:
        """This handle is not needed any more; what is mapped stays."""

    def reserve(self, size: int, ordinal: int) -> int:
        """An address range with nothing behind it."""

    def give_back(self, address: int, size: int) -> None:
        """Take a range with nothing behind it no longer."""

    def map(self, address: int, size: int, memory: int, ordinal: int, *, read_only: bool = False) -> bool:
        """Put memory behind a reserved range, for reading and writing by this GPU, or for reading alone if the driver
        can do that: whether it is as it was asked for. Undone if that fails."""

    def unmap(self, address: int, size: int) -> None:
        """Nothing is behind the range any more, which stays reserved."""

    def synchronize(self, ordinal: int) -> None:
        """Block until the GPU has done all that this process asked of it."""

    def free_and_total(self, ordinal: int) -> tuple[int, int]:
        """Bytes of the GPU's memory."""


def check(result: tuple[Any, ...], what: str, remedy: str = _FAILED) -> Any:
    """The value(s) of a call of `cuda.bindings.driver`, None if it has none. Raises HostError with the driver's name of
    the error and what was being done."""
    status, *values = result
    if int(status) != 0:
        name = getattr(status, "name", str(status))
        raise HostError(f"{what}: the GPU driver answers {name}", remedy=remedy)
    return values[0] if len(values) == 1 else tuple(values) or None


def array_interface(address: int, size: int) -> dict[str, Any]:
    """`__cuda_array_interface__` of bytes at an address, by which torch makes a tensor of them without a copy."""
    return {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def ordinal_of(device: str) -> int:
    """The number in "cuda" or "cuda:N"."""
    return int(device.partition(":")[2] or 0)


class Cuda:
    """The driver itself."""

    def __init__(self) -> None:
        """Raises HostError where there is no driver."""
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise HostError(
                f"the GPU can't be used, cuda-bindings is missing: {error}",
                remedy="Install it: pip install dormouse[gpu]",
            ) from error
        self._cuda: Any = driver
        self._contexts: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._as_descriptor = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        try:
            started = driver.cuInit(0)
        except RuntimeError as error:  # what the bindings raise where there is no libcuda
            raise HostError(
                f"there is no NVIDIA driver: {error}", remedy="Install it, or run the model on the CPU (device: cpu)"
            ) from error
        check(started, "CUDA does not start", "`dormouse doctor` tells what this machine has")

    def device(self, ordinal: int) -> Device:
        uuid = check(self._cuda.cuDeviceGetUuid(self._number(ordinal)), f"GPU {ordinal} does not tell its UUID")
        return Device(ordinal, f"GPU-{UUID(bytes=bytes(uuid.bytes)[:16])}")

    def granularity(self, ordinal: int) -> int:
        minimum = self._cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        found = self._cuda.cuMemGetAllocationGranularity(self._properties(ordinal, shared=True), minimum)
        return int(check(found, f"GPU {ordinal} does not tell its page size"))

    def create(self, size: int, ordinal: int, *, shared: bool) -> int:
        with self._current(ordinal):
            made = self._cuda.cuMemCreate(size, self._properties(ordinal, shared=shared), 0)
        if made[0] == self._cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free, total = self.free_and_total(ordinal)
            raise HostError(
                f"GPU {ordinal} has no memory for {size} bytes: {free} of {total} are free", remedy=_OUT_OF_MEMORY
            )
        return int(check(made, f"{size} bytes of GPU {ordinal} can't be had"))

    def export(self, memory: int) -> int:
        handle = self._cuda.CUmemGenericAllocationHandle(memory)
        exported = self._cuda.cuMemExportToShareableHandle(handle, self._as_descriptor, 0)
        descriptor = int(check(exported, "memory of a GPU can't be shared"))
        os.set_inheritable(descriptor, False)
        return descriptor

    def adopt(self, descriptor: int, ordinal: int) -> int:
        with self._current(ordinal):
            adopted = self._cuda.cuMemImportFromShareableHandle(descriptor, self._as_descriptor)
        return int(check(adopted, f"memory that another process shares can't be had on GPU {ordinal}"))

    def release(self, memory: int) -> None:
        released = self._cuda.cuMemRelease(self._cuda.CUmemGenericAllocationHandle(memory))
        check(released, "memory of a GPU can't be released")

    def reserve(self, size: int, ordinal: int) -> int:
        with self._current(ordinal):
            reserved = self._cuda.cuMemAddressReserve(size, 0, self._cuda.CUdeviceptr(0), 0)
        return int(check(reserved, f"addresses for {size} bytes of GPU {ordinal} can't be had"))

    def give_back(self, address: int, size: int) -> None:
        freed = self._cuda.cuMemAddressFree(self._cuda.CUdeviceptr(address), size)
        check(freed, f"{size} addresses of a GPU from {address:#x} on can't be given back")

    def map(self, address: int, size: int, memory: int, ordinal: int, *, read_only: bool = False) -> bool:
        start, handle = self._cuda.CUdeviceptr(address), self._cuda.CUmemGenericAllocationHandle(memory)
        flags = self._cuda.CUmemAccess_flags
        with self._current(ordinal):
            what = f"{size} bytes of GPU {ordinal} can't be mapped at {address:#x}"
            check(self._cuda.cuMemMap(start, size, 0, handle, 0), what)
            try:
                if read_only:
                    access = self._access(ordinal, flags.CU_MEM_ACCESS_FLAGS_PROT_READ)
                    (refused,) = self._cuda.cuMemSetAccess(start, size, [access], 1)
                    if int(refused) == 0:
                        return True
                    log.warning(
                        "GPU %d maps nothing for reading only (%s): %d bytes at %#x can be written to",
                        *(ordinal, getattr(refused, "name", refused), size, address),
                    )
                access = self._access(ordinal, flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
                check(self._cuda.cuMemSetAccess(start, size, [access], 1), what)
            except BaseException:
                self.unmap(address, size)
                raise
        return not read_only

    def unmap(self, address: int, size: int) -> None:
        unmapped = self._cuda.cuMemUnmap(self._cuda.CUdeviceptr(address), size)
        check(unmapped, f"{size} bytes of a GPU can't be unmapped from {address:#x}")

    def synchronize(self, ordinal: int) -> None:
        with self._current(ordinal):
            check(self._cuda.cuCtxSynchronize(), f"GPU {ordinal} did not finish its work")

    def free_and_total(self, ordinal: int) -> tuple[int, int]:
        with self._current(ordinal):
            free, total = check(self._cuda.cuMemGetInfo(), f"GPU {ordinal} does not tell its memory")
        return int(free), int(total)

    def _number(self, ordinal: int) -> Any:
        return check(
            self._cuda.cuDeviceGet(ordinal),
            f"there is no GPU {ordinal} here",
            "See `nvidia-smi` and CUDA_VISIBLE_DEVICES, and set the model's device",
        )

    def _properties(self, ordinal: int, *, shared: bool) -> Any:
        kinds = self._cuda.CUmemAllocationHandleType
        properties = self._cuda.CUmemAllocationProp()
        properties.type = self._cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.requestedHandleTypes = self._as_descriptor if shared else kinds.CU_MEM_HANDLE_TYPE_NONE
        properties.location.type = self._cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = ordinal
        return properties

    def _access(self, ordinal: int, flags: Any) -> Any:
        access = self._cuda.CUmemAccessDesc()
        access.location.type = self._cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = ordinal
        access.flags = flags
        return access

    @contextlib.contextmanager
    def _current(self, ordinal: int) -> Iterator[None]:
        """Within, the device's primary context is the thread's. Memory may then be had while a CUDA graph is captured,
        as torch's own is: what is done here is no part of the graph."""
        check(self._cuda.cuCtxPushCurrent(self._context(ordinal)), f"GPU {ordinal} can't be used")
        try:
            modes = self._cuda.CUstreamCaptureMode
            relaxed = self._cuda.cuThreadExchangeStreamCaptureMode(modes.CU_STREAM_CAPTURE_MODE_RELAXED)
            before = check(relaxed, f"GPU {ordinal} can't be used")
            try:
                yield
            finally:
                check(self._cuda.cuThreadExchangeStreamCaptureMode(before), f"GPU {ordinal} can't be used")
        finally:
            check(self._cuda.cuCtxPopCurrent(), f"GPU {ordinal} can't be used")

    def _context(self, ordinal: int) -> Any:
        with self._lock:
            if ordinal not in self._contexts:
                self._contexts[ordinal] = check(
                    self._cuda.cuDevicePrimaryCtxRetain(self._number(ordinal)), f"GPU {ordinal} can't be used"
                )
            return self._contexts[ordinal]
