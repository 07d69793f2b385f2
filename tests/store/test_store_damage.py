"""Whatever happens to the files, reading gives the right bytes or an error that names the chunk and its pack."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_tools import commit, noise, text

from dormouse.errors import DamagedError, DormouseError, NotFoundError
from dormouse.store.chunk import Digest
from dormouse.store.key import open_key
from dormouse.store.pack import read_table
from dormouse.store.store import Store

PLAINS = [noise(1, 40), bytes(3000), text(2, 300)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as opened:
        yield opened


def flip(path: Path, at: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def the_pack(tmp_path: Path) -> Path:
    (pack,) = (tmp_path / "store" / "packs").glob("*.pack")
    return pack


def test_a_flipped_bit_anywhere_in_a_pack_is_found_or_is_padding(store: Store, tmp_path: Path) -> None:
    refs = commit(store, "a", PLAINS)
    pack = the_pack(tmp_path)
    good = pack.read_bytes()
    key = open_key(tmp_path / "key", needed=True)
    table = read_table(pack, 1, key)
    end = max(chunk.offset + 4096 for chunk in table)
    used = set(range(32)) | set(range(end, len(good)))
    for chunk in table:
        used |= set(range(chunk.offset, chunk.offset + chunk.stored_length))
    assert all(good[at] == 0 for at in set(range(len(good))) - used)
    with store.reader() as reader:
        located = reader.locate(refs)
        for at in range(len(good)):
            flip(pack, at, at % 8)
            found = False
            try:
                assert read_table(pack, 1, key) == table
            except DamagedError as error:
                found = True
                assert pack.name in str(error)
            for chunk, plain in zip(located, PLAINS, strict=True):
                try:
                    assert bytes(reader.plain(chunk)) == plain
                except DamagedError as error:
                    found = True
                    assert chunk.digest.hex() in str(error) and pack.name in str(error)
            assert found == (at in used), at
            flip(pack, at, at % 8)


@pytest.mark.parametrize("where", ["payload", "table", "preamble", "manifest"])
def test_verify_names_what_is_damaged_and_whom_it_hits(store: Store, tmp_path: Path, where: str) -> None:
    refs = commit(store, "a", PLAINS)
    commit(store, "other", [noise(9, 100)])
    pack = tmp_path / "store" / "packs" / "00000001.pack"
    key = open_key(tmp_path / "key", needed=True)
    first = min(chunk.offset for chunk in read_table(pack, 1, key) if chunk.offset)
    at = {"payload": first, "table": pack.stat().st_size - 50, "preamble": 3, "manifest": 90}[where]
    flip(tmp_path / "store" / "manifests" / "a.manifest" if where == "manifest" else pack, at)
    report = store.verify()
    assert not report.ok
    (damage,) = report.damages
    assert damage.manifests == ("a",)
    assert damage.pack == (None if where == "manifest" else pack.name)
    assert damage.chunk in (refs if where == "payload" else [None])
    assert "a" in str(damage)
    assert store.verify(deep=False).damages == [damage]


def test_a_damaged_manifest_is_an_error_stops_collection_and_can_be_removed(store: Store, tmp_path: Path) -> None:
    commit(store, "a", PLAINS)
    flip(tmp_path / "store" / "manifests" / "a.manifest", 90)
    with pytest.raises(DamagedError, match="manifest a"):
        store.manifest("a")
    with pytest.raises(DamagedError, match="manifest a"):
        store.collect_garbage()
    store.remove("a")
    assert store.collect_garbage().packs_deleted == 1


def test_a_damaged_chunk_is_stored_afresh_by_the_next_capture(store: Store, tmp_path: Path) -> None:
    refs = commit(store, "a", PLAINS)
    flip(the_pack(tmp_path), store.locate(refs)[0].offset)
    with pytest.raises(DamagedError, match=refs[0].hex()):
        store.read(refs[0])
    assert commit(store, "b", PLAINS) == refs
    for _ in range(2):
        for manifest_id in ("a", "b"):
            assert [bytes(store.read(digest)) for digest in store.manifest(manifest_id).refs] == PLAINS
        assert store.verify().ok
        lose_index(store, tmp_path)


def lose_index(store: Store, tmp_path: Path) -> None:
    (tmp_path / "store" / "index.sqlite").unlink()
    Store.open(tmp_path / "store").close()


@pytest.mark.parametrize("length", [0, 10, 4096, 4100, 9000])
def test_a_truncated_pack_never_gives_wrong_bytes(store: Store, tmp_path: Path, length: int) -> None:
    refs = commit(store, "a", PLAINS)
    pack = the_pack(tmp_path)
    pack.write_bytes(pack.read_bytes()[:length])
    assert_right_or_named(store, refs)
    assert any(damage.pack == pack.name for damage in store.verify().damages)
    lose_index(store, tmp_path)
    assert_right_or_named(store, refs)
    assert not store.verify().ok


def assert_right_or_named(store: Store, refs: list[Digest]) -> None:
    for digest, plain in zip(refs, PLAINS, strict=True):
        try:
            assert bytes(store.read(digest)) == plain
        except DamagedError as error:
            assert digest.hex() in str(error)


def test_a_deleted_pack_is_named_and_healed_by_the_next_capture(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refs = commit(store, "a", PLAINS)
    the_pack(tmp_path).unlink()
    with pytest.raises(DamagedError, match=r"00000001\.pack.*missing"):
        store.read(refs[0])
    assert {damage.manifests for damage in store.verify().damages} == {("a",)}
    store.close()
    with Store.open(tmp_path / "store") as again:
        assert "pack is missing" in caplog.text
        assert commit(again, "b", PLAINS) == refs
        assert the_pack(tmp_path).name == "00000002.pack"
        assert [bytes(again.read(digest)) for digest in refs] == PLAINS
        again.collect_garbage()
        assert again.verify().ok


def test_a_pack_lost_together_with_the_index_leaves_its_manifest_named(store: Store, tmp_path: Path) -> None:
    refs = commit(store, "a", PLAINS)
    the_pack(tmp_path).unlink()
    lose_index(store, tmp_path)
    with pytest.raises(DamagedError, match="no pack"):
        store.read(refs[0])
    assert {damage.manifests for damage in store.verify().damages} == {("a",)}
    commit(store, "b", PLAINS)
    assert store.verify().ok
    store.remove("a")
    store.remove("b")
    store.collect_garbage()
    assert store.verify().ok


def garbage_index(path: Path) -> None:
    path.write_bytes(b"this is no database " * 1000)


def truncated_index(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def empty_index(path: Path) -> None:
    path.write_bytes(b"")


def old_index(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 77")
    connection.close()


def zeroed_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:8192] = bytes(4096)
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [Path.unlink, garbage_index, truncated_index, empty_index, old_index, zeroed_page])
@pytest.mark.parametrize("keep_log", [True, False])
def test_an_unusable_index_is_built_anew_visibly(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: object, keep_log: bool
) -> None:
    refs = commit(store, "a", PLAINS)
    commit(store, "b", [noise(5, 100)])
    log = tmp_path / "store" / "index.sqlite-wal"
    saved = log.read_bytes()
    store.close()
    assert callable(harm)
    harm(tmp_path / "store" / "index.sqlite")
    if keep_log:
        log.write_bytes(saved)
    with Store.open(tmp_path / "store") as again:
        if not (keep_log and again.verify().notes == []):  # SQLite itself may repair what its log still holds
            assert "built anew" in caplog.text
            assert any("built anew" in note for note in again.verify().notes)
        assert [row.id for row in again.manifests()] == ["a", "b"]
        assert [bytes(again.read(digest)) for digest in refs] == PLAINS
        assert again.verify().ok


def test_a_flipped_bit_anywhere_in_the_index_never_gives_wrong_bytes_nor_loses_a_chunk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    original = tmp_path / "original"
    with Store.open(original) as store:
        refs = commit(store, "a", PLAINS)
        commit(store, "b", [noise(5, 100)])
    content = (original / "index.sqlite").read_bytes()
    interesting = [at for at, byte in enumerate(content) if byte][::13]
    for at in interesting:
        path = tmp_path / "copy"
        shutil.copytree(original, path)
        flip(path / "index.sqlite", at, at % 8)
        try:
            with Store.open(path) as store:
                for digest, plain in zip(refs, PLAINS, strict=True):
                    try:
                        assert bytes(store.read(digest)) == plain
                    except DormouseError as error:
                        assert not isinstance(error, NotFoundError)
                store.verify()
                store.collect_garbage()
        except DormouseError as error:
            assert error.remedy
        (path / "index.sqlite").unlink()
        with Store.open(path) as store:
            assert [bytes(store.read(digest)) for digest in store.manifest("a").refs] == PLAINS
        shutil.rmtree(path)


def test_a_pack_of_which_a_needed_chunk_is_damaged_is_not_rewritten(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit(store, "a", [noise(1, 50_000), noise(2, 5000)])
    (kept,) = commit(store, "b", [noise(2, 5000)])
    store.remove("a")
    flip(the_pack(tmp_path), store.locate([kept])[0].offset)
    report = store.collect_garbage()
    assert (report.packs_rewritten, report.packs_kept) == (0, 1)
    assert kept.hex() in caplog.text
    assert the_pack(tmp_path).name == "00000001.pack"


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("value", [None, 7, "x", b"x", 1.5])
def test_a_row_of_the_index_with_values_of_other_types_is_an_altered_one(
    tmp_path: Path, at: int, value: object
) -> None:
    with Store.open(tmp_path / "store") as store:
        row: list[object] = ["a", "snapshot", "m", 1.0, 3, b"m" * 32]
        row[at] = value
        with pytest.raises(DamagedError, match="altered row"):
            store._layout.index._check_row(*row)
