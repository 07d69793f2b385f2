"""`dormouse bench start`: cold starts against snapshot restores of one model, to the first token, side by side.

A node of its own in a scratch data folder (same disk, same models, same CRIU) starts the model `runs` times each way.
Before each start the page cache is dropped, so libraries, weights and snapshot come from the disk. The clock runs
from the request for a replica to the first token of a greedy answer; the text must be the same every time. After each
first answer the same prompt is asked again: what the first took longer is the price of page faults and cold caches.
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
from dormouse.config import DataDir, ModelConfig, ServeConfig
from dormouse.engine.messages import ChatPrompt, Delta, Sampling
from dormouse.errors import DormouseError, EngineError, HostError
from dormouse.node.assemble import assemble_node
from dormouse.node.node import Node
from dormouse.node.replica import Start, StartPath
from dormouse.node.runner import Lease
from dormouse.phases import Phases, host_clock
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


@dataclass
class Result:
    """All runs, and the capture between them."""

    model: str
    cold: list[Run] = field(default_factory=list)
    snapshot: list[Run] = field(default_factory=list)
    capture: CaptureResult | None = None

    def identical(self) -> bool:
        """Whether every start gave the same greedy text."""
        return len({run.text for run in self.cold + self.snapshot}) == 1


class _Watch:
    """The node's observer: keeps the latest start's phases and the latest capture."""

    def __init__(self) -> None:
        self.phases = Phases()
        self.capture: CaptureResult | None = None
        self.error: DormouseError | None = None

    def started(self, model: str, start: Start, phases: Phases) -> None:
        self.phases = phases.copy()

    def start_failed(self, model: str, error: DormouseError) -> None:
        self.error = error

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
    with _scratch(data_dir, model.checkpoint) as folder:
        async with await _node(folder, name, snapshot=False) as node:
            for number in range(runs):
                step(f"cold start {number + 1} of {runs}")
                result.cold.append(await _run(node, name, prompt, expected="cold"))
        async with await _node(folder, name, snapshot=True) as node:
            step("capture")
            watch = _Watch()
            node.observe(watch)
            await _run(node, name, prompt, expected="cold")
            result.capture = watch.capture
            for number in range(runs):
                step(f"restore {number + 1} of {runs}")
                result.snapshot.append(await _run(node, name, prompt, expected="snapshot"))
    return result


@contextmanager
def _scratch(data_dir: DataDir, checkpoint: str | None) -> Iterator[Path]:
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
    return await assemble_node(ServeConfig(data_dir=folder, templates=False, models={name: settings}))


async def _run(node: Node, name: str, prompt: str, *, expected: str) -> Run:
    """Start the model from a dropped page cache, ask twice, and put it to sleep."""
    watch = _Watch()
    node.observe(watch)
    await asyncio.to_thread(_drop_page_cache)
    begin = host_clock()
    async with node.replica(name) as lease:
        ready = host_clock()
        first, text = await _ask(lease, prompt)
        first_token = first - begin
        if lease.start.path != expected:
            reason = watch.error or "no reason was given"
            raise EngineError(f"{name} started by the path {lease.start.path!r} instead of {expected!r}: {reason}")
        again = host_clock()
        second, _text = await _ask(lease, prompt)
    await node.sleep(name)
    watch.phases.add("first token", ready, first, track="worker")
    return Run(first_token, watch.phases, second - again, text)


def _drop_page_cache() -> None:
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
    cold = statistics.median(run.first_token for run in result.cold)
    snapshot = statistics.median(run.first_token for run in result.snapshot)
    assert result.capture is not None
    return {
        "host": host_facts(),
        "model": result.model,
        "runs": len(result.cold),
        "cold_s": cold,
        "snapshot_s": snapshot,
        "ratio": cold / snapshot,
        "raw_bytes": result.capture.raw_bytes,
        "stored_bytes": result.capture.stored_bytes,
        "stored_ratio": result.capture.stored_bytes / result.capture.raw_bytes,
        "identical_text": result.identical(),
        "capture_phases": result.capture.phases.seconds(),
        "cold_phases": _median_phases(result.cold),
        "snapshot_phases": _median_phases(result.snapshot),
        "all": {
            kind: [{"first_token_s": run.first_token, "phases": run.phases.seconds()} for run in runs]
            for kind, runs in (("cold", result.cold), ("snapshot", result.snapshot))
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


def render(result: Result) -> Group:
    """The figures as tables."""
    figures = as_json(result)
    title = f"{result.model}: median of {figures['runs']} starts to the first token, page cache dropped"
    starts = Table()
    for column in ("start", "seconds", "slowest", "fastest"):
        starts.add_column(column, justify="left" if column == "start" else "right")
    for kind, median, runs in (
        ("cold", figures["cold_s"], result.cold),
        ("snapshot", figures["snapshot_s"], result.snapshot),
    ):
        times = [run.first_token for run in runs]
        starts.add_row(kind, f"{median:.2f}", f"{max(times):.2f}", f"{min(times):.2f}")
    starts.add_row("cold / snapshot", f"{figures['ratio']:.1f}x", "", "")
    phases = Table()
    phases.add_column("phase")
    phases.add_column("seconds", justify="right")
    for name, seconds in figures["snapshot_phases"].items():
        if seconds >= _SHOWN and not any(other.startswith(f"{name}.") for other in figures["snapshot_phases"]):
            phases.add_row(name, f"{seconds:.3f}")
    stored, raw = human(figures["stored_bytes"]), human(figures["raw_bytes"])
    same = "the same" if figures["identical_text"] else "NOT the same"
    last = f"snapshot {stored} of {raw} raw ({figures['stored_ratio']:.2f}); greedy text {same} every time"
    return Group(title, starts, "where a restore's time goes", phases, last)
