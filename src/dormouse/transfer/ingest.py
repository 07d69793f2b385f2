"""Ingest: plain buffers from many producers are hashed, coded and stored by a pool of threads.

    producer: acquire() -> fill -> submit(view) -> Future[Digest]      pool: transaction.put, buffer back to the pool
    producer: run(job) -> Future                                       pool: job(buffer, put), buffer back to the pool

`submit` blocks while too many bytes are in flight, `run` while too many jobs wait, so a fast producer is slowed to the
speed of the pool. (A job that waits has no buffer; each thread has one.) Nothing else blocks a producer: each may hold
one buffer of its own beside the bound, whatever the others do, hence producers that depend on each other (CRIU fills
many pipes, in its own order) can't lock up. The first error ends the whole ingest and is raised to every producer.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

from dormouse.errors import StoreError
from dormouse.store.chunk import Buffer, Digest
from dormouse.store.codec import Codec
from dormouse.store.store import Transaction
from dormouse.transfer.budget import IN_FLIGHT_BYTES, ByteBudget, default_threads
from dormouse.transfer.memory import advise_huge

CHUNK_SIZE = 1 << 20

LARGE = 2 << 20
"""What is at least as long, the ingest's `choose` may store in another way."""

Choose = Callable[[memoryview], Codec]
_JOBS_PER_THREAD = 4
Result = TypeVar("Result")


class _PooledBuffer(mmap.mmap):
    """Marks memory that goes back to the pool. Mapped, not allocated: pages nobody fills take no memory."""


class Putter:
    """Stores chunks for a job, which has hashed them. `known` tells which are stored already."""

    def __init__(self, transaction: Transaction, codec: Codec, choose: Choose | None) -> None:
        self._transaction = transaction
        self._codec = codec
        self._choose = choose

    def __call__(self, chunks: Sequence[tuple[Digest, Buffer]]) -> None:
        for digest, plain in chunks:
            self._transaction.put(plain, codec=self._codec_for(plain), digest=digest)

    def known(self, chunks: Sequence[tuple[Digest, Buffer]]) -> list[bool]:
        return self._transaction.has([(digest, len(plain)) for digest, plain in chunks])

    def _codec_for(self, plain: Buffer) -> Codec | Choose:
        return self._choose if self._choose is not None and len(plain) >= LARGE else self._codec


class Ingest:
    """Feeds one transaction. A context manager: a clean exit waits for everything submitted and raises the first
    error; leaving with an exception drops what has not begun. Either way no thread of the pool is left."""

    def __init__(
        self,
        transaction: Transaction,
        *,
        threads: int | None = None,
        max_in_flight_bytes: int | None = None,
        codec: Codec = Codec.LZ4,
        choose: Choose | None = None,
    ) -> None:
        """`choose` is asked for the codec of large buffers that jobs put."""
        self._transaction = transaction
        self._codec = codec
        threads = threads or default_threads()
        # A few chunks keep each thread busy; more would only touch more memory.
        self._budget = ByteBudget(max_in_flight_bytes or min(IN_FLIGHT_BYTES, threads * 8 * CHUNK_SIZE))
        self._jobs = ByteBudget(threads * _JOBS_PER_THREAD)  # counts jobs
        self._putter = Putter(transaction, codec, choose)
        self._free: dict[int, list[_PooledBuffer]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ingest")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._fail(StoreError("the ingest was given up"))
        self._pool.shutdown(wait=True)
        self._free.clear()
        if error is None:
            self._budget.check()
        self._fail(StoreError("the ingest has ended"))

    def _fail(self, error: BaseException) -> None:
        self._budget.fail(error)
        self._jobs.fail(error)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were ever in flight at once."""
        return self._budget.peak

    def acquire(self, size: int = CHUNK_SIZE) -> memoryview:
        """A buffer of so many bytes with any content, to fill and then `submit` (all or a part) or `release`.
        Raises the first error of any producer's chunk."""
        self._budget.check()
        with self._lock:
            free = self._free.get(size)
            buffer = free.pop() if free else None
        return memoryview(buffer if buffer is not None else _new_buffer(size))

    def release(self, buffer: Buffer) -> None:
        """Give back a buffer from `acquire` that is not submitted."""
        owner = buffer.obj if isinstance(buffer, memoryview) else None
        if isinstance(owner, _PooledBuffer):
            with self._lock:
                free = self._free.setdefault(len(owner), [])
                if len(owner) > CHUNK_SIZE or len(free) * CHUNK_SIZE < self._budget.limit:  # large: one per thread
                    free.append(owner)

    def submit(self, plain: Buffer, codec: Codec | None = None, payload: Buffer | None = None) -> Future[Digest]:
        """Store a buffer, which now belongs to the ingest until the future is done, with the codec given here or to
        the ingest, and with a payload that has been coded already (see `Transaction.put`). Blocks while too many bytes
        are in flight. Raises the first error of any producer's chunk."""
        self._budget.take(len(plain))
        return self._pool.submit(self._put, plain, self._codec if codec is None else codec, payload)

    def run(self, job: Callable[[memoryview, Putter], Result], size: int = CHUNK_SIZE) -> Future[Result]:
        """Have a pool thread run `job` with a buffer of `size` bytes to fill as it likes, and what stores a buffer.
        Blocks while too many jobs wait. Raises the first error of any producer's chunk."""
        self._jobs.take(1)
        return self._pool.submit(self._run, job, size)

    def _run(self, job: Callable[[memoryview, Putter], Result], size: int) -> Result:
        try:
            buffer = self.acquire(size)
            try:
                return job(buffer, self._putter)
            finally:
                self.release(buffer)
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._jobs.give(1)

    def _put(self, plain: Buffer, codec: Codec, payload: Buffer | None) -> Digest:
        length = len(plain)
        try:
            self._budget.check()
            return self._transaction.put(plain, codec=codec, payload=payload)
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self.release(plain)
            self._budget.give(length)


def _new_buffer(size: int) -> _PooledBuffer:
    buffer = _PooledBuffer(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= LARGE:
        advise_huge(buffer)
    return buffer
