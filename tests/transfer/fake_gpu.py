"""A GPU made of CPU tensors. What is asked of a stream happens at once, or later and only when somebody waits: as late
as CUDA may do it, so that memory that is used again too early shows as wrong bytes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from dormouse.errors import DamagedError, HostError
from dormouse.store.codec import decode
from dormouse.store.key import Key


class FakePinner:
    """Counts what is pinned."""

    def __init__(self, *, fails: bool = False) -> None:
        self.pinned: dict[int, int] = {}
        self.fails = fails

    def pin(self, address: int, size: int) -> None:
        if self.fails:
            raise HostError("pinning failed: CUDA error 2")
        self.pinned[address] = size

    def unpin(self, address: int) -> None:
        del self.pinned[address]


_copy = torch.Tensor.copy_
_turn = threading.RLock()
"""One thread at a time asks a GPU for something, or has it done."""


class FakeStream:
    """Work that waits to be done."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []

    def finish(self, count: int) -> None:
        with _turn:
            for number in range(count):
                job, self.work[number] = self.work[number], lambda: None
                job()


class FakeMark:
    def __init__(self, stream: FakeStream) -> None:
        self._stream, self._count = stream, len(stream.work)

    def wait(self) -> None:
        self._stream.finish(self._count)


class FakeGpu:
    """`memory_limit`: bytes that may be allocated. `fail_at`: number of the copy that fails; `dies`: after that nothing
    works any more, as with CUDA."""

    def __init__(
        self, *, late: bool = False, memory_limit: int = 1 << 40, fail_at: int = -1, dies: bool = False
    ) -> None:
        self.late = late
        self.dies = dies
        self.left = memory_limit
        self.copies = 0
        self.fail_at = fail_at
        self.streams: list[FakeStream] = []
        self.current: FakeStream | None = None

    def memory(self, size: int) -> torch.Tensor:
        self.left -= size
        if self.left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return torch.full((size,), 0xAB, dtype=torch.uint8)

    def words(self, count: int) -> torch.Tensor:
        return self.memory(count * 4).zero_().view(torch.int32)

    def stream(self) -> FakeStream:
        self.streams.append(FakeStream())
        return self.streams[-1]

    @contextlib.contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        """Copies and kernels within are put into the stream."""
        gpu, mine = self, threading.get_ident()

        def later(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            if threading.get_ident() != mine:
                return _copy(target, source)  # of another thread, which has nothing to do with this GPU now
            assert non_blocking
            gpu.copies += 1
            if gpu.copies == gpu.fail_at:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            gpu.do(lambda: _copy(target, source))
            return target

        with _turn:
            assert self.current is None
            self.current = stream
            torch.Tensor.copy_ = later  # type: ignore[method-assign,assignment]
            try:
                yield
            finally:
                torch.Tensor.copy_ = _copy  # type: ignore[method-assign]
                self.current = None

    def after(self, stream: FakeStream, mark: FakeMark) -> None:
        with _turn:
            stream.work.append(mark.wait)

    def do(self, job: Callable[[], object]) -> None:
        assert self.current is not None, "kernels run on lanes"
        if self.late:
            self.current.work.append(job)
        else:
            job()

    def mark(self, stream: FakeStream) -> FakeMark:
        if self.dies and self.copies >= self.fail_at:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return FakeMark(stream)

    def decoder(self) -> FakeDecoder:
        return FakeDecoder(self)

    def check(self, key: Key) -> FakeCheck:
        return FakeCheck(self, key)


class InterpretedGpu(FakeGpu):
    """With the real kernels, as Triton's interpreter runs them; all at once."""

    @contextlib.contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        yield

    def decoder(self) -> Any:
        from dormouse.transfer.float_kernels import FloatDecoder

        return FloatDecoder("cpu")

    def check(self, key: Key) -> Any:
        from dormouse.transfer.blake3_kernel import SignatureCheck

        return SignatureCheck("cpu", key.chunks.secret)


class FakeDecoder:
    """The reference decoder behind the kernels' interface."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu

    def prepare(self, rows: Any) -> Any:
        assert (rows[:, 1] % 16 == 0).all()
        return rows

    def decode(
        self,
        tasks: Any,
        first: int,
        count: int,
        staging: torch.Tensor,
        destination: torch.Tensor,
        status: torch.Tensor,
    ) -> None:
        for row in tasks[first : first + count].tolist():
            self._gpu.do(lambda row=row: self._decode(row, staging, destination, status))  # type: ignore[misc]

    @staticmethod
    def _decode(row: list[int], staging: torch.Tensor, destination: torch.Tensor, status: torch.Tensor) -> None:
        codec, source, stored_length, target, plain_length = row
        try:
            plain = decode(codec, staging[source : source + stored_length].numpy().tobytes(), plain_length)
        except DamagedError:
            status.fill_(1)
            return
        destination[target : target + plain_length].numpy()[:] = np.frombuffer(plain, np.uint8)


class FakeCheck:
    """The reference signature behind the kernels' interface."""

    def __init__(self, gpu: FakeGpu, key: Key) -> None:
        self._gpu = gpu
        self._key = key

    def prepare(self, rows: Any, identities: Any, macs: Any) -> Any:
        assert (rows[:, 0] % 16 == 0).all()
        return [
            (source, length, identity.tobytes(), mac.tobytes())
            for (source, length), identity, mac in zip(rows.tolist(), identities, macs, strict=True)
        ]

    def check(self, tasks: Any, first: int, count: int, staging: torch.Tensor, status: torch.Tensor) -> None:
        for task in tasks[first : first + count]:
            self._gpu.do(lambda task=task: self._check(task, staging, status))  # type: ignore[misc]

    def _check(self, task: tuple[int, int, bytes, bytes], staging: torch.Tensor, status: torch.Tensor) -> None:
        source, length, identity, mac = task
        stored = staging[source : source + length].numpy().tobytes()
        if self._key.chunks.mac(len(mac), stored, identity) != mac:
            status.fill_(1)
