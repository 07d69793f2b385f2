"""Codes chunks of floats on a GPU, and does not trust it: what it has coded is decoded there again and compared, byte
by byte, before anybody stores it.

    chunks -> device -> encode_block() -> payloads -> decode() -> compared with the chunks -> payloads to the host
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np
import torch
from triton.errors import TritonError

from dormouse.errors import HostError
from dormouse.store.codec import Codec
from dormouse.transfer.coder import Coded
from dormouse.transfer.float_kernels import FloatDecoder, Payloads, encode_block

log = logging.getLogger(__name__)

_NEEDED = 1 << 30
"""Free memory of the device: a run of chunks, its payloads, what comes back, and counts, with room to spare."""


class GpuCoder:
    """A `Coder` that uses one device."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._decoder = FloatDecoder(self._device)

    @classmethod
    def open(cls) -> Self:
        """The first GPU. Raises HostError when it can't be used."""
        with _translated():
            if not torch.cuda.is_available():
                raise HostError("torch can't use the GPU", remedy="See `dormouse doctor`")
            free, _total = torch.cuda.mem_get_info(0)
            if free < _NEEDED:
                raise HostError(
                    f"the GPU has only {free >> 20} MiB free of the {_NEEDED >> 20} MiB that coding needs",
                    remedy="Free memory of the GPU",
                )
            return cls("cuda:0")

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type

    def code(self, plains: Sequence[memoryview], codec: Codec) -> list[Coded]:
        if any(len(plain) != len(plains[0]) or len(plain) % 16 for plain in plains[:-1]):
            raise ValueError("only the last chunk of a run may have another length, or one that is no multiple of 16")
        length = -(-len(plains[0]) // 16) * 16
        with _translated():
            plain = self._uploaded(plains)
            made = encode_block(plain, codec, length)
            sound = self._come_back(plain, made, codec, length)
            return [_coded(made, at, codec, sound=sound[at]) for at in range(len(plains))]

    def close(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _uploaded(self, plains: Sequence[memoryview]) -> torch.Tensor:
        plain = torch.empty(sum(map(len, plains)), dtype=torch.uint8, device=self._device)
        end = 0
        for chunk in plains:
            plain[end : end + len(chunk)].copy_(torch.frombuffer(chunk, dtype=torch.uint8))
            end += len(chunk)
        return plain

    def _come_back(self, plain: torch.Tensor, made: Payloads, codec: Codec, length: int) -> list[bool]:
        """Whether the payload of each chunk decodes to the chunk. One that does not fit at all spoils all."""
        spans = [(at * length, min(plain.numel(), (at + 1) * length)) for at in range(len(made.places))]
        rows = [
            [codec, place[0], place[1], begin, end - begin]
            for (begin, end), place in zip(spans, made.places, strict=True)
            if place is not None
        ]
        out = torch.bitwise_not(plain)  # so that what is not written can't look right
        status = torch.zeros(1, dtype=torch.int32, device=self._device)
        tasks = self._decoder.prepare(np.array(rows, np.int64))
        self._decoder.decode(tasks, 0, len(rows), made.memory, out, status)
        fits = int(status.item()) == 0
        return [fits and torch.equal(out[begin:end], plain[begin:end]) for begin, end in spans]


def _coded(made: Payloads, at: int, codec: Codec, *, sound: bool) -> Coded:
    place = made.places[at]
    if place is None:
        return Coded(Codec.LZ4, None)  # what the codec itself falls back to
    if not sound:
        log.error("the GPU coded a chunk of weights wrongly; the CPU codes it instead")
        return Coded(codec, None)
    host = np.empty(place[1], np.uint8)
    torch.from_numpy(host).copy_(made.memory[place[0] : sum(place)])
    return Coded(codec, host.data)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Errors of torch and Triton become ours."""
    try:
        yield
    except (RuntimeError, TritonError, OSError, subprocess.SubprocessError) as error:
        if isinstance(error, HostError):
            raise
        raise HostError(
            f"the GPU could not code weights: {(str(error).splitlines() or [type(error).__name__])[0]}",
            remedy="See `dormouse doctor` and `nvidia-smi`",
        ) from error
