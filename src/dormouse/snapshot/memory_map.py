"""The memory of a captured process as chunks: which page of which address is where. Pure functions and plain data.

    page map (runs of pages) --split--> windows of addresses --read, drop zero pages--> one chunk each
                                                             --compare with a parent--> a chunk of changes

A window covers WINDOW bytes of addresses and begins at a multiple of that, so that two snapshots of one program cut at
the same places and share the chunks that are equal. Where at least half of the pages of WIDE of them are not zero, they
are one wide window, which begins at a multiple of its own length: large memory then costs an eighth of the chunks and
calls, and is cut at the same places every time too. The length of a window's masks tells its width.

A chunk of a window holds some of its pages, one after another in ascending order; `held` tells which (bit i: page i of
the window). A window may take its pages from several chunks: an incremental capture adds a chunk with the pages that
changed and goes on using the others from where they were; `used` tells which pages count. A page that no piece has is
what its mapping has by itself: zero, or, in a private mapping of a file, what the file has. So zero pages may be left
out of the former only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from dormouse.errors import DamagedError
from dormouse.snapshot.criu_images import PAGE, Mapping, Run
from dormouse.store.chunk import DIGEST_SIZE, MAX_CHUNK, Buffer, Digest

WINDOW = 1 << 20
"""Bytes of addresses per window."""

WIDE = 8
"""Windows that are cut as one where memory is dense."""

PAGES = WINDOW // PAGE
MASK_SIZE = PAGES // 8
FULL = (1 << PAGES) - 1

_MOST_WINDOWS = 1 << 37  # 57 bits of addresses
_MOST_PIECES = 4
_MOST_WIDTH = MAX_CHUNK // WINDOW
_LARGE = 2 << 20
_ZERO_STEP = 16
# bytearray's comparison with a buffer is one memcmp; memoryview's own goes element by element.
_ZERO_PAGE = bytearray(PAGE)
_ZERO_PAGES = bytearray(_ZERO_STEP * PAGE)


class Piece(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Pages from one chunk: its number in the `digests`, the pages it holds and, unless all are, those that are used.
    Masks are little-endian."""

    chunk: int
    held: bytes
    used: bytes = b""


class Window(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The pages at addresses `number * WINDOW` and up that are not zero. All its masks are as long as the first."""

    number: int
    pieces: list[Piece]

    @property
    def width(self) -> int:
        """How many times WINDOW bytes of addresses it covers."""
        return len(self.pieces[0].held) // MASK_SIZE

    @property
    def end(self) -> int:
        """The number after its last."""
        return self.number + self.width


class AddressSpace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The private memory of one process. `pid` as in its images; `pages_id` is the N of CRIU's `pages-N.img`; `pages`
    counts those CRIU had in its page map, zero ones included."""

    pid: int
    pages_id: int
    pages: int
    windows: list[Window]
    digests: bytes

    @property
    def pagemap_name(self) -> str:
        """The name of its page map among CRIU's images."""
        return f"pagemap-{self.pid}.img"

    @property
    def pages_name(self) -> str:
        """The name of its pages among CRIU's images."""
        return f"pages-{self.pages_id}.img"

    def chunk_list(self) -> list[Digest]:
        """All chunks, by number."""
        return [Digest(self.digests[at : at + DIGEST_SIZE]) for at in range(0, len(self.digests), DIGEST_SIZE)]

    def used_pages(self) -> int:
        """Pages that are not zero."""
        return sum(used_mask(piece).bit_count() for window in self.windows for piece in window.pieces)


class Places:
    """Some ranges of addresses: (start, end) of each, from and to page borders, in any order."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._ranges: list[tuple[int, int]] = []
        for start, end in sorted(ranges):
            if self._ranges and start <= self._ranges[-1][1]:
                self._ranges[-1] = (self._ranges[-1][0], max(end, self._ranges[-1][1]))
            elif start < end:
                self._ranges.append((start, end))

    def mask(self, number: int, width: int = 1) -> int:
        """The pages of a window that lie in a range."""
        base = number * WINDOW
        mask = 0
        at = bisect_right(self._ranges, base, key=lambda found: found[1])
        for start, end in self._ranges[at : at + PAGES * width]:
            if start >= base + WINDOW * width:
                break
            first = max(0, (start - base) // PAGE)
            last = min(PAGES * width, (end - base) // PAGE)
            mask |= ((1 << (last - first)) - 1) << first
        return mask


class Span(NamedTuple):
    """The pages of one window that a page map names: `mask` bit i is page i."""

    number: int
    mask: int
    width: int = 1

    @property
    def bytes(self) -> int:
        """How long the pages are."""
        return self.mask.bit_count() * PAGE

    def narrow(self) -> Iterator[Span]:
        """The same pages as spans of one window each."""
        for at in range(self.width):
            if mask := self.mask >> at * PAGES & FULL:
                yield Span(self.number + at, mask)


class Spans:
    """Cuts runs, which arrive in ascending order, into spans: `add` yields those that are complete, `last` the rest."""

    def __init__(self) -> None:
        self._number = -1
        self._mask = 0

    def add(self, run: Run) -> Iterator[Span]:
        """Take one run."""
        address, left = run.address, run.pages
        while left:
            number, offset = divmod(address // PAGE, PAGES * WIDE)
            count = min(left, PAGES * WIDE - offset)
            if number != self._number:
                yield from self.last()
                self._number = number
            self._mask |= ((1 << count) - 1) << offset
            address, left = address + count * PAGE, left - count

    def last(self) -> Iterator[Span]:
        """The spans under way, if any."""
        stretch = Span(self._number * WIDE, self._mask, WIDE)
        if is_dense(self._mask, WIDE):
            yield stretch
        else:
            yield from stretch.narrow()
        self._mask = 0


def is_dense(mask: int, width: int) -> bool:
    """Whether these are so many of the pages of a stretch that it is worth one wide window."""
    return mask.bit_count() * 2 >= width * PAGES


def held_mask(piece: Piece) -> int:
    """The pages its chunk holds."""
    return int.from_bytes(piece.held, "little")


def used_mask(piece: Piece) -> int:
    """The pages that are taken from its chunk."""
    return int.from_bytes(piece.used or piece.held, "little")


def mask_bytes(mask: int, width: int = 1) -> bytes:
    """A mask of a window of that width as stored."""
    return mask.to_bytes(MASK_SIZE * width, "little")


def window_mask(window: Window) -> int:
    """The pages of a window that are not zero."""
    mask = 0
    for piece in window.pieces:
        mask |= used_mask(piece)
    return mask


def mask_runs(mask: int) -> Iterator[tuple[int, int]]:
    """The (first, count) of each run of set bits, ascending."""
    at = 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask >>= skip
        count = ((~mask) & (mask + 1)).bit_length() - 1
        yield at + skip, count
        mask >>= count
        at += skip + count


def runs_of(windows: Iterable[Window]) -> Iterator[Run]:
    """The pages of windows as a page map lists them, neighbours joined across windows."""
    address = pages = 0
    for window in windows:
        base = window.number * WINDOW
        for first, count in mask_runs(window_mask(window)):
            if address + pages * PAGE != base + first * PAGE:
                if pages:
                    yield Run(address, pages)
                address, pages = base + first * PAGE, 0
            pages += count
    if pages:
        yield Run(address, pages)


def squeeze(pages: memoryview, mask: int, sparse: int) -> int:
    """Drop those pages of `mask`, which lie one after another in `pages`, that are all zero and in `sparse` (where what
    is not there is zero), and move the others together; the mask of those that are left."""
    kept, packed = _kept(pages, mask, sparse)
    target = 0
    for first, count in mask_runs(packed):
        if first * PAGE != target:
            pages[target : target + count * PAGE] = pages[first * PAGE : (first + count) * PAGE]
        target += count * PAGE
    return kept


def _kept(pages: memoryview, mask: int, sparse: int) -> tuple[int, int]:
    """Of the pages that stay, the mask in the window, and the mask in the order in which they lie in `pages`."""
    filled = _filled(pages[: mask.bit_count() * PAGE])
    kept = packed = at = 0
    for first, count in mask_runs(mask):
        keep = (filled >> at | ~(sparse >> first)) & (1 << count) - 1
        kept |= keep << first
        packed |= keep << at
        at += count
    return kept, packed


def _filled(pages: memoryview) -> int:
    """Bit i: the i-th of some pages is not all zero. Long runs of zeros are common, and looked at in larger steps."""
    if len(pages) >= _LARGE:
        return _filled_large(pages)
    filled = 0
    for first in range(0, len(pages) // PAGE, _ZERO_STEP):
        step = pages[first * PAGE : (first + _ZERO_STEP) * PAGE]
        if _ZERO_PAGES.__eq__(step):
            continue
        for number in range(len(step) // PAGE):
            if not _ZERO_PAGE.__eq__(step[number * PAGE : (number + 1) * PAGE]):
                filled |= 1 << (first + number)
    return filled


def _filled_large(pages: memoryview) -> int:
    """The same by numpy, at the speed of memory and without the GIL; small processes need not wait for its import."""
    import numpy as np

    words = np.frombuffer(pages, np.uint64).reshape(-1, PAGE // 8)
    bits = np.packbits(np.bitwise_or.reduce(words, axis=1) != 0, bitorder="little")
    return int.from_bytes(bits.tobytes(), "little")


def changed_pages(pages: memoryview, mask: int, parent: memoryview, parent_mask: int) -> int:
    """The pages of `mask` (lying packed in `pages`) that `parent` (whose pages lie packed as `parent_mask`) has not, or
    has with another content."""
    changed = 0
    source = 0
    rest = mask
    while rest:
        bit = rest & -rest
        rest ^= bit
        if not parent_mask & bit:
            changed |= bit
        else:
            at = (parent_mask & (bit - 1)).bit_count() * PAGE
            if pages[source : source + PAGE].tobytes() != parent[at : at + PAGE].tobytes():
                changed |= bit
        source += PAGE
    return changed


def pick(pages: memoryview, held: int, wanted: int, into: memoryview, at: int = 0) -> int:
    """Copy the pages `wanted` of those `held` (packed in `pages`) to `into` from byte `at` on, packed; the byte after
    the last."""
    for first, count in mask_runs(wanted):
        # Neighbours in the window are neighbours in the chunk too: every page between them would have to be held.
        source = (held & ((1 << first) - 1)).bit_count() * PAGE
        length = count * PAGE
        into[at : at + length] = pages[source : source + length]
        at += length
    return at


def assemble(window: Window, chunk: Callable[[int], Buffer]) -> memoryview:
    """The non-zero pages of a window, packed in ascending order; `chunk(number)` gives a chunk's bytes."""
    if len(window.pieces) == 1 and not window.pieces[0].used:
        return memoryview(chunk(window.pieces[0].chunk)).cast("B")
    mask = window_mask(window)
    packed = memoryview(bytearray(mask.bit_count() * PAGE))
    for piece in window.pieces:
        held, data = held_mask(piece), memoryview(chunk(piece.chunk)).cast("B")
        for first, count in mask_runs(used_mask(piece)):
            source = (held & ((1 << first) - 1)).bit_count() * PAGE
            target = (mask & ((1 << first) - 1)).bit_count() * PAGE
            packed[target : target + count * PAGE] = data[source : source + count * PAGE]
    return packed


def check_length(length: int, held: int, digest: Digest) -> None:
    """Raises DamagedError when a chunk's length is not that of the pages it is said to hold."""
    if length != held.bit_count() * PAGE:
        raise DamagedError(
            f"chunk {digest.hex()} has {length} bytes where {held.bit_count()} pages are expected",
            remedy="Remove the snapshot with `dormouse rm`; it is then captured anew",
        )


def inherit(parent: Sequence[Piece], kept: int) -> list[Piece] | None:
    """The parent's pieces cut down to the pages `kept`, or None when storing the window anew is better: too many
    pieces, or more than half of what they hold is not used any more."""
    pieces = []
    for piece in parent:
        used = used_mask(piece) & kept
        if used:
            all_used = used == held_mask(piece)
            width = len(piece.held) // MASK_SIZE
            pieces.append(Piece(piece.chunk, piece.held, b"" if all_used else mask_bytes(used, width)))
    held = sum(held_mask(piece).bit_count() for piece in pieces)
    if len(pieces) >= _MOST_PIECES or held > 2 * kept.bit_count():
        return None
    return pieces


def plain_windows(windows: Iterable[Window], mappings: Sequence[Mapping]) -> set[int]:
    """The numbers of those windows of which every page lies in mappings that are plain (see Mapping)."""
    plain = Places((mapping.start, mapping.end) for mapping in mappings if mapping.plain)
    return {w.number for w in windows if not window_mask(w) & ~plain.mask(w.number, w.width)}


def check(space: AddressSpace, what: str) -> None:
    """Raises DamagedError when an address space from a stored record contradicts itself."""
    chunks = len(space.digests) // DIGEST_SIZE
    sound = len(space.digests) % DIGEST_SIZE == 0 and space.pid > 0 and space.pages_id >= 0 <= space.pages
    end = 0
    for window in space.windows:
        sound = sound and _is_sound(window.pieces, chunks) and end <= window.number <= _MOST_WINDOWS - window.width
        end = window.end if sound else 0
    if not sound:
        raise DamagedError(
            f"{what} is malformed at the memory of process {space.pid}",
            remedy="Remove it with `dormouse rm`; the model then starts cold and is captured anew",
        )


def _is_sound(pieces: Sequence[Piece], chunks: int) -> bool:
    seen = 0
    size = len(pieces[0].held) if pieces else 0
    if size % MASK_SIZE or not 0 < size <= _MOST_WIDTH * MASK_SIZE:
        return False
    for piece in pieces:
        if len(piece.held) != size or len(piece.used) not in (0, size) or not 0 <= piece.chunk < chunks:
            return False
        used = used_mask(piece)
        if not used or used & ~held_mask(piece) or used & seen:
            return False
        seen |= used
    return len(pieces) <= _MOST_PIECES
