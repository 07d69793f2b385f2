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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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

from dormouse.errors import DamagedError, DiskFullError, HostError, SnapshotError, StoreError
from dormouse.snapshot.batches import batches, even, shrinking
from dormouse.snapshot.criu_images import PAGE
from dormouse.snapshot.criu_setup import Criu
from dormouse.snapshot.hand_capture import HandCapture, _Channel
from dormouse.snapshot.hand_fill import HandFill
from dormouse.snapshot.hands import Hands, ahead_limit, hands_for
from dormouse.snapshot.hands_messages import CAPTURE_BYTES
from dormouse.snapshot.images import SnapshotBody, decode_body
from dormouse.snapshot.memory_capture import ParentMemory, address_space
from dormouse.snapshot.memory_map import FULL, WINDOW, AddressSpace, Piece, Span, Window, mask_bytes
from dormouse.snapshot.memory_restore import MemoryPlan
from dormouse.snapshot.process_memory import ProcessMemory
from dormouse.snapshot.tree import ProcessTree
from dormouse.snapshot.window_fill import WindowTask
from dormouse.snapshot.window_store import Stored
from dormouse.store.chunk import Digest
from dormouse.store.codec import Codec
from dormouse.store.pack import StoredChunk
from dormouse.store.store import Manifest, Store, Transaction
from dormouse.store.transaction import Reserved

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
    cut = list(batches(tasks, lambda one: one.plain_bytes, lambda _given: limit))
    assert [one for batch in cut for one in batch] == tasks
    for batch in cut:
        assert batch and len(batch) <= 32
        assert len(batch) == 1 or sum(one.plain_bytes for one in batch) <= limit
    for batch, following in itertools.pairwise(cut):
        assert len(batch) == 32 or sum(one.plain_bytes for one in [*batch, following[0]]) > limit


@given(st.integers(0, 1 << 40), st.integers(1, 64))
def test_a_batch_is_some_mebibytes_and_every_hand_gets_several(total: int, hands: int) -> None:
    size = even(total, hands, 8 << 20)
    assert 1 << 20 <= size <= 8 << 20
    assert size == 1 << 20 or size * hands * 8 <= total


@given(st.integers(0, 1 << 32), st.integers(1, 16), st.lists(st.integers(1, 8 << 20), max_size=200))
def test_batches_of_a_capture_shrink_so_that_all_hands_end_together(total: int, hands: int, sizes: list[int]) -> None:
    given = 0
    for batch in batches(sizes, int, lambda before: shrinking(total - before, hands, 16 << 20)):
        assert len(batch) == 1 or sum(batch) <= max(1 << 20, min(16 << 20, (total - given) // (hands * 2)))
        given += sum(batch)
    assert given == sum(sizes)


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
    assert not store._layout.index.present([hit.digest])  # so the next capture stores it anew
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
    wait_until(lambda: hands._foreman is None or hands._foreman.poll() is not None)  # it could still take an order
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


# Without CRIU: the memory of a child of ours is captured


class Captured:
    """A process whose memory has these windows, and captures of them by hands."""

    def __init__(self, contents: Sequence[bytes], folder: Path) -> None:
        (folder / "contents").write_bytes(b"".join(contents))
        program = f"""
            import mmap, ctypes, sys, time
            room = mmap.mmap(-1, {(len(contents) + 1) * WINDOW}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            at = ctypes.addressof(ctypes.c_char.from_buffer(room))
            begin = -at % {WINDOW}
            room[begin : begin + {len(contents) * WINDOW}] = open({str(folder / "contents")!r}, "rb").read()
            print((at + begin) // {WINDOW}, flush=True)
            time.sleep(600)
            """
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.first = int(self.process.stdout.readline())
        self.spans = [(Span(self.first + number, FULL), FULL) for number in range(len(contents))]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def contents(self) -> list[bytes]:
        with Path(f"/proc/{self.process.pid}/mem").open("rb", buffering=0) as memory:
            memory.seek(self.first * WINDOW)
            return [memory.read(WINDOW) for _span in self.spans]

    def stored(self, hands: Hands, store: Store, transaction: Transaction, parent: ParentMemory | None) -> Stored:
        found: Stored = {}
        with (
            HandCapture(
                *(hands, transaction, parent), key=store.key, packs=store.packs, pays=lambda _stored: False
            ) as crew,
            ThreadPoolExecutor(hands.count) as pool,
        ):
            batches = crew.batches(self.spans, len(self.spans) * WINDOW)
            for part in pool.map(lambda batch: crew.store(7, self.process.pid, batch), batches):
                found.update(part)
        return found

    def captured(
        self, hands: Hands, store: Store, identity: str, parent: ParentMemory | None = None
    ) -> tuple[AddressSpace, Transaction]:
        with store.begin() as transaction:
            found = self.stored(hands, store, transaction, parent)
            space = address_space(7, 1, len(self.spans) * 256, found)
            transaction.commit(Manifest(identity, "process", "p", 1.0, b"", space.chunk_list()))
        return space, transaction


def body(space: AddressSpace) -> SnapshotBody:
    return SnapshotBody(1, "p", {}, 7, [], [], [space], [], {})


def given_back(space: AddressSpace, store: Store) -> list[bytes]:
    with store.reader() as reader:
        numbers = [window.number for window in space.windows]
        return [bytes(window[2]) for window in ParentMemory(body(space), reader).windows(7, numbers) if window]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[list[Captured]]:
    """Those that end with the test."""
    subjects: list[Captured] = []
    yield subjects
    for subject in subjects:
        subject.end()


def noise(length: int = WINDOW) -> bytes:
    return os.urandom(length)


@pytest.mark.root
def test_new_memory_that_many_hands_meet_at_once_is_stored_once(
    tmp_path: Path, hands: Hands, running: list[Captured]
) -> None:
    kinds = [noise(), noise(), b"leaf" * (WINDOW // 4)]
    running.append(made := Captured([kinds[number % 3] for number in range(48)], tmp_path))
    with Store.open(tmp_path / "store") as store:
        space, transaction = made.captured(hands, store, "a")
        assert transaction.new_chunks == 3
        assert 2 * WINDOW < transaction.stored_bytes < 2 * WINDOW + PAGE
        assert len(space.chunk_list()) == 3
        assert given_back(space, store) == made.contents()
        assert store.verify().ok


@pytest.mark.root
def test_memory_that_has_not_changed_is_asked_about_once_for_each_batch(
    tmp_path: Path, hands: Hands, running: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    running.append(made := Captured([noise() for _ in range(64)], tmp_path))
    with Store.open(tmp_path / "store") as store:
        first, _ = made.captured(hands, store, "a")
        heard = []
        hear = _Channel.hear
        monkeypatch.setattr(_Channel, "hear", lambda channel: heard.append(hear(channel)) or heard[-1])
        with store.reader() as reader:
            again, transaction = made.captured(hands, store, "b", ParentMemory(body(first), reader))
        assert again == first
        assert transaction.new_chunks == 0
        names = [type(word).__name__ for word in heard]
        assert names.count("Has") == names.count("Taken") == len(names) / 2 < len(made.spans) / 2


@pytest.mark.root
def test_a_few_changed_pages_are_stored_alone_and_what_is_new_beside_them_whole(
    tmp_path: Path, hands: Hands, running: list[Captured]
) -> None:
    running.append(made := Captured([noise() for _ in range(32)], tmp_path))
    with Store.open(tmp_path / "store") as store:
        first, _ = made.captured(hands, store, "a")
        changes = {0: 1, 5: 7, 6: 1 << 255, 31: 1 << 9, 20: FULL}
        with ProcessMemory(made.process.pid) as memory:
            for number, mask in changes.items():
                memory.write(made.first + number, mask, memoryview(noise(mask.bit_count() * PAGE)))
        with store.reader() as reader:
            second, transaction = made.captured(hands, store, "b", ParentMemory(body(first), reader))
        assert transaction.stored_bytes == sum(mask.bit_count() for mask in changes.values()) * PAGE
        assert [len(window.pieces) for window in second.windows].count(2) == 4
        store.remove("a")
        assert given_back(second, store) == made.contents()
        assert store.verify().ok


@pytest.mark.root
def test_a_damaged_window_of_the_parent_is_stored_anew_and_noted(
    tmp_path: Path, hands: Hands, running: list[Captured]
) -> None:
    running.append(made := Captured([noise() for _ in range(16)], tmp_path))
    with Store.open(tmp_path / "store") as store:
        first, _ = made.captured(hands, store, "a")
        hurt = first.chunk_list()[first.windows[3].pieces[0].chunk]
        with store.reader() as reader:
            (chunk,) = reader.locate([hurt])
            with reader.pack(chunk).open("r+b") as pack:
                pack.seek(chunk.offset + 10)
                pack.write(b"damage")
        with ProcessMemory(made.process.pid) as memory:
            for number in (3, 4):
                memory.write(made.first + number, 1, memoryview(noise(PAGE)))
        with store.reader() as reader:
            second, transaction = made.captured(hands, store, "b", ParentMemory(body(first), reader))
        assert transaction.stored_bytes == WINDOW + PAGE
        assert given_back(second, store) == made.contents()
        assert not store._layout.index.present([hurt])


@pytest.mark.root
def test_a_hand_that_dies_with_places_reserved_leaves_nothing_behind(
    tmp_path: Path, hands: Hands, running: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    running.append(made := Captured([noise() for _ in range(16)], tmp_path))
    victims = pids_of(hands)
    reserve = Transaction.reserve

    def reserve_and_kill(transaction: Transaction, chunks: Sequence[StoredChunk]) -> Reserved:
        reserved = reserve(transaction, chunks)
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return reserved

    with Store.open(tmp_path / "store") as store:
        with monkeypatch.context() as patched, store.begin() as transaction:
            patched.setattr(Transaction, "reserve", reserve_and_kill)
            with pytest.raises(HostError, match="died while memory was captured"):
                made.stored(hands, store, transaction, None)
            with pytest.raises(StoreError, match="could not be written"):
                transaction.commit(Manifest("a", "process", "p", 1.0, b"", []))
        assert store.manifests() == []
        assert not list((tmp_path / "store").rglob("*.tmp"))
        wait_until(lambda: not any(hand.alive for hand in hands._hands))
        space, _ = made.captured(hands, store, "b")
        assert given_back(space, store) == made.contents()
        assert store.verify().ok


@pytest.mark.root
def test_a_disk_that_is_full_is_named_and_the_hands_live_on(
    tmp_path: Path, hands: Hands, running: list[Captured]
) -> None:
    running.append(made := Captured([noise() for _ in range(24)], tmp_path))
    pids = pids_of(hands)
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
    try:
        with Store.open(disk / "store") as store, store.begin() as transaction:
            with pytest.raises(DiskFullError, match="disk is full"):
                made.stored(hands, store, transaction, None)
            with pytest.raises(StoreError, match="could not be written"):
                transaction.commit(Manifest("a", "process", "p", 1.0, b"", []))
        assert not list(disk.rglob("*.tmp"))
    finally:
        wait_until(lambda: subprocess.run(["umount", disk], capture_output=True).returncode == 0)  # hands let go of it
    assert pids_of(hands) == pids
    with Store.open(tmp_path / "store") as store:
        space, _ = made.captured(hands, store, "b")
        assert given_back(space, store) == made.contents()


@pytest.mark.root
@pytest.mark.parametrize("content", ["noise", "text"])
def test_a_hand_holds_one_batch_and_what_it_is_coded_to(
    tmp_path: Path, hands: Hands, running: list[Captured], content: str
) -> None:
    text = b"".join(b"%012d dormice" % number for number in range(WINDOW // 20))
    varied = [(noise() if content == "noise" else b"%06d" % number + text)[:WINDOW] for number in range(128)]
    running.append(made := Captured([window.ljust(WINDOW, b".") for window in varied], tmp_path))
    before = {pid: resident_peak(pid) for pid in pids_of(hands)}
    with Store.open(tmp_path / "store") as store:
        made.captured(hands, store, "a")
    for pid, least in before.items():
        assert resident_peak(pid) - least < 2 * CAPTURE_BYTES + (12 << 20)


def resident_peak(pid: int) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


@pytest.mark.root
def test_a_hand_that_hangs_is_killed_and_named(
    tmp_path: Path, hands: Hands, running: list[Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    running.append(made := Captured([noise() for _ in range(8)], tmp_path))
    monkeypatch.setattr("dormouse.snapshot.hand_capture._SECONDS", 1)
    victims = pids_of(hands)
    with Store.open(tmp_path / "store") as store:
        made.captured(hands, store, "a")
        hear = _Channel.hear

        def hear_and_stop(channel: _Channel) -> object:
            word = hear(channel)
            for pid in victims:
                os.kill(pid, signal.SIGSTOP)
            return word

        with monkeypatch.context() as patched, store.begin() as transaction:
            patched.setattr(_Channel, "hear", hear_and_stop)
            with pytest.raises(HostError, match=f"({victims[0]}|{victims[1]}) took over 1 s"):
                made.stored(hands, store, transaction, None)
        wait_until(lambda: not any(hand.alive for hand in hands._hands))
        made.captured(hands, store, "b")
