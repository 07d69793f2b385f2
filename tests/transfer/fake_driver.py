"""A CUDA driver made of memfds: memory is a memfd, exporting is dup, mapping is mmap at a reserved address. So what is
above the driver runs on any machine, in several processes, and sees every byte that a GPU would hold."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import threading

from dormouse.errors import HostError
from dormouse.transfer.cuda_driver import Device

GRANULARITY = 2 << 20
_FIXED = 0x10
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class FakeDriver:
    """`limit`: bytes that this process may create; `protects`: whether it maps for reading alone; `calls` names all
    that was asked for, in order."""

    def __init__(self, *, limit: int = 1 << 40) -> None:
        self.limit = limit
        self.protects = True
        self.calls: list[str] = []
        self.reserved: dict[int, int] = {}
        self.mapped: dict[int, tuple[int, int]] = {}  # address -> size, memory
        self._memory: dict[int, int] = {}  # handle -> descriptor
        self._held: dict[int, int] = {}  # handle -> handle itself and mappings
        self._own: dict[int, int] = {}  # handle -> size, of what was created here
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes that were created here and are still held by a handle or a mapping here."""
        return sum(self._own.values())

    def device(self, ordinal: int) -> Device:
        if ordinal > 7:
            raise HostError(f"there is no GPU {ordinal} here: the GPU driver answers CUDA_ERROR_INVALID_DEVICE")
        return Device(ordinal, f"GPU-00000000-0000-0000-0000-00000000000{ordinal}")

    def granularity(self, ordinal: int) -> int:
        return GRANULARITY

    def create(self, size: int, ordinal: int, *, shared: bool) -> int:
        self.calls.append("create")
        assert size % GRANULARITY == 0
        with self._lock:
            if self.used + size > self.limit:
                raise HostError(f"GPU {ordinal} has no memory for {size} bytes", remedy="Put another model to sleep")
            descriptor = os.memfd_create("fake GPU memory", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, size)
            number = self._held_new(descriptor)
            self._own[number] = size
            return number

    def _held_new(self, descriptor: int) -> int:
        number = next(self._numbers)
        self._memory[number] = descriptor
        self._held[number] = 1
        return number

    def _let_go(self, number: int) -> None:
        self._held[number] -= 1
        if self._held[number] == 0:
            os.close(self._memory.pop(number))
            del self._held[number]
            self._own.pop(number, None)

    def export(self, memory: int) -> int:
        self.calls.append("export")
        return os.dup(self._memory[memory])

    def adopt(self, descriptor: int, ordinal: int) -> int:
        self.calls.append("adopt")
        with self._lock:
            return self._held_new(os.dup(descriptor))

    def release(self, memory: int) -> None:
        self.calls.append("release")
        with self._lock:
            self._let_go(memory)

    def reserve(self, size: int, ordinal: int) -> int:
        self.calls.append("reserve")
        assert size % GRANULARITY == 0
        with self._lock:
            address = _mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
            self.reserved[address] = size
            return address

    def give_back(self, address: int, size: int) -> None:
        self.calls.append("give_back")
        with self._lock:
            assert address not in self.mapped and self.reserved.pop(address) == size
            _libc.munmap(address, size)

    def map(self, address: int, size: int, memory: int, ordinal: int, *, read_only: bool = False) -> bool:
        self.calls.append("map")
        with self._lock:
            assert size == self.reserved[address] <= os.fstat(self._memory[memory]).st_size
            if address in self.mapped:
                raise HostError("it is mapped: the GPU driver answers CUDA_ERROR_INVALID_VALUE")
            writing = 0 if read_only and self.protects else mmap.PROT_WRITE
            _mmap(address, size, mmap.PROT_READ | writing, mmap.MAP_SHARED | _FIXED, self._memory[memory])
            self.mapped[address] = size, memory
            self._held[memory] += 1
            return self.protects or not read_only

    def unmap(self, address: int, size: int) -> None:
        self.calls.append("unmap")
        with self._lock:
            mapped, memory = self.mapped.pop(address)
            assert mapped == size
            _mmap(address, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED, -1)
            self._let_go(memory)

    def synchronize(self, ordinal: int) -> None:
        self.calls.append("synchronize")

    def free_and_total(self, ordinal: int) -> tuple[int, int]:
        return self.limit - self.used, self.limit


def _mmap(address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    found: int | None = _libc.mmap(address, size, protection, flags, descriptor, 0)
    assert found is not None and found != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
    return found
