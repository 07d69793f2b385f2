"""Parcels on their way to GPUs: who reads, who asks the devices, who waits for them, and what ends it all.

    reader threads --arrivals--> the caller's thread, the only one that asks a device for anything
                                 --given--> finisher thread: waits for the link, frees slots, tells the progress

Readers take jobs, in the order of the parcels: make a slot, if none is free; then, when the parcel has its slot, read a
stretch of it. So some readers fill one slot together, and who brings its last stretch tells of the arrival. Nobody
waits with a job in hands: while no slot is free, the next job is waited for, by one reader, and by the others for it.
What the CPU has to decode is one reader's.

The first error of anybody, or a cancel, ends all of them. What was given to a device is not taken back; whoever made
the lanes waits for it before their memory goes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from queue import SimpleQueue
from typing import NamedTuple

import torch

from dormouse.errors import HostError
from dormouse.transfer.crew import Crew, given_up
from dormouse.transfer.device_plan import Packed, Parcel
from dormouse.transfer.filling import Filling, most_readers, step, stretches
from dormouse.transfer.gpus import Mark
from dormouse.transfer.lane import Lane, Source
from dormouse.transfer.memory import anonymous
from dormouse.transfer.pieces import Checker
from dormouse.transfer.pinned import PinnedMemory
from dormouse.transfer.plan import Extent
from dormouse.transfer.report import Progress
from dormouse.transfer.ring import Ring
from dormouse.transfer.source_files import SourceFiles, room_for


class _Arrival(NamedTuple):
    """A parcel that has been read: its bytes begin `lead` bytes into its slot."""

    number: int
    slot: PinnedMemory
    lead: int


class _Given(NamedTuple):
    """A parcel whose devices have been asked."""

    number: int
    slot: PinnedMemory | None
    marks: list[Mark]


def _do(job: Callable[[], None]) -> None:
    job()


class Delivery:
    """One load of parcels. `lanes`: of each device, made when the load runs; `forget`: told what was held in memory and
    is damaged there."""

    def __init__(
        self,
        packed: Packed,
        lanes: Sequence[Sequence[Lane]],
        ring: Ring,
        files: SourceFiles,
        checker: Checker,
        forget: Callable[[Extent], None],
    ) -> None:
        self._parcels = packed.parcels
        self._lanes = lanes
        self._ring = ring
        self._files = files
        self._checker = checker
        self._forget = forget
        self._scratch = threading.local()
        self._arrivals: SimpleQueue[_Arrival | None] = SimpleQueue()
        self._given: SimpleQueue[_Given | None] = SimpleQueue()

    def run(
        self,
        held: Sequence[tuple[Source, ...] | None],
        prepare: Callable[[], None],
        *,
        threads: int,
        progress: Progress | None,
        cancelled: threading.Event | None,
    ) -> None:
        """Deliver all. `held`: for each parcel where it is in memory, None when it is to be read. `prepare`: makes the
        lanes. Raises the first error; DamagedError when a device found damage that is in the file, HostError when it
        is not."""
        reading = [number for number, found in enumerate(held) if found is None]
        threads = min(threads, most_readers(sum(self._parcels[number].length for number in reading), len(reading)))
        readers = Crew(
            self._jobs(reading, threads),
            _do,
            threads=threads,
            name="read",
            cancelled=cancelled,
            on_failure=self._end,
        )
        finisher = Crew(
            [progress or (lambda _done, _total: None)], self._finish, threads=1, name="finish", on_failure=readers.fail
        )
        with finisher:
            try:
                with readers:
                    prepare()
                    self._issue_held(held, cancelled)
                    self._issue_read(len(reading))
                    readers.wait()
            finally:
                self._given.put(None)
            finisher.wait()
        for lane in chain.from_iterable(self._lanes):
            lane.drain()
        self._look_for_damage(held)

    def _end(self, _error: BaseException) -> None:
        self._ring.end()
        self._arrivals.put(None)

    # What the readers do

    def _jobs(self, reading: Sequence[int], readers: int) -> Iterator[Callable[[], None]]:
        ring = self._ring
        for position, number in enumerate(reading):
            while ring.reserve(readers if self._parcels[number].host else ring.most // 2):
                yield ring.make
            slot = ring.take()
            if slot is None:
                return
            extent = self._parcels[number].extent
            if self._parcels[number].host:
                yield partial(self._read_decoded, number, slot)
                continue
            about = step(ring.most * ring.slot_bytes, readers, position, len(reading))
            parts = list(stretches(extent.offset, extent.length, about))
            filling = Filling(self._files[extent.file], extent, slot.view, len(parts))
            for begin, end in parts:
                yield partial(self._read_stretch, number, slot, filling, begin, end)

    def _read_stretch(self, number: int, slot: PinnedMemory, filling: Filling, begin: int, end: int) -> None:
        lead = filling.read(begin, end)
        if lead is not None:
            self._arrivals.put(_Arrival(number, slot, lead))

    def _read_decoded(self, number: int, slot: PinnedMemory) -> None:
        parcel, extent = self._parcels[number], self._parcels[number].extent
        stored = self._read_extent(extent, self._own_memory(room_for(extent.offset, extent.length)))
        for piece, start in zip(extent.pieces, parcel.starts, strict=True):
            begin = piece.offset - extent.offset
            found = stored[begin : begin + piece.stored_length]
            self._checker.check(piece, found)
            self._checker.decode_into(piece, found, slot.view[start : start + piece.plain_length])
        self._arrivals.put(_Arrival(number, slot, 0))

    def _read_extent(self, extent: Extent, room: memoryview) -> memoryview:
        file = self._files[extent.file]
        direct = file.prefers_direct(extent.offset, extent.length)
        return file.read_around(room, extent.offset, extent.length, direct=direct)

    def _own_memory(self, length: int) -> memoryview:
        """This thread's own, which begins at a page."""
        memory: memoryview | None = getattr(self._scratch, "memory", None)
        if memory is None or len(memory) < length:
            memory = self._scratch.memory = memoryview(anonymous(length))
        return memory

    # What the caller's thread does

    def _issue_held(self, held: Sequence[tuple[Source, ...] | None], cancelled: threading.Event | None) -> None:
        for number, sources in enumerate(held):
            if sources is not None:
                if cancelled is not None and cancelled.is_set():
                    raise given_up()
                self._issue(number, None, sources)

    def _issue_read(self, count: int) -> None:
        for _ in range(count):
            arrival = self._arrivals.get()
            if arrival is None:
                return
            memory = torch.frombuffer(arrival.slot.view, dtype=torch.uint8)
            source = Source(0, self._parcels[arrival.number].length, memory, arrival.lead)
            self._issue(arrival.number, arrival.slot, (source,))

    def _issue(self, number: int, slot: PinnedMemory | None, sources: tuple[Source, ...]) -> None:
        marks = []
        for part in self._parcels[number].parts:
            lanes = self._lanes[part.device]
            marks.append(lanes[number % len(lanes)].issue(number, part, sources))
        self._given.put(_Given(number, slot, marks))

    def _look_for_damage(self, held: Sequence[tuple[Source, ...] | None]) -> None:
        """All devices are through: did one of them find anything?"""
        found = {number for lanes in self._lanes if lanes for number in lanes[0].kernels.damaged()}
        for number in found:
            if held[number] is not None:
                self._forget(self._parcels[number].extent)
        for number in sorted(found):
            self._name_damage(self._parcels[number], in_tier=held[number] is not None)

    def _name_damage(self, parcel: Parcel, *, in_tier: bool) -> None:
        extent = parcel.extent
        stored = self._read_extent(extent, self._own_memory(room_for(extent.offset, extent.length)))
        for piece in extent.pieces:
            begin = piece.offset - extent.offset
            found = stored[begin : begin + piece.stored_length]
            self._checker.check(piece, found)
            self._checker.decoded(piece, found)
        where = "in the DRAM tier" if in_tier else "on the GPU"
        raise HostError(  # and no DamagedError: what is stored is right
            f"bytes of {self._files[extent.file].path} from {extent.offset} on were damaged {where}, not on the disk",
            remedy="Load again; if it comes back, have the memory of this machine and of the GPU tested",
        )

    # What the finisher does

    def _finish(self, progress: Progress) -> None:
        done, total = 0, sum(parcel.plain_bytes for parcel in self._parcels)
        while (given := self._given.get()) is not None:
            for mark in given.marks:
                mark.wait()
            if given.slot is not None:
                self._ring.give(given.slot)
            done += self._parcels[given.number].plain_bytes
            progress(done, total)
