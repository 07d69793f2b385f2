"""A disk without room: one clear error, and the store is as it was. On a real file system of 4 MiB."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_tools import commit, noise

from dormouse.errors import DiskFullError
from dormouse.store.store import Manifest, Store
from dormouse.transfer.ingest import Ingest

pytestmark = pytest.mark.root


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_in_a_put_is_named_and_the_store_stays_whole(small_disk: Path) -> None:
    with Store.open(small_disk / "store") as store:
        (kept,) = commit(store, "a", [noise(1, 1 << 20)])
        with store.begin() as transaction:
            with pytest.raises(DiskFullError, match=r"disk is full.*1048576 bytes were needed, \d+ are free") as caught:
                for seed in range(2, 10):
                    transaction.put(noise(seed, 1 << 20))
            assert "dormouse rm" in caught.value.remedy
            with pytest.raises(DiskFullError):
                transaction.commit(Manifest("b", "k", "n", 0.0, b"", []))
        assert [row.id for row in store.manifests()] == ["a"]
        assert store.verify().ok
        assert bytes(store.read(kept)) == noise(1, 1 << 20)
        commit(store, "b", [noise(2, 1 << 20)])
        assert len(list(small_disk.rglob("*.pack"))) == 2


def test_a_full_disk_ends_an_ingest_for_all_its_producers(small_disk: Path) -> None:
    with Store.open(small_disk / "store") as store:
        with store.begin() as transaction, pytest.raises(DiskFullError), Ingest(transaction) as ingest:
            for seed in range(64):
                ingest.submit(noise(seed, 1 << 20))
        assert store.manifests() == []
        assert not list(small_disk.rglob("*.tmp"))


@pytest.mark.parametrize("room", range(0, 120_000, 8192))
def test_a_disk_that_fills_up_during_the_commit_leaves_nothing_of_it(small_disk: Path, room: int) -> None:
    """Whatever the step that meets the end of the disk: pack table, manifest or index."""
    with Store.open(small_disk / "store") as store:
        commit(store, "a", [noise(1, 1000)])
        with store.begin() as transaction:
            refs = [transaction.put(noise(seed, 1000)) for seed in range(100, 400)]
            with (small_disk / "ballast").open("wb") as ballast:
                free = subprocess.run(["df", "--output=avail", "-B1", small_disk], capture_output=True, check=True)
                ballast.write(bytes(max(0, int(free.stdout.split()[-1]) - room)))
            try:
                transaction.commit(Manifest("b", "k", "n", 0.0, b"x" * 20_000, refs))
                committed = ["a", "b"]
            except DiskFullError:
                committed = ["a"]
        assert room or committed == ["a"]
        (small_disk / "ballast").unlink()
        assert [row.id for row in store.manifests()] == committed
        assert store.verify().ok
        assert len(list(small_disk.rglob("*.pack"))) == len(committed)
    with Store.open(small_disk / "store") as store:
        assert [row.id for row in store.manifests()] == committed
        assert store.verify().ok
