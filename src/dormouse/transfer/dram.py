"""The DRAM tier: chunks that are held in this machine's memory as they are stored, coded, so that the way to a GPU is
the link alone and the tier holds more models than their plain bytes would allow.

    hold(plan): extents that are not here yet -> read into slabs, checked -> known by their chunks
    borrow(extents) -> where each extent's bytes are (they stay there until the block ends) -> load_device

    keep(what was worked out for a load of what is all here) -> kept(): the next such load, with nothing to work out

Chunks are known by digest, so plans that cut a model differently find each other's. What was used longest ago makes
room, extent by extent, unless somebody is using it. Slabs are pinned once, for all GPUs, and used again and again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from dormouse.errors import BusyError, StoreError
from dormouse.store.chunk import Digest
from dormouse.store.pack import aligned
from dormouse.transfer.budget import default_threads
from dormouse.transfer.crew import Crew
from dormouse.transfer.pieces import Checker
from dormouse.transfer.pinned import CudaPinner, Pinner
from dormouse.transfer.plan import EXTENT_BYTES, Extent, LoadPlan, Piece
from dormouse.transfer.slabs import Room, Slabs
from dormouse.transfer.source_files import SourceFiles, room_for

if TYPE_CHECKING:
    from dormouse.store.key import Key

log = logging.getLogger(__name__)

SLAB_BYTES = 8 * EXTENT_BYTES
_KEPT = 64  # loads that are kept worked out: a few MB of objects, and of a GPU's memory, each

_Name = tuple[Digest, int, int]  # a chunk in one of its codings: digest, codec, stored length


class HeldRun(NamedTuple):
    """Where the bytes `begin` to `end` of an extent are: in `memory` from `offset` on."""

    begin: int
    end: int
    memory: memoryview
    offset: int


class Lent(NamedTuple):
    """`found`: where the bytes of each extent are, None where not all of it is held. `runs`: what they came in as, and
    `state`: that of the tier when it was asked."""

    found: list[tuple[HeldRun, ...] | None]
    runs: frozenset[int]
    state: int


class HoldReport(NamedTuple):
    """`stored_bytes`: of the plan's chunks, all of which are held now; `read_bytes`: of those that were not before."""

    stored_bytes: int
    read_bytes: int


class _Place(NamedTuple):
    """Where a chunk begins in a slab, and the run it came with."""

    run: int
    slab: int
    offset: int


@dataclass
class _Run:
    """What came in as one extent and goes as one. `names`: of the chunks that are known to be here; `users`: borrowers
    just now."""

    room: Room
    names: set[_Name] = field(default_factory=set)
    users: int = 0


class _Kept(NamedTuple):
    """What was worked out, and the runs it says the places of."""

    value: Any
    runs: frozenset[int]


class DramTier:
    """A pool of at most `budget_bytes`, by many threads used at once. `pin`: for GPUs. Close it when done."""

    def __init__(
        self, budget_bytes: int, pin: bool, *, slab_bytes: int = SLAB_BYTES, pinner: Pinner | None = None
    ) -> None:
        self.budget_bytes = budget_bytes
        self._slabs = Slabs(budget_bytes, slab_bytes, (pinner or CudaPinner()) if pin else None)
        self._runs: OrderedDict[int, _Run] = OrderedDict()
        self._places: dict[_Name, _Place] = {}
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._state = 0  # another one whenever a chunk is not where it was
        self._next = 0
        self._closed = False
        self._lock = threading.RLock()
        self._holding = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def held_bytes(self) -> int:
        """Memory of all that is held."""
        with self._lock:
            return sum(run.room.size for run in self._runs.values())

    @property
    def taken_bytes(self) -> int:
        """Memory of all slabs, never more than the budget."""
        with self._lock:
            return self._slabs.taken_bytes

    def close(self) -> None:
        """Let go of everything. Raises BusyError while something is borrowed. Idempotent."""
        with self._holding, self._lock:
            if self._in_use:
                raise BusyError("the DRAM tier is in use by a load", retry_after=1.0, remedy="End the load first")
            self._closed = True
            self._kept.clear()
            self._runs.clear()
            self._places.clear()
            self._slabs.close()

    def hold(
        self,
        plan: LoadPlan,
        key: Key,
        *,
        threads: int | None = None,
        cancelled: threading.Event | None = None,
    ) -> HoldReport:
        """Bring in all chunks of a plan that are not here, each checked once. Plain bytes that are in no chunk have no
        name and are not held. Raises DamagedError, BusyError when what is in use leaves no room, StoreError when the
        plan is larger than the tier or `cancelled` is set, HostError when there is no memory; what came in before an
        error stays.
        """
        wanted = [extent for extent in plan.extents if any(piece.chunk for piece in extent.pieces)]
        rooms = [aligned(_room_for(extent)) for extent in wanted]
        if sum(rooms) > self._slabs.most * self._slabs.slab_bytes or max(rooms, default=0) > self._slabs.slab_bytes:
            raise self._too_large(plan)
        with self._holding:
            try:
                return self._hold(plan, wanted, key, threads, cancelled)
            except BusyError:
                if self._in_use:
                    raise
            # Only this plan's own extents are left, and what is free between them is too small. They come in again,
            # one after the other.
            self._clear()
            try:
                return self._hold(plan, wanted, key, threads, cancelled)
            except BusyError:
                if self._in_use:
                    raise
                raise self._too_large(plan) from None

    def _too_large(self, plan: LoadPlan) -> StoreError:
        room = self._slabs.most * self._slabs.slab_bytes
        return StoreError(
            f"{plan.stored_bytes} bytes of chunks do not fit into the {self.budget_bytes} of the DRAM tier, which come"
            f" to {room} in slabs of {self._slabs.slab_bytes}",
            remedy="Give the tier a larger budget",
        )

    @property
    def _in_use(self) -> bool:
        with self._lock:
            return any(run.users for run in self._runs.values())

    def _clear(self) -> None:
        """Let go of all that nobody uses."""
        with self._lock:
            for number in [number for number, run in self._runs.items() if run.users == 0]:
                self._drop(number)

    def _hold(
        self,
        plan: LoadPlan,
        wanted: Sequence[Extent],
        key: Key,
        threads: int | None,
        cancelled: threading.Event | None,
    ) -> HoldReport:
        with contextlib.ExitStack() as stack:
            found = stack.enter_context(self.borrow(wanted))  # lest they make room for the others
            missing = [extent for extent, runs in zip(wanted, found, strict=True) if runs is None]
            files = stack.enter_context(SourceFiles(plan.files, ours=plan.ours))
            fetch = _Fetch(self, files, Checker(plan.files, key))
            stack.callback(fetch.release)
            workers = threads or default_threads()
            with Crew(missing, fetch.extent, threads=workers, name="hold", cancelled=cancelled) as crew:
                crew.wait()
        read = sum(extent.length for extent in missing)
        return HoldReport(sum(extent.length for extent in wanted), read)

    @contextlib.contextmanager
    def borrow(self, extents: Sequence[Extent]) -> Iterator[list[tuple[HeldRun, ...] | None]]:
        """Where the bytes of each extent are, None where not all of it is held. They stay there until the block
        ends."""
        with self.lend(extents) as lent:
            yield lent.found

    @contextlib.contextmanager
    def lend(self, extents: Sequence[Extent]) -> Iterator[Lent]:
        """What `borrow` does, with what `keep` has to know."""
        with self._lock:
            found = [self._find(extent) for extent in extents]
            used = frozenset(place.run for places in found for place in places or ())
            self._use(used)
            runs = [
                None if places is None else tuple(self._joined(extent, places))
                for extent, places in zip(extents, found, strict=True)
            ]
            lent = Lent(runs, used, self._state)
        try:
            yield lent
        finally:
            self.release(used)

    def keep(self, name: Hashable, value: Any, lent: Lent) -> None:
        """Keep what was worked out with what is lent, until one of its chunks is not there any more or the place is
        needed for others. Nothing is kept when a chunk has moved since."""
        with self._lock:
            if self._closed or self._state != lent.state:
                return
            self._kept[name] = _Kept(value, lent.runs)
            self._kept.move_to_end(name)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)

    @contextlib.contextmanager
    def kept(self, name: Hashable) -> Iterator[Any]:
        """What is kept under a name, None for nothing. All its chunks stay where they are until the block ends."""
        with self._lock:
            kept = self._kept.get(name)
            if kept is not None:
                self._kept.move_to_end(name)
                self._use(kept.runs)
        try:
            yield None if kept is None else kept.value
        finally:
            if kept is not None:
                self.release(kept.runs)

    def _use(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._runs[number].users += 1
            self._runs.move_to_end(number)

    def _changed(self, number: int) -> None:
        """Not all chunks of this run are to be found there any more."""
        self._state += 1
        for name in [name for name, kept in self._kept.items() if number in kept.runs]:
            del self._kept[name]

    def release(self, numbers: Iterable[int]) -> None:
        """These runs are used by one less."""
        with self._lock:
            for number in numbers:
                self._runs[number].users -= 1

    def _find(self, extent: Extent) -> list[_Place] | None:
        places = [self._places.get(_name(piece)) if piece.chunk else None for piece in extent.pieces]
        found = [place for place in places if place is not None]
        return found if len(found) == len(places) else None

    def _joined(self, extent: Extent, places: Sequence[_Place]) -> Iterator[HeldRun]:
        """Neighbours that lie in a slab as they do in the extent are one run, gaps between them included."""
        begin = end = slab = shift = -1
        for piece, place in zip(extent.pieces, places, strict=True):
            low = piece.offset - extent.offset
            if begin >= 0 and (place.slab, place.offset - low) == (slab, shift):
                end = low + piece.stored_length
                continue
            if begin >= 0:
                yield HeldRun(begin, end, self._slabs.memory(slab), begin + shift)
            begin, end, slab, shift = low, low + piece.stored_length, place.slab, place.offset - low
        if begin >= 0:
            yield HeldRun(begin, end, self._slabs.memory(slab), begin + shift)

    def make_room(self, length: int) -> tuple[Room, memoryview]:
        """Room for so many bytes, in place of what was used longest ago. Raises BusyError, HostError."""
        with self._lock:
            if self._closed:
                raise StoreError("the DRAM tier is closed")
            while (room := self._slabs.take(length)) is None:
                self._evict()
            return room, self._slabs.memory(room.slab)[room.offset : room.offset + room.size]

    def give_room(self, room: Room) -> None:
        """Nothing came into it."""
        with self._lock:
            self._slabs.give(room)

    def add(self, room: Room, offset: int, extent: Extent) -> int:
        """An extent has come in, and is right: its bytes begin at `offset` of the slab. It is in use until
        `release`."""
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._runs[number] = _Run(room, users=1)
            for piece in extent.pieces:
                if piece.chunk is not None:
                    at = offset + piece.offset - extent.offset
                    self._name_place(_name(piece), _Place(number, room.slab, at))
            return number

    def _name_place(self, name: _Name, place: _Place) -> None:
        """A chunk is known by its newest place: an older one makes room first."""
        before = self._places.get(name)
        if before is not None:
            self._runs[before.run].names.discard(name)
            self._changed(before.run)
        self._places[name] = place
        self._runs[place.run].names.add(name)

    def _evict(self) -> None:
        number = next((number for number, run in self._runs.items() if run.users == 0), None)
        if number is None:
            raise BusyError(
                "the DRAM tier has no room: all it holds is in use",
                retry_after=1.0,
                remedy="Try again when a load has ended, or give the tier a larger budget",
            )
        self._drop(number)

    def forget(self, extent: Extent) -> None:
        """Its chunks are not what they were when they came in: nobody finds them here any more."""
        with self._lock:
            for piece in extent.pieces:
                place = self._places.pop(_name(piece), None) if piece.chunk else None
                if place is not None:
                    self._runs[place.run].names.discard(_name(piece))
                    self._changed(place.run)

    def _drop(self, number: int) -> None:
        run = self._runs.pop(number)
        self._changed(number)
        for name in run.names:
            del self._places[name]
        self._slabs.give(run.room)
        log.debug("%d bytes made room in the DRAM tier", run.room.size)


class _Fetch:
    """Brings extents of one plan in."""

    def __init__(self, tier: DramTier, files: SourceFiles, checker: Checker) -> None:
        self._tier = tier
        self._files = files
        self._checker = checker
        self._added: set[int] = set()
        self._lock = threading.Lock()

    def extent(self, extent: Extent) -> None:
        """Read and check one."""
        room, memory = self._tier.make_room(_room_for(extent))
        try:
            offset = room.offset + self._read(extent, memory)
        except BaseException:
            self._tier.give_room(room)
            raise
        number = self._tier.add(room, offset, extent)
        with self._lock:
            self._added.add(number)

    def release(self) -> None:
        """From now on what came in may make room again."""
        self._tier.release(self._added)

    def _read(self, extent: Extent, memory: memoryview) -> int:
        """Where in `memory` its bytes begin."""
        file = self._files[extent.file]
        direct = file.prefers_direct(extent.offset, extent.length)
        stored = file.read_around(memory, extent.offset, extent.length, direct=direct)
        for piece in extent.pieces:
            begin = piece.offset - extent.offset
            self._checker.check(piece, stored[begin : begin + piece.stored_length])
        return file.lead(extent.offset, direct=direct)


def _room_for(extent: Extent) -> int:
    return room_for(extent.offset, extent.length)


def _name(piece: Piece) -> _Name:
    assert piece.chunk is not None
    return piece.chunk.digest, piece.codec, piece.stored_length
