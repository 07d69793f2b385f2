"""Ingest: everything submitted is stored, memory is bounded, and one error ends it for all."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from dormouse.errors import StoreError
from dormouse.store.chunk import MAX_CHUNK, Buffer, Digest, digest_of
from dormouse.store.codec import Codec
from dormouse.store.store import Manifest, Store, Transaction
from dormouse.transfer.budget import ByteBudget
from dormouse.transfer.ingest import CHUNK_SIZE, Ingest


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as opened:
        yield opened


def fill(ingest: Ingest, seed: int, length: int) -> tuple[Future[Digest], bytes]:
    """What a producer does: take a buffer, fill a part of it, submit that part."""
    plain = random.Random(seed).randbytes(64) * (length // 64)
    buffer = ingest.acquire()
    assert len(buffer) == CHUNK_SIZE
    buffer[: len(plain)] = plain
    return ingest.submit(buffer[: len(plain)]), plain


def test_many_producers_share_one_ingest_under_one_bound(store: Store) -> None:
    with store.begin() as transaction:
        with Ingest(transaction, threads=3, max_in_flight_bytes=2 * CHUNK_SIZE) as ingest:

            def produce(producer: int) -> list[tuple[Future[Digest], bytes]]:
                return [fill(ingest, producer * 100 + at, CHUNK_SIZE - 64 * at) for at in range(12)]

            with ThreadPoolExecutor(5) as producers:
                made = [pair for pairs in producers.map(produce, range(5)) for pair in pairs]
        assert 0 < ingest.peak_bytes <= 2 * CHUNK_SIZE
        refs = [future.result() for future, _plain in made]
        transaction.commit(Manifest("a", "k", "n", 0.0, b"", refs))
    for digest, (_future, plain) in zip(refs, made, strict=True):
        assert digest == digest_of(plain)
        assert bytes(store.read(digest)) == plain


def test_plain_bytes_of_any_size_may_be_submitted_too(store: Store) -> None:
    with store.begin() as transaction, Ingest(transaction, max_in_flight_bytes=10, codec=Codec.ZSTD) as ingest:
        plains = [b"", b"abc" * 50_000, bytes(5 << 20)]
        assert [ingest.submit(plain).result() for plain in plains] == [digest_of(plain) for plain in plains]


def test_a_buffer_may_have_a_codec_of_its_own(store: Store) -> None:
    plain = b"abc" * 1000
    with store.begin() as transaction:
        with Ingest(transaction, codec=Codec.RAW) as ingest:
            own = ingest.submit(plain, Codec.ZSTD).result()
            usual = ingest.submit(plain[3:]).result()
        transaction.commit(Manifest("a", "test", "m", 0.0, b"", [own, usual]))
    with store.reader() as reader:
        assert [chunk.codec for chunk in reader.locate([own, usual])] == [Codec.ZSTD, Codec.RAW]


def test_buffers_are_used_again(store: Store) -> None:
    with store.begin() as transaction, Ingest(transaction, threads=1) as ingest:
        first = ingest.acquire()
        ingest.release(first[:10])
        assert ingest.acquire().obj is first.obj
        second = ingest.acquire()
        assert second.obj is not first.obj
        ingest.submit(second[:100]).result()
        wait([ingest.submit(b"x")])
        assert ingest.acquire().obj is second.obj


class Gate:
    """A transaction whose `put` waits, then fails or not."""

    def __init__(self, transaction: Transaction, error: Exception | None) -> None:
        self.opened = threading.Event()
        self.entered = threading.Event()
        self._transaction = transaction
        self._error = error

    def put(self, plain: Buffer, *, codec: Codec) -> Digest:
        self.entered.set()
        assert self.opened.wait(30)
        if self._error is not None:
            raise self._error
        return self._transaction.put(plain, codec=codec)


def test_a_producer_waits_while_too_much_is_in_flight(store: Store) -> None:
    with store.begin() as transaction:
        gate = Gate(transaction, None)
        with Ingest(gate, threads=1, max_in_flight_bytes=2000) as ingest:  # type: ignore[arg-type]
            ingest.submit(bytes(1000))
            ingest.submit(bytes(1000))
            third = threading.Thread(target=ingest.submit, args=(bytes(1000),))
            third.start()
            third.join(0.1)
            assert third.is_alive()
            gate.opened.set()
            third.join()


def test_the_first_error_reaches_every_producer_and_the_owner(store: Store) -> None:
    broken = StoreError("the disk is on fire")
    with store.begin() as transaction:
        gate = Gate(transaction, broken)
        caught: list[BaseException] = []

        def produce() -> None:
            try:
                for _ in range(100):
                    ingest.submit(bytes(1000))
            except StoreError as error:
                caught.append(error)

        with pytest.raises(StoreError, match="on fire"), Ingest(gate, threads=1, max_in_flight_bytes=2000) as ingest:  # type: ignore[arg-type]
            producers = [threading.Thread(target=produce) for _ in range(4)]
            for producer in producers:
                producer.start()
            assert gate.entered.wait(30)
            gate.opened.set()
            for producer in producers:
                producer.join()
            assert caught == [broken] * 4
            with pytest.raises(StoreError, match="on fire"):
                ingest.acquire()


def test_the_error_of_a_chunk_nobody_asked_about_is_not_lost(store: Store) -> None:
    with store.begin() as transaction, pytest.raises(StoreError, match="too long"), Ingest(transaction) as ingest:
        ingest.submit(bytes(MAX_CHUNK + 1))


def test_giving_up_leaves_no_thread_and_answers_who_waits(store: Store) -> None:
    before = threading.active_count()
    with store.begin() as transaction:
        gate = Gate(transaction, None)
        with pytest.raises(KeyError), Ingest(gate, threads=1) as ingest:  # type: ignore[arg-type]
            running, queued = ingest.submit(b"one"), ingest.submit(b"two")
            assert gate.entered.wait(30)
            threading.Timer(0.05, gate.opened.set).start()
            raise KeyError
        assert running.result() == digest_of(b"one")
        with pytest.raises(StoreError, match="given up"):
            queued.result()
        with pytest.raises(StoreError):
            ingest.submit(b"three")
    assert threading.active_count() <= before + 1  # the timer may still be ending


def test_a_pipe_that_is_never_filled_holds_up_nobody(store: Store) -> None:
    """Producers who wait for their input with a buffer in hand, more of them than the bound has room for."""
    with store.begin() as transaction, Ingest(transaction, threads=2, max_in_flight_bytes=CHUNK_SIZE) as ingest:
        pipes = [os.pipe() for _ in range(10)]

        def produce(read_end: int) -> Digest:
            buffer = ingest.acquire()
            length = os.readv(read_end, [buffer])
            return ingest.submit(buffer[:length]).result()

        with ThreadPoolExecutor(10) as producers:
            answers = [producers.submit(produce, read_end) for read_end, _write_end in pipes]
            for at in reversed(range(10)):
                os.write(pipes[at][1], bytes([at]))
                assert answers[at].result(30) == digest_of(bytes([at]))
        for pipe in pipes:
            for end in pipe:
                os.close(end)


def test_a_budget_lets_one_oversized_amount_pass_alone() -> None:
    budget = ByteBudget(10)
    budget.take(100)
    assert not budget.try_take(1)
    budget.force(5)
    budget.give(105)
    assert budget.try_take(10)
    assert budget.peak == 105
