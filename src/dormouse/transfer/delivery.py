"""Parcels on their way to GPUs: who reads, who asks the devices, who waits for them, and what ends it all.

    readers (threads): stretches of files -> carrier.py -> over the link, into the lane of the parcel
                       the last stretch of a parcel --arrivals-->
    the caller's thread: check, decode, place (lane.finish); what memory holds it also sends itself

Parcels are read in order, each into the next lane that is free: so a few are under way, however many readers there are.
A lane is free for the next parcel as soon as its device has been asked for the last step of the one before; the order
on the device does the rest.

The first error of anybody, or a cancel, ends all of them. What was given to a device is not taken back; whoever made
the lanes waits for it before their memory goes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from queue import SimpleQueue

from dormouse.errors import HostError
from dormouse.transfer.carrier import Carrier, check_again, stretches
from dormouse.transfer.crew import Crew, given_up
from dormouse.transfer.device_plan import Packed, Parcel
from dormouse.transfer.gpus import Mark
from dormouse.transfer.lane import Lane, Source
from dormouse.transfer.pieces import Checker
from dormouse.transfer.plan import Extent
from dormouse.transfer.report import Progress
from dormouse.transfer.source_files import SourceFiles

LANES = 8
"""Of each device, for what is read: so many parcels are under way at once."""

HELD_LANES = 2
"""Of each device, for what memory holds: the bytes of one cross the link while the other decodes."""


class _Arriving:
    """A parcel that is being read, into a lane; `left` of its stretches are still to come. Readers share it."""

    def __init__(self, number: int, parcel: Parcel, lane: int, left: int) -> None:
        self.number = number
        self.parcel = parcel
        self.lane = lane
        self.taken: list[list[Mark]] = [[] for _ in parcel.parts]
        self._left = left
        self._lock = threading.Lock()

    def add(self, marks: list[list[Mark]]) -> bool:
        """One stretch has been sent. Whether it was the last to come."""
        with self._lock:
            for taken, more in zip(self.taken, marks, strict=True):
                taken.extend(more)
            self._left -= 1
            return not self._left


class Lanes:
    """Those of all devices: `reading[n]` has one of each device, and so has `held[n]`. They are made while the first
    bytes are read; who sends waits for that."""

    def __init__(self) -> None:
        self.reading: list[list[Lane]] = []
        self.held: list[list[Lane]] = []
        self._there = threading.Event()

    def are_there(self) -> None:
        """Let those go on who wait."""
        self._there.set()

    def await_reading(self, number: int) -> list[Lane]:
        """Raises StoreError when the load ends before there are any."""
        self._there.wait()
        if number >= len(self.reading):
            raise given_up()
        return self.reading[number]

    def all(self) -> Iterator[Lane]:
        """Of all devices."""
        return chain.from_iterable((*self.reading, *self.held))


class Delivery:
    """One load of parcels. `carrier`: makes one, for each reader; `forget`: told what was held in memory and is damaged
    there."""

    def __init__(
        self,
        packed: Packed,
        lanes: Lanes,
        carrier: Callable[[], Carrier],
        stretch_bytes: int,
        files: SourceFiles,
        checker: Checker,
        forget: Callable[[Extent], None],
    ) -> None:
        self._parcels = packed.parcels
        self._lanes = lanes
        self._new_carrier = carrier
        self._stretch_bytes = stretch_bytes
        self._files = files
        self._checker = checker
        self._forget = forget
        self._own = threading.local()
        self._arrivals: SimpleQueue[_Arriving | None] = SimpleQueue()
        self._free: SimpleQueue[int | None] = SimpleQueue()
        self._asked: deque[tuple[list[Mark], int]] = deque()
        self._done = 0
        self._total = sum(parcel.plain_bytes for parcel in self._parcels)

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
        for number in range(min(LANES, len(reading))):
            self._free.put(number)
        readers = Crew(
            self._jobs(reading),
            _do,
            threads=min(threads, sum(self._parts(number) for number in reading)),
            name="read",
            cancelled=cancelled,
            on_failure=self._end,
        )
        with readers:
            prepare()
            self._lanes.are_there()
            self._finish_held(held, progress, cancelled)
            self._finish_read(len(reading), progress)
            readers.wait()
        while self._asked:
            self._await_oldest(progress)
        for lane in self._lanes.all():
            lane.drain()
        self._look_for_damage(held)

    def _end(self, _error: BaseException) -> None:
        self._free.put(None)
        self._arrivals.put(None)
        self._lanes.are_there()

    # What the readers do

    def _parts(self, number: int) -> int:
        """About how many jobs a parcel is."""
        parcel = self._parcels[number]
        return 1 if parcel.host else -(-parcel.extent.length // self._stretch_bytes)

    def _jobs(self, reading: Sequence[int]) -> Iterator[Callable[[], None]]:
        for number in reading:
            lane = self._free.get()
            if lane is None:
                return
            parcel = self._parcels[number]
            if parcel.host:
                yield partial(self._read_decoded, _Arriving(number, parcel, lane, 1))
                continue
            extent = parcel.extent
            direct = self._files[extent.file].prefers_direct(extent.offset, extent.length)
            parts = list(stretches(extent.offset, extent.length, self._stretch_bytes))
            arriving = _Arriving(number, parcel, lane, len(parts))
            for begin, end in parts:
                yield partial(self._read_stretch, arriving, begin, end, direct)

    def _read_stretch(self, arriving: _Arriving, begin: int, end: int, direct: bool) -> None:
        lanes = partial(self._lanes.await_reading, arriving.lane)
        self._add(arriving, self._carrier().carry(arriving.parcel, begin, end, lanes, direct=direct))

    def _read_decoded(self, arriving: _Arriving) -> None:
        lanes = partial(self._lanes.await_reading, arriving.lane)
        self._add(arriving, self._carrier().carry_decoded(arriving.parcel, lanes))

    def _add(self, arriving: _Arriving, marks: list[list[Mark]]) -> None:
        if arriving.add(marks):
            self._arrivals.put(arriving)

    def _carrier(self) -> Carrier:
        """This thread's own."""
        carrier: Carrier | None = getattr(self._own, "carrier", None)
        if carrier is None:
            carrier = self._own.carrier = self._new_carrier()
        return carrier

    # What the caller's thread does

    def _finish_held(
        self,
        held: Sequence[tuple[Source, ...] | None],
        progress: Progress | None,
        cancelled: threading.Event | None,
    ) -> None:
        for number, sources in enumerate(held):
            if sources is None:
                continue
            if cancelled is not None and cancelled.is_set():
                raise given_up()
            parcel, marks = self._parcels[number], []
            lanes = self._lanes.held[number % len(self._lanes.held)]
            for part in parcel.parts:
                lane = lanes[part.device]
                for source in sources:
                    lane.take(part, source, lane.stream)
                marks.append(lane.finish(number, part, ()))
            self._has_asked(marks, parcel, progress)

    def _finish_read(self, count: int, progress: Progress | None) -> None:
        for _ in range(count):
            arrived = self._arrivals.get()
            if arrived is None:
                return
            lanes, parcel = self._lanes.reading[arrived.lane], arrived.parcel
            marks = [
                lanes[part.device].finish(arrived.number, part, taken)
                for part, taken in zip(parcel.parts, arrived.taken, strict=True)
            ]
            self._free.put(arrived.lane)
            self._has_asked(marks, parcel, progress)

    def _has_asked(self, marks: list[Mark], parcel: Parcel, progress: Progress | None) -> None:
        self._asked.append((marks, parcel.plain_bytes))
        if len(self._asked) > LANES:
            self._await_oldest(progress)

    def _await_oldest(self, progress: Progress | None) -> None:
        marks, plain_bytes = self._asked.popleft()
        for mark in marks:
            mark.wait()
        self._done += plain_bytes
        if progress is not None:
            progress(self._done, self._total)

    def _look_for_damage(self, held: Sequence[tuple[Source, ...] | None]) -> None:
        """All devices are through: did one of them find anything?"""
        lanes = [*self._lanes.reading, *self._lanes.held]
        found = {number for lane in (lanes[0] if lanes else ()) for number in lane.kernels.damaged()}
        for number in found:
            if held[number] is not None:
                self._forget(self._parcels[number].extent)
        for number in sorted(found):
            self._name_damage(self._parcels[number], in_tier=held[number] is not None)

    def _name_damage(self, parcel: Parcel, *, in_tier: bool) -> None:
        extent = parcel.extent
        check_again(extent, self._files, self._checker)
        where = "in the DRAM tier" if in_tier else "on the GPU"
        raise HostError(  # and no DamagedError: what is stored is right
            f"bytes of {self._files[extent.file].path} from {extent.offset} on were damaged {where}, not on the disk",
            remedy="Load again; if it comes back, have the memory of this machine and of the GPU tested",
        )


def _do(job: Callable[[], None]) -> None:
    job()
