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
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from dormouse.config import ModelConfig, ServeConfig
from dormouse.data_dir import DataDir
from dormouse.errors import ConfigError, DormouseError, HostError, NotFoundError, RequestError, SnapshotError
from dormouse.node.adapters import OpenAdapter, Served, Shelf
from dormouse.node.history import History
from dormouse.node.memory import allotted, budget, context_bytes, engine_bytes, gpu_budget
from dormouse.node.parts import Catalog, Evicted, Host, Model, Observer
from dormouse.node.presence import ModelStatus, NodeState, hold_lock, publish, withdraw
from dormouse.node.replica import Offer, OfferTemplate, Start, State, Withdraw
from dormouse.node.runner import AbandonedError, Lease, Runner, Surroundings
from dormouse.node.templates import Templates, TemplateSpec, spec_of
from dormouse.schedule.dozing import displaced, may_stay
from dormouse.schedule.eviction import Dozer, Plan, Resident, plan_eviction
from dormouse.snapshot.capture import SNAPSHOT_KIND, TEMPLATE_KIND
from dormouse.trace import Operation

log = logging.getLogger(__name__)

_PUBLISH_INTERVAL = 0.5
_CLOSE_TIMEOUT = 30.0

KeyOf = Callable[[Model, ModelConfig], dict[str, str]]
TemplateKeyOf = Callable[[TemplateSpec], dict[str, str]]


class Node:
    """All replicas of one host. `start_host` is called once the data folder is this node's alone."""

    def __init__(
        self,
        config: ServeConfig,
        start_host: Callable[[], Awaitable[Host]],
        models: Mapping[str, Model],
        catalog: Catalog,
        key_of: KeyOf,
        template_key_of: TemplateKeyOf,
        *,
        open_adapter: OpenAdapter,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.models = models
        self.address: str | None = None
        self._config = config
        self._data_dir = DataDir(config.data_dir)
        self._start_host = start_host
        self._catalog = catalog
        self._key_of = key_of
        self._template_key_of = template_key_of
        self._open_adapter = open_adapter
        self._shelf = Shelf()
        self._wall_clock = wall_clock
        self.started = wall_clock()
        self._budget = budget(config)
        self._sleep_limit = allotted(config.sleep_memory, self._budget)
        self._gpu_budgets: dict[str, int] = {}
        self._in_need: dict[Runner, int] = {}
        self._host: Host | None = None
        self._history = History(wall_clock)
        self._observers: list[Observer] = [self._history]
        self._runners: dict[str, Runner] = {}
        self._specs: dict[str, TemplateSpec | None] = {}
        self._templates: Templates | None = None
        self._changed = asyncio.Event()
        self._ending = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._publisher: asyncio.Task[None] | None = None
        self._exits = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as exits:
            exits.enter_context(hold_lock(self._data_dir.create().run))
            host = self._host = await self._start_host()
            exits.push_async_callback(host.close)
            around = Surroundings(
                host=host,
                observers=self._observers,
                step_timeout=self._config.start_timeout,
                max_queue=self._config.max_queue,
                processes_stay=self._sleep_limit > 0,
                make_room=self._make_room,
                may_doze=self._may_doze,
                dozed=lambda: asyncio.get_running_loop().call_soon(self._displace),
                changed=self._notify,
                captured=self._retire_older,
                quarantine=self._quarantine,
                discard=self._discard,
                wall_clock=self._wall_clock,
            )
            for name, model in self.models.items():
                self._runners[name] = await self._new_runner(model, around)
            for name, settings in self._config.models.items():
                await self._serve_adapters(name, settings.adapters)
            exits.push_async_callback(self._end_workers)
            self._templates = await self._find_templates(host)
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
        """A ready replica of a model, or of an adapter's base, with the adapter; waits for one. What the lease has not
        finished is cancelled at the end.

        Raises NotFoundError, BusyError (queue full), StoppingError, what the last start path raised, and what kept the
        adapter from being loaded.
        """
        served = self._shelf.get(name)
        with served.in_use() if served is not None else contextlib.nullcontext():
            runner = self._runner(served.adapter.base if served is not None else name)
            waiter, lease = await runner.acquire()
            try:
                if served is not None:
                    await runner.need_adapter(served)
                    lease.adapter = served.key
                yield lease
            finally:
                await lease.end()
                runner.release(waiter)

    def adapters(self) -> list[Served]:
        """The adapters that requests may name, by name."""
        return self._shelf.all()

    def label(self, name: str) -> str:
        """What a model or adapter is called in metrics: names that clients make up must not be labels."""
        served = self._shelf.get(name)
        return name if name in self.models else served.adapter.name if served is not None else "unknown"

    async def load_adapter(self, name: str, source: str) -> Served:
        """Serve the imported adapter `source` as `name`. If its base is awake, its worker has it when this returns;
        else the first request of it loads it. Raises NotFoundError, RequestError, ConfigError when it is of another
        model than those served, and what kept the worker from loading it."""
        served = await self._shelve(name, source)
        try:
            if self._runners[served.adapter.base].replica.state is State.READY:
                async with self.replica(name):
                    pass
        except BaseException:
            served.leaving = True
            self._shelf.remove(served)
            self._in_background(
                self._retire(served), "an adapter that was not wanted any more could not be unloaded: %s"
            )
            raise
        self._notify()
        return served

    async def unload_adapter(self, name: str) -> None:
        """Serve an adapter no more: new requests find nothing from now on, those that run come to their end first.
        Raises NotFoundError."""
        served = self._shelf.get(name)
        if served is None or served.leaving:
            raise NotFoundError(f"the adapter {name!r} is not loaded", remedy="See /v1/models for those that are")
        served.leaving = True
        task = asyncio.create_task(self._retire(served), name=f"unload {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    def statuses(self) -> list[ModelStatus]:
        """All models now, by name."""
        adapters: dict[str, set[str]] = {}
        for served in self._shelf.all():
            adapters.setdefault(served.adapter.base, set()).add(served.adapter.name)
        return [
            replace(self._runners[name].status(), adapters=tuple(sorted(adapters.get(name, ()))))
            for name in sorted(self._runners)
        ]

    async def wake(self, name: str) -> Start:
        """Make the model ready; it then stays for its keep-alive. Raises NotFoundError, also for an adapter."""
        self._runner(name)
        async with self.replica(name) as lease:
            return lease.start

    async def sleep(self, name: str, *, keep: bool = False) -> ModelStatus:
        """Put the model to sleep once no request runs, and wait for it; `keep`: its process stays if there is room.
        Raises what kept it from being captured."""
        runner = self._runner(name)
        sleeps = runner.replica.sleeps
        runner.press(keep=keep)
        await self._slept(runner, sleeps, keep=keep)
        if (error := runner.missing_snapshot) is not None:
            raise error
        return runner.status()

    async def snapshot(self, name: str) -> ModelStatus:
        """Make a new snapshot of the model as soon as no request runs, which puts it to sleep; one that has never been
        awake is started for it. Raises what kept it from being captured."""
        runner = self._runner(name)
        if not self._config.models.get(name, ModelConfig()).snapshot:
            raise ConfigError(f"model {name} is configured without snapshots", remedy="Set `snapshot: true` for it")
        before = runner.replica.snapshot_id
        if runner.replica.state in (State.ASLEEP, State.STOPPING):
            async with self.replica(name):  # it may have no keep-alive: it must be told before the lease ends
                sleeps = self._press_for_capture(runner)
        else:
            sleeps = self._press_for_capture(runner)
        await self._slept(runner, sleeps)
        if runner.replica.snapshot_id in (None, before):
            raise runner.replica.last_error or SnapshotError(
                f"model {name} fell asleep without a new snapshot", remedy="The node's log says why; try again"
            )
        return runner.status()

    def operations(self, name: str) -> list[Operation]:
        """The latest starts and captures of a model, oldest first. Raises NotFoundError."""
        return self._history.of(self._runner(name).model.name)

    async def snapshots(self) -> list[dict[str, Any]]:
        """All snapshots and templates on disk."""
        return await asyncio.to_thread(self._catalog.rows)

    async def pin(self, snapshot_id: str, pinned: bool) -> None:
        """Keep a snapshot when newer ones come, or not any more. Raises NotFoundError."""
        await asyncio.to_thread(self._catalog.pin, snapshot_id, pinned)

    async def release(self, snapshot_id: str) -> None:
        """Lift a quarantine: the snapshot may be used again from now on. Raises NotFoundError."""
        kind, name = await asyncio.to_thread(self._catalog.release, snapshot_id)
        if kind == TEMPLATE_KIND and self._templates is not None:
            await self._templates.find()
        elif kind == SNAPSHOT_KIND and name in self._runners:
            self._runners[name].note(Offer(snapshot_id))

    async def remove(self, snapshot_id: str, *, force: bool) -> None:
        """Remove a snapshot and free its space. Raises NotFoundError, ConfigError when it is pinned."""
        await asyncio.to_thread(self._catalog.remove, snapshot_id, force=force)
        self._withdraw(snapshot_id)

    # Inside

    async def _serve_adapters(self, model: str, names: Sequence[str]) -> None:
        """Those of the configuration."""
        for name in names:
            served = await self._shelve(name, name)
            if served.adapter.base != model:
                raise ConfigError(
                    f"{name} is an adapter of {served.adapter.base}, not of {model}",
                    remedy=f"Name it under models.{served.adapter.base}.adapters, or import it with --base {model}",
                )

    async def _shelve(self, name: str, source: str) -> Served:
        self._check_free(name)
        adapter = await asyncio.to_thread(self._open_adapter, source)
        if adapter.base not in self._runners:
            raise ConfigError(
                f"{source} is an adapter of {adapter.base}, which is not served here",
                remedy="Serve that model, too",
            )
        return self._shelf.add(name, adapter)

    def _check_free(self, name: str) -> None:
        if name in self.models:
            raise RequestError(
                f"{name} is the name of a model that is served",
                param="lora_name",
                reason="invalid_value",
                remedy="Choose another name for the adapter",
            )

    async def _retire(self, served: Served) -> None:
        await served.unused.wait()
        try:
            await self._runners[served.adapter.base].drop_adapter(served, shared=self._shelf.is_shared(served))
        finally:
            self._shelf.remove(served)
            self._notify()

    async def _new_runner(self, model: Model, around: Surroundings) -> Runner:
        settings = self._config.models.get(model.name, ModelConfig())
        spec = self._specs[model.name] = spec_of(model, settings) if self._config.templates else None
        return Runner(
            model,
            settings,
            around,
            key=await asyncio.to_thread(self._key_of, model, settings),
            template_key=await asyncio.to_thread(self._template_key_of, spec) if spec is not None else {},
            snapshot_id=await asyncio.to_thread(self._catalog.latest, model.name),
            canary_of=self._canary_of,
            log_path=self._data_dir.logs / f"{model.name}.log",
        )

    async def _canary_of(self, snapshot_id: str) -> str | None:
        return await asyncio.to_thread(self._catalog.canary, snapshot_id)

    async def _find_templates(self, host: Host) -> Templates:
        specs = {spec for spec in self._specs.values() if spec is not None}
        templates = Templates(
            {spec: await asyncio.to_thread(self._template_key_of, spec) for spec in specs},
            host=host,
            catalog=self._catalog,
            observers=self._observers,
            log_path=self._data_dir.logs / "template.log",
            step_timeout=self._config.start_timeout,
            may_begin=self._may_make_template,
            quiet=self._is_quiet,
            offer=self._offer_template,
            captured=self._retire_older,
        )
        await templates.find()
        return templates

    def _is_quiet(self) -> bool:
        replicas = [runner.replica for runner in self._runners.values()]
        return all(
            replica.state in (State.ASLEEP, State.DOZING, State.READY) and not replica.waiting and not replica.in_flight
            for replica in replicas
        )

    def _may_make_template(self, spec: TemplateSpec) -> bool:
        """Whether a model that could use it has been awake here, and there is room for a worker without a model."""
        return engine_bytes(spec.engine) <= self._free() and any(
            self._specs[name] == spec and runner.replica.sleeps for name, runner in self._runners.items()
        )

    def _offer_template(self, spec: TemplateSpec, template_id: str | None) -> None:
        for name, runner in self._runners.items():
            if self._specs[name] == spec:
                runner.note(OfferTemplate(template_id))

    @staticmethod
    def _press_for_capture(runner: Runner) -> int:
        """Tell it to be captured and sleep; how often it had slept by then."""
        runner.press(capture=True)
        return runner.replica.sleeps

    async def _slept(self, runner: Runner, sleeps: int, *, keep: bool = False) -> None:
        """Wait until it has been asleep (dozing counts when it may `keep` its process); a request that waits may have
        woken it again by then."""
        done = (State.ASLEEP, State.DOZING) if keep else (State.ASLEEP,)
        while runner.replica.state not in done and runner.replica.sleeps == sleeps:
            await self._changed.wait()

    def kept_weights(self) -> Mapping[str, int]:
        """The bytes of weights in memory that no worker uses, by checkpoint, the longest unused first."""
        return self._host.kept_weights if self._host is not None else {}

    async def free_weights(self) -> None:
        """Let go of all weights in memory that no worker uses: the next starts read them again."""
        if self._host is not None:
            for checkpoint in list(self._host.kept_weights):
                await self._host.drop_segment(None, checkpoint)

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
        """Wait until the runner's worker fits the budget, freeing weights, ending processes that doze and putting idle
        models to sleep for it. What such a model is expected to take must fit; that it once took more only makes more
        room for it, as far as there is any.

        Raises HostError when it never can, and when a process that dozes would wait for others (it goes, so that no two
        of them wait for each other); AbandonedError when nobody waits for it any more."""
        needed = runner.expected
        if needed > self._budget:
            raise HostError(
                f"model {runner.model.name} needs about {needed >> 20} MiB, the budget is {self._budget >> 20} MiB",
                remedy="Raise `memory`, or serve a smaller model",
            )
        await self._check_gpu(runner)
        self._in_need[runner] = needed
        try:
            await self._until_room(runner, needed)
        finally:
            del self._in_need[runner]

    async def _until_room(self, runner: Runner, needed: int) -> None:
        while runner.replica.waiting > 0:
            kept = sum(other.held for other in self._runners.values() if self._is_kept(other))
            if needed + kept > self._budget:
                raise HostError(
                    f"model {runner.model.name} needs about {needed >> 20} MiB; models that are kept forever take "
                    f"{kept >> 20} MiB of the budget of {self._budget >> 20} MiB",
                    remedy="Raise `memory`, or give one of them a keep_alive",
                )
            room = self._in_need[runner] = min(runner.peak, self._budget - kept)
            plan, on_gpu = self._plan_for(runner, room), self._plan_on_gpu(runner)
            if plan.fits and on_gpu.fits:
                runner.admitted = True
                return
            changed = self._changed
            await self._make_way(plan, runner)
            self._make_way_on_gpu(on_gpu, runner, besides=plan.evict)
            leaving = any(resident.leaving for resident in self._residents(but=runner))
            if runner.replica.state is State.WAKING and not (plan.weights or plan.evict or on_gpu.evict or leaving):
                raise HostError(
                    f"there is no room for {runner.model.name} to wake beside what others take",
                    remedy="Raise `memory`; it waits for room without its process",
                )
            if not plan.weights:
                await changed.wait()
        raise AbandonedError

    async def _check_gpu(self, runner: Runner) -> None:
        """Whether its GPU is there and large enough at all. Raises HostError."""
        if runner.gpu is None:
            return
        if runner.gpu not in self._gpu_budgets:
            assert self._host is not None
            self._gpu_budgets[runner.gpu] = gpu_budget(self._config, await self._host.gpu_memory(runner.gpu))
        most = self._gpu_budgets[runner.gpu]
        if runner.gpu_bytes > most:
            raise HostError(
                f"model {runner.model.name} needs about {runner.gpu_bytes >> 20} MiB of {runner.gpu}, its budget is"
                f" {most >> 20} MiB",
                remedy="Raise `gpu_memory`, give it a smaller cache (kv_tokens), or serve a smaller model",
            )

    def _plan_on_gpu(self, runner: Runner) -> Plan:
        """Which processes that doze on its GPU must go for it, and which models must sleep: a process that dozes holds
        its CUDA context there.

        Raises HostError when models that are kept forever leave it no room."""
        if runner.gpu is None:
            return Plan(fits=True)
        there = [
            (name, other)
            for name, other in self._runners.items()
            if other is not runner and other.admitted and other.gpu == runner.gpu
        ]
        most = self._gpu_budgets[runner.gpu]
        kept = sum(other.gpu_bytes for _name, other in there if self._is_kept(other))
        if runner.gpu_bytes + kept > most:
            raise HostError(
                f"model {runner.model.name} needs about {runner.gpu_bytes >> 20} MiB of {runner.gpu}; models that are"
                f" kept forever take {kept >> 20} MiB of its budget of {most >> 20} MiB",
                remedy="Raise `gpu_memory`, or give one of them a keep_alive or another GPU",
            )
        residents = [replace(self._resident(name, other), bytes=other.gpu_bytes) for name, other in there]
        parked = [
            (name, other, size)
            for name, other in self._runners.items()
            if other is not runner and other.gpu == runner.gpu and (size := other.dozing_gpu_bytes)
        ]
        return plan_eviction(
            residents
            + [
                Resident(name, size, leaving=other.replica.leaving)
                for name, other, size in parked
                if other.replica.state is not State.DOZING
            ],
            needed=runner.gpu_bytes,
            budget=most,
            dozers=[
                Dozer(name, size, other.replica.since, other.replica.cost_of_return)
                for name, other, size in parked
                if other.replica.state is State.DOZING
            ],
            now=asyncio.get_running_loop().time(),
        )

    def _make_way_on_gpu(self, plan: Plan, runner: Runner, *, besides: Sequence[str]) -> None:
        """End processes that doze and put models to sleep for their GPU; the processes of these may stay."""
        for name in plan.evict:
            if name not in besides:
                dozing = self._runners[name].replica.state is State.DOZING
                log.info("model %s must sleep to make room on %s for %s", name, runner.gpu, runner.model.name)
                self._runners[name].press(keep=not dozing)
                self._tell_evicted(name, "process" if dozing else "model")

    def _plan_for(self, runner: Runner, needed: int) -> Plan:
        """Who goes for it. Its own weights, if they are kept, are part of what it needs."""
        own = runner.model.checkpoint
        return plan_eviction(
            self._residents(but=runner),
            needed=needed,
            budget=self._budget,
            dozers=self._dozers(),
            weights={name: size for name, size in self.kept_weights().items() if name != own},
            now=asyncio.get_running_loop().time(),
        )

    async def _make_way(self, plan: Plan, runner: Runner) -> None:
        assert self._host is not None
        owners = {model.checkpoint: name for name, model in self.models.items()}
        for checkpoint in plan.weights:
            name = owners.get(checkpoint, "other")
            log.info("kept weights (%s) are freed to make room for %s", checkpoint, runner.model.name)
            await self._host.drop_segment(None, checkpoint)
            self._tell_evicted(name, "weights")
        for name in plan.evict:
            dozing = self._runners[name].replica.state is State.DOZING
            log.info("model %s must sleep to make room for %s", name, runner.model.name)
            self._runners[name].press(keep=not dozing)  # a process without weights may leave room enough
            self._tell_evicted(name, "process" if dozing else "model")

    def _tell_evicted(self, name: str, what: Evicted) -> None:
        for observer in self._observers:
            observer.evicted(name, what)

    def _may_doze(self, runner: Runner, own: int) -> bool:
        """Whether a process that was parked may stay, with so many bytes of its own."""
        wanted = sum(self._in_need.values())
        stays = may_stay(own, limit=self._sleep_limit, free=self._free(but=runner) - wanted)
        return stays and self._context_fits(runner)

    def _context_fits(self, runner: Runner) -> bool:
        """Whether what a process that dozes keeps of its GPU has room there, beside all others and those that wait."""
        if runner.gpu is None or runner.gpu not in self._gpu_budgets:
            return True
        others = [other for other in self._runners.values() if other is not runner and other.gpu == runner.gpu]
        held = sum(
            other.gpu_bytes if other.admitted or other in self._in_need else other.dozing_gpu_bytes for other in others
        )
        return held + context_bytes(runner.engine) <= self._gpu_budgets[runner.gpu]

    def _displace(self) -> None:
        """One more process dozes: others go for it if they are too many."""
        now = asyncio.get_running_loop().time()
        for name in displaced(self._dozers(), limit=self._sleep_limit, now=now):
            log.info("the process of model %s goes, for others doze within `sleep_memory`", name)
            self._runners[name].press()
            self._tell_evicted(name, "process")

    def _free(self, but: Runner | None = None) -> int:
        """What of the budget nobody takes."""
        residents = self._residents(but=but)
        held = sum(resident.bytes for resident in residents) + sum(dozer.bytes for dozer in self._dozers())
        return self._budget - held - sum(self.kept_weights().values())

    def _dozers(self) -> list[Dozer]:
        """The processes that doze."""
        return [
            Dozer(name, size, runner.replica.since, runner.replica.cost_of_return)
            for name, runner in self._runners.items()
            if runner.replica.state is State.DOZING and (size := runner.dozing_bytes)
        ]

    @staticmethod
    def _is_kept(runner: Runner) -> bool:
        """Whether a worker holds memory that only the end of the node gives back."""
        return runner.admitted and runner.replica.kept_forever and runner.replica.state is State.READY

    def _residents(self, but: Runner | None = None) -> list[Resident]:
        """What holds memory and does not doze; a process on its way from or out of its doze can't be told to go."""
        there = [(name, runner) for name, runner in self._runners.items() if runner is not but]
        return [self._resident(name, runner) for name, runner in there if runner.admitted] + [
            Resident(name, size, leaving=runner.replica.leaving)
            for name, runner in there
            if runner.replica.state is not State.DOZING and (size := runner.dozing_bytes)
        ]

    @staticmethod
    def _resident(name: str, runner: Runner) -> Resident:
        return Resident(
            name=name,
            bytes=runner.held if runner.replica.kept_forever else runner.peak,
            idle_since=None if runner.replica.kept_forever else runner.replica.idle_since,
            leaving=runner.replica.leaving,
        )

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        if self._templates is not None:
            self._templates.consider()

    def _retire_older(self, kind: str, name: str, snapshot_id: str) -> None:
        """Free the space of the snapshots this one replaces, off the loop and off any request's path."""
        self._in_background(
            asyncio.to_thread(self._catalog.drop_older, name, snapshot_id, kind=kind),
            "older snapshots could not be removed: %s",
        )

    def _quarantine(self, snapshot_id: str, error: DormouseError) -> None:
        """Called in the middle of a replica's effects: what may give it a new event comes later."""
        asyncio.get_running_loop().call_soon(self._withdraw, snapshot_id)
        self._in_background(
            asyncio.to_thread(self._catalog.quarantine, snapshot_id, str(error)),
            "a quarantine could not be remembered; it holds until this node ends: %s",
        )

    def _discard(self, template_id: str) -> None:
        asyncio.get_running_loop().call_soon(self._withdraw, template_id)

    def _withdraw(self, snapshot_id: str) -> None:
        for runner in self._runners.values():
            runner.note(Withdraw(snapshot_id))
        if self._templates is not None:
            self._templates.withdraw(snapshot_id)

    def _in_background(self, work: Coroutine[Any, Any, None], complaint: str) -> None:
        """Work that nobody waits for but the end of the node; `complaint` goes to the log when it fails."""

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error(complaint, error)

        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(ended)

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
        if self._templates is not None:
            await self._templates.close()
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
