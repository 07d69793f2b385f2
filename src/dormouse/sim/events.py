"""The clock of a simulation: what happens next, in order of time and, at one time, in the order it was planned.

    at(time, call, *arguments) -> Event;  step() calls the next one and moves `now` there

An event that was cancelled stays in the queue and does nothing. Time never goes back: planning something for the past
is an error of the simulator.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any


class Event:
    """Something planned. `call` is None when it was cancelled or has happened."""

    __slots__ = ("arguments", "call")

    def __init__(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.call: Callable[..., None] | None = call
        self.arguments = arguments

    def cancel(self) -> None:
        self.call = None


class Clock:
    """Simulated time in seconds since the start of the run."""

    __slots__ = ("_count", "_queue", "happened", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self.happened = 0
        self._count = 0
        self._queue: list[tuple[float, int, Event]] = []

    def at(self, time: float, call: Callable[..., None], *arguments: Any) -> Event:
        """Plan a call. Raises ValueError for a time that has passed or is no number."""
        if not time >= self.now:
            raise ValueError(f"an event at {time} is planned when it is {self.now} already")
        event = Event(call, arguments)
        self._count += 1
        heapq.heappush(self._queue, (time, self._count, event))
        return event

    def next_time(self) -> float:
        """When the next event is due; infinity when there is none."""
        queue = self._queue
        while queue and queue[0][2].call is None:
            heapq.heappop(queue)
        return queue[0][0] if queue else math.inf

    def advance(self, time: float) -> None:
        """Run everything due until `time`, then make it that time."""
        queue = self._queue
        while queue and queue[0][0] <= time:
            due, _order, event = heapq.heappop(queue)
            call = event.call
            if call is None:
                continue
            self.now = due
            self.happened += 1
            event.call = None
            call(*event.arguments)
        if math.isfinite(time):
            self.now = max(self.now, time)
