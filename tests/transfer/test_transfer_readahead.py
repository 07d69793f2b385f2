"""Read-ahead: every stream yields its chunks in order, whatever the others do, within one bound."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dormouse.errors import DamagedError, DormouseError, StoreError
from dormouse.store.chunk import Digest
from dormouse.store.store import Manifest, Store
from dormouse.transfer.readahead import ReadAhead

SIZE = 50_000
BOUND = 6 * SIZE


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, dict[Digest, bytes]]]:
    """A store with chunks of all kinds: raw, zero, compressed, empty."""
    plains = [random.Random(seed).randbytes(10 + seed * 40) * (SIZE // (10 + seed * 40)) for seed in range(40)]
    plains += [bytes(SIZE), b"", random.Random(99).randbytes(SIZE)]
    with Store.open(tmp_path_factory.mktemp("store")) as store:
        with store.begin() as transaction:
            chunks = {transaction.put(plain): plain for plain in plains}
            transaction.commit(Manifest("a", "k", "n", 0.0, b"", list(chunks)))
        yield store, chunks


def orders(chunks: dict[Digest, bytes], count: int) -> list[list[Digest]]:
    return [random.Random(seed).choices(list(chunks), k=60) for seed in range(count)]


def test_streams_side_by_side_yield_their_chunks_in_order_within_the_bound(
    filled: tuple[Store, dict[Digest, bytes]],
) -> None:
    store, chunks = filled
    with ReadAhead(store, threads=3, max_in_flight_bytes=BOUND) as ahead:

        def consume(wanted: list[Digest]) -> None:
            assert [bytes(plain) for plain in ahead.stream(wanted)] == [chunks[digest] for digest in wanted]

        with ThreadPoolExecutor(6) as consumers:
            list(consumers.map(consume, orders(chunks, 6)))
        # Each of the streams may hold its next chunk beyond the bound.
        assert SIZE < ahead.peak_bytes <= BOUND + 6 * SIZE


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 3), max_size=300), st.integers(1, 4), st.integers(1, 3 * SIZE))
def test_one_thread_may_consume_streams_in_any_order(
    filled: tuple[Store, dict[Digest, bytes]], turns: list[int], threads: int, bound: int
) -> None:
    store, chunks = filled
    wanted = orders(chunks, 4)
    with ReadAhead(store, threads=threads, max_in_flight_bytes=bound) as ahead:
        streams = [ahead.stream(digests) for digests in wanted]
        rest = [iter(digests) for digests in wanted]
        for turn in turns:
            plain = next(streams[turn], None)
            digest = next(rest[turn], None)
            assert (plain is None) == (digest is None)
            assert plain is None or digest is None or bytes(plain) == chunks[digest]
        for stream in streams:
            stream.close()


def test_what_was_yielded_stays_as_it_is(filled: tuple[Store, dict[Digest, bytes]]) -> None:
    store, chunks = filled
    with ReadAhead(store, threads=2) as ahead:
        plains = list(ahead.stream(list(chunks)))
    assert [bytes(plain) for plain in plains] == list(chunks.values())


def test_zeros_are_one_shared_read_only_buffer(filled: tuple[Store, dict[Digest, bytes]]) -> None:
    store, chunks = filled
    zero = next(digest for digest, plain in chunks.items() if plain == bytes(SIZE))
    with ReadAhead(store) as ahead:
        first, second = (memoryview(plain) for plain in ahead.stream([zero, zero]))
    assert first.obj is second.obj
    assert first.readonly


def test_closing_a_stream_early_gives_back_what_it_held(filled: tuple[Store, dict[Digest, bytes]]) -> None:
    store, chunks = filled
    with ReadAhead(store, threads=1, max_in_flight_bytes=BOUND) as ahead:
        for digests in orders(chunks, 20):
            stream = ahead.stream(digests)
            next(stream)
            stream.close()
        assert ahead.peak_bytes <= BOUND + SIZE
        (digests,) = orders(chunks, 1)
        assert len(list(ahead.stream(digests))) == len(digests)


def test_closing_the_read_ahead_ends_a_stream_with_an_error_not_a_hang(
    filled: tuple[Store, dict[Digest, bytes]],
) -> None:
    store, chunks = filled
    (digests,) = orders(chunks, 1)
    ahead = ReadAhead(store, threads=1, max_in_flight_bytes=BOUND)
    stream = ahead.stream(digests)
    next(stream)
    ahead.close()
    ahead.close()
    with pytest.raises(StoreError, match="closed"):
        list(stream)
    with pytest.raises(DormouseError, match="closed"):
        list(ahead.stream(digests))


def test_damage_surfaces_at_its_place_and_names_the_chunk(tmp_path: Path) -> None:
    plains = [random.Random(seed).randbytes(10_000) for seed in range(10)]
    with Store.open(tmp_path) as store:
        with store.begin() as transaction:
            refs = [transaction.put(plain) for plain in plains]
            transaction.commit(Manifest("a", "k", "n", 0.0, b"", refs))
        (pack,) = tmp_path.rglob("*.pack")
        data = bytearray(pack.read_bytes())
        data[store.locate(refs)[6].offset + 5000] ^= 1
        pack.write_bytes(data)
        with ReadAhead(store, threads=2) as ahead:
            got: list[bytes] = []
            with pytest.raises(DamagedError, match=f"{refs[6].hex()}.*{pack.name}"):
                got.extend(bytes(plain) for plain in ahead.stream(refs))
            assert got == plains[:6]
            assert [bytes(plain) for plain in ahead.stream(refs[:6])] == plains[:6]
            with pytest.raises(DamagedError, match="no pack"):
                next(ahead.stream([Digest(bytes(32))]))


def test_garbage_collection_waits_until_a_restore_has_ended(tmp_path: Path) -> None:
    plains = [random.Random(seed).randbytes(10_000) for seed in range(50)]
    with Store.open(tmp_path) as store:
        with store.begin() as transaction:
            refs = [transaction.put(plain) for plain in plains]
            transaction.commit(Manifest("a", "k", "n", 0.0, b"", refs))
        with ReadAhead(store, threads=2, max_in_flight_bytes=40_000) as ahead:
            stream = ahead.stream(refs)
            got = [bytes(next(stream))]
            store.remove("a")
            collector = threading.Thread(target=store.collect_garbage)
            collector.start()
            got.extend(bytes(plain) for plain in stream)
            assert got == plains
            assert [bytes(plain) for plain in ahead.stream(refs)] == plains
        collector.join()
        assert not list(tmp_path.rglob("*.pack"))
