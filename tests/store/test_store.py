"""What a user of the store can rely on: all or nothing, shared chunks, private files, many threads and processes."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from store_tools import commit, noise, text

from dormouse.errors import BusyError, DiskFullError, DormouseError, NotFoundError, StoreError
from dormouse.store import pack as pack_module
from dormouse.store import transaction as transaction_module
from dormouse.store.chunk import MAX_CHUNK, Digest, digest_of
from dormouse.store.codec import Codec
from dormouse.store.files import preamble, system_errors
from dormouse.store.key import Key
from dormouse.store.pack import StoredChunk, chunk_mac
from dormouse.store.store import Manifest, Store
from dormouse.store.transaction import Reserved


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "data" / "store") as opened:
        yield opened


def files(store_path: Path) -> set[str]:
    return {path.name for path in store_path.rglob("*") if path.suffix in (".pack", ".manifest", ".tmp")}


def test_what_is_committed_comes_back_also_after_reopening(tmp_path: Path) -> None:
    plains = [text(1, 100_000), noise(2, 5000), bytes(70_000), b"", text(1, 100_000)]
    for codec in Codec:
        with Store.open(tmp_path / codec.name) as store:
            refs = commit(store, "a", plains, codec)
        with Store.open(tmp_path / codec.name) as store:
            manifest = store.manifest("a")
            assert manifest == Manifest("a", "snapshot", "model", 1.5, b"body of a", refs)
            assert [bytes(store.read(digest)) for digest in manifest.refs] == plains
            assert store.verify().ok


def test_a_store_opened_to_read_has_all_and_mends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plains = [text(1, 100_000), noise(2, 5000)]
    with Store.open(tmp_path / "store") as store:
        refs = commit(store, "a", plains)
    (tmp_path / "store" / "packs" / "left.tmp").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr("dormouse.store.store.reconcile", None)
        with Store.open_to_read(tmp_path / "store") as store, store.reader() as reader:
            assert store.manifest("a").refs == refs
            assert [bytes(reader.plain(chunk)) for chunk in reader.locate(refs)] == plains
            assert reader.locate(refs, manifest_id="a") == reader.locate(refs, manifest_id="b") == reader.locate(refs)
    assert (tmp_path / "store" / "packs" / "left.tmp").exists()


@pytest.mark.parametrize(
    "harm", ["index gone", "index of zeros", "index of texts", "manifest gone", "pack gone", "nothing there"]
)
def test_a_store_that_needs_mending_is_opened_in_full_to_read(tmp_path: Path, harm: str) -> None:
    root = tmp_path / "store"
    if harm != "nothing there":
        with Store.open(root) as store:
            refs = commit(store, "a", [text(1, 100_000)])
            commit(store, "b", [text(2, 100_000)])
    if harm == "index gone":
        (root / "index.sqlite").unlink()
    elif harm == "index of zeros":
        (root / "index.sqlite").write_bytes(bytes(40_000))
    elif harm == "index of texts":
        with contextlib.closing(sqlite3.connect(root / "index.sqlite")) as connection:
            ((table,),) = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'chunks'").fetchall()
            lax = table.replace("STRICT", "").replace("INTEGER NOT NULL", "TEXT NOT NULL")
            connection.executescript(
                "PRAGMA foreign_keys = OFF; PRAGMA legacy_alter_table = ON; ALTER TABLE chunks RENAME TO old;"
                f"{lax}; INSERT INTO chunks SELECT * FROM old; DROP TABLE old;"
            )
    elif harm == "manifest gone":
        (root / "manifests" / "b.manifest").unlink()
    elif harm == "pack gone":
        (root / "packs" / "00000002.pack").unlink()
    with Store.open_to_read(root) as store:
        if harm == "nothing there":
            assert store.manifests() == []
        else:
            assert bytes(store.read(refs[0])) == text(1, 100_000)
            assert {row.id for row in store.manifests()} == {"a"} | ({"b"} if harm != "manifest gone" else set())


def test_leaving_without_commit_leaves_no_trace(store: Store, tmp_path: Path) -> None:
    with store.begin() as transaction:
        transaction.put(noise(1, 10_000))
        assert any(name.endswith(".tmp") for name in files(tmp_path))
    assert files(tmp_path) == set()
    with pytest.raises(NotFoundError, match="no manifest a"):
        store.manifest("a")


def test_a_transaction_that_has_ended_takes_nothing(store: Store) -> None:
    with store.begin() as transaction:
        transaction.put(b"x" * 100)
    with pytest.raises(StoreError, match="ended"):
        transaction.put(b"y" * 100)
    with pytest.raises(StoreError, match="ended"):
        transaction.commit(Manifest("a", "k", "n", 0.0, b"", []))


def test_chunks_are_shared_and_counted_once(store: Store, tmp_path: Path) -> None:
    both, only = noise(1, 20_000), noise(2, 30_000)
    with store.begin() as transaction:
        refs = [transaction.put(plain) for plain in (both, bytes(50_000), both)]
        assert (transaction.raw_bytes, transaction.stored_bytes, transaction.new_chunks) == (90_000, 20_000, 2)
        transaction.commit(Manifest("a", "snapshot", "one", 1.0, b"", refs))
    with store.begin() as transaction:
        refs = [transaction.put(plain) for plain in (both, only)]
        assert (transaction.raw_bytes, transaction.stored_bytes, transaction.new_chunks) == (50_000, 30_000, 1)
        transaction.commit(Manifest("b", "weights", "two", 2.0, b"", refs))
    first, second = store.manifests()
    assert (first.id, first.raw_bytes, first.stored_bytes, first.shared_bytes) == ("a", 90_000, 20_000, 20_000)
    assert (second.id, second.raw_bytes, second.stored_bytes, second.shared_bytes) == ("b", 50_000, 50_000, 20_000)
    assert [row.id for row in store.manifests(kind="weights")] == ["b"]
    assert [row.id for row in store.manifests(name="one")] == ["a"]
    assert store.manifests(kind="weights", name="one") == []


def test_a_commit_without_new_chunks_makes_no_pack(store: Store, tmp_path: Path) -> None:
    commit(store, "a", [noise(1, 5000)])
    commit(store, "b", [noise(1, 5000)])
    commit(store, "empty", [])
    assert files(tmp_path) == {"00000001.pack", "a.manifest", "b.manifest", "empty.manifest"}


def test_a_manifest_may_only_name_chunks_that_are_there_and_a_free_sound_id(store: Store) -> None:
    refs = commit(store, "a", [noise(1, 100)])
    for manifest_id, wanted, message in (
        ("b", [Digest(bytes(32))], "never put"),
        ("a", refs, "already"),
        ("../b", refs, "cannot name"),
        ("", refs, "cannot name"),
    ):
        with store.begin() as transaction:
            transaction.put(noise(2, 100))
            with pytest.raises(StoreError, match=message):
                transaction.commit(Manifest(manifest_id, "k", "n", 0.0, b"", wanted))
    assert [row.id for row in store.manifests()] == ["a"]
    assert store.verify().chunks == 1


def test_a_chunk_has_at_most_16_mib(store: Store) -> None:
    with store.begin() as transaction:
        transaction.put(bytes(MAX_CHUNK))
        with pytest.raises(StoreError, match="too long"):
            transaction.put(bytes(MAX_CHUNK + 1))


def test_all_files_are_private(store: Store, tmp_path: Path) -> None:
    commit(store, "a", [noise(1, 100)])
    with store.begin() as transaction:
        transaction.put(noise(2, 100))
        for path in (tmp_path / "data").rglob("*"):
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o700 if path.is_dir() else 0o600), path


def test_a_place_that_cannot_hold_a_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="file"):
        Store.open(tmp_path / "file" / "store")


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.manifests()


def test_many_threads_put_the_same_chunks_once(store: Store) -> None:
    plains = [text(seed % 20, 30_000) for seed in range(200)]
    with store.begin() as transaction, ThreadPoolExecutor(8) as pool:
        refs = list(pool.map(transaction.put, plains))
        assert transaction.new_chunks == 20
        transaction.commit(Manifest("a", "k", "n", 0.0, b"", refs))
    assert [bytes(store.read(digest)) for digest in refs[:20]] == plains[:20]


def test_a_removed_manifest_is_gone_and_garbage_collection_frees_its_chunks(store: Store, tmp_path: Path) -> None:
    shared = noise(1, 50_000)
    commit(store, "a", [shared, noise(2, 50_000)])
    (kept,) = commit(store, "b", [shared])
    commit(store, "c", [noise(3, 100_000)])
    store.remove("a")
    store.remove("c")
    with pytest.raises(NotFoundError):
        store.remove("a")
    report = store.collect_garbage()
    assert (report.packs_deleted, report.packs_rewritten, report.packs_kept) == (1, 0, 0)
    assert report.freed_bytes > 100_000
    assert bytes(store.read(kept)) == shared
    store.remove("b")
    store.collect_garbage()
    assert files(tmp_path) == set()


def test_a_pack_that_is_mostly_dead_is_rewritten_once(store: Store, tmp_path: Path) -> None:
    small = noise(1, 5000)
    commit(store, "a", [noise(2, 100_000), small, bytes(9000)])
    (kept, zeros) = commit(store, "b", [small, bytes(9000)])
    store.remove("a")
    report = store.collect_garbage()
    assert (report.packs_deleted, report.packs_rewritten) == (0, 1)
    assert report.freed_bytes > 90_000
    assert files(tmp_path) == {"00000002.pack", "b.manifest"}
    assert (bytes(store.read(kept)), bytes(store.read(zeros))) == (small, bytes(9000))
    assert store.verify().ok
    assert store.collect_garbage().packs_rewritten == 0


def test_garbage_collection_waits_for_readers_who_then_end_well(store: Store) -> None:
    (digest,) = commit(store, "a", [noise(1, 50_000)])
    with store.reader() as reader:
        (chunk,) = reader.locate([digest])
        store.remove("a")
        with pytest.raises(BusyError):
            store.collect_garbage(wait=0.05)
        done = threading.Event()
        collector = threading.Thread(target=lambda: (store.collect_garbage(), done.set()))
        collector.start()
        assert not done.wait(0.1)
        assert bytes(reader.plain(chunk)) == noise(1, 50_000)
    collector.join()
    assert done.is_set()
    with pytest.raises(StoreError, match=digest.hex()):
        store.read(digest)


def test_a_chunk_that_a_running_transaction_relies_on_is_not_collected(store: Store) -> None:
    commit(store, "a", [noise(1, 50_000)])
    with store.begin() as transaction:
        digest = transaction.put(noise(1, 50_000))
        store.remove("a")
        with pytest.raises(BusyError):
            store.collect_garbage(wait=0.05)
        transaction.commit(Manifest("b", "k", "n", 0.0, b"", [digest]))
    store.collect_garbage()
    assert bytes(store.read(digest)) == noise(1, 50_000)


def test_dead_chunks_of_a_pack_that_stays_can_be_used_again(store: Store) -> None:
    commit(store, "a", [noise(1, 50_000), noise(2, 10_000)])
    commit(store, "b", [noise(1, 50_000)])
    store.remove("a")
    assert store.collect_garbage().packs_rewritten == 0
    (again,) = commit(store, "c", [noise(2, 10_000)])
    assert store.manifests(name="model")[1].stored_bytes == 10_000
    assert bytes(store.read(again)) == noise(2, 10_000)


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from store_tools import commit, text
from dormouse.store.store import Store
path, name = Path(sys.argv[1]), sys.argv[2]
with Store.open(path) as store:
    for turn in range(12):
        commit(store, f"{name}-{turn}", [text(turn, 40_000), text(hash(name) % 1000 + turn, 40_000)])
        if turn % 2:
            store.remove(f"{name}-{turn - 1}")
        if turn % 4 == 3:
            store.collect_garbage()
"""


def test_processes_share_one_store(store: Store, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "data" / "store")]
    tools = str(Path(__file__).parent)
    writers = [subprocess.Popen([*command, name, tools], stderr=subprocess.PIPE) for name in ("left", "right")]
    for writer in writers:
        assert writer.communicate()[1] == b""
        assert writer.returncode == 0
    kept = {f"{name}-{turn}" for name in ("left", "right") for turn in range(1, 12, 2)}
    assert {row.id for row in store.manifests()} == kept
    assert store.verify().ok
    for manifest_id in kept:
        turn = int(manifest_id.split("-")[1])
        assert bytes(store.read(store.manifest(manifest_id).refs[0])) == text(turn, 40_000)


def test_an_index_built_anew_by_another_process_is_noticed(store: Store, tmp_path: Path) -> None:
    commit(store, "a", [noise(1, 100)])
    (tmp_path / "data" / "store" / "index.sqlite").unlink()
    with pytest.raises(DormouseError, match="index"):
        store.manifests()
    with Store.open(tmp_path / "data" / "store") as other:
        commit(other, "b", [noise(2, 100)])
    assert [row.id for row in store.manifests()] == ["a", "b"]


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (errno.ENOSPC, DiskFullError, "disk is full: writing .*x failed, 5 bytes were needed"),
        (errno.EDQUOT, DiskFullError, "disk is full"),
        (errno.EIO, StoreError, "writing .*x failed: Input/output error"),
        (errno.EROFS, StoreError, "writing .*x failed: Read-only file system"),
    ],
)
def test_system_errors_say_what_was_done_to_which_file(
    tmp_path: Path, code: int, kind: type[StoreError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught, system_errors(tmp_path / "x", "writing", 5):
        raise OSError(code, os.strerror(code))
    assert caught.value.remedy


def test_a_store_of_a_newer_program_is_refused_and_left_alone(store: Store, tmp_path: Path) -> None:
    commit(store, "a", [noise(1, 100)])
    (pack,) = tmp_path.rglob("*.pack")
    newer = preamble(b"DORMPACK", 2, bytes(8)) + pack.read_bytes()[32:]
    (pack.parent / "00000002.pack").write_bytes(newer)
    before = files(tmp_path)
    with pytest.raises(StoreError, match=r"version 2.*Update dormouse"):
        Store.open(tmp_path / "data" / "store")
    assert files(tmp_path) == before


def test_names_that_are_not_ours_are_left_alone(store: Store, tmp_path: Path) -> None:
    for name in ("notes.txt", "old.pack", "١.pack"):
        (tmp_path / "data" / "store" / "packs" / name).write_bytes(b"mine")
    (tmp_path / "data" / "store" / "manifests" / "a b.manifest").write_bytes(b"mine")
    with Store.open(tmp_path / "data" / "store") as again:
        commit(again, "a", [noise(1, 100)])
        again.remove("a")
        again.collect_garbage()
        assert again.verify().ok
    assert {path.read_bytes() for path in (tmp_path / "data" / "store" / "packs").iterdir()} == {b"mine"}
    assert (tmp_path / "data" / "store" / "manifests" / "a b.manifest").exists()


def test_a_large_commit_from_many_threads_makes_several_packs(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transaction_module, "_SPREAD_FROM", 1 << 20)
    gate = threading.Barrier(4, timeout=20)
    write_all = pack_module.write_all
    meet = threading.Event()

    def together(fd: int, data: bytes, offset: int) -> None:
        if meet.is_set() and len(data) == 300_000:
            with contextlib.suppress(threading.BrokenBarrierError):
                gate.wait(5)
        write_all(fd, data, offset)

    monkeypatch.setattr(pack_module, "write_all", together)
    plains = [noise(seed, 300_000) for seed in range(20)]
    with store.begin() as transaction:
        digests = [transaction.put(plain, codec=Codec.RAW) for plain in plains[:4]]
        meet.set()
        with ThreadPoolExecutor(4) as pool:
            digests += pool.map(lambda plain: transaction.put(plain, codec=Codec.RAW), plains[4:])
        transaction.commit(Manifest("m", "k", "n", 1.0, b"", digests))
    assert 1 < len(list((tmp_path / "data" / "store").rglob("*.pack"))) <= 4
    assert [bytes(store.read(digest)) for digest in digests] == plains
    assert store.verify().ok
    store.remove("m")
    store.collect_garbage()
    assert files(tmp_path / "data" / "store") == set()


def test_a_chunk_that_could_not_be_written_keeps_all_from_being_committed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all = pack_module.write_all

    def failing(fd: int, data: bytes, offset: int) -> None:
        if len(data) == 5000:
            raise OSError(errno.EIO, "Input/output error")
        write_all(fd, data, offset)

    monkeypatch.setattr(pack_module, "write_all", failing)
    with store.begin() as transaction:
        digest = transaction.put(noise(1, 6000))
        with pytest.raises(StoreError, match="writing to"):
            transaction.put(noise(2, 5000))
        with pytest.raises(StoreError, match="writing to"):
            transaction.commit(Manifest("m", "k", "n", 1.0, b"", [digest]))
    assert files(tmp_path / "data" / "store") == set()


def test_what_is_there_is_told_and_used(store: Store) -> None:
    chunk, other = (digest_of(noise(1, 5000)), 5000), (digest_of(noise(2, 6000)), 6000)
    with store.begin() as transaction:
        assert transaction.has([chunk]) == [False]
        digest = transaction.put(noise(1, 5000))
        assert transaction.has([other, chunk, chunk]) == [False, True, True]
        transaction.commit(Manifest("m", "k", "n", 1.0, b"", [digest]))
    with store.begin() as transaction:
        assert transaction.has([other, chunk]) == [False, True]
        with pytest.raises(StoreError, match="never put"):
            transaction.commit(Manifest("m2", "k", "n", 1.0, b"", [digest, other[0]]))
    with store.begin() as transaction:
        assert transaction.has([chunk]) == [True]
        transaction.commit(Manifest("m2", "k", "n", 1.0, b"", [digest]))


def coded(plain: bytes, key: Key) -> StoredChunk:
    """A chunk as another process would store it."""
    mac = chunk_mac(key, digest_of(plain), Codec.RAW, len(plain), plain)
    return StoredChunk(digest_of(plain), mac, 0, 0, len(plain), len(plain), Codec.RAW)


def write(reserved: Reserved, plains: list[bytes]) -> None:
    with reserved.writer.path.open("r+b") as pack:
        for offset, plain in zip(reserved.offsets, plains, strict=True):
            if offset is not None:
                pack.seek(offset)
                pack.write(plain)


def test_of_those_who_put_a_chunk_at_once_one_is_to_store_it(store: Store) -> None:
    plains = [noise(number, 5000) for number in range(4)]
    chunks = [(digest_of(plain), len(plain)) for plain in plains]
    with store.begin() as transaction:
        transaction.put(plains[3])
        assert transaction.lacks([chunks[0], chunks[1], chunks[0], chunks[3]]) == [True, True, False, False]
        assert transaction.lacks([chunks[1], chunks[2]]) == [False, True]
        first = transaction.reserve([coded(plain, store.key) for plain in plains[:2]])
        second = transaction.reserve([coded(plain, store.key) for plain in plains[1:]])
        assert [offset is None for offset in second.offsets] == [True, False, True]
        write(second, plains[1:])
        transaction.written(second, whole=True)
        write(first, plains[:2])
        transaction.written(first, whole=True)
        assert (transaction.new_chunks, transaction.stored_bytes) == (4, 20000)
        transaction.commit(Manifest("m", "k", "n", 1.0, b"", [digest for digest, _length in chunks]))
    assert [bytes(store.read(digest)) for digest, _length in chunks] == plains
    assert store.verify().ok


def test_places_that_are_never_written_forbid_the_commit(store: Store, tmp_path: Path) -> None:
    plains = [noise(number, 5000) for number in range(3)]
    with store.begin() as transaction:
        digest = transaction.put(plains[0])
        reserved = transaction.reserve([coded(plain, store.key) for plain in plains[1:]])
        transaction.written(reserved, whole=False)
        assert transaction.new_chunks == 1
        with pytest.raises(StoreError, match="could not be written"):
            transaction.commit(Manifest("m", "k", "n", 1.0, b"", [digest]))
    assert files(tmp_path / "data" / "store") == set()
