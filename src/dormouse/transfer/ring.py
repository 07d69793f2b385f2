"""A ring of slots: one block of pinned memory, cut into parts that are filled, copied from, and filled again."""

from __future__ import annotations

import threading

from dormouse.errors import ConfigError
from dormouse.store.pack import aligned


class Ring:
    """Hands out the numbers of free slots. Threads may share it."""

    def __init__(self, budget: int, slot_bytes: int, most: int) -> None:
        """As many slots as fit into `budget` bytes, but `most` at most. Raises ConfigError when none fits."""
        self.slot_bytes = aligned(slot_bytes)
        self.slots = min(budget // self.slot_bytes, max(1, most))
        if self.slots < 1:
            raise ConfigError(
                f"{budget} bytes of pinned memory are too few for a load of chunks that need {self.slot_bytes}",
                remedy="Allow more pinned memory",
            )
        self.peak = 0
        self._free = list(reversed(range(self.slots)))
        self._ended = False
        self._changed = threading.Condition()

    @property
    def size(self) -> int:
        """Of all slots, in bytes."""
        return self.slots * self.slot_bytes

    def take(self) -> int | None:
        """A free slot, waited for; None when the load has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._free)
            if self._ended:
                return None
            slot = self._free.pop()
            self.peak = max(self.peak, self.slots - len(self._free))
            return slot

    def give(self, slot: int) -> None:
        """The slot is free again."""
        with self._changed:
            self._free.append(slot)
            self._changed.notify()

    def end(self) -> None:
        """From now on `take` gives nothing."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
