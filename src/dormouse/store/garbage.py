"""Garbage collection: gives back the disk space of chunks that no manifest needs.

A pack without a needed chunk is deleted; one of which more than half is dead space is copied without it. All long work
runs beside captures and restores; only the moments of deletion wait for those under way to end. A crash anywhere
leaves at worst one extra pack file, which `reconcile` takes in and the next collection deletes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from dormouse.errors import DamagedError, DiskFullError, UntrustedError
from dormouse.store.codec import Codec
from dormouse.store.files import sync_folder, system_errors
from dormouse.store.index import dead_packs, drop_pack, drop_unplaced, move_chunks
from dormouse.store.layout import Layout
from dormouse.store.pack import PackWriter, pack_size
from dormouse.store.reconcile import reconcile

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GarbageReport:
    """What a collection did. `packs_kept` should have been rewritten but could not be; the log says why."""

    freed_bytes: int
    packs_deleted: int
    packs_rewritten: int
    packs_kept: int


def collect(layout: Layout, wait: float) -> GarbageReport:
    """Collect garbage. Raises BusyError when the store is in use for longer than `wait` seconds, DamagedError (and
    deletes nothing) when the index does not know all that the manifests need."""
    with layout.collecting(wait):
        with layout.change():
            reconcile(layout)
            _check_liveness(layout)
            unreadable = _unneeded_unreadable_packs(layout)
        before = _size(layout)
        deleted = _delete_dead_packs(layout, unreadable, wait)
        results = [_rewrite(layout, number, wait) for number in _sparse_packs(layout)]
        return GarbageReport(before - _size(layout), deleted, results.count(True), results.count(False))


def _size(layout: Layout) -> int:
    return sum(path.stat().st_size for path in layout.packs.glob("*.pack"))


def _check_liveness(layout: Layout) -> None:
    """What the index believes to be dead is about to be deleted, so ask the manifests themselves first."""
    for manifest_id in layout.manifest_ids():
        manifest, _raw_bytes = layout.read_manifest(manifest_id)
        if not layout.index.refs_of(manifest_id) >= set(manifest.refs):
            raise DamagedError(
                f"the index of {layout.root} does not know all chunks of manifest {manifest_id}; nothing was deleted",
                remedy=f"Stop dormouse and delete {layout.root}/index.sqlite: it is built anew, no snapshot is lost",
            )


def _unneeded_unreadable_packs(layout: Layout) -> set[int]:
    """Packs with a damaged table or another key's, when nothing that a manifest needs is missing: nobody needs them."""
    return set() if layout.index.missing() else set(layout.pack_numbers()) - layout.index.packs()


def _catch_up(layout: Layout) -> None:
    """A committer that was killed since the collection began may have left a manifest that the index does not know.
    The caller holds the change lock."""
    if layout.manifest_ids() != layout.index.manifest_ids():
        reconcile(layout)
        _check_liveness(layout)


def _delete_dead_packs(layout: Layout, unreadable: set[int], wait: float) -> int:
    with layout.unused(wait), layout.change():
        _catch_up(layout)
        with layout.index.change() as connection:
            dead = dead_packs(connection)
            for number in dead:
                drop_pack(connection, number)
            drop_unplaced(connection)
        layout.checkpoint("gc dead forgotten")
        dead += unreadable - layout.index.packs()
        _unlink(layout, dead)
    layout.checkpoint("gc dead deleted")
    return len(dead)


def _unlink(layout: Layout, numbers: Iterable[int]) -> None:
    with system_errors(layout.packs, "deleting packs in"):
        for number in numbers:
            layout.pack(number).unlink(missing_ok=True)
        sync_folder(layout.packs)


def _sparse_packs(layout: Layout) -> list[int]:
    """The packs of which more than half is dead space."""
    sparse = []
    for number in sorted(set(layout.pack_numbers()) & layout.index.packs()):
        live = layout.index.chunks_of(number, live_only=True)
        if pack_size(live) * 2 < layout.pack(number).stat().st_size:
            sparse.append(number)
    return sparse


def _rewrite(layout: Layout, number: int, wait: float) -> bool:
    """Copy what is needed of a pack into a new one and delete the old; False when it had to be left as it is."""
    writer = layout.new_writer()
    try:
        with layout.reader() as reader:
            for chunk in layout.index.chunks_of(number, live_only=True):
                writer.append(chunk.digest, Codec(chunk.codec), chunk.plain_length, reader.stored(chunk))
        writer.finish()
        layout.checkpoint("gc copied")
        with layout.unused(wait), layout.change():
            return _switch(layout, number, writer)
    except (DamagedError, UntrustedError, DiskFullError) as error:
        log.warning("pack %s keeps its dead space: %s", layout.pack(number), error)
        return False
    finally:
        writer.close()


def _switch(layout: Layout, old: int, writer: PackWriter) -> bool:
    _catch_up(layout)
    live = {chunk.digest for chunk in layout.index.chunks_of(old, live_only=True)}
    if not live <= writer.entries.keys():
        return False  # a capture has come to need more of the pack while it was copied; next time
    new = layout.install(writer)
    layout.checkpoint("gc copy named")
    with layout.index.change() as connection:
        move_chunks(connection, old, new, writer.entries.values())
    layout.checkpoint("gc switched")
    _unlink(layout, [old])
    layout.checkpoint("gc old deleted")
    return True
