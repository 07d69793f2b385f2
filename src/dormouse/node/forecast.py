"""What this node expects of its next starts: its view for schedule/, estimates before each start, and their errors.

    Standing of each model, what lies where  ->  view()  ->  schedule: estimate, place, keep-alive policies
    a start: expect() before it, came_true() after it  ->  Estimator  ->  learned.json

The view is made anew from the models' standings whenever somebody asks: there are few models on one host, and so it can
never be stale. It has one node, `HERE`. Reads of the store and the page cache are done in threads (`look`).
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dormouse.errors import DormouseError
from dormouse.node import learned
from dormouse.node.observed import observed, seconds_of
from dormouse.node.page_cache import OnDisk, Stretch, cached_bytes
from dormouse.node.parts import Catalog
from dormouse.node.replica import State as Doing
from dormouse.phases import Phases
from dormouse.schedule.cluster import (
    DISK,
    MEMORY,
    Artifact,
    Cluster,
    Link,
    ModelCost,
    Node,
    PhaseName,
    Replica,
    Running,
    StartPath,
    StartPlan,
    State,
    Tier,
)
from dormouse.schedule.estimate import Estimate, Estimator

log = logging.getLogger(__name__)

HERE = "this host"
KEPT = 20
"""Starts per model that are remembered with their estimates."""

_LINKS: Mapping[str, Link] = MappingProxyType({DISK: Link(1e9), MEMORY: Link(5e10), "pcie": Link(5e10)})
"""First guesses; the estimator learns the true rates. What comes from further away teaches only its first link, so the
last one must be thought fast."""
_GUESSES: Mapping[StartPath, Mapping[PhaseName, float]] = MappingProxyType(
    {
        "sleep": {"ready": 0.05},
        "snapshot": {"process": 0.3, "ready": 0.2},
        "template": {"process": 1.0, "ready": 0.2},
        "cold": {"process": 3.0, "ready": 0.5},
    }
)
_WARM = 0.9  # of an image's bytes in the page cache: it will not be read
_LIBRARY = 16 << 20  # files of this size and more stand for all that an import reads
_UNKNOWN_GPU = 1 << 50


@dataclass(frozen=True)
class Standing:
    """One replica of a model as it is now. Bytes: `host_bytes` and `gpu_bytes` are what counts for it at present (all
    of a ready replica, the process of one that dozes), `needs_host` and `needs_gpu` what a start takes,
    `process_bytes` and `context_bytes` what of it stays while it dozes, of the host and of its GPU. `running` says
    since when it has each of its requests, `devices` on which GPUs its model may start, `usual` how many seconds a
    request of the model takes (0: nobody knows yet), `most` how many replicas there may be."""

    name: str
    model: str
    engine: str
    checkpoint: str | None
    weight_bytes: int
    gpu: str | None
    slots: int
    doing: Doing
    since: float
    running: tuple[float, ...] = ()
    waiting: int = 0
    devices: tuple[str, ...] = ()
    usual: float = 0.0
    most: int = 1
    pinned: bool = False
    snapshot_id: str | None = None
    template_id: str | None = None
    host_bytes: int = 0
    gpu_bytes: int = 0
    needs_host: int = 0
    needs_gpu: int = 0
    process_bytes: int = 0
    context_bytes: int = 0

    @property
    def awake(self) -> bool:
        """It has its weights, or will have."""
        return self.doing not in (Doing.ASLEEP, Doing.DOZING)

    @property
    def leaving(self) -> bool:
        """Its memory is about to be freed, or most of it."""
        return self.doing in (Doing.QUIESCING, Doing.CAPTURING, Doing.STOPPING)

    @property
    def gpus(self) -> tuple[int, ...]:
        return () if self.gpu is None else (number_of(self.gpu),)

    @property
    def may_be_on(self) -> tuple[int, ...]:
        """The GPUs that its model may start on."""
        return tuple(number_of(device) for device in self.devices) if self.gpu is not None else ()


def number_of(gpu: str) -> int:
    """Of "cuda:N"."""
    return int(gpu.partition(":")[2])


@dataclass(frozen=True)
class Limits:
    """What models may take: of the host's memory, of each GPU that is known, and as coded weights in the DRAM tier."""

    host: int
    gpus: Mapping[str, int]
    dram_tier: int = 0


@dataclass(frozen=True)
class Expected:
    """An estimate, made before a start by `path`. `plan` is what was thought to move, over `links` as they were."""

    model: ModelCost
    path: StartPath
    estimate: Estimate
    plan: StartPlan
    links: dict[str, Link]
    began: float


@dataclass
class Told:
    """What was decided, what it was estimated to take, and what came of it. `at` is in seconds of Unix time, `took` and
    the estimate leave out the wait for room; `outcome` is under way, ready, or the code of what went wrong."""

    replica: str
    at: float
    path: StartPath
    estimate: Estimate | None
    why: str
    took: float | None = None
    outcome: str = "under way"

    def as_json(self) -> dict[str, Any]:
        return {
            "replica": self.replica,
            "at": self.at,
            "path": self.path,
            "why": self.why,
            **estimate_json(self.estimate),
            "took": self.took,
            "outcome": self.outcome,
        }


def estimate_json(estimate: Estimate | None) -> dict[str, Any]:
    """As plain data."""
    if estimate is None:
        return {"estimate": None, "p95": None, "parts": {}}
    return {"estimate": estimate.mean, "p95": estimate.p95, "parts": dict(estimate.parts)}


class Forecast:
    """For one node. `now` is the clock of the view, `wall_clock` that of what is told."""

    def __init__(
        self, folder: Path, catalog: Catalog, now: Callable[[], float], wall_clock: Callable[[], float]
    ) -> None:
        self.estimator = Estimator()
        self._folder = folder
        self._catalog = catalog
        self._now = now
        self._wall_clock = wall_clock
        self._found: dict[str, OnDisk] = {}
        self._near: set[str] = set()
        self._imported: dict[str, int] = {}  # bytes of an engine's libraries in memory right after a cold start
        self._in_tier: dict[str, int] = {}  # coded weights that the loader should have, the longest unused first
        self._under_way: dict[str, Expected] = {}
        self._told: dict[str, deque[Told]] = {}
        self._saving = asyncio.Lock()

    async def load(self) -> None:
        """What was learned before."""
        self.estimator = await asyncio.to_thread(learned.load, self._folder)

    async def save(self) -> None:
        """Keep what has been learned. A failure is only logged: it costs nobody anything now."""
        async with self._saving:
            saved = self.estimator.saved()
            try:
                await asyncio.to_thread(learned.save, self._folder, saved)
            except OSError as error:
                log.warning("what was learned of starts was not saved: %s", error)

    # Where bytes are

    async def look(self, standings: Iterable[Standing], path: StartPath | None = None) -> None:
        """See what of these models lies where, by `path` or by all; nothing that is asked later blocks."""
        wanted: dict[str, str | None] = {}
        for one in standings:
            images = {"snapshot": one.snapshot_id, "template": one.template_id}
            for image in images.values() if path is None else (images.get(path),):
                if image is not None:
                    wanted[image] = image
            if one.checkpoint is not None and path != "sleep":
                wanted[one.checkpoint] = one.checkpoint
            if path in (None, "cold"):
                wanted[_programs(one.engine)] = None
        if wanted:
            await asyncio.to_thread(self._look, wanted)

    def _look(self, wanted: Mapping[str, str | None]) -> None:
        """What can't be found has no size here; whatever is wrong with it, the start will tell."""
        for key, manifest in wanted.items():
            try:
                if key not in self._found:
                    self._found[key] = self._find(key, manifest)
            except (DormouseError, OSError) as error:
                log.info("the size of %s is not known: %s", key, error)
                continue
            (self._near.add if self._is_warm(key) else self._near.discard)(key)

    def _find(self, key: str, manifest: str | None) -> OnDisk:
        if manifest is None:
            return libraries(key.removeprefix(_programs("")))
        return self._catalog.on_disk(manifest)

    def _is_warm(self, key: str) -> bool:
        """Whether the page cache has it. Of an engine's libraries only some part is ever read: as much as last time."""
        found = self._found[key]
        whole = self._imported.get(key, found.stored_bytes) if key.startswith(_programs("")) else found.stored_bytes
        cached = cached_bytes(found.stretches) if found.stretches else None
        return cached is not None and cached >= _WARM * whole

    def forget(self, snapshot_id: str) -> None:
        """It is gone."""
        self._found.pop(snapshot_id, None)
        self._near.discard(snapshot_id)

    async def know(self, snapshot_id: str) -> None:
        """It is new: find out its size now, not when it is needed."""
        await asyncio.to_thread(self._look, {snapshot_id: snapshot_id})

    # The view

    def view(
        self,
        standings: Sequence[Standing],
        limits: Limits,
        kept: Iterable[str] = (),
    ) -> Cluster:
        """These models with what they hold, as schedule/ sees them; `kept` are the checkpoints in memory."""
        view = Cluster([_node(standings, limits)])
        kept = set(kept)
        models: dict[str, list[Standing]] = {}
        for one in standings:
            models.setdefault(one.model, []).append(one)
        for replicas in models.values():
            one = min(replicas, key=_nearness)
            view.add_model(self._cost(one, replicas))
            self._lay(view, one, replicas, kept, limits)
        for one in standings:
            if one.doing is not Doing.ASLEEP:
                view.put(_replica(one, self._under_way.get(one.name)))
        for link, queued in self._queued().items():
            view.set_link(HERE, link, sum(queued), len(queued))
        return view

    def _queued(self) -> dict[str, list[int]]:
        """What starts under way move, by link."""
        queued: dict[str, list[int]] = {}
        for expected in self._under_way.values():
            for move in (expected.plan.weights, expected.plan.image):
                for link in move.links if move is not None and move.size else ():
                    queued.setdefault(link, []).append(move.size_on(link) if move else 0)
        return queued

    def _cost(self, one: Standing, replicas: Sequence[Standing]) -> ModelCost:
        """What the next start of a model takes, of `one` that has no process if there is one: replicas that there are
        have what they have."""
        device, host = one.needs_gpu, one.needs_host
        shared = one.checkpoint is not None and any(other.awake for other in replicas if other is not one)
        shared = shared and len(one.may_be_on) <= 1  # else on some GPUs only
        weights = 0 if shared else min(one.weight_bytes, device if one.gpu else host)
        process = host if one.gpu else min(one.process_bytes, host - weights)
        coded = self._found[one.checkpoint].stored_bytes if one.checkpoint in self._found else one.weight_bytes
        return ModelCost(
            one.model,
            Artifact(_weights(one), weights, coded),
            one.engine,
            kv_bytes=max((device if one.gpu else host - process) - weights, 0),
            gpus=len(one.gpus),
            process_bytes=process,
            asleep_bytes=one.context_bytes,
            image=self._artifact(one.snapshot_id),
            template=self._artifact(one.template_id),
            programs=self._artifact(_programs(one.engine)),
            paths=(_first_path(one),),
            slots=one.slots,
            phases=_GUESSES,
            token_seconds=one.usual,
            max_replicas=one.most,
            only_on=one.may_be_on,
        )

    def _artifact(self, key: str | None) -> Artifact | None:
        if key is None:
            return None
        found = self._found.get(key, OnDisk(0, 0, ()))
        return Artifact(key, found.plain_bytes, found.stored_bytes)

    def _lay(self, view: Cluster, one: Standing, replicas: Sequence[Standing], kept: set[str], limits: Limits) -> None:
        """What lies where, of one model. Weights that are in memory, decoded, are where a CPU needs them."""
        for key in (_weights(one), one.snapshot_id, one.template_id, _programs(one.engine)):
            if key is not None:
                view.hold(key, HERE, Tier.DISK)
                if key in self._near:
                    view.hold(key, HERE, Tier.DRAM)
        everywhere = len(one.may_be_on) <= 1 and any(other.awake for other in replicas)
        if one.checkpoint is None or one.checkpoint in kept or everywhere:
            view.hold(_weights(one), HERE, Tier.GPU)
        elif one.gpu and one.checkpoint in self._in_tier and limits.dram_tier:
            view.hold(_weights(one), HERE, Tier.DRAM)

    # Estimates

    def estimate(self, one: Standing, path: StartPath, view: Cluster) -> Estimate | None:
        """Of a start that begins now; None where that path is not open."""
        model = view.model(one.model)
        plan = view.plan(model, HERE, path, one.gpus)
        return self.estimator.estimate(model, HERE, plan, view) if plan else None

    def expect(self, one: Standing, path: StartPath, view: Cluster, why: str) -> Expected | None:
        """Note that a start by this path begins now. `view`: before it holds anything."""
        model = view.model(one.model)
        plan = view.plan(model, HERE, path, one.gpus)
        expected = None
        if plan is not None:
            moved = [link for move in (plan.weights, plan.image) if move for link in move.links]
            links = {link: view.link(HERE, link) for link in moved}
            estimate = self.estimator.estimate(model, HERE, plan, view)
            expected = self._under_way[one.name] = Expected(model, path, estimate, plan, links, self._now())
        told = Told(one.name, self._wall_clock(), path, expected.estimate if expected else None, why)
        self._told.setdefault(one.model, deque(maxlen=KEPT)).append(told)
        return expected

    def came_true(self, one: Standing, expected: Expected | None, phases: Phases, view: Cluster) -> float:
        """The start has succeeded: learn from it. The answer are its seconds."""
        self._under_way.pop(one.name, None)
        took = seconds_of(phases)
        self._settle(one, "ready", took)
        if expected is not None:
            estimate, links = expected.estimate, expected.links
            self.estimator.observe(
                observed(expected.model, HERE, expected.plan, phases, expected=estimate, links=links), view
            )
        if one.checkpoint is not None and one.gpu:
            self._loaded(one.checkpoint)
        return took

    def failed(self, one: Standing, outcome: str) -> None:
        """The start under way has failed, or was given up."""
        self._under_way.pop(one.name, None)
        self._settle(one, outcome, None)

    def told(self, model: str) -> list[Told]:
        """The latest starts of a model, oldest first."""
        return list(self._told.get(model, ()))

    async def note_imported(self, engine: str) -> None:
        """A cold start has read what it needs of the engine's libraries."""
        key = _programs(engine)
        found = self._found.get(key)
        if found is not None and found.stretches:
            cached = await asyncio.to_thread(cached_bytes, found.stretches)
            if cached:
                self._imported[key] = cached

    def _settle(self, one: Standing, outcome: str, took: float | None) -> None:
        for told in reversed(self._told.get(one.model, ())):
            if told.replica == one.name:
                if told.outcome == "under way":
                    told.outcome, told.took = outcome, took
                return

    def _loaded(self, checkpoint: str) -> None:
        """The loader keeps what it read last, as far as its budget goes."""
        self._in_tier.pop(checkpoint, None)
        self._in_tier[checkpoint] = self._found[checkpoint].stored_bytes if checkpoint in self._found else 0

    def trim_tier(self, budget: int) -> None:
        """Forget what is more than the loader may hold."""
        while sum(self._in_tier.values()) > budget:
            del self._in_tier[next(iter(self._in_tier))]


def _nearness(one: Standing) -> int:
    """Of a model's replicas, the one without a process is what the next start is like, or the one that is parked."""
    return 0 if one.doing is Doing.ASLEEP else 1 if one.doing is Doing.DOZING else 2


def _first_path(one: Standing) -> StartPath:
    """The only one that a node takes without a process, unless it fails."""
    return "snapshot" if one.snapshot_id else "template" if one.template_id else "cold"


def _weights(one: Standing) -> str:
    return one.checkpoint or f"weights of {one.model}"


def _programs(engine: str) -> str:
    return f"libraries of {engine}"


@cache
def libraries(engine: str) -> OnDisk:
    """The large files that a cold start of an engine imports: found, not imported. Blocks."""
    spec = importlib.util.find_spec("torch") if engine == "transformers" else None
    if spec is None or spec.origin is None:
        return OnDisk(0, 0, ())
    files = [(path, path.stat().st_size) for path in (Path(spec.origin).parent / "lib").glob("*.so*")]
    parts = tuple(Stretch(path, 0, size) for path, size in sorted(files) if size >= _LIBRARY)
    size = sum(part.length for part in parts)
    return OnDisk(size, size, parts)


def _node(standings: Sequence[Standing], limits: Limits) -> Node:
    """This host; where more is taken than may be, nothing is free."""
    numbers = {number for one in standings for number in (*one.gpus, *one.may_be_on)}
    gpus = []
    for number in range(max(numbers, default=-1) + 1):
        most = limits.gpus.get(f"cuda:{number}", _UNKNOWN_GPU)
        gpus.append(max(most, sum(one.gpu_bytes for one in standings if number in one.gpus)))
    host = max(limits.host, sum(one.host_bytes for one in standings))
    return Node(HERE, tuple(gpus), host, dict(_LINKS), dram_tier=limits.dram_tier)


def _replica(one: Standing, expected: Expected | None) -> Replica:
    tokens = 1 if one.usual else 0  # a request is a token that takes as long as requests do
    busy = tuple(
        Running(f"{one.name} {number}", began, expected_tokens=tokens, movable=False)
        for number, began in enumerate(one.running)
    )
    coming = one.leaving and one.waiting  # as soon as it has gone it starts, or goes on where it was
    state = State.STARTING if coming else _STATES.get(one.doing, State.STARTING)
    if state is State.HOT and len(busy) >= one.slots:
        state = State.BUSY
    ready_at = expected.began + expected.estimate.mean if expected is not None else 0.0
    done_at = max(one.running, default=ready_at) + one.usual
    return Replica(
        *(one.name, one.model, HERE, one.gpus, state, one.since, busy, one.waiting, ready_at, done_at),
        pinned=one.pinned,
        measured=(one.gpu_bytes, one.host_bytes),
    )


_STATES: Mapping[Doing, State] = MappingProxyType(
    {
        Doing.READY: State.HOT,
        Doing.DOZING: State.SLEEPING,
        Doing.QUIESCING: State.LEAVING,
        Doing.CAPTURING: State.LEAVING,
        Doing.STOPPING: State.LEAVING,
    }
)


def with_needs(one: Standing) -> Standing:
    """The same before it has anything."""
    return replace(one, doing=Doing.ASLEEP, host_bytes=0, gpu_bytes=0)
