"""How windows of a stopped process are stored: drop zero pages, compare with the parent snapshot, put what is left.
What threads of the host service and hands do alike.

    spans, read one by one --cut, hash--> windows --known? then nothing is left--> put --> StoredPages: which chunk has
                                                  --changed? then the changed pages-->     which pages

All windows of a batch are asked about and put together, for what a hand asks goes to another process. Each is cut and
hashed as soon as it is read, while the processor's caches have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import compress
from typing import NamedTuple, Protocol

from dormouse.snapshot.memory_map import (
    Piece,
    Span,
    Window,
    changed_pages,
    inherit,
    is_dense,
    mask_bytes,
    pick,
    squeeze,
    window_mask,
)
from dormouse.store.chunk import Buffer, Digest, digest_of
from dormouse.store.codec import packs_well

Named = tuple[Digest, Buffer]
"""A chunk and its name."""


class Put(Protocol):
    """Stores chunks."""

    def __call__(self, chunks: Sequence[Named], /) -> None:
        """Store some."""

    def known(self, chunks: Sequence[Named], /) -> list[bool]:
        """Which of them are stored already."""


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

    def windows(self, pid: int, numbers: Sequence[int]) -> Iterator[OldWindow | None]:
        """Windows of process `pid`, each read when it is its turn. None for one that is not there, or can't be read:
        then the window is stored anew."""


SparseSpan = tuple[Span, int]
"""A span, and the mask of those of its pages that are zero if they are not there."""

ReadSpan = tuple[Span, int, memoryview]
"""With its pages, packed, which may be changed."""


class StoredPages(NamedTuple):
    """Pages of a window in one chunk; masks as in `Piece`."""

    digest: Digest
    held: bytes
    used: bytes = b""


Stored = dict[int, list[StoredPages]]
"""What was stored of some windows, by number."""


class Pages(NamedTuple):
    """Pages of a window, packed, and the name of the chunk that has just them."""

    span: Span
    data: memoryview
    digest: Digest

    @classmethod
    def of(cls, span: Span, data: memoryview) -> Pages:
        """The pages of a span, at the beginning of `data`."""
        return cls(span, data[: span.bytes], digest_of(data[: span.bytes]))

    @property
    def chunk(self) -> Named:
        return self.digest, self.data

    @property
    def stored(self) -> StoredPages:
        return StoredPages(self.digest, mask_bytes(self.span.mask, self.span.width))


def store_spans(spans: Iterable[ReadSpan], pid: int, parent: Parent | None, put: Put) -> Stored:
    """Store the pages of spans, which all stay where they are until this returns, but not those that the parent has
    already. A wide span that is mostly zeros, packs well, or is cut narrowly in the parent is cut narrowly."""
    windows = [window for span in spans for window in _cut(*span, pid, parent)]
    return _store(windows, pid, parent, put)


def _cut(span: Span, sparse: int, data: memoryview, pid: int, parent: Parent | None) -> Iterator[Pages]:
    kept = Span(span.number, squeeze(data, span.mask, sparse), span.width)
    narrow = span.width > 1 and _cuts_narrow(data[: kept.bytes], pid, kept, parent)
    at = 0
    for part in kept.narrow() if narrow else [kept]:
        if part.mask:
            yield Pages.of(part, data[at:])
            at += part.bytes


def _cuts_narrow(pages: memoryview, pid: int, kept: Span, parent: Parent | None) -> bool:
    """Decided by what is kept, not by what the page map names: dropped pages are missing there the next time. What LZ4
    packs is best cut narrowly: its library wants new memory for what it decodes, which is dear in large pieces."""
    if parent is not None and parent.cuts_narrow(pid, kept):
        return True
    if not is_dense(kept.mask, kept.width):
        return True
    known = parent is not None and parent.has(pid, kept)
    return not known and packs_well(pages)


def _store(windows: Sequence[Pages], pid: int, parent: Parent | None, put: Put) -> Stored:
    """Most often nothing has changed: then a window's name is enough, and nothing of the parent is read."""
    stored: Stored = {window.span.number: [] for window in windows}
    new = [window for window in windows if parent is None or not parent.has(pid, window.span)]
    if parent is not None and len(new) < len(windows):
        old = [window for window in windows if parent.has(pid, window.span)]
        known = put.known([window.chunk for window in old])
        stored.update((window.span.number, [window.stored]) for window in compress(old, known))
        changed = [window for window, same in zip(old, known, strict=True) if not same]
        new.extend(_left(changed, pid, parent, stored))
    if new:
        put([window.chunk for window in new])
    for window in new:
        stored[window.span.number].append(window.stored)
    return stored


def _left(changed: Sequence[Pages], pid: int, parent: Parent, stored: Stored) -> Iterator[Pages]:
    """What is to be put of windows that have changed; what the parent has of them is noted."""
    if not changed:
        return
    with parent.turn:
        before = parent.windows(pid, [window.span.number for window in changed])
        for window, old in zip(changed, before, strict=True):
            inherited, left = since(window, old)
            stored[window.span.number].extend(inherited)
            if left is not None:
                yield left


def since(pages: Pages, old: OldWindow | None) -> tuple[list[StoredPages], Pages | None]:
    """What a window still has in the chunks of an older one, and its other pages (which take the place of all); with
    little to share, nothing and the window as it is."""
    if old is None:
        return [], pages
    window, digests, old_pages = old
    kept = pages.span.mask
    changed = changed_pages(pages.data, kept, old_pages, window_mask(window))
    pieces = inherit(window.pieces, kept & ~changed)
    if pieces is None or changed.bit_count() * 2 > kept.bit_count():
        return [], pages
    pick(pages.data, kept, changed, pages.data)
    left = Pages.of(pages.span._replace(mask=changed), pages.data) if changed else None
    return [_as_stored(piece, digests) for piece in pieces], left


def _as_stored(piece: Piece, digests: list[Digest]) -> StoredPages:
    return StoredPages(digests[piece.chunk], piece.held, piece.used)
