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
from typing import NamedTuple

from dormouse.errors import StoreError
from dormouse.snapshot.criu_images import PAGE, PagemapParser
from dormouse.snapshot.images import SnapshotBody
from dormouse.snapshot.memory_map import (
    FULL,
    MASK_SIZE,
    PAGES,
    WINDOW,
    AddressSpace,
    Piece,
    Places,
    Span,
    Spans,
    Window,
    assemble,
    changed_pages,
    check_length,
    held_mask,
    inherit,
    is_dense,
    kept_pages,
    mask_bytes,
    pick,
    squeeze,
    used_mask,
    window_mask,
)
from dormouse.snapshot.process_memory import ProcessMemory
from dormouse.store.chunk import Buffer, Digest
from dormouse.store.codec import packs_well
from dormouse.store.store import Reader
from dormouse.transfer.ingest import Ingest, Put, Putter

_PIPE_READ = 1 << 16
_DRAIN = 1 << 30
_READ_AT_ONCE = 4

log = logging.getLogger(__name__)


class StoredPages(NamedTuple):
    """Pages of a window, so many times WINDOW wide, in one chunk; masks as in memory_map."""

    digest: Digest
    held: int
    used: int
    width: int = 1


Stored = dict[int, list[StoredPages]]
"""What was stored of some windows, by number."""


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


def capture_memory(pid: int, host_pid: int, pagemap: int, ingest: Ingest, parent: ParentMemory | None) -> AddressSpace:
    """The memory of a process, `pid` in its images and `host_pid` here, whose page map comes through the pipe
    `pagemap`. Returns when all is stored; the process must stay stopped until then.

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
                job = _window_job(memory, pid, span, sparse.mask(span.number, span.width), parent)
                windows.append(ingest.run(job, span.width * WINDOW))
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


def store_span(
    buffer: memoryview, pid: int, span: Span, sparse: int, parent: ParentMemory | None, put: Putter
) -> Stored:
    """Store the pages of a span, packed in `buffer`, but not those that the parent has already. A wide one that is
    mostly zeros, packs well, or is cut narrowly in the parent is cut narrowly."""
    if span.width == 1 or not _cuts_narrow(buffer, pid, span, sparse, parent):
        return {span.number: _store_pages(buffer, pid, span, sparse, parent, put)}
    stored, at = {}, 0
    for part in span.narrow():
        part_sparse = sparse >> (part.number - span.number) * PAGES & FULL
        stored[part.number] = _store_pages(buffer[at:], pid, part, part_sparse, parent, put)
        at += part.mask.bit_count() * PAGE
    return stored


def _cuts_narrow(buffer: memoryview, pid: int, span: Span, sparse: int, parent: ParentMemory | None) -> bool:
    """Decided by what is kept, not by what the page map names: dropped pages are missing there the next time. What LZ4
    packs is best cut narrowly: its library wants new memory for what it decodes, which is dear in large pieces."""
    if parent is not None and parent.cuts_narrow(pid, span):
        return True
    if not is_dense(kept_pages(buffer, span.mask, sparse), span.width):
        return True
    known = parent is not None and parent.has(pid, span)
    return not known and packs_well(buffer[: span.mask.bit_count() * PAGE])


def _store_pages(
    buffer: memoryview, pid: int, span: Span, sparse: int, parent: ParentMemory | None, put: Putter
) -> list[StoredPages]:
    kept = squeeze(buffer, span.mask, sparse)
    if not kept or parent is None or not parent.has(pid, span):
        return store_window(buffer, kept, None, put, span.width)
    digest = put.known(buffer[: kept.bit_count() * PAGE])  # most often nothing has changed: then nothing is read
    if digest is not None:
        return [StoredPages(digest, kept, kept, span.width)]
    with parent.turn:
        return store_window(buffer, kept, parent.window(pid, span.number), put, span.width)


def store_window(
    buffer: memoryview, kept: int, old: tuple[Window, list[Digest], memoryview] | None, put: Put, width: int = 1
) -> list[StoredPages]:
    """Store the pages `kept` of a window, packed in `buffer`, but not those that `old` has already."""
    if not kept:
        return []
    if old is not None:
        window, digests, old_pages = old
        changed = changed_pages(buffer, kept, old_pages, window_mask(window))
        pieces = inherit(window.pieces, kept & ~changed)
        if pieces is not None and changed.bit_count() * 2 <= kept.bit_count():
            stored = [_as_stored(piece, digests) for piece in pieces]
            if changed:
                length = pick(buffer, kept, changed, buffer)
                stored.append(StoredPages(put(buffer[:length]), changed, changed, width))
            return stored
    return [StoredPages(put(buffer[: kept.bit_count() * PAGE]), kept, kept, width)]


def _as_stored(piece: Piece, digests: list[Digest]) -> StoredPages:
    width = len(piece.held) // MASK_SIZE
    return StoredPages(digests[piece.chunk], held_mask(piece), used_mask(piece), width)


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
