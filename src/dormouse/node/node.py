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
from dormouse.errors import (
    ConfigError,
    DormouseError,
    HostError,
    NotFoundError,
    RequestError,
    SnapshotError,
    StoppingError,
)
from dormouse.node.adapters import OpenAdapter, Served, Shelf
from dormouse.node.explain import PATHS, explanation, outlook
from dormouse.node.forecast import HERE, Expected, Forecast, Limits, Standing, with_needs
from dormouse.node.history import History
from dormouse.node.keeping import Hooks, Keeping
from dormouse.node.memory import allotted, budget, context_bytes, dram_tier, engine_bytes, gpu_budget
from dormouse.node.parts import Catalog, Evicted, Host, Model, Observer
from dormouse.node.presence import ModelStatus, NodeState, hold_lock, publish, withdraw
from dormouse.node.replica import Offer, OfferTemplate, Start, State, Withdraw
from dormouse.node.room import Way, find_way, first_of
from dormouse.node.runner import AbandonedError, Lease, Runner, Surroundings
from dormouse.node.templates import Templates, TemplateSpec, spec_of
from dormouse.phases import Phases
from dormouse.schedule.cluster import Cluster, StartPath
from dormouse.schedule.estimate import Errors
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
        self._dram_tier = dram_tier(config)
        self._evicted_for: dict[str, list[str]] = {}
        self.prewarms: dict[str, int] = {}
        self._in_need: dict[Runner, int] = {}
        self._ahead: set[str] = set()  # models that are made ready though nobody has asked
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
            self._shift = self._wall_clock() - asyncio.get_running_loop().time()
            self._forecast = Forecast(self._data_dir.root, self._catalog, self._now, self._wall_clock)
            await self._forecast.load()
            self._keeping = Keeping(
                self._config,
                self._forecast.estimator,
                self._now,
                Hooks(self.view, self._start_ahead, self._let_go, lambda name: self._runners[name].replan()),
            )
            around = Surroundings(
                host=host,
                observers=self._observers,
                step_timeout=self._config.start_timeout,
                max_queue=self._config.max_queue,
                processes_stay=self._sleep_limit > 0,
                make_room=self._make_room,
                may_doze=self._may_doze,
                stay=self._keeping.stay,
                going=self._keeping.gone,
                is_pinned=self._keeping.is_pinned,
                foresee=self._foresee,
                came_true=self._came_true,
                missed=self._missed,
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
            self._keeping.begin()
            self._in_background(self._forecast.look(self._standings()), "what lies on disk could not be seen: %s")
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
            self._keeping.requested(runner.model.name)
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

    async def outlooks(self) -> list[dict[str, Any]]:
        """Of every model: how its next start would go and take, when it will step down, and why."""
        await self._forecast.look(self._standings())
        view = self.view()
        return [
            outlook(one, self._runners[one.name].replica.next_path, view, self._forecast, self._keeping)
            for one in sorted(self._standings(), key=lambda one: one.name)
        ]

    async def explain(self, name: str) -> dict[str, Any]:
        """The decision that a request for a model would get now, with its alternatives, and what the latest starts were
        estimated to take and took. Raises NotFoundError."""
        runner = self._runner(name)
        await self._forecast.look(self._standings())
        own, path = runner.standing(self._shift), runner.replica.next_path
        return explanation(own, path, self.view(), self._forecast, self._keeping, self._now())

    def estimate_errors(self) -> dict[str, Errors]:
        """How far estimates were off lately, by start path."""
        found = {path: self._forecast.estimator.errors(path) for path in PATHS}
        return {path: errors for path, errors in found.items() if errors.count}

    def start_pace(self) -> float:
        """How many times as long as usual starts take at present, as estimates have it."""
        return self._forecast.estimator.pace(HERE)

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
            if runner.model.name not in self._ahead:
                self._keeping.starting(runner.model.name, self._way_for(runner, needed).evict)
            await self._until_room(runner, needed)
        finally:
            del self._in_need[runner]

    async def _until_room(self, runner: Runner, needed: int) -> None:
        self._evicted_for.pop(runner.model.name, None)
        while runner.replica.waiting > 0:
            kept = sum(other.held for other in self._runners.values() if self._is_kept(other))
            if needed + kept > self._budget:
                raise HostError(
                    f"model {runner.model.name} needs about {needed >> 20} MiB; models that are kept forever take "
                    f"{kept >> 20} MiB of the budget of {self._budget >> 20} MiB",
                    remedy="Raise `memory`, or give one of them a keep_alive",
                )
            room = self._in_need[runner] = min(runner.peak, self._budget - kept)
            self._check_beside_kept(runner)
            way = self._way_for(runner, room)
            if way.fits:
                runner.admitted = True
                return
            changed = self._changed
            await self._make_way(way, runner)
            leaving = any(other.replica.leaving for other in self._others(runner))
            if runner.replica.state is State.WAKING and not (way.weights or way.evict or leaving):
                raise HostError(
                    f"there is no room for {runner.model.name} to wake beside what others take",
                    remedy="Raise `memory`; it waits for room without its process",
                )
            if not way.weights:
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

    def _check_beside_kept(self, runner: Runner) -> None:
        """Whether models that are kept forever leave it room on its GPU. Raises HostError."""
        if runner.gpu is None:
            return
        kept = sum(
            other.gpu_bytes for other in self._others(runner) if other.gpu == runner.gpu and self._is_kept(other)
        )
        most = self._gpu_budgets[runner.gpu]
        if runner.gpu_bytes + kept > most:
            raise HostError(
                f"model {runner.model.name} needs about {runner.gpu_bytes >> 20} MiB of {runner.gpu}; models that are"
                f" kept forever take {kept >> 20} MiB of its budget of {most >> 20} MiB",
                remedy="Raise `gpu_memory`, or give one of them a keep_alive or another GPU",
            )

    def _way_for(self, runner: Runner, needed: int) -> Way:
        """What must go so that the runner has `needed` bytes of the host's memory, and its GPU's."""
        now = self._now()
        return find_way(
            runner.standing(self._shift),
            [other.standing(self._shift) for other in self._others(runner)],
            needed,
            self.kept_weights(),
            self._limits,
            lambda standings: self._forecast.view(standings, self._limits, self.kept_weights()),
            lambda need, view: self._keeping.policy.victims(need, view, now),
        )

    async def _make_way(self, way: Way, runner: Runner) -> None:
        assert self._host is not None
        owners = {model.checkpoint: name for name, model in self.models.items()}
        for checkpoint in way.weights:
            name = owners.get(checkpoint, "other")
            log.info("kept weights (%s) are freed to make room for %s", checkpoint, runner.model.name)
            await self._host.drop_segment(None, checkpoint)
            self._tell_evicted(name, "weights", runner)
        for name in way.evict:
            dozing = self._runners[name].replica.state is State.DOZING
            log.info("model %s must sleep to make room for %s", name, runner.model.name)
            self._runners[name].press(keep=not dozing)  # a process without weights may leave room enough
            self._tell_evicted(name, "process" if dozing else "model", runner)

    def _tell_evicted(self, name: str, what: Evicted, runner: Runner | None = None) -> None:
        if runner is not None:
            self._evicted_for.setdefault(runner.model.name, []).append(f"{what} of {name}")
        for observer in self._observers:
            observer.evicted(name, what)

    def _may_doze(self, runner: Runner, own: int) -> bool:
        """Whether a process that was parked may stay, with so many bytes of its own."""
        free = self._free(but=runner) - sum(self._in_need.values())
        return own <= min(self._sleep_limit, free) and self._context_fits(runner)

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
        """One more process dozes: those worth least for their bytes go for it if they are too many."""
        view = self.view()
        worth = self._keeping.worth(view)
        sizes = {one.name: one.host_bytes for one in self._standings() if one.doing is State.DOZING and one.host_bytes}
        ranked = sorted(sizes, key=lambda name: (worth(view.replica(name)) / sizes[name], name))
        over = sum(sizes.values()) - self._sleep_limit
        for name in first_of({name: sizes[name] for name in ranked}, over):
            log.info("the process of model %s goes, for others doze within `sleep_memory`", name)
            self._runners[name].press()
            self._tell_evicted(name, "process")

    def _free(self, but: Runner | None = None) -> int:
        """What of the budget nobody takes."""
        name = but.model.name if but is not None else None
        held = sum(one.host_bytes for one in self._standings() if one.name != name)
        return self._budget - held - sum(self.kept_weights().values())

    def _others(self, runner: Runner) -> list[Runner]:
        return [other for other in self._runners.values() if other is not runner]

    @staticmethod
    def _is_kept(runner: Runner) -> bool:
        """Whether a worker holds memory that nobody else can have."""
        return runner.admitted and runner.pinned

    # What schedule/ is asked, and told

    def _now(self) -> float:
        """Seconds of Unix time, by the event loop's clock."""
        return asyncio.get_running_loop().time() + self._shift

    def _standings(self) -> list[Standing]:
        return [runner.standing(self._shift) for runner in self._runners.values()]

    @property
    def _limits(self) -> Limits:
        return Limits(self._budget, self._gpu_budgets, self._dram_tier)

    def view(self) -> Cluster:
        """This host as schedule/ sees it now. What lies on disk is as it was when somebody looked last."""
        return self._forecast.view(self._standings(), self._limits, self.kept_weights())

    async def _foresee(self, runner: Runner, path: StartPath) -> Expected | None:
        """There is room, and the start begins: what it should take."""
        own = with_needs(runner.standing(self._shift))
        await self._forecast.look([own], path)
        view = self._forecast.view([own], self._limits, self.kept_weights())
        return self._forecast.expect(own, path, view, self._why(runner, path))

    def _why(self, runner: Runner, path: StartPath) -> str:
        """Why a start goes this way, in words."""
        why = {
            "sleep": "its process was there",
            "snapshot": f"snapshot {runner.replica.snapshot_id}",
            "template": f"no snapshot; template {runner.replica.template_id}",
        }.get(path, "no snapshot, no template")
        if (error := runner.replica.last_error) is not None:
            why += f"; after {error.code}"
        evicted = self._evicted_for.pop(runner.model.name, [])
        return f"{why}; evicted {', '.join(evicted)}" if evicted else why

    def _came_true(self, runner: Runner, expected: Expected | None, phases: Phases) -> None:
        own = runner.standing(self._shift)
        took = self._forecast.came_true(own, expected, phases, self._forecast.view([with_needs(own)], self._limits))
        self._forecast.trim_tier(self._dram_tier)
        if expected is not None:
            for observer in self._observers:
                observer.foretold(own.name, expected.path, expected.estimate.mean, took)
            if expected.path == "cold":
                self._in_background(self._forecast.note_imported(own.engine), "the page cache could not be read: %s")
        self._in_background(self._forecast.save(), "what was learned could not be saved: %s")

    def _missed(self, runner: Runner, error: BaseException) -> None:
        self._forecast.failed(runner.model.name, error.code if isinstance(error, DormouseError) else "given up")

    def _start_ahead(self, name: str, may_evict: bool) -> None:
        runner = self._runners[name]
        if runner.replica.state in (State.ASLEEP, State.DOZING) and not runner.replica.waiting:
            self._in_background(self._make_ready(runner, may_evict), f"model {name} was not made ready ahead: %s")

    async def _make_ready(self, runner: Runner, may_evict: bool) -> None:
        """Before anybody asks; `may_evict`: others go for it, if they must."""
        await self._check_gpu(runner)
        if not may_evict and not self._way_for(runner, runner.expected).fits:
            log.info("model %s is not made ready ahead: that would take others' room", runner.model.name)
            return
        self._ahead.add(runner.model.name)
        try:
            with contextlib.suppress(StoppingError):
                waiter, lease = await runner.acquire()
                self.prewarms[runner.model.name] = self.prewarms.get(runner.model.name, 0) + 1
                await lease.end()
                runner.release(waiter)
        finally:
            self._ahead.discard(runner.model.name)

    def _let_go(self, name: str) -> None:
        """Nobody has asked for a model for so long that its weights need not be in memory."""
        checkpoint = self.models[name].checkpoint
        if self._host is not None and checkpoint is not None and checkpoint in self.kept_weights():
            log.info("the weights of model %s are let go of", name)
            self._in_background(self._host.drop_segment(None, checkpoint), "kept weights could not be freed: %s")

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
        self._in_background(self._forecast.know(snapshot_id), "the size of a snapshot is not known: %s")

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
        self._forecast.forget(snapshot_id)
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
        self._keeping.close()
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
        await self._forecast.save()
        self._ending.set()
        self._notify()
        if self._publisher is not None:
            await self._publisher
        await asyncio.to_thread(withdraw, self._data_dir.run)
