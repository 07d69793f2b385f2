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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from typing import NamedTuple

from dormouse.errors import StoreError
from dormouse.snapshot.criu_images import PAGE, PagemapParser
from dormouse.snapshot.images import SnapshotBody
from dormouse.snapshot.memory_map import (
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
    mask_bytes,
    pick,
    squeeze,
    used_mask,
    window_mask,
)
from dormouse.snapshot.process_memory import ProcessMemory
from dormouse.store.chunk import Buffer, Digest
from dormouse.store.store import Reader
from dormouse.transfer.ingest import Ingest, Put

_PIPE_READ = 1 << 16
_DRAIN = 1 << 30

log = logging.getLogger(__name__)


class StoredPages(NamedTuple):
    """Pages of a window in one chunk; masks as in memory_map."""

    digest: Digest
    held: int
    used: int


class ParentMemory:
    """The memory of the snapshot that the process was restored from, for finding what has changed since."""

    def __init__(self, body: SnapshotBody, reader: Reader) -> None:
        self._reader = reader
        self._spaces = {space.pid: (space.chunk_list(), {w.number: w for w in space.windows}) for space in body.memory}

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
    windows: list[tuple[int, Future[list[StoredPages]]]] = []
    pages = 0
    with ProcessMemory(host_pid) as memory:
        sparse = Places(memory.anonymous())
        try:
            for span in _spans(pagemap, parser):
                pages += span.mask.bit_count()
                job = _window_job(memory, pid, span, sparse.mask(span.number), parent)
                windows.append((span.number, ingest.run(job)))
        finally:
            wait([future for _number, future in windows])  # all of them: they use `memory`
    stored = {number: future.result() for number, future in windows}
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
) -> Callable[[memoryview, Put], list[StoredPages]]:
    def job(buffer: memoryview, put: Put) -> list[StoredPages]:
        memory.read(span.number, span.mask, buffer)
        kept = squeeze(buffer, span.mask, sparse)
        old = parent.window(pid, span.number) if parent is not None else None
        return store_window(buffer, kept, old, put)

    return job


def store_window(
    buffer: memoryview, kept: int, old: tuple[Window, list[Digest], memoryview] | None, put: Put
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
                stored.append(StoredPages(put(buffer[:length]), changed, changed))
            return stored
    return [StoredPages(put(buffer[: kept.bit_count() * PAGE]), kept, kept)]


def _as_stored(piece: Piece, digests: list[Digest]) -> StoredPages:
    return StoredPages(digests[piece.chunk], int.from_bytes(piece.held, "little"), used_mask(piece))


def address_space(pid: int, pages_id: int, pages: int, windows: Mapping[int, list[StoredPages]]) -> AddressSpace:
    """What was stored of each window, by number, as an address space."""
    numbers: dict[Digest, int] = {}
    made = []
    for number, stored in sorted(windows.items()):
        pieces = [
            Piece(
                numbers.setdefault(part.digest, len(numbers)),
                mask_bytes(part.held),
                b"" if part.used == part.held else mask_bytes(part.used),
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
