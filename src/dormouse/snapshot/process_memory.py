"""Reads and writes the memory of another, stopped process: `process_vm_readv`/`process_vm_writev`, without a copy in
between and without the GIL. Where protection forbids them (they respect it, a debugger need not) /proc/PID/mem does."""

from __future__ import annotations

import ctypes
import errno
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self

from dormouse.errors import HostError, SnapshotError
from dormouse.snapshot.criu_images import PAGE
from dormouse.snapshot.memory_map import WINDOW, mask_runs
from dormouse.snapshot.shortage import system_failure
from dormouse.snapshot.window_store import ReadSpan, SparseSpan

_libc = ctypes.CDLL(None, use_errno=True)
_Transfer = Callable[..., int]
for _name in ("process_vm_readv", "process_vm_writev"):
    _function = getattr(_libc, _name)
    _function.restype = ctypes.c_ssize_t
    _function.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)
    ]


class ProcessMemory:
    """The memory of host process `pid`. A context manager; its calls may be made by several threads at once."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._mem = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise _failed("opened", pid, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(self._mem)

    def anonymous(self) -> Iterator[tuple[int, int]]:
        """The (start, end) of the mappings of no file: a page of theirs that was never written is zero."""
        try:
            lines = Path(f"/proc/{self.pid}/maps").read_bytes().removesuffix(b"\n").split(b"\n")
        except OSError as error:
            raise _failed("listed", self.pid, error) from error
        for line in lines:  # as bytes: a file's name may hold whatever `str` takes for a blank or an end of line
            place, _protection, _offset, _device, inode, *rest = line.split(b" ", 5)
            name = rest[0].lstrip(b" ") if rest else b""
            if inode == b"0" and (name in (b"", b"[heap]", b"[stack]") or name.startswith(b"[anon:")):
                start, _dash, end = place.partition(b"-")
                yield int(start, 16), int(end, 16)

    def private_bytes(self) -> int:
        """About how much memory it has that is neither a file's nor shared."""
        try:
            _size, resident, shared, *_rest = Path(f"/proc/{self.pid}/statm").read_text().split()
        except OSError as error:
            raise _failed("sized", self.pid, error) from error
        return (int(resident) - int(shared)) * PAGE

    def read(self, window: int, mask: int, into: memoryview) -> int:
        """Read the pages `mask` of a window, packed, into a buffer; their bytes. Raises SnapshotError."""
        return self._transfer(_libc.process_vm_readv, os.preadv, window, mask, into, "read")

    def read_spans(self, spans: Iterable[SparseSpan], into: memoryview) -> Iterator[ReadSpan]:
        """Read the pages of spans into a buffer, one after another, each when it is its turn. Raises SnapshotError."""
        at = 0
        for span, sparse in spans:
            data = into[at : at + span.bytes]
            at += self.read(span.number, span.mask, data)
            yield span, sparse, data

    def write(self, window: int, mask: int, data: memoryview) -> int:
        """Write packed pages to the places `mask` of a window; their bytes. Raises SnapshotError."""
        return self._transfer(_libc.process_vm_writev, os.pwritev, window, mask, data, "written")

    def _transfer(self, fast: _Transfer, slow: _Transfer, window: int, mask: int, local: memoryview, what: str) -> int:
        base = window * WINDOW
        runs = [(base + first * PAGE, count * PAGE) for first, count in mask_runs(mask)]
        total = sum(length for _address, length in runs)
        address, _kept = _address_of(local)
        here = (ctypes.c_uint64 * 2)(address, total)
        done = fast(self.pid, here, 1, *_many(runs), 0)
        if done == total:
            return total
        code = ctypes.get_errno() if done < 0 else 0  # after a part it is some earlier call's
        if code not in (0, errno.EFAULT):
            error = OSError(code, os.strerror(code))
            raise _failed(what, self.pid, error) from error
        try:
            at = 0
            for start, length in runs:
                self._slowly(slow, local[at : at + length], start)
                at += length
        except OSError as error:
            raise _failed(what, self.pid, error) from error
        return total

    def _slowly(self, slow: _Transfer, local: memoryview, address: int) -> None:
        at = 0
        while at < len(local):
            count = slow(self._mem, [local[at:]], address + at)
            if count <= 0:
                raise OSError(errno.EIO, "it ended early")
            at += count


def _address_of(view: memoryview) -> tuple[int, object]:
    """Where a buffer is, and what must be kept alive while that is used."""
    whole = view.obj
    if view.readonly:  # ctypes gives the address of writable buffers and of whole `bytes` only
        kept = whole if isinstance(whole, bytes) and len(whole) == view.nbytes else view.tobytes()
        return ctypes.cast(ctypes.c_char_p(kept), ctypes.c_void_p).value or 0, kept
    first = ctypes.c_char.from_buffer(view)
    return ctypes.addressof(first), first


def _many(runs: list[tuple[int, int]]) -> tuple[ctypes.Array[ctypes.c_uint64], int]:
    flat = array("Q", [number for run in runs for number in run])
    return (ctypes.c_uint64 * len(flat)).from_buffer(flat), len(runs)


def _failed(what: str, pid: int, error: OSError) -> HostError | SnapshotError:
    return system_failure(
        f"the memory of process {pid} could not be {what}",
        error,
        remedy="Run as root; a security module (Yama, SELinux) may forbid ptrace",
    )
