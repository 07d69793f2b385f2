"""What the DRAM tier holds of a load, and in which parts a device is asked to take it.

extents --borrow--> those that are held, joined to large ones, with the places of their bytes -> parcels
                 -> those that have to be read
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch

from dormouse.transfer.device_plan import Parcel
from dormouse.transfer.lane import Source
from dormouse.transfer.plan import Extent

if TYPE_CHECKING:
    from dormouse.transfer.dram import DramTier

_AT_ONCE = 64 << 20
"""What comes out of the tier needs no slot, and asking for it is what costs the CPU most."""


class Held(NamedTuple):
    """An extent, and where its bytes are, counted from its beginning."""

    extent: Extent
    sources: tuple[Source, ...]

    def for_parcel(self, parcel: Parcel) -> tuple[Source, ...]:
        """The sources, counted from the beginning of a parcel that is a part of the extent."""
        return tuple(self._counted_from(parcel.extent.offset))

    def _counted_from(self, offset: int) -> Iterator[Source]:
        shift = self.extent.offset - offset
        return (source._replace(begin=source.begin + shift, end=source.end + shift) for source in self.sources)

    @classmethod
    def joined(cls, parts: Sequence[Held]) -> Held:
        """Several of one file, as one."""
        first, last = parts[0].extent, parts[-1].extent
        pieces = tuple(chain.from_iterable(part.extent.pieces for part in parts))
        extent = Extent(first.file, first.offset, last.offset + last.length - first.offset, pieces)
        return cls(extent, tuple(chain.from_iterable(part._counted_from(first.offset) for part in parts)))


def tier_held(
    extents: Sequence[Extent], tier: DramTier | None, stack: contextlib.ExitStack
) -> tuple[list[Held], list[Extent]]:
    """What is held, and what has to be read. The former stays where it is until `stack` is closed."""
    if tier is None:
        return [], list(extents)
    found = list(zip(extents, stack.enter_context(tier.borrow(extents)), strict=True))
    slabs = {id(run.memory): run.memory for _extent, runs in found for run in runs or ()}
    tensors = {number: torch.frombuffer(memory, dtype=torch.uint8) for number, memory in slabs.items()}
    held = (
        Held(extent, tuple(Source(run.begin, run.end, tensors[id(run.memory)], run.offset) for run in runs))
        for extent, runs in found
        if runs is not None
    )
    return list(_gathered(held)), [extent for extent, runs in found if runs is None]


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
