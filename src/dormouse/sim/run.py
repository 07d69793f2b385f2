"""Runs scenarios: each case at each rate under each system, all with the same requests.

Scenario -> trace of a case -> (view, world, control) of a system -> Outcome
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dormouse.errors import ConfigError
from dormouse.schedule.cluster import (
    DISK,
    MEMORY,
    NETWORK,
    Artifact,
    Cluster,
    Link,
    ModelCost,
    Node,
    Request,
    Tier,
)
from dormouse.schedule.keepalive import Minima
from dormouse.schedule.queue import Fairness, Queue
from dormouse.sim.control import Ours
from dormouse.sim.keeping import Keeper
from dormouse.sim.peers import PEERS
from dormouse.sim.policies import keep_alive_policy
from dormouse.sim.records import Counts, Records, Span
from dormouse.sim.scaling import Scaled
from dormouse.sim.scenario import (
    Case,
    ModelGroup,
    NodeGroup,
    Requests,
    Scenario,
    System,
    TenantGroup,
    copies_of,
)
from dormouse.sim.starts import Habits
from dormouse.sim.traces import Trace, drawn, drawn_lengths, drawn_models, popularity, read_trace
from dormouse.sim.worker import Job
from dormouse.sim.world import Control, World

_MOST_SPANS_NODES = 16
_STRIDE = 7919  # a prime: neighbours of a model on one node are not its neighbours on the next


@dataclass(frozen=True)
class Tenant:
    """One of those who ask, of a group of the scenario that has a name and a number."""

    name: str
    of: str
    group: int
    share: float
    cap: int | None
    priority: int


@dataclass(frozen=True)
class Load:
    """One case at one rate."""

    case: str
    rate: float
    nodes: list[NodeGroup]
    models: list[ModelGroup]
    trace: Trace
    tenants: tuple[Tenant, ...]
    tenant: NDArray[np.int64]
    """Of each request, its number among `tenants`."""


@dataclass(frozen=True)
class Outcome:
    """What became of it under one system. `wall` is what simulating took, of real time."""

    system: str
    load: Load
    records: Records
    counts: Counts
    seconds: float
    dram_byte_seconds: float
    errors: tuple[int, float, float]
    events: int
    wall: float
    spans: list[Span] | None


def simulate(
    scenario: Scenario,
    *,
    traces: Path,
    systems: tuple[str, ...] = (),
    cases: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda _text: None,
    spans: bool = False,
) -> Iterator[Outcome]:
    """All that the scenario asks for, or only some systems and cases of it."""
    chosen = _chosen(scenario.systems, systems, "system")
    for load in loads(scenario, traces, cases):
        for name in chosen:
            say(f"{load.case or scenario.name}, {load.rate:g}/s, {name}")
            yield run_one(scenario, load, name, spans=spans)


def _chosen(known: dict[str, System] | dict[str, Case], wanted: tuple[str, ...], what: str) -> tuple[str, ...]:
    for name in wanted:
        if name not in known:
            raise ConfigError(f"the scenario has no {what} {name!r}", remedy=f"It has {', '.join(known)}")
    return wanted or tuple(known)


def loads(scenario: Scenario, traces: Path, only: tuple[str, ...] = ()) -> Iterator[Load]:
    """Each case at each of its rates."""
    cases = scenario.cases or {"": Case()}
    for number, (name, case) in enumerate(cases.items()):
        if only and name not in _chosen(scenario.cases, only, "case"):
            continue
        groups = case.models or scenario.models
        requests = case.requests or scenario.requests
        for rate in case.rates or [requests.rate]:
            random = np.random.default_rng([scenario.seed, number, round(rate * 1e6)])
            trace = make_trace(requests, rate, sum(group.copies for group in groups), scenario.duration, traces, random)
            shown = len(trace) / scenario.duration if requests.trace else rate
            tenants = _tenants(scenario.tenants)
            shares = np.array([tenant.share for tenant in tenants])
            random = np.random.default_rng([scenario.seed, number, round(rate * 1e6), 1])
            tenant = random.choice(len(tenants), len(trace), p=shares / shares.sum())
            yield Load(name, shown, case.nodes or scenario.nodes, groups, trace, tenants, tenant)


def _tenants(groups: list[TenantGroup]) -> tuple[Tenant, ...]:
    """Each by itself; one without a name when the scenario has none."""
    found = [
        Tenant(name, group.name, number, group.share / group.copies, group.cap, group.priority)
        for number, group in enumerate(groups)
        for name in copies_of(group.name, group.copies)
    ]
    return tuple(found) or (Tenant("", "", 0, 1.0, None, 0),)


def make_trace(
    requests: Requests, rate: float, models: int, duration: float, folder: Path, random: np.random.Generator
) -> Trace:
    """The requests of a case."""
    shares = popularity(models, requests.popularity)
    if requests.trace is None:
        lengths = requests.lengths
        if lengths.trace is not None:
            source = read_trace(folder / lengths.trace)
            pool = [source.tokens_in, source.tokens_out]
        else:
            pool = drawn_lengths(lengths.mean_in, lengths.mean_out, lengths.cv, random)
        return drawn(shares, rate=rate, duration=duration, cv=requests.cv, lengths=pool, random=random)
    read = read_trace(folder / requests.trace)
    read = Trace(read.time / requests.speed, read.model, read.tokens_in, read.tokens_out, read.names).until(duration)
    model = read.model % models if read.names else drawn_models(len(read), shares, requests.cv, random)
    return Trace(read.time, model, read.tokens_in, read.tokens_out)


def run_one(scenario: Scenario, load: Load, system_name: str, *, spans: bool = False) -> Outcome:
    """One system under one load."""
    system = scenario.systems[system_name]
    began = time.perf_counter()
    random = np.random.default_rng([scenario.seed, 7])
    names, view = build_view(load.nodes, load.models, system)
    habits = Habits(system.loading, {str(path): phases for path, phases in system.paths.items()}, system.noise,
                    scenario.timeout)  # fmt: skip
    small = sum(group.count for group in load.nodes) <= _MOST_SPANS_NODES
    world = World(view, habits, random, spans=spans and small)
    if system.loading.preloaded:
        _fill_disks(world, system.loading.preloaded)
    future = _future(load, names) if system.keep_alive.policy == "oracle" else {}
    policy = keep_alive_policy(system.keep_alive, world.estimator, future)
    keeper = Keeper(world, policy, prewarms=system.placement == "dormouse")
    world.control = _control(world, keeper, scenario, load, system, random)
    for event in scenario.events:
        world.clock.at(event.at, world.lose_node if event.what == "lost" else world.return_node, event.node)
    _play(world, load, names)
    world.close()
    errors = world.estimator.errors()
    counts = world.counts
    return Outcome(
        system_name, load, world.records, counts, world.now,
        counts.tier_byte_seconds + counts.process_byte_seconds, (errors.count, errors.median, errors.p99),
        world.clock.happened, time.perf_counter() - began, world.spans,
    )  # fmt: skip


def _control(
    world: World, keeper: Keeper, scenario: Scenario, load: Load, system: System, random: np.random.Generator
) -> Control:
    control: Control
    if system.placement == "dormouse":
        caps = {tenant.name: tenant.cap for tenant in load.tenants if tenant.cap is not None}
        control = Ours(world, keeper, Queue(Fairness(tenant_caps=caps)))
    else:
        control = PEERS[system.placement](world, keeper, evict_idle=system.evict_idle, random=random)
    groups = [group for group in load.models if group.least]
    minima = {name: group.minima(scenario.begins) for group in groups for name in _names(group)}
    rule = system.scaling
    scaling = {name: rule.of(group) for group in load.models for name in _names(group)} if rule else {}
    if not (minima or scaling):
        return control
    return Scaled(world, control, scaling, Minima(minima), keeper.worth if keeper.policy is not None else None)


def _names(group: ModelGroup) -> list[str]:
    return copies_of(group.name, group.copies)


def _future(load: Load, names: list[str]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {}
    for moment, model in zip(load.trace.time.tolist(), load.trace.model.tolist(), strict=True):
        times.setdefault(names[model], []).append(moment)
    return times


def _play(world: World, load: Load, names: list[str]) -> None:
    """Let the requests come, then wait for the last of them."""
    trace = load.trace
    columns = (trace.time.tolist(), trace.model.tolist(), load.tenant.tolist(), trace.tokens_in.tolist(),
               trace.tokens_out.tolist())  # fmt: skip
    clock, control = world.clock, world.control
    for number, (moment, model, which, tokens_in, tokens_out) in enumerate(zip(*columns, strict=True)):
        clock.advance(moment)
        name, tenant = names[model], load.tenants[which]
        expected = world.expected_tokens(name)
        request = Request(f"r{number}", name, moment, tenant.priority, tenant.name, tokens_in, expected)
        control.submit(Job(request, tokens_in, tokens_out, tenant.group))
    while len(world.records) < len(trace):
        due = clock.next_time()
        if due == float("inf"):
            raise RuntimeError(f"{len(trace) - len(world.records)} requests wait and nothing is to come")
        clock.advance(due)


# --- from the scenario to the view


def build_view(machines: list[NodeGroup], groups: list[ModelGroup], system: System) -> tuple[list[str], Cluster]:
    """Names of the models by number, and the empty cluster."""
    models = [cost for group in groups for cost in _costs(group, system)]
    nodes = [node for number, group in enumerate(machines) for node in _nodes(group, number, system.loading.sequential)]
    view = Cluster(nodes, models)
    for model in models:
        view.hold_remote(model.weights.key)
        if model.image:
            view.hold_remote(model.image.key)
    return [model.name for model in models], view


def _nodes(group: NodeGroup, number: int, sequential: bool) -> Iterator[Node]:
    links = {NETWORK: group.network, DISK: group.disk, MEMORY: group.memory, "pcie": group.pcie}
    links |= {f"pcie:{gpu}": group.pcie for gpu in range(group.gpus)}
    links.pop("pcie")
    for index in range(group.count):
        yield Node(
            f"n{number}-{index}",
            (group.gpu_memory,) * group.gpus,
            group.host_memory,
            {name: Link(rate, fifo=sequential) for name, rate in links.items()},
            group.dram_tier,
            group.disk_tier,
        )


def _costs(group: ModelGroup, system: System) -> Iterator[ModelCost]:
    coded = int(group.weights * group.coded) if system.loading.coded else group.weights
    phases = {path: {"process": part.process, "ready": part.ready} for path, part in system.paths.items()}
    for name in _names(group):
        image = Artifact(f"image:{name}", group.process, group.image) if "snapshot" in system.paths else None
        yield ModelCost(
            name,
            Artifact(name, group.weights, coded),
            kv_bytes=group.kv,
            gpus=group.gpus,
            process_bytes=group.process,
            image=image,
            slots=group.slots,
            phases=phases,  # type: ignore[arg-type]
            token_seconds=group.token_time,
            prefill_seconds=1 / group.prefill_rate,
            max_replicas=system.scaling.most(group) if system.scaling else group.max_replicas,
            pinned=group.pinned,
        )


def _fill_disks(world: World, copies: int) -> None:
    """Round robin over the nodes, each model on so many, until nothing more fits."""
    view = world.view
    nodes = list(view.nodes)
    models = [view.model(name) for name in view.models]
    room = {node: view.node(node).disk_tier for node in nodes}
    for copy in range(min(copies, len(nodes))):
        placed = False
        for number, model in enumerate(models):
            node = nodes[(number + copy * _STRIDE) % len(nodes)]
            parts = [part for part in (model.weights, model.image) if part is not None]
            size = sum(part.coded_bytes for part in parts)
            if size <= room[node]:
                room[node] -= size
                placed = True
                for part in parts:
                    world.tiers.keep(part.key, part.coded_bytes, node, Tier.DISK)
        if not placed:
            return
