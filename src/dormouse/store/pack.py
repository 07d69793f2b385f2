"""Packs: append-only files of stored chunks (docs/formats.md has the bytes).

A pack grows under a temporary name that its writer keeps locked, gets its table and trailer at commit, is made durable,
and only then gets its number as name; from then on it never changes. Payloads begin at multiples of 4 KiB.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from dormouse.errors import DamagedError, StoreError
from dormouse.store.chunk import MAX_CHUNK, Buffer, Digest
from dormouse.store.codec import Codec
from dormouse.store.files import (
    PREAMBLE_SIZE,
    VERIFY_REMEDY,
    check_preamble,
    closing_fd,
    create_file,
    discard,
    open_ours,
    preamble,
    read_all,
    reading,
    start_writeback,
    system_errors,
    write_all,
)
from dormouse.store.key import Key, same

MAGIC = b"DORMPACK"
END_MAGIC = b"DORMPEND"
VERSION = 1
ALIGNMENT = 4096
MAC_SIZE = 16

_IDENTITY = struct.Struct("<32sBI")
IDENTITY_SIZE = _IDENTITY.size
_ENTRY = struct.Struct("<32s16sQIIB7x")
_TRAILER = struct.Struct("<QQ16s8s")
_MAX_OFFSET = 1 << 60
_CODECS = frozenset(Codec)
_WRITEBACK_STEP = 64 << 20
"""Without a hint the kernel leaves gigabytes in memory until the pack is finished, and then the disk is waited for."""


class StoredChunk(NamedTuple):
    """Where and how a chunk is stored. `pack` is the number of its pack."""

    digest: Digest
    mac: bytes
    pack: int
    offset: int
    stored_length: int
    plain_length: int
    codec: int


def chunk_mac(key: Key, digest: Digest, codec: int, plain_length: int, stored: Buffer) -> bytes:
    """The signature of a chunk's identity and payload, so that a row that points to other bytes is found too."""
    return key.chunks.mac(MAC_SIZE, stored, identity(digest, codec, plain_length))


def identity(digest: Digest, codec: int, plain_length: int) -> bytes:
    """What is signed of a chunk beside its payload, and after it."""
    return _IDENTITY.pack(digest, codec, plain_length)


def aligned(length: int) -> int:
    """`length` rounded up to the alignment."""
    return -(-length // ALIGNMENT) * ALIGNMENT


def pack_size(chunks: Collection[StoredChunk]) -> int:
    """The bytes of a pack of these chunks alone."""
    payload = sum(aligned(chunk.stored_length) for chunk in chunks)
    return ALIGNMENT + payload + len(chunks) * _ENTRY.size + _TRAILER.size


def pack_name(number: int) -> str:
    """The file name of pack `number`."""
    return f"{number:08d}.pack"


class PackWriter:
    """One growing pack. `append` may be called by many threads: each takes a place and writes there by itself."""

    def __init__(self, path: Path, key: Key) -> None:
        self.path = path
        self.installed = False
        self._key = key
        self.entries: dict[Digest, StoredChunk] = {}
        self._changed = threading.Condition()
        self._writing = 0
        self._whole = True
        self._end = ALIGNMENT
        self._sent = 0  # up to here the kernel was told to write
        with system_errors(path, "creating"):
            self._fd = create_file(path)
            fcntl.flock(self._fd, fcntl.LOCK_EX)  # tells cleaners that the writer lives

    def append(self, digest: Digest, codec: Codec, plain_length: int, stored: Buffer) -> bool:
        """Add a chunk; False when it is there already, or another thread is just writing it."""
        mac = chunk_mac(self._key, digest, codec, plain_length, stored)
        (offset,) = self.reserve([StoredChunk(digest, mac, 0, 0, len(stored), plain_length, codec)])
        whole = False
        try:
            if offset is not None:
                with system_errors(self.path, "writing to", len(stored)):
                    write_all(self._fd, stored, offset)
            whole = True
        finally:
            self.written(whole)
        return offset is not None

    def reserve(self, chunks: Iterable[StoredChunk]) -> list[int | None]:
        """Give chunks, whose own offsets do not count, places for somebody to write them to, who then says `written`,
        once; None for those that are there already, or are just being written."""
        with self._changed:
            if self._fd < 0:
                raise StoreError(f"{self.path.name} takes no more chunks: its transaction has ended")
            offsets = [self._place(chunk) for chunk in chunks]
            self._writing += 1
        return offsets

    def _place(self, chunk: StoredChunk) -> int | None:
        if chunk.digest in self.entries:
            return None
        offset = self._end if chunk.stored_length else 0
        self._end += aligned(chunk.stored_length)
        self.entries[chunk.digest] = chunk._replace(offset=offset)
        return offset

    def written(self, whole: bool) -> None:
        """What was reserved is in its places, or, if not `whole`, never will be."""
        if whole:
            self._hint()
        with self._changed:
            self._writing -= 1
            self._whole &= whole
            self._changed.notify_all()

    def _hint(self) -> None:
        with self._changed:
            begin, end = self._sent, self._end
            if end - begin < _WRITEBACK_STEP:
                return
            self._sent = end
        start_writeback(self._fd, begin, end - begin)

    def finish(self) -> None:
        """Write preamble, table and trailer and make the bytes durable. Raises StoreError when a chunk was not
        written."""
        if not self._whole or self._writing:
            raise StoreError(f"{self.path.name} lacks a chunk that could not be written")
        table = b"".join(_packed(entry) for entry in self.entries.values())
        with system_errors(self.path, "writing to", len(table)):
            write_all(self._fd, preamble(MAGIC, VERSION, self._key.id), 0)
            write_all(self._fd, table + _trailer(self._key, self._end, table), self._end)
            os.fsync(self._fd)

    def install(self, target: Path) -> None:
        """Give the finished pack its name; the caller syncs the folder."""
        self.path.rename(target)
        self.installed = True

    def close(self) -> None:
        """Let go of the file; what was not installed before is removed. Idempotent."""
        with self._changed:
            self._changed.wait_for(lambda: not self._writing)  # nobody may write to a number that is another file's
            fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                if not self.installed:
                    discard(self.path)
            finally:
                os.close(fd)


def _packed(entry: StoredChunk) -> bytes:
    return _ENTRY.pack(entry.digest, entry.mac, entry.offset, entry.stored_length, entry.plain_length, entry.codec)


def _trailer(key: Key, offset: int, table: bytes) -> bytes:
    count = len(table) // _ENTRY.size
    return _TRAILER.pack(offset, count, _table_mac(key, offset, count, table), END_MAGIC)


def _table_mac(key: Key, offset: int, count: int, table: bytes) -> bytes:
    return key.tables.mac(MAC_SIZE, table, struct.pack("<QQ", offset, count))


def read_table(path: Path, number: int, key: Key) -> list[StoredChunk]:
    """The table of a committed pack. Raises DamagedError, UntrustedError, StoreError for a newer version,
    FileNotFoundError."""
    what = f"the pack {path.name}"
    with reading(path), closing_fd(open_ours(path)) as fd:
        size = os.fstat(fd).st_size
        check_preamble(read_all(fd, PREAMBLE_SIZE, 0), MAGIC, VERSION, key.id, what)
        offset, count = _read_trailer(fd, size, what)
        body = read_all(fd, size - offset, offset)
    table, trailer = body[: -_TRAILER.size], body[-_TRAILER.size :]
    if len(body) != size - offset or not same(_TRAILER.unpack(trailer)[2], _table_mac(key, offset, count, table)):
        raise _damaged(what, "its table of chunks does not match its signature")
    chunks = [_unpacked(fields, number) for fields in _ENTRY.iter_unpack(table)]
    for chunk in chunks:
        if not makes_sense(chunk) or chunk.offset + chunk.stored_length > offset:
            raise _damaged(what, f"its entry of chunk {chunk.digest.hex()[:16]} makes no sense")
    return chunks


def _read_trailer(fd: int, size: int, what: str) -> tuple[int, int]:
    trailer = read_all(fd, _TRAILER.size, max(0, size - _TRAILER.size))
    if size < ALIGNMENT + _TRAILER.size or len(trailer) != _TRAILER.size:
        raise _damaged(what, "it is cut short")
    offset, count, _mac, magic = _TRAILER.unpack(trailer)
    if magic != END_MAGIC:
        raise _damaged(what, "it does not end as a pack does")
    if offset < ALIGNMENT or offset % ALIGNMENT or offset + count * _ENTRY.size + _TRAILER.size != size:
        raise _damaged(what, "its table of chunks is not where its end says")
    return offset, count


def _unpacked(fields: tuple[bytes, bytes, int, int, int, int], number: int) -> StoredChunk:
    digest, mac, offset, stored_length, plain_length, codec = fields
    return StoredChunk(Digest(digest), mac, number, offset, stored_length, plain_length, codec)


def makes_sense(chunk: StoredChunk) -> bool:
    """Whether a chunk's fields are such as a writer makes; rows that are not must not even reach the disk."""
    if chunk.codec == Codec.ZERO:
        placed = chunk.offset == 0 == chunk.stored_length
    else:
        placed = ALIGNMENT <= chunk.offset <= _MAX_OFFSET and chunk.offset % ALIGNMENT == 0 and chunk.stored_length > 0
    sized = chunk.stored_length <= chunk.plain_length <= MAX_CHUNK and chunk.plain_length >= 0
    return placed and sized and chunk.codec in _CODECS


def _damaged(what: str, why: str) -> DamagedError:
    return DamagedError(f"{what} is damaged: {why}", remedy=VERIFY_REMEDY)
