"""What a run of the benchmark is asked to do, and the time it has."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dormouse.bench_load.method import Method
from dormouse.bench_load.methods import METHODS
from dormouse.errors import ConfigError

CONDITIONS = ("warm", "tier", "cold")
FOREVER = 1e6
_GUESSES = {"warm": 3e9, "tier": 1.5e9, "cold": 1.5e9}  # bytes per second, until a row has shown better
_OVERHEAD = 2.0


@dataclass(frozen=True)
class Options:
    """`files`: measure these instead of making `size` bytes in `shards`. `folder`: on the disk to be measured. `device`
    as torch names it. `repeats`: how often each row is measured; the fastest counts. `budget`: seconds for everything;
    rows that no longer fit are skipped. `lora`: bytes of an adapter to be measured, too. `limits`: whether to measure
    what the machine can do. `output`: where the result is written after each row."""

    folder: Path
    device: str = "cpu"
    size: int = 1_000_000_000
    shards: int = 4
    files: tuple[Path, ...] = ()
    methods: tuple[Method, ...] = tuple(method for method in METHODS if not method.extra)
    conditions: tuple[str, ...] = CONDITIONS
    repeats: int = 1
    budget: float = FOREVER
    lora: int = 0
    codec: bool = False
    limits: bool = True
    output: Path | None = None


def options_of(
    *,
    gigabytes: float | None,
    shards: int,
    files: Path | None,
    folder: Path,
    device: str | None,
    names: Sequence[str],
    cold: bool,
    repeats: int,
    budget_seconds: float | None,
    lora: bool,
    codec: bool,
    output: Path | None,
) -> Options:
    """Options from the words of a command line. Raises ConfigError."""
    gpu = Path("/dev/nvidiactl").exists()
    known = {method.name: method for method in METHODS}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"there is no method {unknown[0]!r}", remedy=f"There are: {', '.join(known)}")
    given = tuple(sorted(files.glob("*.safetensors")) if files.is_dir() else [files]) if files is not None else ()
    if files is not None and not given:
        raise ConfigError(f"{files} has no .safetensors files", remedy="Give a folder that has some")
    size = int((gigabytes or (16 if gpu else 1)) * 1e9)
    return Options(
        folder=folder,
        device=device or ("cuda:0" if gpu else "cpu"),
        size=size,
        shards=shards,
        files=given,
        methods=tuple(method for method in METHODS if method.name in names) or Options.methods,
        conditions=CONDITIONS if cold else tuple(name for name in CONDITIONS if name != "cold"),
        repeats=repeats,
        budget=budget_seconds or FOREVER,
        lora=min(size, 1_000_000_000) if lora else 0,
        codec=codec,
        output=output,
    )


@dataclass(frozen=True)
class Hooks:
    """Whom the benchmark tells what: `step` what begins, `show` a row or limit that is done."""

    step: Callable[[str], None]
    show: Callable[[str], None]


class Budget:
    """The time that is left, and how long rows took so far."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._longest: dict[str, float] = {}

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def note(self, condition: str, seconds: float) -> None:
        self._longest[condition] = max(seconds, self._longest.get(condition, 0.0))

    def expected(self, condition: str, plain_bytes: int) -> float:
        """Seconds for one more row of that condition: what the longest took, or a guess."""
        return self._longest.get(condition, plain_bytes / _GUESSES[condition] + _OVERHEAD)
