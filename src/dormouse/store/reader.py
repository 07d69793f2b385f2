"""Reads chunks: locate, read, check the signature, decode. While a reader is open, garbage collection deletes nothing,
so whatever it has located stays readable until it is closed."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from dormouse.errors import BusyError, DamagedError, StoreError
from dormouse.store.chunk import Digest
from dormouse.store.files import VERIFY_REMEDY, FileLock
from dormouse.store.index import Index
from dormouse.store.key import Key
from dormouse.store.pack import StoredChunk
from dormouse.store.pack_reader import PackReader

log = logging.getLogger(__name__)


class Reader(PackReader):
    """A reader that finds chunks by name. Close it when done."""

    def __init__(self, packs: Path, index: Index, key: Key, in_use: FileLock) -> None:
        super().__init__(packs, key, self.note_damage)
        self._index = index
        self._in_use = in_use

    def locate(self, digests: Iterable[Digest], *, manifest_id: str | None = None) -> list[StoredChunk]:
        """Where the chunks are, in the order asked for; faster when `manifest_id` names a manifest that most are of.
        Raises DamagedError for one that is in no pack."""
        wanted = list(digests)
        found = self._index.locate(wanted, manifest_id)
        try:
            return [found[digest] for digest in wanted]
        except KeyError as error:
            digest: Digest = error.args[0]
            raise DamagedError(
                f"chunk {digest.hex()} is in no pack of {self.packs}: its pack was deleted or is unreadable",
                remedy=VERIFY_REMEDY,
            ) from None

    def note_damage(self, digest: Digest) -> None:
        """Remember that a chunk is damaged, so that the next capture stores it afresh."""
        try:
            self._index.mark([digest], damaged=True)
        except (StoreError, BusyError) as error:
            log.warning("could not note that chunk %s is damaged: %s", digest.hex(), error)

    def close(self) -> None:
        """Close the packs and let garbage be collected. No call may be under way. Idempotent."""
        super().close()
        self._in_use.release()
