"""Brings the index in line with the files: finishes or undoes what a dead process left half done, and fills an index
that is missing or unusable from the packs and manifests. The caller holds the change lock."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3

from dormouse.errors import DamagedError, StoreError, UntrustedError
from dormouse.store.files import sync_folder, system_errors, try_lock
from dormouse.store.index import add_manifest, add_pack, drop_manifest
from dormouse.store.layout import Layout
from dormouse.store.marks import drop_marks, orphans
from dormouse.store.pack import read_table

log = logging.getLogger(__name__)


def reconcile(layout: Layout) -> None:
    """Clean up and bring the index up to date. Raises StoreError for files of a newer version."""
    _remove_leftovers(layout)
    _make_durable(layout)
    problem = layout.index.problem()
    if problem is not None:
        _start_over(layout, problem)
    for path in orphans(layout.manifests, layout.manifest_ids()):
        drop_marks(path)
    with layout.index.change() as connection:
        _compare_packs(layout, connection)
        _compare_manifests(layout, connection)


def in_line(layout: Layout) -> bool:
    """Whether the index can be asked, and knows all packs and manifests by name and no others. Changes nothing; needs
    no lock, because a reader needs no more than an answer that was right at some moment."""
    try:
        with system_errors(layout.root, "listing"):
            packs, manifests = set(layout.pack_numbers()), layout.manifest_ids()
        index = layout.index
        return index.is_current() and index.packs() == packs and index.manifest_ids() == manifests
    except StoreError:  # whatever it is, a full opening mends it or tells of it
        return False


def _start_over(layout: Layout, problem: str) -> None:
    note = ""
    if any(layout.pack_numbers()) or layout.manifest_ids():
        note = f"the index was unusable ({problem}) and was built anew from the packs and manifests"
        log.warning("%s: %s", layout.root, note)
    layout.index.create(note)


def _remove_leftovers(layout: Layout) -> None:
    """Files that were never committed. A pack that its writer still has locked is alive."""
    with system_errors(layout.root, "cleaning up"):
        for path in layout.manifests.glob("*.tmp"):
            path.unlink()
        for path in layout.packs.glob("*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # its writer has ended just now
                fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    if try_lock(fd):
                        path.unlink()
                finally:
                    os.close(fd)


def _make_durable(layout: Layout) -> None:
    """A process that died between a rename or removal and its sync may have left names that a power cut would undo.
    What is built upon from here on must not."""
    for folder in (layout.packs, layout.manifests):
        with system_errors(folder, "syncing"):
            sync_folder(folder)


def _compare_packs(layout: Layout, connection: sqlite3.Connection) -> None:
    known = layout.index.packs()
    files = set(layout.pack_numbers())
    for number in sorted(known - files):
        chunks = layout.index.chunks_of(number, live_only=True)
        if chunks:
            log.warning("%s: the pack is missing; %d of its chunks are needed", layout.pack(number), len(chunks))
        connection.execute("UPDATE chunks SET damaged = 1 WHERE pack = ?", (number,))
    # The newest pack first: of two copies of a chunk, the newer is a repaired one or the goal of a rewrite.
    for number in sorted(files - known, reverse=True):
        try:
            add_pack(connection, number, read_table(layout.pack(number), number, layout.key))
        except (DamagedError, UntrustedError) as error:
            log.warning("%s", error)


def _compare_manifests(layout: Layout, connection: sqlite3.Connection) -> None:
    known = layout.index.manifest_ids()
    files = layout.manifest_ids()
    for manifest_id in known - files:
        drop_manifest(connection, manifest_id)
    for manifest_id in sorted(files - known):
        try:
            add_manifest(connection, *layout.read_manifest(manifest_id), layout.key)
        except (DamagedError, UntrustedError) as error:
            log.warning("%s", error)
