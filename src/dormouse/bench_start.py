"""`dormouse bench start`: the ways in which one model starts, to the first token, side by side.

A node of its own in a scratch data folder (same disk, same models, same CRIU) starts the model `runs` times each way:

- `cold`, `snapshot`: before each start the page cache is dropped, and weights that were kept in memory are let go of,
  so libraries, weights and snapshot come from the disk.
- `snapshot, warm`: a restore as it is when the model slept a while ago: its files are in the page cache, and its
  weights are kept in memory, decoded.
- `sleep`: the process stayed, and its weights are kept.

The clock runs from the request for a replica to the first token of a greedy answer; the text must be the same every
time. After each first answer the same prompt is asked again: what the first took longer is the price of page faults and
cold caches.
"""

from __future__ import annotations

import asyncio
import os
import platform
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from dormouse.catalogue import human
from dormouse.checkpoint.models import open_model
from dormouse.checkpoint.writer import copy_checkpoint
from dormouse.config import ModelConfig, ServeConfig
from dormouse.data_dir import DataDir
from dormouse.engine.messages import ChatPrompt, Delta, Sampling
from dormouse.errors import DormouseError, EngineError, HostError
from dormouse.node.assemble import assemble_node
from dormouse.node.node import Node
from dormouse.node.parts import Evicted
from dormouse.node.replica import Start
from dormouse.node.runner import Lease
from dormouse.phases import Phases, host_clock
from dormouse.schedule.cluster import StartPath
from dormouse.snapshot.service import CaptureResult
from dormouse.store.store import Store

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_TOKENS = 24
_SHOWN = 0.0005


@dataclass(frozen=True)
class Run:
    """One start, in seconds: until the first token, of that by phase; and the first token of the request after."""

    first_token: float
    phases: Phases
    next_first_token: float
    text: str


@dataclass(frozen=True)
class Way:
    """One way to start. `path` is the start path that it must be; `dropped`: page cache and kept weights are let go of
    before it."""

    name: str
    path: StartPath
    dropped: bool

    @property
    def field(self) -> str:
        """Its name in JSON."""
        return self.name.replace(", ", "_")


COLD = Way("cold", "cold", dropped=True)
SNAPSHOT = Way("snapshot", "snapshot", dropped=True)
WARM = Way("snapshot, warm", "snapshot", dropped=False)
SLEEP = Way("sleep", "sleep", dropped=False)
WAYS = (COLD, SNAPSHOT, WARM, SLEEP)


@dataclass
class Result:
    """All runs, and the capture between them."""

    model: str
    runs: dict[str, list[Run]] = field(default_factory=lambda: {way.name: [] for way in WAYS})
    capture: CaptureResult | None = None

    def identical(self) -> bool:
        """Whether every start gave the same greedy text."""
        return len({run.text for runs in self.runs.values() for run in runs}) == 1


class Watch:
    """The node's observer: keeps the latest start's phases and the latest capture."""

    def __init__(self) -> None:
        self.phases = Phases()
        self.capture: CaptureResult | None = None
        self.error: DormouseError | None = None

    def started(self, model: str, start: Start, phases: Phases) -> None:
        self.phases = phases.copy()

    def start_failed(self, model: str, error: DormouseError) -> None:
        self.error = error

    def foretold(self, model: str, path: StartPath, expected: float, took: float) -> None:
        pass

    def fell_back(self, model: str, path: StartPath, error: DormouseError) -> None:
        self.error = error

    def retried(self, model: str, error: DormouseError) -> None:
        self.error = error

    def quarantined(self, model: str, error: DormouseError) -> None:
        self.error = error

    def captured(self, model: str, result: CaptureResult, phases: Phases) -> None:
        self.capture = result

    def capture_failed(self, model: str, error: DormouseError) -> None:
        self.error = error

    def unprotected(self, model: str) -> None:
        pass

    def evicted(self, model: str, what: Evicted) -> None:
        pass

    def adapter_loaded(self, model: str, adapter: str, seconds: float) -> None:
        pass

    def adapter_failed(self, model: str, adapter: str, error: DormouseError) -> None:
        pass


async def measure(data_dir: DataDir, name: str, *, runs: int, prompt: str, step: Callable[[str], None]) -> Result:
    """Run the benchmark. Raises NotFoundError, HostError, and EngineError when a start was not what it should be."""
    model = open_model(data_dir.models, name)
    if not os.access(_DROP_CACHES, os.W_OK):
        raise HostError("the page cache can't be dropped by this user", remedy="Run the benchmark as root")
    result = Result(name)
    with scratch(data_dir, model.checkpoint) as folder:
        async with await _node(folder, name, snapshot=False) as node:
            for number in range(runs):
                step(f"cold start {number + 1} of {runs}")
                result.runs[COLD.name].append(await _run(node, name, prompt, COLD))
        async with await _node(folder, name, snapshot=True) as node:
            step("capture")
            watch = Watch()
            node.observe(watch)
            await _run(node, name, prompt, COLD)
            result.capture = watch.capture
            for way in (SNAPSHOT, WARM, SLEEP):
                await _get_ready(node, name, prompt, way)
                for number in range(runs):
                    step(f"{way.name} {number + 1} of {runs}")
                    result.runs[way.name].append(await _run(node, name, prompt, way))
    return result


@contextmanager
def scratch(data_dir: DataDir, checkpoint: str | None) -> Iterator[Path]:
    """A data folder beside the real one that shares its models and CRIU, has a copy of the model's weights, and leaves
    no snapshot behind."""
    data_dir.create()
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=data_dir.run))
    try:
        for shared in (data_dir.models, data_dir.criu):
            (folder / shared.name).symlink_to(shared.resolve())
        if checkpoint is not None:
            with Store.open(data_dir.store) as source, Store.open(DataDir(folder).store) as target:
                copy_checkpoint(checkpoint, source, target)
        yield folder
    finally:
        shutil.rmtree(folder)


async def _node(folder: Path, name: str, *, snapshot: bool) -> Node:
    settings = ModelConfig(keep_alive=float("inf"), snapshot=snapshot)
    return await assemble_node(
        ServeConfig(data_dir=folder, templates=False, sleep_memory=1.0, kept_weights=1.0, models={name: settings})
    )


async def _get_ready(node: Node, name: str, prompt: str, way: Way) -> None:
    """What the first of these starts finds must be what the others find."""
    if way.dropped:
        return
    async with node.replica(name) as lease:
        await _ask(lease, prompt)
    await node.sleep(name, keep=way.path == "sleep")


async def _run(node: Node, name: str, prompt: str, way: Way) -> Run:
    """Start the model in this way, ask twice, and put it to sleep."""
    watch = Watch()
    node.observe(watch)
    if way.dropped:
        await node.free_weights()
        await asyncio.to_thread(drop_page_cache)
    begin = host_clock()
    async with node.replica(name) as lease:
        ready = host_clock()
        first, text = await _ask(lease, prompt)
        first_token = first - begin
        if lease.start.path != way.path:
            reason = watch.error or "no reason was given"
            raise EngineError(f"{name} started by the path {lease.start.path!r} instead of {way.path!r}: {reason}")
        again = host_clock()
        second, _text = await _ask(lease, prompt)
    await node.sleep(name, keep=way.path == "sleep")
    watch.phases.add("first token", ready, first, track="worker")
    return Run(first_token, watch.phases, second - again, text)


def drop_page_cache() -> None:
    os.sync()
    _DROP_CACHES.write_text("1\n")


async def _ask(lease: Lease, prompt: str) -> tuple[float, str]:
    """The time of the first token, and the whole greedy text."""
    first, text = 0.0, ""
    messages = ChatPrompt(messages=[{"role": "user", "content": prompt}])
    async for event in lease.generate(messages, Sampling(max_tokens=_TOKENS, temperature=0.0)):
        if isinstance(event, Delta):
            first = first or time.perf_counter()
            text += event.text
    return first, text


def host_facts() -> dict[str, str]:
    """What a figure depends on: date, machine and versions."""
    cpu = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores of {cpu[1] if cpu else platform.machine()}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("dormouse", "torch", "transformers")},
    }


def as_json(result: Result) -> dict[str, Any]:
    """Medians under the names scripts use, then every run."""
    medians = {way: statistics.median(run.first_token for run in result.runs[way.name]) for way in WAYS}
    assert result.capture is not None
    return {
        "host": host_facts(),
        "model": result.model,
        "runs": len(result.runs[COLD.name]),
        **{f"{way.field}_s": seconds for way, seconds in medians.items()},
        "ratio": medians[COLD] / medians[SNAPSHOT],
        "raw_bytes": result.capture.raw_bytes,
        "stored_bytes": result.capture.stored_bytes,
        "stored_ratio": result.capture.stored_bytes / result.capture.raw_bytes,
        "identical_text": result.identical(),
        "capture_phases": result.capture.phases.seconds(),
        **{f"{way.field}_phases": _median_phases(result.runs[way.name]) for way in WAYS},
        "all": {
            way.field: [
                {"first_token_s": run.first_token, "phases": run.phases.seconds()} for run in result.runs[way.name]
            ]
            for way in WAYS
        },
    }


def _median_phases(runs: list[Run]) -> dict[str, float]:
    """Median seconds by phase. The first answer is split: what the same answer takes a moment later is compute."""
    seconds = [run.phases.seconds() for run in runs]
    names = list(dict.fromkeys(name for run in seconds for name in run))
    medians = {name: statistics.median(run.get(name, 0.0) for run in seconds) for name in names}
    compute = min(statistics.median(run.next_first_token for run in runs), medians["first token"])
    medians["page faults"] = medians["first token"] - compute
    medians["first token"] = compute
    return medians


_SPLIT = (SNAPSHOT, WARM, SLEEP)


def _phase_table(columns: list[dict[str, float]]) -> Table:
    """Seconds by phase and way; a phase that is split is shown by its parts."""
    table = Table()
    table.add_column("phase")
    for way in _SPLIT:
        table.add_column(way.name, justify="right")
    names = list(dict.fromkeys(name for column in columns for name in column))
    for name in names:
        split = any(other.startswith(f"{name}.") for other in names)
        if not split and any(column.get(name, 0.0) >= _SHOWN for column in columns):
            table.add_row(name, *(f"{column.get(name, 0.0):.3f}" for column in columns))
    return table


def render(result: Result) -> Group:
    """The figures as tables: cold and snapshot with the page cache dropped, the others not."""
    figures = as_json(result)
    title = f"{result.model}: median of {figures['runs']} starts to the first token"
    starts = Table()
    for column in ("start", "seconds", "slowest", "fastest"):
        starts.add_column(column, justify="left" if column == "start" else "right")
    for way in WAYS:
        times = [run.first_token for run in result.runs[way.name]]
        starts.add_row(way.name, *(f"{seconds:.2f}" for seconds in (statistics.median(times), max(times), min(times))))
    starts.add_row("cold / snapshot", f"{figures['ratio']:.1f}x", "", "")
    phases = _phase_table([figures[f"{way.field}_phases"] for way in _SPLIT])
    stored, raw = human(figures["stored_bytes"]), human(figures["raw_bytes"])
    same = "the same" if figures["identical_text"] else "NOT the same"
    last = f"snapshot {stored} of {raw} raw ({figures['stored_ratio']:.2f}); greedy text {same} every time"
    return Group(title, starts, "where the time goes", phases, last)
