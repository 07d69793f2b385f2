"""Captures the memory of a stopped process beside CRIU's one thread.

    CRIU --page map (a pipe)--> spans --> pool: read the pages out of the process, drop zero ones, compare with the
                                               parent snapshot, store what is left --> AddressSpace
    CRIU --pages (a pipe)-----> /dev/null      (spliced, never copied)

CRIU names the pages and stops the process; their bytes it would push through one pipe with one thread. They lie still
in the process until the whole tree is continued or killed, so many threads take them from there.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Protocol

from dormouse.errors import StoreError
from dormouse.snapshot.criu_images import PagemapParser
from dormouse.snapshot.images import SnapshotBody
from dormouse.snapshot.memory_map import (
    WINDOW,
    AddressSpace,
    Piece,
    Places,
    Span,
    Spans,
    Window,
    assemble,
    check_length,
    held_mask,
)
from dormouse.snapshot.process_memory import ProcessMemory
from dormouse.snapshot.window_fill import WindowTask
from dormouse.snapshot.window_store import OldWindow, SparseSpan, Stored, StoredPages, store_spans
from dormouse.store.chunk import Buffer, Digest
from dormouse.store.store import Reader, StoredChunk
from dormouse.transfer.ingest import Ingest, Putter

_PIPE_READ = 1 << 16
_DRAIN = 1 << 30
_READ_AT_ONCE = 4

log = logging.getLogger(__name__)


class ParentMemory:
    """The memory of the snapshot that the process was restored from, for finding what has changed since."""

    def __init__(self, body: SnapshotBody, reader: Reader) -> None:
        self.turn = threading.BoundedSemaphore(_READ_AT_ONCE)
        """For who reads it: what it gives is not small."""
        self._reader = reader
        self._spaces = {space.pid: (space.chunk_list(), {w.number: w for w in space.windows}) for space in body.memory}

    def has(self, pid: int, span: Span) -> bool:
        """Whether it has this very window, of this width."""
        window = self._spaces.get(pid, ([], {}))[1].get(span.number)
        return window is not None and window.width == span.width

    def cuts_narrow(self, pid: int, span: Span) -> bool:
        """Whether it has windows of one WINDOW each within a wide one."""
        return any(self.has(pid, Span(span.number + at, 0)) for at in range(span.width))

    def widths(self, pid: int, spans: Iterable[Span]) -> dict[int, int]:
        """The windows that it has within spans, and how wide they are."""
        _digests, windows = self._spaces.get(pid, ([], {}))
        numbers = (number for span in spans for number in range(span.number, span.number + span.width))
        return {number: windows[number].width for number in numbers if number in windows}

    def tasks(self, pid: int, numbers: Sequence[int]) -> list[WindowTask | None]:
        """Windows that it has, for another process to read. None as with `windows`."""
        digests, windows = self._spaces[pid]
        names = [[digests[piece.chunk] for piece in windows[number].pieces] for number in numbers]
        try:
            located = self._reader.locate(digest for window in names for digest in window)
        except StoreError as error:
            if len(numbers) > 1:  # the others can be read
                return [self.tasks(pid, [number])[0] for number in numbers]
            log.warning("a window of the parent snapshot can't be read, it is stored anew: %s", error)
            return [None]
        chunks = {chunk.digest: chunk for chunk in located}
        return [
            _as_task(pid, windows[at], [chunks[name] for name in found])
            for at, found in zip(numbers, names, strict=True)
        ]

    def note_damage(self, digest: Digest) -> None:
        """What another process has found when it read a window."""
        self._reader.note_damage(digest)

    def windows(self, pid: int, numbers: Sequence[int]) -> Iterator[OldWindow | None]:
        """Windows of process `pid`, each read when it is its turn. None for one that is not there, or can't be read:
        then the window is stored anew."""
        return (self._window(pid, number) for number in numbers)

    def _window(self, pid: int, number: int) -> OldWindow | None:
        digests, windows = self._spaces.get(pid, ([], {}))
        window = windows.get(number)
        if window is None:
            return None
        try:
            chunks = {piece.chunk: self._plain(digests[piece.chunk], held_mask(piece)) for piece in window.pieces}
            return window, digests, assemble(window, chunks.__getitem__)
        except StoreError as error:
            log.warning("a window of the parent snapshot can't be read, it is stored anew: %s", error)
            return None

    def _plain(self, digest: Digest, held: int) -> Buffer:
        (chunk,) = self._reader.locate([digest])
        check_length(chunk.plain_length, held, digest)
        return self._reader.plain(chunk)


def _as_task(pid: int, window: Window, chunks: list[StoredChunk]) -> WindowTask:
    pieces = [Piece(at, piece.held, piece.used) for at, piece in enumerate(window.pieces)]
    return WindowTask(pid, Window(window.number, pieces), chunks)


class Elsewhere(Protocol):
    """Has other processes store the pages of spans."""

    def batches(self, spans: Iterable[SparseSpan], total: int) -> Iterator[list[SparseSpan]]:
        """Spans of about `total` bytes as they are best given to `store`."""

    def store(self, pid: int, host_pid: int, spans: Sequence[SparseSpan]) -> Stored:
        """Store one batch; `pid` in the images, `host_pid` here."""


def capture_memory(
    pid: int,
    host_pid: int,
    pagemap: int,
    ingest: Ingest,
    parent: ParentMemory | None,
    elsewhere: Elsewhere | None = None,
) -> AddressSpace:
    """The memory of a process, `pid` in its images and `host_pid` here, whose page map comes through the pipe
    `pagemap`. Returns when all is stored; the process must stay stopped until then. Threads of the ingest do it, or
    wait for who does it `elsewhere`.

    Raises SnapshotError, StoreError.
    """
    parser = PagemapParser(f"pagemap-{pid}.img")
    windows: list[Future[Stored]] = []
    pages = 0
    with ProcessMemory(host_pid) as memory:
        sparse = Places(memory.anonymous())
        spans = ((span, sparse.mask(span.number, span.width)) for span in _spans(pagemap, parser))
        batches = (
            elsewhere.batches(spans, memory.private_bytes()) if elsewhere is not None else ([one] for one in spans)
        )
        try:
            for batch in batches:
                pages += sum(span.mask.bit_count() for span, _sparse in batch)
                if elsewhere is not None:
                    windows.append(ingest.run(_lent_job(elsewhere, pid, host_pid, batch)))
                else:
                    room = WINDOW * sum(span.width for span, _sparse in batch)
                    windows.append(ingest.run(_own_job(memory, pid, batch, parent), room))
        finally:
            wait(windows)  # all of them: they use `memory`
    stored = {number: parts for future in windows for number, parts in future.result().items()}
    return address_space(pid, parser.finish(), pages, stored)


def drain(pipe: int) -> None:
    """Take everything out of a pipe and drop it, without a copy."""
    sink = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        while os.splice(pipe, sink, _DRAIN):
            pass
    finally:
        os.close(sink)


def _spans(pagemap: int, parser: PagemapParser) -> Iterator[Span]:
    spans = Spans()
    while data := os.read(pagemap, _PIPE_READ):
        for run in parser.feed(data):
            yield from spans.add(run)
    yield from spans.last()


def _own_job(
    memory: ProcessMemory, pid: int, batch: Sequence[SparseSpan], parent: ParentMemory | None
) -> Callable[[memoryview, Putter], Stored]:
    def job(buffer: memoryview, put: Putter) -> Stored:
        return store_spans(memory.read_spans(batch, buffer), pid, parent, put)

    return job


def _lent_job(
    elsewhere: Elsewhere, pid: int, host_pid: int, batch: Sequence[SparseSpan]
) -> Callable[[memoryview, Putter], Stored]:
    return lambda _buffer, _put: elsewhere.store(pid, host_pid, batch)


def address_space(pid: int, pages_id: int, pages: int, windows: Mapping[int, list[StoredPages]]) -> AddressSpace:
    """What was stored of each window, by number, as an address space."""
    numbers: dict[Digest, int] = {}
    made = []
    for number, stored in sorted(windows.items()):
        pieces = [Piece(numbers.setdefault(part.digest, len(numbers)), part.held, part.used) for part in stored]
        made.append(Window(number, pieces))
    return AddressSpace(pid=pid, pages_id=pages_id, pages=pages, windows=made, digests=b"".join(numbers))


def process_of(pagemap_name: str) -> int | None:
    """The pid in `pagemap-PID.img`; None for other images (shared memory has page maps too)."""
    pid = pagemap_name.removeprefix("pagemap-").removesuffix(".img")
    return int(pid) if pid.isdigit() and pagemap_name == f"pagemap-{pid}.img" else None
