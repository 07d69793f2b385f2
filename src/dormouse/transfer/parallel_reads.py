"""Many reads at once, without a Python thread for any of them: POSIX AIO, as glibc has it.

    start(file, range, memory) -> read by one of glibc's own threads -> wait() -> how many bytes came

A thread of Python must ask for the interpreter's lock after each read; with ten readers, others want it too, and on a
virtual machine each such change of hands takes some 50 µs. Sixteen readers came to 12 GB/s out of the page cache so,
where the memory bus gives 80. glibc's threads know nothing of Python. One of them serves one descriptor at a time, so
each file is opened as often as reads of it may be under way.

(See aio(7). The layout of a request is that of glibc on 64-bit machines; torch for GPUs exists for no other C library.)
"""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from typing import Final

from dormouse.errors import HostError

_EINPROGRESS: Final = errno.EINPROGRESS


class _Event(ctypes.Structure):
    """struct sigevent: of 64 bytes, of which only `notify` matters."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("pad", ctypes.c_int * 12),
    )


class _Request(ctypes.Structure):
    """struct aiocb64."""

    _fields_ = (
        ("fildes", ctypes.c_int),
        ("lio_opcode", ctypes.c_int),
        ("reqprio", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("nbytes", ctypes.c_size_t),
        ("event", _Event),
        ("next", ctypes.c_void_p),
        ("abs_prio", ctypes.c_int),
        ("policy", ctypes.c_int),
        ("error_code", ctypes.c_int),
        ("return_value", ctypes.c_ssize_t),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_char * 32),
    )


_NO_SIGNAL = 1  # SIGEV_NONE


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    request = ctypes.POINTER(_Request)
    for name in ("aio_read64", "aio_error64"):
        getattr(libc, name).argtypes = [request]
    libc.aio_return64.argtypes = [request]
    libc.aio_return64.restype = ctypes.c_ssize_t
    libc.aio_suspend64.argtypes = [ctypes.POINTER(request), ctypes.c_int, ctypes.c_void_p]
    return libc


class Read:
    """One that is under way. The memory must stay until `wait` has returned."""

    def __init__(self, fd: int, address: int, offset: int, length: int) -> None:
        """Raises HostError when it can't be begun."""
        self._request = _Request(
            fildes=fd, buffer=address, nbytes=length, offset=offset, event=_Event(notify=_NO_SIGNAL)
        )
        self._done: int | None = None
        if _libc().aio_read64(ctypes.byref(self._request)) != 0:
            why = os.strerror(ctypes.get_errno())
            raise HostError(f"a read could not be begun: {why}", remedy="See `ulimit -u` and free memory")

    def wait(self) -> int:
        """The bytes that have been read, fewer than wanted at the end of the file only. Raises OSError."""
        if self._done is None:
            code = self._finished()
            count = int(_libc().aio_return64(ctypes.byref(self._request)))
            self._done = count if code == 0 else -code
        if self._done < 0:
            raise OSError(-self._done, os.strerror(-self._done))
        return self._done

    def _finished(self) -> int:
        requests = (ctypes.POINTER(_Request) * 1)(ctypes.pointer(self._request))
        while (code := int(_libc().aio_error64(ctypes.byref(self._request)))) == _EINPROGRESS:
            _libc().aio_suspend64(requests, 1, None)
        return code
