"""The chunks of a checkpoint on their way to the store: what floats a device codes goes there in runs, all else to the
threads of the ingest at once.

    add(chunk, codec) --floats, if there is a coder--> a run --full, or the codec changes--> coder's thread --> ingest
                      --all else-----------------------------------------------------------------------------> ingest

One run is coded while the next is filled, never more; and the ingest takes no more than its budget. So what is in
memory is bounded however fast the source is. A device that fails costs its run nothing but time: from then on the CPU
codes, and the log tells so.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from dormouse.errors import HostError
from dormouse.store.chunk import Digest
from dormouse.store.codec import FLOATS, Codec
from dormouse.transfer.coder import Coded, Coder
from dormouse.transfer.ingest import Ingest

log = logging.getLogger(__name__)

RUN_BYTES = 128 << 20
"""Of chunks that a device codes at once: enough to keep it busy, little beside its memory and the host's."""


class Coding:
    """A context manager: `add` all chunks in order, then take `digests`. Raises the first error of any chunk."""

    def __init__(self, ingest: Ingest, coder: Coder | None, *, run_bytes: int = RUN_BYTES) -> None:
        self._ingest = ingest
        self._coder = coder
        self._run_bytes = run_bytes
        self._run: list[memoryview] = []
        self._run_codec = Codec.RAW
        self._stored: list[Future[list[Future[Digest]]]] = []
        self._sent: Future[list[Future[Digest]]] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="code")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=error is not None)
        if self._coder is not None:
            self._coder.close()

    def add(self, plain: memoryview, codec: Codec) -> None:
        """The next chunk, which now belongs to the coding."""
        coded_here = self._coder is not None and codec in FLOATS
        if self._run and not (coded_here and self._fits(plain, codec)):
            self._send()
        if coded_here:
            self._run.append(plain)
            self._run_codec = codec
        else:
            self._put(plain, codec)

    def digests(self) -> list[Digest]:
        """The names of all chunks in their order, when all are stored."""
        if self._run:
            self._send()
        return [digest.result() for run in self._stored for digest in run.result()]

    def _fits(self, plain: memoryview, codec: Codec) -> bool:
        full = sum(map(len, self._run)) + len(plain) > self._run_bytes
        return not full and codec is self._run_codec and len(self._run[-1]) == len(self._run[0]) >= len(plain)

    def _put(self, plain: memoryview, codec: Codec) -> None:
        done: Future[list[Future[Digest]]] = Future()
        done.set_result([self._ingest.submit(plain, codec)])
        self._stored.append(done)

    def _send(self) -> None:
        """Give the run to the coder's thread, which must be done with the one before."""
        if self._sent is not None:
            self._sent.result()
        run, self._run = self._run, []
        self._sent = self._pool.submit(self._code, run, self._run_codec)
        self._stored.append(self._sent)

    def _code(self, run: list[memoryview], codec: Codec) -> list[Future[Digest]]:
        coded = self._coded(run, codec)
        return [self._ingest.submit(plain, how.codec, how.payload) for plain, how in zip(run, coded, strict=True)]

    def _coded(self, run: list[memoryview], codec: Codec) -> list[Coded]:
        if self._coder is not None:
            try:
                return self._coder.code(run, codec)
            except HostError as error:
                log.warning("from here on the CPU codes the weights: %s", error)
                self._coder = None
        return [Coded(codec, None)] * len(run)
