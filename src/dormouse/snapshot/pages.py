"""Single pages of a snapshot's private memory, and where its bytes are, without unpacking the rest.

    mm image --> mappings ----+
    windows (manifest body) --+--> extents: this window, from here to there --> only their chunks --> bytes
                              +--> per mapping: pages, stored pages, stored bytes

A page is stored, or zero because nothing was ever written to it, or in none of the snapshot's memory: a page of a file
that the process had not changed, memory shared between processes, the kernel's own. The last kinds are refused by an
error that says so; nothing is read before it is known that every byte asked for can be given.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dormouse.errors import NotFoundError, RequestError
from dormouse.snapshot.criu_images import PAGE, Mapping, parse_file_names, parse_mappings
from dormouse.snapshot.images import SnapshotBody, image_bytes
from dormouse.snapshot.memory_map import (
    WINDOW,
    AddressSpace,
    Places,
    Window,
    check_length,
    held_mask,
    mask_runs,
    used_mask,
    window_mask,
)
from dormouse.store.chunk import Buffer, Digest

Plain = Callable[[Digest], Buffer]
"""Gives a chunk's plain bytes, checked."""

_KERNEL = "memory of the kernel's own (vdso, vvar, vsyscall), which differs from boot to boot"


class Extent(NamedTuple):
    """Neighbouring bytes within one window; `window` is None when they are all zero."""

    number: int
    start: int
    end: int
    window: Window | None


@dataclass(frozen=True)
class ProcessMap:
    """The mappings of one process of a snapshot, and the stored part of its memory."""

    space: AddressSpace
    mappings: list[Mapping]
    files: dict[int, str]

    def describe(self, mapping: Mapping) -> str:
        """What a mapping is of."""
        if mapping.file is not None:
            return self.files.get(mapping.file, "a file that is no regular one")
        if mapping.sparse:
            return "private memory"
        return "shared memory" if mapping.shared else "kernel"


def permissions(mapping: Mapping) -> str:
    """As /proc/PID/maps shows them."""
    letters = "".join(letter if mapping.protection >> bit & 1 else "-" for bit, letter in enumerate("rwx"))
    return letters + ("s" if mapping.shared else "p")


class MappingUse(NamedTuple):
    """How much of a mapping is stored. `stored_bytes` is its share of the coded chunks its windows need."""

    mapping: Mapping
    what: str
    pages: int
    stored_pages: int
    stored_bytes: int


def process_map(body: SnapshotBody, pid: int | None, plain: Plain) -> ProcessMap:
    """The map of process `pid` of a snapshot, or of its only one. Raises RequestError, NotFoundError, DamagedError."""
    space = _space(body, pid)
    name = f"mm-{space.pid}.img"
    mappings = parse_mappings(image_bytes(body, name, plain), name)
    files = parse_file_names(image_bytes(body, "files.img", plain), "files.img") if body.image("files.img") else {}
    return ProcessMap(space, mappings, files)


def _space(body: SnapshotBody, pid: int | None) -> AddressSpace:
    pids = ", ".join(str(space.pid) for space in body.memory)
    if pid is None and len(body.memory) != 1:
        raise RequestError(f"the snapshot has the processes {pids}", param="pid", remedy="Name one with --pid")
    for space in body.memory:
        if pid in (None, space.pid):
            return space
    raise NotFoundError(f"the snapshot has no process {pid}", remedy=f"It has {pids}")


def extents(memory: ProcessMap, address: int, length: int) -> Iterator[Extent]:
    """Where the bytes from `address` on are, in order. All is checked before this returns. Raises RequestError;
    NotFoundError when some are not in the snapshot."""
    if address < 0 or length < 1 or address + length > 1 << 64:
        raise RequestError(
            f"{length} bytes at {address:#x} are no range of addresses",
            param="length",
            remedy="Give an address of 64 bits, and a length of at least 1",
        )
    at = address
    for mapping in sorted(memory.mappings, key=lambda found: found.start):
        if mapping.start <= at < min(mapping.end, address + length):
            end = min(mapping.end, address + length)
            if not mapping.sparse:  # where it is sparse, which may be many terabytes, every byte is there
                _refuse_missing(memory, at, end)
            at = end
    if at < address + length:
        following = (mapping.start for mapping in memory.mappings if mapping.start > at)
        raise _elsewhere(memory, at, min([address + length, *following]) - at)
    return _cut(memory.space.windows, address, address + length)


def _refuse_missing(memory: ProcessMap, start: int, end: int) -> None:
    """Raises NotFoundError when a page of a range is not stored."""
    for extent in _cut(memory.space.windows, start, end):
        missing = _pages_between(extent.start, extent.end) & ~(window_mask(extent.window) if extent.window else 0)
        if missing:
            first, count = next(mask_runs(missing))
            raise _elsewhere(memory, extent.number * WINDOW + first * PAGE, count * PAGE)


def _cut(windows: Sequence[Window], start: int, end: int) -> Iterator[Extent]:
    """A range, window by window."""
    at = _first_beyond(windows, start)
    while start < end:
        number = start // WINDOW
        window = windows[at] if at < len(windows) and windows[at].number <= number else None
        first, following = (window.number, window.end) if window else (number, number + 1)
        stop = min(end, following * WINDOW)
        yield Extent(first, start - first * WINDOW, stop - first * WINDOW, window)
        at += window is not None
        start = stop


def _first_beyond(windows: Sequence[Window], address: int) -> int:
    """Which is the first window that ends beyond an address."""
    return bisect_right(windows, address // WINDOW, key=lambda window: window.end)


def read(memory: ProcessMap, found: Iterable[Extent], plain: Plain) -> Iterator[bytes]:
    """Their bytes, extent by extent; only the chunks that hold some of them are read. Raises DamagedError."""
    digests = memory.space.chunk_list()
    for extent in found:
        if extent.window is None:
            yield bytes(extent.end - extent.start)
        else:
            yield _window_bytes(extent.window, extent.start, extent.end, digests, plain)


def _window_bytes(window: Window, start: int, end: int, digests: Sequence[Digest], plain: Plain) -> bytes:
    wanted = _pages_between(start, end)
    base = start // PAGE * PAGE
    pages = bytearray(-(-end // PAGE) * PAGE - base)
    for piece in window.pieces:
        held, used = held_mask(piece), used_mask(piece) & wanted
        if not used:
            continue
        data = memoryview(plain(digests[piece.chunk])).cast("B")
        check_length(len(data), held, digests[piece.chunk])
        for first, count in mask_runs(used):
            source = (held & ((1 << first) - 1)).bit_count() * PAGE
            pages[first * PAGE - base : (first + count) * PAGE - base] = data[source : source + count * PAGE]
    return bytes(pages[start - base : end - base])


def _pages_between(start: int, end: int) -> int:
    """The pages of a window that the bytes from `start` to `end` touch."""
    return (1 << -(-end // PAGE)) - (1 << start // PAGE)


def _elsewhere(memory: ProcessMap, address: int, length: int) -> NotFoundError:
    """The error for bytes that are not in the snapshot's private memory."""
    place = f"{address:#x} to {address + length:#x} of process {memory.space.pid}"
    mapping = next((m for m in memory.mappings if m.start <= address < m.end), None)
    if mapping is None:
        return NotFoundError(
            f"nothing is mapped at {place}", remedy="`dormouse inspect ID --maps` lists what is mapped"
        )
    if mapping.file is not None and not mapping.shared:
        offset = mapping.offset + address - mapping.start
        why = f"there the process sees {memory.describe(mapping)} from offset {offset:#x} on, unchanged"
        return NotFoundError(f"the bytes at {place} are not in the snapshot: {why}", remedy="Read them from that file")
    what = f"{memory.describe(mapping)}, mapped shared" if mapping.shared else _KERNEL
    return NotFoundError(
        f"the bytes at {place} are not in the snapshot's private memory: there is {what}",
        remedy="`dormouse export` writes all images, those of shared memory too",
    )


def usage(memory: ProcessMap, stored_length: Callable[[Digest], int]) -> list[MappingUse]:
    """How much of each mapping is stored, in its order. Pages of windows outside all mappings count nowhere."""
    digests = memory.space.chunk_list()
    windows = memory.space.windows
    rows = []
    for mapping in memory.mappings:
        place = Places([(mapping.start, mapping.end)])
        at = _first_beyond(windows, mapping.start)
        pages = stored = 0
        while at < len(windows) and windows[at].number * WINDOW < mapping.end:
            inside = place.mask(windows[at].number, windows[at].width)
            for piece in windows[at].pieces:
                used = used_mask(piece)
                count = (used & inside).bit_count()
                pages += count
                stored += stored_length(digests[piece.chunk]) * count // used.bit_count()
            at += 1
        what = memory.describe(mapping)
        rows.append(MappingUse(mapping, what, (mapping.end - mapping.start) // PAGE, pages, stored))
    return rows


def hex_lines(address: int, parts: Iterable[bytes]) -> Iterator[str]:
    """A hex dump of bytes that come in parts, with the printable characters beside them, 16 a line."""
    rest = b""
    for part in parts:
        rest += part
        whole = len(rest) - len(rest) % 16
        for at in range(0, whole, 16):
            yield _hex_line(address + at, rest[at : at + 16])
        address, rest = address + whole, rest[whole:]
    if rest:
        yield _hex_line(address, rest)


def _hex_line(address: int, line: bytes) -> str:
    pairs = " ".join(line[i : i + 2].hex() for i in range(0, len(line), 2))
    text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in line)
    return f"{address:016x}: {pairs:<39}  {text}"
