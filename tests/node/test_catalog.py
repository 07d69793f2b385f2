from __future__ import annotations

from pathlib import Path

from dormouse.node.catalog import StoreCatalog
from dormouse.snapshot.capture import SNAPSHOT_KIND
from dormouse.store.store import Manifest, Store


def commit(store: Store, identity: str, model: str, created: float) -> None:
    with store.begin() as transaction:
        digest = transaction.put(identity.encode() * 1000)
        transaction.commit(
            Manifest(id=identity, kind=SNAPSHOT_KIND, name=model, created=created, body=b"", refs=[digest])
        )


def test_newest_snapshot_of_each_model_is_found_and_kept(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        for identity, model, created in (("a1", "a", 1.0), ("a3", "a", 3.0), ("a2", "a", 2.0), ("b1", "b", 9.0)):
            commit(store, identity, model, created)
    catalog = StoreCatalog(tmp_path)
    assert (catalog.latest("a"), catalog.latest("b"), catalog.latest("c")) == ("a3", "b1", None)
    catalog.drop_older("a", "a2")
    assert catalog.latest("a") == "a3"
    catalog.drop_older("a", "gone")
    catalog.drop_older("a", "a3")
    with Store.open(tmp_path) as store:
        assert sorted(row.id for row in store.manifests()) == ["a3", "b1"]
        assert not store.verify(deep=True).damages
