"""Slabs: large blocks of memory, taken when first needed, in which room is given out and taken back."""

from __future__ import annotations

from typing import NamedTuple

from dormouse.store.pack import aligned
from dormouse.transfer.pinned import PinnedMemory, Pinner


class Room(NamedTuple):
    """`size` bytes from `offset` on, both multiples of a page, in slab number `slab`."""

    slab: int
    offset: int
    size: int


class Slabs:
    """At most `budget` bytes of them. Not for several threads at once."""

    def __init__(self, budget: int, slab_bytes: int, pinner: Pinner | None) -> None:
        self.slab_bytes = min(slab_bytes, budget) // 4096 * 4096
        self.most = budget // self.slab_bytes if self.slab_bytes else 0
        self._pinner = pinner
        self._slabs: list[PinnedMemory] = []
        self._holes: list[Room] = []

    @property
    def taken_bytes(self) -> int:
        """Memory that all slabs take."""
        return len(self._slabs) * self.slab_bytes

    def take(self, length: int) -> Room | None:
        """Room for `length` bytes in the first hole that is large enough, in a new slab if there is none; None when the
        budget is spent. Raises HostError when this machine has no more memory."""
        size = aligned(length)
        if size > self.slab_bytes:
            return None
        hole = next((hole for hole in self._holes if hole.size >= size), None)
        if hole is None:
            if len(self._slabs) >= self.most:
                return None
            self._slabs.append(PinnedMemory(self.slab_bytes, self._pinner))
            hole = Room(len(self._slabs) - 1, 0, self.slab_bytes)
        else:
            self._holes.remove(hole)
        if hole.size > size:
            self._add_hole(Room(hole.slab, hole.offset + size, hole.size - size))
        return Room(hole.slab, hole.offset, size)

    def give(self, room: Room) -> None:
        """Take room back."""
        self._add_hole(room)

    def memory(self, slab: int) -> memoryview:
        """A slab."""
        return self._slabs[slab].view

    def close(self) -> None:
        """Give all memory back; nothing may use it any more. Idempotent."""
        slabs, self._slabs = self._slabs, []
        self._holes.clear()
        for slab in slabs:
            slab.close()

    def _add_hole(self, room: Room) -> None:
        """Holes are in order and never touch each other."""
        begin, end = room.offset, room.offset + room.size
        for hole in [hole for hole in self._holes if hole.slab == room.slab]:
            if hole.offset + hole.size == begin:
                begin = hole.offset
            elif hole.offset == end:
                end = hole.offset + hole.size
            else:
                continue
            self._holes.remove(hole)
        self._holes.append(Room(room.slab, begin, end - begin))
        self._holes.sort()
