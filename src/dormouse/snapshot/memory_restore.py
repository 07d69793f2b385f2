"""Gives the memory of a snapshot back: through CRIU's pipe, or straight into the restored, still stopped processes.

    plan:   which windows go through the pipe, which are filled afterwards        (fill_plan, pure)
    pipe:   page map and pages, written anew from the windows that CRIU shall see (pagemap_parts, page_parts)
    fill:   read, check, decode, assemble -> process_vm_writev                    (ThreadFill; HandFill in hand_fill)

CRIU puts pages into place with one thread, and each byte goes through a pipe before. What is withheld from it is not
in the page map it sees, so it makes the mapping and leaves it empty; then many threads or processes write the
pages there.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from dormouse.phases import host_clock
from dormouse.snapshot.criu_images import PAGE, Task, encode_pagemap
from dormouse.snapshot.criu_images import Mapping as ProcessMapping
from dormouse.snapshot.memory_map import (
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
from dormouse.snapshot.window_fill import WindowReader, WindowTask, fresh, window_tasks
from dormouse.store.chunk import Buffer, Digest
from dormouse.store.store import Reader
from dormouse.transfer.budget import default_threads
from dormouse.transfer.readahead import ReadAhead

AHEAD_BYTES, AHEAD_BYTES_OF_LARGE = 96 << 20, 16 << 20
"""What is decoded before the processes are there to take it; less where each thread needs more for itself."""

_HUGE_FROM = 16 << 20
"""Bytes to be filled in a mapping from which on it gets huge pages, if they are at least half of it."""

_HUGE_FROM_WITH_CUDA = 256 << 20
"""The same of a process with CUDA state: the driver keeps copies of GPU memory in such mappings, reads all of it, zeros
too, and lets go. A page of zeros that is 2 MiB long saves it 511 of 512 page faults, and takes no memory."""

_ADVISE_STEP = 4 << 20


@dataclass(frozen=True)
class MemoryPlan:
    """How one process gets its memory back."""

    space: AddressSpace
    piped: list[Window]
    filled: list[Window]
    huge: frozenset[int] = frozenset()
    """Where mappings begin that are to have huge pages: to fill or read them then costs a third or less."""


def fill_plan(
    spaces: Iterable[AddressSpace],
    mappings: Mapping[int, list[ProcessMapping]],
    tree: Iterable[Task],
    cuda: Collection[int] = (),
) -> list[MemoryPlan]:
    """Fill what lies in plain memory of processes. Memory that a child has at the same place as its parent goes through
    the pipe: CRIU lets the two share what is equal, copy-on-write, as it was before. The processes `cuda` have CUDA
    state."""
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
                huge=frozenset({*_dense(filled, own), *(_large(own) if space.pid in cuda else ())}),
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


def _large(mappings: Iterable[ProcessMapping]) -> Iterator[int]:
    return (m.start for m in mappings if m.plain and m.end - m.start >= _HUGE_FROM_WITH_CUDA)


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


class Fill(ABC):
    """Writes withheld windows into stopped processes. A context manager: at its end nobody is at work for it."""

    def __init__(self, plans: Iterable[MemoryPlan], reader: Reader) -> None:
        """Finds all chunks. Raises DamagedError for one that is in no pack."""
        self._plans = [plan for plan in plans if plan.filled]
        self._reader = reader
        located = reader.locate({digest for plan in self._plans for digest in _digests(plan)})
        self._chunks = {chunk.digest: chunk for chunk in located}
        self.begun: float | None = None
        """When `begin` was called, on the host's clock."""
        self.run_at = 0.0
        """When `run` was."""
        self.ahead_bytes = 0
        """What had been decoded by then, or was being decoded."""

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(self, *_exception: object) -> None: ...

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

    @abstractmethod
    def begin(self) -> None:
        """While CRIU is busy: read, check and decode as much as may wait in memory."""

    @abstractmethod
    def run(self, host_pids: Mapping[int, int]) -> None:
        """Fill the processes, whose pids in this namespace are `host_pids`. Raises DamagedError, SnapshotError,
        HostError."""

    def _tasks(self) -> Iterator[WindowTask]:
        for plan in self._plans:
            yield from window_tasks(plan.space.pid, plan.filled, plan.space.chunk_list(), self._chunks)


class ThreadFill(Fill):
    """By threads of this process: right where there are few cores, and nothing is to be gained by more processes."""

    def __init__(self, plans: Iterable[MemoryPlan], reader: Reader, *, threads: int | None = None) -> None:
        super().__init__(plans, reader)
        self._ahead: dict[tuple[int, int], Future[memoryview]] = {}
        self._lock = threading.Lock()
        self._windows = WindowReader(reader)
        self._running = self._ended = False
        # One more than decode and write, for the one that waits for the disk on behalf of the others.
        self._pool = ThreadPoolExecutor((threads or default_threads()) + 1, thread_name_prefix="fill")

    def __exit__(self, *_exception: object) -> None:
        with self._lock:
            self._running = self._ended = True
        self._pool.shutdown(cancel_futures=True)
        self._windows.close()

    def begin(self) -> None:
        """Also have the kernel read what will be wanted, in the order of the packs."""
        with self._lock:
            if self._running:
                return
            self.begun = host_clock()
            self._pool.submit(self._advise)
            for task in self._first(self._tasks()):
                self._ahead[task.pid, task.window.number] = self._pool.submit(self._windows.pages, task, fresh)

    def _first(self, tasks: Iterator[WindowTask]) -> Iterator[WindowTask]:
        large = any(window.width > 1 for plan in self._plans for window in plan.filled)
        room = AHEAD_BYTES_OF_LARGE if large else AHEAD_BYTES
        for task in tasks:
            room -= task.window.width * WINDOW
            if room < 0:
                return
            self.ahead_bytes += task.plain_bytes
            yield task

    def run(self, host_pids: Mapping[int, int]) -> None:
        with self._lock:
            self._running = True
            self.run_at = host_clock()
        with contextlib.ExitStack() as stack:
            jobs = []
            try:
                memories = {pid: stack.enter_context(ProcessMemory(host_pids[pid])) for pid in self.pids}
                for task in self._tasks():
                    jobs.append(self._pool.submit(self._fill, memories[task.pid], task))
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
            if self._windows.reads_directly(chunk):
                continue
            self._reader.advise(chunk)
            step += chunk.stored_length
            if step >= _ADVISE_STEP:
                self._reader.arrive(chunk)
                step = 0

    def _fill(self, memory: ProcessMemory, task: WindowTask) -> None:
        # The futures of `begin` were in the pool's queue before this one, so what is waited for is running or done.
        ahead = self._ahead.pop((task.pid, task.window.number), None)
        pages = ahead.result() if ahead is not None else self._windows.pages(task, self._windows.buffer)
        memory.write(task.window.number, window_mask(task.window), pages)


def _digests(plan: MemoryPlan) -> Iterator[Digest]:
    digests = plan.space.chunk_list()
    return (digests[piece.chunk] for window in plan.filled for piece in window.pieces)
