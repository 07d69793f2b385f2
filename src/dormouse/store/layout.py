"""Where the files of a store are, and the locks that keep processes out of each other's way.

    STORE/packs/00000001.pack      chunks           STORE/change.lock   taken, for moments, to change what there is
    STORE/packs/*.tmp              growing packs    STORE/use.lock      shared by readers and transactions, exclusive
    STORE/manifests/ID.manifest    what is needed                       for the moments in which chunks are deleted
    STORE/manifests/ID.marks       notes about it   STORE/gc.lock       one garbage collection at a time
    STORE/index.sqlite             rebuildable

The key that signs all of it lies beside the store, not in it: who copies or writes a store must not get it too.

Whoever takes several locks takes them in the order gc, use, change.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from dormouse.errors import NotFoundError
from dormouse.store.files import FileLock, private_folder, read_file, reading, sync_folder, sync_path, system_errors
from dormouse.store.index import Index
from dormouse.store.key import Key, open_key
from dormouse.store.manifest import Manifest, decode_manifest, is_manifest_id, manifest_name
from dormouse.store.marks import marks_name
from dormouse.store.pack import PackWriter, pack_name
from dormouse.store.reader import Reader

Checkpoint = Callable[[str], None]

_NUMBER = re.compile(r"[0-9]{8,18}")


class Layout:
    """The parts of one store. `checkpoint` is told the name of each step that matters after a crash."""

    def __init__(self, root: Path, key: Key, checkpoint: Checkpoint) -> None:
        self.root = root
        self.key = key
        self.packs = root / "packs"
        self.manifests = root / "manifests"
        self.index = Index(root / "index.sqlite", key)
        self.checkpoint = checkpoint

    def change(self) -> FileLock:
        """Held, for moments, by whoever changes which packs and manifests there are."""
        return FileLock(self.root / "change.lock")

    def in_use(self) -> FileLock:
        """Held by readers and transactions for as long as they live: no chunk may vanish under them."""
        return FileLock(self.root / "use.lock", shared=True)

    def unused(self, wait: float) -> FileLock:
        """Held for the moments in which chunks are deleted. Raises BusyError after `wait` seconds."""
        return FileLock(self.root / "use.lock", wait=wait)

    def collecting(self, wait: float) -> FileLock:
        """Held by the one garbage collection. Raises BusyError after `wait` seconds."""
        return FileLock(self.root / "gc.lock", wait=wait)

    def pack(self, number: int) -> Path:
        """The file of pack `number`."""
        return self.packs / pack_name(number)

    def pack_numbers(self) -> Iterator[int]:
        """The numbers of all pack files, in no order."""
        return (int(path.stem) for path in self.packs.glob("*.pack") if _NUMBER.fullmatch(path.stem))

    def manifest_ids(self) -> set[str]:
        """The ids of all manifest files."""
        return {path.stem for path in self.manifests.glob("*.manifest") if is_manifest_id(path.stem)}

    def manifest(self, manifest_id: str) -> Path:
        """The file of a manifest."""
        return self.manifests / manifest_name(manifest_id)

    def marks(self, manifest_id: str) -> Path:
        """The file of a manifest's marks."""
        return self.manifests / marks_name(manifest_id)

    def reader(self) -> Reader:
        """A reader; blocks for the moments in which garbage is deleted."""
        return Reader(self.packs, self.index, self.key, self.in_use())

    def read_manifest(self, manifest_id: str) -> tuple[Manifest, int]:
        """A manifest and the plain bytes of its refs. Raises NotFoundError, DamagedError, UntrustedError."""
        path = self.manifest(manifest_id)
        try:
            with reading(path):
                data = read_file(path)
        except FileNotFoundError:
            raise no_manifest(manifest_id) from None
        return decode_manifest(data, manifest_id, self.key)

    def new_writer(self) -> PackWriter:
        """A growing pack. Under the change lock, so that no cleaner meets the file before it is locked."""
        with self.change():
            return PackWriter(self.packs / f"{secrets.token_hex(8)}.tmp", self.key)

    def install(self, writer: PackWriter) -> int:
        """Give a finished pack its number and make the name durable; the caller holds the change lock."""
        number = max((0, *self.pack_numbers(), *self.index.packs())) + 1
        target = self.pack(number)
        with system_errors(target, "committing"):
            writer.install(target)
            sync_folder(self.packs)
        return number


def open_layout(root: Path, key_file: Path, checkpoint: Checkpoint) -> Layout:
    """The layout in folder `root`, its folders and key made when missing. Raises StoreError, UntrustedError."""
    private_folder(root, may_be_link=True)
    for folder in (root / "packs", root / "manifests"):
        private_folder(folder)
    fresh = not any((root / "manifests").glob("*.manifest"))
    key = open_key(key_file, needed=not fresh)
    if fresh:  # whoever commits first has opened the store before: nothing is committed below names that may vanish
        for path in (key_file, root / "packs", root / "manifests"):
            with system_errors(path, "syncing the folders above"):
                sync_path(path)
    return Layout(root, key, checkpoint)


def no_manifest(manifest_id: str) -> NotFoundError:
    """The error for an id that is not in the store."""
    return NotFoundError(f"there is no manifest {manifest_id} in the store", remedy="`dormouse ls` lists what there is")
