"""Who can write to the store but does not have its key can delete, but can't make the store hand out other bytes."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_tools import commit, noise, text

from dormouse.errors import DamagedError, DormouseError, NotFoundError, StoreError, UntrustedError
from dormouse.store.key import Key, open_key, parse_key, read_key
from dormouse.store.key_import import import_key
from dormouse.store.manifest import encode_manifest
from dormouse.store.pack import PackWriter
from dormouse.store.store import Manifest, Store

PLAINS = [noise(1, 9000), bytes(3000), text(2, 30_000)]
GOLDEN_KEY = (
    b"dormouse-key 1\nsecret 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\nid 1b59e460c4bfd318\n"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with manifests `a` and `b`, and beside it `other/store` with the same, signed with another key."""
    for folder in (tmp_path / "store", tmp_path / "other" / "store"):
        with Store.open(folder) as store:
            commit(store, "a", PLAINS)
            commit(store, "b", [noise(9, 9000)])
    return tmp_path / "store"


def change_index(path: Path, sql: str) -> None:
    with sqlite3.connect(path / "index.sqlite") as connection:
        connection.execute(sql)
    connection.close()


def outcome(path: Path) -> str:
    """What a user of manifest `a` gets: `right`, or the name of the error. Other bytes fail the test."""
    try:
        with Store.open(path) as store:
            assert {(row.name, row.created) for row in store.manifests()} <= {("model", 1.5)}
            manifest = store.manifest("a")
            assert (manifest.body, manifest.name) == (b"body of a", "model")
            assert [bytes(store.read(digest)) for digest in manifest.refs] == PLAINS
            return "right"
    except DormouseError as error:
        assert error.remedy
        return type(error).__name__


def forged_manifest(path: Path, key: Key) -> None:
    refs = Store.open(path).manifest("b").refs
    data = encode_manifest(Manifest("a", "snapshot", "model", 1.5, b"run this", refs), 9000, key)
    (path / "manifests" / "a.manifest").write_bytes(data)


def forged_pack(path: Path, key: Key) -> None:
    """A pack of other bytes under the names of those of `a`, and an index that says so."""
    with Store.open(path) as store:
        located = store.locate(store.manifest("a").refs)
    writer = PackWriter(path / "packs" / "forged.tmp", key)
    for chunk in located:
        writer.append(chunk.digest, 0, 4096, bytes(range(256)) * 16)
    writer.finish()
    writer.path.rename(path / "packs" / "00000001.pack")
    writer.close()
    change_index(path, "DELETE FROM chunks")
    with sqlite3.connect(path / "index.sqlite") as connection:
        for entry in writer.entries.values():
            row = (entry.digest, entry.mac, 1, entry.offset, entry.stored_length, entry.plain_length, entry.codec)
            connection.execute(
                "INSERT INTO chunks (digest, mac, pack, offset, stored_length, plain_length, codec) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )
    connection.close()


def swapped_packs(path: Path) -> None:
    first, second = (path / "packs" / f"0000000{number}.pack" for number in (1, 2))
    first.rename(path / "x")
    second.rename(first)
    (path / "x").rename(second)


def copied_from_other(path: Path, name: str) -> None:
    shutil.copy(path.parent / "other" / "store" / name, path / name)


def linked(path: Path, name: str) -> None:
    (path / name).rename(path.parent / "elsewhere")
    (path / name).symlink_to(path.parent / "elsewhere")


ATTACKS: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "nothing": (lambda _path: None, {"right"}),
    "manifest renamed to another id": (
        lambda path: (path / "manifests/b.manifest").replace(path / "manifests/a.manifest"),
        {"DamagedError"},
    ),
    "manifest signed with another key": (lambda path: forged_manifest(path, Key.new()), {"UntrustedError"}),
    "manifest of another store": (lambda path: copied_from_other(path, "manifests/a.manifest"), {"UntrustedError"}),
    "manifest with our key's id and another signature": (
        lambda path: forged_manifest(path, impostor(read_key(path.parent / "key"))),
        {"DamagedError"},
    ),
    "packs swapped": (swapped_packs, {"DamagedError"}),
    "pack of another store": (lambda path: copied_from_other(path, "packs/00000001.pack"), {"right"}),
    "pack and index of another store": (
        lambda path: [copied_from_other(path, name) for name in ("packs/00000001.pack", "index.sqlite")],
        {"DamagedError"},
    ),
    "store of another key": (
        lambda path: [shutil.rmtree(path), shutil.copytree(path.parent / "other" / "store", path)],
        {"UntrustedError"},
    ),
    "pack and index forged": (
        lambda path: forged_pack(path, impostor(read_key(path.parent / "key"))),
        {"DamagedError"},
    ),
    "index row to another chunk": (
        lambda path: change_index(
            path,
            "UPDATE chunks SET (mac, pack, offset, stored_length, plain_length, codec) = (SELECT mac, pack, offset, "
            "stored_length, plain_length, codec FROM chunks WHERE pack = 2) WHERE pack = 1",
        ),
        {"DamagedError"},
    ),
    "index row of a zero chunk": (
        lambda path: change_index(path, "UPDATE chunks SET offset = 0, stored_length = 0, codec = 1"),
        {"DamagedError"},
    ),
    "index row with a far offset": (
        lambda path: change_index(path, "UPDATE chunks SET offset = 9223372036854771712 WHERE codec <> 1"),
        {"DamagedError"},
    ),
    "index row with another model": (
        lambda path: change_index(path, "UPDATE manifests SET name = 'trusted'"),
        {"right"},
    ),
    "index row newer": (lambda path: change_index(path, "UPDATE manifests SET created = 9e9"), {"right"}),
    "manifest is a link": (lambda path: linked(path, "manifests/a.manifest"), {"UntrustedError"}),
    "pack is a link": (lambda path: linked(path, "packs/00000001.pack"), {"UntrustedError"}),
    "index is a link": (lambda path: linked(path, "index.sqlite"), {"right"}),
    "packs are a link": (lambda path: linked(path, "packs"), {"UntrustedError"}),
    "manifests are a link": (lambda path: linked(path, "manifests"), {"UntrustedError"}),
    "a lock is a link": (lambda path: linked(path, "change.lock"), {"UntrustedError", "StoreError"}),
    "key is a link": (lambda path: linked(path.parent, "key"), {"UntrustedError"}),
    "manifest is a pipe": (
        lambda path: [(path / "manifests/a.manifest").unlink(), os.mkfifo(path / "manifests/a.manifest", 0o600)],
        {"UntrustedError"},
    ),
    "manifest writable": (lambda path: (path / "manifests/a.manifest").chmod(0o620), {"UntrustedError"}),
    "pack writable": (lambda path: (path / "packs/00000001.pack").chmod(0o602), {"UntrustedError"}),
    "index writable": (lambda path: (path / "index.sqlite").chmod(0o666), {"right"}),
    "store writable": (lambda path: path.chmod(0o777), {"UntrustedError"}),
    "packs writable": (lambda path: (path / "packs").chmod(0o770), {"UntrustedError"}),
    "manifests writable": (lambda path: (path / "manifests").chmod(0o702), {"UntrustedError"}),
    "key readable": (lambda path: (path.parent / "key").chmod(0o640), {"UntrustedError"}),
    "key missing": (lambda path: (path.parent / "key").unlink(), {"UntrustedError"}),
    "key half written": (lambda path: os.truncate(path.parent / "key", 40), {"DamagedError"}),
    "key of another store": (
        lambda path: shutil.copy(path.parent / "other" / "key", path.parent / "key"),
        {"UntrustedError"},
    ),
}


def impostor(key: Key | None) -> Key:
    """A key that claims the id of another one."""
    assert key is not None
    forged = Key.new()
    object.__setattr__(forged, "id", key.id)
    return forged


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_attack_without_the_key_yields_other_bytes(path: Path, attack: str) -> None:
    act, expected = ATTACKS[attack]
    act(path)  # a pack of the same chunks elsewhere has the same payloads, and our index has our signatures of them
    assert outcome(path) in expected
    index = path / "index.sqlite"
    if index.is_file() and not index.is_symlink() and path.is_dir():
        index.unlink()
        assert outcome(path) in expected | {"right", "DamagedError"}  # what only the index said is gone with it


def test_an_old_manifest_copied_back_is_a_manifest_again(path: Path) -> None:
    """Replay is not defended: it was signed, and nothing says that it was removed. It never yields other bytes."""
    saved = (path / "manifests" / "a.manifest").read_bytes()
    with Store.open(path) as store:
        store.remove("a")
        (path / "manifests" / "a.manifest").write_bytes(saved)
    assert outcome(path) == "right"
    with Store.open(path) as store:
        store.remove("a")
        store.collect_garbage()
        (path / "manifests" / "a.manifest").write_bytes(saved)
    assert outcome(path) == "DamagedError"


def test_verify_names_what_another_key_signed(path: Path) -> None:
    copied_from_other(path, "manifests/a.manifest")
    copied_from_other(path, "packs/00000002.pack")
    other, ours = (open_key(folder / "key", needed=True).id.hex() for folder in (path.parent / "other", path.parent))
    with Store.open(path) as store:
        problems = [str(damage) for damage in store.verify().damages]
        assert any(f"manifest a was signed with key {other}, and this store's key is {ours}" in it for it in problems)
        assert any(f"00000002.pack was signed with key {other}" in it for it in problems)
        with pytest.raises(UntrustedError):
            store.collect_garbage()
    assert (path / "packs" / "00000001.pack").exists()


def test_a_moved_store_is_readable_with_its_key_imported(path: Path) -> None:
    moved = path.parent / "moved" / "store"
    shutil.copytree(path, moved)
    assert outcome(moved) == "UntrustedError"
    assert not (moved.parent / "key").exists()
    key = open_key(path.parent / "key", needed=True)
    result = import_key(key, moved.parent / "key", moved, force=False)
    assert (result.changed, result.readable, result.unreadable) == (True, 2, 0)
    assert outcome(moved) == "right"
    assert not import_key(key, moved.parent / "key", moved, force=False).changed


def test_another_key_is_replaced_only_by_force_and_the_old_one_brings_all_back(path: Path) -> None:
    old, new = open_key(path.parent / "key", needed=True), Key.new()
    with pytest.raises(StoreError, match=r"0 of the store's 2 manifests would be readable and 2 not.*--force"):
        import_key(new, path.parent / "key", path, force=False)
    assert outcome(path) == "right"
    assert import_key(new, path.parent / "key", path, force=True).unreadable == 2
    assert outcome(path) == "UntrustedError"
    with Store.open(path) as store:
        assert store.manifests() == []
        commit(store, "c", PLAINS)
        assert not store.verify().ok
    assert import_key(old, path.parent / "key", path, force=True).readable == 2
    assert outcome(path) == "right"


def test_a_row_altered_under_an_open_store_is_refused_and_built_anew_at_the_next_start(path: Path) -> None:
    with Store.open(path) as store:
        change_index(path, "UPDATE manifests SET name = 'trusted' WHERE id = 'b'")
        with pytest.raises(DamagedError, match="altered row for manifest b"):
            store.manifests()
        with Store.open(path) as again:
            assert any("altered row" in note for note in again.verify().notes)
        assert {row.name for row in store.manifests()} == {"model"}


def test_what_another_key_signed_can_be_named_and_removed(path: Path) -> None:
    import_key(Key.new(), path.parent / "key", path, force=True)
    with Store.open(path) as store:
        assert store.unreadable() == {"a", "b"}
    assert cli(path.parent, "inspect", "a").returncode == UntrustedError.exit_code
    assert b"signed with key" in cli(path.parent, "inspect", "a").stderr
    assert cli(path.parent, "rm", "a", "b").returncode == 0
    with Store.open(path) as store:
        assert store.unreadable() == set()
    assert not list((path / "packs").iterdir())


def test_a_store_left_open_while_its_key_changes_says_so(path: Path) -> None:
    with Store.open(path) as store:
        import_key(Key.new(), path.parent / "key", path, force=True)
        Store.open(path).close()
        with pytest.raises(UntrustedError, match="start dormouse again"):
            store.manifests()


def test_the_text_of_a_key_never_changes() -> None:
    key = Key(bytes(range(32)))
    assert key.text() == GOLDEN_KEY
    assert parse_key(GOLDEN_KEY, "it") == key
    assert key.secret.hex() not in repr(key) + str(key) + repr(key.chunks)
    assert key.chunks.mac(16, b"x", b"y") != key.tables.mac(16, b"x", b"y")
    with pytest.raises(StoreError, match="version 2"):
        parse_key(GOLDEN_KEY.replace(b"key 1", b"key 2"), "it")


@given(st.integers(0, len(GOLDEN_KEY) - 1), st.integers(0, 255), st.binary(max_size=200))
def test_any_bytes_in_a_key_are_refused(at: int, byte: int, junk: bytes) -> None:
    changed = GOLDEN_KEY[:at] + bytes([byte]) + GOLDEN_KEY[at + 1 :]
    for data in (changed, junk, GOLDEN_KEY[:at], GOLDEN_KEY + junk):
        if data != GOLDEN_KEY:
            with pytest.raises(StoreError):
                parse_key(data, "it")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_a_key_of_another_user_is_refused(path: Path) -> None:
    os.chown(path.parent / "key", 12345, -1)
    with pytest.raises(UntrustedError, match="belongs to user 12345"):
        Store.open(path)


def test_a_lost_key_is_not_replaced_by_a_new_one(path: Path) -> None:
    (path.parent / "key").unlink()
    for _ in range(2):
        with pytest.raises(UntrustedError, match="dormouse key import"):
            Store.open(path)
    assert not (path.parent / "key").exists()


OPENER = """
import sys
from pathlib import Path
from dormouse.store.key import open_key
print(open_key(Path(sys.argv[1]), needed=False).id.hex())
"""

KILLED = """
import os, signal, sys
from pathlib import Path
from dormouse.store import files, key
at = int(sys.argv[2])
calls = 0
def step(function):
    def wrapper(*arguments, **named):
        global calls
        calls += 1
        if calls == at:
            if function is writing:
                os.pwrite(arguments[0], arguments[1][:50], 0)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return wrapper
writing = files.write_all
files.create_file, files.write_all, files.sync_folder = map(step, (files.create_file, writing, files.sync_folder))
os.fsync, os.rename = step(os.fsync), step(os.rename)
key.open_key(Path(sys.argv[1]), needed=False)
"""


def run_all(commands: list[list[str]]) -> Iterator[tuple[int, str]]:
    running = [subprocess.Popen([sys.executable, "-c", *each], stdout=subprocess.PIPE, text=True) for each in commands]
    for process in running:
        output = process.communicate(timeout=60)[0]
        yield process.returncode, output


def test_many_processes_that_start_at_once_agree_on_one_key(tmp_path: Path) -> None:
    results = set(run_all([[OPENER, str(tmp_path / "data" / "key")]] * 8))
    assert len(results) == 1
    (status, key_id) = results.pop()
    assert (status, len(key_id)) == (0, 17)
    assert [each.name for each in (tmp_path / "data").iterdir()] == ["key"]
    assert stat.S_IMODE((tmp_path / "data" / "key").stat().st_mode) == 0o600


def test_a_kill_while_the_key_is_made_leaves_none_or_a_whole_one(tmp_path: Path) -> None:
    outcomes = list(run_all([[KILLED, str(tmp_path / str(at) / "key"), str(at)] for at in range(1, 8)]))
    assert [status for status, _output in outcomes][:4] == [-9] * 4
    assert outcomes[-1][0] == 0
    for at in range(1, 8):
        path = tmp_path / str(at) / "key"
        before = read_key(path)
        key = open_key(path, needed=False)
        assert before in (None, key)
        assert [each.name for each in path.parent.iterdir()] == ["key"]


def cli(home: Path, *arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "dormouse.cli", *arguments, "--data-dir", str(home)]
    return subprocess.run(command, input=data, capture_output=True, timeout=60)


def test_the_key_verbs_move_a_key_and_show_only_its_id(path: Path) -> None:
    ours, theirs = path.parent, path.parent / "other"
    key = open_key(ours / "key", needed=True)
    assert cli(ours, "key", "show").stdout.decode().strip() == key.id.hex()
    assert cli(ours, "key", "export", str(ours / "copy")).returncode == 0
    assert (ours / "copy").read_bytes() == key.text()
    assert stat.S_IMODE((ours / "copy").stat().st_mode) == 0o600
    assert cli(ours, "key", "export", str(ours / "copy")).returncode == StoreError.exit_code
    assert cli(ours, "key", "export", "-").stdout == key.text()
    refused = cli(theirs, "key", "import", str(ours / "copy"))
    assert refused.returncode == StoreError.exit_code
    assert b"0 of the store's 2 manifests" in refused.stderr
    forced = cli(theirs, "key", "import", "--force", "-", data=key.text())
    assert forced.returncode == 0
    assert b"0 manifests readable, 2 not" in forced.stdout
    assert cli(theirs, "key", "import", "-", data=b"junk").returncode == DamagedError.exit_code
    (ours / "copy").chmod(0o644)
    assert cli(theirs, "key", "import", str(ours / "copy")).returncode == UntrustedError.exit_code
    assert cli(ours / "new", "key", "show").returncode == NotFoundError.exit_code
