"""A load to GPUs, worked out: all that can be told before memory, files and devices are touched.

    plan, what the tier has found of it --> Prepared: parcels, tables, places in the tier --> carry_out

Of what the DRAM tier holds as a whole, the tier keeps this for the next load (`DramTier.keep`): that needs no store, no
file and no plan any more, and the tables are on the GPU already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dormouse.errors import HostError
from dormouse.store.codec import FLOATS, Codec
from dormouse.transfer.device_plan import Packed, pack
from dormouse.transfer.pieces import Checker
from dormouse.transfer.plan import Extent, LoadPlan
from dormouse.transfer.source_files import SourceFile, SourceFiles
from dormouse.transfer.tier_held import tier_held

if TYPE_CHECKING:
    from dormouse.store.key import Key
    from dormouse.transfer.dram import HeldRun

_BY_DEVICES = (Codec.RAW, *FLOATS)


@dataclass(frozen=True, eq=False)
class Prepared:
    """`plan`: in the extents that the parcels are of. `runs`: for each parcel where it is in the tier, None when it is
    to be read. `stored_bytes`: of the plan as it was. `tasks`: what is to be decoded, on the devices that had it so
    far, by destination and device. Several loads may use it at once."""

    plan: LoadPlan
    packed: Packed
    runs: tuple[tuple[HeldRun, ...] | None, ...]
    stored_bytes: int
    tasks: dict[tuple[int, torch.device], Any] = field(default_factory=dict)

    @cached_property
    def gaps(self) -> list[list[tuple[int, int]]]:
        """Of each destination."""
        return [self.plan.gaps(number) for number in range(len(self.plan.sizes))]

    @cached_property
    def plain_bytes(self) -> int:
        """What all comes to."""
        return self.plan.plain_bytes

    @cached_property
    def tier_bytes(self) -> int:
        """What comes from the tier."""
        held = (parcel.extent for parcel in self.packed.parcels if parcel.held is not None)
        return sum(piece.stored_length for extent in held for piece in extent.pieces)

    @property
    def reads_nothing(self) -> bool:
        """Whether all is in the tier."""
        return None not in self.runs


def prepare(
    plan: LoadPlan,
    found: Sequence[tuple[HeldRun, ...] | None],
    key: Key | None,
) -> Prepared | None:
    """Work out a load of what is found in a tier, for devices with kernels; None when a part of it has to be read.
    Raises what a load raises before it reads."""
    if None in found or not all(map(_for_devices, plan.extents)):
        return None
    check(plan, plan.sizes, key)
    held, _none = tier_held(plan.extents, found)
    gathered = replace(plan, extents=tuple(each.extent for each in held))
    packed = pack(gathered, kernels=True, held=len(held))
    runs = tuple(None if each.held is None else held[each.held].for_parcel(each) for each in packed.parcels)
    prepared = Prepared(gathered, packed, runs, plan.stored_bytes)
    return prepared if prepared.reads_nothing else None


def check(plan: LoadPlan, sizes: Sequence[int], key: Key | None) -> None:
    """What can be checked before anything is read."""
    plan.require(sizes)
    Checker(plan.files, key).check_plan(plan)


def _for_devices(extent: Extent) -> bool:
    return all(piece.codec in _BY_DEVICES for piece in extent.pieces)


class Unread(SourceFiles):
    """Files that nobody opens. What they are asked for is chunks that a device found damaged: these were right when the
    tier took them from the disk, wherever they are there now."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__([], ours=[])
        self._paths = paths

    def __getitem__(self, number: int) -> SourceFile:
        raise HostError(
            f"chunks of {self._paths[number]} were damaged in the DRAM tier or on the GPU, after they were checked",
            remedy="Load again; if it comes back, have the memory of this machine and of the GPU tested",
        )
