"""One host's node: its models' replicas, the queue before them, the memory they share, and the state others may read.

    gateway --replica(name)--> Placing --> Runner --> Replica (decides) --> host service, worker link (do)
                                              ^-- Admission: memory;  Keeping: who stays;  ReplicaScaling: how many

The node lives on one event loop. `async with Node(...)` takes the data folder's lock; leaving it ends all workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from dormouse.config import ModelConfig, ServeConfig
from dormouse.data_dir import DataDir
from dormouse.errors import (
    ConfigError,
    DormouseError,
    NotFoundError,
    RequestError,
    SnapshotError,
    StoppingError,
)
from dormouse.node.adapters import OpenAdapter, Served, Shelf
from dormouse.node.admission import Admission
from dormouse.node.crew import Crew
from dormouse.node.explain import PATHS, explanation, outlook
from dormouse.node.forecast import HERE, Expected, Forecast, Standing, with_needs
from dormouse.node.history import History
from dormouse.node.keeping import Hooks, Keeping
from dormouse.node.memory import engine_bytes
from dormouse.node.parts import Catalog, Host, Model, Observer
from dormouse.node.placing import Placing
from dormouse.node.presence import ModelStatus, NodeState, hold_lock, publish, withdraw
from dormouse.node.replica import Offer, OfferTemplate, Renew, Start, State, Withdraw
from dormouse.node.room import Victims
from dormouse.node.runner import Lease, Runner, Surroundings
from dormouse.node.scaling import ReplicaScaling
from dormouse.node.templates import Templates, TemplateSpec, spec_of
from dormouse.phases import Phases
from dormouse.schedule.cluster import Cluster, Request, StartPath
from dormouse.schedule.estimate import Errors
from dormouse.schedule.place import Option, place_start
from dormouse.schedule.queue import Fairness
from dormouse.schedule.room import Worth
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
        self.prewarms: dict[str, int] = {}
        self._ahead: set[Runner] = set()  # replicas that are made ready though nobody has asked
        self._beside: dict[Runner, asyncio.Task[None]] = {}  # those of them that the autoscaler wants
        self._host: Host | None = None
        self._history = History(wall_clock)
        self._observers: list[Observer] = [self._history]
        self._crews: dict[str, Crew] = {}
        self._templates: Templates | None = None
        self._scaling: ReplicaScaling | None = None
        self.change = asyncio.Event()
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
            self._forecast = Forecast(self._data_dir.root, self._catalog, self.now, self._wall_clock)
            await self._forecast.load()
            self._keeping = Keeping(
                self._config,
                self._forecast.estimator,
                self.now,
                Hooks(self.view, self._start_ahead, self._let_go, self._replan),
            )
            self._admission = Admission(self._config, host, self._crews, self._observers, self._shift, self)
            caps = {name: tenant.cap for name, tenant in self._config.tenants.items() if tenant.cap is not None}
            self._placing = Placing(
                self._crews, Fairness(tenant_caps=caps), self._config.max_queue, self._forecast.estimator, self
            )
            around = self._surroundings(host)
            for name, model in self.models.items():
                self._crews[name] = await self._new_crew(model, around)
            for name, settings in self._config.models.items():
                await self._serve_adapters(name, settings.adapters)
            exits.push_async_callback(self._end_workers)
            self._templates = await self._find_templates(host)
            self._publisher = asyncio.create_task(self._publish(), name="publish")
            self._scaling = ReplicaScaling(
                self._crews,
                asked=lambda name: self._crews[name].load + self._placing.waiting(name),
                start=self._start_beside,
                give_up=self._give_up,
                standing=self._keeping.standing,
            )
            self._keeping.begin()
            self._in_background(self._forecast.look(self._standings()), "what lies on disk could not be seen: %s")
            self._exits = exits.pop_all()
        return self

    def _surroundings(self, host: Host) -> Surroundings:
        return Surroundings(
            host=host,
            observers=self._observers,
            step_timeout=self._config.start_timeout,
            processes_stay=self._admission.processes_stay,
            make_room=self._make_room,
            may_doze=self._admission.may_doze,
            stay=lambda runner: self._keeping.stay(runner.name, runner.model.name, pinned=runner.pinned),
            going=lambda runner: self._keeping.gone(runner.name),
            is_pinned=self._is_pinned,
            captured_beside=lambda runner: self._crews[runner.model.name].captured_beside(runner),
            foresee=self._foresee,
            came_true=self._came_true,
            missed=self._missed,
            failed=self._placing.failed,
            dozed=lambda: asyncio.get_running_loop().call_soon(self._admission.displace),
            changed=self.changed,
            captured=self._captured,
            quarantine=self._quarantine,
            discard=self._discard,
            wall_clock=self._wall_clock,
        )

    async def __aexit__(self, *exc_info: object) -> None:
        await self._exits.aclose()

    # For the gateway and the command line

    def observe(self, observer: Observer) -> None:
        """Tell `observer` about every start and capture from now on."""
        self._observers.append(observer)

    @contextlib.asynccontextmanager
    async def replica(self, name: str, *, tenant: str = "", priority: int = 0) -> AsyncIterator[Lease]:
        """A ready replica of a model, or of an adapter's base, with the adapter; waits for one. What the lease has not
        finished is cancelled at the end. Of each `tenant` only so many are served at once (`tenants`); a step of
        `priority` is worth a head start in the queue.

        Raises NotFoundError, BusyError (queue full), StoppingError, what the last start path raised, and what kept the
        adapter from being loaded.
        """
        served = self._shelf.get(name)
        with served.in_use() if served is not None else contextlib.nullcontext():
            crew = self._crew(served.adapter.base if served is not None else name)
            self._keeping.requested(crew.name)
            await self._admission.know_gpus(crew)
            seat = await self._placing.ask(crew, tenant, priority)
            lease = seat.lease.result()
            try:
                if served is not None:
                    await seat.runner.need_adapter(served)
                    lease.adapter = served.key
                yield lease
            finally:
                try:
                    await lease.end()
                finally:  # also when it is cancelled just then: else the slot would be taken for ever
                    self._placing.leave(seat)

    def adapters(self) -> list[Served]:
        """The adapters that requests may name, by name."""
        return self._shelf.all()

    def label(self, name: str) -> str:
        """What a model or adapter is called in metrics: names that clients make up must not be labels."""
        served = self._shelf.get(name)
        return name if name in self.models else served.adapter.name if served is not None else "unknown"

    async def load_adapter(self, name: str, source: str) -> Served:
        """Serve the imported adapter `source` as `name`. If its base is awake, a worker has it when this returns; else,
        and in other workers, the first request of it loads it. Raises NotFoundError, RequestError, ConfigError when it
        is of another model than those served, and what kept the worker from loading it."""
        served = await self._shelve(name, source)
        try:
            if self._crews[served.adapter.base].ready:
                async with self.replica(name):
                    pass
        except BaseException:
            served.leaving = True
            self._shelf.remove(served)
            self._in_background(
                self._retire(served), "an adapter that was not wanted any more could not be unloaded: %s"
            )
            raise
        self.changed()
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
        return [self._status(crew, adapters.get(name, ())) for name, crew in sorted(self._crews.items())]

    async def wake(self, name: str) -> Start:
        """Make the model ready; it then stays for its keep-alive. Raises NotFoundError, also for an adapter."""
        self._crew(name)
        async with self.replica(name) as lease:
            return lease.start

    async def sleep(self, name: str, *, keep: bool = False) -> ModelStatus:
        """Put all replicas of the model to sleep once no request runs, and wait for it; `keep`: their processes stay if
        there is room. Raises what kept it from being captured."""
        crew = self._crew(name)
        slept = [(runner, runner.replica.sleeps) for runner in crew]
        for runner, _sleeps in slept:
            runner.press(keep=keep)
        for runner, sleeps in slept:
            await self._slept(runner, sleeps, keep=keep)
        if (error := crew.leader.missing_snapshot) is not None:
            raise error
        return self._status(crew)

    async def snapshot(self, name: str) -> ModelStatus:
        """Make a new snapshot of the model as soon as no request runs, which puts a replica to sleep; one that has
        never been awake is started for it. Raises what kept it from being captured."""
        crew = self._crew(name)
        if not crew.settings.snapshot:
            raise ConfigError(f"model {name} is configured without snapshots", remedy="Set `snapshot: true` for it")
        runner = crew.leader
        before = runner.replica.snapshot_id
        if runner.replica.state in (State.ASLEEP, State.STOPPING):
            async with self.replica(name):  # it may have no keep-alive: it must be told before the lease ends
                runner = crew.leader
                sleeps = self._press_for_capture(runner)
        else:
            sleeps = self._press_for_capture(runner)
        await self._slept(runner, sleeps)
        if runner.replica.snapshot_id in (None, before):
            raise runner.replica.last_error or SnapshotError(
                f"model {name} fell asleep without a new snapshot", remedy="The node's log says why; try again"
            )
        return self._status(crew)

    def operations(self, name: str) -> list[Operation]:
        """The latest starts and captures of a model, oldest first. Raises NotFoundError."""
        return self._history.of(self._crew(name).name)

    async def outlooks(self) -> list[dict[str, Any]]:
        """Of every model: how its next start would go and take, when it will step down, and why."""
        await self._forecast.look(self._standings())
        view = self.view()
        return [self._outlook(crew, view) for _name, crew in sorted(self._crews.items())]

    async def explain(self, name: str) -> dict[str, Any]:
        """The decision that a request for a model would get now, with its alternatives, and what the latest starts were
        estimated to take and took. Raises NotFoundError."""
        crew = self._crew(name)
        await self._forecast.look(self._standings())
        leader = crew.leader
        own, path = crew.standing(leader, self._shift), leader.replica.next_path
        return explanation(own, path, self.view(), self._forecast, self._keeping, self.now())

    def _outlook(self, crew: Crew, view: Cluster) -> dict[str, Any]:
        leader = crew.leader
        own, path = crew.standing(leader, self._shift), leader.replica.next_path
        return outlook(own, path, view, self._forecast, self._keeping)

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
        elif kind == SNAPSHOT_KIND and name in self._crews:
            for runner in self._crews[name]:
                runner.note(Offer(snapshot_id))

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
        if adapter.base not in self._crews:
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
            await self._drop_adapter(served)
        finally:
            self._shelf.remove(served)
            self.changed()

    async def _drop_adapter(self, served: Served) -> None:
        """Out of all workers of its base, whatever one of them says."""
        errors = []
        for runner in self._crews[served.adapter.base]:
            try:
                await runner.drop_adapter(served, shared=self._shelf.is_shared(served))
            except DormouseError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    async def _new_crew(self, model: Model, around: Surroundings) -> Crew:
        settings = self._config.models.get(model.name, ModelConfig())
        spec = spec_of(model, settings) if self._config.templates else None
        key = await asyncio.to_thread(self._key_of, model, settings)
        template_key = await asyncio.to_thread(self._template_key_of, spec) if spec is not None else {}
        snapshot_id = await asyncio.to_thread(self._catalog.latest, model.name)
        names = [model.name, *(f"{model.name}#{number}" for number in range(2, settings.max_replicas + 1))]
        runners = [
            Runner(
                name,
                model,
                settings,
                around,
                key=key,
                template_key=template_key,
                snapshot_id=snapshot_id,
                canary_of=self._canary_of,
                log_path=self._data_dir.logs / f"{name.replace('#', '-')}.log",
            )
            for name in names
        ]
        return Crew(model, settings, runners, spec, usual=lambda: self._placing.usual(model.name))

    async def _canary_of(self, snapshot_id: str) -> str | None:
        return await asyncio.to_thread(self._catalog.canary, snapshot_id)

    async def _find_templates(self, host: Host) -> Templates:
        specs = {crew.template for crew in self._crews.values() if crew.template is not None}
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
        replicas = [runner.replica for runner in self._runners()]
        return all(
            replica.state in (State.ASLEEP, State.DOZING, State.READY) and not replica.waiting and not replica.in_flight
            for replica in replicas
        )

    def _may_make_template(self, spec: TemplateSpec) -> bool:
        """Whether a model that could use it has been awake here, and there is room for a worker without a model."""
        return engine_bytes(spec.engine) <= self._admission.free() and any(
            runner.replica.sleeps for crew in self._crews.values() if crew.template == spec for runner in crew
        )

    def _offer_template(self, spec: TemplateSpec, template_id: str | None) -> None:
        for crew in self._crews.values():
            if crew.template == spec:
                for runner in crew:
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
            await self.change.wait()

    def kept_weights(self) -> Mapping[str, int]:
        """The bytes of weights in memory that no worker uses, by checkpoint, the longest unused first."""
        return self._host.kept_weights if self._host is not None else {}

    async def free_weights(self) -> None:
        """Let go of all weights in memory that no worker uses: the next starts read them again."""
        if self._host is not None:
            for checkpoint in list(self._host.kept_weights):
                await self._host.drop_segment(None, checkpoint)

    def _crew(self, name: str) -> Crew:
        crew = self._crews.get(name)
        if crew is None:
            near = difflib.get_close_matches(name, self._crews, n=1)
            raise NotFoundError(
                f"the model {name!r} is not served here",
                remedy=f"Did you mean {near[0]!r}?" if near else "See /v1/models for those that are",
            )
        return crew

    def _runners(self) -> Iterator[Runner]:
        return (runner for crew in self._crews.values() for runner in crew)

    def _status(self, crew: Crew, adapters: Iterable[str] = ()) -> ModelStatus:
        return crew.status(self._placing.waiting(crew.name), tuple(sorted(adapters)), self._wall_clock())

    def _is_pinned(self, runner: Runner) -> bool:
        """Whether it is one of those that stay ready whatever the memory is needed for: the first ones."""
        name = runner.model.name
        return runner in self._crews[name].ready[: self._keeping.standing(name)]

    # What schedule/ is asked, and told

    def now(self) -> float:
        """Seconds of Unix time, by the event loop's clock."""
        return asyncio.get_running_loop().time() + self._shift

    def view(self) -> Cluster:
        """This host as schedule/ sees it now. What lies on disk is as it was when somebody looked last."""
        return self.view_of(self._standings())

    def view_of(self, standings: list[Standing]) -> Cluster:
        """The same with these replicas."""
        return self._forecast.view(standings, self._admission.limits, self.kept_weights())

    def worth_of(self, view: Cluster) -> Worth:
        """What idle replicas are worth to the keep-alive policy now."""
        return self._keeping.worth(view)

    def victims(self) -> Victims:
        """Who goes, as the policy has it now."""
        now = self.now()
        return lambda need, view: self._keeping.policy.victims(need, view, now)

    def blocked(self, crew: Crew) -> DormouseError | None:
        """Why a model can't start whatever goes."""
        return self._admission.blocked(crew)

    def fits(self, runner: Runner) -> bool:
        """Whether it could start without anybody's going."""
        return self._admission.fits(runner)

    def held_up(self, runner: Runner) -> bool:
        """Whether it has to drain, for others wait for its memory."""
        return self._admission.held_up(runner)

    def starting(self, runner: Runner, evicted: tuple[str, ...]) -> None:
        """It starts for a request, and those go for it."""
        self._keeping.starting(runner.model.name, evicted)

    def _standings(self) -> list[Standing]:
        return self._admission.standings()

    async def _make_room(self, runner: Runner) -> None:
        await self._admission.make_room(runner, for_request=runner not in self._ahead)

    async def _foresee(self, runner: Runner, path: StartPath) -> Expected | None:
        """There is room, and the start begins: what it should take."""
        crew = self._crews[runner.model.name]
        await self._forecast.look([crew.standing(runner, self._shift)], path)
        own, view = self._before(runner)
        return self._forecast.expect(own, path, view, self._why(runner, path))

    def _before(self, runner: Runner) -> tuple[Standing, Cluster]:
        """A replica that starts as if it had nothing yet, and the view with no others but those of its model."""
        crew = self._crews[runner.model.name]
        own = with_needs(crew.standing(runner, self._shift))
        beside = [crew.standing(other, self._shift) for other in crew if other is not runner]
        return own, self.view_of([own, *beside])

    def _why(self, runner: Runner, path: StartPath) -> str:
        """Why a start goes this way, in words."""
        why = {
            "sleep": "its process was there",
            "snapshot": f"snapshot {runner.replica.snapshot_id}",
            "template": f"no snapshot; template {runner.replica.template_id}",
        }.get(path, "no snapshot, no template")
        if (error := runner.replica.last_error) is not None:
            why += f"; after {error.code}"
        evicted = self._admission.evicted_for(runner)
        return f"{why}; evicted {', '.join(evicted)}" if evicted else why

    def _came_true(self, runner: Runner, expected: Expected | None, phases: Phases) -> None:
        own, view = self._before(runner)
        took = self._forecast.came_true(own, expected, phases, view)
        self._forecast.trim_tier(self._admission.limits.dram_tier)
        if expected is not None:
            for observer in self._observers:
                observer.foretold(own.model, expected.path, expected.estimate.mean, took)
            if expected.path == "cold":
                self._in_background(self._forecast.note_imported(own.engine), "the page cache could not be read: %s")
        self._in_background(self._forecast.save(), "what was learned could not be saved: %s")

    def _missed(self, runner: Runner, error: BaseException) -> None:
        own = self._crews[runner.model.name].standing(runner, self._shift)
        self._forecast.failed(own, error.code if isinstance(error, DormouseError) else "given up")

    # Replicas that nobody has asked for yet

    def _start_ahead(self, name: str, may_evict: bool) -> None:
        """One more for the policy: what is provisioned has the right to others' room, what is made ready ahead not."""
        crew = self._crews[name]
        if may_evict or not crew.awake:
            self._in_background(self._make_one_ready(crew, may_evict), f"model {name} was not made ready ahead: %s")

    async def _make_one_ready(self, crew: Crew, may_evict: bool) -> None:
        await self._admission.know_gpus(crew)
        runner = crew.to_start(self._place_for(crew, may_evict), self._ahead)
        if self._may_go_ahead(runner):
            await self._make_ready(runner, may_evict)

    def _start_beside(self, crew: Crew, may_evict: bool) -> bool:
        """One more for the autoscaler, where placement has a place for it at once."""
        option = self._place_for(crew, may_evict)
        runner = crew.to_start(option, self._ahead)
        if option is None or not self._may_go_ahead(runner):
            return False
        self._ahead.add(runner)
        entered = runner.enter()  # now: the next one is looked for beside it
        complaint = f"replica {runner.name} was not started: %s"
        self._beside[runner] = self._in_background(self._wait_ready(runner, *entered), complaint)
        return True

    def _may_go_ahead(self, runner: Runner) -> bool:
        there = runner.replica.state in (State.ASLEEP, State.DOZING) and not runner.replica.waiting
        return there and runner not in self._ahead

    def _place_for(self, crew: Crew, may_evict: bool) -> Option | None:
        """Where one more replica would start now."""
        view, now = self.view(), self.now()
        request = Request(f"one more of {crew.name}", crew.name, now)
        worth = self.worth_of(view)
        return place_start(request, view, self._forecast.estimator, now, evict=may_evict, worth=worth).chosen

    def _give_up(self, crew: Crew, count: int) -> None:
        """So many of those that the autoscaler wanted are too many now: those that have no memory yet."""
        waiting = [runner for runner in crew if runner in self._beside and runner.waits_for_room]
        for runner in waiting[:count]:
            self._beside[runner].cancel()

    async def _make_ready(self, runner: Runner, may_evict: bool) -> None:
        """Before anybody asks; `may_evict`: others go for it, if they must."""
        self._ahead.add(runner)
        try:
            await self._admission.check_gpu(runner)
            if not may_evict and not self._admission.fits(runner):
                log.info("model %s is not made ready ahead: that would take others' room", runner.name)
                return
            await self._wait_ready(runner, *runner.enter())
        finally:
            self._ahead.discard(runner)

    async def _wait_ready(self, runner: Runner, waiter: int, lease: asyncio.Future[Lease]) -> None:
        try:
            with contextlib.suppress(StoppingError):
                await lease
                self.prewarms[runner.model.name] = self.prewarms.get(runner.model.name, 0) + 1
        finally:
            runner.release(waiter)
            self._ahead.discard(runner)
            self._beside.pop(runner, None)

    def _replan(self, name: str) -> None:
        for runner in self._crews[name]:
            runner.replan()

    def _let_go(self, name: str) -> None:
        """Nobody has asked for a model for so long that its weights need not be in memory."""
        checkpoint = self.models[name].checkpoint
        if self._host is not None and checkpoint is not None and checkpoint in self.kept_weights():
            log.info("the weights of model %s are let go of", name)
            self._in_background(self._host.drop_segment(None, checkpoint), "kept weights could not be freed: %s")

    def changed(self) -> None:
        """Something of some replica has."""
        self.change.set()
        self.change = asyncio.Event()
        self._placing.look()
        if self._scaling is not None:
            self._scaling.changed()
        if self._templates is not None:
            self._templates.consider()

    def _captured(self, kind: str, name: str, snapshot_id: str) -> None:
        """There is a new snapshot, or template: all replicas of the model start from it."""
        if kind == SNAPSHOT_KIND:
            for runner in self._crews[name]:
                runner.note(Renew(snapshot_id))
        self._retire_older(kind, name, snapshot_id)

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
        for runner in self._runners():
            runner.note(Withdraw(snapshot_id))
        if self._templates is not None:
            self._templates.withdraw(snapshot_id)

    def _in_background(self, work: Coroutine[Any, Any, None], complaint: str) -> asyncio.Task[None]:
        """Work that nobody waits for but the end of the node; `complaint` goes to the log when it fails."""

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error(complaint, error)

        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(ended)
        return task

    async def _publish(self) -> None:
        """Write the state after changes, not more often than the interval, until the node ends."""
        while not self._ending.is_set():
            changed = self.change
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
        if self._scaling is not None:
            self._scaling.close()
        self._placing.close()
        if self._templates is not None:
            await self._templates.close()
        for runner in self._runners():
            runner.shut_down()
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                while any(runner.replica.state is not State.ASLEEP for runner in self._runners()):
                    await self.change.wait()
        except TimeoutError:
            log.warning("some workers did not stop within %g s; they are killed", _CLOSE_TIMEOUT)
        for runner in self._runners():
            await runner.abort()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._forecast.save()
        self._ending.set()
        self.changed()
        if self._publisher is not None:
            await self._publisher
        await asyncio.to_thread(withdraw, self._data_dir.run)
