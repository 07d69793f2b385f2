"""The parts of CRIU's image files that Dormouse reads and writes. No I/O here: bytes in, bytes out.

An image is two little-endian 32-bit magics and then entries: a 32-bit length and a proto2 message each (CRIU's
images/*.proto). Read are: page maps (which pages of a process or of shared memory a `pages-N.img` holds), the mappings
of a process (`mm`) and the names of their files (`files`), the process tree (`pstree`), and of `core` the machine and
whether the task was stopped. Written are page maps alone.
Whatever is not understood raises DamagedError; unknown fields are skipped, as protobuf demands.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from dormouse.errors import DamagedError

PAGE = 4096

_HEAD = struct.Struct("<II")
_LENGTH = struct.Struct("<I")
_COMMON_MAGIC = 0x54564319
_PAGEMAP_MAGIC = 0x56084025
_MM_MAGIC = 0x57492820
_PSTREE_MAGIC = 0x50273030
_CORE_MAGIC = 0x55053847
_FILES_MAGIC = 0x56303138
_INVENTORY_MAGIC = 0x58313116

_INVENTORY_VERSIONS = (1, 2)
_IN_PARENT, _PRESENT = 1, 4  # the flags of a page map's entry; 2 (lazy) says nothing to a restore that is not lazy
_MAX_ENTRY = 16 << 20
_MAX_PAGES = 1 << 31
_ADDRESS_LIMIT = 1 << 57

_WRITE = 2  # PROT_WRITE
_SHARED, _PRIVATE, _ANONYMOUS, _GROWS_DOWN = 0x01, 0x02, 0x20, 0x0100  # MAP_*
_FILE_AREA = 1 << 6 | 1 << 7  # VMA_FILE_PRIVATE, VMA_FILE_SHARED in CRIU's image.h
_PRIVATE_ANONYMOUS_AREA = 1 << 9  # VMA_ANON_PRIVATE
_KERNEL_AREA = 1 << 2 | 1 << 3 | 1 << 12 | 1 << 17  # VMA_AREA_VSYSCALL, _VDSO, _VVAR, _UPROBES: anonymous to CRIU
_GUARD_AREA = 1 << 16  # no mapping, but a note about a part of one; these come after all mappings
_TASK_STOPPED = 3
_HUGE_PAGES, _NO_HUGE_PAGES = 14, 15  # MADV_*
_MACHINES = {1: "x86_64", 2: "arm", 3: "aarch64", 4: "ppc64le", 5: "s390x", 6: "mips64", 7: "loongarch64", 8: "riscv64"}


class Run(NamedTuple):
    """Neighbouring pages: `address` of the first in bytes, and how many."""

    address: int
    pages: int


class Mapping(NamedTuple):
    """One mapping of a process. `plain` is private anonymous memory that the process may write to and that does not
    grow by itself; `sparse` any private anonymous memory: what was never written there is zero. `file` is the number of
    its file in the `files` image and `offset` where in it the mapping begins."""

    start: int
    end: int
    plain: bool
    sparse: bool = False
    shared: bool = False
    protection: int = 0
    file: int | None = None
    offset: int = 0


class Task(NamedTuple):
    """One process of the tree; `parent` is 0 for its root."""

    pid: int
    parent: int


def entries(data: bytes, magic: int, what: str) -> Iterator[bytes]:
    """The messages of an image. Raises DamagedError naming `what`."""
    if len(data) < _HEAD.size or _HEAD.unpack_from(data) != (_COMMON_MAGIC, magic):
        raise _malformed(what, "it does not begin with the magic of such an image")
    at = _HEAD.size
    while at < len(data):
        if at + _LENGTH.size > len(data):
            raise _malformed(what, "it ends inside an entry's length")
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if at + length > len(data):
            raise _malformed(what, "it ends inside an entry")
        yield data[at : at + length]
        at += length


def fields(message: bytes, what: str) -> Iterator[tuple[int, int | bytes]]:
    """The (number, value) of each field of a protobuf message, in order: whole numbers, or bytes for the rest."""
    for number, value, _begin, _end in _placed_fields(message, what):
        yield number, value


def _placed_fields(message: bytes, what: str) -> Iterator[tuple[int, int | bytes, int, int]]:
    """The same, with where in the message each field begins and ends."""
    at = 0
    while at < len(message):
        begin = at
        tag, at = _varint(message, at, what)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(message, at, what)
            yield number, value, begin, at
            continue
        if kind == 2:
            length, at = _varint(message, at, what)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise _malformed(what, f"a field has the unknown wire type {kind}")
        if at + length > len(message):
            raise _malformed(what, "a field is longer than its message")
        at += length
        yield number, message[at - length : at], begin, at


class PagemapParser:
    """A page map that arrives in pieces. `pages_id` is the N of its `pages-N.img`, known after the first entry."""

    def __init__(self, what: str) -> None:
        self.pages_id: int | None = None
        self._what = what
        self._rest = b""
        self._begun = False
        self._end = 0

    def feed(self, data: bytes) -> list[Run]:
        """The runs that are complete now, with ascending addresses that don't overlap. Raises DamagedError."""
        self._rest += data
        runs: list[Run] = []
        if not self._begun:
            if len(self._rest) < _HEAD.size:
                return runs
            if _HEAD.unpack_from(self._rest) != (_COMMON_MAGIC, _PAGEMAP_MAGIC):
                raise _malformed(self._what, "it does not begin with the magic of a page map")
            self._rest, self._begun = self._rest[_HEAD.size :], True
        at = 0
        while at + _LENGTH.size <= len(self._rest):
            (length,) = _LENGTH.unpack_from(self._rest, at)
            if length > _MAX_ENTRY:
                raise _malformed(self._what, f"an entry claims {length} bytes")
            if at + _LENGTH.size + length > len(self._rest):
                break
            at += _LENGTH.size + length
            run = self._entry(self._rest[at - length : at])
            if run is not None:
                runs.append(run)
        self._rest = self._rest[at:]
        return runs

    def finish(self) -> int:
        """The map is through: its `pages_id`. Raises DamagedError when it ends in the middle."""
        if self._rest or self.pages_id is None:
            raise _malformed(self._what, "it ends in the middle")
        return self.pages_id

    def _entry(self, message: bytes) -> Run | None:
        values = _numbers(message, self._what)
        if self.pages_id is None:
            self.pages_id = _required(values, 1, self._what)
            return None
        run = Run(_required(values, 1, self._what), values.get(5) or _required(values, 2, self._what))
        flags = values.get(4, _PRESENT)
        if values.get(3) or flags & _IN_PARENT:
            raise _malformed(self._what, "it has pages that are in the images of an earlier dump (a parent)")
        if not flags & _PRESENT:
            raise _malformed(self._what, "it has pages that were never written (a lazy dump)")
        end = run.address + run.pages * PAGE
        if run.address % PAGE or run.address < self._end or not 0 < run.pages < _MAX_PAGES or end > _ADDRESS_LIMIT:
            raise _malformed(self._what, f"its entry at {run.address:#x} with {run.pages} pages makes no sense")
        self._end = end
        return run


def parse_pagemap(data: bytes, what: str) -> tuple[int, list[Run]]:
    """A whole page map: the N of its `pages-N.img`, and its runs. Raises DamagedError."""
    parser = PagemapParser(what)
    runs = parser.feed(data)
    return parser.finish(), runs


def encode_pagemap(pages_id: int, runs: Iterable[Run]) -> bytes:
    """A page map as CRIU reads it."""
    messages = [_field(1, pages_id)]
    messages += (_field(1, run.address) + _field(2, run.pages) + _field(4, _PRESENT) for run in runs)
    return _HEAD.pack(_COMMON_MAGIC, _PAGEMAP_MAGIC) + b"".join(
        _LENGTH.pack(len(message)) + message for message in messages
    )


def parse_mappings(data: bytes, what: str) -> list[Mapping]:
    """The mappings in an `mm` image, in its order (ascending addresses). Raises DamagedError."""
    mappings = []
    for message in entries(data, _MM_MAGIC, what):
        for number, value in fields(message, what):
            if number == 14 and isinstance(value, bytes) and (mapping := _mapping(value, what)) is not None:
                mappings.append(mapping)
    return mappings


def _mapping(message: bytes, what: str) -> Mapping | None:
    values = _numbers(message, what)
    start, end, offset, file, protection, flags, status = (
        _required(values, number, what) for number in (1, 2, 3, 4, 5, 6, 7)
    )
    if start >= end or start % PAGE or end % PAGE:
        raise _malformed(what, f"its mapping from {start:#x} to {end:#x} makes no sense")
    if status & _GUARD_AREA:
        return None
    anonymous = flags & (_PRIVATE | _ANONYMOUS) == _PRIVATE | _ANONYMOUS and bool(status & _PRIVATE_ANONYMOUS_AREA)
    sparse = anonymous and not status & _KERNEL_AREA
    return Mapping(
        start,
        end,
        plain=sparse and bool(protection & _WRITE) and not flags & _GROWS_DOWN,
        sparse=sparse,
        shared=bool(flags & _SHARED),
        protection=protection,
        file=file if status & _FILE_AREA else None,
        offset=offset,
    )


def with_huge_pages(data: bytes, starts: Collection[int], what: str) -> bytes:
    """An `mm` image in which the mappings that begin at `starts` are to have huge pages, as if their process had asked
    for them; one for which it asked for the opposite is left alone. Raises DamagedError."""
    messages = (_with_huge_pages(message, starts, what) for message in entries(data, _MM_MAGIC, what))
    return data[: _HEAD.size] + b"".join(_LENGTH.pack(len(message)) + message for message in messages)


def _with_huge_pages(message: bytes, starts: Collection[int], what: str) -> bytes:
    parts = []
    for number, value, begin, end in _placed_fields(message, what):
        part = message[begin:end]
        if number == 14 and isinstance(value, bytes):
            values = _numbers(value, what)
            advice = values.get(9, 0)
            if values.get(1) in starts and not advice >> _NO_HUGE_PAGES & 1:
                asking = value + _field(9, advice | 1 << _HUGE_PAGES)  # of a field that comes twice, the last counts
                part = bytes([14 << 3 | 2]) + _encoded(len(asking)) + asking
        parts.append(part)
    return b"".join(parts)


def parse_tree(data: bytes, what: str) -> list[Task]:
    """The processes of a `pstree` image, parents first. Raises DamagedError."""
    found = (_numbers(message, what) for message in entries(data, _PSTREE_MAGIC, what))
    return [Task(_required(values, 1, what), values.get(2, 0)) for values in found]


def parse_file_names(data: bytes, what: str) -> dict[int, str]:
    """The names of the regular files in a `files` image, by number. Raises DamagedError."""
    names = {}
    for message in entries(data, _FILES_MAGIC, what):
        for number, value in fields(message, what):
            if number == 3 and isinstance(value, bytes):
                file = dict(fields(value, what))
                name, identity = file.get(6), file.get(1)
                if isinstance(name, bytes) and isinstance(identity, int):
                    names[identity] = os.fsdecode(name)
    return names


def machine_of(data: bytes, what: str) -> str | None:
    """The machine that the task of a `core` image ran on, as `platform.machine` names it; None for one that is not
    known here. Raises DamagedError."""
    for message in entries(data, _CORE_MAGIC, what):
        return _MACHINES.get(_required(_numbers(message, what), 1, what))
    raise _malformed(what, "it is empty")


def check_inventory(data: bytes, what: str) -> None:
    """Raises DamagedError when an `inventory` image is none that this program knows."""
    # It alone has no common magic before its own: it is what tells that all others have one.
    message = next(entries(_LENGTH.pack(_COMMON_MAGIC) + data, _INVENTORY_MAGIC, what), b"")
    version = _required(_numbers(message, what), 1, what)
    if version not in _INVENTORY_VERSIONS:
        raise _malformed(what, f"it is of version {version}")


def was_stopped(data: bytes, what: str) -> bool:
    """Whether the task of a `core` image was stopped (SIGSTOP, ^Z) when it was dumped. Raises DamagedError."""
    for message in entries(data, _CORE_MAGIC, what):
        for number, value in fields(message, what):
            if number == 3 and isinstance(value, bytes):
                return _numbers(value, what).get(1) == _TASK_STOPPED
    return False


def _numbers(message: bytes, what: str) -> dict[int, int]:
    return {number: value for number, value in fields(message, what) if isinstance(value, int)}


def _required(values: dict[int, int], number: int, what: str) -> int:
    if number not in values:
        raise _malformed(what, f"an entry lacks field {number}")
    return values[number]


def _varint(data: bytes, at: int, what: str) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
    raise _malformed(what, "a number has no end")


def _field(number: int, value: int) -> bytes:
    return bytes([number << 3]) + _encoded(value)


def _encoded(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


def _malformed(what: str, why: str) -> DamagedError:
    return DamagedError(
        f"the CRIU image {what} is malformed: {why}", remedy="Capture again; `dormouse verify` checks the store"
    )
