"""Snapshots as ordinary CRIU images, in both directions: plain `criu` is the judge of what comes out and goes in."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from fake_dump import MACHINE, fake_dump
from test_memory_paths import RSEQ_BYTES, assert_same, captured, memory, restored, start

from dormouse.cli import cli
from dormouse.errors import ConfigError, DamagedError, NotFoundError, SnapshotError
from dormouse.snapshot.cell import Cell
from dormouse.snapshot.criu_images import PAGE, encode_pagemap, parse_pagemap
from dormouse.snapshot.criu_setup import Criu
from dormouse.snapshot.export import Exported, export
from dormouse.snapshot.images import decode_body
from dormouse.snapshot.import_images import import_images, parse_external
from dormouse.snapshot.mapped_files import DigestCache
from dormouse.snapshot.pages import extents, process_map, read, usage
from dormouse.snapshot.restore import restore
from dormouse.snapshot.tree import External, Home, ProcessTree
from dormouse.store.store import Store

pytestmark = pytest.mark.root


def run_criu(home: Home, criu: Criu, *words: str, folder: Path) -> None:
    log = folder.parent / "criu.log"
    common = ("--images-dir", str(folder), "--work-dir", str(folder.parent), "--log-file", str(log), "-v2")
    process = home.spawn([*criu.argv_prefix, *words, *common, "--manage-cgroups=ignore"], env={"PATH": os.defpath})
    code = home.wait(process.pid, 60)
    assert code == 0, log.read_text() if log.exists() else code


def plain_dump(tree: ProcessTree, criu: Criu, folder: Path) -> Path:
    folder.mkdir()
    run_criu(tree.home, criu, "dump", "--tree", str(tree.pid), "--leave-stopped", folder=folder)
    return folder


def plain_restore(criu: Criu, folder: Path) -> Home:
    """In a fresh cell, stopped before it can do much."""
    cell = Cell.create()
    try:
        run_criu(cell, criu, "restore", "--restore-detached", "--leave-stopped", folder=folder)
    except BaseException:
        cell.close()
        raise
    for pid in cell.processes():
        os.kill(pid, signal.SIGSTOP)
    return cell


def imported(folder: Path, store: Store, **given: object) -> str:
    options = {"name": "p", "key": {}, "machine": MACHINE, "externals": (), "now": time.time} | given
    return import_images(folder, store, **options).snapshot_id  # type: ignore[arg-type]


def pages_of(folder: Path) -> dict[tuple[str, int], bytes]:
    """(page map, address) -> page of a folder of images, zero pages left out."""
    found = {}
    for path in folder.glob("pagemap-*.img"):
        pages_id, runs = parse_pagemap(path.read_bytes(), path.name)
        with (folder / f"pages-{pages_id}.img").open("rb") as pages:
            for run in runs:
                for i in range(run.pages):
                    page = pages.read(PAGE)
                    if any(page):
                        found[path.name, run.address + i * PAGE] = page
            assert not pages.read(1)
    return found


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_plain_criu_restores_an_exported_snapshot(
    store: Store,
    criu: Criu,
    tmp_path: Path,
    how: str,
) -> None:
    tree = start(tmp_path, how)
    result = captured(tree, store, criu)
    expected = memory(tree.home)
    tree.home.close()
    done = export(result.snapshot_id, store, tmp_path / "images")
    assert stat.S_IMODE((tmp_path / "images").stat().st_mode) == 0o700
    files = list((tmp_path / "images").iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert (len(files), sum(path.stat().st_size for path in files)) == (done.images, done.size)
    home = plain_restore(criu, tmp_path / "images")
    try:
        assert_same(memory(home), expected)
    finally:
        home.close()


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_plain_dump_comes_in_and_goes_out_as_it_was(
    store: Store,
    criu: Criu,
    tmp_path: Path,
    how: str,
) -> None:
    tree = start(tmp_path, how)
    original = plain_dump(tree, criu, tmp_path / "original")
    expected = memory(tree.home)
    tree.home.close()
    identity = imported(original, store)
    ours = restored(identity, store, criu, fill=True)
    try:
        assert_same(memory(ours.tree.home), expected)
    finally:
        ours.tree.home.close()
    export(identity, store, tmp_path / "again")
    assert pages_of(tmp_path / "again") == pages_of(original)
    for path in original.glob("*.img"):
        if not path.name.startswith("page"):
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    home = plain_restore(criu, tmp_path / "again")
    try:
        assert_same(memory(home), expected)
    finally:
        home.close()
    assert store.verify().ok


def test_what_was_imported_once_is_not_stored_again(
    store: Store,
    criu: Criu,
    tmp_path: Path,
) -> None:
    tree = start(tmp_path, "alone")
    original = plain_dump(tree, criu, tmp_path / "original")
    tree.home.close()
    first = imported(original, store)
    export(first, store, tmp_path / "exported")
    options = {"name": "q", "key": {}, "machine": MACHINE, "externals": (), "now": time.time}
    again = import_images(tmp_path / "exported", store, **options)  # type: ignore[arg-type]
    assert again.stored_bytes == 0
    one, two = (decode_body(store.manifest(identity).body, identity) for identity in (first, again.snapshot_id))
    assert [space.windows for space in one.memory] == [space.windows for space in two.memory]


def test_crit_reads_what_is_exported(store: Store, criu: Criu, tmp_path: Path) -> None:
    """CRIU's own judge, where it is installed."""
    crit = shutil.which("crit")
    if crit is None:
        pytest.skip("crit is not installed")
    tree = start(tmp_path, "alone")
    original = plain_dump(tree, criu, tmp_path / "original")
    tree.home.close()
    export(imported(original, store), store, tmp_path / "exported")
    for path in sorted((tmp_path / "exported").glob("*.img")):
        if path.name.startswith("pages-"):
            continue
        shown = subprocess.run([crit, "show", str(path)], capture_output=True, text=True, check=True).stdout
        if not path.name.startswith("pagemap-"):
            expected = subprocess.run([crit, "show", str(original / path.name)], capture_output=True, text=True)
            assert shown == expected.stdout
        else:
            entries = json.loads(shown)["entries"]
            assert all(entry["flags"] == "PE_PRESENT" for entry in entries[1:])


def test_the_smallest_dump_is_taken_in(store: Store, tmp_path: Path) -> None:
    folder = fake_dump(tmp_path / "dump")
    (folder / "dump.log").write_text("(00.1) hello")
    identity = imported(folder, store)
    body = decode_body(store.manifest(identity).body, identity)
    (space,) = body.memory
    assert (space.pages, space.used_pages(), body.pid) == (2, 1, 7)
    assert "dump.log" not in [image.name for image in body.images]


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def pagemap_with(*entry: int) -> bytes:
    head = encode_pagemap(1, [])
    return head + struct.pack("<I", len(entry)) + bytes(entry)


BAD = {
    "no inventory": (lambda folder: (folder / "inventory.img").unlink(), "inventory.img is missing"),
    "inventory of a newer kind": (edit("inventory.img", lambda data: data[:-1] + b"\x63"), "version 99"),
    "a parent dump": (lambda folder: (folder / "parent").symlink_to("/"), "link to a parent"),
    "a link": (lambda folder: (folder / "ghost-file-1.img").symlink_to("/etc/passwd"), "not a regular file"),
    "a folder": (lambda folder: (folder / "x.img").mkdir(), "not a regular file"),
    "a pipe": (lambda folder: os.mkfifo(folder / "x.img"), "not a regular file"),
    "an unknown file": (lambda folder: (folder / "database").write_bytes(b"x"), "no file that CRIU writes"),
    "unknown pages": (lambda folder: (folder / "pages-9.img").write_bytes(b"x"), "no page map tells"),
    "truncated pages": (lambda folder: os.truncate(folder / "pages-1.img", PAGE), "tells of 8192"),
    "missing pages": (lambda folder: (folder / "pages-1.img").unlink(), "pages-1.img is missing"),
    "too many pages": (lambda folder: os.truncate(folder / "pages-1.img", 3 * PAGE), "tells of 8192"),
    "another machine": (edit("core-7.img", lambda data: data[:-1] + b"\x05"), "made on s390x"),
    "an unheard-of machine": (edit("core-7.img", lambda data: data[:-1] + b"\x63"), "an unknown machine"),
    "no process": (edit("pstree.img", lambda data: data[:8]), "0 roots"),
    "no mappings": (lambda folder: (folder / "mm-7.img").unlink(), "mm-7.img is missing"),
    "a parent's pages": (
        lambda folder: (folder / "pagemap-7.img").write_bytes(pagemap_with(8, 0x80, 0x20, 16, 2, 32, 1)),
        "earlier dump",
    ),
    "lazy pages": (
        lambda folder: (folder / "pagemap-7.img").write_bytes(pagemap_with(8, 0x80, 0x20, 16, 2, 32, 2)),
        "lazy",
    ),
    "a torn page map": (lambda folder: os.truncate(folder / "pagemap-7.img", 15), "ends in the middle"),
    "a huge page map": (lambda folder: os.truncate(folder / "pagemap-7.img", 1 << 40), "lacks field 1"),
    "a huge list of mappings": (lambda folder: os.truncate(folder / "mm-7.img", 1 << 40), "at most"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_whole_dump_is_refused_and_leaves_nothing(
    store: Store,
    tmp_path: Path,
    what: str,
) -> None:
    spoil, message = BAD[what]
    folder = fake_dump(tmp_path / "dump")
    spoil(folder)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(SnapshotError, match=message):
        imported(folder, store)
    assert store.manifests() == []
    assert not list((tmp_path / "data" / "store").rglob("*.pack"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_no_folder_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="there is no folder"):
        imported(tmp_path / "nowhere", store)


def test_only_a_new_or_empty_folder_is_written_to(store: Store, tmp_path: Path) -> None:
    identity = imported(fake_dump(tmp_path / "dump"), store)
    (tmp_path / "empty").mkdir()
    assert export(identity, store, tmp_path / "empty").images == 8
    for folder, why in ((tmp_path / "empty", "not empty"), (tmp_path / "a" / "b", "no folder")):
        with pytest.raises(ConfigError, match=why):
            export(identity, store, folder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="not a folder"):
        export(identity, store, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_a_failed_export_leaves_nothing(store: Store, tmp_path: Path) -> None:
    folder = fake_dump(tmp_path / "dump")
    (folder / "x.img").write_bytes(os.urandom(100_000))
    identity = imported(folder, store)
    (pack,) = (tmp_path / "data" / "store").rglob("*.pack")
    data = bytearray(pack.read_bytes())
    for at in range(4096, 4096 * 3, 512):
        data[at] ^= 1
    pack.write_bytes(data)
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(DamagedError):
            export(identity, store, target)
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "empty").iterdir()) == []


def test_ties_to_the_outside_are_told() -> None:
    done = Exported(Path("/images"), 3, 4, 99, (External("socket", 17), External("pipe", 4)))
    assert "--inherit-fd 'fd[3]:socket:[17]' --inherit-fd 'fd[4]:pipe:[4]'" in done.command()
    assert parse_external("socket:17") == External("socket", 17)
    for text in ("socket", "file:3", "pipe:", "pipe:x", "socket:-3"):
        with pytest.raises(ConfigError):
            parse_external(text)


def test_a_socket_to_the_outside_survives_both_ways(
    store: Store,
    criu: Criu,
    tmp_path: Path,
) -> None:
    program = "import socket,os\ns=socket.socket(fileno=9)\nwhile True: s.sendall(s.recv(99).upper())"
    cell = Cell.create()
    spawned = cell.spawn([sys.executable, "-c", program], env={}, control=9, pid_floor=5000)
    assert spawned.control is not None and spawned.inode is not None
    folder = tmp_path / "dump"
    folder.mkdir()
    tie = f"unix[{spawned.inode}]"
    words = ("dump", "--tree", str(spawned.pid), "--ext-unix-sk", "--external", tie)
    run_criu(cell, criu, *words, folder=folder)
    cell.close()
    spawned.control.close()
    identity = imported(folder, store, externals=(External("socket", spawned.inode),))
    made = restore(
        *(identity, store, criu),
        key={},
        take_home=Cell.create,
        timeout=60,
        digests=DigestCache(tmp_path / "digests"),
        folders=tmp_path / "criu",
    )
    try:
        assert made.control is not None
        assert ask(made.control) == b"HELLO"
    finally:
        made.tree.home.close()
    done = export(identity, store, tmp_path / "exported")
    cell = Cell.create()
    try:
        tie = f"fd[100]:socket:[{spawned.inode}]"
        common = ("--images-dir", str(done.folder), "--work-dir", str(tmp_path), "--manage-cgroups=ignore")
        process = cell.spawn([*criu.argv_prefix, "restore", "-d", *common, "--inherit-fd", tie], env={}, control=100)
        assert cell.wait(process.pid, 60) == 0
        assert process.control is not None
        assert ask(process.control) == b"HELLO"
    finally:
        cell.close()


def ask(control: socket.socket) -> bytes:
    """One exchange, the last."""
    with control:
        control.settimeout(20)
        control.sendall(b"hello")
        return control.recv(99)


def test_both_verbs_at_the_command_line(store: Store, tmp_path: Path) -> None:
    folder = fake_dump(tmp_path / "dump")

    def dormouse(*words: str) -> dict[str, object]:
        done = CliRunner().invoke(cli, [*words, "--json", "--data-dir", str(tmp_path / "data")], catch_exceptions=False)
        found = json.loads(done.stdout)
        assert isinstance(found, dict)
        return found

    taken = dormouse("import-images", str(folder), "--external", "pipe:5")
    done = dormouse("export", str(taken["id"])[:5], str(tmp_path / "out"))
    assert (done["pid"], done["externals"]) == (7, ["pipe:5"])
    assert str(tmp_path / "out") in str(done["command"]) and "fd[3]:pipe:[5]" in str(done["command"])
    (row,) = store.manifests()
    assert (row.kind, row.name) == ("process", "dump")
    assert dormouse("inspect", row.id)["key"].keys() == {"machine", "cpu_flags", "kernel", "criu"}
    note = json.loads((tmp_path / "out" / "dormouse-import.json").read_text())
    assert note["imported_from"] == str(folder)
    again = dormouse("import-images", str(tmp_path / "out"), "--name", "twice")
    assert dormouse("inspect", str(again["id"]))["model"] == "twice"


def test_any_page_of_a_real_snapshot_is_what_the_process_had(store: Store, criu: Criu, tmp_path: Path) -> None:
    """What is refused is the kernel's, shared, or a page that is in the file."""
    tree = start(tmp_path, "alone")
    result = captured(tree, store, criu)
    expected = memory(tree.home)
    maps = Path(f"/proc/{tree.home.outer_pid(tree.pid)}/maps").read_text().splitlines()
    tree.home.close()
    process = process_map(decode_body(store.manifest(result.snapshot_id).body, result.snapshot_id), None, store.read)
    refused = []
    for (_number, address), page in expected.items():
        try:
            found = b"".join(read(process, extents(process, address, PAGE), store.read))
        except NotFoundError:
            refused.append(address)
            continue
        if found != page:
            assert sum(a != b for a, b in zip(found, page, strict=True)) <= RSEQ_BYTES
    private = [line.split() for line in maps if len(line.split()) == 5 and line.split()[1].endswith("p")]
    ranges = [tuple(int(word, 16) for word in words[0].split("-")) for words in private]
    assert len(ranges) > 5
    assert not [address for address in refused for start, end in ranges if start <= address < end]
    assert len(refused) < len(expected)
    rows = usage(process, lambda _digest: 1)
    assert sum(row.stored_pages for row in rows) == process.space.used_pages()
