"""The thread that runs an engine's steps: takes requests and cancellations in, sleeps when there is nothing to do.

    worker's main thread --post--> [bounded queue] --> loop thread: step(commands) -> step(...) -> ... -> idle

The thread waits on a condition without a timeout, so an idle or parked engine uses no CPU at all, and after `park` has
returned no instruction of the engine runs until `unpark`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from dormouse.errors import BusyError, EngineError

MAX_POSTED = 4096

T = TypeVar("T")
log = logging.getLogger(__name__)


class Loop(Generic[T]):
    """Owns one thread. `step(commands)` applies the commands, does one step of work and tells whether there is more;
    `fail(error)` is called on the same thread when a step raised: it must leave the engine idle and usable."""

    def __init__(self, step: Callable[[list[T]], bool], fail: Callable[[Exception], None]) -> None:
        self._step = step
        self._fail = fail
        self._changed = threading.Condition()
        self._posted: list[T] = []
        self._working = False
        self._parked = False
        self._closed = False
        self._broken: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def post(self, command: T) -> None:
        """Hand a command to the thread. Raises BusyError when too many wait, EngineError when the thread has died."""
        with self._changed:
            self._check()
            if len(self._posted) >= MAX_POSTED:
                raise BusyError(f"{MAX_POSTED} requests wait for the engine already", retry_after=1)
            self._posted.append(command)
            self._changed.notify_all()

    def park(self) -> None:
        """Wait until all work is done, then keep the thread asleep. Raises EngineError when it has died."""
        with self._changed:
            self._changed.wait_for(lambda: self._broken or not (self._posted or self._working))
            self._check()
            self._parked = True

    def unpark(self) -> None:
        with self._changed:
            self._parked = False
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread after the step it is in."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _check(self) -> None:
        if self._broken is not None:
            raise EngineError(f"the engine has broken: {self._broken}", remedy="Restart the worker")

    def _run(self) -> None:
        try:
            while (commands := self._take()) is not None:
                self._step_once(commands)
                del commands  # what they refer to must not be held while the thread sleeps
        except Exception as error:
            log.exception("the engine's thread ends")
            with self._changed:
                self._broken = error
                self._changed.notify_all()

    def _take(self) -> list[T] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (not self._parked and (self._posted or self._working)))
            if self._closed:
                return None
            commands, self._posted = self._posted, []
            self._working = True
            return commands

    def _step_once(self, commands: list[T]) -> None:
        try:
            more = self._step(commands)
        except Exception as error:
            log.exception("a step of the engine failed")
            self._fail(error)
            more = False
        with self._changed:
            self._working = more
            self._changed.notify_all()
