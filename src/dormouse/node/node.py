"""One host's node: a runner per model, the memory they share, and the state others may read.

    gateway --replica(name)--> Runner --> Replica (decides) --> host service, worker link (do)

The node lives on one event loop. `async with Node(...)` takes the data folder's lock; leaving it ends all workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Self

from dormouse import host_memory
from dormouse.config import DataDir, ModelConfig, ServeConfig
from dormouse.errors import HostError, NotFoundError
from dormouse.node.parts import Catalog, Host, Model, Observer
from dormouse.node.presence import NodeState, hold_lock, publish, withdraw
from dormouse.node.replica import Start, State
from dormouse.node.runner import AbandonedError, Lease, ModelStatus, Runner, Surroundings
from dormouse.schedule.eviction import Resident, plan_eviction

log = logging.getLogger(__name__)

_PUBLISH_INTERVAL = 0.5
_CLOSE_TIMEOUT = 30.0

KeyOf = Callable[[Model, ModelConfig], dict[str, str]]


class Node:
    """All replicas of one host. `start_host` is called once the data folder is this node's alone."""

    def __init__(
        self,
        config: ServeConfig,
        start_host: Callable[[], Awaitable[Host]],
        models: Mapping[str, Model],
        catalog: Catalog,
        key_of: KeyOf,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.models = models
        self.address: str | None = None
        self._config = config
        self._data_dir = DataDir(config.data_dir)
        self._start_host = start_host
        self._catalog = catalog
        self._key_of = key_of
        self._wall_clock = wall_clock
        self.started = wall_clock()
        self._budget = config.memory or int(host_memory.total() * 0.8)
        self._observers: list[Observer] = []
        self._runners: dict[str, Runner] = {}
        self._changed = asyncio.Event()
        self._ending = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._publisher: asyncio.Task[None] | None = None
        self._exits = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as exits:
            exits.enter_context(hold_lock(self._data_dir.create().run))
            host = await self._start_host()
            exits.push_async_callback(host.close)
            around = Surroundings(
                host=host,
                observers=self._observers,
                step_timeout=self._config.start_timeout,
                max_queue=self._config.max_queue,
                make_room=self._make_room,
                changed=self._notify,
                captured=self._retire_older,
                wall_clock=self._wall_clock,
            )
            for name, model in self.models.items():
                self._runners[name] = await self._new_runner(model, around)
            exits.push_async_callback(self._end_workers)
            self._publisher = asyncio.create_task(self._publish(), name="publish")
            self._exits = exits.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._exits.aclose()

    # For the gateway and the command line

    def observe(self, observer: Observer) -> None:
        """Tell `observer` about every start and capture from now on."""
        self._observers.append(observer)

    @contextlib.asynccontextmanager
    async def replica(self, name: str) -> AsyncIterator[Lease]:
        """A ready replica; waits for one. What the lease has not finished is cancelled at the end.

        Raises NotFoundError, BusyError (queue full), StoppingError, and what the last start path raised.
        """
        runner = self._runner(name)
        waiter, lease = await runner.acquire()
        try:
            yield lease
        finally:
            await lease.end()
            runner.release(waiter)

    def statuses(self) -> list[ModelStatus]:
        """All models now, by name."""
        return [self._runners[name].status() for name in sorted(self._runners)]

    async def wake(self, name: str) -> Start:
        """Make the model ready; it then stays for its keep-alive."""
        async with self.replica(name) as lease:
            return lease.start

    async def sleep(self, name: str) -> ModelStatus:
        """Put the model to sleep once no request runs, and wait for it. Raises what kept it from being captured."""
        runner = self._runner(name)
        runner.press()
        while runner.replica.state is not State.ASLEEP:
            await self._changed.wait()
        if (error := runner.missing_snapshot) is not None:
            raise error
        return runner.status()

    # Inside

    async def _new_runner(self, model: Model, around: Surroundings) -> Runner:
        settings = self._config.models.get(model.name, ModelConfig())
        return Runner(
            model,
            settings,
            around,
            key=await asyncio.to_thread(self._key_of, model, settings),
            snapshot_id=await asyncio.to_thread(self._catalog.latest, model.name),
            log_path=self._data_dir.logs / f"{model.name}.log",
        )

    def _runner(self, name: str) -> Runner:
        runner = self._runners.get(name)
        if runner is None:
            near = difflib.get_close_matches(name, self._runners, n=1)
            raise NotFoundError(
                f"the model {name!r} is not served here",
                remedy=f"Did you mean {near[0]!r}?" if near else "See /v1/models for those that are",
            )
        return runner

    async def _make_room(self, runner: Runner) -> None:
        """Wait until the runner's worker fits the budget, putting idle ones to sleep for it. Raises HostError when it
        never can, AbandonedError when nobody waits for it any more."""
        needed = runner.footprint
        if needed > self._budget:
            raise HostError(
                f"model {runner.model.name} needs about {needed >> 20} MiB, the budget is {self._budget >> 20} MiB",
                remedy="Raise `memory`, or serve a smaller model",
            )
        while runner.replica.waiting > 0:
            kept = sum(other.footprint for other in self._runners.values() if self._is_kept(other))
            if needed + kept > self._budget:
                raise HostError(
                    f"model {runner.model.name} needs about {needed >> 20} MiB; models that are kept forever take "
                    f"{kept >> 20} MiB of the budget of {self._budget >> 20} MiB",
                    remedy="Raise `memory`, or give one of them a keep_alive",
                )
            plan = plan_eviction(self._residents(), needed=needed, budget=self._budget)
            if plan.fits:
                runner.admitted = True
                return
            for name in plan.evict:
                log.info("model %s must sleep to make room for %s", name, runner.model.name)
                self._runners[name].press()
            await self._changed.wait()
        raise AbandonedError

    @staticmethod
    def _is_kept(runner: Runner) -> bool:
        """Whether a worker holds memory that only the end of the node gives back."""
        return runner.admitted and runner.replica.kept_forever and runner.replica.state is State.READY

    def _residents(self) -> list[Resident]:
        return [
            Resident(
                name=name,
                bytes=runner.footprint,
                idle_since=None if runner.replica.kept_forever else runner.replica.idle_since,
                leaving=runner.replica.leaving,
            )
            for name, runner in self._runners.items()
            if runner.admitted
        ]

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _retire_older(self, model: str, snapshot_id: str) -> None:
        """Free the space of the snapshots this one replaces, off the loop and off any request's path."""
        task = asyncio.create_task(asyncio.to_thread(self._catalog.drop_older, model, snapshot_id))
        self._tasks.add(task)
        task.add_done_callback(self._retired)

    def _retired(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("older snapshots could not be removed: %s", error)

    async def _publish(self) -> None:
        """Write the state after changes, not more often than the interval, until the node ends."""
        while not self._ending.is_set():
            changed = self._changed
            state = NodeState(os.getpid(), self.started, self.address, self.statuses())
            try:
                await asyncio.to_thread(publish, self._data_dir.run, state)
            except OSError as error:
                log.warning("the node's state was not published: %s", error)
            await changed.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PUBLISH_INTERVAL):
                    await self._ending.wait()

    async def _end_workers(self) -> None:
        for runner in self._runners.values():
            runner.shut_down()
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                while any(runner.replica.state is not State.ASLEEP for runner in self._runners.values()):
                    await self._changed.wait()
        except TimeoutError:
            log.warning("some workers did not stop within %g s; they are killed", _CLOSE_TIMEOUT)
        for runner in self._runners.values():
            await runner.abort()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._ending.set()
        self._notify()
        if self._publisher is not None:
            await self._publisher
        await asyncio.to_thread(withdraw, self._data_dir.run)
