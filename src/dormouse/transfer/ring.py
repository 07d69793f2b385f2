"""A ring of slots: blocks of pinned memory that are filled, copied from, and filled again.

Slots are made by the readers that wait for one, while others read already, because making one takes as long as reading
into it. What was free last is taken first, and none is made while one is free.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from dormouse.errors import ConfigError
from dormouse.store.pack import aligned
from dormouse.transfer.pinned import PinnedMemory


class Ring:
    """Hands out free slots. Threads may share it."""

    def __init__(self, budget: int, slot_bytes: int, most: int, make: Callable[[int], PinnedMemory]) -> None:
        """As many slots as fit into `budget` bytes, but `most` at most. Raises ConfigError when none fits."""
        self.slot_bytes = aligned(slot_bytes)
        self.made: list[PinnedMemory] = []
        self._left = self._most = min(budget // self.slot_bytes, max(1, most))
        if self._most < 1:
            raise ConfigError(
                f"{budget} bytes of pinned memory are too few for a load of chunks that need {self.slot_bytes}",
                remedy="Allow more pinned memory",
            )
        self._make = make
        self._free: list[PinnedMemory] = []
        self._ended = False
        self._changed = threading.Condition()

    @property
    def peak_bytes(self) -> int:
        """The most that was under way at once."""
        return len(self.made) * self.slot_bytes

    @property
    def most(self) -> int:
        """How many slots may be made."""
        return self._most

    def reserve(self, needed: int) -> bool:
        """Whether one more slot is to be made, since none is free and there is room for it; beyond the `needed` ones
        one at a time, for a free one may come sooner. Who is told so must call `make`."""
        with self._changed:
            making = self._most - self._left - len(self.made)
            if self._ended or self._free or not self._left or (making and len(self.made) + making >= needed):
                return False
            self._left -= 1
            return True

    def make(self) -> None:
        """Make a slot that was reserved; it is free then. Raises HostError when there is no memory for it."""
        slot = self._make(self.slot_bytes)
        with self._changed:
            self.made.append(slot)
        self.give(slot)

    def take(self) -> PinnedMemory | None:
        """A free slot, waited for; None when the load has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._free)
            return None if self._ended else self._free.pop()

    def give(self, slot: PinnedMemory) -> None:
        """The slot is free again."""
        with self._changed:
            self._free.append(slot)
            self._changed.notify()

    def end(self) -> None:
        """From now on `take` gives nothing."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
