"""A crew: threads that take the next item of one queue until none is left, one of them has failed, or nobody needs the
result any more. The first error ends all and is raised to who waits; no thread outlives the crew."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Self, TypeVar

from dormouse.errors import HostError, StoreError

Item = TypeVar("Item")


class Crew(Generic[Item]):
    """A context manager: starts the threads, and joins them at the end. `items` are taken by one thread at a time,
    which may have to wait for one. `on_failure` is called once, by the thread that failed first, and must free who
    waits for anything that the crew would have done, and for an item."""

    def __init__(
        self,
        items: Iterable[Item],
        work: Callable[[Item], None],
        *,
        threads: int,
        name: str,
        cancelled: threading.Event | None = None,
        on_failure: Callable[[BaseException], None] = lambda _error: None,
    ) -> None:
        self._items: Iterator[Item] = iter(items)
        self._work = work
        self._name = name
        self._cancelled = cancelled
        self._on_failure = on_failure
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._turn = threading.Lock()  # another one: taking an item may wait, and a failure must not wait for that
        self._threads = [threading.Thread(target=self._run, name=f"{name} {n}", daemon=True) for n in range(threads)]
        self._started: list[threading.Thread] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            try:
                thread.start()
            except RuntimeError as error:
                self.fail(HostError(f"no thread could be started to {self._name}: {error}"))
                break
            self._started.append(thread)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            self.fail(error)
        self._join()

    def wait(self) -> None:
        """Until all is done. Raises the first error, which holds on to nothing that the threads had in hands."""
        self._join()
        error, self._error = self._error, None
        if error is not None:
            clear_frames(error)
            try:
                raise error
            finally:
                del error

    def fail(self, error: BaseException) -> None:
        """End all with this error, unless there is one already."""
        with self._lock:
            first, self._error = self._error is None, self._error or error
        if first:
            self._on_failure(error)

    def _join(self) -> None:
        for thread in self._started:
            thread.join()

    def _run(self) -> None:
        try:
            while (item := self._take()) is not None:
                self._work(item)
        except BaseException as error:  # noqa: BLE001 (it is raised to who waits)
            self.fail(error)

    def _take(self) -> Item | None:
        if self._cancelled is not None and self._cancelled.is_set():
            self.fail(given_up())
        with self._turn:
            return None if self._error is not None else next(self._items, None)


def clear_frames(error: BaseException | None) -> None:
    """Drop what the functions that an error left had in their variables: buffers, memory of a device."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def given_up() -> StoreError:
    """The error of a load that was cancelled."""
    return StoreError("the load was given up: it is not needed any more")
