"""Gives the memory of a snapshot back: through CRIU's pipe, or straight into the restored, still stopped processes.

    plan:   which windows go through the pipe, which are filled afterwards        (fill_plan, pure)
    pipe:   page map and pages, written anew from the windows that CRIU shall see (pagemap_parts, page_parts)
    fill:   pool: read, check, decode, assemble -> process_vm_writev              (Fill)

CRIU puts pages into place with one thread, and each byte goes through a pipe before. What is withheld from it is not
in the page map it sees, so it makes the mapping and leaves it empty; then many threads write the pages there.
"""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from dormouse.errors import DamagedError
from dormouse.phases import host_clock
from dormouse.snapshot.criu_images import PAGE, Task, encode_pagemap
from dormouse.snapshot.criu_images import Mapping as ProcessMapping
from dormouse.snapshot.memory_map import (
    WIDE,
    WINDOW,
    AddressSpace,
    Window,
    assemble,
    check_length,
    held_mask,
    plain_windows,
    runs_of,
    window_mask,
)
from dormouse.snapshot.process_memory import ProcessMemory
from dormouse.store.chunk import Buffer, Digest
from dormouse.store.codec import FLOATS, Codec
from dormouse.store.pack import aligned
from dormouse.store.store import Reader, StoredChunk
from dormouse.transfer.budget import default_threads
from dormouse.transfer.memory import anonymous
from dormouse.transfer.readahead import ReadAhead
from dormouse.transfer.source_files import SourceFile

AHEAD_BYTES, AHEAD_BYTES_OF_LARGE = 96 << 20, 16 << 20
"""What is decoded before the processes are there to take it; less where each thread needs more for itself."""

_MERGED_AT_ONCE = 4
"""Wide windows of several pieces that are put together at a time: each needs several times its size."""

_HUGE_FROM = 16 << 20
"""Bytes to be filled in a mapping from which on it gets huge pages, if they are at least half of it."""

_ADVISE_STEP = 4 << 20
_DIRECT_FROM = 2 << 20

_COPIED_AT_ONCE, _CODED_AT_ONCE = 6, 10
"""Large chunks that are decoded at a time: with LZ4 and zstd, which want memory of their own for the plain bytes, and
floats. So 16 threads stay within 256 MiB."""


@dataclass(frozen=True)
class MemoryPlan:
    """How one process gets its memory back."""

    space: AddressSpace
    piped: list[Window]
    filled: list[Window]
    huge: frozenset[int] = frozenset()
    """Where mappings begin that are to have huge pages: to fill them then costs a third."""


def fill_plan(
    spaces: Iterable[AddressSpace], mappings: Mapping[int, list[ProcessMapping]], tree: Iterable[Task]
) -> list[MemoryPlan]:
    """Fill what lies in plain memory of processes. Memory that a child has at the same place as its parent goes through
    the pipe: CRIU lets the two share what is equal, copy-on-write, as it was before."""
    shared = _inherited(mappings, tree)
    plans = []
    for space in spaces:
        own = [m for m in mappings.get(space.pid, []) if (m.start, m.end) not in shared.get(space.pid, set())]
        plain = plain_windows(space.windows, own)
        plans.append(
            MemoryPlan(
                space,
                piped=[window for window in space.windows if window.number not in plain],
                filled=(filled := [window for window in space.windows if window.number in plain]),
                huge=frozenset(_dense(filled, own)),
            )
        )
    return plans


def _inherited(mappings: Mapping[int, list[ProcessMapping]], tree: Iterable[Task]) -> dict[int, set[tuple[int, int]]]:
    """By pid, the (start, end) of mappings that its parent or a child of it has at the same place."""
    places = {pid: {(m.start, m.end) for m in found if m.plain} for pid, found in mappings.items()}
    shared: dict[int, set[tuple[int, int]]] = {}
    for task in tree:
        common = places.get(task.pid, set()) & places.get(task.parent, set())
        shared.setdefault(task.pid, set()).update(common)
        shared.setdefault(task.parent, set()).update(common)
    return shared


def _dense(filled: Sequence[Window], mappings: Iterable[ProcessMapping]) -> Iterator[int]:
    """Where mappings begin that are large and will be full anyway."""
    ends = [window.end * WINDOW for window in filled]
    for mapping in mappings:
        inside = filled[bisect_right(ends, mapping.start) : bisect_right(ends, mapping.end)]
        size = sum(window_mask(window).bit_count() * PAGE for window in inside)
        if mapping.plain and size >= max(_HUGE_FROM, (mapping.end - mapping.start) // 2):
            yield mapping.start


def pagemap_parts(plan: MemoryPlan) -> Iterator[Buffer]:
    """The page map as CRIU shall see it."""
    yield encode_pagemap(plan.space.pages_id, runs_of(plan.piped))


def page_parts(plan: MemoryPlan, chunks: ReadAhead) -> Iterator[Buffer]:
    """The pages of that page map. Raises DamagedError."""
    digests = plan.space.chunk_list()
    wanted = [digests[piece.chunk] for window in plan.piped for piece in window.pieces]
    stream = chunks.stream(wanted)
    try:
        for window in plan.piped:
            parts = {}
            for piece in window.pieces:
                parts[piece.chunk] = next(stream)
                check_length(len(parts[piece.chunk]), held_mask(piece), digests[piece.chunk])
            yield assemble(window, parts.__getitem__)
    finally:
        stream.close()


def fresh(length: int) -> memoryview:
    """New memory that begins at a page."""
    return memoryview(anonymous(length))[:length]


class _Bulk:
    """Reads large chunks: past the page cache what is not in it, else through it, into memory of each thread's own."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._files: dict[int, SourceFile] = {}
        self._lock = threading.Lock()
        self._local = threading.local()
        self._copied = threading.BoundedSemaphore(_COPIED_AT_ONCE)
        self._floats = threading.BoundedSemaphore(_CODED_AT_ONCE)

    def close(self) -> None:
        """Close the packs. No read may be under way. Idempotent."""
        files, self._files = self._files, {}
        for file in files.values():
            file.close()

    def buffer(self, length: int) -> memoryview:
        """This thread's buffer for plain bytes, valid until its next call."""
        return self._own("plain", length)

    def reads_directly(self, chunk: StoredChunk) -> bool:
        """Whether a chunk is large, and best read past the page cache."""
        if chunk.stored_length < _DIRECT_FROM:
            return False
        self._reader.check_row(chunk)
        return self._file(chunk).prefers_direct(chunk.offset, chunk.stored_length)

    def plain_into(self, chunk: StoredChunk, out: memoryview) -> memoryview:
        """A chunk's plain bytes, in `out`, which begins at a page. Raises DamagedError."""
        turn = self._floats if chunk.codec in FLOATS else self._copied
        with contextlib.nullcontext() if chunk.codec == Codec.RAW else turn:
            self._read_into(chunk, out)
        return out

    def _read_into(self, chunk: StoredChunk, out: memoryview) -> None:
        if not self.reads_directly(chunk):
            self._reader.plain_into(chunk, out)
            return
        raw = chunk.codec == Codec.RAW
        buffer = out if raw else self._own("stored", aligned(chunk.stored_length))
        try:
            stored = self._file(chunk).read_around(buffer, chunk.offset, chunk.stored_length, direct=True)
        except DamagedError as error:
            raise self._reader.damaged(chunk, error.message) from error
        self._reader.check(chunk, stored)
        if not raw:
            self._reader.decode_into(chunk, stored, out)
        elif len(stored) != len(out):
            raise self._reader.damaged(chunk, f"it has {len(stored)} raw bytes instead of {len(out)}")

    def _file(self, chunk: StoredChunk) -> SourceFile:
        with self._lock:
            file = self._files.get(chunk.pack)
            if file is None:
                file = self._files[chunk.pack] = SourceFile(self._reader.pack(chunk), ours=True)
            return file

    def _own(self, name: str, length: int) -> memoryview:
        found: memoryview | None = getattr(self._local, name, None)
        if found is None or len(found) < length:
            found = fresh(max(length, WIDE * WINDOW))
            setattr(self._local, name, found)
        return found[:length]


class Fill:
    """Writes withheld windows into stopped processes. A context manager: at its end no thread of it is left."""

    def __init__(self, plans: Iterable[MemoryPlan], reader: Reader, *, threads: int | None = None) -> None:
        """Finds all chunks. Raises DamagedError for one that is in no pack."""
        self._plans = [plan for plan in plans if plan.filled]
        self._reader = reader
        located = reader.locate({digest for plan in self._plans for digest in _digests(plan)})
        self._chunks = {chunk.digest: chunk for chunk in located}
        self._lists = {plan.space.pid: plan.space.chunk_list() for plan in self._plans}
        self._ahead: dict[tuple[int, int], Future[memoryview]] = {}
        self._lock = threading.Lock()
        self._bulk = _Bulk(reader)
        self._merging = threading.BoundedSemaphore(_MERGED_AT_ONCE)
        self._running = self._ended = False
        self.begun: float | None = None
        """When `begin` was called, on the host's clock."""
        self.run_at = 0.0
        """When `run` was."""
        # One more than decode and write, for the one that waits for the disk on behalf of the others.
        self._pool = ThreadPoolExecutor((threads or default_threads()) + 1, thread_name_prefix="fill")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        with self._lock:
            self._running = self._ended = True
        self._pool.shutdown(cancel_futures=True)
        self._bulk.close()

    @property
    def plain_bytes(self) -> int:
        """What is filled in."""
        return PAGE * sum(window_mask(window).bit_count() for plan in self._plans for window in plan.filled)

    @property
    def stored_bytes(self) -> int:
        """What of the store is read for that."""
        return sum(chunk.stored_length for chunk in self._chunks.values())

    @property
    def pids(self) -> list[int]:
        """The processes to be filled, as their images name them."""
        return [plan.space.pid for plan in self._plans]

    def begin(self) -> None:
        """While CRIU is busy: have the kernel read what will be wanted, in the order of the packs, and decode as much
        as may wait in memory."""
        windows = ((plan.space.pid, window) for plan in self._plans for window in plan.filled)
        with self._lock:
            if self._running:
                return
            self.begun = host_clock()
            self._pool.submit(self._advise)
            for pid, window in self._first(windows):
                self._ahead[pid, window.number] = self._pool.submit(self._pages, pid, window)

    def _first(self, windows: Iterator[tuple[int, Window]]) -> Iterator[tuple[int, Window]]:
        large = any(window.width > 1 for plan in self._plans for window in plan.filled)
        room = AHEAD_BYTES_OF_LARGE if large else AHEAD_BYTES
        for pid, window in windows:
            room -= window.width * WINDOW
            if room < 0:
                return
            yield pid, window

    def run(self, host_pids: Mapping[int, int]) -> None:
        """Fill the processes, whose pids in this namespace are `host_pids`. Raises DamagedError, SnapshotError."""
        with self._lock:
            self._running = True
            self.run_at = host_clock()
        with contextlib.ExitStack() as memories:
            jobs = []
            try:
                for plan in self._plans:
                    memory = memories.enter_context(ProcessMemory(host_pids[plan.space.pid]))
                    jobs += [self._pool.submit(self._fill, memory, plan.space.pid, window) for window in plan.filled]
                for job in jobs:
                    job.result()
            finally:  # before the memories close: no thread may use a closed descriptor
                self._ended = True
                self._pool.shutdown(cancel_futures=True)

    def _advise(self) -> None:
        """One step is under way at a time: behind a deep queue, CRIU's own reads would wait for all of it."""
        step = 0
        for chunk in sorted(self._chunks.values(), key=lambda chunk: (chunk.pack, chunk.offset)):
            if self._ended:
                return
            if self._bulk.reads_directly(chunk):
                continue
            self._reader.advise(chunk)
            step += chunk.stored_length
            if step >= _ADVISE_STEP:
                self._reader.arrive(chunk)
                step = 0

    def _fill(self, memory: ProcessMemory, pid: int, window: Window) -> None:
        # The futures of `begin` were in the pool's queue before this one, so what is waited for is running or done.
        ahead = self._ahead.pop((pid, window.number), None)
        pages = ahead.result() if ahead is not None else self._pages(pid, window, self._bulk.buffer)
        memory.write(window.number, window_mask(window), pages)

    def _pages(self, pid: int, window: Window, buffer: Callable[[int], memoryview] = fresh) -> memoryview:
        """The pages of a window, packed; where one chunk has them all, in memory that `buffer` gives."""
        digests = self._lists[pid]
        for piece in window.pieces:
            digest = digests[piece.chunk]
            check_length(self._chunks[digest].plain_length, held_mask(piece), digest)
        if window.width == 1:
            return assemble(window, lambda number: self._reader.plain(self._chunks[digests[number]]))
        if len(window.pieces) == 1 and not window.pieces[0].used:
            chunk = self._chunks[digests[window.pieces[0].chunk]]
            return self._bulk.plain_into(chunk, buffer(chunk.plain_length))
        with self._merging:
            return assemble(window, lambda number: self._reader.plain(self._chunks[digests[number]]))


def _digests(plan: MemoryPlan) -> Iterator[Digest]:
    digests = plan.space.chunk_list()
    return (digests[piece.chunk] for window in plan.filled for piece in window.pieces)
