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
from dataclasses import replace
from pathlib import Path

import msgspec

from dormouse.bench_load import cache, codec, limits, lora
from dormouse.bench_load.child import Loaded
from dormouse.bench_load.importing import COPIES, MODEL, Imports
from dormouse.bench_load.limits import Limit
from dormouse.bench_load.method import Job, Method
from dormouse.bench_load.options import CONDITIONS, Budget, Hooks, Options
from dormouse.bench_load.processes import Child, ChildError
from dormouse.bench_load.result import Result, Row, codec_line, host_facts, line
from dormouse.bench_load.weights import SIGMA, Weights, lay_out, make, write_reference
from dormouse.errors import ConfigError

_CHILD = "dormouse.bench_load.child"
_LIMIT_BYTES = 4 << 30
_START_SECONDS, _LEAST_SECONDS, _LORA_SECONDS = 120.0, 60.0, 20.0
_PREPARE_SHARE = 0.6
_WARM = 0.99
_PATIENCE, _GRACE = 6.0, 2.0
_FEW, _MANY, _MANY_CORES = 2, 32, 8


def measure(options: Options, hooks: Hooks) -> Result:
    """Run it all. Raises ConfigError (the options make no sense), OSError or DormouseError when not even the weights
    can be made; from then on every failure is a row."""
    if not options.folder.is_dir():
        raise ConfigError(f"{options.folder} is not a folder", remedy="Give a folder on the disk to be measured")
    result = Result(options.device, host_facts())
    budget = Budget(options.budget)
    with _scratch(options.folder) as scratch:
        with contextlib.closing(_Run(options, hooks, result, scratch, budget)) as run:
            run.prepare()
            run.rows("warm", "tier")
            if options.limits:
                run.limits()
            run.rows("cold")
            run.codec()
        if options.lora:
            result.lora = _measure_lora(options, hooks, budget)
        result.complete = True
        run.save()
    return result


def _measure_lora(options: Options, hooks: Hooks, budget: Budget) -> Result | str:
    """The same course with an adapter, or why not."""
    if budget.left < _LORA_SECONDS:
        why = f"skipped: {max(0.0, budget.left):.0f} s of the budget left, at least {_LORA_SECONDS:.0f} s needed"
        hooks.show(f"LoRA: {why}")
        return why
    with _scratch(options.folder) as scratch:
        files = make(scratch, [lora.shapes(options.lora)], os.cpu_count() or 1)
        asked = replace(
            options, files=files, methods=lora.LORA_METHODS, budget=budget.left, lora=0, codec=False,
            limits=False, output=None,
        )  # fmt: skip
        return measure(asked, hooks)


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

    def __init__(self, options: Options, hooks: Hooks, result: Result, scratch: Path, budget: Budget) -> None:
        self._options, self._hooks, self._result, self._scratch = options, hooks, result, scratch
        self._budget = budget
        self._threads = os.cpu_count() or 1
        self._children: dict[tuple[str, str], Child] = {}
        self._unheard: set[tuple[str, str]] = set()
        self._helpers: dict[str, Child] = {}
        self._imports = Imports(scratch)
        self._weights: Weights | None = None
        self._methods = {method.name: method for method in options.methods}
        result.rows = [
            Row(method.name, condition, method.how, method.ours)
            for condition in CONDITIONS
            for method in options.methods
            if condition in method.conditions and condition in options.conditions
        ]

    def close(self) -> None:
        """End every child."""
        self._imports.close()
        for child in (*self._children.values(), *self._helpers.values()):
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
        self._start_helpers()
        begin = time.perf_counter()
        files, result.weights = options.files, "given files"
        if not files:
            self._hooks.step(f"making {options.size / 1e9:.2f} GB of weights")
            files = make(self._scratch, lay_out(options.size, options.shards), self._threads)
            result.weights = f"bf16, N(0, {SIGMA})"
        result.prepared["files"] = time.perf_counter() - begin
        self._hooks.step("importing them")
        self._imports.start(files, [copy for copy in COPIES if any(m.source == copy for m in options.methods)])
        self._weights = write_reference(files, self._scratch / "reference.json", self._threads)
        result.plain_bytes, result.tensors = self._weights.plain_bytes, self._weights.tensors
        result.files = len(files)
        self._imports.finish(max(1.0, self._budget.left * _PREPARE_SHARE))
        cache.sync(files)  # nothing is to be written while rows are measured
        result.stored, result.prepared = self._imports.stored, result.prepared | self._imports.seconds
        result.prepared["all"] = time.perf_counter() - begin
        self.save()

    def _start_helpers(self) -> None:
        device = self._options.device
        if self._options.limits and device.startswith("cuda"):
            self._helpers["link"] = Child(limits.__name__, device)
        if self._options.codec:
            self._helpers["codec"] = Child(codec.__name__, device)

    @property
    def _batch(self) -> int:
        """How many children wait at once: all, where there are the cores to start them beside making the weights."""
        return _MANY if self._threads >= _MANY_CORES else _FEW

    def rows(self, *conditions: str) -> None:
        """Every row of these conditions, a batch of children at a time, as often as was asked."""
        rows = [row for row in self._result.rows if row.condition in conditions]
        if rows:
            self._hooks.step(f"loading: {', '.join(conditions)}")
        for _ in range(self._options.repeats):
            for first in range(0, len(rows), self._batch):
                self._start(rows[first : first + self._batch])
                self._hear_prepared()
                for row in rows[first : first + self._batch]:
                    self._repeat(row)

    def _start(self, rows: Sequence[Row]) -> None:
        """Start the children of these rows, where they are not there yet. A package that is missing stays so."""
        for row in rows:
            if row.key not in self._children and row.outcome != "missing":
                method = self._methods[row.method]
                self._children[row.key] = Child(
                    _CHILD, method.place, self._options.device, environment=method.environment
                )
                self._unheard.add(row.key)

    def _hear_prepared(self) -> None:
        """Wait until every child that was started has imported what it needs, so that none does beside a load."""
        for row in self._result.rows:
            if row.key in self._unheard:
                self._unheard.remove(row.key)
                with self._told_in(row):
                    row.version = self._children[row.key].hear("version", self._patience())
                if row.outcome in ("missing", "failed"):
                    self._children.pop(row.key).close()
                    self._hooks.show(line(row))

    @contextlib.contextmanager
    def _told_in(self, row: Row) -> Iterator[None]:
        """Around what may go wrong with one row."""
        try:
            yield
        except ChildError as error:
            row.outcome, row.note = ("missing" if error.missing else "failed"), str(error)
        except OSError as error:
            row.outcome, row.note = "failed", str(error)

    def _repeat(self, row: Row) -> None:
        """Measure a row once more, unless its child could not even prepare."""
        if (child := self._children.pop(row.key, None)) is None:
            return
        attempt = Row(row.method, row.condition, row.how, row.ours, version=row.version)
        with contextlib.closing(child):
            self._fill(attempt, self._methods[row.method], child)
        row.take(attempt)
        self._hooks.show(line(attempt))
        self.save()

    def _fill(self, row: Row, method: Method, child: Child) -> None:
        """Measure one row, if its checkpoint is there and the time long enough."""
        assert self._weights is not None
        needed = self._budget.expected(row.condition, self._weights.plain_bytes)
        if method.source in self._imports.failed:
            row.outcome, row.note = "failed", self._imports.failed[method.source]
        elif self._budget.left < needed:
            row.note = f"{max(0.0, self._budget.left):.0f} s of the budget left, about {needed:.0f} s needed"
        else:
            begin = time.monotonic()
            with self._told_in(row):
                self._load(row, method, child, min(self._budget.left, needed * _PATIENCE + _GRACE))
            self._budget.note(row.condition, time.monotonic() - begin)

    def _load(self, row: Row, method: Method, child: Child, seconds: float) -> None:
        """The conversation with the child, as in child.py."""
        child.tell(msgspec.json.encode(self._job(method, row.condition)))
        child.hear("ready", self._patience())
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
            "link": lambda: msgspec.convert(self._ask("link"), Limit),
            "host copy": lambda: limits.host_copy(files, _LIMIT_BYTES, self._threads),
            "disk": lambda: limits.disk(files, _LIMIT_BYTES, lambda: cache.drop(files)),
        }
        for name, take in measured.items():
            try:
                attempts = self._options.repeats if name != "link" else 1
                limit: Limit | str = limits.best(take() for _ in range(attempts))
            except (OSError, ChildError) as error:
                limit = f"not measured: {error}"
            self._result.limits[name] = limit
            self._hooks.show(f"limit: {name}: {limit if isinstance(limit, str) else limits.told(limit)}")
            self.save()

    def codec(self) -> None:
        """The codec's own figures, if they were asked for."""
        if self._options.codec:
            self._hooks.step("the codec alone")
            try:
                self._result.codec = msgspec.convert(self._ask("codec"), list[codec.CodecFigures])
            except ChildError as error:
                self._result.codec = f"not measured: {error}"
            for told in codec_line(self._result.codec):
                self._hooks.show(told)
            self.save()

    def _patience(self) -> float:
        """Seconds to wait for what is no load."""
        return max(_LEAST_SECONDS, min(self._budget.left, _START_SECONDS))

    def _ask(self, name: str) -> object:
        """What a helper tells."""
        if (child := self._helpers.pop(name, None)) is None:
            raise ChildError(f"there is none to {self._options.device}")
        with contextlib.closing(child):
            child.tell(b"")
            answer: object = child.hear(name, self._patience())
            return answer
