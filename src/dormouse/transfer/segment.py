"""Segments: blocks of memory that outlive and are shared by the processes that map them, filled from chunks.

    create(size) -> fill(chunks): load_host, threads that read, check, decode and write -> seal -> handle()

A segment is a memfd. It is written with `pwrite` and never mapped here, so the moment it is filled it can be sealed:
from then on nobody, root included, can change what all workers of a model share. Who maps it gets a descriptor that
was opened for reading only; one opened for writing would keep the kernel from sealing. (Reading or decoding straight
into a mapping saves a copy, but costs a page fault and the zeroing of each page: on half a gigabyte with two threads it
took 1.1 to 1.8 times the CPU time, whether faults were taken one by one or 4 MiB at once.)
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Sequence
from typing import Self

from dormouse.errors import DamagedError, HostError
from dormouse.store.chunk import Buffer, Digest
from dormouse.store.files import write_all
from dormouse.store.store import Reader, Store, StoredChunk
from dormouse.transfer.handles import MEMFD, SegmentHandle
from dormouse.transfer.load_host import load_host
from dormouse.transfer.plan import Copy, LoadPlan, plan, stored_pieces


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

    def write(self, offset: int, data: Buffer) -> None:
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
) -> int:
    """Fill a segment with chunks, one after the other from its beginning, in that order, and seal it; the bytes
    they take as they are stored.

    Raises DamagedError, StoreError or HostError, StoreError when `cancelled` was set; no thread is left then either,
    and the segment is of no use.
    """
    with store.reader() as reader:
        loaded = plan_in_row(reader, digests, segment.size)
        report = load_host(loaded, [segment], key=store.key, threads=threads, cancelled=cancelled)
    segment.seal()
    return report.stored_bytes


def plan_in_row(reader: Reader, digests: Sequence[Digest], size: int) -> LoadPlan:
    """The plan for chunks one after the other in one block of so many bytes. Raises DamagedError when they have another
    length together, NotFoundError for one that is gone."""
    files, pieces = stored_pieces(_placed(reader.locate(digests), size), reader.pack)
    return plan(files, pieces, [size])


def _placed(chunks: Sequence[StoredChunk], size: int) -> list[tuple[StoredChunk, list[Copy]]]:
    placed: list[tuple[StoredChunk, list[Copy]]] = []
    offset = 0
    for chunk in chunks:
        placed.append((chunk, [Copy(0, 0, offset, chunk.plain_length)]))
        offset += chunk.plain_length
    if offset != size:
        raise DamagedError(f"the chunks have {offset} bytes where {size} were stored")
    return placed
