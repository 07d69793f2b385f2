"""What a load asks of a GPU, and CUDA's answers. The one place of a load that calls CUDA; tests put another in its
place.

A lane is a stream of a GPU with memory of its own: what is given to it happens in order, what is given to two lanes may
happen at once. So while one lane decodes, the link fills the staging memory of the next, and nobody waits in Python.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dormouse.errors import DormouseError, HostError

if TYPE_CHECKING:
    from dormouse.store.key import Key

log = logging.getLogger(__name__)


class Mark(Protocol):
    """A point in the work of a lane."""

    def wait(self) -> None:
        """Until the lane has come there."""


class Decoder(Protocol):
    """`float_kernels.FloatDecoder`."""

    def prepare(self, rows: Any) -> Any: ...

    def decode(
        self,
        tasks: Any,
        first: int,
        count: int,
        staging: torch.Tensor,
        destination: torch.Tensor,
        status: torch.Tensor,
    ) -> None: ...


class Check(Protocol):
    """`blake3_kernel.SignatureCheck`."""

    def prepare(self, rows: Any, identities: Any, macs: Any) -> Any: ...

    def check(self, tasks: Any, first: int, count: int, staging: torch.Tensor, status: torch.Tensor) -> None: ...


class Gpu(Protocol):
    """One device of a load. Everything is called by one thread, but `Mark.wait`."""

    def memory(self, size: int) -> torch.Tensor:
        """New bytes, of any content."""

    def words(self, count: int) -> torch.Tensor:
        """New words of 32 bits, all zero."""

    def stream(self) -> Any:
        """A new one; it begins after all that the caller has asked of the device so far."""

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """What is asked of the device within goes to this stream."""

    def mark(self, stream: Any) -> Mark:
        """Where this stream is now."""

    def after(self, stream: Any, mark: Any) -> None:
        """What is asked of the stream from now on is done after a mark of this device."""

    def decoder(self) -> Decoder:
        """Decodes float chunks there."""

    def check(self, key: Key) -> Check:
        """Checks signatures there."""


class _CudaMark:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        with translated():
            self.event.synchronize()  # lets go of the interpreter's lock, and sleeps


class Cuda:
    """A GPU through torch. Raises torch's errors, which `translated` turns into ours."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def words(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self._device)

    def stream(self) -> torch.cuda.Stream:
        stream: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        return stream

    def on(self, stream: torch.cuda.Stream) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(stream)  # makes the stream's device the current one, too

    def mark(self, stream: torch.cuda.Stream) -> Mark:
        event: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return _CudaMark(event)

    def after(self, stream: torch.cuda.Stream, mark: _CudaMark) -> None:
        stream.wait_event(mark.event)

    def decoder(self) -> Decoder:
        from dormouse.transfer.float_kernels import FloatDecoder

        return FloatDecoder(self._device)

    def check(self, key: Key) -> Check:
        from dormouse.transfer.blake3_kernel import SignatureCheck

        return SignatureCheck(self._device, key.chunks.secret)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Torch's errors about a GPU become ours."""
    try:
        yield
    except DormouseError:
        raise
    except torch.OutOfMemoryError as error:
        raise HostError(
            f"the GPU has no memory for the load: {first_line(error)}",
            remedy="Free memory of the GPU, or load less onto it",
        ) from error
    except RuntimeError as error:
        raise HostError(
            f"the GPU failed during the load: {first_line(error)}",
            remedy="See `dormouse doctor` and `nvidia-smi`; a process whose GPU has failed must be started anew",
        ) from error


def first_line(error: BaseException) -> str:
    """Torch's errors go on with advice for its developers."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@cache
def have_kernels() -> bool:
    """Whether GPUs of this machine check and decode chunks themselves. Told once in the log if they don't."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        log.warning("Triton is not installed: chunks for GPUs are checked and decoded by the CPU, which is slower")
    return found
