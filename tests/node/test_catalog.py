from __future__ import annotations

from pathlib import Path

import pytest

from dormouse.errors import ConfigError, NotFoundError
from dormouse.node.catalog import StoreCatalog
from dormouse.snapshot.capture import SNAPSHOT_KIND, TEMPLATE_KIND
from dormouse.store.store import Manifest, Store


def commit(store: Store, identity: str, model: str, created: float, kind: str = SNAPSHOT_KIND) -> None:
    with store.begin() as transaction:
        digest = transaction.put(identity.encode() * 1000)
        transaction.commit(Manifest(id=identity, kind=kind, name=model, created=created, body=b"", refs=[digest]))


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


def test_quarantined_snapshots_are_passed_over_until_they_are_released(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        commit(store, "a1", "a", 1.0)
        commit(store, "a2", "a", 2.0)
    catalog = StoreCatalog(tmp_path / "store")
    catalog.quarantine("a2", "criu failed")
    assert catalog.latest("a") == "a1"
    catalog.quarantine("a1", "criu failed")
    assert catalog.latest("a") is None
    assert [row["quarantine"] for row in catalog.rows()] == ["criu failed"] * 2
    assert catalog.release("a2") == (SNAPSHOT_KIND, "a")
    assert catalog.latest("a") == "a2"
    with Store.open(tmp_path / "store") as store:
        commit(store, "a3", "a", 3.0)
    catalog.drop_older("a", "a3")
    assert [row["id"] for row in catalog.rows()] == ["a3"]


def test_pinned_snapshots_stay(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        commit(store, "a1", "a", 1.0)
        commit(store, "a2", "a", 2.0)
    catalog = StoreCatalog(tmp_path / "store")
    catalog.pin("a1", True)
    catalog.quarantine("a1", "criu failed")
    catalog.drop_older("a", "a2")
    assert [(row["id"], row["pinned"], row["quarantine"]) for row in catalog.rows()] == [
        ("a1", True, "criu failed"),
        ("a2", False, None),
    ]
    with pytest.raises(ConfigError, match="pinned"):
        catalog.remove("a1", force=False)
    catalog.pin("a1", False)
    catalog.remove("a1", force=False)
    for call in (catalog.release, lambda gone: catalog.pin(gone, True), lambda gone: catalog.remove(gone, force=True)):
        with pytest.raises(NotFoundError):
            call("a1")
    catalog.quarantine("a1", "too late")  # nobody can use it any more


def test_templates_and_snapshots_of_one_name_are_apart(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        commit(store, "s", "a", 1.0)
        commit(store, "t", "a", 2.0, TEMPLATE_KIND)
    catalog = StoreCatalog(tmp_path / "store")
    assert (catalog.latest("a"), catalog.latest("a", kind=TEMPLATE_KIND)) == ("s", "t")
    catalog.drop_older("a", "t", kind=TEMPLATE_KIND)
    assert len(catalog.rows()) == 2


def test_where_the_bytes_of_a_snapshot_lie(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store, store.begin() as transaction:
        refs = [transaction.put(bytes([number]) * 5000 + b"x" * number) for number in range(1, 4)]
        transaction.commit(
            Manifest(id="a1", kind=SNAPSHOT_KIND, name="a", created=1.0, body=b"", refs=[*refs, refs[0]])
        )
    found = StoreCatalog(tmp_path / "store").on_disk("a1")
    assert found.plain_bytes == 3 * 5000 + 6 and 0 < found.stored_bytes <= found.plain_bytes
    (stretch,) = found.stretches
    assert stretch.path.is_file() and found.stored_bytes <= stretch.length <= stretch.path.stat().st_size
    with pytest.raises(NotFoundError):
        StoreCatalog(tmp_path / "store").on_disk("gone")
