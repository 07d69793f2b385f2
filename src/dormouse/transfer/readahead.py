"""Read-ahead: chunks are read, checked and decoded by a pool of threads before their consumers ask for them.

    stream(digests): locate all -> pool: read, verify, decode -> plain chunks, in order, to one consumer

Any number of streams run at once under one bound of bytes, consumed at any pace and in any order. They can't lock up:
the chunk a consumer waits for is always read, bound or no bound; only reading beyond it needs room. One stream takes at
most a quarter of the bound, so that a consumer who pauses does not starve the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Self

from dormouse.errors import StoreError
from dormouse.store.chunk import Buffer, Digest
from dormouse.store.codec import Codec
from dormouse.store.store import Store, StoredChunk
from dormouse.transfer.budget import IN_FLIGHT_BYTES, ByteBudget, default_threads

_SHARE_OF_A_STREAM = 4
_LEAST_COST = 4096


class ReadAhead:
    """Reads one store. A context manager; while it is open, no chunk is deleted. Close its streams before it."""

    def __init__(self, store: Store, *, threads: int | None = None, max_in_flight_bytes: int = IN_FLIGHT_BYTES) -> None:
        self.reader = store.reader()
        self._budget = ByteBudget(max_in_flight_bytes)
        # One more than there are CPUs, because some thread is often waiting for the disk.
        self._pool = ThreadPoolExecutor(threads or default_threads() + 1, thread_name_prefix="readahead")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading; a stream still being consumed ends with StoreError. Idempotent."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.reader.close()

    @property
    def peak_bytes(self) -> int:
        """The most plain bytes that were ever in flight at once."""
        return self._budget.peak

    def stream(self, digests: Sequence[Digest]) -> Generator[Buffer, None, None]:
        """The plain chunks in order. Each stays valid as long as it is referred to, but counts as in flight only until
        the next is asked for. Closing the generator early drops what was read ahead.

        Raises DamagedError at the chunk that is damaged; chunks before it have been yielded.
        """
        window = _Window(self.reader.locate(digests), self._budget, self._schedule)
        try:
            while window.fill():
                yield window.head()
                window.drop_head()
        finally:
            window.close()

    def _schedule(self, chunk: StoredChunk) -> Future[Buffer]:
        try:
            return self._pool.submit(self.reader.plain, chunk)
        except RuntimeError as error:  # the pool takes no more work
            raise _closed() from error


class _Window:
    """The part of one stream that is being read ahead. Used by its consumer's thread alone."""

    def __init__(
        self, chunks: Iterable[StoredChunk], budget: ByteBudget, schedule: Callable[[StoredChunk], Future[Buffer]]
    ) -> None:
        self._waiting = deque(chunks)
        self._ahead: deque[tuple[Future[Buffer], int]] = deque()
        self._held = 0
        self._budget = budget
        self._schedule = schedule

    def fill(self) -> bool:
        """Have as much read ahead as there is room for, but always one; False when the stream is through."""
        while self._waiting and self._take(_cost(self._waiting[0])):
            chunk = self._waiting.popleft()
            self._ahead.append((self._schedule(chunk), _cost(chunk)))
        return bool(self._ahead)

    def head(self) -> Buffer:
        """The next chunk. Blocks until it is read; raises what reading it raised."""
        try:
            return self._ahead[0][0].result()
        except CancelledError as error:
            raise _closed() from error

    def drop_head(self) -> None:
        """The consumer is through with the chunk."""
        _future, cost = self._ahead.popleft()
        self._held -= cost
        self._budget.give(cost)

    def close(self) -> None:
        """Drop everything; what is being read just now is counted until it is read."""
        for future, cost in self._ahead:
            future.add_done_callback(lambda _future, cost=cost: self._budget.give(cost))  # type: ignore[misc]
            future.cancel()
        self._ahead.clear()

    def _take(self, cost: int) -> bool:
        if not self._ahead:
            self._budget.force(cost)
        elif self._held + cost > self._budget.limit // _SHARE_OF_A_STREAM or not self._budget.try_take(cost):
            return False
        self._held += cost
        return True


def _cost(chunk: StoredChunk) -> int:
    """Plain bytes; zeros are shared, but a place in the queue costs something too, so that it stays short."""
    return max(_LEAST_COST, 0 if chunk.codec == Codec.ZERO else chunk.plain_length)


def _closed() -> StoreError:
    return StoreError("the read-ahead was closed before its stream was through")
