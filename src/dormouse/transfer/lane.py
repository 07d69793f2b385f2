"""One lane of a GPU: what it is asked to do with a parcel, in the order in which it does it.

pinned memory -> take: copies over the link, to their places or to staging -> finish: check -> decode -> copies within

The copies may be asked for by several threads on streams of their own. They wait, on the GPU, until the lane's memory
is free of the parcel before; what follows them waits for all of them. Nobody waits on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
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
    """Staging and scratch memory, and a stream for what is done in them. One thread asks it to finish, any to take."""

    def __init__(
        self, gpu: Gpu, kernels: Kernels, destination: torch.Tensor, *, staging_bytes: int, scratch_bytes: int
    ) -> None:
        self._gpu = gpu
        self.kernels = kernels
        self._destination = destination
        self._staging = gpu.memory(_rounded(staging_bytes))
        self._scratch = gpu.memory(_rounded(scratch_bytes))
        self.stream: Any = gpu.stream()
        self._free: Mark | None = None

    def take(self, part: Part, source: Source, stream: Any) -> Mark:
        """Ask for the copies of what `source` has of a parcel, on `stream`. At the mark, the source is free again."""
        if self._free is not None:
            self._gpu.after(stream, self._free)
        with self._gpu.on(stream):
            for begin, end in part.staged:
                _send(source, begin, end, self._staging, begin)
            for run in part.direct:
                _send(source, run.source, run.source + run.length, self._destination, run.target)
            return self._gpu.mark(stream)

    def fetch(self, part: Part, source: Source) -> Mark:
        """The same on the lane's own stream, where nothing has to be waited for."""
        return self.take(part, source, self.stream)

    def finish(self, number: int, part: Part, taken: Iterable[Mark]) -> Mark:
        """When all of parcel `number` has been `taken`, ask for the rest. At the mark, the lane is free again."""
        status = self.kernels.status(number)
        for mark in taken:
            self._gpu.after(self.stream, mark)
        with self._gpu.on(self.stream):
            self.kernels.check(part.checks, self._staging, status)
            self.kernels.check(part.placed_checks, self._destination, status)
            self.kernels.decode(part.decodes, self._staging, self._destination, status)
            self.kernels.decode(part.unpacks, self._staging, self._scratch, status)
            for placed in part.copies:
                self._place(placed)
            self._free = self._gpu.mark(self.stream)
        return self._free

    def drain(self) -> None:
        """Wait until all of it is done."""
        self._gpu.mark(self.stream).wait()

    def _place(self, placed: Placed) -> None:
        memory = self._scratch if placed.in_scratch else self._staging
        copy = placed.copy._replace(source=placed.base + placed.copy.source)
        copy_rows(memory, self._destination, copy)


def _rounded(size: int) -> int:
    return -(-size // SOURCE_ALIGNMENT) * SOURCE_ALIGNMENT


def _send(source: Source, begin: int, end: int, target: torch.Tensor, at: int) -> None:
    """What `source` has of bytes `begin` to `end` of a parcel, to where they go when the first goes to `at`."""
    low, high = max(begin, source.begin), min(end, source.end)
    if low < high:
        first = source.offset + low - source.begin
        found = source.memory[first : first + high - low]
        target[at + low - begin : at + high - begin].copy_(found, non_blocking=True)


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
