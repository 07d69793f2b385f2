"""Adapters on a node: which names are served, and which of them a worker has.

    load(name) -> Shelf: served from now on, asleep or awake ----+
    request of name -> lease on the base's worker -> Fitting.need: segment from the host service -> filled -> worker

A worker gets an adapter when somebody asks for it, once, however many ask. It loses all of them when it is parked or
ends; the shelf knows them still, so the next request loads its adapter again. To unload is to take the name away at
once, to wait for the requests that run, and then to tell the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dormouse.checkpoint.adapters import ImportedAdapter
from dormouse.errors import DormouseError, EngineError, NotFoundError, RequestError
from dormouse.node.link import WorkerLink
from dormouse.node.parts import Host, Observer
from dormouse.snapshot.service import WorkerHandle
from dormouse.transfer.handles import SegmentHandle, await_report

log = logging.getLogger(__name__)

OpenAdapter = Callable[[str], ImportedAdapter]
"""Opens the imported adapter of a name, which is known to fit its base. Blocks. Raises NotFoundError, ConfigError,
DamagedError."""

MAX_ADAPTERS = 64
"""The most adapters of one model at a time."""


@dataclass(eq=False)
class Served:
    """An adapter under the name that clients use; workers know it by `key`, which no other loading ever has. `users`
    are the requests that have come and not ended."""

    name: str
    adapter: ImportedAdapter
    key: str
    users: int = 0
    leaving: bool = False
    unused: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.unused.set()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Around a request: it is not unloaded before its end. Raises NotFoundError when it is on its way out."""
        if self.leaving:
            raise NotFoundError(f"the adapter {self.name!r} is being unloaded", remedy="Load it again afterwards")
        self.users += 1
        self.unused.clear()
        try:
            yield
        finally:
            self.users -= 1
            if not self.users:
                self.unused.set()


class Shelf:
    """The adapters that are served, by name."""

    def __init__(self) -> None:
        self._served: dict[str, Served] = {}
        self._numbers = itertools.count(1)

    def all(self) -> list[Served]:
        """Those that a request may name, by name."""
        return [self._served[name] for name in sorted(self._served) if not self._served[name].leaving]

    def get(self, name: str) -> Served | None:
        """The adapter of that name, also when it is on its way out."""
        return self._served.get(name)

    def add(self, name: str, adapter: ImportedAdapter) -> Served:
        """Serve one more. Raises RequestError when the name is taken or there are too many."""
        if name in self._served:
            raise RequestError(
                f"the adapter {name!r} has already been loaded",
                param="lora_name",
                reason="adapter_loaded",
                remedy="Unload it first, or choose another name",
            )
        if sum(served.adapter.base == adapter.base for served in self._served.values()) >= MAX_ADAPTERS:
            raise RequestError(
                f"{adapter.base} has {MAX_ADAPTERS} adapters already",
                param="lora_name",
                reason="too_many_adapters",
                remedy="Unload one first",
            )
        served = self._served[name] = Served(name, adapter, f"{name}#{next(self._numbers)}")
        return served

    def is_shared(self, served: Served) -> bool:
        """Whether the same imported adapter has another name, too."""
        same = (other for other in self._served.values() if other.adapter.checkpoint == served.adapter.checkpoint)
        return any(other is not served for other in same)

    def remove(self, served: Served) -> None:
        """Forget it."""
        if self._served.get(served.name) is served:
            del self._served[served.name]


class Fitting:
    """The adapters of one worker, from its start to its end. `copies`: it has a copy of each on its device, and gives
    the segment back."""

    def __init__(
        self, host: Host, worker: WorkerHandle, link: WorkerLink, observers: list[Observer], *, copies: bool
    ) -> None:
        self._copies = copies
        self._host = host
        self._worker = worker
        self._link = link
        self._observers = observers
        self._there: dict[Served, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    async def need(self, served: Served) -> None:
        """Have the adapter in the worker. The caller holds a lease; if it goes away, the loading goes on. Raises what
        kept it from being loaded."""
        task = self._there.get(served)
        if task is None:
            task = self._there[served] = asyncio.create_task(self._load(served), name=f"adapter {served.name}")
            task.add_done_callback(lambda done: self._forget_failed(served, done))
        await asyncio.wait([task])
        if task.cancelled():
            raise EngineError(f"the worker of {served.adapter.base} was stopped", remedy="Try again")
        task.result()

    async def drop(self, served: Served) -> None:
        """Have it no more. No request of it runs. Raises what kept the worker from letting it go."""
        task = self._there.pop(served, None)
        if task is None:
            return
        leaving = asyncio.create_task(self._unload(served, task), name=f"unload {served.name}")
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)
        await asyncio.wait([leaving])
        if not leaving.cancelled():  # else the worker has ended, and nothing is left of it
            leaving.result()

    async def settle(self) -> None:
        """Wait until nothing is being loaded or unloaded, successfully or not: before the worker is parked."""
        while tasks := [task for task in (*self._there.values(), *self._leaving) if not task.done()]:
            await asyncio.wait(tasks)

    def taken_away(self) -> None:
        """The worker has been parked: it has no adapters now."""
        self._there.clear()

    async def close(self) -> None:
        """Give up what is under way; the worker ends."""
        tasks = {*self._there.values(), *self._leaving}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget_failed(self, served: Served, task: asyncio.Task[None]) -> None:
        if (task.cancelled() or task.exception() is not None) and self._there.get(served) is task:
            del self._there[served]

    async def _load(self, served: Served) -> None:
        began = time.perf_counter()
        adapter = served.adapter
        try:
            handle = await self._host.take_segment(self._worker, adapter.checkpoint)
            try:
                await _filled(handle)
                await self._link.load_adapter(served.key, adapter, handle)
            finally:
                handle.close()
            if self._copies:  # else it would stand in the host's memory beside no budget
                await self._host.drop_segment(self._worker, adapter.checkpoint, keep=True)
        except DormouseError as error:
            log.warning("adapter %s of model %s was not loaded: %s", served.name, adapter.base, error)
            for observer in self._observers:
                observer.adapter_failed(adapter.base, adapter.name, error)
            raise
        seconds = time.perf_counter() - began
        log.info("adapter %s (%s) of model %s is loaded: %.3f s", served.name, adapter.name, adapter.base, seconds)
        for observer in self._observers:
            observer.adapter_loaded(adapter.base, adapter.name, seconds)

    async def _unload(self, served: Served, loading: asyncio.Task[None]) -> None:
        await asyncio.wait([loading])
        if loading.cancelled() or loading.exception() is not None:
            return
        try:
            await self._link.unload_adapter(served.key)
        except DormouseError:
            if self._link.lost is None:  # else it has ended with the worker
                raise
        log.info("adapter %s of model %s is unloaded", served.name, served.adapter.base)


async def _filled(handle: SegmentHandle) -> None:
    """Wait until a segment is filled, without holding up the loop. Raises what the filling failed with."""
    if handle.report is None:
        return
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    loop.add_reader(handle.report, told.set)
    try:
        await told.wait()
    finally:
        loop.remove_reader(handle.report)
    await_report(handle.report)
    handle.forget_report()
