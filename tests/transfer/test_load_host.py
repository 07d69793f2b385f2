"""Loads into host memory: every byte in its place, from files hot and cold, or an error that names what is wrong."""

from __future__ import annotations

import mmap
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.transfer.load_tools import Stored, cut_by, mixed, plain_file, reversed_parts, shards, stored, weights

from dormouse.errors import DamagedError, NotFoundError, StoreError, UntrustedError
from dormouse.store.codec import Codec
from dormouse.store.key import Key
from dormouse.store.store import Store
from dormouse.transfer import source_files
from dormouse.transfer.load_host import load_host
from dormouse.transfer.plan import Copy, LoadPlan, Piece, plan
from dormouse.transfer.report import LoadReport


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as store:
        yield store


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No test leaves a thread or a descriptor."""
    before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    yield
    assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == before


def loaded(
    plan: LoadPlan, key: Key | None, *, threads: int = 3, cancelled: threading.Event | None = None
) -> tuple[bytes, LoadReport]:
    memory = mmap.mmap(-1, max(1, plan.sizes[0]))
    report = load_host(plan, [memoryview(memory)[: plan.sizes[0]]], key=key, threads=threads, cancelled=cancelled)
    return memory[: plan.sizes[0]], report


def make_cold(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("extent_bytes", [50_000, 1 << 20])
def test_chunks_of_every_coding(store: Store, cold: bool, extent_bytes: int) -> None:
    chunks = stored(store, mixed(1, 40))
    if cold:
        make_cold(chunks.pack())
    found, report = loaded(chunks.plan(extent_bytes=extent_bytes), chunks.key)
    assert found == chunks.content
    assert report.direct_bytes + report.cached_bytes == report.stored_bytes


def test_cold_bytes_are_read_past_the_page_cache_and_warm_ones_through_it(store: Store) -> None:
    chunks = stored(store, [(weights(at, 1 << 20), Codec.RAW) for at in range(8)])
    make_cold(chunks.pack())
    _found, report = loaded(chunks.plan(), chunks.key)
    assert report.cached_bytes == 0 and report.direct_bytes == 8 << 20
    chunks.pack().read_bytes()
    _found, report = loaded(chunks.plan(), chunks.key)
    assert report.direct_bytes == 0 and report.cached_bytes == 8 << 20


def test_a_file_system_without_direct_reads(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = stored(store, mixed(2, 10))
    make_cold(chunks.pack())
    monkeypatch.setattr(source_files.SourceFile, "_open_direct", lambda _self: None)
    found, report = loaded(chunks.plan(), chunks.key)
    assert found == chunks.content and report.direct_bytes == 0


def test_direct_reads_that_are_refused_only_when_tried(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = stored(store, mixed(2, 10))
    make_cold(chunks.pack())
    monkeypatch.setattr(source_files.SourceFile, "is_resident", lambda *_: False)
    original = os.preadv

    def refusing(fd: int, buffers: list[memoryview], offset: int) -> int:
        if os.get_blocking(fd) and _is_direct(fd):
            raise OSError(22, "Invalid argument")
        return original(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refusing)
    found, report = loaded(chunks.plan(), chunks.key)
    assert found == chunks.content and report.direct_bytes == 0


def _is_direct(fd: int) -> bool:
    flags = Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0]
    return bool(int(flags, 8) & os.O_DIRECT)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    length=st.integers(1, 3 << 20),
    cuts=st.lists(st.integers(1, 3 << 20), max_size=6),
    seed=st.integers(0, 99),
    direct=st.booleans(),
)
def test_plain_files_of_any_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, cuts: list[int], seed: int, direct: bool
) -> None:
    content = random.Random(seed).randbytes(length)
    cuts = [cut for cut in cuts if cut < length]
    made = plain_file(tmp_path / "plain", content, cuts)
    with monkeypatch.context() as patch:
        patch.setattr(source_files.SourceFile, "is_resident", lambda *_: not direct)
        found, report = loaded(made, None)
    assert found == reversed_parts(content, cuts)
    assert report.plain_bytes == report.stored_bytes == length


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_shards_get_their_rows_and_columns(store: Store, devices: int) -> None:
    chunks = stored(store, mixed(3, 30))
    copies, sizes = shards(chunks.plains, devices)
    spaces = [bytearray(size) for size in sizes]
    load_host(chunks.plan_of(copies, sizes), [memoryview(space) for space in spaces], key=chunks.key)
    assert spaces == cut_by(chunks.plains, copies, sizes)


def test_progress_goes_up_to_all_of_it(store: Store) -> None:
    chunks = stored(store, mixed(4, 30))
    seen: list[tuple[int, int]] = []
    plan = chunks.plan(extent_bytes=50_000)
    load_host(
        plan,
        [memoryview(bytearray(plan.sizes[0]))],
        key=chunks.key,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen) and seen[-1] == (plan.plain_bytes, plan.plain_bytes)


@pytest.mark.parametrize("codec", [Codec.BF16, Codec.RAW])
def test_a_damaged_chunk_is_named(store: Store, codec: Codec) -> None:
    chunks = stored(store, [(weights(at, 300_000), codec) for at in range(12)])
    said = chunks.damage(7)
    with pytest.raises(DamagedError, match=said):
        loaded(chunks.plan(), chunks.key)


def test_another_key_and_no_key_load_nothing(store: Store) -> None:
    chunks = stored(store, mixed(5, 3))
    with pytest.raises(DamagedError, match="do not match their signature"):
        loaded(chunks.plan(), Key.new())
    with pytest.raises(StoreError, match="without its key"):
        loaded(chunks.plan(), None)


def test_zeros_are_believed_only_when_signed(store: Store) -> None:
    chunks = stored(store, [(bytes(5000), Codec.RAW)])
    made = chunks.plan()
    assert loaded(made, chunks.key)[0] == bytes(5000)
    assert made.zeros[0].chunk is not None
    forged = made.zeros[0]._replace(chunk=made.zeros[0].chunk._replace(mac=bytes(16)))
    with pytest.raises(DamagedError, match="do not match"):
        loaded(LoadPlan(made.files, (), made.sizes, (forged,)), chunks.key)


@pytest.mark.parametrize("direct", [False, True])
def test_a_file_that_became_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    made = plain_file(tmp_path / "plain", bytes(100_000), [50_000])
    os.truncate(tmp_path / "plain", 60_001)
    monkeypatch.setattr(source_files.SourceFile, "is_resident", lambda *_: not direct)
    with pytest.raises(DamagedError, match="plain is damaged: it ends at 60001"):
        loaded(made, None)


def test_files_that_can_not_be_opened(store: Store, tmp_path: Path) -> None:
    chunks = stored(store, mixed(6, 5))
    made = chunks.plan()
    chunks.pack().chmod(0o666)
    with pytest.raises(UntrustedError, match="open to other users"):
        loaded(made, chunks.key)
    chunks.pack().unlink()
    with pytest.raises(DamagedError, match=r"pack is missing"):
        loaded(made, chunks.key)
    gone = plain_file(tmp_path / "plain", b"abc", [])
    (tmp_path / "plain").unlink()
    with pytest.raises(NotFoundError, match="no file"):
        loaded(gone, None)
    os.mkfifo(tmp_path / "plain")
    with pytest.raises(StoreError, match="is no file"):
        loaded(gone, None)


@pytest.mark.parametrize("failing", [0, 3, 11])
def test_a_read_that_fails_ends_all(store: Store, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    chunks = stored(store, [(weights(at, 100_000), Codec.BF16) for at in range(12)])
    original, calls = os.preadv, iter(range(1000))

    def sometimes(fd: int, buffers: list[memoryview], offset: int) -> int:
        if next(calls) == failing:
            raise OSError(5, "Input/output error")
        return original(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", sometimes)
    with pytest.raises(DamagedError, match="the disk can't read it"):
        loaded(chunks.plan(extent_bytes=80_000), chunks.key)


def test_cancel_in_the_middle(store: Store) -> None:
    chunks = stored(store, [(weights(at, 100_000), Codec.BF16) for at in range(12)])
    cancelled = threading.Event()
    made = chunks.plan(extent_bytes=80_000)
    seen: list[int] = []

    def progress(done: int, _total: int) -> None:
        seen.append(done)
        cancelled.set()

    with pytest.raises(StoreError, match="not needed any more"):
        load_host(
            made,
            [memoryview(bytearray(made.sizes[0]))],
            key=chunks.key,
            threads=2,
            progress=progress,
            cancelled=cancelled,
        )
    assert max(seen) < made.plain_bytes


def test_a_failed_load_lets_go_of_the_memory(store: Store) -> None:
    """Although the error is still in hands: its traceback keeps no view of what was to be filled."""
    chunks = stored(store, mixed(7, 10))
    chunks.damage(next(at for at, plain in enumerate(chunks.plains) if any(plain)))
    made = chunks.plan()
    memory = mmap.mmap(-1, made.sizes[0])
    with pytest.raises(DamagedError) as caught, memoryview(memory) as view:
        load_host(made, [view], key=chunks.key)
    memory.close()
    assert caught.value


def _outside(change: Callable[[Copy], Copy]) -> LoadPlan:
    copy = change(Copy(0, 0, 0, 10, 2, 20, 30))
    return plan([Path("f")], [Piece(0, 0, 40, 40, Codec.LZ4, None, (copy,))], [60])


@pytest.mark.parametrize(
    "change",
    [
        lambda copy: copy._replace(target=21),
        lambda copy: copy._replace(target=-1),
        lambda copy: copy._replace(source=11),
        lambda copy: copy._replace(rows=3),
        lambda copy: copy._replace(rows=0),
        lambda copy: copy._replace(device=1),
        lambda copy: copy._replace(target_pitch=-1),
    ],
)
def test_a_plan_that_leaves_its_memory_is_refused(change: Callable[[Copy], Copy]) -> None:
    with pytest.raises(StoreError, match="leaves its memory"):
        _outside(change).require([60])


def test_destinations_of_another_size_are_refused(store: Store) -> None:
    chunks: Stored = stored(store, [(b"abc", Codec.RAW)])
    with pytest.raises(StoreError, match=r"needs memory of \(3,\) bytes"):
        load_host(chunks.plan(), [memoryview(bytearray(4))], key=chunks.key)
