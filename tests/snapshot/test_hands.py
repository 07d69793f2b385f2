"""Memory that hands bring back: the same as by threads, whatever happens to a hand meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.snapshot.test_memory_paths import (
    assert_same,
    captured,
    damage,
    large,
    memory,
    open_descriptors,
    restored,
    start,
    uncached,
)

from dormouse.errors import DamagedError, HostError, SnapshotError
from dormouse.snapshot.criu_images import PAGE
from dormouse.snapshot.criu_setup import Criu
from dormouse.snapshot.hand_fill import HandFill, batch_bytes, batches
from dormouse.snapshot.hands import Hands, ahead_limit, hands_for
from dormouse.snapshot.images import decode_body
from dormouse.snapshot.memory_map import WINDOW, AddressSpace, Piece, Window, mask_bytes
from dormouse.snapshot.memory_restore import MemoryPlan
from dormouse.snapshot.process_memory import ProcessMemory
from dormouse.snapshot.tree import ProcessTree
from dormouse.snapshot.window_fill import WindowTask
from dormouse.store.chunk import Digest
from dormouse.store.codec import Codec
from dormouse.store.pack import StoredChunk
from dormouse.store.store import Manifest, Store

__all__ = ["large"]

WINDOWS = 40
GONE_SECONDS = 10


@pytest.fixture
def hands() -> Iterator[Hands]:
    """Two, which end with the test."""
    with Hands(2) as opened:
        opened.warm()
        yield opened


def children(of: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{of}/task/{of}/children").read_text().split()]


def pids_of(hands: Hands) -> list[int]:
    """The hands' processes, once they are there."""
    assert hands._foreman is not None
    deadline = time.monotonic() + GONE_SECONDS
    while len(found := children(hands._foreman.pid)) < hands.count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def wait_until(what: object, *, seconds: float = GONE_SECONDS) -> None:
    assert callable(what)
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# The distribution


def task(number: int, pages: int) -> WindowTask:
    chunk = StoredChunk(Digest(bytes(32)), bytes(16), 1, 4096, 100, pages * PAGE, Codec.LZ4)
    return WindowTask(7, Window(number * 16, [Piece(0, mask_bytes((1 << pages) - 1, 16))]), [chunk])


@given(st.lists(st.integers(1, 4096), max_size=200), st.integers(PAGE, 16 << 20))
def test_batches_have_all_windows_in_order_and_are_neither_too_large_nor_needlessly_small(
    sizes: list[int], limit: int
) -> None:
    tasks = [task(number, pages) for number, pages in enumerate(sizes)]
    cut = list(batches(tasks, limit))
    assert [one for batch in cut for one in batch] == tasks
    for batch in cut:
        assert batch and len(batch) <= 32
        assert len(batch) == 1 or sum(one.plain_bytes for one in batch) <= limit
    for batch, following in itertools.pairwise(cut):
        assert len(batch) == 32 or sum(one.plain_bytes for one in [*batch, following[0]]) > limit


@given(st.integers(0, 1 << 40), st.integers(1, 64))
def test_a_batch_is_some_mebibytes_and_every_hand_gets_several(total: int, hands: int) -> None:
    size = batch_bytes(total, hands)
    assert 1 << 20 <= size <= 8 << 20
    assert size == 1 << 20 or size * hands * 8 <= total


def test_the_number_of_hands_follows_the_cores() -> None:
    assert [hands_for(cores) for cores in (1, 2, 3, 4, 12, 13, 16, 128)] == [0, 0, 2, 3, 11, 12, 12, 12]


def test_what_is_held_ahead_is_bounded_by_the_memory() -> None:
    gigabyte = 1 << 30
    assert ahead_limit(128 * gigabyte, 100 * gigabyte) == 1536 << 20
    assert ahead_limit(16 * gigabyte, 15 * gigabyte) == int(16 * gigabyte * 0.03)
    assert ahead_limit(16 * gigabyte, gigabyte // 4) == gigabyte // 16


# Through CRIU


@pytest.mark.root
@pytest.mark.parametrize("how", ["alone", "fork"])
def test_memory_filled_by_hands_is_what_was_captured(
    store: Store, criu: Criu, tmp_path: Path, hands: Hands, how: str
) -> None:
    tree = start(tmp_path, how)
    result = captured(tree, store, criu)
    expected = memory(tree.home)
    tree.home.close()
    for _time in range(2):  # the hands serve again
        made = restored(result.snapshot_id, store, criu, fill=True, hands=hands)
        try:
            assert_same(memory(made.tree.home), expected)
        finally:
            made.tree.home.close()
    assert next(step for step in made.phases.steps if step.name == "fill ahead").bytes


@pytest.mark.root
@pytest.mark.parametrize("ahead", [0, 40 << 20, 1 << 30], ids=["nothing", "some", "all"])
def test_large_memory_filled_by_hands_is_what_was_captured(
    store: Store,
    criu: Criu,
    tmp_path: Path,
    hands: Hands,
    large: tuple[ProcessTree, int],
    monkeypatch: pytest.MonkeyPatch,
    ahead: int,
) -> None:
    monkeypatch.setattr("dormouse.snapshot.hands.ahead_limit", lambda *_facts: ahead)
    tree, _at = large
    result = captured(tree, store, criu)
    expected = memory(tree.home)
    tree.home.close()
    uncached(tmp_path / "data" / "store")
    for _cold_then_cached in range(2):
        made = restored(result.snapshot_id, store, criu, fill=True, hands=hands)
        try:
            assert_same(memory(made.tree.home), expected)
        finally:
            made.tree.home.close()
    assert hands._held == 0


@pytest.mark.root
@pytest.mark.parametrize("cold", [False, True])
def test_a_damaged_chunk_is_named_and_remembered(
    store: Store, criu: Criu, tmp_path: Path, hands: Hands, large: tuple[ProcessTree, int], cold: bool
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
        restored(result.snapshot_id, store, criu, fill=True, hands=hands)
    assert not store._layout.index.has(hit.digest)  # so the next capture stores it anew
    pids_of(hands)


@pytest.mark.root
def test_a_restore_that_fails_leaves_nothing(store: Store, criu: Criu, tmp_path: Path, hands: Hands) -> None:
    tree = start(tmp_path, "fork")
    result = captured(tree, store, criu)
    tree.home.close()
    damage(tmp_path / "data" / "store")
    threads = set(threading.enumerate())
    pids_of(hands)
    for _attempt in range(3):
        before = open_descriptors()
        with pytest.raises(DamagedError):
            restored(result.snapshot_id, store, criu, fill=True, hands=hands)
        assert open_descriptors() == before
        assert not set(threading.enumerate()) - threads
        assert hands._held == 0


@pytest.mark.root
def test_a_capture_by_hands_is_the_same_as_by_threads(
    store: Store, criu: Criu, hands: Hands, large: tuple[ProcessTree, int]
) -> None:
    tree, at = large
    by_hands = captured(tree, store, criu, hands)
    by_threads = captured(tree, store, criu)
    assert by_threads.stored_bytes < by_hands.stored_bytes / 100  # all was there already
    assert len(block := windows_at(at, store, by_hands.snapshot_id)) >= 5
    assert block == windows_at(at, store, by_threads.snapshot_id)
    expected = memory(tree.home)
    tree.home.close()
    assert store.verify().ok
    store.remove(by_threads.snapshot_id)
    made = restored(by_hands.snapshot_id, store, criu, fill=True, hands=hands)
    assert_same(memory(made.tree.home), expected)
    # What has changed since, and only that, is stored by a second capture.
    with ProcessMemory(made.tree.home.outer_pid(made.tree.pid)) as changed:
        for place in (at + (1 << 20), at + (2 << 20), at + (41 << 20)):
            changed.write(place // WINDOW, 1 << place % WINDOW // PAGE, memoryview(b"x" * PAGE))
    second = captured(made.tree, store, criu, hands)
    expected = memory(made.tree.home)
    made.tree.home.close()
    assert second.stored_bytes < 60 * PAGE < by_hands.stored_bytes / 10
    again = restored(second.snapshot_id, store, criu, fill=False)
    try:
        assert_same(memory(again.tree.home), expected)
    finally:
        again.tree.home.close()
    assert store.verify().ok


@pytest.mark.root
@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_capture_of_scattered_memory_by_hands_is_the_same_as_by_threads(
    store: Store, criu: Criu, tmp_path: Path, hands: Hands, how: str
) -> None:
    tree = start(tmp_path, how)
    by_threads = captured(tree, store, criu)
    expected = memory(tree.home)
    store.remove(by_threads.snapshot_id)
    by_hands = captured(tree, store, criu, hands)
    tree.home.close()
    store.collect_garbage()
    made = restored(by_hands.snapshot_id, store, criu, fill=True)
    try:
        assert_same(memory(made.tree.home), expected)
    finally:
        made.tree.home.close()


def windows_at(at: int, store: Store, snapshot_id: str) -> dict[int, list[tuple[Digest, bytes, bytes]]]:
    """What was stored of the 64 MiB from an address on, which does not change."""
    (space,) = decode_body(store.manifest(snapshot_id).body, snapshot_id).memory
    digests = space.chunk_list()
    return {
        window.number: [(digests[piece.chunk], piece.held, piece.used) for piece in window.pieces]
        for window in space.windows
        if at < window.number * WINDOW < at + (56 << 20)
    }


@pytest.mark.root
def test_a_hand_that_dies_in_a_capture_fails_it_and_the_process_runs_on(
    store: Store, criu: Criu, tmp_path: Path, hands: Hands
) -> None:
    tree = start(tmp_path, "alone")
    victim = pids_of(hands)[0]
    before = open_descriptors()
    os.kill(victim, signal.SIGSTOP)  # so that it is at work when it is killed
    threading.Timer(1.5, lambda: os.kill(victim, signal.SIGKILL)).start()
    with pytest.raises(HostError, match="died while memory was captured"):
        captured(tree, store, criu, hands)
    assert open_descriptors() <= before
    assert store.manifests() == []
    for pid in tree.home.processes():
        assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "SR"
    captured(tree, store, criu, hands)
    tree.home.close()
    assert store.verify().ok


# Without CRIU: a child of ours, stopped, is filled


class Subject:
    """A process with WINDOWS empty windows of memory, and a plan and the bytes that they are to get."""

    def __init__(self, store: Store) -> None:
        program = f"""
            import mmap, ctypes, time
            room = mmap.mmap(-1, {(WINDOWS + 1) * WINDOW}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            print(ctypes.addressof(ctypes.c_char.from_buffer(room)), flush=True)
            time.sleep(600)
            """
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.first = -(-int(self.process.stdout.readline()) // WINDOW)
        self.plain = [os.urandom(WINDOW // 2) + b"leaf" * (WINDOW // 8) for _ in range(WINDOWS)]
        with store.begin() as transaction:
            digests = [transaction.put(plain) for plain in self.plain]
            transaction.commit(Manifest("filled", "process", "p", 1.0, b"", digests))
        full = mask_bytes((1 << 256) - 1)
        windows = [Window(self.first + n, [Piece(n, full)]) for n in range(WINDOWS)]
        space = AddressSpace(7, 1, WINDOWS * 256, windows, b"".join(digests))
        self.plan = MemoryPlan(space, [], windows)

    def is_filled(self) -> bool:
        with Path(f"/proc/{self.process.pid}/mem").open("rb", buffering=0) as mem:
            mem.seek(self.first * WINDOW)
            return all(mem.read(WINDOW) == plain for plain in self.plain)


@pytest.fixture
def subject(tmp_path: Path) -> Iterator[tuple[Subject, Store]]:
    with Store.open(tmp_path / "store") as store:
        made = Subject(store)
        yield made, store
        made.process.kill()
        made.process.wait()
        assert made.process.stdout is not None
        made.process.stdout.close()


@pytest.mark.root
def test_a_hand_that_is_killed_while_it_reads_ahead_fails_the_restore_and_is_replaced(
    subject: tuple[Subject, Store], hands: Hands
) -> None:
    filled, store = subject
    victim = pids_of(hands)[0]
    with store.reader() as reader:
        with HandFill([filled.plan], reader, hands) as fill:
            fill.begin()
            time.sleep(0.05)
            os.kill(victim, signal.SIGKILL)
            with pytest.raises(HostError, match=f"{victim} died|died while memory was filled"):
                fill.run({7: filled.process.pid})
        with HandFill([filled.plan], reader, hands) as fill:
            fill.begin()
            fill.run({7: filled.process.pid})
    assert filled.is_filled()
    assert victim not in pids_of(hands)


@pytest.mark.root
def test_a_hand_that_is_killed_while_it_writes_fails_the_restore(
    subject: tuple[Subject, Store], hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled, store = subject
    monkeypatch.setattr("dormouse.snapshot.hands.ahead_limit", lambda *_facts: 0)  # all is left for after `go`
    victim = pids_of(hands)[1]
    os.kill(victim, signal.SIGSTOP)
    with store.reader() as reader, HandFill([filled.plan], reader, hands) as fill:
        fill.begin()
        threading.Timer(0.3, lambda: os.kill(victim, signal.SIGKILL)).start()
        with pytest.raises(HostError, match="died while memory was filled"):
            fill.run({7: filled.process.pid})
    with store.reader() as reader, HandFill([filled.plan], reader, hands) as fill:
        fill.run({7: filled.process.pid})  # without `begin`, too
    assert filled.is_filled()


@pytest.mark.root
def test_hands_that_were_dead_before_are_replaced_and_so_is_the_foreman(
    subject: tuple[Subject, Store], hands: Hands
) -> None:
    filled, store = subject
    for pid in pids_of(hands):
        os.kill(pid, signal.SIGKILL)
    assert hands._foreman is not None
    hands._foreman.kill()
    wait_until(lambda: not any(hand.alive for hand in hands._hands))
    with store.reader() as reader, HandFill([filled.plan], reader, hands) as fill:
        fill.begin()
        fill.run({7: filled.process.pid})
    assert filled.is_filled()


@pytest.mark.root
def test_a_process_that_is_gone_is_an_error_and_the_hands_live_on(subject: tuple[Subject, Store], hands: Hands) -> None:
    filled, store = subject
    pids = pids_of(hands)
    filled.process.kill()
    filled.process.wait()
    with store.reader() as reader, HandFill([filled.plan], reader, hands) as fill:
        fill.begin()
        with pytest.raises(SnapshotError, match="memory of process"):
            fill.run({7: filled.process.pid})
    assert pids_of(hands) == pids


@pytest.mark.root
def test_a_fill_that_is_given_up_frees_the_hands(subject: tuple[Subject, Store], hands: Hands) -> None:
    filled, store = subject
    before = open_descriptors()
    for _time in range(3):
        with store.reader() as reader, contextlib.suppress(KeyError), HandFill([filled.plan], reader, hands) as fill:
            fill.begin()
            raise KeyError
    with store.reader() as reader, HandFill([filled.plan], reader, hands) as fill:
        fill.run({7: filled.process.pid})
    assert filled.is_filled()
    assert hands._held == 0
    assert open_descriptors() == before


@pytest.mark.root
def test_several_fills_share_the_hands(subject: tuple[Subject, Store], hands: Hands) -> None:
    """One whose process is not there yet does not hold up another."""
    filled, store = subject
    with store.reader() as reader, HandFill([filled.plan], reader, hands) as waiting:
        waiting.begin()
        with HandFill([filled.plan], reader, hands) as other:
            other.begin()
            other.run({7: filled.process.pid})
        assert filled.is_filled()
        waiting.run({7: filled.process.pid})
    assert filled.is_filled()


@pytest.mark.root
def test_hands_end_with_the_process_that_has_them() -> None:
    program = """
        import time
        from dormouse.snapshot.hands import Hands
        hands = Hands(2)
        hands.warm()
        print(hands._foreman.pid, flush=True)
        time.sleep(600)
        """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        foreman = int(owner.stdout.readline())
        wait_until(lambda: len(children(foreman)) == 2)
        pids = [foreman, *children(foreman)]
        owner.kill()
    wait_until(lambda: not any(is_running(pid) for pid in pids))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_key_is_in_no_command_line_and_no_environment(subject: tuple[Subject, Store], hands: Hands) -> None:
    filled, store = subject
    pids = pids_of(hands)
    with store.reader() as reader, HandFill([filled.plan], reader, hands) as fill:
        fill.run({7: filled.process.pid})
    for pid in pids:
        for name in ("cmdline", "environ"):
            text = Path(f"/proc/{pid}/{name}").read_bytes()
            assert store.key.secret not in text and store.key.secret.hex().encode() not in text
