"""Load a plan into the memory of GPUs.

    parcels in plan order -> read by many threads at once into a little pinned memory -> over the link (carrier.py)
                          -> checked, decoded, placed, on one of a few lanes of each device (delivery.py)

The pinned memory bounds what is under way, and slows the reads down to the speed of the link. What the DRAM tier holds
is copied from there and needs none. What the GPU does not decode (LZ4, zstd; all, where it has no kernels), some
threads decode before.

Chunks are checked on the GPU, because the memory bus of the host is what limits a load. The words in which the GPU
tells of damage are looked at when all is done, and the CPU then finds the chunk to name.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Self

import torch

from dormouse.errors import ConfigError, HostError, StoreError
from dormouse.store.codec import FLOATS, Codec
from dormouse.transfer import pinned
from dormouse.transfer.budget import default_threads
from dormouse.transfer.carrier import Carrier, Flow, Shares, most_reads, shared_out
from dormouse.transfer.crew import clear_frames
from dormouse.transfer.delivery import DECODED_LANES, LANES, Delivery, Lanes
from dormouse.transfer.device_plan import SOURCE_ALIGNMENT, Parcel, pack
from dormouse.transfer.gpus import Cuda, Gpu, have_kernels, translated
from dormouse.transfer.lane import Kernels, Lane
from dormouse.transfer.pieces import Checker
from dormouse.transfer.plan import EXTENT_BYTES, Extent, LoadPlan, gathered, split
from dormouse.transfer.prepared import Prepared, Unread, check
from dormouse.transfer.report import LoadReport, Progress
from dormouse.transfer.source_files import SourceFiles
from dormouse.transfer.tier_held import sources, tier_held

if TYPE_CHECKING:
    from dormouse.store.key import Key
    from dormouse.transfer.dram import DramTier

log = logging.getLogger(__name__)

PINNED_BYTES = 512 << 20
"""What a load may pin at most. It takes less by itself, see carrier.py."""

AT_ONCE = 4 * EXTENT_BYTES
"""What is checked and decoded by one launch. Launches are what Python is slowest at."""

_AT_WORK = 8
_SMALL = 8 << 20
_PER_READER = 4


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
            prepared = _prepared(plan, kernels, threads, tier, stack)
            files = SourceFiles(prepared.plan.files, ours=prepared.plan.ours)
        elif sizes != prepared.plan.sizes or not kernels:
            raise StoreError(f"a load was prepared for kernels and memory of {prepared.plan.sizes} bytes, not {sizes}")
        else:
            files = Unread(prepared.plan.files)
        stack.enter_context(files)
        reached = {"worked out": time.perf_counter() - started}

        def add_lanes() -> None:
            _add_lanes(lanes, prepared, gpus, destinations, key)
            reached["lanes"] = time.perf_counter() - started

        shares = _shares(prepared.packed.parcels, pinned_bytes, threads)
        checker = Checker(prepared.plan.files, key)
        lanes = Lanes()
        with _Carriers(shares, pinner, gpus, files, checker, lanes) as carriers:
            delivery = Delivery(
                prepared.packed,
                lanes,
                carriers.flow,
                carriers.carrier,
                files,
                checker,
                _nothing_to_forget if tier is None else tier.forget,
            )
            delivery.run(
                sources(prepared.runs),
                add_lanes,  # while the first bytes are read
                threads=shares.carriers,
                progress=progress,
                cancelled=cancelled,
            )
            reached["asked"] = delivery.asked_at - started
        return LoadReport(
            time.perf_counter() - started,
            prepared.plain_bytes,
            prepared.stored_bytes,
            files.direct_bytes,
            files.cached_bytes,
            prepared.tier_bytes,
            carriers.pinned_bytes,
            "device" if kernels else "host",
            reached,
        )


def _prepared(
    plan: LoadPlan, kernels: bool, threads: int, tier: DramTier | None, stack: contextlib.ExitStack
) -> Prepared:
    """The load, worked out. What is held stays where it is until `stack` is closed."""
    found = [None] * len(plan.extents) if tier is None else stack.enter_context(tier.borrow(plan.extents))
    held, rest = tier_held(plan.extents, found)
    rest = list(gathered(rest, AT_ONCE))
    cut = replace(plan, extents=(*(each.extent for each in held), *_tapered(rest, threads, kernels=kernels)))
    packed = pack(cut, kernels=kernels, held=len(held))
    runs = tuple(None if each.held is None else held[each.held].for_parcel(each) for each in packed.parcels)
    return Prepared(cut, packed, runs, plan.stored_bytes)


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


def _shares(parcels: Sequence[Parcel], pinned_bytes: int, threads: int) -> Shares:
    """No more of anything than has something to do."""
    decoded = sum(parcel.host for parcel in parcels)
    lengths = (parcel.extent.length for parcel in parcels if not parcel.host and parcel.held is None)
    reads = min(threads, most_reads(lengths))
    return shared_out(pinned_bytes, carriers=min(threads, decoded), reads=reads)


def _add_lanes(
    lanes: Lanes,
    prepared: Prepared,
    gpus: Sequence[Gpu],
    destinations: Sequence[torch.Tensor],
    key: Key | None,
) -> None:
    """For each device, as many as help."""
    packed = prepared.packed
    own, decoded = list[Parcel](), list[Parcel]()
    for parcel in packed.parcels:
        (decoded if parcel.host else own).append(parcel)
    kernels = []
    for number, (gpu, destination) in enumerate(zip(gpus, destinations, strict=True)):
        place = (number, destination.device)
        kernels.append(Kernels(gpu, packed.tables[number], key, len(packed.parcels), prepared.tasks.get(place)))
        prepared.tasks[place] = kernels[-1].decodes
    for parcels, made, most in ((own, lanes.own, LANES), (decoded, lanes.decoded, DECODED_LANES)):
        staging = _staging_bytes(parcels, len(gpus))
        for _ in range(min(most, len(parcels))):
            made.append(
                [
                    Lane(gpu, of_gpu, destination, staging_bytes=room, scratch_bytes=tables.scratch_bytes)
                    for gpu, of_gpu, destination, room, tables in zip(
                        gpus, kernels, destinations, staging, packed.tables, strict=True
                    )
                ]
            )


def _staging_bytes(parcels: Sequence[Parcel], devices: int) -> list[int]:
    """What each device needs of staging memory for one of the parcels."""
    needed = [0] * devices
    for part in chain.from_iterable(parcel.parts for parcel in parcels):
        needed[part.device] = max(needed[part.device], part.staging_bytes)
    return needed


class _Carriers:
    """Makes those that bring bytes, with their pinned memory and streams. At the end no device uses these, nor anything
    else of the load, any more, and the memory is kept for the next load."""

    def __init__(
        self,
        shares: Shares,
        pinner: pinned.Pinner,
        gpus: Sequence[Gpu],
        files: SourceFiles,
        checker: Checker,
        lanes: Lanes,
    ) -> None:
        self._shares = shares
        self._pinner = pinner
        self._gpus = gpus
        self._files = files
        self._checker = checker
        self._lanes = lanes
        self._streams = SimpleQueue[list[Any]]()
        self._used: list[tuple[Gpu, Any]] = []
        self._blocks: list[pinned.PinnedMemory] = []
        for _ in range(shares.carriers + 1):
            # by this thread: what it asked of the devices before comes first
            streams = [gpu.stream() for gpu in gpus]
            self._used += zip(gpus, streams, strict=True)
            self._streams.put(streams)

    @property
    def pinned_bytes(self) -> int:
        """What was used of it."""
        return len(self._blocks) * self._shares.block_bytes

    def flow(self, parcels: Sequence[Parcel]) -> Flow:
        """For parcels that are read as they are stored. Raises HostError when there is no memory for it."""
        with ThreadPoolExecutor(_AT_WORK, thread_name_prefix="pin") as pool:  # touching new memory is what takes long
            blocks = list(pool.map(lambda _number: self._block(), range(self._shares.flow)))
        return Flow(parcels, blocks, self._shares.block_bytes, self._streams.get_nowait(), self._files)

    def carrier(self) -> Carrier:
        """One for the thread that asks. Raises HostError when there is no memory for it."""
        size = self._shares.block_bytes
        return Carrier(self._block(), size, self._streams.get_nowait(), self._files, self._checker)

    def _block(self) -> pinned.PinnedMemory:
        block = pinned.borrow(self._shares.block_bytes, self._pinner)
        self._blocks.append(block)
        return block

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        leave = pinned.give_back if self._drained() else pinned.abandon
        for block in self._blocks:
            leave(block)

    def _drained(self) -> bool:
        """Whether all streams have come to their ends. One whose GPU has failed does not keep the others from being
        waited for: their memory goes next."""
        drained = True
        drains: list[Callable[[], None]] = [partial(_drain, gpu, stream) for gpu, stream in self._used]
        for drain in (*drains, *(lane.drain for lane in self._lanes.all())):
            try:
                with translated():  # a GPU that has failed does not even take a mark
                    drain()
            except HostError as error:
                log.error("a GPU does not finish what it was given: %s", error)
                drained = False
        return drained


def _drain(gpu: Gpu, stream: Any) -> None:
    gpu.mark(stream).wait()
