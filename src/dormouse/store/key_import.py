"""Moving a key between hosts. A store can be copied as files; what its key signed can be read where that key is.

export: key file -> FILE or stdout        import: FILE or stdin -> key file, then the index is built anew for it
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dormouse.errors import DamagedError, NotFoundError, StoreError, UntrustedError
from dormouse.store.files import FileLock, create_file, sync_folder, system_errors, write_all
from dormouse.store.key import Key, missing_key, read_key, replace_key
from dormouse.store.layout import Layout


@dataclass(frozen=True)
class KeyImport:
    """What an import means: `readable` and `unreadable` count the store's manifests as seen with the imported key."""

    key_id: str
    changed: bool
    readable: int
    unreadable: int


def host_key(key_file: Path, store: Path) -> Key:
    """The key of this host. Raises NotFoundError while there is none, UntrustedError when it was lost."""
    key = read_key(key_file)
    if key is None and any((store / "manifests").glob("*.manifest")):
        raise missing_key(key_file)
    if key is None:
        raise NotFoundError(
            f"there is no key {key_file} yet",
            remedy="It is made when the store is first opened; `dormouse key import FILE` takes one from another host",
        )
    return key


def export_key(key: Key, target: Path) -> None:
    """Write a key into a new private file."""
    with system_errors(target, "writing the key"):
        try:
            fd = create_file(target)
        except FileExistsError:
            raise StoreError(f"{target} exists already", remedy="Name a new file; a key overwrites nothing") from None
        try:
            write_all(fd, key.text(), 0)
            os.fsync(fd)
        except BaseException:
            target.unlink()
            raise
        finally:
            os.close(fd)
        sync_folder(target.parent)


def import_key(key: Key, key_file: Path, store: Path, *, force: bool, wait: float = 10.0) -> KeyImport:
    """Make a key this host's. The store must be at rest.

    Raises StoreError when there is another key and not `force`, BusyError when the store is in use for longer than
    `wait` seconds.
    """
    if not store.is_dir():
        return _import(key, key_file, store, force=force)
    with FileLock(store / "use.lock", wait=wait):
        return _import(key, key_file, store, force=force)


def _import(key: Key, key_file: Path, store: Path, *, force: bool) -> KeyImport:
    readable, unreadable = _survey(store, key)
    changed = _replaces(key, key_file, force=force)
    if changed is None:
        raise StoreError(
            f"{key_file} is another key than {key.id.hex()}, with which {readable} of the store's "
            f"{readable + unreadable} manifests would be readable and {unreadable} not",
            remedy="Keep the present key with `dormouse key export FILE`, then import with --force",
        )
    if changed:
        replace_key(key_file, key)
    return KeyImport(key.id.hex(), changed, readable, unreadable)


def _replaces(key: Key, key_file: Path, *, force: bool) -> bool | None:
    """Whether the import changes the key file; None when it must not."""
    try:
        present = read_key(key_file)
    except (DamagedError, UntrustedError):
        if not force:
            raise
        return True
    if present == key:
        return False
    return True if present is None or force else None


def _survey(store: Path, key: Key) -> tuple[int, int]:
    """How many of the store's manifests a key can read, and how many not."""
    layout = Layout(store, key, lambda _step: None)
    readable = unreadable = 0
    for manifest_id in layout.manifest_ids():
        try:
            layout.read_manifest(manifest_id)
            readable += 1
        except (StoreError, NotFoundError):
            unreadable += 1
    return readable, unreadable
