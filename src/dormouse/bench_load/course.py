"""The benchmark's course: make the weights, import them twice, then every method warm, the limits, every method cold.

    weights.make --files--> importing (raw, coded) --data folders--> one child per row --rows--> Result

Warm comes first because fresh files are in the page cache anyway. Children are started a batch at a time and wait,
prepared, until it is their turn: importing torch and making a GPU's context take longer than most loads, and none of
that may run beside a measured one. A row never ends the run: what fails, is missing, or no longer fits into the budget
says so in its note.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dormouse.bench_load import cache, limits
from dormouse.bench_load.child import Loaded
from dormouse.bench_load.importing import COPIES, MODEL, Imports
from dormouse.bench_load.limits import Limit
from dormouse.bench_load.methods import METHODS, Job, Method
from dormouse.bench_load.processes import Child, ChildError
from dormouse.bench_load.result import Result, Row, host_facts, line
from dormouse.bench_load.weights import SIGMA, Weights, make, write_reference
from dormouse.errors import ConfigError

CONDITIONS = ("warm", "tier", "cold")
FOREVER = 1e6
_CHILD = "dormouse.bench_load.child"
_LIMIT_BYTES = 4 << 30
_START_SECONDS = 120.0
_PREPARE_SHARE = 0.6
_WARM = 0.99
_GUESSES = {"warm": 3e9, "tier": 1.5e9, "cold": 1.5e9}  # bytes per second, until a row has shown better
_OVERHEAD = 2.0
_PATIENCE = 6.0
_FEW, _MANY, _MANY_CORES = 2, 32, 8
_NOT_REACHED = "not reached"


@dataclass(frozen=True)
class Options:
    """`files`: measure these instead of making `size` bytes in `shards`. `folder`: on the disk to be measured. `device`
    as torch names it. `budget`: seconds for everything; rows that no longer fit are skipped. `output`: where the result
    is written after each row."""

    folder: Path
    device: str = "cpu"
    size: int = 1_000_000_000
    shards: int = 4
    files: tuple[Path, ...] = ()
    methods: tuple[Method, ...] = tuple(method for method in METHODS if not method.extra)
    conditions: tuple[str, ...] = CONDITIONS
    budget: float = FOREVER
    output: Path | None = None


def options(
    *,
    gigabytes: float | None,
    shards: int,
    files: Path | None,
    folder: Path,
    device: str | None,
    names: Sequence[str],
    cold: bool,
    budget_seconds: float | None,
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
    return Options(
        folder=folder,
        device=device or ("cuda:0" if gpu else "cpu"),
        size=int((gigabytes or (16 if gpu else 1)) * 1e9),
        shards=shards,
        files=given,
        methods=tuple(known[name] for name in names) or Options.methods,
        conditions=CONDITIONS if cold else tuple(name for name in CONDITIONS if name != "cold"),
        budget=budget_seconds or FOREVER,
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


def measure(options: Options, hooks: Hooks) -> Result:
    """Run it all. Raises ConfigError (the options make no sense), OSError or DormouseError when not even the weights
    can be made; from then on every failure is a row."""
    if not options.folder.is_dir():
        raise ConfigError(f"{options.folder} is not a folder", remedy="Give a folder on the disk to be measured")
    result = Result(options.device, host_facts())
    with _scratch(options.folder) as scratch, contextlib.closing(_Run(options, hooks, result, scratch)) as run:
        run.prepare()
        run.rows("warm", "tier")
        run.limits()
        run.rows("cold")
        result.complete = True
        run.save()
    return result


@contextlib.contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    """A folder for files and checkpoints that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=".dormouse-bench-", dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


class _Run:
    """One run's state: what is prepared, which children wait."""

    def __init__(self, options: Options, hooks: Hooks, result: Result, scratch: Path) -> None:
        self._options, self._hooks, self._result, self._scratch = options, hooks, result, scratch
        self._budget = Budget(options.budget)
        self._threads = os.cpu_count() or 1
        self._children: dict[tuple[str, str], Child] = {}
        self._prepared: set[tuple[str, str]] = set()
        self._link: Child | None = None
        self._imports = Imports(scratch)
        self._weights: Weights | None = None
        self._methods = {method.name: method for method in options.methods}
        result.rows = [
            Row(method.name, condition, method.how, method.ours, note=_NOT_REACHED)
            for condition in CONDITIONS
            for method in options.methods
            if condition in method.conditions and condition in options.conditions
        ]

    def close(self) -> None:
        """End every child."""
        self._imports.close()
        for child in (*self._children.values(), self._link):
            if child is not None:
                child.close()

    def save(self) -> None:
        """Write the result so far to the file that was asked for; never half of one."""
        if (target := self._options.output) is not None:
            part = target.with_name(target.name + ".part")
            part.write_bytes(msgspec.json.format(msgspec.json.encode(self._result.as_json()), indent=1) + b"\n")
            part.replace(target)

    def prepare(self) -> None:
        """Files, reference, imported checkpoints; meanwhile the first children start."""
        options, result = self._options, self._result
        self._start(result.rows[: self._batch])
        if options.device.startswith("cuda"):
            self._link = Child(limits.__name__, options.device)
        begin = time.perf_counter()
        files, result.weights = options.files, "given files"
        if not files:
            self._hooks.step(f"making {options.size / 1e9:.2f} GB of weights")
            files = make(self._scratch, options.size, options.shards, self._threads)
            result.weights = f"bf16, N(0, {SIGMA})"
        result.prepared["files"] = time.perf_counter() - begin
        self._hooks.step("importing them, coded and raw")
        self._imports.start(files, [copy for copy in COPIES if any(m.source == copy for m in options.methods)])
        self._weights = write_reference(files, self._scratch / "reference.json", self._threads)
        result.plain_bytes, result.tensors = self._weights.plain_bytes, self._weights.tensors
        result.files = len(files)
        self._imports.finish(max(1.0, self._budget.left * _PREPARE_SHARE))
        cache.sync(files)  # nothing is to be written while rows are measured
        result.stored, result.prepared = self._imports.stored, result.prepared | self._imports.seconds
        self.save()

    @property
    def _batch(self) -> int:
        """How many children wait at once: all, where there are the cores to start them beside making the weights."""
        return _MANY if self._threads >= _MANY_CORES else _FEW

    def rows(self, *conditions: str) -> None:
        """Every row of these conditions, a batch of children at a time."""
        self._hooks.step(f"loading: {', '.join(conditions)}")
        rows = [row for row in self._result.rows if row.condition in conditions]
        for first in range(0, len(rows), self._batch):
            batch = rows[first : first + self._batch]
            self._start(batch)
            self._hear_prepared()
            for row in batch:
                self._fill(row, self._methods[row.method])
                self._hooks.show(line(row))
                self.save()

    def _start(self, rows: Sequence[Row]) -> None:
        """Start the children of these rows, where they are not there yet."""
        for row in rows:
            if (row.method, row.condition) not in self._children:
                method = self._methods[row.method]
                self._children[row.method, row.condition] = Child(
                    _CHILD, method.place, self._options.device, environment=method.environment
                )

    def _hear_prepared(self) -> None:
        """Wait until every child that was started has imported what it needs, so that none does beside a load."""
        for row in self._result.rows:
            if row.note == _NOT_REACHED and (child := self._children.get((row.method, row.condition))):
                with self._told_in(row):
                    row.version = child.hear("version", _START_SECONDS)
                    row.note = ""

    @contextlib.contextmanager
    def _told_in(self, row: Row) -> Iterator[None]:
        """Around what may go wrong with one row."""
        try:
            yield
        except ChildError as error:
            row.outcome, row.note = ("missing" if error.missing else "failed"), str(error)
        except OSError as error:
            row.outcome, row.note = "failed", str(error)

    def _fill(self, row: Row, method: Method) -> None:
        """Measure one row, if its child is prepared, its checkpoint there and the time long enough."""
        assert self._weights is not None
        child = self._children[method.name, row.condition]
        needed = self._budget.expected(row.condition, self._weights.plain_bytes)
        begin = time.monotonic()
        try:
            if row.outcome in ("missing", "failed"):
                return
            if method.source in self._imports.failed:
                row.outcome, row.note = "failed", self._imports.failed[method.source]
            elif self._budget.left < needed:
                row.note = f"{max(0.0, self._budget.left):.0f} s of the budget left, about {needed:.0f} s needed"
            else:
                with self._told_in(row):
                    self._load(row, method, child, min(self._budget.left, needed * _PATIENCE + _OVERHEAD))
                self._budget.note(row.condition, time.monotonic() - begin)
        finally:
            child.close()

    def _load(self, row: Row, method: Method, child: Child, seconds: float) -> None:
        """The conversation with the child, as in child.py."""
        child.tell(msgspec.json.encode(self._job(method, row.condition)))
        child.hear("ready", seconds)
        row.resident_before = self._set_cache(method, row.condition)
        child.tell(b"")
        loaded = msgspec.convert(child.hear("loaded", seconds, watch=True), Loaded)
        row.seconds, row.cpu_seconds, row.plain_bytes = loaded.seconds, loaded.cpu_seconds, loaded.plain_bytes
        row.bytes_per_second = loaded.plain_bytes / loaded.seconds
        row.peak_memory, row.resident_growth = child.peak_growth, loaded.resident_growth
        row.device_bytes = loaded.device_bytes
        wrong = child.hear("wrong", seconds)
        row.outcome, row.note = ("wrong", "; ".join(wrong)) if wrong else ("ok", "")
        row.again_seconds = child.hear("again", seconds)

    def _job(self, method: Method, condition: str) -> Job:
        assert self._weights is not None
        data_dir = self._imports.data_dir(method.source) if method.source in COPIES else self._scratch
        return Job(
            files=[str(file) for file in self._weights.files],
            scratch=str(self._scratch),
            data_dir=str(data_dir),
            model=MODEL,
            device=self._options.device,
            condition=condition,
            reference=str(self._weights.reference),
            again=condition != "cold",
        )

    def _set_cache(self, method: Method, condition: str) -> float | None:
        """Bring what will be read into the page cache or out of it; the share that is there now."""
        if condition == "tier":
            return None
        files = self._files(method)
        if condition == "cold":
            cache.drop(files)
        elif cache.resident(files) < _WARM:
            cache.warm(files, self._threads)
        return cache.resident(files)

    def _files(self, method: Method) -> list[Path]:
        assert self._weights is not None
        if method.source in COPIES:
            return cache.files_below(self._imports.data_dir(method.source))
        return list(self._weights.files) if method.source == "plain" else [self._scratch / method.source]

    def limits(self) -> None:
        """What the machine can do; each that can't be measured says why."""
        assert self._weights is not None
        files = self._weights.files
        self._hooks.step("what the machine itself can do")
        measured: dict[str, Callable[[], Limit]] = {
            "link": self._take_link,
            "host copy": lambda: limits.host_copy(files, _LIMIT_BYTES, self._threads),
            "disk": lambda: limits.disk(files, _LIMIT_BYTES, lambda: cache.drop(files)),
        }
        for name, take in measured.items():
            try:
                limit: Limit | str = take()
            except (OSError, ChildError) as error:
                limit = f"not measured: {error}"
            self._result.limits[name] = limit
            self._hooks.show(f"limit: {name}: {limit if isinstance(limit, str) else limits.told(limit)}")
            self.save()

    def _take_link(self) -> Limit:
        if self._link is None:
            raise ChildError(f"there is none to {self._options.device}")
        self._link.tell(b"")
        try:
            return msgspec.convert(self._link.hear("link", _START_SECONDS), Limit)
        finally:
            self._link.close()
