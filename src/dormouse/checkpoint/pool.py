"""Weights in memory: one segment per checkpoint, shared by every cell that uses it, freed with the last.

    take(checkpoint, user) -> handle at once, the segment fills behind it -> ... -> release(user)

The handle's pipe tells when the segment is filled, or why it never will be. A failed fill is forgotten at once: who
has its handle is told, and the next `take` begins anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading

from dormouse.checkpoint.tensors import decode_body
from dormouse.checkpoint.writer import CHECKPOINT_KIND
from dormouse.errors import DamagedError, DormouseError, HostError, NotFoundError, StoreError
from dormouse.store.store import Manifest, Reader, Store
from dormouse.transfer.handles import SegmentHandle, send_report
from dormouse.transfer.segment import Segment, fill

log = logging.getLogger(__name__)


class _Shared:
    """A segment, who uses it, and the pipes of those who wait for it (None: it is filled)."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.users: set[str] = set()
        self.waiting: list[int] | None = []
        self.cancelled = threading.Event()


class SegmentPool:
    """The segments of one host service. Every method may be called from any thread and returns at once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._segments: dict[str, _Shared] = {}

    def take(self, checkpoint: str, user: str) -> SegmentHandle:
        """The segment of a checkpoint for `user`, filled or filling. Raises NotFoundError, DamagedError, HostError."""
        try:
            with self._lock:
                shared = self._segments.get(checkpoint) or self._begin(checkpoint)
                shared.users.add(user)
                return _handle(shared)
        except OSError as error:
            self.release(user)
            raise HostError(f"a segment can't be handed out: {error.strerror}") from error

    def release(self, user: str) -> None:
        """The user has let go of its segments. Idempotent."""
        with self._lock:
            for checkpoint, shared in list(self._segments.items()):
                shared.users.discard(user)
                if not shared.users:
                    del self._segments[checkpoint]
                    shared.cancelled.set()
                    if shared.waiting is None:  # else the thread that fills it closes it
                        shared.segment.close()

    def _begin(self, checkpoint: str) -> _Shared:
        manifest = self._manifest(checkpoint)
        body = decode_body(manifest.body, f"the checkpoint of {manifest.name}")
        shared = _Shared(Segment.create(f"dormouse {manifest.name}"[:200], body.size))
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

    def _manifest(self, checkpoint: str) -> Manifest:
        remedy = "Restart `dormouse serve` if the model was imported anew; else import it again with --replace"
        try:
            manifest = self._store.manifest(checkpoint)
        except NotFoundError as error:
            raise NotFoundError(f"the weights are gone: there is no checkpoint {checkpoint}", remedy=remedy) from error
        if manifest.kind != CHECKPOINT_KIND:
            raise DamagedError(f"{checkpoint} is no checkpoint but a {manifest.kind}", remedy=remedy)
        return manifest

    def _fill(self, checkpoint: str, manifest: Manifest, shared: _Shared) -> None:
        error: DormouseError | None = None
        try:
            fill(shared.segment, self._store, manifest.refs, cancelled=shared.cancelled)
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
        self._settle(checkpoint, shared, error)
        if isinstance(error, DamagedError):
            with self._store.reader() as reader:
                note_damage(reader, manifest)

    def _settle(self, checkpoint: str, shared: _Shared, error: DormouseError | None) -> None:
        with self._lock:
            waiting, shared.waiting = shared.waiting or [], None
            if error is not None and self._segments.get(checkpoint) is shared:
                del self._segments[checkpoint]
            if self._segments.get(checkpoint) is not shared:
                shared.segment.close()
        if error is not None and not shared.cancelled.is_set():
            log.warning("%s", error)
        for pipe in waiting:
            send_report(pipe, error)


def note_damage(reader: Reader, manifest: Manifest) -> None:
    """Check every chunk of a checkpoint that is found damaged; one damage seldom comes alone. The store remembers, so
    that the next import of the same weights stores these chunks afresh."""
    for digest in manifest.refs:
        with contextlib.suppress(StoreError):  # it is noted by the reader
            reader.stored(reader.locate([digest])[0])


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
