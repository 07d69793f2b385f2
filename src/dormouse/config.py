"""The settings of `dormouse serve`: one tree of frozen pydantic models, and the one place that reads them.

    defaults  <-  YAML file  <-  DORMOUSE_* environment  <-  command-line flags          (the right one wins)

`load_config` merges the four, validates once, and names for each mistake where it was made (file and line, variable
or flag) and what is allowed there. `config_schema` is the JSON schema of the file. Nothing else in the package reads
these settings from the environment.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails

from dormouse.data_dir import HOME_VARIABLE, default_data_dir
from dormouse.errors import ConfigError

API_KEYS_VARIABLE = "DORMOUSE_API_KEYS"

MAX_CONFIG_BYTES = 1 << 20
_MAX_DEPTH = 20
_ONLY_IN_THE_FILE = ("models", "tenants")

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?")
_DURATION_UNITS = {None: 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_SIZE_UNITS = {None: 1, "B": 1} | {
    f"{letter}{infix}B": base ** (power + 1)
    for power, letter in enumerate("KMGT")
    for infix, base in (("", 1000), ("i", 1024))
}


def parse_duration(value: object) -> object:
    """Seconds from 30, 2.5, "90s", "5m", "1h", "250ms"; "forever" is infinity. Raises ValueError."""
    if isinstance(value, str):
        if value == "forever":
            return math.inf
        match = _DURATION.fullmatch(value.strip())
        if match is None:
            raise ValueError("is not a duration: write seconds or a number with ms, s, m, h or d, such as 90s or 5m")
        return float(match[1]) * _DURATION_UNITS[match[2]]
    return value


def parse_size(value: object) -> object:
    """Bytes from 1048576, "512MB", "2GiB". Raises ValueError."""
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise ValueError("is not a size: write bytes or a number with KB, MB, GB, TB, KiB, MiB, GiB or TiB")
        return int(float(match[1]) * _SIZE_UNITS[match[2]])
    return value


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"names the home folder of {path.parts[0]}, whom this machine does not know") from error


def _finite(value: float) -> float:
    if math.isinf(value):
        raise ValueError("must end some day: only keep_alive may be forever")
    return value


def _finite_size(value: float) -> float:
    if math.isinf(value):
        raise ValueError("must be a share or a size")
    return value


_DURATION_SCHEMA = WithJsonSchema(
    {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": r"^(\d+(\.\d+)?\s*(ms|s|m|h|d)?)$"}]}
)
_KEEP_ALIVE_SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            {"type": "number", "minimum": 0},
            {"type": "string", "pattern": r"^(forever|\d+(\.\d+)?\s*(ms|s|m|h|d)?)$"},
        ]
    }
)
_TIMES = re.compile(r"([01]\d|2[0-4]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)")


def parse_times(text: str) -> tuple[float, float]:
    """Seconds of the day from "08:00-18:30". Raises ValueError."""
    match = _TIMES.fullmatch(text)
    if match is None:
        raise ValueError("is not a time of the day: write 08:00-18:00, in UTC")
    since, until = (float(int(match[part]) * 3600 + int(match[part + 1]) * 60) for part in (1, 3))
    if max(since, until) > 86_400 or since == until:
        raise ValueError("is not a time of the day: it must end at another time, 24:00 at the latest")
    return since, until


def _times(text: str) -> str:
    parse_times(text)
    return text


_SIZE_SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            {"type": "integer", "minimum": 1},
            {"type": "string", "pattern": r"^\d+(\.\d+)?\s*([KMGT]i?B|B)?$"},
        ]
    }
)


def parse_allotment(value: object) -> object:
    """A share of the memory budget from "25%" or 0.25, or bytes from "2GiB" or 2147483648. Raises ValueError."""
    if isinstance(value, str):
        text = value.strip()
        if (share := _PERCENT.fullmatch(text)) and float(share[1]) <= 100:
            return float(share[1]) / 100
        if text.replace(".", "", 1).isdecimal():
            return float(text)
        try:
            return parse_size(text)
        except ValueError:
            raise ValueError("is neither a share such as 25% nor a size such as 2GiB") from None
    return value


def _provisioning(value: object) -> bool | int | tuple[str, ...]:
    """For pydantic."""
    if isinstance(value, bool) or (isinstance(value, int) and 1 <= value <= _MOST_REPLICAS):
        return value
    if isinstance(value, list | tuple) and all(isinstance(times, str) for times in value):
        return tuple(_times(times) for times in value)
    raise ValueError(
        f"is neither true, false, a number of replicas (1..{_MOST_REPLICAS}) nor a list of times of the day"
    )


KeepAlive = Annotated[float, BeforeValidator(parse_duration), Field(ge=0), _KEEP_ALIVE_SCHEMA]
Duration = Annotated[float, BeforeValidator(parse_duration), Field(gt=0), AfterValidator(_finite), _DURATION_SCHEMA]
Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0), _SIZE_SCHEMA]
SizeOrNone = Annotated[
    int,
    BeforeValidator(parse_size),
    Field(ge=0),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": r"^\d+(\.\d+)?\s*([KMGT]i?B|B)?$"},
            ]
        }
    ),
]
"""A size that may be 0."""
Allotment = Annotated[
    float,
    BeforeValidator(parse_allotment),
    Field(ge=0),
    AfterValidator(_finite_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0},
                {"type": "string", "pattern": r"^\d+(\.\d+)?\s*(%|[KMGT]i?B|B)?$"},
            ]
        }
    ),
]
"""A share of the memory budget (up to 1, or with %), or bytes."""
UserPath = Annotated[Path, AfterValidator(_expanded)]
_MOST_REPLICAS = 64
Provisioning = Annotated[
    bool | int | tuple[str, ...],
    PlainValidator(_provisioning),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "boolean"},
                {"type": "integer", "minimum": 1, "maximum": _MOST_REPLICAS},
                {"type": "array", "items": {"type": "string", "pattern": _TIMES.pattern}},
            ]
        }
    ),
]
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_NAME_RULE = "Use up to 64 of a-z, 0-9, '.', '_' and '-', the first a letter or digit"
ModelName = Annotated[str, Field(pattern=f"^{_NAME.pattern}$")]
TenantName = Annotated[str, Field(pattern=f"^{_NAME.pattern}$")]


KeepAlivePolicy = Literal["fixed", "lru", "greedy-dual", "histogram", "layered", "expected"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ScalingConfig(_Settings):
    """How many replicas a model has while it is asked for, in Knative's words and with its defaults."""

    target: Annotated[float, Field(gt=0)] | None = None
    """Requests that a replica should have at once. Left out: max_concurrent."""
    utilization: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Share of the target that is aimed at (0..1), so that there is room for the next request."""
    stable_window: Duration = 60.0
    """The mean of requests over so long decides."""
    panic_window: Duration = 6.0
    """When that over so long asks for panic_threshold times the replicas, it decides, and none goes for a while."""
    panic_threshold: Annotated[float, Field(gt=1)] = 2.0
    """From so many times the replicas on (more than 1)."""
    max_up_rate: Annotated[float, Field(gt=1)] = 1000.0
    """At once there may be so many times more (more than 1)."""
    max_down_rate: Annotated[float, Field(gt=1)] = 2.0
    """At once there may be so many times fewer (more than 1)."""


class ModelConfig(_Settings):
    """How one model is served."""

    engine: Literal["transformers", "null"] | None = None
    """What runs the model: transformers or null. Left out: as the model was imported."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+(,\d+)*)?)$")] = "cpu"
    """Where it runs: cpu, cuda or cuda:N; with cuda:0,1 each replica on the GPU that is best when it starts."""
    keep_alive: KeepAlive = 300.0
    """How long an idle model stays ready before it sleeps: seconds, 90s, 5m, 1h, or forever (under every policy)."""
    provisioned: Provisioning = False
    """true or a number: so many replicas are started ahead and stay. ["08:00-18:00"]: one, at these times, in UTC."""
    max_replicas: Annotated[int, Field(ge=1, le=_MOST_REPLICAS)] = 1
    """Replicas there may be at once (1..64). Those on one device share the weights."""
    scaling: ScalingConfig = ScalingConfig()
    """When there are more and fewer of them."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of the worker (1..1024). Left out: one per core."""
    context: Annotated[int, Field(ge=16)] | None = None
    """Longest prompt and answer together, in tokens (16 or more). Left out: the model's own limit, if memory allows."""
    kv_tokens: Annotated[int, Field(ge=16)] | None = None
    """Room for this many tokens of all requests together (16 or more). Left out: kv_share, or the engine's default."""
    kv_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """On a GPU: room for as many tokens as fit in this part of its memory (0..1), when kv_tokens is left out."""
    snapshot: bool = True
    """true: an idle model is captured and wakes from its snapshot. false: it is stopped and starts cold."""
    sleep: bool = True
    """true: an idle model's process stays in memory, without weights, while there is room (`sleep_memory`)."""
    max_concurrent: Annotated[int, Field(ge=1, le=1024)] = 16
    """Requests a replica handles at once (1..1024); more of them wait, or are another replica's."""
    adapters: tuple[ModelName, ...] = ()
    """Imported LoRA adapters of this model that are served from the start, each under its own name."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if isinstance(self.provisioned, int) and self.provisioned > self.max_replicas:
            raise ValueError(f"provisioned ({self.provisioned}) is more than max_replicas ({self.max_replicas})")
        if self.scaling.panic_window > self.scaling.stable_window:
            raise ValueError("scaling.panic_window is longer than scaling.stable_window")
        return self


class TenantConfig(_Settings):
    """What the requests of one tenant may do: all those that come with a key of that tenant."""

    cap: Annotated[int, Field(ge=1)] | None = None
    """Requests that run at once, over all models (1 or more); more of them wait in the queue. Left out: no limit."""
    priority: Annotated[int, Field(ge=-10, le=10)] = 0
    """Each step (-10..10) is worth a head start of 10 s in the queue; the higher goes first."""


class ServeConfig(_Settings):
    """The whole configuration of one node and its gateway."""

    data_dir: UserPath
    """Folder of models, store, logs and run files. Left out: $DORMOUSE_HOME, else dormouse in the XDG data home."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on. Anything but a loopback address needs API keys."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8114
    """TCP port to listen on (0..65535); 0 takes any free one."""
    api_keys_file: UserPath | None = None
    """File of lines KEY or KEY TENANT; # starts a comment. DORMOUSE_API_KEYS (KEY,KEY) adds keys without a tenant."""
    metrics_open: bool = False
    """true: /metrics answers without a key even when keys are set."""
    max_queue: Annotated[int, Field(ge=1, le=65536)] = 256
    """Requests that may wait for one model (1..65536); further ones get 429."""
    max_body_bytes: Size = 4 << 20
    """Longest request body: bytes or a size such as 4MiB."""
    ping_interval: Duration = 1.0
    """Seconds between the comment lines a waiting stream gets."""
    start_timeout: Duration = 300.0
    """Longest time one step may take: a start, a capture, a stop."""
    request_timeout: Duration = 600.0
    """Longest time a request may take in all, waiting included."""
    grace: Duration = 30.0
    """On SIGTERM, time that running requests get to finish."""
    memory: Size | None = None
    """Memory that all workers together may take: bytes or a size such as 8GiB. Left out: 80 % of the machine's."""
    keep_alive_policy: KeepAlivePolicy = "fixed"
    """Who says how long idle models stay: fixed (keep_alive), lru, greedy-dual, histogram, layered or expected."""
    templates: bool = True
    """true: a started engine without a model is captured, too; models without a snapshot of their own start from it."""
    sleep_memory: Allotment = 0.25
    """Memory for the processes of idle models, without weights: a share of `memory` (25%) or a size. 0: none stays."""
    kept_weights: Allotment = 0.25
    """Memory for weights of models and adapters that no worker uses now: a share of `memory` (25%) or a size."""
    gpu_memory: Size | None = None
    """Memory of each GPU that models may take: bytes or a size such as 70GiB. Left out: 95 % of it."""
    dram_tier: SizeOrNone | None = None
    """Pinned memory for coded weights of models on GPUs: a size such as 64GiB, or 0. Left out: 15 % of all memory."""
    adapter_routes: bool = False
    """true: whoever has a key may load and unload imported adapters over HTTP."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least important log messages shown: debug, info, warning or error."""
    models: dict[ModelName, ModelConfig] = Field(default_factory=dict)
    """The models served, by the name they were imported under."""
    tenants: dict[TenantName, TenantConfig] = Field(default_factory=dict)
    """Who has keys: caps and priorities, by the names that follow the keys in `api_keys_file`."""


def devices_of(device: str) -> tuple[str, ...]:
    """Where a model may run by its `device`: "cpu", or GPUs as "cuda:N", each once."""
    kind, _colon, numbers = device.partition(":")
    return (
        tuple(dict.fromkeys(f"{kind}:{int(number)}" for number in (numbers or "0").split(",")))
        if kind == "cuda"
        else (kind,)
    )


def gpus_of(config: ServeConfig) -> list[str]:
    """The GPUs that models are configured for, as "cuda:N", each once."""
    devices = {device for model in config.models.values() for device in devices_of(model.device)}
    return sorted(devices - {"cpu"})


def config_schema() -> dict[str, Any]:
    """The JSON schema of the YAML file."""
    schema = ServeConfig.model_json_schema()
    schema["required"] = [name for name in schema.get("required", ()) if name != "data_dir"]
    return schema


def load_config(
    path: Path | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    flags: Mapping[str, object] | None = None,
    models: Mapping[str, Mapping[str, object]] | None = None,
) -> ServeConfig:
    """The merged and validated settings. `flags` maps top-level settings to values (None: not given); `models` are
    served beside those of the file. Raises ConfigError, which names place and remedy."""
    values, marks = read_yaml(path) if path is not None else ({}, {})
    origin: dict[str, str] = {}
    for name in ServeConfig.model_fields:
        variable = HOME_VARIABLE if name == "data_dir" else f"DORMOUSE_{name.upper()}"
        if name not in _ONLY_IN_THE_FILE and variable in environ:
            values[name], origin[name] = environ[variable], f"environment variable {variable}"
    for name, value in (flags or {}).items():
        if value is not None:
            values[name], origin[name] = value, f"--{name.replace('_', '-')}"
    values.setdefault("data_dir", default_data_dir(environ))
    if models:
        values["models"] = {**(values.get("models") or {}), **models}
    try:
        return ServeConfig.model_validate(values)
    except ValidationError as error:
        raise _explain(error, path, marks, origin) from error


# API keys. No message repeats what stands there: what was taken for a tenant may be a key.

_KEY = re.compile(r"[!-~]+")
_KEY_LINES = "Write lines KEY or KEY TENANT"


def load_api_keys(config: ServeConfig, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The API keys of the environment and the file, each with its tenant ("" is who has none). Raises ConfigError when
    the file can't be read or holds none, and for a key or a tenant that can't be: it must not lift a cap."""
    keys: dict[str, str] = {}
    for place, key, tenant in (*_keys_of_environment(environ), *_keys_of_file(config)):
        if _KEY.fullmatch(key) is None:
            raise ConfigError(
                f"{place}: a key has characters that are not visible ASCII",
                remedy="A key is one word; its tenant stands after it, in api_keys_file alone",
            )
        if keys.setdefault(key, tenant) != tenant:
            raise ConfigError(
                f"{place}: this key was given before, with another tenant or without one",
                remedy="Give each key one tenant, in one place",
            )
    return keys


def _keys_of_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for key in environ.get(API_KEYS_VARIABLE, "").split(","):
        if key.strip():
            yield f"environment variable {API_KEYS_VARIABLE}", key.strip(), ""


def _keys_of_file(config: ServeConfig) -> Iterator[tuple[str, str, str]]:
    """(place, key, tenant) of each line with a key."""
    path = config.api_keys_file
    if path is None:
        return
    found = False
    for number, line in enumerate(_key_lines(path), 1):
        words = line.split()
        if words and not words[0].startswith("#"):
            found = True
            place = f"{path}, line {number}"
            yield place, words[0], _tenant(words[1:], place, config)
    if not found:
        raise ConfigError(f"the API key file {path} holds no key", remedy=_KEY_LINES)


def _key_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise ConfigError(f"the API key file {path} is over {MAX_CONFIG_BYTES} bytes", remedy=_KEY_LINES)
        # Only ends of lines that every editor counts: a form feed, say, must not make a key of what follows it.
        return re.split(r"\r\n|\r|\n", content.decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the API key file {path} cannot be read: {error}",
            remedy=f"{_KEY_LINES}, or take api_keys_file out of the configuration",
        ) from error


def _tenant(words: list[str], place: str, config: ServeConfig) -> str:
    """The tenant that stands after a key; "" when nothing does."""
    if not words:
        return ""
    if len(words) > 1:
        raise ConfigError(f"{place}: {len(words)} words follow the key, where one may", remedy=_KEY_LINES)
    if _NAME.fullmatch(words[0]) is None:
        raise ConfigError(f"{place}: what follows the key is not a tenant's name", remedy=_NAME_RULE)
    if words[0] not in config.tenants:
        known = ", ".join(sorted(config.tenants))
        remedy = "Add it under `tenants:` in the configuration" + (
            f", or take one of those there: {known}" if known else ""
        )
        raise ConfigError(f"{place}: the tenant that follows the key is not configured", remedy=remedy)
    return words[0]


# YAML with the line of every value

Location = tuple[str | int, ...]
Marks = dict[Location, int]


class _Loader(yaml.SafeLoader):
    """Plain YAML: no aliases, so that a small file stays a small tree."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def read_yaml(path: Path, what: str = "the configuration file") -> tuple[dict[str, Any], Marks]:
    """A YAML mapping and the line of each of its values. Raises ConfigError, which names `what` it is."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{what} {path} cannot be read: {error.strerror}",
            remedy="See dormouse.example.yaml for a file to start from",
        ) from error
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{what} {path} is over {MAX_CONFIG_BYTES} bytes")
    marks: Marks = {}
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        tree = {} if root is None else _build(loader, root, (), marks)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}, line 1: the file must be a mapping of settings", remedy=_allowed(ServeConfig, ""))
    return tree, marks


def _build(loader: _Loader, node: yaml.Node, at: Location, marks: Marks) -> Any:
    """The Python value of a node; fills `marks` with 1-based lines by location."""
    if len(at) > _MAX_DEPTH:
        raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=node.start_mark)
    marks.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*at, index), marks) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    tree: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a setting's name must be plain text", problem_mark=key.start_mark)
        if key.value in tree:
            raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
        marks[(*at, key.value)] = key.start_mark.line + 1
        tree[key.value] = _build(loader, value, (*at, key.value), marks)
    return tree


# From pydantic's findings to one clear sentence


def _explain(error: ValidationError, path: Path | None, marks: Marks, origin: Mapping[str, str]) -> ConfigError:
    findings = error.errors()
    first = findings[0]
    location = tuple(part for part in first["loc"] if part != "[key]")
    setting = ".".join(map(str, location))
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    message, remedy = _finding(first, location)
    return ConfigError(f"{_place(location, path, marks, origin)}{setting}: {message}{more}", remedy=remedy)


def _place(location: Location, path: Path | None, marks: Marks, origin: Mapping[str, str]) -> str:
    if location and (source := origin.get(str(location[0]))):
        return f"{source}: "
    return mistake_place(location, path, marks)


def mistake_place(location: Location, path: Path | None, marks: Marks) -> str:
    """File and line of a setting, or of the nearest one around it, to begin a message with."""
    while location and location not in marks:
        location = location[:-1]
    return f"{path}, line {marks[location]}: " if path is not None and location in marks else ""


_NAMED: dict[str, tuple[type[_Settings], str]] = {"models": (ModelConfig, "model"), "tenants": (TenantConfig, "tenant")}
"""The settings that are mappings from names to settings."""


def _finding(error: ErrorDetails, location: Location) -> tuple[str, str]:
    named = _NAMED.get(str(location[0])) if len(location) > 1 else None
    settings, within = (named[0], location[2:]) if named else (ServeConfig, location)
    if len(within) > 1 and within[0] == "scaling":
        settings, within = ScalingConfig, within[1:]
    name = str(within[0]) if within else ""
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return "no such setting", _allowed(settings, name)
    if named and not within:
        if error["type"] == "string_pattern_mismatch":
            return f"not a {named[1]} name", _NAME_RULE
        if error["type"] == "value_error":
            return message, "Change one of the two"
        return "must be a mapping of settings", f"Write {{}} for a {named[1]} with default settings"
    shown = repr(error["input"])
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    message = f"{shown} {message}" if error["type"] == "value_error" else f"{message}, not {shown}"
    description = settings.model_fields[name].description if name in settings.model_fields else None
    return message, (description or "").rstrip(".")


def _allowed(settings: type[_Settings], name: str) -> str:
    fields = sorted(settings.model_fields)
    near = difflib.get_close_matches(name, fields, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"{hint}Allowed here: {', '.join(fields)}"
