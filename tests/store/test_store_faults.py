"""Random work on a disk that fails and loses power: what was committed is intact, and never is a byte wrong.

Each schedule is one seed, and a failing one names it. DORMOUSE_FAULT_SCHEDULES sets how many run (60),
DORMOUSE_FAULT_SEED the first one.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from faulty_files import FaultyDisk, PowerCut
from store_tools import noise, text, zeros

from dormouse.errors import DormouseError, NotFoundError
from dormouse.store.codec import Codec
from dormouse.store.store import Manifest, Marks, Store

SCHEDULES = int(os.environ.get("DORMOUSE_FAULT_SCHEDULES", "60"))
FIRST_SEED = int(os.environ.get("DORMOUSE_FAULT_SEED", "0"))
BATCHES = 10


@dataclass
class Promise:
    """What the store owes for one manifest: its bytes, whether it must or may be there, and the marks it may have."""

    plains: list[bytes]
    certain: bool = False
    marks: set[Marks] = field(default_factory=lambda: {Marks()})


class Schedule:
    """Random operations on one store, with what it has promised so far."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.chance = random.Random(seed)
        errors, shorts = self.chance.choice([0.0, 0.01, 0.05, 0.2]), self.chance.choice([0.0, 0.1, 0.5])
        self.disk = FaultyDisk(folder / "disk", seed, errors=errors, shorts=shorts)
        self.disk.root.mkdir(mode=0o700)
        self.promises: dict[str, Promise] = {}
        self.store: Store | None = None
        self.removed: list[str] = []
        self.count = 0
        self.undisturbed = True

    def run(self) -> None:
        with self.disk.watching():
            try:
                for _ in range(self.chance.randrange(1, 5)):
                    self._until_power_fails()
            finally:
                self._close()

    def _until_power_fails(self) -> None:
        """Or the process is killed, or nothing happens; also in a moment in which nobody is at work."""
        try:
            with self.disk.armed(cut_after=self.chance.choice([None, self.chance.randrange(1, 400)])):
                for _ in range(self.chance.randrange(1, 12)):
                    self._one_step()
            over = self.chance.choice([None, self.disk.revive, self.disk.restart])
        except PowerCut:
            over = self.chance.choice([self.disk.revive, self.disk.restart])
        if over is not None:
            self.undisturbed = False
            self._close()
            assert self.disk.open_files == 0, "a descriptor was left open"
            over()
        if over != self.disk.revive:  # otherwise the next process goes on where the dead one was
            self._check()

    def _one_step(self) -> None:
        work = [self._commit] * 4 + [self._give_up, self._remove, self._mark, self._mark]
        work += [self._collect, self._collect, self._verify, self._reopen, self._lose_index, self._read]
        try:
            if self.store is None:
                self.store = Store.open(self._path)
            self.chance.choice(work)(self.store)
        except DormouseError:  # any other kind of exception fails the test
            if self.undisturbed and not self.disk.faults:
                raise

    @property
    def _path(self) -> Path:
        return self.disk.root / "data" / "store"

    def _close(self) -> None:
        if self.store is not None:
            self.store.close()
            self.store = None

    # the work

    def _plains(self) -> list[bytes]:
        def one() -> bytes:
            make = self.chance.choice([noise, text, zeros])
            return make(self.chance.randrange(4), self.chance.choice([1, 5000, 20_000]))

        return [one() for _ in range(self.chance.randrange(5))]

    def _commit(self, store: Store) -> None:
        self.count += 1
        manifest_id = self.chance.choice([f"m{self.count}", *self.removed])
        plains = self._plains()
        with store.begin() as transaction:
            refs = [transaction.put(plain, codec=self.chance.choice(list(Codec))) for plain in plains]
            self.promises[manifest_id] = Promise(plains)
            self.removed = [each for each in self.removed if each != manifest_id]
            transaction.commit(Manifest(manifest_id, "k", "n", 1.0, manifest_id.encode(), refs))
            self.promises[manifest_id].certain = True

    def _give_up(self, store: Store) -> None:
        with store.begin() as transaction:
            for plain in self._plains():
                transaction.put(plain)

    def _remove(self, store: Store) -> None:
        if self.promises:
            manifest_id = self.chance.choice(sorted(self.promises))
            self.promises[manifest_id].certain = False
            store.remove(manifest_id)
            del self.promises[manifest_id]
            self.removed.append(manifest_id)

    def _mark(self, store: Store) -> None:
        if self.promises:
            manifest_id = self.chance.choice(sorted(self.promises))
            for _ in range(self.chance.choice([1, 1, 3])):
                self._mark_one(store, manifest_id)

    def _mark_one(self, store: Store, manifest_id: str) -> None:
        promise = self.promises[manifest_id]
        marks = self.chance.choice([Marks(), Marks(pinned=True), Marks(quarantine="x" * 3000, quarantined_at=1.0)])
        kept = Marks(marks.pinned, marks.quarantine and marks.quarantine[:2000], marks.quarantined_at)
        promise.marks.add(kept)
        store.mark(manifest_id, lambda _old: marks)
        promise.marks = {kept}

    def _collect(self, store: Store) -> None:
        store.collect_garbage(wait=0)

    def _verify(self, store: Store) -> None:
        store.verify(deep=self.chance.random() < 0.5)

    def _reopen(self, _store: Store) -> None:
        self._close()

    def _lose_index(self, _store: Store) -> None:
        self._close()
        (self._path / "index.sqlite").unlink(missing_ok=True)

    def _read(self, store: Store) -> None:
        for manifest_id in self.promises:
            self._compare(store, manifest_id)

    # what must hold

    def _compare(self, store: Store, manifest_id: str) -> None:
        manifest = store.manifest(manifest_id)
        assert manifest.body == manifest_id.encode()
        assert [bytes(store.read(digest)) for digest in manifest.refs] == self.promises[manifest_id].plains

    def _check(self) -> None:
        """With a disk that works again: also after starting anew, and after a collection of garbage."""
        assert self.disk.open_files == 0, "a descriptor was left open"
        for collect in (False, True):
            self._close()
            self.store = Store.open(self._path)
            self._check_promises(self.store)
            report = self.store.verify()
            assert report.ok, report
            if collect:
                self._forget_uncertain(self.store)
                self.store.collect_garbage(wait=0)
                self._check_promises(self.store)
                assert self.store.verify().ok

    def _check_promises(self, store: Store) -> None:
        rows = {row.id: row for row in store.manifests()}
        assert rows.keys() <= self.promises.keys()
        for manifest_id, promise in self.promises.items():
            try:
                self._compare(store, manifest_id)
            except NotFoundError:
                assert not promise.certain, f"{manifest_id} was promised"
            if promise.certain:
                assert rows[manifest_id].marks in promise.marks

    def _forget_uncertain(self, store: Store) -> None:
        for manifest_id in [each for each, promise in self.promises.items() if not promise.certain]:
            del self.promises[manifest_id]
            try:
                store.remove(manifest_id)
            except NotFoundError:
                continue


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: SQLite's syncs are real."""
    memory = Path("/dev/shm")
    path = memory / f"dormouse-faults-{os.getpid()}" if os.access(memory, os.W_OK) else tmp_path / "faults"
    path.mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_failing_disk_never_costs_a_committed_manifest_or_gives_a_wrong_byte(
    folder: Path, batch: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    for seed in range(FIRST_SEED + batch, FIRST_SEED + SCHEDULES, BATCHES):
        schedule = Schedule(seed, folder)
        try:
            schedule.run()
        except BaseException as error:
            error.add_note(f"schedule {seed}; faults: {schedule.disk.faults}")
            raise
        shutil.rmtree(schedule.disk.root)
