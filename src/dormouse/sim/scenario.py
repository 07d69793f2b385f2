"""What is simulated: one YAML file, checked whole before anything runs.

    path -> load_scenario -> Scenario (frozen) -> run.py;   scenario_schema -> its JSON schema

A scenario has nodes, models, requests, and systems that all get the same requests. `cases` are variations of it (other
models, other loads); each case runs under each system. Docs: docs/simulation.md.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from dormouse.config import Duration, KeepAlive, Marks, Size, SizeOrNone, mistake_place, parse_duration, read_yaml
from dormouse.errors import ConfigError
from dormouse.schedule.autoscale import Scaling
from dormouse.schedule.keepalive import BALANCE, RELUCTANCE, Minima, Minimum
from dormouse.sim.packing import Nodes, Replicas, excess

_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])?(B/s|bps)")
_SCALE = {None: 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def parse_rate(value: object) -> object:
    """Bytes a second from 1e9, "5GB/s" or "10Gbps". Raises ValueError."""
    if isinstance(value, str):
        match = _RATE.fullmatch(value.strip())
        if match is None:
            raise ValueError("is not a rate: write bytes a second, or a number with GB/s, MB/s, Gbps or the like")
        return float(match[1]) * _SCALE[match[2]] / (8 if match[3] == "bps" else 1)
    return value


Rate = Annotated[
    float,
    BeforeValidator(parse_rate),
    Field(gt=0, lt=1e15),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0},
                {"type": "string", "pattern": r"^\d+(\.\d+)?\s*[KMGT]?(B/s|bps)$"},
            ]
        }
    ),
]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 .,_+-]{0,63}$")]
Seconds = Annotated[float, Field(ge=0, lt=1e9)]
Moment = Annotated[float, BeforeValidator(parse_duration), Field(ge=0, lt=1e9)]
Path_ = Literal["sleep", "snapshot", "cold"]

DAY = 86_400.0
_TIME_OFDAY = re.compile(r"(\d{1,2}):(\d{2})")


def parse_time_of_day(value: object) -> object:
    """Seconds since midnight from "08:30". Raises ValueError. (YAML reads 18:00 without quotes as 60 * 18 + 0.)"""
    if isinstance(value, int):
        value = f"{value // 60}:{value % 60:02}"
    match = _TIME_OFDAY.fullmatch(value) if isinstance(value, str) else None
    seconds = int(match[1]) * 3600.0 + int(match[2]) * 60.0 if match and int(match[2]) < 60 else DAY + 1
    if seconds > DAY:
        raise ValueError(f"{value} is no time of the day: write one from 00:00 to 24:00")
    return seconds


TimeOfDay = Annotated[
    float,
    BeforeValidator(parse_time_of_day),
    WithJsonSchema({"type": "string", "pattern": r"^\d{1,2}:\d{2}$"}),
]


class Misplaced(ValueError):
    """A mistake that a check of the whole found, and where it lies below what was checked."""

    def __init__(self, message: str, *location: str | int) -> None:
        super().__init__(message)
        self.location = location


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class NodeGroup(_Part):
    """Nodes that are alike."""

    count: Annotated[int, Field(ge=1, le=100_000)] = 1
    gpus: Annotated[int, Field(ge=0, le=64)]
    """GPUs of each node; 0: models run in host memory."""
    gpu_memory: Size = 80 << 30
    """Of each GPU, for models."""
    host_memory: Size
    """For processes (and for models without a GPU)."""
    dram_tier: SizeOrNone = 0
    """For weights and snapshots that are kept in memory."""
    disk_tier: SizeOrNone = 0
    """For weights and snapshots that are kept on the disk."""
    network: Rate
    """From the remote store to this node."""
    disk: Rate
    """Reads of the disk."""
    pcie: Rate
    """Host memory to one GPU."""
    memory: Rate = 20e9
    """Host memory to host memory: where pages of a process go."""


class Times(_Part):
    """A part of each day. From after to: over midnight."""

    since: Annotated[TimeOfDay, Field(alias="from")]
    until: Annotated[TimeOfDay, Field(alias="to")]
    replicas: Annotated[int, Field(ge=1, le=100_000)]
    """So many are ready then."""

    @model_validator(mode="after")
    def _lasts(self) -> Self:
        if self.since % DAY == self.until % DAY and self.until - self.since < DAY:
            raise ValueError("begins when it ends: leave the schedule out, and set min_replicas, for the whole day")
        return self


class ModelGroup(_Part):
    """Models that are alike. With copies > 1 they are called NAME-0, NAME-1, ... and share nothing."""

    name: Name
    copies: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    weights: Size
    """Plain bytes of its weights."""
    coded: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Coded bytes by plain bytes, for systems that code weights."""
    kv: SizeOrNone = 0
    """Memory for its KV cache."""
    gpus: Annotated[int, Field(ge=0, le=64)] = 1
    """GPUs that one replica takes."""
    process: Size = 1 << 30
    """Host memory of its process."""
    image: Size = 200_000_000
    """Stored bytes of its snapshot, without weights."""
    slots: Annotated[int, Field(ge=1, le=4096)] = 1
    """Requests that one replica runs at once."""
    token_time: Seconds = 0.03
    """Between two tokens of one request."""
    prefill_rate: Annotated[float, Field(gt=0)] = 5000.0
    """Tokens a second of a prompt."""
    min_replicas: Annotated[int, Field(ge=0, le=100_000)] = 0
    """So many are always ready, from the start; they go for nobody."""
    max_replicas: Annotated[int, Field(ge=0, le=100_000)] = 0
    """No more are ready or starting at once. 0: no limit."""
    schedule: list[Times] = []
    """Times of the day at which more are ready."""
    pinned: bool = False
    """true: once ready, its replicas stay, whatever keep-alive and other models want."""

    @property
    def least(self) -> int:
        """The most that its minima ask for at any time."""
        return max((self.min_replicas, *(times.replicas for times in self.schedule)))

    def minima(self, begins: float) -> list[Minimum]:
        """For time that starts at `begins` of a day."""
        found = [Minimum(self.min_replicas)] if self.min_replicas else []
        for times in self.schedule:
            whole = times.until - times.since >= DAY
            since, until = ((at - begins) % DAY for at in (times.since, times.until))
            found.append(Minimum(times.replicas) if whole else Minimum(times.replicas, since, until))
        return found

    @model_validator(mode="after")
    def _min_below_max(self) -> Self:
        if self.max_replicas and self.least > self.max_replicas:
            raise ValueError(f"{self.least} replicas are to be ready, but max_replicas is {self.max_replicas}")
        return self


class TenantGroup(_Part):
    """Tenants that are alike. With copies > 1 each has its own cap and an equal part of the share."""

    name: Name
    copies: Annotated[int, Field(ge=1, le=10_000)] = 1
    share: Annotated[float, Field(gt=0, lt=1e9)] = 1.0
    """Their part of the requests, beside the shares of the others."""
    cap: int | None = None
    """Requests of each tenant that run at once; those beyond wait. Only placement `dormouse` knows caps."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Each step is worth a head start of 10 s. Only placement `dormouse` knows priorities."""

    @field_validator("cap")
    @classmethod
    def _lets_some_run(cls, cap: int | None) -> int | None:
        if cap is not None and cap < 1:
            raise ValueError(f"{cap} would let none of its requests run; leave it out for no cap")
        return cap


class NodeEvent(_Part):
    """A node is lost, or comes back."""

    at: Moment
    node: str
    """nG-I: number I of group G of the nodes, both counted from 0."""
    what: Literal["lost", "back"]
    """lost: what runs and lies in memory there is gone, its requests begin again. back: with what lay on its disk."""


class Lengths(_Part):
    """Tokens of a request: drawn log-normally, or from a trace."""

    trace: Path | None = None
    """A file whose pairs of lengths are drawn from, instead of the following."""
    mean_in: Annotated[float, Field(ge=1)] = 200.0
    mean_out: Annotated[float, Field(ge=1)] = 100.0
    cv: Annotated[float, Field(ge=0, le=10)] = 1.0


class Requests(_Part):
    """Who asks for what and when: a trace, or drawn requests."""

    trace: Path | None = None
    """A trace file (relative to the folder of traces). Models are told apart by it or drawn by popularity."""
    speed: Annotated[float, Field(gt=0)] = 1.0
    """A trace's times are divided by this."""
    rate: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Requests a second in all, when they are drawn."""
    cv: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Coefficient of variation of the time between two requests for one model (Gamma): 1 is Poisson, 8 is bursty. For a
    trace that names no models: of the number of other requests between them."""
    popularity: Annotated[float, Field(ge=0, le=5)] = 0.0
    """Exponent of Zipf's law of the models' shares: 0 is even."""
    lengths: Lengths = Lengths()


class Loading(_Part):
    """How a system gets weights into place."""

    rate: Rate | None = None
    """The most that its loader does for one GPU, whatever the links could."""
    download_first: bool = False
    """true: a download ends before the load into the GPU begins. false: one pipeline."""
    coded: bool = False
    """true: weights are stored and moved in coded form."""
    sequential: bool = False
    """true: a node loads one model at a time, in the order asked for. false: loads share the links."""
    shared: bool = False
    """true: starts of one model on one node wait for the first one's read, and take it from DRAM. false: each reads."""
    preloaded: Annotated[int, Field(ge=0)] = 1000
    """On how many nodes' disks each model lies from the start, as far as they have room (round robin)."""
    keep_on_disk: bool = True
    """Whether what was downloaded stays on the disk (the least recently used goes for it)."""
    keep_in_dram: bool = True
    """Whether what was loaded stays in the DRAM tier."""

    @model_validator(mode="after")
    def _shares_memory(self) -> Self:
        if self.shared and not self.keep_in_dram:
            raise ValueError("shared needs keep_in_dram: loads share what is in the DRAM tier")
        return self


class Phases(_Part):
    """Seconds of a start whatever the links do: `process` goes side by side with the weights, `ready` after both."""

    process: Seconds = 0.0
    ready: Seconds = 0.0


class KeepAliveRule(_Part):
    """How long an idle replica stays."""

    policy: Literal["fixed", "load", "lru", "greedy-dual", "histogram", "layered", "expected", "oracle"] = "expected"
    """load: as long as loading it took. The others are those of schedule/keepalive.py."""
    seconds: KeepAlive = 60.0
    """For fixed."""
    balance: Annotated[float, Field(gt=0)] = BALANCE
    """For expected: the share of all starts that may be of its own doing. More frees more memory."""
    reluctance: Annotated[float, Field(ge=0, le=1e6)] = RELUCTANCE
    """For fixed, lru, greedy-dual and histogram, which know only who goes first: the seconds for each GB that an
    eviction counts for when a place is chosen. With 10, nobody goes while memory is free anywhere."""


class ScalingRule(_Part):
    """The autoscaler, in Knative's words and with its defaults (schedule/autoscale.py)."""

    target: Annotated[float, Field(gt=0)] | None = None
    """Requests at once that a replica should have. Left out: as many as it has slots."""
    utilization: Annotated[float, Field(gt=0, le=1)] = 0.7
    """The part of the target that is aimed at."""
    stable_window: Duration = 60.0
    panic_window: Duration = 6.0
    panic_threshold: float = 2.0
    """When the panic window asks for so many times the replicas that there are, nothing goes down for a while."""
    max_up_rate: float = 1000.0
    max_down_rate: float = 2.0
    scale_to_zero_grace: Moment = 30.0
    min_replicas: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Of every model."""
    max_replicas: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Of every model. 0: no limit."""
    burst: bool = True
    """true: what waits now counts at once. false: when the windows have seen it, as Knative does it."""

    def of(self, model: ModelGroup) -> Scaling:
        """The rules for one model. Raises ConfigError when they contradict each other."""
        return Scaling(
            self.target or model.slots, self.utilization, self.stable_window, self.panic_window, self.panic_threshold,
            self.max_up_rate, self.max_down_rate, self.scale_to_zero_grace, self.min_replicas,
            self.most(model), self.burst,
        )  # fmt: skip

    def most(self, model: ModelGroup) -> int:
        """The lower one of both limits; 0 when there is none."""
        return min((most for most in (self.max_replicas, model.max_replicas) if most), default=0)


class System(_Part):
    """A way to run the cluster."""

    placement: Literal["any", "random", "locality-preempt", "locality-migrate", "dormouse"] = "dormouse"
    """Who decides: `dormouse` is schedule/place.py; the others are peers', see sim/peers.py."""
    keep_alive: KeepAliveRule = KeepAliveRule()
    scaling: ScalingRule | None = None
    """Left out: replicas start for requests that wait, and go by keep_alive alone."""
    evict_idle: bool = True
    """Whether an idle replica goes when another model needs its place."""
    loading: Loading = Loading()
    paths: dict[Path_, Phases] = {"cold": Phases()}
    """The ways a start can go, with their fixed seconds; `cold` must be one."""
    noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Standard deviation of the logarithm of each fixed phase: how much starts differ."""

    @model_validator(mode="after")
    def _has_cold(self) -> Self:
        if "cold" not in self.paths:
            raise ValueError("has no path `cold`: there must be a way to start without any snapshot")
        return self


class Case(_Part):
    """A variation; what is left out is the scenario's."""

    nodes: Annotated[list[NodeGroup], Field(min_length=1)] | None = None
    models: list[ModelGroup] | None = None
    requests: Requests | None = None
    rates: list[Annotated[float, Field(gt=0, le=1e6)]] | None = None
    """Runs once for each of these rates."""


class Published(_Part):
    """A figure that others have published, for comparison."""

    system: str
    case: str
    metric: Literal["start_mean", "start_p50", "start_p95", "start_p99"] = "start_mean"
    value: float
    rate: float | None = None
    """At which load. Left out: it is not known; the mean over the case's rates is compared."""
    source: str


class Scenario(_Part):
    """The whole file."""

    name: Name
    about: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    duration: Duration = 3600.0
    """Requests arrive this long."""
    timeout: Duration = 300.0
    """A request that has not begun by then is given up."""
    slo: Seconds = 5.0
    """A start-up latency up to this is good."""
    nodes: Annotated[list[NodeGroup], Field(min_length=1)]
    models: list[ModelGroup] = []
    requests: Requests = Requests()
    tenants: list[TenantGroup] = []
    """Who asks. Left out: one tenant."""
    events: list[NodeEvent] = []
    """Nodes that are lost and come back."""
    begins: TimeOfDay = 0.0
    """The time of the day at which the first request may come; for schedules."""
    systems: Annotated[dict[Name, System], Field(min_length=1)]
    cases: dict[Name, Case] = {}
    published: list[Published] = []

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name, case in (self.cases or {"": Case()}).items():
            place = ("cases", name) if case.models else ()
            if not (case.models or self.models):
                raise Misplaced(f"case {name!r} has no models", *(("cases", name) if name else ()))
            self._check_models(case.models or self.models, case.nodes or self.nodes, place)
            self._check_events(case.nodes or self.nodes)
            _check_requests(case.requests or self.requests, case, ("cases", name) if name else ())
        _check_names([(one.name, one.copies) for one in self.tenants], "tenants", ("tenants",))
        self._check_published()
        return self

    def _check_models(self, groups: list[ModelGroup], machines: list[NodeGroup], place: _Place) -> None:
        _check_names([(one.name, one.copies) for one in groups], "models", (*place, "models"))
        for number, group in enumerate(groups):
            here = (*place, "models", number)
            if not any(_replicas(group, nodes) for nodes in machines):
                raise Misplaced(f"no node can hold {group.name}: {_needs(group)}", *here, "name")
            if group.least * group.copies > sum(_replicas(group, nodes) * nodes.count for nodes in machines):
                raise Misplaced(f"{group.least} replicas of each are more than all nodes can hold", *here)
            for name, system in self.systems.items():
                if system.scaling:
                    _check_scaling(system.scaling, group, ("systems", name, "scaling"))
        if over := _crowded(groups, machines):
            raise Misplaced(over[1], *place, "models", over[0])
        for name, system in self.systems.items():
            if system.scaling and (over := _crowded(groups, machines, system.scaling.min_replicas)):
                raise Misplaced(over[1], "systems", name, "scaling")

    def _check_events(self, machines: list[NodeGroup]) -> None:
        lost: dict[str, bool] = {}
        names = {f"n{number}-{index}" for number, nodes in enumerate(machines) for index in range(nodes.count)}
        for number, event in sorted(enumerate(self.events), key=lambda one: one[1].at):
            if event.node not in names:
                raise Misplaced(f"there is no node {event.node!r}; the first is n0-0", "events", number, "node")
            if lost.get(event.node, False) == (event.what == "lost"):
                known = "is lost already" if event.what == "lost" else "is not lost"
                raise Misplaced(f"{event.node} {known} at {event.at:g} s", "events", number, "what")
            lost[event.node] = event.what == "lost"

    def _check_published(self) -> None:
        for number, row in enumerate(self.published):
            if row.system not in self.systems or row.case not in (self.cases or {""}):
                raise Misplaced(
                    f"there is no system {row.system!r} with a case {row.case!r}", "published", number)  # fmt: skip


_Place = tuple[str | int, ...]


def _check_names(groups: list[tuple[str, int]], what: str, place: _Place) -> None:
    seen: set[str] = set()
    for number, (name, copies) in enumerate(groups):
        names = set(copies_of(name, copies))
        if names & seen:
            raise Misplaced(f"two {what} are called {min(names & seen)}", *place, number, "name")
        seen |= names


def copies_of(name: str, copies: int) -> list[str]:
    """What the members of a group are called."""
    return [f"{name}-{index}" for index in range(copies)] if copies > 1 else [name]


def _check_scaling(rule: ScalingRule, group: ModelGroup, place: _Place) -> None:
    try:
        rule.of(group)
    except ConfigError as error:
        raise Misplaced(f"{error.message}, for {group.name}", *place) from error
    most = rule.most(group)
    if most and group.least > most:
        raise Misplaced(f"max_replicas is {most}, but {group.least} replicas of {group.name} are to be ready", *place)


def _check_requests(requests: Requests, case: Case, place: _Place) -> None:
    """What contradicts a trace, or has no effect without one."""
    where = (*place, "requests") if case.requests or not place else ("requests",)
    given = requests.model_fields_set
    if requests.trace is None and "speed" in given:
        raise Misplaced("speed is for a trace, and there is none", *where, "speed")
    if requests.trace is not None and "rate" in given:
        raise Misplaced("rate is for requests that are drawn, and these are of a trace", *where, "rate")
    if requests.trace is not None and case.rates:
        raise Misplaced("rates are for requests that are drawn, and these are of a trace", *place, "rates")


def _crowded(groups: list[ModelGroup], machines: list[NodeGroup], least: int = 0) -> tuple[int, str] | None:
    """The group with which there surely is no room for all minima of one time of the day, and why. `least` is one of
    every model."""
    always = [max(group.min_replicas, least) for group in groups]
    found = _too_many(groups, always, machines, "always ready")
    all_minima = [Minima({"": group.minima(0.0)}) for group in groups]
    for since in sorted({times.since for group in groups for times in group.schedule}):
        counts = [max(minima.least("", since), least) for minima in all_minima]
        found = found or _too_many(groups, counts, machines, f"to be ready at {_time_of_day(since)}")
    return found


def _too_many(
    groups: list[ModelGroup], counts: list[int], machines: list[NodeGroup], ready: str
) -> tuple[int, str] | None:
    each = [(group, group.copies * count) for group, count in zip(groups, counts, strict=True)]
    on_gpus = [Replicas(count if group.gpus else 0, group.gpus, _on_device(group)) for group, count in each]
    on_hosts = [Replicas(count, 1, _on_host(group)) for group, count in each]
    gpus = [Nodes(nodes.count, nodes.gpus, nodes.gpu_memory) for nodes in machines]
    hosts = [Nodes(nodes.count, 1, nodes.host_memory) for nodes in machines]
    over = excess(on_gpus, gpus, "GPU memory", "on GPUs") or excess(on_hosts, hosts, "host memory", "on nodes")
    if over is None:
        return None
    name = groups[over.first_over].name
    return over.first_over, f"with those of {name}, the {over.replicas} replicas that are {ready} {over.why}"


def _time_of_day(seconds: float) -> str:
    return f"{seconds // 3600:02.0f}:{seconds % 3600 // 60:02.0f}"


def _on_device(model: ModelGroup) -> int:
    return -(-(model.weights + model.kv) // max(model.gpus, 1))


def _on_host(model: ModelGroup) -> int:
    return model.process + (0 if model.gpus else model.weights + model.kv)


def _replicas(model: ModelGroup, node: NodeGroup) -> int:
    """How many of one model an empty node can hold."""
    by_host = node.host_memory // _on_host(model)
    if model.gpus == 0:
        return by_host
    on_each = node.gpu_memory // _on_device(model)
    return min(on_each * node.gpus // model.gpus if model.gpus <= node.gpus else 0, by_host)


def _needs(model: ModelGroup) -> str:
    each = (model.weights + model.kv) / max(model.gpus, 1) / 1e9
    place = f"{model.gpus} GPUs with {each:.1f} GB each" if model.gpus else f"{each:.1f} GB of host memory"
    return f"it needs {place} and {model.process / 1e9:.1f} GB of host memory for its process"


def scenario_schema() -> dict[str, Any]:
    """The JSON schema of the YAML file."""
    return Scenario.model_json_schema()


def load_scenario(path: Path) -> Scenario:
    """Raises ConfigError, which names file and line."""
    values, marks = read_yaml(path, "the scenario")
    try:
        return Scenario.model_validate(values)
    except ValidationError as error:
        raise _explain(error, path, marks) from error


def _explain(error: ValidationError, path: Path, marks: Marks) -> ConfigError:
    findings = error.errors()
    first = findings[0]
    location = tuple(part for part in first["loc"] if part != "[key]")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, Misplaced):
        location += cause.location
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    name = ".".join(map(str, location))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "no such setting"
    place = mistake_place(location, path, marks) or f"{path}: "
    return ConfigError(f"{place}{name + ': ' if name else ''}{message}{more}", remedy="docs/simulation.md has them all")
