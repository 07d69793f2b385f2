"""Load a plan into the memory of GPUs.

    parcels in plan order -> readers (threads): fill slots of pinned memory, several of them one, made when needed
                          -> this thread: link, check, decode, on one of a few lanes of each device that needs it
                          -> finisher (a thread): when a slot's bytes have crossed the link, it is free again

The slots bound the host's memory and slow the readers down to the speed of the link; their number is all that is ever
under way. What the DRAM tier holds is copied from there and needs no slot. All readers fill a few slots together, first
and last in shorter stretches: so the link soon has something to do, most slots are left for what waits for it, and each
time that this thread asks for something, it is for much.

Chunks are checked on the GPU, because the memory bus of the host is what limits a load. The words in which the GPU
tells of damage are looked at when all is done, and the CPU then finds the chunk to name.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch

from dormouse.errors import ConfigError, HostError, StoreError
from dormouse.store.codec import FLOATS, Codec
from dormouse.store.pack import ALIGNMENT
from dormouse.transfer import pinned
from dormouse.transfer.budget import default_threads
from dormouse.transfer.crew import clear_frames
from dormouse.transfer.delivery import Delivery
from dormouse.transfer.device_plan import SOURCE_ALIGNMENT, Parcel, pack
from dormouse.transfer.gpus import Cuda, Gpu, have_kernels, translated
from dormouse.transfer.lane import Kernels, Lane
from dormouse.transfer.pieces import Checker
from dormouse.transfer.plan import EXTENT_BYTES, Extent, LoadPlan, split
from dormouse.transfer.plan import plan as make_plan
from dormouse.transfer.prepared import Prepared, Unread, check
from dormouse.transfer.report import LoadReport, Progress
from dormouse.transfer.ring import Ring
from dormouse.transfer.source_files import SourceFiles, room_for
from dormouse.transfer.tier_held import sources, tier_held

if TYPE_CHECKING:
    from dormouse.store.key import Key
    from dormouse.transfer.dram import DramTier

log = logging.getLogger(__name__)

PINNED_BYTES = 512 << 20
_SMALL = 8 << 20
_PER_READER = 4
LANES = 4
"""Per device: one whose bytes cross the link, one that checks and decodes, and some between."""


def load_device(
    plan: LoadPlan,
    destinations: Sequence[torch.Tensor],
    *,
    key: Key | None,
    pinned_bytes: int = PINNED_BYTES,
    threads: int | None = None,
    progress: Progress | None = None,
    cancelled: threading.Event | None = None,
    tier: DramTier | None = None,
    prepared: Prepared | None = None,
) -> LoadReport:
    """Fill `destinations` (uint8, 1-D, contiguous, on GPUs, zeros in the plan's gaps) as it says; on return, all
    is there. `prepared`: the plan, worked out before (prepare); the tier must have lent its chunks.

    `progress` is called with done and total plain bytes, by one thread. Raises DamagedError that names file and chunk,
    NotFoundError, HostError when a GPU or this machine lacks memory or damages bytes, ConfigError when `pinned_bytes`
    are too few, StoreError when `cancelled` is set. Nothing is left under way or allocated then, but for the pinned
    memory, which is kept for the next load (`pinned.free_pinned`); the destinations have any content.
    """
    if not destinations or not all(map(_is_block, destinations)):
        raise ConfigError("a load to GPUs needs contiguous bytes on GPUs that begin at a multiple of 16")
    try:
        with translated(), torch.cuda.device(destinations[0].device):
            return carry_out(
                plan,
                destinations,
                [Cuda(each.device) for each in destinations],
                pinned.CudaPinner(destinations[0].device),
                kernels=have_kernels(),
                key=key,
                pinned_bytes=pinned_bytes,
                threads=threads,
                progress=progress,
                cancelled=cancelled,
                tier=tier,
                prepared=prepared,
            )
    except BaseException as error:
        clear_frames(error)  # an error that is kept must not keep memory of the GPU
        raise


def _is_block(memory: torch.Tensor) -> bool:
    aligned = memory.data_ptr() % SOURCE_ALIGNMENT == 0  # kernels check raw chunks there
    return memory.is_cuda and memory.dtype == torch.uint8 and memory.dim() == 1 and memory.is_contiguous() and aligned


def carry_out(
    plan: LoadPlan,
    destinations: Sequence[torch.Tensor],
    gpus: Sequence[Gpu],
    pinner: pinned.Pinner,
    *,
    kernels: bool,
    key: Key | None,
    pinned_bytes: int = PINNED_BYTES,
    threads: int | None = None,
    progress: Progress | None = None,
    cancelled: threading.Event | None = None,
    tier: DramTier | None = None,
    prepared: Prepared | None = None,
) -> LoadReport:
    """`load_device` on any kind of GPU; `kernels` tells whether they check and decode."""
    started = time.perf_counter()
    sizes = tuple(destination.numel() for destination in destinations)
    threads = threads or default_threads()
    with contextlib.ExitStack() as stack:
        if prepared is None:
            check(plan, sizes, key)
            prepared = _prepared(_fitted(plan, pinned_bytes), kernels, pinned_bytes, threads, tier, stack)
            files = SourceFiles(prepared.plan.files, ours=prepared.plan.ours)
        elif sizes != prepared.plan.sizes or not kernels:
            raise StoreError(f"a load was prepared for kernels and memory of {prepared.plan.sizes} bytes, not {sizes}")
        else:
            files = Unread(prepared.plan.files)
        packed = prepared.packed
        stack.enter_context(files)
        rooms = [_room(parcel) for parcel in packed.parcels if parcel.held is None]
        slot_bytes = _slot_bytes(max(rooms, default=1), pinned_bytes)
        ring = Ring(pinned_bytes, slot_bytes, len(rooms), lambda size: pinned.borrow(size, pinner))
        lanes: list[list[Lane]] = []
        forget = _nothing_to_forget if tier is None else tier.forget
        with _kept(ring, lanes):
            delivery = Delivery(packed, lanes, ring, files, Checker(prepared.plan.files, key), forget)
            delivery.run(
                sources(prepared.runs),
                # while the first bytes are read
                partial(_add_lanes, lanes, prepared, gpus, destinations, key),
                threads=threads,
                progress=progress,
                cancelled=cancelled,
            )
        return LoadReport(
            time.perf_counter() - started,
            prepared.plain_bytes,
            prepared.stored_bytes,
            files.direct_bytes,
            files.cached_bytes,
            prepared.tier_bytes,
            ring.peak_bytes,
            "device" if kernels else "host",
        )


def _prepared(
    plan: LoadPlan, kernels: bool, pinned_bytes: int, threads: int, tier: DramTier | None, stack: contextlib.ExitStack
) -> Prepared:
    """The load, worked out. What is held stays where it is until `stack` is closed."""
    found = [None] * len(plan.extents) if tier is None else stack.enter_context(tier.borrow(plan.extents))
    held, rest = tier_held(plan.extents, found)
    cut = replace(plan, extents=(*(each.extent for each in held), *_tapered(rest, threads, kernels=kernels)))
    packed = pack(cut, kernels=kernels, plain_bytes=_limit(pinned_bytes), held=len(held))
    runs = tuple(None if each.held is None else held[each.held].for_parcel(each) for each in packed.parcels)
    return Prepared(cut, packed, runs, plan.stored_bytes)


def _room(parcel: Parcel) -> int:
    """What a parcel needs of a slot."""
    return parcel.length if parcel.host else room_for(parcel.extent.offset, parcel.extent.length)


def _limit(pinned_bytes: int) -> int:
    """How long an extent may be, so that some are under way at once."""
    return max(ALIGNMENT, min(EXTENT_BYTES, pinned_bytes // 4 // ALIGNMENT * ALIGNMENT))


def _slot_bytes(largest: int, pinned_bytes: int) -> int:
    """As much as the largest parcel needs; of all loads the same if that is nearly so, to use slots again."""
    usual = _limit(pinned_bytes) + ALIGNMENT
    return usual if largest <= usual < 2 * largest else largest


def _fitted(plan: LoadPlan, pinned_bytes: int) -> LoadPlan:
    """The plan, in smaller extents if there is little pinned memory."""
    limit = _limit(pinned_bytes)
    if pinned_bytes >= PINNED_BYTES or all(extent.length <= limit for extent in plan.extents):
        return plan
    pieces = [*plan.zeros, *(piece for extent in plan.extents for piece in extent.pieces)]
    return make_plan(plan.files, pieces, plan.sizes, extent_bytes=limit)


def _tapered(extents: Sequence[Extent], threads: int, *, kernels: bool) -> tuple[Extent, ...]:
    """Of what the CPU decodes, which is one reader's: some small extents at both ends, for every reader one; small ones
    altogether when there are few. What the devices decode is read by several anyhow, and asked for at once."""

    def smaller(part: Sequence[Extent], size: int) -> Iterator[Extent]:
        for extent in part:
            yield from split(extent, size) if _on_host(extent, kernels=kernels) else (extent,)

    if len(extents) < _PER_READER * threads:
        size = max(_SMALL, sum(extent.length for extent in extents) // (_PER_READER * threads))
        return tuple(smaller(extents, size))
    ends = -(-threads // 4)
    rest = len(extents) - ends
    return (*smaller(extents[:ends], _SMALL), *extents[ends:rest], *smaller(extents[rest:], _SMALL))


def _on_host(extent: Extent, *, kernels: bool) -> bool:
    """Whether the CPU decodes any of it."""
    if kernels:
        return any(piece.codec not in FLOATS and piece.codec != Codec.RAW for piece in extent.pieces)
    return any(piece.chunk is not None or piece.codec != Codec.RAW for piece in extent.pieces)


def _nothing_to_forget(_extent: Extent) -> None:
    """There is no tier."""


def _add_lanes(
    lanes: list[list[Lane]],
    prepared: Prepared,
    gpus: Sequence[Gpu],
    destinations: Sequence[torch.Tensor],
    key: Key | None,
) -> None:
    """For each device, as many as help."""
    parcels = len(prepared.packed.parcels)
    for number, (gpu, destination) in enumerate(zip(gpus, destinations, strict=True)):
        tables, place = prepared.packed.tables[number], (number, destination.device)
        kernels = Kernels(gpu, tables, key, parcels, prepared.tasks.get(place))
        prepared.tasks[place] = kernels.decodes
        lanes.append([])
        for _ in range(min(LANES, parcels)):
            lanes[-1].append(Lane(gpu, kernels, tables, destination))


@contextlib.contextmanager
def _kept(ring: Ring, lanes: Sequence[Sequence[Lane]]) -> Iterator[None]:
    """Keep the slots for the next load. At the end no device uses them, nor anything else of the load, any more."""
    try:
        yield
    finally:
        leave = pinned.give_back if _drained(lanes) else pinned.abandon
        for slot in ring.made:
            leave(slot)


def _drained(lanes: Sequence[Sequence[Lane]]) -> bool:
    """Whether all lanes have come to their ends. One whose GPU has failed does not keep the others from being waited
    for: their memory goes next."""
    drained = True
    for lane in chain.from_iterable(lanes):
        try:
            with translated():  # a GPU that has failed does not even take a mark
                lane.drain()
        except HostError as error:
            log.error("a GPU does not finish what it was given: %s", error)
            drained = False
    return drained
