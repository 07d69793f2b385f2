"""Segments: blocks of memory that outlive and are shared by the processes that map them, filled from chunks.

    create(size) -> fill(chunks): threads, each  locate -> read -> check -> decode -> its place  -> seal -> handle()

A segment is a memfd. It is written with `pwrite` and never mapped here, so the moment it is filled it can be sealed:
from then on nobody, root included, can change what all workers of a model share. Who maps it gets a descriptor that
was opened for reading only; one opened for writing would keep the kernel from sealing. (Reading a chunk straight
into a mapping saves a copy, but costs a page fault and the zeroing of each page: the same time where it was tried.)
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from dormouse.errors import DamagedError, HostError, StoreError
from dormouse.store.chunk import Digest
from dormouse.store.codec import Codec
from dormouse.store.files import write_all
from dormouse.store.store import Reader, Store, StoredChunk
from dormouse.transfer.budget import default_threads
from dormouse.transfer.handles import MEMFD, SegmentHandle


class Segment:
    """One block of memory; gone when it is closed here and unmapped everywhere."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        self._descriptor = descriptor

    @classmethod
    def create(cls, name: str, size: int) -> Self:
        """A new one of zeros, which take no memory yet. `name` is what /proc shows. Raises HostError."""
        try:
            descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(descriptor, size)
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            raise HostError(f"a memory segment of {size} bytes can't be made: {error.strerror}") from error
        return cls(descriptor, size)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put bytes into their place. Raises HostError when there is no memory for them."""
        try:
            write_all(self._descriptor, data, offset)
        except OSError as error:
            raise HostError(
                f"no memory for {self.size} bytes of weights: {error.strerror}", remedy="Put another model to sleep"
            ) from error

    def seal(self) -> None:
        """Nothing changes any more."""
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)

    def handle(self, report: int | None) -> SegmentHandle:
        """What a worker needs to map it; `report` is the pipe to go with it while it is still being filled."""
        reading = os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        return SegmentHandle(MEMFD, self.size, reading, report)

    def close(self) -> None:
        """Let go of it. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def fill(
    segment: Segment,
    store: Store,
    digests: Sequence[Digest],
    *,
    cancelled: threading.Event,
    threads: int | None = None,
) -> None:
    """Fill a segment with chunks, one after the other from its beginning, in that order, and seal it.

    Each thread holds one chunk. Raises DamagedError, StoreError or HostError, StoreError when `cancelled` was set; no
    thread is left then either, and the segment is of no use.
    """
    with store.reader() as reader:
        _Filling(segment, reader, _placed(reader.locate(digests), segment.size), cancelled).run(
            threads or default_threads() + 1
        )
    segment.seal()


def _placed(chunks: Sequence[StoredChunk], size: int) -> list[tuple[int, StoredChunk]]:
    placed: list[tuple[int, StoredChunk]] = []
    offset = 0
    for chunk in chunks:
        placed.append((offset, chunk))
        offset += chunk.plain_length
    if offset != size:
        raise DamagedError(f"the chunks have {offset} bytes where {size} were stored")
    return placed


class _Filling:
    """One fill: threads that take the next chunk until none is left or one has failed."""

    def __init__(
        self, segment: Segment, reader: Reader, placed: list[tuple[int, StoredChunk]], cancelled: threading.Event
    ) -> None:
        self._segment = segment
        self._reader = reader
        self._next: Iterator[tuple[int, StoredChunk]] = iter(placed)
        self._cancelled = cancelled
        self._failed = False
        self._lock = threading.Lock()

    def run(self, threads: int) -> None:
        """Fill all. Raises the first error."""
        with ThreadPoolExecutor(threads, thread_name_prefix="fill") as pool:
            for worker in [pool.submit(self._work) for _ in range(threads)]:
                worker.result()
        if self._cancelled.is_set():
            raise StoreError("the segment is not needed any more")

    def _work(self) -> None:
        try:
            while (task := self._take()) is not None:
                offset, chunk = task
                plain = self._reader.plain(chunk)
                if chunk.codec != Codec.ZERO:  # a new segment is all zeros, and those take no memory
                    self._segment.write(offset, plain)
        except BaseException:
            self._failed = True
            raise

    def _take(self) -> tuple[int, StoredChunk] | None:
        with self._lock:
            return None if self._failed or self._cancelled.is_set() else next(self._next, None)
