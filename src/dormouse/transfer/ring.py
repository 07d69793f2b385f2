"""A ring of slots: blocks of pinned memory that are filled, copied from, and filled again.

A slot is made by the reader that needs it and finds none free, while others read already: making one takes as long as
reading into it. What was free last is taken first, so no more are made than are under way at once.
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
        self._left = min(budget // self.slot_bytes, max(1, most))
        if self._left < 1:
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

    def take(self) -> PinnedMemory | None:
        """A free slot, waited for; None when the load has ended. Raises HostError when there is no memory for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._free or self._left)
            if self._ended:
                return None
            if self._free:
                return self._free.pop()
            self._left -= 1
        slot = self._make(self.slot_bytes)
        with self._changed:
            self.made.append(slot)
        return slot

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
