"""A budget of bytes in flight, shared by all producers or consumers of one pipeline."""

from __future__ import annotations

import os
import threading

IN_FLIGHT_BYTES = 64 << 20
"""What a pipeline holds at most unless told otherwise."""


def default_threads() -> int:
    """One thread per CPU this process may use, at most 16: beyond that the memory bus is the limit."""
    return min(16, len(os.sched_getaffinity(0)))


class ByteBudget:
    """Counts bytes in flight. `peak` is the most there ever were."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.peak = 0
        self._held = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def take(self, amount: int) -> None:
        """Wait until there is room (an amount over the whole limit has room when nothing else is in flight).
        Raises what `fail` was given."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._has_room(amount))
            self.check()
            self._add(amount)

    def try_take(self, amount: int) -> bool:
        """Take without waiting; False when there is no room."""
        with self._changed:
            if self._has_room(amount):
                self._add(amount)
                return True
            return False

    def force(self, amount: int) -> None:
        """Take even when there is no room: for what must go on lest everybody waits for everybody."""
        with self._changed:
            self._add(amount)

    def give(self, amount: int) -> None:
        """Give back what was taken."""
        with self._changed:
            self._held -= amount
            self._changed.notify_all()

    def check(self) -> None:
        """Raises what `fail` was given, if anything."""
        if self._error is not None:
            raise self._error

    def fail(self, error: BaseException) -> None:
        """From now on every `take` and `check` raises the first error given here."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _has_room(self, amount: int) -> bool:
        return self._held == 0 or self._held + amount <= self.limit

    def _add(self, amount: int) -> None:
        self._held += amount
        self.peak = max(self.peak, self._held)
