"""How one window of a stopped process is stored: drop zero pages, compare with the parent snapshot, put what is left.
What threads of the host service and hands do alike.

    pages of a span, packed --store_span--> put(chunk) ... --> StoredPages: which chunk has which pages
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from dormouse.snapshot.criu_images import PAGE
from dormouse.snapshot.memory_map import (
    FULL,
    MASK_SIZE,
    PAGES,
    Piece,
    Span,
    Window,
    changed_pages,
    held_mask,
    inherit,
    is_dense,
    kept_pages,
    pick,
    squeeze,
    used_mask,
    window_mask,
)
from dormouse.store.chunk import Buffer, Digest
from dormouse.store.codec import packs_well


class Put(Protocol):
    """Stores chunks."""

    def __call__(self, plain: Buffer, /) -> Digest:
        """Store one; its name."""

    def known(self, plain: Buffer, /) -> Digest | None:
        """The name of one that is stored already, None for another."""


OldWindow = tuple[Window, list[Digest], memoryview]
"""A window, its address space's chunks, and its pages (packed)."""


class Parent(Protocol):
    """The memory of the snapshot that the process was restored from, for finding what has changed since."""

    @property
    def turn(self) -> AbstractContextManager[object]:
        """For who reads it: what it gives is not small."""

    def has(self, pid: int, span: Span) -> bool:
        """Whether it has this very window, of this width."""

    def cuts_narrow(self, pid: int, span: Span) -> bool:
        """Whether it has windows of one WINDOW each within a wide one."""

    def window(self, pid: int, number: int) -> OldWindow | None:
        """A window of process `pid`. None when there is none, or it can't be read: then the window is stored anew."""


class StoredPages(NamedTuple):
    """Pages of a window, so many times WINDOW wide, in one chunk; masks as in memory_map."""

    digest: Digest
    held: int
    used: int
    width: int = 1


Stored = dict[int, list[StoredPages]]
"""What was stored of some windows, by number."""


def store_span(buffer: memoryview, pid: int, span: Span, sparse: int, parent: Parent | None, put: Put) -> Stored:
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


def _cuts_narrow(buffer: memoryview, pid: int, span: Span, sparse: int, parent: Parent | None) -> bool:
    """Decided by what is kept, not by what the page map names: dropped pages are missing there the next time. What LZ4
    packs is best cut narrowly: its library wants new memory for what it decodes, which is dear in large pieces."""
    if parent is not None and parent.cuts_narrow(pid, span):
        return True
    if not is_dense(kept_pages(buffer, span.mask, sparse), span.width):
        return True
    known = parent is not None and parent.has(pid, span)
    return not known and packs_well(buffer[: span.mask.bit_count() * PAGE])


def _store_pages(
    buffer: memoryview, pid: int, span: Span, sparse: int, parent: Parent | None, put: Put
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
    buffer: memoryview, kept: int, old: OldWindow | None, put: Callable[[Buffer], Digest], width: int = 1
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
