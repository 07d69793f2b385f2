"""The store: chunks and manifests on disk, shared by any number of threads and processes.

    begin() -> Transaction.put(chunk) ... -> commit(manifest)      everything or nothing, durable when it returns
    manifest(id) -> reader().locate(refs) -> plain(chunk)          every byte checked against its signature
    mark(id, change) -> marks(id)                                  notes that may change, beside the manifest
    remove(id) -> collect_garbage()                                space comes back when nobody needs a chunk

The truth is in two kinds of files that never change once they have their name: packs (chunks) and manifests (what is
needed). The index over them can be lost at any time. docs/formats.md has the bytes and what a crash at each step does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Self

from dormouse.store import garbage, verify
from dormouse.store.chunk import Buffer, Digest
from dormouse.store.files import sync_folder, system_errors
from dormouse.store.garbage import GarbageReport
from dormouse.store.index import ManifestRow, drop_manifest
from dormouse.store.layout import Checkpoint, Layout, no_manifest, open_layout
from dormouse.store.manifest import Manifest
from dormouse.store.marks import Marks, drop_marks, read_marks, write_marks
from dormouse.store.pack import StoredChunk
from dormouse.store.reader import Reader
from dormouse.store.reconcile import in_line, reconcile
from dormouse.store.transaction import Transaction
from dormouse.store.verify import Damage, Progress, VerifyReport

__all__ = [
    "Damage",
    "GarbageReport",
    "Manifest",
    "ManifestRow",
    "Marks",
    "Reader",
    "Store",
    "StoredChunk",
    "Transaction",
    "VerifyReport",
]


class Store:
    """One open store. Every method may be called from any thread; the blocking ones say so."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.key = layout.key
        self.root = layout.root
        self.packs = layout.packs

    @classmethod
    def open(cls, path: Path, *, key_file: Path | None = None, checkpoint: Checkpoint = lambda _step: None) -> Self:
        """Open the store in folder `path`, made when missing. Finishes or undoes what a crash left behind, and builds
        the index anew (with a warning in the log) when it is missing or unusable.

        `key_file` holds the store's key, by default `key` beside the folder; it is made when there is neither a key nor
        a manifest. `checkpoint` is told the name of each step whose crash outcome docs/formats.md lists. Raises
        StoreError, and UntrustedError when the key is missing or the files are open to other users.
        """
        layout = open_layout(path, key_file or path.parent / "key", checkpoint)
        try:
            with layout.change():
                reconcile(layout)
        except BaseException:
            layout.index.close()
            raise
        return cls(layout)

    @classmethod
    def open_to_read(cls, path: Path, *, key_file: Path | None = None) -> Self:
        """Open a store to read chunks and manifests and nothing else, in a fraction of the time: what there is on the
        disk is not made durable or cleaned up, and the index is used if it knows all packs and manifests. Else this is
        `open`. All that is read is checked as ever; but an index that is damaged within shows only when it is asked
        (DamagedError), and `open` builds it anew.
        """
        layout = open_layout(path, key_file or path.parent / "key", lambda _step: None)
        if in_line(layout):
            return cls(layout)
        layout.index.close()
        return cls.open(path, key_file=key_file)

    def close(self) -> None:
        """Close the index; open readers and transactions must be closed before. Idempotent."""
        self._layout.index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def begin(self) -> Transaction:
        """A new transaction. Blocks for the moments in which garbage is being deleted."""
        in_use = self._layout.in_use()
        try:
            return Transaction(self._layout, in_use, self._layout.new_writer())
        except BaseException:
            in_use.release()
            raise

    def reader(self) -> Reader:
        """A reader; no chunk is deleted while it is open. Blocks for the moments in which garbage is deleted."""
        return self._layout.reader()

    def read(self, digest: Digest) -> Buffer:
        """One chunk's plain bytes, checked. Raises DamagedError that names the chunk and its pack."""
        with self.reader() as reader:
            return reader.plain(reader.locate([digest])[0])

    def locate(self, digests: Iterable[Digest]) -> list[StoredChunk]:
        """Where chunks are, in the order asked for. Only a reader keeps them there. Raises DamagedError."""
        with self.reader() as reader:
            return reader.locate(digests)

    def manifest(self, manifest_id: str) -> Manifest:
        """A committed manifest, checked. Raises NotFoundError, DamagedError, UntrustedError."""
        return self._layout.read_manifest(manifest_id)[0]

    def manifests(self, *, kind: str | None = None, name: str | None = None) -> list[ManifestRow]:
        """All manifests, or those of a kind or name, oldest first. Raises DamagedError when the index was altered."""
        rows = self._layout.index.manifests(kind, name)
        return [replace(row, marks=read_marks(self._layout.marks(row.id))) for row in rows]

    def unreadable(self) -> set[str]:
        """The ids of manifests that have no row in `manifests`, because they are damaged or another key signed them."""
        return self._layout.manifest_ids() - self._layout.index.manifest_ids()

    def marks(self, manifest_id: str) -> Marks:
        """What was noted about a manifest. Raises NotFoundError."""
        self._require(manifest_id)
        return read_marks(self._layout.marks(manifest_id))

    def mark(self, manifest_id: str, change: Callable[[Marks], Marks]) -> None:
        """Note about a manifest what `change` makes of its marks; nobody else changes them meanwhile. Durable when it
        returns; after a crash there are the old marks or the new. Raises NotFoundError, DiskFullError."""
        with self._layout.change():
            self._require(manifest_id)
            path = self._layout.marks(manifest_id)
            marks = change(read_marks(path))
            self._layout.checkpoint("mark")
            write_marks(path, marks, lambda: self._layout.checkpoint("marks written"))
            self._layout.checkpoint("marks named")

    def _require(self, manifest_id: str) -> None:
        if not self._layout.manifest(manifest_id).exists():
            raise no_manifest(manifest_id)

    def remove(self, manifest_id: str, *, spare_pinned: bool = False) -> bool:
        """Remove a manifest, damaged or not; its chunks go with the next garbage collection. False: it is pinned and
        was to be spared then. Raises NotFoundError."""
        path = self._layout.manifest(manifest_id)
        with self._layout.change():
            if spare_pinned and read_marks(self._layout.marks(manifest_id)).pinned:
                return False
            with system_errors(path, "removing"):
                try:
                    path.unlink()
                except FileNotFoundError:
                    raise no_manifest(manifest_id) from None
                sync_folder(path.parent)
            self._layout.checkpoint("manifest removed")
            drop_marks(self._layout.marks(manifest_id))
            self._layout.checkpoint("marks removed")
            with self._layout.index.change() as connection:
                drop_manifest(connection, manifest_id)
        return True

    def collect_garbage(self, *, wait: float = 60.0) -> GarbageReport:
        """Delete chunks that no manifest needs. Blocks while transactions or readers are open anywhere.

        Raises BusyError when they stay open for longer than `wait` seconds; nothing is half done then.
        """
        return garbage.collect(self._layout, wait)

    def verify(self, *, deep: bool = True, progress: Progress | None = None) -> VerifyReport:
        """Read and check everything; `progress` is called with stored bytes done and in all."""
        return verify.verify(self._layout, deep=deep, progress=progress or (lambda _done, _total: None))
