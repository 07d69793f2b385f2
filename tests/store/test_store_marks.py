"""Marks: notes beside a manifest that outlive the process, change as a whole and go with the manifest."""

from __future__ import annotations

import dataclasses
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_tools import commit, noise

from dormouse.errors import NotFoundError, StoreError
from dormouse.store.marks import decode_marks, encode_marks
from dormouse.store.store import Marks, Store

QUARANTINED = Marks(quarantine="it did not answer", quarantined_at=12.5)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as opened:
        commit(opened, "a", [noise(1, 100)])
        commit(opened, "b", [noise(2, 100)])
        yield opened


def marks_of(store: Store) -> dict[str, Marks]:
    return {row.id: row.marks for row in store.manifests()}


def test_marks_are_kept_listed_and_replaced(store: Store, tmp_path: Path) -> None:
    assert marks_of(store) == {"a": Marks(), "b": Marks()}
    store.mark("a", lambda _old: QUARANTINED)
    store.mark("b", lambda _old: Marks(pinned=True))
    with Store.open(tmp_path / "store") as again:
        assert marks_of(again) == {"a": QUARANTINED, "b": Marks(pinned=True)}
        again.mark("b", lambda _old: Marks(True, "both", 1.0))
    assert store.marks("b") == Marks(True, "both", 1.0)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*.marks")} == {0o600}
    store.mark("a", lambda _old: Marks())
    assert [path.name for path in tmp_path.rglob("*.marks")] == ["b.marks"]


def test_changes_of_marks_at_the_same_moment_are_all_kept(store: Store, tmp_path: Path) -> None:
    begun = threading.Event()
    with Store.open(tmp_path / "store") as other:
        pin = threading.Thread(
            target=lambda: begun.wait() and other.mark("a", lambda old: dataclasses.replace(old, pinned=True))
        )
        pin.start()

        def quarantine(old: Marks) -> Marks:
            begun.set()
            pin.join(0.1)  # it has to wait for the lock
            return dataclasses.replace(old, quarantine="bad", quarantined_at=1.0)

        store.mark("a", quarantine)
        pin.join()
    assert store.marks("a") == Marks(True, "bad", 1.0)


def test_a_pinned_manifest_can_be_spared(store: Store) -> None:
    store.mark("a", lambda _old: Marks(pinned=True))
    assert not store.remove("a", spare_pinned=True) and store.remove("b", spare_pinned=True)
    assert marks_of(store) == {"a": Marks(pinned=True)}
    assert store.remove("a")


def test_marks_go_with_their_manifest_and_a_new_one_of_that_id_has_none(store: Store, tmp_path: Path) -> None:
    store.mark("a", lambda _old: QUARANTINED)
    left = (tmp_path / "store/manifests/a.marks").read_bytes()
    store.remove("a")
    assert not list(tmp_path.rglob("*.marks"))
    (tmp_path / "store/manifests/a.marks").write_bytes(left)  # as a killed removal leaves them
    commit(store, "a", [noise(1, 100)])
    assert store.marks("a") == Marks()


def test_marks_without_a_manifest_are_refused_and_cleaned_up(store: Store, tmp_path: Path) -> None:
    for manifest_id in ("c", "d.e"):
        with pytest.raises(NotFoundError):
            store.mark(manifest_id, lambda _old: QUARANTINED)
        with pytest.raises(NotFoundError):
            store.marks(manifest_id)
    with pytest.raises(StoreError, match="cannot name"):
        store.mark("../key", lambda _old: QUARANTINED)
    (tmp_path / "store/manifests/c.marks").write_bytes(b"{}")
    Store.open(tmp_path / "store").close()
    assert not list(tmp_path.rglob("*.marks"))


@pytest.mark.parametrize("content", [b"", b"junk", b"[]", b'{"version": 2}', b"[" * 100_000, b"\xff\xfe"])
def test_malformed_marks_are_logged_and_quarantine(
    store: Store, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "store/manifests/a.marks").write_bytes(content)
    assert "its marks can't be used" in (marks_of(store)["a"].quarantine or "")
    assert "a.marks" in caplog.text
    assert marks_of(store)["b"] == Marks()
    store.mark("a", lambda _old: Marks())
    assert store.marks("a") == Marks()


def test_marks_that_are_a_link_quarantine_and_are_replaced_not_followed(store: Store, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(encode_marks(Marks(pinned=True)))
    (tmp_path / "store/manifests/a.marks").symlink_to(tmp_path / "elsewhere")
    assert "link" in (store.marks("a").quarantine or "")
    store.mark("a", lambda _old: QUARANTINED)
    assert store.marks("a") == QUARANTINED
    assert decode_marks((tmp_path / "elsewhere").read_bytes()) == Marks(pinned=True)


def test_marks_do_not_hinder_a_verification_nor_a_collection(store: Store) -> None:
    store.mark("a", lambda _old: QUARANTINED)
    assert store.verify().ok
    store.collect_garbage()
    assert store.marks("a") == QUARANTINED


@given(st.builds(Marks, st.booleans(), st.none() | st.text(), st.none() | st.floats(allow_nan=False)))
def test_marks_come_back(marks: Marks) -> None:
    if marks.quarantined_at not in (float("inf"), float("-inf")):
        assert decode_marks(encode_marks(marks)) == marks


def test_a_long_or_broken_reason_is_kept_as_far_as_can_be() -> None:
    assert decode_marks(encode_marks(Marks(quarantine="x" * 9999))).quarantine == "x" * 2000
    assert decode_marks(encode_marks(Marks(quarantine="a\udcffb"))).quarantine == "a?b"


@given(st.binary(max_size=200))
def test_any_bytes_are_marks_or_a_value_error(data: bytes) -> None:
    try:
        marks = decode_marks(data)
    except ValueError:
        return
    assert decode_marks(encode_marks(marks)) == marks
