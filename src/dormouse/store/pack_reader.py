"""Reads stored chunks whose places are known: read, check the signature, decode. Needs the packs and the key, and no
index, so that processes that are lent a list of places can use it too."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from dormouse.errors import DamagedError, StoreError
from dormouse.store.chunk import Buffer, Digest
from dormouse.store.codec import Codec, decode, decode_into
from dormouse.store.files import VERIFY_REMEDY, open_ours, read_all, read_into, reading
from dormouse.store.key import Key, same
from dormouse.store.pack import StoredChunk, chunk_mac, makes_sense, pack_name


class PackReader:
    """Open packs of one folder; `stored`, `plain` and `plain_into` may be called by many threads at once. Somebody must
    keep the packs from being deleted meanwhile. `on_damage` is told the name of each chunk that is found damaged."""

    def __init__(self, packs: Path, key: Key, on_damage: Callable[[Digest], None]) -> None:
        self.packs = packs
        self.key = key
        self._on_damage = on_damage
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def pack(self, chunk: StoredChunk) -> Path:
        """The file that a chunk is in."""
        return self.packs / pack_name(chunk.pack)

    def plain(self, chunk: StoredChunk) -> Buffer:
        """A chunk's plain bytes, checked. Raises DamagedError that names chunk and pack."""
        stored = self.stored(chunk)
        try:
            return decode(chunk.codec, stored, chunk.plain_length)
        except DamagedError as error:
            raise self.damaged(chunk, error.message) from error

    def plain_into(self, chunk: StoredChunk, out: memoryview) -> None:
        """Write a chunk's plain bytes to `out`, which has their length, with as few copies as its codec permits: raw
        bytes are read straight into it. Raises DamagedError that names chunk and pack; `out` then has any content."""
        if len(out) != chunk.plain_length:
            raise ValueError(f"{len(out)} bytes of memory for a chunk of {chunk.plain_length}")
        raw = chunk.codec == Codec.RAW
        stored = self._checked(chunk, out if raw else None)
        if not raw:
            self.decode_into(chunk, stored, out)
        elif len(stored) != len(out):
            raise self.damaged(chunk, f"it has {len(stored)} raw bytes instead of {len(out)}")

    def decode_into(self, chunk: StoredChunk, stored: Buffer, out: memoryview) -> None:
        """Write the plain bytes of a chunk that is not raw to `out`. Raises DamagedError, as `plain_into`."""
        try:
            decode_into(chunk.codec, stored, out)
        except DamagedError as error:
            raise self.damaged(chunk, error.message) from error

    def stored(self, chunk: StoredChunk) -> Buffer:
        """A chunk's stored bytes, checked. Valid until this thread's next call. Raises DamagedError."""
        return self._checked(chunk, None)

    def _checked(self, chunk: StoredChunk, out: memoryview | None) -> Buffer:
        self.check_row(chunk)
        stored = self._read(chunk, out) if chunk.stored_length else b""
        self.check(chunk, stored)
        return stored

    def check_row(self, chunk: StoredChunk) -> None:
        """Before a chunk's place is used. Raises DamagedError."""
        if not makes_sense(chunk):
            raise self.damaged(chunk, "its row of the index makes no sense")

    def check(self, chunk: StoredChunk, stored: Buffer) -> None:
        """Whether these are a chunk's stored bytes. Raises DamagedError."""
        if len(stored) != chunk.stored_length:
            raise self.damaged(chunk, "the pack ends before it")
        mac = chunk_mac(self.key, chunk.digest, chunk.codec, chunk.plain_length, stored)
        if not same(mac, chunk.mac):
            raise self.damaged(chunk, "its bytes do not match their signature")

    def advise(self, chunk: StoredChunk) -> None:
        """Tell the kernel that a chunk's stored bytes will soon be read. A hint: a pack that is gone or unreadable is
        an error of the read itself."""
        if chunk.stored_length and makes_sense(chunk):  # no length would mean the rest of the pack
            with contextlib.suppress(StoreError), self._pack(chunk) as fd:
                os.posix_fadvise(fd, chunk.offset, chunk.stored_length, os.POSIX_FADV_WILLNEED)

    def arrive(self, chunk: StoredChunk) -> None:
        """Wait until the last of a chunk's stored bytes is in memory. A hint, as `advise` is."""
        if chunk.stored_length and makes_sense(chunk):
            with contextlib.suppress(StoreError), self._pack(chunk) as fd:
                read_all(fd, 1, chunk.offset + chunk.stored_length - 1)

    def close(self) -> None:
        """Close the packs. No call may be under way. Idempotent."""
        files, self._files = self._files, {}
        for fd in files.values():
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _read(self, chunk: StoredChunk, out: memoryview | None) -> Buffer:
        with self._pack(chunk) as fd:
            if out is not None:
                return out[: read_into(fd, out[: chunk.stored_length], chunk.offset)]
            if chunk.codec == Codec.RAW:  # handed on as it is, so it needs memory of its own
                return read_all(fd, chunk.stored_length, chunk.offset)
            buffer = self._scratch(chunk.stored_length)
            return buffer[: read_into(fd, buffer, chunk.offset)]

    @contextlib.contextmanager
    def _pack(self, chunk: StoredChunk) -> Iterator[int]:
        """A chunk's pack, open; whatever fails with it in the block is damage of the chunk."""
        try:
            with reading(self.packs / pack_name(chunk.pack)):
                yield self._file(chunk.pack)
        except FileNotFoundError:
            raise self.damaged(chunk, "the pack is missing") from None
        except DamagedError as error:
            raise self.damaged(chunk, "the disk can't read it") from error

    def _scratch(self, length: int) -> memoryview:
        """This thread's own memory for coded bytes, used again and again: fresh memory costs a page fault per 4 KiB."""
        scratch: memoryview = getattr(self._local, "scratch", memoryview(b""))
        if len(scratch) < length:
            scratch = self._local.scratch = memoryview(bytearray(length))
        return scratch[:length]

    def _file(self, number: int) -> int:
        with self._lock:
            fd = self._files.get(number)
            if fd is None:
                fd = self._files[number] = open_ours(self.packs / pack_name(number))
            return fd

    def damaged(self, chunk: StoredChunk, why: str) -> DamagedError:
        """The error to raise; also told to who made this reader."""
        self._on_damage(chunk.digest)
        return DamagedError(
            f"chunk {chunk.digest.hex()} in {self.packs / pack_name(chunk.pack)} is damaged: {why}",
            remedy=VERIFY_REMEDY,
        )
