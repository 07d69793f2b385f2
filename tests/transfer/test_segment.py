"""Segments filled from chunks: every byte in its place, or an error that says why not and nothing left."""

from __future__ import annotations

import os
import random
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dormouse.errors import DamagedError, DormouseError, EngineError, HostError, StoreError
from dormouse.store.chunk import Digest
from dormouse.store.codec import Codec
from dormouse.store.store import Manifest, Store
from dormouse.transfer.handles import SegmentInfo, adopt, await_report, send_report
from dormouse.transfer.segment import Segment, fill


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as store:
        yield store


def put(store: Store, chunks: list[bytes], codec: Codec = Codec.LZ4, name: str = "m") -> list[Digest]:
    with store.begin() as transaction:
        refs = [transaction.put(chunk, codec=codec) for chunk in chunks]
        transaction.commit(Manifest(f"{name}{len(store.manifests())}", "test", name, 0.0, b"", refs))
    return refs


def content(segment: Segment) -> bytes:
    handle = segment.handle(None)
    data = os.pread(handle.memory, segment.size, 0)
    handle.close()
    return data


def filled(store: Store, refs: list[Digest], size: int, threads: int | None = None) -> bytes:
    segment = Segment.create("test", size)
    try:
        fill(segment, store, refs, cancelled=threading.Event(), threads=threads)
        return content(segment)
    finally:
        segment.close()


piece = st.one_of(
    st.binary(min_size=1, max_size=5000),
    st.integers(1, 5000).map(bytes),
    st.integers(1, 5000).map(lambda n: b"text " * n),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunks=st.lists(piece, min_size=1, max_size=20), codec=st.sampled_from(Codec), threads=st.integers(1, 8))
def test_every_chunk_lands_in_its_place(store: Store, chunks: list[bytes], codec: Codec, threads: int) -> None:
    whole = b"".join(chunks)
    assert filled(store, put(store, chunks, codec), len(whole), threads) == whole


def test_zeros_take_no_memory(store: Store) -> None:
    refs = put(store, [bytes(4 << 20), b"x" * 4096])
    segment = Segment.create("test", (4 << 20) + 4096)
    fill(segment, store, refs, cancelled=threading.Event())
    handle = segment.handle(None)
    assert os.fstat(handle.memory).st_blocks * 512 <= 4096
    handle.close()
    segment.close()


def test_a_filled_segment_can_not_be_changed_by_anybody(store: Store) -> None:
    segment = Segment.create("test", 3)
    fill(segment, store, put(store, [b"abc"]), cancelled=threading.Event())
    handle = segment.handle(None)
    with pytest.raises(OSError):
        os.pwrite(handle.memory, b"x", 0)
    writable = os.open(f"/proc/self/fd/{handle.memory}", os.O_RDWR)
    for change in (lambda: os.pwrite(writable, b"x", 0), lambda: os.ftruncate(writable, 0)):
        with pytest.raises(PermissionError):
            change()
    os.close(writable)
    handle.close()
    assert content(segment) == b"abc"
    segment.close()


def test_a_flipped_bit_is_named_and_nothing_is_left(store: Store, tmp_path: Path) -> None:
    chunks = [random.Random(n).randbytes(100_000) for n in range(20)]
    refs = put(store, chunks)
    (pack,) = (tmp_path / "store" / "packs").glob("*.pack")
    with pack.open("r+b") as file:
        at = pack.read_bytes().index(chunks[13])
        file.seek(at + 7)
        file.write(bytes([chunks[13][7] ^ 1]))
    threads = threading.active_count()
    with pytest.raises(DamagedError, match=f"chunk {refs[13].hex()} .* is damaged"):
        filled(store, refs, 2_000_000)
    assert threading.active_count() == threads
    store.collect_garbage(wait=1)  # no reader is left open


def test_a_missing_chunk_and_a_wrong_size_are_errors(store: Store) -> None:
    refs = put(store, [b"abc", b"def"])
    with pytest.raises(DamagedError, match="is in no pack"):
        filled(store, [*refs, Digest(bytes(32))], 6)
    for size in (5, 7):
        with pytest.raises(DamagedError, match=f"have 6 bytes where {size} were stored"):
            filled(store, refs, size)


def test_a_cancelled_fill_ends(store: Store) -> None:
    cancelled = threading.Event()
    cancelled.set()
    segment = Segment.create("test", 3)
    with pytest.raises(StoreError, match="not needed any more"):
        fill(segment, store, put(store, [b"abc"]), cancelled=cancelled)
    segment.close()


def test_a_segment_that_can_not_be_is_a_sentence() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(HostError, match="of 4096 bytes can't be made: Too many open files"):
            Segment.create("test", 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize(
    "error",
    [
        DamagedError("broken", remedy="Mend it"),
        HostError("no memory"),
        EngineError("x" * 10_000, remedy="y" * 10_000),
    ],
)
def test_reports_keep_class_and_words(error: DormouseError) -> None:
    reading, writing = os.pipe()
    send_report(writing, error)
    with pytest.raises(type(error)) as caught:
        await_report(reading)
    os.close(reading)
    assert error.message.startswith(caught.value.message) and caught.value.message
    assert error.remedy.startswith(caught.value.remedy)


@given(data=st.binary(min_size=1, max_size=64))
def test_a_report_of_any_bytes_is_an_error_or_a_success(data: bytes) -> None:
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    try:
        await_report(reading)
    except DormouseError:
        pass
    finally:
        os.close(reading)


def test_a_report_to_nobody_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    send_report(writing, None)


def test_announcements_without_their_descriptors_are_refused_and_leak_nothing() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for infos, count in (
        ([SegmentInfo("memfd", 1, False)], 0),
        ([SegmentInfo("memfd", 1, True)], 1),
        ([SegmentInfo("memfd", 1, False), SegmentInfo("memfd", 1, True)], 2),
    ):
        with pytest.raises(EngineError, match="announced without"):
            adopt(infos, iter([os.dup(0) for _ in range(count)]))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
