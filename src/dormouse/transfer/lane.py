"""One lane of a GPU: what it is asked to do with a parcel, in the order in which it does it.

parcel in pinned memory -> copies over the link: to their places, or to staging -> check -> decode -> copies within
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dormouse.transfer.device_plan import SOURCE_ALIGNMENT, Part, Placed, Tables
from dormouse.transfer.gpus import Check, Decoder, Gpu, Mark
from dormouse.transfer.plan import Copy

if TYPE_CHECKING:
    from dormouse.store.key import Key

_STATUS_PITCH = 4  # words of 32 bits between two: kernels are compiled anew for pointers of another alignment
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class Source(NamedTuple):
    """Where in memory of the host the bytes `begin` to `end` of a parcel are: from `offset` on."""

    begin: int
    end: int
    memory: torch.Tensor
    offset: int


class Kernels:
    """Check and decoder of one GPU, with the tables of a plan and a status word for each parcel. To be made before the
    lanes: these begin when the tables are there. `decodes`: the decoder's table, if it is on the GPU already."""

    def __init__(self, gpu: Gpu, tables: Tables, key: Key | None, parcels: int, decodes: Any = None) -> None:
        import numpy as np

        self._statuses = gpu.words(parcels * _STATUS_PITCH)
        self._check: Check | None = None
        self._decoder: Decoder | None = None
        if tables.checks and key is not None:
            self._check = gpu.check(key)
            self._checks = self._check.prepare(
                np.array(tables.checks, np.int64),
                np.frombuffer(bytearray(b"".join(tables.identities)), np.uint8).reshape(len(tables.checks), -1),
                np.frombuffer(bytearray(b"".join(tables.macs)), np.uint8).reshape(len(tables.checks), -1),
            )
        self.decodes = decodes
        if tables.decodes:
            self._decoder = gpu.decoder()
            if self.decodes is None:
                self.decodes = self._decoder.prepare(np.array(tables.decodes, np.int64))

    def status(self, number: int) -> torch.Tensor:
        """The word in which the device tells of damage in a parcel."""
        return self._statuses[number * _STATUS_PITCH : number * _STATUS_PITCH + 1]

    def damaged(self) -> list[int]:
        """The parcels in which the device found damage. Only when all lanes are through."""
        words = self._statuses[::_STATUS_PITCH].cpu().numpy()
        return [int(number) for number in words.nonzero()[0]]

    def check(self, span: tuple[int, int], memory: torch.Tensor, status: torch.Tensor) -> None:
        """Check rows of the table, whose sources count from the start of `memory`."""
        if span[1] and self._check is not None:
            self._check.check(self._checks, *span, memory, status)

    def decode(self, span: tuple[int, int], staging: torch.Tensor, target: torch.Tensor, status: torch.Tensor) -> None:
        """Decode rows of the table."""
        if span[1] and self._decoder is not None:
            self._decoder.decode(self.decodes, *span, staging, target, status)


class Lane:
    """A stream with staging and scratch memory of its own. Used by one thread."""

    def __init__(self, gpu: Gpu, kernels: Kernels, tables: Tables, destination: torch.Tensor) -> None:
        self._gpu = gpu
        self.kernels = kernels
        self._destination = destination
        self._staging = gpu.memory(_rounded(tables.staging_bytes))
        self._scratch = gpu.memory(_rounded(tables.scratch_bytes))
        self._stream: Any = gpu.stream()

    def issue(self, number: int, part: Part, sources: Sequence[Source]) -> Mark:
        """Ask the device for its part of parcel `number`. Nothing is waited for; the sources are in use until the mark
        is reached, and all is done when the lane is drained."""
        status = self.kernels.status(number)
        with self._gpu.on(self._stream):
            for begin, end in part.staged:
                _send(sources, begin, end, self._staging, begin)
            for run in part.direct:
                _send(sources, run.source, run.source + run.length, self._destination, run.target)
            arrived = self._gpu.mark(self._stream)
            self.kernels.check(part.checks, self._staging, status)
            self.kernels.check(part.placed_checks, self._destination, status)
            self.kernels.decode(part.decodes, self._staging, self._destination, status)
            self.kernels.decode(part.unpacks, self._staging, self._scratch, status)
            for placed in part.copies:
                self._place(placed)
            return arrived

    def drain(self) -> None:
        """Wait until all of it is done."""
        self._gpu.mark(self._stream).wait()

    def _place(self, placed: Placed) -> None:
        memory = self._scratch if placed.in_scratch else self._staging
        copy = placed.copy._replace(source=placed.base + placed.copy.source)
        copy_rows(memory, self._destination, copy)


def _rounded(size: int) -> int:
    return -(-size // SOURCE_ALIGNMENT) * SOURCE_ALIGNMENT


def _send(sources: Sequence[Source], begin: int, end: int, target: torch.Tensor, at: int) -> None:
    """Bytes `begin` to `end` of a parcel, to `at` of `target`."""
    for low, high, found in _within(sources, begin, end):
        target[at + low - begin : at + high - begin].copy_(found, non_blocking=True)


def _within(sources: Sequence[Source], begin: int, end: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    for source in sources:
        low, high = max(begin, source.begin), min(end, source.end)
        if low < high:
            first = source.offset + low - source.begin
            yield low, high, source.memory[first : first + high - low]


def copy_rows(memory: torch.Tensor, destination: torch.Tensor, copy: Copy) -> None:
    """Carry out a copy within one device, in words as wide as its places and lengths allow."""
    if copy.rows == 1:
        destination[copy.target : copy.target + copy.row_bytes].copy_(
            memory[copy.source : copy.source + copy.row_bytes], non_blocking=True
        )
        return
    together = math.gcd(
        copy.row_bytes,
        copy.source_pitch,
        copy.target_pitch,
        copy.source + memory.storage_offset(),
        copy.target + destination.storage_offset(),
        max(_WORDS),
    )
    width = max(width for width in _WORDS if together % width == 0)
    shape = (copy.rows, copy.row_bytes // width)
    source = _strided(memory, width, shape, copy.source, copy.source_pitch)
    _strided(destination, width, shape, copy.target, copy.target_pitch).copy_(source, non_blocking=True)


def _strided(memory: torch.Tensor, width: int, shape: tuple[int, int], offset: int, pitch: int) -> torch.Tensor:
    """Rows in memory, as words. The memory's own offset is a multiple of `width` then, because `offset` and both
    together are."""
    first = memory.storage_offset() + offset
    last = first + (shape[0] - 1) * pitch + shape[1] * width
    whole = memory.as_strided((last - first,), (1,), first)
    return whole.view(_WORDS[width]).as_strided(shape, (pitch // width, 1), first // width)
