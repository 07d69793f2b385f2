"""How one window of memory is brought back: read, check, decode, assemble. What threads of the host service (of which
each is one of many) and hands (processes with one thread each) do alike.

    WindowTask (a window, and where its chunks are) --WindowReader--> its pages, packed --ProcessMemory.write--> process
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from dormouse.errors import DamagedError
from dormouse.snapshot.criu_images import PAGE
from dormouse.snapshot.memory_map import WIDE, WINDOW, Window, assemble, check_length, held_mask, window_mask
from dormouse.store.chunk import Digest
from dormouse.store.codec import FLOATS, Codec
from dormouse.store.pack import StoredChunk, aligned
from dormouse.store.pack_reader import PackReader
from dormouse.transfer.memory import anonymous
from dormouse.transfer.source_files import SourceFile

_MERGED_AT_ONCE = 4
"""Wide windows of several pieces that threads put together at a time: each needs several times its size."""

_DIRECT_FROM = 2 << 20

_COPIED_AT_ONCE, _CODED_AT_ONCE = 6, 10
"""Large chunks that threads decode at a time: with LZ4 and zstd, which want memory of their own for the plain bytes,
and floats. So 16 threads stay within 256 MiB."""


class WindowTask(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A window of the process that its images call `pid`, and where the chunks of its pieces are, in their order."""

    pid: int
    window: Window
    chunks: list[StoredChunk]

    @property
    def plain_bytes(self) -> int:
        """What is written."""
        return PAGE * window_mask(self.window).bit_count()


def window_tasks(
    pid: int, windows: Iterable[Window], digests: list[Digest], chunks: Mapping[Digest, StoredChunk]
) -> Iterator[WindowTask]:
    """The tasks for windows of one process, whose chunks have the names `digests` and are where `chunks` says."""
    for window in windows:
        yield WindowTask(pid, window, [chunks[digests[piece.chunk]] for piece in window.pieces])


def fresh(length: int) -> memoryview:
    """New memory that begins at a page."""
    return memoryview(anonymous(length))[:length]


class WindowReader:
    """Reads windows: small chunks through the page cache; large ones past it where they are not in it, into memory of
    each thread's own. A context manager: at its end it closes the packs that it has opened."""

    def __init__(self, reader: PackReader) -> None:
        self._reader = reader
        self._files: dict[int, SourceFile] = {}
        self._lock = threading.Lock()
        self._local = threading.local()
        self._merging = threading.BoundedSemaphore(_MERGED_AT_ONCE)
        self._copied = threading.BoundedSemaphore(_COPIED_AT_ONCE)
        self._floats = threading.BoundedSemaphore(_CODED_AT_ONCE)

    def close(self) -> None:
        """Close the packs. No read may be under way. Idempotent."""
        files, self._files = self._files, {}
        for file in files.values():
            file.close()

    def pages(self, task: WindowTask, buffer: Callable[[int], memoryview]) -> memoryview:
        """The pages of a window, packed; where one large chunk has them all, in memory that `buffer` gives, which
        begins at a page. Raises DamagedError that names chunk and pack, before any byte is used."""
        window = task.window
        for piece, chunk in zip(window.pieces, task.chunks, strict=True):
            check_length(chunk.plain_length, held_mask(piece), chunk.digest)
        found = {piece.chunk: chunk for piece, chunk in zip(window.pieces, task.chunks, strict=True)}
        if window.width == 1:
            return assemble(window, lambda number: self._reader.plain(found[number]))
        if len(window.pieces) == 1 and not window.pieces[0].used:
            return self._plain_into(task.chunks[0], buffer(task.chunks[0].plain_length))
        with self._merging:
            return assemble(window, lambda number: self._reader.plain(found[number]))

    def buffer(self, length: int) -> memoryview:
        """This thread's buffer for plain bytes, valid until its next call."""
        return self._own("plain", length)

    def advise(self, chunks: Iterable[StoredChunk]) -> None:
        """Tell the kernel what will soon be read through its cache."""
        for chunk in chunks:
            if not self.reads_directly(chunk):
                self._reader.advise(chunk)

    def reads_directly(self, chunk: StoredChunk) -> bool:
        """Whether a chunk is large, and best read past the page cache."""
        if chunk.stored_length < _DIRECT_FROM:
            return False
        self._reader.check_row(chunk)
        return self._file(chunk).prefers_direct(chunk.offset, chunk.stored_length)

    def _plain_into(self, chunk: StoredChunk, out: memoryview) -> memoryview:
        turn = self._floats if chunk.codec in FLOATS else self._copied
        with contextlib.nullcontext() if chunk.codec == Codec.RAW else turn:
            self._read_into(chunk, out)
        return out

    def _read_into(self, chunk: StoredChunk, out: memoryview) -> None:
        if not self.reads_directly(chunk):
            self._reader.plain_into(chunk, out)
            return
        raw = chunk.codec == Codec.RAW
        buffer = out if raw else self._own("stored", aligned(chunk.stored_length))
        try:
            stored = self._file(chunk).read_around(buffer, chunk.offset, chunk.stored_length, direct=True)
        except DamagedError as error:
            raise self._reader.damaged(chunk, error.message) from error
        self._reader.check(chunk, stored)
        if not raw:
            self._reader.decode_into(chunk, stored, out)
        elif len(stored) != len(out):
            raise self._reader.damaged(chunk, f"it has {len(stored)} raw bytes instead of {len(out)}")

    def _file(self, chunk: StoredChunk) -> SourceFile:
        with self._lock:
            file = self._files.get(chunk.pack)
            if file is None:
                file = self._files[chunk.pack] = SourceFile(self._reader.pack(chunk), ours=True)
            return file

    def _own(self, name: str, length: int) -> memoryview:
        found: memoryview | None = getattr(self._local, name, None)
        if found is None or len(found) < length:
            found = fresh(max(length, WIDE * WINDOW))
            setattr(self._local, name, found)
        return found[:length]
