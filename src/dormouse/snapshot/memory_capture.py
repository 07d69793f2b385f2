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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait

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
    mask_bytes,
)
from dormouse.snapshot.process_memory import ProcessMemory
from dormouse.snapshot.window_fill import WindowTask
from dormouse.snapshot.window_store import Stored, StoredPages, store_span
from dormouse.store.chunk import Buffer, Digest
from dormouse.store.store import Reader
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

    def widths(self, pid: int, span: Span) -> dict[int, int]:
        """The windows that it has within a span, and how wide they are."""
        _digests, windows = self._spaces.get(pid, ([], {}))
        numbers = range(span.number, span.number + span.width)
        return {number: windows[number].width for number in numbers if number in windows}

    def task(self, pid: int, number: int) -> WindowTask | None:
        """A window, for another process to read. None as with `window`."""
        digests, windows = self._spaces.get(pid, ([], {}))
        window = windows.get(number)
        if window is None:
            return None
        try:
            chunks = self._reader.locate([digests[piece.chunk] for piece in window.pieces])
        except StoreError as error:
            log.warning("a window of the parent snapshot can't be read, it is stored anew: %s", error)
            return None
        pieces = [Piece(at, piece.held, piece.used) for at, piece in enumerate(window.pieces)]
        return WindowTask(pid, Window(number, pieces), chunks)

    def note_damage(self, digest: Digest) -> None:
        """What another process has found when it read a window."""
        self._reader.note_damage(digest)

    def window(self, pid: int, number: int) -> tuple[Window, list[Digest], memoryview] | None:
        """A window of process `pid`, its address space's chunks, and its pages (packed). None when there is none, or
        it can't be read: then the window is stored anew."""
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


StoreSpan = Callable[[int, int, Span, int], Stored]
"""Has another process store the pages of a span: pid in the images, pid here, span, which of it is sparse."""


def capture_memory(
    pid: int,
    host_pid: int,
    pagemap: int,
    ingest: Ingest,
    parent: ParentMemory | None,
    elsewhere: StoreSpan | None = None,
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
        try:
            for span in _spans(pagemap, parser):
                pages += span.mask.bit_count()
                thin = sparse.mask(span.number, span.width)
                if elsewhere is not None:
                    windows.append(ingest.run(_lent_job(elsewhere, pid, host_pid, span, thin)))
                else:
                    windows.append(ingest.run(_window_job(memory, pid, span, thin, parent), span.width * WINDOW))
        finally:
            wait(windows)  # all of them: they use `memory`
    stored = {number: pages for future in windows for number, pages in future.result().items()}
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


def _window_job(
    memory: ProcessMemory, pid: int, span: Span, sparse: int, parent: ParentMemory | None
) -> Callable[[memoryview, Putter], Stored]:
    def job(buffer: memoryview, put: Putter) -> Stored:
        memory.read(span.number, span.mask, buffer)
        return store_span(buffer, pid, span, sparse, parent, put)

    return job


def _lent_job(
    elsewhere: StoreSpan, pid: int, host_pid: int, span: Span, sparse: int
) -> Callable[[memoryview, Putter], Stored]:
    return lambda _buffer, _put: elsewhere(pid, host_pid, span, sparse)


def address_space(pid: int, pages_id: int, pages: int, windows: Mapping[int, list[StoredPages]]) -> AddressSpace:
    """What was stored of each window, by number, as an address space."""
    numbers: dict[Digest, int] = {}
    made = []
    for number, stored in sorted(windows.items()):
        pieces = [
            Piece(
                numbers.setdefault(part.digest, len(numbers)),
                mask_bytes(part.held, part.width),
                b"" if part.used == part.held else mask_bytes(part.used, part.width),
            )
            for part in stored
        ]
        if pieces:
            made.append(Window(number, pieces))
    return AddressSpace(pid=pid, pages_id=pages_id, pages=pages, windows=made, digests=b"".join(numbers))


def process_of(pagemap_name: str) -> int | None:
    """The pid in `pagemap-PID.img`; None for other images (shared memory has page maps too)."""
    pid = pagemap_name.removeprefix("pagemap-").removesuffix(".img")
    return int(pid) if pid.isdigit() and pagemap_name == f"pagemap-{pid}.img" else None
