"""The memory of a restored process, page by page: filled by threads or piped through CRIU, it is what was captured."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dormouse.errors import DamagedError, SnapshotError
from dormouse.snapshot.capture import CaptureResult, capture
from dormouse.snapshot.cell import Cell, worker_pid_floor
from dormouse.snapshot.criu_images import PAGE
from dormouse.snapshot.criu_setup import Criu
from dormouse.snapshot.hands import NO_HANDS, Hands
from dormouse.snapshot.images import SnapshotBody, decode_body
from dormouse.snapshot.mapped_files import DigestCache
from dormouse.snapshot.memory_capture import ParentMemory
from dormouse.snapshot.memory_map import WINDOW, AddressSpace, Piece, Span, Window, mask_bytes
from dormouse.snapshot.process_memory import ProcessMemory
from dormouse.snapshot.restore import Restored, restore
from dormouse.snapshot.tree import Home, ProcessTree, continue_tree
from dormouse.store.codec import Codec
from dormouse.store.store import Manifest, Store
from dormouse.transfer import bulk_codec
from dormouse.transfer.memory import huge_pages_on_request

pytestmark = pytest.mark.root

ONE = mask_bytes(1)
RSEQ_BYTES = 32  # struct rseq: the kernel writes the CPU's number there whenever the thread is scheduled

PROGRAM = """
import ctypes, mmap, os, signal, sys, time
PAGE = 4096
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
def area(pages, flags=0x22):
    at = libc.mmap(None, pages * PAGE, 3, flags, -1, 0)
    for i in range(pages):
        content = [bytes(PAGE), os.urandom(PAGE), (b"%d leaves " % i * 512)[:PAGE], None][i % 4]
        if content is not None:
            ctypes.memmove(at + i * PAGE, content, PAGE)
    return at
big = area(1500)
read_only, hidden = area(600), area(300)
libc.mprotect(read_only, 600 * PAGE, 1)
libc.mprotect(hidden, 300 * PAGE, 0)
shared = area(400, 0x21)
stack_like = area(64, 0x122)
with open(sys.argv[1] + ".data", "w+b") as file:
    file.write(b"from the file".ljust(PAGE, b".") * 600)
    file.flush()
    of_file = libc.mmap(None, 600 * PAGE, 3, 2, file.fileno(), 0)
ctypes.memset(of_file, 0, 300 * PAGE)  # written, all zero, and not what the file has
if sys.argv[2] == "fork":
    common = area(1000)
    if os.fork() == 0:
        mine = area(700)
        ctypes.memset(common, 7, 10 * PAGE)
        open(sys.argv[1] + ".child", "w").write("x")
        while True: time.sleep(3600)
    while not os.path.exists(sys.argv[1] + ".child"): time.sleep(0.01)
def change(*_):
    ctypes.memset(big + 40 * PAGE, 9, PAGE)
    ctypes.memset(big + 41 * PAGE, 0, PAGE)
    open(sys.argv[1] + ".changed", "w").write("x")
signal.signal(signal.SIGUSR1, change)
open(sys.argv[1], "w").write("ready")
while True: time.sleep(3600)
"""


def start(folder: Path, how: str) -> ProcessTree:
    """A process with memory of every kind, in a cell."""
    mark = folder / "ready"
    cell = Cell.create()
    spawned = cell.spawn(
        [sys.executable, "-c", PROGRAM, str(mark), how], env={"PATH": os.defpath}, pid_floor=worker_pid_floor()
    )
    deadline = time.monotonic() + 20
    while not mark.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return ProcessTree(cell, spawned.pid)


def captured(tree: ProcessTree, store: Store, criu: Criu, hands: Hands = NO_HANDS) -> CaptureResult:
    return capture(
        *(tree, store, criu),
        **{"kind": "process", "name": "p", "key": {}, "now": time.time, "timeout": 60, "still_wanted": lambda: True},
        digests=DigestCache(Path("/nowhere/digests")),
        folders=store._layout.root.parent / "run" / "criu",
        hands=hands,
    )


def restored(snapshot_id: str, store: Store, criu: Criu, *, fill: bool, hands: Hands = NO_HANDS) -> Restored:
    """Restored, and stopped before it can do much."""
    made = restore(
        snapshot_id,
        store,
        criu,
        key={},
        take_home=Cell.create,
        timeout=60,
        inherit=(),
        fill=fill,
        hands=hands,
        digests=DigestCache(Path("/nowhere/digests")),
        folders=store._layout.root.parent / "run" / "criu",
    )
    for pid in made.tree.home.processes():
        os.kill(pid, signal.SIGSTOP)
    return made


def memory(home: Home) -> dict[tuple[int, int], bytes]:
    """(pid in the cell, address) -> page, of everything but what the kernel itself maps."""
    pages = {}
    for pid in home.processes():
        number = int(Path(f"/proc/{pid}/status").read_text().split("NSpid:")[1].split("\n")[0].split()[-1])
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as mem:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                if any(name in line for name in ("[vvar", "[vsyscall]")):
                    continue
                start, end = (int(word, 16) for word in line.split()[0].split("-"))
                for at in range(start, end, PAGE):
                    mem.seek(at)
                    pages[number, at] = mem.read(PAGE)
    return pages


def assert_same(found: dict[tuple[int, int], bytes], expected: dict[tuple[int, int], bytes]) -> None:
    assert found.keys() == expected.keys()
    for where, page in expected.items():
        if found[where] != page:
            wrong = sum(a != b for a, b in zip(found[where], page, strict=True))
            assert wrong <= RSEQ_BYTES, f"{wrong} bytes differ at {where}"


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_filled_and_piped_memory_is_what_was_captured(store: Store, criu: Criu, tmp_path: Path, how: str) -> None:
    tree = start(tmp_path, how)
    result = captured(tree, store, criu)
    expected = memory(tree.home)
    tree.home.close()
    for fill in (False, True):
        made = restored(result.snapshot_id, store, criu, fill=fill)
        try:
            assert_same(memory(made.tree.home), expected)
        finally:
            made.tree.home.close()


def test_zero_pages_take_no_memory_after_a_restore(store: Store, criu: Criu, tmp_path: Path) -> None:
    tree = start(tmp_path, "alone")
    before = resident(tree)
    result = captured(tree, store, criu)
    tree.home.close()
    for fill in (False, True):
        made = restored(result.snapshot_id, store, criu, fill=fill)
        after = resident(made.tree)
        made.tree.home.close()
        assert after < before - 375 * PAGE  # a quarter of the 1500 pages of `big`


def damage(store: Path) -> None:
    """Flip a bit of every chunk in the first half of the one pack."""
    (pack,) = store.rglob("*.pack")
    data = bytearray(pack.read_bytes())
    for at in range(4096, len(data) // 2, 4096):
        data[at] ^= 1
    pack.write_bytes(data)


def resident(tree: ProcessTree) -> int:
    line = Path(f"/proc/{tree.home.outer_pid(tree.pid)}/status").read_text().split("RssAnon:")[1].split()[0]
    return int(line) * 1024


def test_a_second_capture_stores_what_has_changed(store: Store, criu: Criu, tmp_path: Path) -> None:
    tree = start(tmp_path, "alone")
    first = captured(tree, store, criu)
    tree.home.close()
    made = restored(first.snapshot_id, store, criu, fill=True)
    tree = made.tree
    continue_tree(tree.home)
    deadline = time.monotonic() + 20
    while not (tmp_path / "ready.changed").exists():
        assert time.monotonic() < deadline
        # Again and again: Python sleeps on when a signal comes just before its sleep begins (anew, as it does here).
        os.kill(tree.home.outer_pid(tree.pid), signal.SIGUSR1)
        time.sleep(0.1)
    second = captured(tree, store, criu)
    expected = memory(tree.home)
    tree.home.close()
    assert second.stored_bytes < 60 * PAGE < first.stored_bytes / 10
    # The first snapshot may go: the second needs only chunks.
    store.remove(first.snapshot_id)
    store.collect_garbage()
    for fill in (False, True):
        again = restored(second.snapshot_id, store, criu, fill=fill)
        try:
            assert_same(memory(again.tree.home), expected)
        finally:
            again.tree.home.close()
    assert store.verify().ok


def test_a_capture_without_its_parent_stores_all(store: Store, criu: Criu, tmp_path: Path) -> None:
    tree = start(tmp_path, "alone")
    first = captured(tree, store, criu)
    tree.home.close()
    made = restored(first.snapshot_id, store, criu, fill=True)
    store.remove(first.snapshot_id)
    store.collect_garbage()
    second = captured(made.tree, store, criu)
    made.tree.home.close()
    assert second.stored_bytes > first.stored_bytes / 2
    restored(second.snapshot_id, store, criu, fill=True).tree.home.close()


@pytest.mark.parametrize("fill", [False, True])
def test_damage_anywhere_in_the_memory_is_found_before_it_runs(
    store: Store, criu: Criu, tmp_path: Path, fill: bool
) -> None:
    tree = start(tmp_path, "alone")
    result = captured(tree, store, criu)
    tree.home.close()
    damage(tmp_path / "data" / "store")
    with pytest.raises(DamagedError):
        restored(result.snapshot_id, store, criu, fill=fill)


def test_plain_criu_reads_a_page_map_of_ours(store: Store, criu: Criu, tmp_path: Path) -> None:
    """`crit`, CRIU's own judge, when it is installed."""
    crit = shutil.which("crit")
    if crit is None:
        pytest.skip("crit is not installed")
    from dormouse.snapshot.criu_images import Run, encode_pagemap

    (tmp_path / "pagemap-1.img").write_bytes(encode_pagemap(3, [Run(PAGE, 2), Run(8 * PAGE, 1)]))
    shown = subprocess.run(
        [crit, "show", str(tmp_path / "pagemap-1.img")], capture_output=True, text=True, check=True
    ).stdout
    assert '"pages_id": 3' in shown and '"nr_pages": 2' in shown


@pytest.mark.parametrize("fill", [False, True])
def test_a_restore_that_fails_leaves_no_process_and_no_descriptor(
    store: Store, criu: Criu, tmp_path: Path, fill: bool
) -> None:
    tree = start(tmp_path, "fork")
    result = captured(tree, store, criu)
    tree.home.close()
    damage(tmp_path / "data" / "store")
    cells = []
    threads = set(threading.enumerate())

    def take_home() -> Cell:
        cells.append(Cell.create())
        return cells[-1]

    for _attempt in range(3):
        before = open_descriptors()
        with pytest.raises(DamagedError):
            restore(
                result.snapshot_id,
                store,
                criu,
                key={},
                take_home=take_home,
                timeout=60,
                digests=DigestCache(tmp_path / "digests"),
                folders=tmp_path / "criu",
                inherit=(),
                fill=fill,
            )
        assert (cells[-1].processes(), cells[-1].alive) == ([], False)
        assert open_descriptors() == before
        assert not set(threading.enumerate()) - threads


def test_a_capture_that_fails_lets_the_process_run_on(
    store: Store, criu: Criu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = start(tmp_path, "fork")
    before = open_descriptors()
    calls = itertools.count()

    def failing(self: ProcessMemory, window: int, mask: int, into: memoryview) -> int:
        if next(calls) == 5:
            raise SnapshotError("the memory could not be read")
        return read(self, window, mask, into)

    read = ProcessMemory.read
    monkeypatch.setattr(ProcessMemory, "read", failing)
    with pytest.raises(SnapshotError, match="could not be read"):
        captured(tree, store, criu)
    assert open_descriptors() == before
    assert store.manifests() == []
    for pid in tree.home.processes():
        assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "SR"
    monkeypatch.undo()
    captured(tree, store, criu)
    tree.home.close()
    assert store.verify().ok


def open_descriptors() -> int:
    """All but those of the index: its connections are kept for the threads to come."""
    names = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            names.append(str(link.readlink()))
    return len([name for name in names if "index.sqlite" not in name])


def test_a_parent_whose_chunks_have_another_length_is_not_used(store: Store) -> None:
    with store.begin() as transaction:
        digests = [transaction.put(b"a" * PAGE), transaction.put(b"b" * 2 * PAGE)]
        transaction.commit(Manifest("x", "process", "p", 1.0, b"", digests))
    sound = Window(5, [Piece(0, mask_bytes(1)), Piece(1, mask_bytes(6))])
    odd = Window(6, [Piece(0, mask_bytes(1)), Piece(1, mask_bytes(14))])
    space = AddressSpace(7, 1, 5, [sound, odd], b"".join(digests))
    with store.reader() as reader:
        parent = ParentMemory(SnapshotBody(1, "p", {}, 7, [], [], [space], [], {}), reader)
        found, wrong, missing = parent.windows(7, [5, 6, 7])
        assert found is not None and found[2].tobytes() == b"a" * PAGE + b"b" * 2 * PAGE
        assert wrong is missing is None


def test_of_a_parent_that_lost_a_chunk_the_other_windows_are_of_use_to_others(store: Store) -> None:
    with store.begin() as transaction:
        digests = [transaction.put(b"a" * PAGE), transaction.put(b"b" * PAGE)]
        transaction.commit(Manifest("x", "process", "p", 1.0, b"", digests))
    windows = [Window(5, [Piece(0, mask_bytes(1))]), Window(6, [Piece(2, mask_bytes(1))]), Window(7, [Piece(1, ONE)])]
    space = AddressSpace(7, 1, 3, windows, b"".join(digests) + bytes(32))
    with store.reader() as reader:
        parent = ParentMemory(SnapshotBody(1, "p", {}, 7, [], [], [space], [], {}), reader)
        first, lost, last = parent.tasks(7, [5, 6, 7])
        assert lost is None and first is not None and last is not None
        assert (first.chunks, last.chunks) == tuple(reader.locate([digest]) for digest in digests)
        assert last.window == Window(7, [Piece(0, ONE)])
        assert parent.widths(7, [Span(4, 0, 8), Span(7, 0)]) == {5: 1, 6: 1, 7: 1}


LARGE_PROGRAM = """
import ctypes, os, sys, time
MIB = 1 << 20
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
at = libc.mmap(None, 72 * MIB, 3, 0x22, -1, 0)
def put(offset, content): ctypes.memmove(at + offset, content, len(content))
put(0, os.urandom(30 * MIB))
put(30 * MIB, b"the dormouse sleeps " * (10 * MIB // 20))
numbers = bytearray(16 * MIB)
numbers[::2] = os.urandom(8 * MIB)
numbers[1::2] = os.urandom(8 * MIB).translate(b"\\x3c\\xbc\\x3d\\x3b" * 64)
put(40 * MIB, bytes(numbers))
put(56 * MIB, b"\\1" + bytes(16 * MIB - 1))
for i in range(0, 30 * MIB, 3 * MIB): ctypes.memset(at + i, 0, 5000)
open(sys.argv[1], "w").write(str(at))
while True: time.sleep(3600)
"""


@pytest.fixture
def large(tmp_path: Path) -> tuple[ProcessTree, int]:
    """A process with 72 MiB in one mapping, and where that is."""
    mark = tmp_path / "at"
    cell = Cell.create()
    spawned = cell.spawn(
        [sys.executable, "-c", LARGE_PROGRAM, str(mark)], env={"PATH": os.defpath}, pid_floor=worker_pid_floor()
    )
    deadline = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return ProcessTree(cell, spawned.pid), int(mark.read_text())


def uncached(store: Path) -> None:
    for pack in store.rglob("*.pack"):
        fd = os.open(pack, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


@pytest.mark.parametrize("pays", [False, True], ids=["fast disk", "slow disk"])
def test_large_memory_comes_back_from_page_cache_and_disk(
    store: Store,
    criu: Criu,
    tmp_path: Path,
    large: tuple[ProcessTree, int],
    monkeypatch: pytest.MonkeyPatch,
    pays: bool,
) -> None:
    monkeypatch.setattr(bulk_codec, "floats_pay", lambda *_facts: pays)
    tree, _at = large
    result = captured(tree, store, criu)
    expected = memory(tree.home)
    tree.home.close()
    (space,) = decode_body(store.manifest(result.snapshot_id).body, result.snapshot_id).memory
    assert sum(window.width > 1 for window in space.windows) >= 3
    with store.reader() as reader:
        codecs = {chunk.codec for chunk in reader.locate(space.chunk_list()) if chunk.plain_length > WINDOW}
    assert (Codec.BF16 in codecs) is pays
    assert Codec.RAW in codecs
    for fill in (False, True):
        uncached(tmp_path / "data" / "store")
        made = restored(result.snapshot_id, store, criu, fill=fill)
        try:
            assert_same(memory(made.tree.home), expected)
        finally:
            made.tree.home.close()


def test_a_second_capture_of_large_memory_stores_what_has_changed(
    store: Store, criu: Criu, large: tuple[ProcessTree, int]
) -> None:
    tree, at = large
    first = captured(tree, store, criu)
    tree.home.close()
    made = restored(first.snapshot_id, store, criu, fill=True)
    pid = made.tree.home.outer_pid(made.tree.pid)
    with ProcessMemory(pid) as changed:
        for place in (at + (1 << 20), at + (2 << 20), at + (41 << 20)):
            changed.write(place // WINDOW, 1 << place % WINDOW // PAGE, memoryview(b"x" * PAGE))
    second = captured(made.tree, store, criu)
    expected = memory(made.tree.home)
    made.tree.home.close()
    assert second.stored_bytes < 60 * PAGE < first.stored_bytes / 10
    again = restored(second.snapshot_id, store, criu, fill=True)
    try:
        assert_same(memory(again.tree.home), expected)
    finally:
        again.tree.home.close()


@pytest.mark.parametrize("cold", [False, True])
def test_damage_in_large_memory_is_found_before_it_runs(
    store: Store, criu: Criu, tmp_path: Path, large: tuple[ProcessTree, int], cold: bool
) -> None:
    tree, _at = large
    result = captured(tree, store, criu)
    tree.home.close()
    (space,) = decode_body(store.manifest(result.snapshot_id).body, result.snapshot_id).memory
    with store.reader() as reader:
        hit = next(c for c in reader.locate(space.chunk_list()) if c.plain_length > WINDOW and c.codec == Codec.RAW)
        pack = reader.pack(hit)
    data = bytearray(pack.read_bytes())
    data[hit.offset + hit.stored_length - 1] ^= 1
    pack.write_bytes(data)
    if cold:
        uncached(tmp_path / "data" / "store")
    with pytest.raises(DamagedError, match=f"{hit.digest.hex()} in .*{pack.name}.*signature"):
        restored(result.snapshot_id, store, criu, fill=True)
    os.truncate(pack, hit.offset + 4096)
    with pytest.raises(DamagedError, match=pack.name):
        restored(result.snapshot_id, store, criu, fill=True)


def test_a_large_mapping_that_is_full_has_huge_pages_after_a_restore(
    store: Store, criu: Criu, large: tuple[ProcessTree, int]
) -> None:
    if not huge_pages_on_request():
        pytest.skip("huge pages are not for who asks for them here")
    tree, at = large
    result = captured(tree, store, criu)
    tree.home.close()
    made = restored(result.snapshot_id, store, criu, fill=True)
    try:
        text = Path(f"/proc/{made.tree.home.outer_pid(made.tree.pid)}/smaps").read_text()
        areas = [line.split() for line in text.splitlines() if "-" in line.split()[0] or "AnonHugePages" in line]
        huge = {}
        for place, size in zip(areas[::2], areas[1::2], strict=True):
            huge[tuple(int(word, 16) for word in place[0].split("-"))] = int(size[1])
        assert sum(size for (start, end), size in huge.items() if start <= at < end) >= 30 << 10
        assert sum(size for (start, end), size in huge.items() if not start <= at < end) == 0
    finally:
        made.tree.home.close()
