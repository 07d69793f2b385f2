"""What the DRAM tier holds of a load, and in which parts a device is asked to take it.

extents, as the tier found them -> those that are held, joined to large ones, with the places of their bytes -> parcels
                 -> those that have to be read
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch

from dormouse.transfer.device_plan import Parcel
from dormouse.transfer.lane import Source
from dormouse.transfer.plan import EXTENT_BYTES, Extent

if TYPE_CHECKING:
    from dormouse.transfer.dram import HeldRun

_AT_ONCE = 4 * EXTENT_BYTES
"""What comes out of the tier needs no pinned memory, and asking for it is what costs the CPU most."""


class Held(NamedTuple):
    """An extent, and where its bytes are, counted from its beginning."""

    extent: Extent
    runs: tuple[HeldRun, ...]

    def for_parcel(self, parcel: Parcel) -> tuple[HeldRun, ...]:
        """The runs, counted from the beginning of a parcel that is a part of the extent."""
        return tuple(self._counted_from(parcel.extent.offset))

    def _counted_from(self, offset: int) -> Iterator[HeldRun]:
        shift = self.extent.offset - offset
        return (run._replace(begin=run.begin + shift, end=run.end + shift) for run in self.runs)

    @classmethod
    def joined(cls, parts: Sequence[Held]) -> Held:
        """Several of one file, as one."""
        first, last = parts[0].extent, parts[-1].extent
        pieces = tuple(chain.from_iterable(part.extent.pieces for part in parts))
        extent = Extent(first.file, first.offset, last.offset + last.length - first.offset, pieces)
        return cls(extent, tuple(chain.from_iterable(part._counted_from(first.offset) for part in parts)))


def tier_held(
    extents: Sequence[Extent], found: Sequence[tuple[HeldRun, ...] | None]
) -> tuple[list[Held], list[Extent]]:
    """What is held, as the tier has `found` it, and what has to be read."""
    both = list(zip(extents, found, strict=True))
    held = (Held(extent, runs) for extent, runs in both if runs is not None)
    return list(_gathered(held)), [extent for extent, runs in both if runs is None]


def sources(parcels: Iterable[tuple[HeldRun, ...] | None]) -> list[tuple[Source, ...] | None]:
    """The same places as a device copies from them. The tier can't be closed as long as one of these is kept."""
    tensors: dict[int, torch.Tensor] = {}

    def source(run: HeldRun) -> Source:
        slab = id(run.memory)
        if slab not in tensors:
            tensors[slab] = torch.frombuffer(run.memory, dtype=torch.uint8)
        return Source(run.begin, run.end, tensors[slab], run.offset)

    return [None if runs is None else tuple(map(source, runs)) for runs in parcels]


def _gathered(held: Iterable[Held]) -> Iterator[Held]:
    """The same, in large parts."""
    group: list[Held] = []
    for each in held:
        if group:
            first, last = group[0].extent, each.extent
            if last.file != first.file or last.offset + last.length - first.offset > _AT_ONCE:
                yield Held.joined(group)
                group = []
        group.append(each)
    if group:
        yield Held.joined(group)
