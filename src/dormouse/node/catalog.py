"""The snapshots of the store, as the node needs them."""

from __future__ import annotations

from pathlib import Path

from dormouse.snapshot.capture import SNAPSHOT_KIND
from dormouse.store.store import Store


class StoreCatalog:
    """`dormouse.node.parts.Catalog` over a store, opened for each of its rare calls. Blocks."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def latest(self, model: str) -> str | None:
        """The id of the newest snapshot of a model."""
        with Store.open(self._path) as store:
            rows = store.manifests(kind=SNAPSHOT_KIND, name=model)
        return max(rows, key=lambda row: row.created).id if rows else None

    def drop_older(self, model: str, snapshot_id: str) -> None:
        """Remove the model's snapshots that are older than this one and free what only they used."""
        with Store.open(self._path) as store:
            rows = store.manifests(kind=SNAPSHOT_KIND, name=model)
            since = next((row.created for row in rows if row.id == snapshot_id), 0.0)
            older = [row.id for row in rows if row.created < since]
            for identity in older:
                store.remove(identity)
            if older:
                store.collect_garbage()
