"""kill -9 at every step: what was committed stays, what was not is gone, and the next start cleans up by itself."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from store_tools import commit, noise

from dormouse.errors import NotFoundError
from dormouse.store.store import Marks, Store

CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from store_tools import commit, noise
from dormouse.store.store import Marks, Store

path, action, step = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def checkpoint(name):
    if name == step:
        os.kill(os.getpid(), signal.SIGKILL)

store = Store.open(path, checkpoint=checkpoint)
if action == "commit":
    commit(store, "new", [noise(1, 20_000), noise(7, 20_000)])
elif action == "remove":
    store.remove("old")
elif action == "mark":
    store.mark("old", lambda _old: Marks(quarantine="new"))
else:
    store.collect_garbage()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


def killed_at(path: Path, action: str, step: str) -> None:
    """Run the action in another process, which kills itself at the step."""
    command = [sys.executable, "-c", CHILD, str(path), action, step, str(Path(__file__).parent)]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.rglob("*") if file.suffix in (".pack", ".manifest", ".tmp"))


COMMIT_STEPS = {
    "begin": False,
    "pack written": False,
    "pack named": False,
    "manifest written": False,
    "manifest named": True,
    "index written": True,
}


@pytest.mark.parametrize("step", COMMIT_STEPS)
@pytest.mark.parametrize("lose_index", [False, True])
def test_a_crash_in_a_commit_is_nothing_or_all_of_it(path: Path, step: str, lose_index: bool) -> None:
    with Store.open(path) as store:
        commit(store, "old", [noise(1, 20_000), noise(2, 20_000)])
    killed_at(path, "commit", step)
    if lose_index:
        (path / "index.sqlite").unlink()
    with Store.open(path) as store:
        assert not [name for name in names(path) if name.endswith(".tmp")]
        committed = ["new", "old"] if COMMIT_STEPS[step] else ["old"]
        assert sorted(row.id for row in store.manifests()) == committed
        for manifest_id in committed:
            assert all(store.read(digest) for digest in store.manifest(manifest_id).refs)
        assert store.verify().ok
        store.collect_garbage()
        assert len([name for name in names(path) if name.endswith(".pack")]) == len(committed)
        assert store.verify().ok
        if not COMMIT_STEPS[step]:
            commit(store, "new", [noise(1, 20_000), noise(7, 20_000)])
        assert bytes(store.read(store.manifest("new").refs[1])) == noise(7, 20_000)


@pytest.mark.parametrize("step", ["manifest removed", "marks removed"])
def test_a_crash_in_a_removal_removes(path: Path, step: str) -> None:
    with Store.open(path) as store:
        commit(store, "old", [noise(1, 20_000)])
        store.mark("old", lambda _old: Marks(pinned=True))
    killed_at(path, "remove", step)
    with Store.open(path) as store:
        assert store.manifests() == []
        with pytest.raises(NotFoundError):
            store.manifest("old")
        assert store.collect_garbage().packs_deleted == 1
        assert store.verify().ok
        assert not list(path.rglob("*.marks"))
        commit(store, "old", [noise(1, 20_000)])
        assert store.marks("old") == Marks()


MARK_STEPS = {"mark": "before", "marks written": "before", "marks named": "new"}


@pytest.mark.parametrize("step", MARK_STEPS)
def test_a_crash_in_marking_leaves_the_old_marks_or_the_new(path: Path, step: str) -> None:
    with Store.open(path) as store:
        commit(store, "old", [noise(1, 20_000)])
        store.mark("old", lambda _old: Marks(quarantine="before"))
    killed_at(path, "mark", step)
    with Store.open(path) as store:
        assert store.marks("old").quarantine == MARK_STEPS[step]
        assert not [name for name in names(path) if name.endswith(".tmp")]


GC_STEPS = [
    "gc dead forgotten",
    "gc dead deleted",
    "gc copied",
    "gc copy named",
    "gc switched",
    "gc old deleted",
]


@pytest.mark.parametrize("step", GC_STEPS)
@pytest.mark.parametrize("lose_index", [False, True])
def test_a_crash_in_garbage_collection_loses_nothing_and_is_made_up_for(
    path: Path, step: str, lose_index: bool
) -> None:
    with Store.open(path) as store:
        commit(store, "sparse", [noise(1, 50_000), noise(2, 9000), bytes(5000)])
        commit(store, "kept", [noise(2, 9000), bytes(5000)])
        commit(store, "dead", [noise(3, 50_000)])
        store.remove("sparse")
        store.remove("dead")
    killed_at(path, "gc", step)
    if lose_index:
        (path / "index.sqlite").unlink()
    with Store.open(path) as store:
        for _ in range(2):
            assert [bytes(store.read(digest)) for digest in store.manifest("kept").refs] == [
                noise(2, 9000),
                bytes(5000),
            ]
            assert store.verify().ok
            store.collect_garbage()
        (manifest, pack) = sorted(names(path), reverse=True)
        assert manifest == "kept.manifest"
        assert next(path.rglob(pack)).stat().st_size < 25_000


def test_the_pack_of_a_living_transaction_is_left_alone(path: Path) -> None:
    with Store.open(path) as store, store.begin() as transaction:
        transaction.put(noise(1, 20_000))
        with Store.open(path):
            pass
        (growing,) = [name for name in names(path) if name.endswith(".tmp")]
        assert (path / "packs" / growing).exists()
