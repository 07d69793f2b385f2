"""Several processes at work on one store at once: committing, collecting, removing, reading, dying."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_tools import commit, noise, text

from dormouse.errors import BusyError, NotFoundError, StoreError
from dormouse.store.store import Manifest, Store

PREAMBLE = """
import random, sys
from pathlib import Path
path, name = Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, sys.argv[3])
from store_tools import commit, noise, text
from dormouse.errors import BusyError, NotFoundError
from dormouse.store.store import Manifest, Marks, Store
def tell(word):
    print(word, flush=True)
def wait():
    sys.stdin.readline()
"""

COMMITTER = """
chance = random.Random(name)
mine = {}
with Store.open(path) as store:
    for turn in range(25):
        plains = [text(chance.randrange(12), 20_000) for _ in range(3)] + [noise(chance.randrange(99), 5000)]
        mine[f"{name}-{turn}"] = plains
        commit(store, f"{name}-{turn}", plains)
        store.mark(f"{name}-{turn}", lambda _old: Marks(quarantine=name))
        if len(mine) > 4:
            gone = chance.choice(sorted(mine))
            store.remove(gone)
            del mine[gone]
        for manifest_id, plains in mine.items():
            with store.reader() as reader:
                located = reader.locate(store.manifest(manifest_id).refs)
                assert [bytes(reader.plain(chunk)) for chunk in located] == plains
            assert store.marks(manifest_id).quarantine == name
tell(" ".join(sorted(mine)))
"""

COLLECTOR = """
import select
turns = 0
with Store.open(path) as store:
    while not select.select([sys.stdin], [], [], 0)[0]:
        try:
            store.collect_garbage(wait=1)
            turns += 1
        except BusyError:
            pass
tell(turns)
"""

READER = """
with Store.open(path) as store, store.reader() as reader:
    located = reader.locate(store.manifest("a").refs)
    tell("located")
    wait()
    assert [bytes(reader.plain(chunk)) for chunk in located] == [noise(1, 50_000), text(2, 50_000)]
tell("read")
"""

CAPTURE = """
with Store.open(path) as store, store.begin() as transaction:
    refs = [transaction.put(noise(1, 50_000)), transaction.put(noise(7, 50_000))]
    assert transaction.new_chunks == 1
    tell("put")
    wait()
    transaction.commit(Manifest("b", "k", "n", 1.0, b"", refs))
tell("committed")
"""


KILLED_CAPTURE = """
import os, signal
def checkpoint(step):
    if step == "manifest named":
        os.kill(os.getpid(), signal.SIGKILL)
with Store.open(path, checkpoint=checkpoint) as store, store.begin() as transaction:
    refs = [transaction.put(noise(1, 50_000))]
    tell("put")
    wait()
    transaction.commit(Manifest("b", "k", "n", 1.0, b"", refs))
"""


class Process:
    """One of the programs above, spoken to by lines."""

    def __init__(self, path: Path, program: str, name: str = "") -> None:
        command = [sys.executable, "-c", PREAMBLE + program, str(path), name, str(Path(__file__).parent)]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def hear(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()

    def end(self) -> int:
        with contextlib.suppress(BrokenPipeError):
            self.popen.communicate(timeout=60)
        return self.popen.returncode


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store.open(path) as opened:
        commit(opened, "a", [noise(1, 50_000), text(2, 50_000)])
        yield opened


def packs(path: Path) -> list[str]:
    return sorted(each.name for each in (path / "packs").iterdir())


def test_two_commit_and_remove_while_a_third_collects(store: Store, path: Path) -> None:
    collector = Process(path, COLLECTOR)
    committers = [Process(path, COMMITTER, name) for name in ("left", "right")]
    kept = {manifest_id for committer in committers for manifest_id in committer.hear().split()}
    assert [committer.end() for committer in committers] == [0, 0]
    collector.go_on()
    assert int(collector.hear()) > 0
    assert collector.end() == 0
    assert {row.id for row in store.manifests()} == {"a", *kept}
    assert {row.marks.quarantine for row in store.manifests() if row.id in kept} == {"left", "right"}
    assert store.verify().ok
    for manifest_id in ["a", *kept]:
        store.remove(manifest_id)
    store.collect_garbage()
    assert packs(path) == []


def test_removing_and_collecting_leave_a_reader_what_it_has_located(store: Store, path: Path) -> None:
    reader = Process(path, READER)
    assert reader.hear() == "located"
    store.remove("a")
    with pytest.raises(NotFoundError):
        store.manifest("a")
    with pytest.raises(BusyError):
        store.collect_garbage(wait=0.05)
    reader.go_on()
    assert (reader.hear(), reader.end()) == ("read", 0)
    assert store.collect_garbage().packs_deleted == 1


def test_an_open_capture_keeps_the_chunks_it_relies_on_from_the_collector(store: Store, path: Path) -> None:
    capture = Process(path, CAPTURE)
    assert capture.hear() == "put"
    store.remove("a")
    with pytest.raises(BusyError):
        store.collect_garbage(wait=0.05)
    capture.go_on()
    assert (capture.hear(), capture.end()) == ("committed", 0)
    store.collect_garbage()
    assert [bytes(store.read(digest)) for digest in store.manifest("b").refs] == [noise(1, 50_000), noise(7, 50_000)]
    assert store.verify().ok


def test_a_capture_that_is_killed_frees_all_it_had(store: Store, path: Path) -> None:
    capture = Process(path, CAPTURE)
    assert capture.hear() == "put"
    store.remove("a")
    capture.popen.kill()
    assert capture.end() == -signal.SIGKILL
    store.collect_garbage(wait=5)
    assert packs(path) == []
    assert store.verify().ok


@pytest.mark.parametrize("rewrite", [False, True])
def test_a_capture_killed_right_after_its_commit_keeps_its_chunks_from_a_collection_under_way(
    store: Store, path: Path, rewrite: bool
) -> None:
    if rewrite:  # then its pack is not dead but to be copied without what only the capture needs
        commit(store, "small", [text(2, 50_000)])
    capture = Process(path, KILLED_CAPTURE)
    assert capture.hear() == "put"
    store.remove("a")
    collector = threading.Thread(target=store.collect_garbage)
    collector.start()
    time.sleep(0.3)  # it has looked at the manifests, and waits for the capture to end
    capture.go_on()
    assert capture.end() == -signal.SIGKILL
    collector.join()
    assert [bytes(store.read(digest)) for digest in store.manifest("b").refs] == [noise(1, 50_000)]
    assert store.verify().ok


def test_a_reader_that_is_killed_holds_nobody_up(store: Store, path: Path) -> None:
    reader = Process(path, READER)
    assert reader.hear() == "located"
    reader.popen.kill()
    assert reader.end() == -signal.SIGKILL
    store.remove("a")
    assert store.collect_garbage(wait=5).packs_deleted == 1


def test_two_who_commit_the_same_id_one_wins(store: Store, path: Path) -> None:
    with Store.open(path) as other, store.begin() as first, other.begin() as second:
        refs = [[transaction.put(noise(seed, 1000))] for seed, transaction in ((3, first), (4, second))]
        second.commit(Manifest("x", "k", "n", 1.0, b"second", refs[1]))
        with pytest.raises(StoreError, match="already"):
            first.commit(Manifest("x", "k", "n", 1.0, b"first", refs[0]))
    assert store.manifest("x").body == b"second"
    assert store.verify().ok
