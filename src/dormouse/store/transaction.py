"""A transaction: chunks go into packs of its own that nobody sees until `commit` makes the whole of it visible.

Many threads may `put` at once: hashing, looking up, coding and writing run side by side.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from dormouse.errors import StoreError
from dormouse.store.chunk import MAX_CHUNK, Buffer, Digest, digest_of, is_zero
from dormouse.store.codec import FLOATS, Codec, encode
from dormouse.store.files import FileLock, discard, replace_file, sync_folder, system_errors
from dormouse.store.index import add_manifest, add_pack
from dormouse.store.layout import Layout
from dormouse.store.manifest import Manifest, encode_manifest, manifest_name
from dormouse.store.marks import drop_marks
from dormouse.store.pack import PackWriter, StoredChunk

log = logging.getLogger(__name__)

Choose = Callable[[memoryview], Codec]

FLOATS_AT_ONCE = 6
"""Threads that code floats when the codec is chosen by content: to code a chunk takes up to 20 MiB beside it."""
_SPREAD_FROM = 256 << 20
_MOST_PACKS = 8


class Reserved(NamedTuple):
    """Where some chunks are to be written, in one pack. Those without an offset are there already."""

    writer: PackWriter
    offsets: list[int | None]
    stored_lengths: list[int]


class _Packs:
    """The packs that one transaction writes: one, and, when much comes from many threads at once, some more, for in the
    kernel the writes to one file go one after another. A chunk is in one of them: the caller asks once for each."""

    def __init__(self, layout: Layout, first: PackWriter) -> None:
        self._layout = layout
        self._busy = {first: 0}
        self._bytes = 0
        self._lock = threading.Lock()

    def append(self, digest: Digest, codec: Codec, plain_length: int, stored: Buffer) -> bool:
        """Add a chunk; False when it is there already."""
        writer = self._take(len(stored))
        try:
            return writer.append(digest, codec, plain_length, stored)
        finally:
            self._release(writer)

    def reserve(self, chunks: Sequence[StoredChunk]) -> Reserved:
        """Places for chunks."""
        lengths = [chunk.stored_length for chunk in chunks]
        writer = self._take(sum(lengths))
        try:
            return Reserved(writer, writer.reserve(chunks), lengths)
        except BaseException:
            self._release(writer)
            raise

    def written(self, reserved: Reserved, whole: bool) -> None:
        """See `PackWriter.written`."""
        try:
            reserved.writer.written(whole)
        finally:
            self._release(reserved.writer)

    def filled(self) -> list[PackWriter]:
        """Those that have chunks."""
        return [writer for writer in self._busy if writer.entries]

    def close(self) -> None:
        """Let go of all; what was not installed is removed. Idempotent."""
        with contextlib.ExitStack() as exits:
            for writer in self._busy:
                exits.callback(writer.close)

    def _release(self, writer: PackWriter) -> None:
        with self._lock:
            self._busy[writer] -= 1

    def _take(self, length: int) -> PackWriter:
        with self._lock:
            writer = min(self._busy, key=self._busy.__getitem__)
            if self._busy[writer] and self._bytes >= _SPREAD_FROM and len(self._busy) < _MOST_PACKS:
                writer = self._layout.new_writer()
                self._busy[writer] = 0
            self._busy[writer] += 1
            self._bytes += length
            return writer


class Transaction:
    """Made by `Store.begin`; a context manager. Leaving it without `commit` leaves no trace.

    `raw_bytes` are the plain bytes put, `stored_bytes` the bytes of payload added, `new_chunks` how many chunks the
    store did not have. After any error of `put`, `commit` refuses.
    """

    def __init__(self, layout: Layout, in_use: FileLock, writer: PackWriter) -> None:
        self.raw_bytes = 0
        self.stored_bytes = 0
        self.new_chunks = 0
        self._layout = layout
        self._in_use = in_use
        self._packs = _Packs(layout, writer)
        self._coding = threading.BoundedSemaphore(FLOATS_AT_ONCE)
        self._lengths: dict[Digest, int] = {}
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._end()

    def has(self, chunks: Sequence[tuple[Digest, int]]) -> list[bool]:
        """Which chunks (name, length) are there already; those are then used, as if they had been put. Thread-safe."""
        with self._lock:
            there = {digest for digest, _length in chunks if digest in self._lengths}
        there |= self._layout.index.present(digest for digest, _length in chunks if digest not in there)
        with self._lock:
            for digest, length in chunks:
                if digest in there:
                    self.raw_bytes += length
                    self._lengths[digest] = length
        return [digest in there for digest, _length in chunks]

    def lacks(self, chunks: Sequence[tuple[Digest, int]]) -> list[bool]:
        """Which of the chunks (name, length) that are put must still be stored: by `reserve`, which its caller then
        owes. Of several callers who put the same chunk, one is told so, and of a chunk that is named twice, the first.
        """
        new = []
        with self._lock:
            for digest, length in chunks:
                new.append(digest not in self._lengths)
                self._lengths[digest] = length
                self.raw_bytes += length
        asked = (digest for (digest, _length), is_new in zip(chunks, new, strict=True) if is_new)
        there = self._layout.index.present(asked)
        return [is_new and digest not in there for (digest, _length), is_new in zip(chunks, new, strict=True)]

    def reserve(self, chunks: Sequence[StoredChunk]) -> Reserved:
        """Places for chunks that are coded and signed (their own pack and offset don't count), which another process is
        to write there; `written` tells the outcome, once for all. Thread-safe."""
        for chunk in chunks:
            if not chunk.stored_length <= chunk.plain_length <= MAX_CHUNK:
                raise StoreError(f"a chunk of {chunk.plain_length} bytes can't have {chunk.stored_length} stored ones")
        return self._packs.reserve(chunks)

    def written(self, reserved: Reserved, *, whole: bool) -> None:
        """Chunks are in their places; or, if not `whole`, not all ever will be, and nothing can be committed."""
        self._packs.written(reserved, whole)
        new = [
            length
            for offset, length in zip(reserved.offsets, reserved.stored_lengths, strict=True)
            if offset is not None
        ]
        with self._lock:
            if whole:
                self.stored_bytes += sum(new)
                self.new_chunks += len(new)
            else:
                self._error = self._error or StoreError("a chunk could not be written")

    def put(
        self,
        plain: Buffer,
        *,
        codec: Codec | Choose = Codec.LZ4,
        payload: Buffer | None = None,
        digest: Digest | None = None,
    ) -> Digest:
        """Store a chunk unless it is there already; its name. Thread-safe. `codec` may be a function that is asked
        when the chunk is to be stored. `digest` is its name, where that is known.

        `payload` is what `codec` makes of the chunk, where somebody has coded it already; they answer for it that it
        decodes to the chunk, which is not tried again here. An all-zero chunk is stored as such all the same.

        Raises DiskFullError, StoreError. `plain` may be used again as soon as this returns.
        """
        view = memoryview(plain).cast("B")
        if len(view) > MAX_CHUNK:
            raise StoreError(f"a chunk of {len(view)} bytes is too long; at most {MAX_CHUNK} are allowed")
        if payload is not None and (codec not in FLOATS or len(payload) * 8 > len(view) * 7):
            name = codec.name if isinstance(codec, Codec) else str(codec)
            raise StoreError(f"a payload of {len(payload)} bytes is not what {name} stores for {len(view)}")
        digest = digest_of(view) if digest is None else digest
        try:
            if self.lacks([(digest, len(view))])[0]:
                self._append(digest, view, codec, payload)
        except BaseException as error:
            self._error = self._error or error
            raise
        return digest

    def commit(self, manifest: Manifest) -> None:
        """Make the manifest and every chunk it names durable and visible, all or nothing. Ends the transaction.

        Raises StoreError when a chunk it names is not in the store or the id is taken, DiskFullError.
        """
        if self._ended:
            raise StoreError("this transaction has ended")
        if self._error is not None:
            raise self._error
        target = self._layout.manifests / manifest_name(manifest.id)
        raw_bytes = self._raw_bytes_of(manifest.refs)
        self._layout.checkpoint("begin")
        for writer in self._packs.filled():
            writer.finish()
        self._layout.checkpoint("pack written")
        with self._layout.change():
            self._publish(manifest, target, raw_bytes)
        self._layout.checkpoint("index written")
        self._end()

    def _append(self, digest: Digest, view: memoryview, codec: Codec | Choose, payload: Buffer | None) -> None:
        if payload is None or is_zero(view):
            used, stored = encode(view, codec) if isinstance(codec, Codec) else self._encode_bulk(view, codec(view))
        else:
            assert isinstance(codec, Codec)
            used, stored = codec, payload
        if self._packs.append(digest, used, len(view), stored):
            with self._lock:
                self.stored_bytes += len(stored)
                self.new_chunks += 1

    def _encode_bulk(self, view: memoryview, codec: Codec) -> tuple[Codec, Buffer]:
        with self._coding if codec in FLOATS else contextlib.nullcontext():
            return encode(view, codec)

    def _raw_bytes_of(self, refs: Sequence[Digest]) -> int:
        lengths = dict(self._lengths)
        stored = self._layout.index.locate(digest for digest in refs if digest not in lengths)
        lengths.update((digest, chunk.plain_length) for digest, chunk in stored.items())
        for digest in refs:
            if digest not in lengths:
                raise StoreError(f"the manifest names chunk {digest.hex()}, which was never put into this store")
        return sum(lengths[digest] for digest in refs)

    def _publish(self, manifest: Manifest, target: Path, raw_bytes: int) -> None:
        """The files first, they are the truth; then the index. Undone when the index refuses (its disk may be full)."""
        if target.exists():
            raise StoreError(f"there is a manifest {manifest.id} already", remedy="Commit it under another id")
        numbers: list[int] = []
        try:
            with self._layout.index.change() as connection:
                for writer in self._packs.filled():
                    numbers.append(self._layout.install(writer))
                    add_pack(connection, numbers[-1], writer.entries.values())
                self._layout.checkpoint("pack named")
                add_manifest(connection, manifest, raw_bytes, self._layout.key)
                self._write_manifest(manifest.id, target, encode_manifest(manifest, raw_bytes, self._layout.key))
                self._layout.checkpoint("manifest named")
        except BaseException:
            self._undo(target, numbers)
            raise

    def _undo(self, target: Path, numbers: Sequence[int]) -> None:
        """The manifest first, and for certain: one that stays, or comes back with a power cut, must find its packs."""
        try:
            target.unlink(missing_ok=True)
            sync_folder(target.parent)
        except OSError as error:
            log.warning("%s may stay although its commit failed: %s", target, error)
            return
        for number in numbers:
            discard(self._layout.pack(number))

    def _write_manifest(self, manifest_id: str, target: Path, data: bytes) -> None:
        drop_marks(self._layout.marks(manifest_id))  # a removal that was killed has left them
        with system_errors(target, "committing", len(data)):
            replace_file(target, data, lambda: self._layout.checkpoint("manifest written"))

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            try:
                self._packs.close()
            finally:
                self._in_use.release()
