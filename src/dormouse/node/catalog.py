"""The snapshots of the store, as the node and its administrators need them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dormouse.errors import ConfigError, DamagedError, NotFoundError
from dormouse.node import canary
from dormouse.node.page_cache import OnDisk, Stretch, joined
from dormouse.snapshot.capture import PROCESS_KIND, SNAPSHOT_KIND, TEMPLATE_KIND
from dormouse.snapshot.images import decode_body
from dormouse.store.pack import pack_name
from dormouse.store.store import ManifestRow, Store

Answer = TypeVar("Answer")

KINDS = (SNAPSHOT_KIND, TEMPLATE_KIND, PROCESS_KIND)
"""The manifests that are snapshots; a store holds others, too."""


class StoreCatalog:
    """`dormouse.node.parts.Catalog` over a store, opened for each of its rare calls. Blocks."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def latest(self, name: str, *, kind: str = SNAPSHOT_KIND) -> str | None:
        """The id of the newest one that is not quarantined."""
        rows = self._asked(lambda store: store.manifests(kind=kind, name=name))
        rows = [row for row in rows if row.marks.quarantine is None]
        return max(rows, key=lambda row: row.created).id if rows else None

    def canary(self, snapshot_id: str) -> str | None:
        """The answer of the canary that was stored with it (canary.py)."""
        manifest = self._asked(lambda store: store.manifest(snapshot_id))
        return decode_body(manifest.body, snapshot_id).key.get(canary.FIELD)

    def on_disk(self, manifest_id: str) -> OnDisk:
        """Where the chunks of a snapshot or checkpoint are. Raises NotFoundError."""
        return self._asked(lambda store: _on_disk(store, manifest_id))

    def drop_older(self, name: str, snapshot_id: str, *, kind: str = SNAPSHOT_KIND) -> None:
        """Remove those that are older than this one, but not those that are pinned, and free what only they used."""
        with Store.open(self._path) as store:
            rows = store.manifests(kind=kind, name=name)
            since = next((row.created for row in rows if row.id == snapshot_id), 0.0)
            older = [row.id for row in rows if row.created < since]
            if [identity for identity in older if store.remove(identity, spare_pinned=True)]:
                store.collect_garbage()

    def quarantine(self, snapshot_id: str, reason: str) -> None:
        """Remember that it must not be used, and why. One that is gone by now needs no mark."""
        with Store.open(self._path) as store, contextlib.suppress(NotFoundError):
            store.mark(snapshot_id, lambda marks: replace(marks, quarantine=reason, quarantined_at=time.time()))

    def release(self, snapshot_id: str) -> tuple[str, str]:
        """Lift its quarantine; returns kind and name."""
        with self._row(snapshot_id) as (store, row):
            store.mark(snapshot_id, lambda marks: replace(marks, quarantine=None, quarantined_at=None))
        return row.kind, row.name

    def pin(self, snapshot_id: str, pinned: bool) -> None:
        """Have it kept when newer ones come, or not any more."""
        with self._row(snapshot_id) as (store, _row):
            store.mark(snapshot_id, lambda marks: replace(marks, pinned=pinned))

    def remove(self, snapshot_id: str, *, force: bool) -> None:
        """Remove it and free its space. Raises ConfigError when it is pinned, unless told to `force`."""
        with self._row(snapshot_id) as (store, row):
            if not store.remove(snapshot_id, spare_pinned=not force):
                raise _is_pinned(row)
            store.collect_garbage()

    def rows(self) -> list[dict[str, Any]]:
        """All of them as JSON-ready rows, oldest first."""
        with Store.open(self._path) as store:
            return snapshot_rows(store)

    def _asked(self, question: Callable[[Store], Answer]) -> Answer:
        """What a store answers that is opened to read; in full, if the index proves to be damaged."""
        try:
            with Store.open_to_read(self._path) as store:
                return question(store)
        except DamagedError:
            with Store.open(self._path) as store:
                return question(store)

    @contextlib.contextmanager
    def _row(self, snapshot_id: str) -> Iterator[tuple[Store, ManifestRow]]:
        with Store.open(self._path) as store:
            row = next((row for row in snapshots_of(store) if row.id == snapshot_id), None)
            if row is None:
                raise NotFoundError(f"there is no snapshot {snapshot_id}", remedy="`dormouse ls` shows all ids")
            yield store, row


def _on_disk(store: Store, manifest_id: str) -> OnDisk:
    chunks = store.locate(set(store.manifest(manifest_id).refs))
    places = (Stretch(store.packs / pack_name(chunk.pack), chunk.offset, chunk.stored_length) for chunk in chunks)
    return OnDisk(
        sum(chunk.plain_length for chunk in chunks), sum(chunk.stored_length for chunk in chunks), joined(places)
    )


def snapshots_of(store: Store) -> list[ManifestRow]:
    """The snapshots and templates of a store, oldest first."""
    return [row for row in store.manifests() if row.kind in KINDS]


def snapshot_rows(store: Store) -> list[dict[str, Any]]:
    """The same as JSON-ready rows: what `dormouse ls` and the admin API show."""
    return [
        {
            "id": row.id,
            "kind": row.kind,
            "model": row.name,
            "created": row.created,
            "raw_bytes": row.raw_bytes,
            "stored_bytes": row.stored_bytes,
            "shared_bytes": row.shared_bytes,
            "own_bytes": row.stored_bytes - row.shared_bytes,
            "pinned": row.marks.pinned,
            "quarantine": row.marks.quarantine,
            "quarantined_at": row.marks.quarantined_at,
        }
        for row in snapshots_of(store)
    ]


def refuse_if_pinned(row: ManifestRow) -> None:
    """Raises ConfigError when the snapshot is pinned."""
    if row.marks.pinned:
        raise _is_pinned(row)


def _is_pinned(row: ManifestRow) -> ConfigError:
    return ConfigError(
        f"snapshot {row.id} of {row.name} is pinned", remedy="Unpin it first with `dormouse unpin`, or use --force"
    )
