"""Parcels on their way to GPUs: who reads, who asks the devices, who waits for them, and what ends it all.

    the caller's thread: what the DRAM tier holds, and what is read as it is stored (Flow), in order:
                         over the link -> check, decode, place (lane.finish)
    some threads:        what the CPU decodes (Carrier): over the link --arrivals--> the caller's thread: place

A lane is free for the next parcel as soon as its device has been asked for the last step of the one before; the order
on the device does the rest.

The first error of anybody, or a cancel, ends all of them. What was given to a device is not taken back; whoever made
the lanes waits for it before their memory goes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from queue import SimpleQueue
from typing import NamedTuple

from dormouse.errors import HostError
from dormouse.transfer.carrier import Carrier, Flow, Marks, check_again
from dormouse.transfer.crew import Crew, given_up
from dormouse.transfer.device_plan import Packed, Parcel
from dormouse.transfer.gpus import Mark
from dormouse.transfer.lane import Lane, Source
from dormouse.transfer.pieces import Checker
from dormouse.transfer.plan import Extent
from dormouse.transfer.report import Progress
from dormouse.transfer.source_files import SourceFiles

LANES = 2
"""Of each device, for the caller's thread: the bytes of one cross the link while the other decodes."""

DECODED_LANES = 4
"""Of each device, for what the CPU decodes: so many parcels are under way at once."""


class _Arrival(NamedTuple):
    """A parcel that was decoded and sent, into a lane."""

    number: int
    lane: int
    taken: Marks


class Lanes:
    """Those of all devices: `own[n]` has one of each device, for the caller's thread, and `decoded[n]`, for what the
    CPU decodes. They are made while the first bytes are read; who sends waits for that."""

    def __init__(self) -> None:
        self.own: list[list[Lane]] = []
        self.decoded: list[list[Lane]] = []
        self._there = threading.Event()

    def are_there(self) -> None:
        """Let those go on who wait."""
        self._there.set()

    def await_decoded(self, number: int) -> list[Lane]:
        """Raises StoreError when the load ends before there are any."""
        self._there.wait()
        if number >= len(self.decoded):
            raise given_up()
        return self.decoded[number]

    def all(self) -> Iterator[Lane]:
        """Of all devices."""
        return chain.from_iterable((*self.own, *self.decoded))


class Delivery:
    """One load of parcels. `flow` and `carrier` make one: for what is read as it is stored, and for each thread that
    decodes. `forget`: told what was held in memory and is damaged there."""

    def __init__(
        self,
        packed: Packed,
        lanes: Lanes,
        flow: Callable[[Sequence[Parcel]], Flow],
        carrier: Callable[[], Carrier],
        files: SourceFiles,
        checker: Checker,
        forget: Callable[[Extent], None],
    ) -> None:
        self._parcels = packed.parcels
        self._lanes = lanes
        self._new_flow = flow
        self._new_carrier = carrier
        self._files = files
        self._checker = checker
        self._forget = forget
        self._own = threading.local()
        self._arrivals: SimpleQueue[_Arrival | None] = SimpleQueue()
        self._free: SimpleQueue[int | None] = SimpleQueue()
        self._asked: deque[tuple[list[Mark], int]] = deque()
        self.asked_at = 0.0
        """When the devices had been asked for all."""
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
        decoded = [number for number, parcel in enumerate(self._parcels) if parcel.host]
        for number in range(min(DECODED_LANES, len(decoded))):
            self._free.put(number)
        decoders = Crew(
            self._jobs(decoded),
            _do,
            threads=min(threads, len(decoded)),
            name="read",
            cancelled=cancelled,
            on_failure=self._end,
        )
        with decoders, self._flow(held) as flow:
            flow.read_ahead()
            prepare()
            self._lanes.are_there()
            self._finish_own(held, flow, progress, cancelled)
            self._finish_decoded(len(decoded), progress)
            decoders.wait()
        self.asked_at = time.perf_counter()
        while self._asked:
            self._await_oldest(progress)
        for lane in self._lanes.all():
            lane.drain()
        self._look_for_damage(held)

    def _flow(self, held: Sequence[tuple[Source, ...] | None]) -> Flow:
        read = zip(self._parcels, held, strict=True)
        return self._new_flow([parcel for parcel, sources in read if sources is None and not parcel.host])

    def _end(self, _error: BaseException) -> None:
        self._free.put(None)
        self._arrivals.put(None)
        self._lanes.are_there()

    # What the threads do that decode

    def _jobs(self, decoded: Sequence[int]) -> Iterator[Callable[[], None]]:
        for number in decoded:
            lane = self._free.get()
            if lane is None:
                return
            yield partial(self._decode, number, lane)

    def _decode(self, number: int, lane: int) -> None:
        carrier: Carrier | None = getattr(self._own, "carrier", None)
        if carrier is None:
            carrier = self._own.carrier = self._new_carrier()
        taken = carrier.carry(self._parcels[number], partial(self._lanes.await_decoded, lane))
        self._arrivals.put(_Arrival(number, lane, taken))

    # What the caller's thread does

    def _finish_own(
        self,
        held: Sequence[tuple[Source, ...] | None],
        flow: Flow,
        progress: Progress | None,
        cancelled: threading.Event | None,
    ) -> None:
        own = (number for number, parcel in enumerate(self._parcels) if not parcel.host)
        for turn, number in enumerate(own):
            if cancelled is not None and cancelled.is_set():
                raise given_up()
            parcel, sources = self._parcels[number], held[number]
            lanes = self._lanes.own[turn % len(self._lanes.own)]
            if sources is None:
                taken = flow.bring(parcel, lanes)
            else:
                taken = [[lanes[part.device].fetch(part, source) for source in sources] for part in parcel.parts]
            self._finish(number, lanes, taken, progress)

    def _finish_decoded(self, count: int, progress: Progress | None) -> None:
        for _ in range(count):
            arrival = self._arrivals.get()
            if arrival is None:
                return
            self._finish(arrival.number, self._lanes.decoded[arrival.lane], arrival.taken, progress)
            self._free.put(arrival.lane)

    def _finish(self, number: int, lanes: Sequence[Lane], taken: Marks, progress: Progress | None) -> None:
        parcel = self._parcels[number]
        parts = zip(parcel.parts, taken, strict=True)
        marks = [lanes[part.device].finish(number, part, come) for part, come in parts]
        self._has_asked(marks, parcel, progress)

    def _has_asked(self, marks: list[Mark], parcel: Parcel, progress: Progress | None) -> None:
        self._asked.append((marks, parcel.plain_bytes))
        if len(self._asked) > 2 * LANES:
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
        lanes = [*self._lanes.own, *self._lanes.decoded]
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
