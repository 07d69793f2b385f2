"""What is simulated: one YAML file, checked whole before anything runs.

    path -> load_scenario -> Scenario (frozen) -> run.py;   scenario_schema -> its JSON schema

A scenario has nodes, models, requests, and systems that all get the same requests. `cases` are variations of it (other
models, other loads); each case runs under each system. Docs: docs/simulation.md.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from dormouse.config import Duration, KeepAlive, Marks, Size, SizeOrNone, mistake_place, read_yaml
from dormouse.errors import ConfigError
from dormouse.schedule.keepalive import REGRET, RELUCTANCE

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
Path_ = Literal["sleep", "snapshot", "cold"]


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
    preloaded: Annotated[int, Field(ge=0)] = 1000
    """On how many nodes' disks each model lies from the start, as far as they have room (round robin)."""
    keep_on_disk: bool = True
    """Whether what was downloaded stays on the disk (the least recently used goes for it)."""
    keep_in_dram: bool = True
    """Whether what was loaded stays in the DRAM tier."""


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
    regret: Annotated[float, Field(gt=0, lt=1)] = REGRET
    """For expected: the share of all starts that may be of its own doing. More frees more memory."""
    reluctance: Annotated[float, Field(ge=0, le=1e6)] = RELUCTANCE
    """For fixed, lru, greedy-dual and histogram, which know only who goes first: the seconds for each GB that an
    eviction counts for when a place is chosen. With 10, nobody goes while memory is free anywhere."""


class System(_Part):
    """A way to run the cluster."""

    placement: Literal["any", "random", "locality-preempt", "locality-migrate", "dormouse"] = "dormouse"
    """Who decides: `dormouse` is schedule/place.py; the others are peers', see sim/peers.py."""
    keep_alive: KeepAliveRule = KeepAliveRule()
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
    systems: Annotated[dict[Name, System], Field(min_length=1)]
    cases: dict[Name, Case] = {}
    published: list[Published] = []

    @model_validator(mode="after")
    def _possible(self) -> Self:
        cases = self.cases or {"": Case()}
        for name, case in cases.items():
            groups = case.models or self.models
            if not groups:
                raise ValueError(f"case {name!r} has no models")
            for group in groups:
                if not any(_fits(group, nodes) for nodes in case.nodes or self.nodes):
                    raise ValueError(f"no node can hold {group.name}: {_needs(group)}")
        for row in self.published:
            if row.system not in self.systems or row.case not in cases:
                raise ValueError(f"published: there is no system {row.system!r} with a case {row.case!r}")
        return self


def _fits(model: ModelGroup, node: NodeGroup) -> bool:
    if model.gpus == 0:
        return model.weights + model.kv + model.process <= node.host_memory
    return (
        model.gpus <= node.gpus
        and -(-(model.weights + model.kv) // model.gpus) <= node.gpu_memory
        and model.process <= node.host_memory
    )


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
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    name = ".".join(map(str, location))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "no such setting"
    place = mistake_place(location, path, marks) or f"{path}: "
    return ConfigError(f"{place}{name + ': ' if name else ''}{message}{more}", remedy="docs/simulation.md has them all")
