"""Weights in memory: one segment per checkpoint, shared by every cell that uses it, freed with the last.

    take(checkpoint, user, device) -> handle at once, the segment fills behind it -> ... -> release(user)

Segments of this machine's memory are made here; those on a GPU by the loader, which has a pool like this one for each.

A segment that was taken with `keep` stays for a while when its last user has gone, so that the next one finds it in
memory, decoded: the kept ones together take at most `keep_bytes`, and those that were longest unused go first. Whoever
keeps accounts of memory is told what they take (`kept`), and may have any of them go (`forget`).

The handle's pipe tells when the segment is filled, or why it never will be. A failed fill is forgotten at once: who
has its handle is told, and the next `take` begins anew.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable
from typing import Protocol

from dormouse.checkpoint.tensors import decode_body
from dormouse.checkpoint.writer import CHECKPOINT_KIND
from dormouse.errors import DamagedError, DormouseError, HostError, NotFoundError, StoreError
from dormouse.phases import host_clock
from dormouse.store.store import Manifest, Reader, Store
from dormouse.transfer.handles import Filled, SegmentHandle, send_report
from dormouse.transfer.segment import Segment, fill

_MODEL_REMEDY = "Restart `dormouse serve` if the model was imported anew; else import it again with --replace"
_ADAPTER_REMEDY = (
    "Unload the adapter and load it again if it was imported anew; else import it again with --replace first"
)
_MAX_KEPT = 256  # every answer of the host service names all of them
log = logging.getLogger(__name__)


class Block(Protocol):
    """A segment to be: memory, and how a checkpoint comes into it."""

    @property
    def size(self) -> int:
        """In bytes."""

    def fill(self, cancelled: threading.Event) -> int:
        """Bring all of it; the bytes it takes as it is stored. Raises DormouseError."""

    def handle(self, report: int | None) -> SegmentHandle:
        """What a worker needs to map it. Raises OSError."""

    def close(self) -> None:
        """Let go of the memory."""


class _OfHost:
    """A block of this machine's memory."""

    def __init__(self, store: Store, manifest: Manifest, size: int) -> None:
        self._segment = Segment.create(f"dormouse {manifest.name}"[:200], size)
        self._store = store
        self._manifest = manifest
        self.size = size
        self.handle = self._segment.handle
        self.close = self._segment.close

    def fill(self, cancelled: threading.Event) -> int:
        return fill(self._segment, self._store, self._manifest.refs, cancelled=cancelled)


class Elsewhere(Protocol):
    """Where segments on GPUs are: `checkpoint.loader.Loader`."""

    def take(self, checkpoint: str, user: str, device: str) -> SegmentHandle: ...

    def release(self, user: str, checkpoint: str | None = None) -> None: ...


class _Shared:
    """A segment, who uses it, and the pipes of those who wait for it (None: it is filled)."""

    def __init__(self, segment: Block) -> None:
        self.segment = segment
        self.users: set[str] = set()
        self.waiting: list[int] | None = []
        self.cancelled = threading.Event()
        self.keep = False


class SegmentPool:
    """The segments of one host service, or of one GPU. Every method may be called from any thread and returns at once
    (once the loader has, which may have to be started, for segments on a GPU)."""

    def __init__(
        self,
        store: Store,
        *,
        keep_bytes: int = 0,
        make: Callable[[Manifest, int], Block] | None = None,
        loader: Elsewhere | None = None,
    ) -> None:
        """`make`: a block for a checkpoint of so many bytes, by default of this machine's memory."""
        self._store = store
        self._make = make or functools.partial(_OfHost, store)
        self._loader = loader
        self._keep_bytes = keep_bytes
        self._lock = threading.Lock()
        self._segments: dict[str, _Shared] = {}  # kept ones too, in the order in which they were last used

    def take(
        self, checkpoint: str, user: str, *, keep: bool = False, adapter: bool = False, device: str = "cpu"
    ) -> SegmentHandle:
        """The segment of a checkpoint for `user`, filled or filling. On a GPU nothing is kept that nobody uses. Raises
        NotFoundError, DamagedError, HostError."""
        if device != "cpu":
            if self._loader is None:
                raise HostError(f"nothing can be loaded onto {device} here", remedy="Set the model's device to cpu")
            return self._loader.take(checkpoint, user, device)
        try:
            with self._lock:
                shared = self._segments.get(checkpoint) or self._begin(checkpoint, adapter=adapter)
                shared.users.add(user)
                shared.keep = keep
                return _handle(shared)
        except OSError as error:
            self.release(user, checkpoint)
            raise HostError(f"a segment can't be handed out: {error.strerror}") from error

    def release(self, user: str, checkpoint: str | None = None) -> None:
        """The user has let go of its segments, or of that of one checkpoint. Idempotent."""
        if self._loader is not None:
            self._loader.release(user, checkpoint)
        with self._lock:
            for name in [checkpoint] if checkpoint is not None else list(self._segments):
                shared = self._segments.get(name)
                if shared is not None and user in shared.users:
                    shared.users.discard(user)
                    if not shared.users:
                        self._retire(name, shared)

    def forget(self, checkpoint: str) -> None:
        """Do not keep its segment any more than those who use it now do."""
        with self._lock:
            shared = self._segments.get(checkpoint)
            if shared is not None:
                shared.keep = False
                if not shared.users:
                    self._retire(checkpoint, shared)

    @property
    def kept(self) -> dict[str, int]:
        """The segments without a user and the bytes they take, the longest unused first."""
        with self._lock:
            return self._unused()

    def _unused(self) -> dict[str, int]:
        return {name: shared.segment.size for name, shared in self._segments.items() if not shared.users}

    def _retire(self, checkpoint: str, shared: _Shared) -> None:
        """The last user has gone: keep the segment, as the one used last, or free it."""
        del self._segments[checkpoint]
        if not shared.keep or shared.waiting is not None or shared.segment.size > self._keep_bytes:
            _free(shared)
            return
        self._segments[checkpoint] = shared
        unused = self._unused()
        for name in list(unused):
            if sum(unused.values()) <= self._keep_bytes and len(unused) <= _MAX_KEPT:
                return
            del unused[name]
            _free(self._segments.pop(name))

    def _begin(self, checkpoint: str, *, adapter: bool) -> _Shared:
        manifest = self._manifest(checkpoint, _ADAPTER_REMEDY if adapter else _MODEL_REMEDY)
        body = decode_body(manifest.body, f"the checkpoint of {manifest.name}")
        shared = _Shared(self._make(manifest, body.size))
        thread = threading.Thread(
            target=self._fill, args=(checkpoint, manifest, shared), name=f"fill {manifest.name}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:
            shared.segment.close()
            raise HostError(f"no thread could be started to fill a segment: {error}") from error
        self._segments[checkpoint] = shared
        return shared

    def _manifest(self, checkpoint: str, remedy: str) -> Manifest:
        try:
            manifest = self._store.manifest(checkpoint)
        except NotFoundError as error:
            raise NotFoundError(f"the weights are gone: there is no checkpoint {checkpoint}", remedy=remedy) from error
        if manifest.kind != CHECKPOINT_KIND:
            raise DamagedError(f"{checkpoint} is no checkpoint but a {manifest.kind}", remedy=remedy)
        return manifest

    def _fill(self, checkpoint: str, manifest: Manifest, shared: _Shared) -> None:
        error: DormouseError | None = None
        filled: Filled | None = None
        begin = host_clock()
        try:
            stored = shared.segment.fill(shared.cancelled)
            filled = Filled(begin, host_clock(), shared.segment.size, stored)
        except DamagedError as damage:
            error = DamagedError(
                f"the weights of {manifest.name} can't be read: {damage.message}",
                remedy=f"Import it again: dormouse import SOURCE --name {manifest.name} --replace",
            )
        except DormouseError as failure:
            error = failure
        except Exception as failure:
            log.exception("filling the segment of %s failed", manifest.name)
            error = StoreError(f"the weights of {manifest.name} can't be read: {failure!r}")
        self._settle(checkpoint, shared, error, filled)
        if isinstance(error, DamagedError):
            with self._store.reader() as reader:
                note_damage(reader, manifest)

    def _settle(self, checkpoint: str, shared: _Shared, error: DormouseError | None, filled: Filled | None) -> None:
        with self._lock:
            waiting, shared.waiting = shared.waiting or [], None
            if error is not None and self._segments.get(checkpoint) is shared:
                del self._segments[checkpoint]
            if self._segments.get(checkpoint) is not shared:
                shared.segment.close()
        if error is not None and not shared.cancelled.is_set():
            log.warning("%s", error)
        for pipe in waiting:
            send_report(pipe, error, filled)


def note_damage(reader: Reader, manifest: Manifest) -> None:
    """Check every chunk of a checkpoint that is found damaged; one damage seldom comes alone. The store remembers, so
    that the next import of the same weights stores these chunks afresh."""
    for digest in manifest.refs:
        with contextlib.suppress(StoreError):  # it is noted by the reader
            reader.stored(reader.locate([digest])[0])


def _free(shared: _Shared) -> None:
    shared.cancelled.set()
    if shared.waiting is None:  # else the thread that fills it closes it
        shared.segment.close()


def _handle(shared: _Shared) -> SegmentHandle:
    if shared.waiting is None:
        return shared.segment.handle(None)
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        handle = shared.segment.handle(reading)
    except BaseException:
        os.close(reading)
        os.close(writing)
        raise
    shared.waiting.append(writing)
    return handle
