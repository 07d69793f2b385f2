"""The files of a load, each range read the way that suits where its bytes are.

    range -> are its pages in memory? (mincore) -> yes: a read that copies    -> the caller's memory
                                                -> no:  O_DIRECT, no copy in the kernel, aligned by us

A file whose file system has no O_DIRECT is read through the page cache, which the report shows as `cached_bytes`.
Packs are opened as files of ours are; a user's own files as they are, whoever owns them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import stat
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Self

from dormouse.errors import DamagedError, NotFoundError, StoreError
from dormouse.store.files import open_ours, reading
from dormouse.store.pack import ALIGNMENT, aligned
from dormouse.transfer.parallel_reads import Read

log = logging.getLogger(__name__)


_PROBES, _PROBE = 4, 8 * mmap.PAGESIZE  # each gives up the interpreter's lock, which is dear with many readers


def room_for(offset: int, length: int) -> int:
    """How much memory `SourceFile.read_around` needs for a range."""
    return aligned(offset % ALIGNMENT + length)


class SourceFile:
    """One open file. `read_*` may be called by many threads at once; the counts are of bytes asked for."""

    def __init__(self, path: Path, *, ours: bool) -> None:
        self.path = path
        self.direct_bytes = 0
        self.cached_bytes = 0
        self._lock = threading.Lock()
        self._mapped: tuple[int, int] | None = None
        self._direct: int | None = None
        self._more: dict[tuple[bool, int], int] = {}
        try:
            with reading(path):
                self._fd = open_ours(path) if ours else _open_plain(path)
        except FileNotFoundError:
            if ours:
                raise DamagedError(f"{path} is missing", remedy=_REMEDY) from None
            raise NotFoundError(f"there is no file {path}") from None
        try:
            with reading(path):
                self._direct = self._open_direct()
                self._mapped = _map(self._fd, os.fstat(self._fd).st_size)
        except BaseException:
            self.close()
            raise

    def _open_direct(self) -> int | None:
        """A second descriptor of the very same file, for O_DIRECT; None where the file system has no such thing."""
        try:
            return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOTSUP):
                return None
            raise

    def close(self) -> None:
        """Let go of it. No read may be under way. Idempotent."""
        for fd in (self._fd, self._direct, *self._more.values()):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._fd, self._direct = -1, None
        self._more.clear()
        mapped, self._mapped = self._mapped, None
        if mapped:
            _libc().munmap(*mapped)

    def is_resident(self, offset: int, length: int) -> bool:
        """Whether at least half of a range is in memory, as a few probes tell."""
        if self._mapped is None:
            return False
        base, size = self._mapped
        begin, end = offset // mmap.PAGESIZE * mmap.PAGESIZE, min(offset + length, size)
        step = max(_PROBE, (end - begin) // _PROBES // mmap.PAGESIZE * mmap.PAGESIZE)
        found = pages = 0
        marks = ctypes.create_string_buffer(_PROBE // mmap.PAGESIZE)
        for at in range(begin, end, step):
            probe = min(_PROBE, end - at)
            if _libc().mincore(base + at, probe, marks) != 0:
                return True  # nothing is known; through the page cache is always right
            count = -(-probe // mmap.PAGESIZE)
            pages += count
            found += sum(mark & 1 for mark in marks.raw[:count])
        return found * 2 >= pages

    def prefers_direct(self, offset: int, length: int) -> bool:
        """Whether a range is best read past the page cache."""
        return self._direct is not None and not self.is_resident(offset, length)

    @staticmethod
    def fits_direct(target: memoryview, offset: int) -> bool:
        """Whether `target` lies in memory as the range from `offset` on does in the file, so that no copy is needed."""
        lead = -offset % ALIGNMENT
        return len(target) >= lead + ALIGNMENT and (address_of(target) + lead) % ALIGNMENT == 0

    def read_around(self, buffer: memoryview, offset: int, length: int, *, direct: bool) -> memoryview:
        """The bytes of a range, somewhere in `buffer`, which begins at a page and has `room_for` them."""
        if not direct:
            view = buffer[:length]
            self._read_cached(view, offset)
            return view
        lead = self.lead(offset, direct=True)
        self._read_direct(buffer[: aligned(lead + length)], offset - lead, lead + length)
        return buffer[lead : lead + length]

    def begin(self, room: memoryview, offset: int, length: int, *, direct: bool, turn: int) -> PendingRead:
        """Like `read_around`, and does not wait. Of reads that are under way together, none has another's `turn`."""
        lead = self.lead(offset, direct=direct)
        wanted = aligned(lead + length) if direct else length
        read = Read(self._descriptor(direct, turn), address_of(room), offset - lead, wanted)
        return PendingRead(self, read, room, offset, length, direct=direct)

    def _descriptor(self, direct: bool, turn: int) -> int:
        found = self._more.get((direct, turn))
        if found is None:
            with reading(self.path):
                found = self._more[direct, turn] = os.dup((self._direct or self._fd) if direct else self._fd)
        return found

    @staticmethod
    def lead(offset: int, *, direct: bool) -> int:
        """Where in its buffer `read_around` puts the first byte."""
        return offset % ALIGNMENT if direct else 0

    def read_exactly(self, target: memoryview, offset: int, *, direct: bool) -> None:
        """Fill `target`; past the page cache only what of it `fits_direct`."""
        if not direct:
            self._read_cached(target, offset)
            return
        lead = -offset % ALIGNMENT
        end = lead + (len(target) - lead) // ALIGNMENT * ALIGNMENT
        self._read_direct(target[lead:end], offset + lead, end - lead)
        for part, at in ((target[:lead], offset), (target[end:], offset + end)):
            if part:
                self._read_cached(part, at)

    def complete(self, room: memoryview, offset: int, length: int, come: int, *, direct: bool) -> None:
        """Read what a read that was begun has not brought, of a range of which `come` bytes have."""
        come = min(max(come, 0), length)
        self._count(direct=come if direct else 0, cached=0 if direct else come)
        if come < length:
            lead = self.lead(offset, direct=direct)
            self._read_cached(room[lead + come : lead + length], offset + come)

    def _read_cached(self, target: memoryview, offset: int) -> None:
        self._read(self._fd, target, offset, len(target))
        self._count(cached=len(target))

    def _read_direct(self, target: memoryview, offset: int, needed: int) -> None:
        """At least the first `needed` bytes of an aligned range, which may reach beyond the end of the file."""
        assert self._direct is not None
        try:
            done = self._read(self._direct, target, offset, needed, step=ALIGNMENT)
        except StoreError as error:
            if not (isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EINVAL):
                raise
            log.warning("%s can't be read past the page cache, though it could be opened so", self.path)
            done = 0
        if done < needed:  # or a read ended within a block: the next could not be aligned
            self._read_cached(target[done:needed], offset + done)
        self._count(direct=min(done, needed))

    def _read(self, fd: int, target: memoryview, offset: int, needed: int, *, step: int = 1) -> int:
        """Read until `needed` bytes are there or one read ends at no multiple of `step`."""
        done = 0
        with reading(self.path):
            while done < needed and done % step == 0:
                count = os.preadv(fd, [target[done:]], offset + done)
                if count == 0:
                    size = min(os.fstat(fd).st_size, offset + done)  # others may have read what came before
                    raise self._too_short(size, offset + needed)
                done += count
        return done

    def _too_short(self, size: int, end: int) -> DamagedError:
        return DamagedError(
            f"{self.path} is damaged: it ends at {size}, and was to go on to {end} at least", remedy=_REMEDY
        )

    def _count(self, direct: int = 0, cached: int = 0) -> None:
        with self._lock:
            self.direct_bytes += direct
            self.cached_bytes += cached


class PendingRead:
    """A range on its way into `room`."""

    def __init__(
        self, file: SourceFile, read: Read, room: memoryview, offset: int, length: int, *, direct: bool
    ) -> None:
        self._file = file
        self._read = read
        self._room = room
        self._offset = offset
        self._length = length
        self._direct = direct

    def finish(self) -> int:
        """Wait until it is there. Where in the room it begins. Raises DamagedError, StoreError."""
        lead = self._file.lead(self._offset, direct=self._direct)
        try:
            count = self._read.wait()
        except OSError as error:
            if not (self._direct and error.errno == errno.EINVAL):
                with reading(self._file.path):
                    raise
            count = 0  # what can't be read past the page cache is read through it
        self._file.complete(self._room, self._offset, self._length, count - lead, direct=self._direct)
        return lead

    def settle(self) -> None:
        """Wait until nothing comes into the room any more, in an error."""
        with contextlib.suppress(OSError):
            self._read.wait()


class SourceFiles:
    """All files of a load, by their number in the plan. A context manager."""

    def __init__(self, paths: Sequence[Path], *, ours: Sequence[bool]) -> None:
        self.files: list[SourceFile] = []
        try:
            for path, mine in zip(paths, ours, strict=True):
                self.files.append(SourceFile(path, ours=mine))
        except BaseException:
            self.close()
            raise

    def __getitem__(self, number: int) -> SourceFile:
        return self.files[number]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all. No read may be under way. Idempotent."""
        for file in self.files:
            file.close()

    @property
    def direct_bytes(self) -> int:
        """What was read past the page cache."""
        return sum(file.direct_bytes for file in self.files)

    @property
    def cached_bytes(self) -> int:
        """What was read through it."""
        return sum(file.cached_bytes for file in self.files)


def _open_plain(path: Path) -> int:
    """A user's file. Opening somebody's pipe must not wait for ever, hence O_NONBLOCK, which a file ignores."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise StoreError(f"{path} is no file", remedy="Name a file with weights")
    return fd


_REMEDY = "Import the model again with --replace, or fetch the file again"


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = pointer
    libc.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_int64]
    libc.munmap.argtypes = [pointer, size]
    libc.mincore.argtypes = [pointer, size, ctypes.c_char_p]
    return libc


_FAILED = ctypes.c_void_p(-1).value


def _map(fd: int, size: int) -> tuple[int, int] | None:
    """Addresses for `mincore` to look at; no byte is ever read through them. None when there are none to be had."""
    address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0) if size else _FAILED
    return None if address in (None, _FAILED) else (address, size)


def address_of(view: memoryview) -> int:
    """Where writable memory begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
