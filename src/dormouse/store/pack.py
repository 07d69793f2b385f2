"""Packs: append-only files of stored chunks (docs/formats.md has the bytes).

A pack grows under a temporary name that its writer keeps locked, gets its table and trailer at commit, is made durable,
and only then gets its number as name; from then on it never changes. Payloads begin at multiples of 4 KiB.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import xxhash

from dormouse.errors import DamagedError, StoreError
from dormouse.store.chunk import MAX_CHUNK, Buffer, Digest
from dormouse.store.codec import Codec
from dormouse.store.files import (
    PREAMBLE_SIZE,
    VERIFY_REMEDY,
    check_preamble,
    create_file,
    preamble,
    system_errors,
    write_all,
)

MAGIC = b"DORMPACK"
END_MAGIC = b"DORMPEND"
VERSION = 1
ALIGNMENT = 4096

_CHECKED = struct.Struct("<32sBI")
_ENTRY = struct.Struct("<32s16sQIIB7x")
_TRAILER = struct.Struct("<QQ16s8s")
_CODECS = frozenset(Codec)


class StoredChunk(NamedTuple):
    """Where and how a chunk is stored. `pack` is the number of its pack."""

    digest: Digest
    checksum: bytes
    pack: int
    offset: int
    stored_length: int
    plain_length: int
    codec: int


def checksum_of(digest: Digest, codec: int, plain_length: int, stored: Buffer) -> bytes:
    """XXH3-128 of a chunk's identity and payload, so that a row that points to another chunk's bytes is found too."""
    state = xxhash.xxh3_128(_CHECKED.pack(digest, codec, plain_length))
    state.update(stored)
    return state.digest()


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
    """One growing pack. `append` may be called by many threads; the file is theirs one after another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[Digest, StoredChunk] = {}
        self._lock = threading.Lock()
        self._end = ALIGNMENT
        with system_errors(path, "creating"):
            self._fd = create_file(path)
            fcntl.flock(self._fd, fcntl.LOCK_EX)  # tells cleaners that the writer lives

    def append(self, digest: Digest, codec: Codec, plain_length: int, stored: Buffer) -> bool:
        """Add a chunk; False when it is there already."""
        checksum = checksum_of(digest, codec, plain_length, stored)
        with self._lock:
            if self._fd < 0:
                raise StoreError(f"{self.path.name} takes no more chunks: its transaction has ended")
            if digest in self.entries:
                return False
            offset = self._end if stored else 0
            with system_errors(self.path, "writing to", len(stored)):
                write_all(self._fd, stored, offset)
            self._end += aligned(len(stored))
            self.entries[digest] = StoredChunk(digest, checksum, 0, offset, len(stored), plain_length, codec)
        return True

    def finish(self) -> None:
        """Write preamble, table and trailer and make the bytes durable."""
        table = b"".join(_packed(entry) for entry in self.entries.values())
        with system_errors(self.path, "writing to", len(table)):
            write_all(self._fd, preamble(MAGIC, VERSION), 0)
            write_all(self._fd, table + _trailer(self._end, table), self._end)
            os.fsync(self._fd)

    def close(self) -> None:
        """Let go of the file; what was not renamed before is removed. Idempotent."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            self.path.unlink(missing_ok=True)
            os.close(fd)


def _packed(entry: StoredChunk) -> bytes:
    return _ENTRY.pack(entry.digest, entry.checksum, entry.offset, entry.stored_length, entry.plain_length, entry.codec)


def _trailer(offset: int, table: bytes) -> bytes:
    count = len(table) // _ENTRY.size
    return _TRAILER.pack(offset, count, _table_checksum(offset, count, table), END_MAGIC)


def _table_checksum(offset: int, count: int, table: bytes) -> bytes:
    return xxhash.xxh3_128_digest(struct.pack("<QQ", offset, count) + table)


def read_table(path: Path, number: int) -> list[StoredChunk]:
    """The table of a committed pack. Raises DamagedError, StoreError for a newer version, FileNotFoundError."""
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        what = f"the pack {path.name}"
        check_preamble(os.pread(file.fileno(), PREAMBLE_SIZE, 0), MAGIC, VERSION, what)
        offset, count = _read_trailer(file.fileno(), size, what)
        body = os.pread(file.fileno(), size - offset, offset)
    table, trailer = body[: -_TRAILER.size], body[-_TRAILER.size :]
    if _TRAILER.unpack(trailer)[2] != _table_checksum(offset, count, table):
        raise _damaged(what, "its table of chunks does not match its checksum")
    chunks = [_unpacked(fields, number) for fields in _ENTRY.iter_unpack(table)]
    for chunk in chunks:
        if not makes_sense(chunk) or chunk.offset + chunk.stored_length > offset:
            raise _damaged(what, f"its entry of chunk {chunk.digest.hex()[:16]} makes no sense")
    return chunks


def _read_trailer(fd: int, size: int, what: str) -> tuple[int, int]:
    trailer = os.pread(fd, _TRAILER.size, max(0, size - _TRAILER.size))
    if size < ALIGNMENT + _TRAILER.size or len(trailer) != _TRAILER.size:
        raise _damaged(what, "it is cut short")
    offset, count, _checksum, magic = _TRAILER.unpack(trailer)
    if magic != END_MAGIC:
        raise _damaged(what, "it does not end as a pack does")
    if offset < ALIGNMENT or offset % ALIGNMENT or offset + count * _ENTRY.size + _TRAILER.size != size:
        raise _damaged(what, "its table of chunks is not where its end says")
    return offset, count


def _unpacked(fields: tuple[bytes, bytes, int, int, int, int], number: int) -> StoredChunk:
    digest, checksum, offset, stored_length, plain_length, codec = fields
    return StoredChunk(Digest(digest), checksum, number, offset, stored_length, plain_length, codec)


def makes_sense(chunk: StoredChunk) -> bool:
    """Whether a chunk's fields are such as a writer makes; rows that are not must not even reach the disk."""
    if chunk.codec == Codec.ZERO:
        placed = chunk.offset == 0 == chunk.stored_length
    else:
        placed = chunk.offset >= ALIGNMENT and chunk.offset % ALIGNMENT == 0 and chunk.stored_length > 0
    sized = chunk.stored_length <= chunk.plain_length <= MAX_CHUNK and chunk.plain_length >= 0
    return placed and sized and chunk.codec in _CODECS


def _damaged(what: str, why: str) -> DamagedError:
    return DamagedError(f"{what} is damaged: {why}", remedy=VERIFY_REMEDY)
