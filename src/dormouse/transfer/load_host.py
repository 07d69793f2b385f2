"""Load a plan into memory of this machine.

    extents in plan order -> threads, each: read -> check signatures -> decode -> its places in the destinations

A destination is memory of this process, or something that takes writes, such as a segment. Raw bytes are read straight
to their place in memory, past the page cache where they are cold and lie so that the kernel can; all else is read into
a buffer of the thread, some chunks at once, small enough to stay in the CPU's cache until they are decoded. A thread
holds one buffer and, for a piece that is not decoded in place, its plain bytes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from dormouse.store.chunk import Buffer
from dormouse.store.codec import Codec
from dormouse.store.key import Key
from dormouse.store.pack import ALIGNMENT
from dormouse.transfer.budget import default_threads
from dormouse.transfer.crew import Crew
from dormouse.transfer.memory import anonymous
from dormouse.transfer.pieces import Checker, place
from dormouse.transfer.plan import Copy, Extent, LoadPlan, Piece, join
from dormouse.transfer.report import LoadReport, Progress
from dormouse.transfer.source_files import SourceFile, SourceFiles, room_for

READ_BYTES = 4 << 20
"""What is read at once into a thread's buffer; a longer chunk alone."""

_WAITING = 2  # threads beyond the CPUs: some are always waiting for the disk
_WORTH_A_READ = 256 << 10  # raw bytes of fewer go through the buffer, with their neighbours


class Sink(Protocol):
    """A destination that is written to, by many threads at once."""

    size: int

    def write(self, offset: int, data: Buffer) -> None:
        """Put bytes into their place."""


Destination = memoryview | Sink


def load_host(
    plan: LoadPlan,
    destinations: Sequence[Destination],
    *,
    key: Key | None,
    threads: int | None = None,
    progress: Progress | None = None,
    cancelled: threading.Event | None = None,
) -> LoadReport:
    """Fill `destinations`, all zeros before and memory of bytes where they are memory, as `plan` says.

    `progress` is called with done and total plain bytes, by one thread at a time. Raises DamagedError that names file
    and chunk, NotFoundError, StoreError (also when `cancelled` is set); no thread and no file is left then, and the
    destinations have any content.
    """
    started = time.perf_counter()
    plan.require([_size(destination) for destination in destinations])
    checker = Checker(plan.files, key)
    checker.check_plan(plan)
    with SourceFiles(plan.files, ours=plan.ours) as files:
        load = _HostLoad(plan, destinations, files, checker, progress)
        with Crew(
            plan.extents, load.extent, threads=threads or default_threads() + _WAITING, name="load", cancelled=cancelled
        ) as crew:
            crew.wait()
        return LoadReport(
            time.perf_counter() - started, plan.plain_bytes, plan.stored_bytes, files.direct_bytes, files.cached_bytes
        )


class _HostLoad:
    """What the threads of one load share."""

    def __init__(
        self,
        plan: LoadPlan,
        destinations: Sequence[Destination],
        files: SourceFiles,
        checker: Checker,
        progress: Progress | None,
    ) -> None:
        self._destinations = destinations
        self._files = files
        self._checker = checker
        self._buffers = threading.local()
        self._progress = progress
        self._done, self._total = 0, plan.plain_bytes
        self._lock = threading.Lock()

    def extent(self, extent: Extent) -> None:
        """Load one extent."""
        file = self._files[extent.file]
        direct = file.prefers_direct(extent.offset, extent.length)
        for group in _groups(extent):
            if not (len(group.pieces) == 1 and self._in_place(file, group.pieces[0], direct)):
                self._through_buffer(file, group, direct)
        if self._progress is not None:
            with self._lock:
                self._done += sum(piece.plain_length for piece in extent.pieces)
                self._progress(self._done, self._total)

    def _in_place(self, file: SourceFile, piece: Piece, direct: bool) -> bool:
        """Read a raw piece to where it goes; False when it has to go through the buffer."""
        copy = piece.whole
        if copy is None or piece.codec != Codec.RAW:
            return False
        target = self._memory(copy)
        if target is None or (direct and not file.fits_direct(target, piece.offset)):
            return False
        file.read_exactly(target, piece.offset, direct=direct)
        self._checker.check(piece, target)
        return True

    def _through_buffer(self, file: SourceFile, group: Extent, direct: bool) -> None:
        stored = file.read_around(
            self._buffer(room_for(group.offset, group.length)), group.offset, group.length, direct=direct
        )
        for piece in group.pieces:
            begin = piece.offset - group.offset
            self._finish(piece, stored[begin : begin + piece.stored_length])

    def _finish(self, piece: Piece, stored: memoryview) -> None:
        self._checker.check(piece, stored)
        copy = piece.whole
        target = None if copy is None else self._memory(copy)
        if target is not None:
            self._checker.decode_into(piece, stored, target)
            return
        plain = self._checker.decoded(piece, stored)
        for copy in piece.copies:
            _put(plain, copy, self._destinations[copy.device])

    def _memory(self, copy: Copy) -> memoryview | None:
        """Where a piece goes as a whole, if that is memory."""
        destination = self._destinations[copy.device]
        return destination[copy.target : copy.target + copy.row_bytes] if isinstance(destination, memoryview) else None

    def _buffer(self, length: int) -> memoryview:
        """This thread's buffer, which begins at a page."""
        buffer: memoryview | None = getattr(self._buffers, "buffer", None)
        if buffer is None or len(buffer) < length:
            size = max(length, READ_BYTES + ALIGNMENT)
            buffer = self._buffers.buffer = memoryview(anonymous(size))
        return buffer


def _size(destination: Destination) -> int:
    return len(destination) if isinstance(destination, memoryview) else destination.size


def _put(plain: Buffer, copy: Copy, destination: Destination) -> None:
    if isinstance(destination, memoryview):
        place(plain, copy, destination)
        return
    view = memoryview(plain)
    for row in range(copy.rows):
        begin = copy.source + row * copy.source_pitch
        destination.write(copy.target + row * copy.target_pitch, view[begin : begin + copy.row_bytes])


def _groups(extent: Extent) -> Iterator[Extent]:
    """What is read at once: raw pieces that may be read in place each alone, the rest some together."""
    small: list[Piece] = []
    for piece in extent.pieces:
        if piece.codec == Codec.RAW and piece.stored_length >= _WORTH_A_READ:
            yield from join(small, READ_BYTES)
            small = []
            yield Extent(extent.file, piece.offset, piece.stored_length, (piece,))
        else:
            small.append(piece)
    yield from join(small, READ_BYTES)
