"""Estimates of starts against what the starts took, on this machine: the node's own, made before each start.

    python bench/estimates_cpu.py [MODEL] [--rounds 12] [--json FILE]

A node in a scratch data folder starts an imported model again and again, each round in every condition: cold and from
its snapshot, with the page cache dropped and kept weights let go of, and without; from the process that stayed, with
its weights in memory and without. Conditions take turns, so every estimate follows a start of another kind. The first
starts of each condition, from which the estimator learns, are left out of the errors (`--learn`); all are in the file.
Beside each error stands the spread: by how much the same starts are off their own median, which nobody can foretell.
The last line is the machine's own spread: the same arithmetic on one thread, before each start.
A start is measured as the node does, from when there is room for it until the replica is ready.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dormouse.bench_start import Watch, drop_page_cache, host_facts, scratch
from dormouse.checkpoint.models import open_model
from dormouse.config import ModelConfig, ServeConfig
from dormouse.data_dir import DataDir, default_data_dir
from dormouse.engine.messages import ChatPrompt, Sampling
from dormouse.errors import EngineError
from dormouse.node.assemble import assemble_node
from dormouse.node.node import Node
from dormouse.schedule.cluster import StartPath

_NUMBERS = 3_000_000
PROMPT = ChatPrompt(messages=[{"role": "user", "content": "What is the capital of France?"}])


@dataclass(frozen=True)
class Condition:
    """`dropped`: the page cache is dropped and weights in memory are let go of before the start. `keep`: its process
    stays for the next one."""

    name: str
    path: StartPath
    dropped: bool
    keep: bool = False


WITHOUT_SNAPSHOT = (
    Condition("cold", "cold", True),
    Condition("cold, warm", "cold", False, keep=True),
    Condition("sleep", "sleep", False, keep=True),
    Condition("sleep, weights gone", "sleep", True),
)
WITH_SNAPSHOT = (Condition("snapshot", "snapshot", True), Condition("snapshot, warm", "snapshot", False))


@dataclass(frozen=True)
class Row:
    """One start. `load` is the machine's load average before it, `arithmetic` what the same computation took then."""

    condition: str
    number: int
    expected: float
    took: float
    load: float
    arithmetic: float

    @property
    def error(self) -> float:
        """As a share of what it took."""
        return abs(self.expected - self.took) / self.took


class Ear(Watch):
    """The node's observer: keeps what the latest start was estimated to take, and took."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: tuple[StartPath, float, float] | None = None

    def foretold(self, model: str, path: StartPath, expected: float, took: float) -> None:
        self.heard = (path, expected, took)


async def measure(data_dir: DataDir, name: str, rounds: int, console: Console) -> list[Row]:
    """All starts, in order."""
    rows: list[Row] = []
    with scratch(data_dir, open_model(data_dir.models, name).checkpoint) as folder:
        for conditions, snapshot in ((WITHOUT_SNAPSHOT, False), (WITH_SNAPSHOT, True)):
            config = ServeConfig(
                data_dir=folder,
                templates=False,
                sleep_memory=1.0,
                kept_weights=1.0,
                models={name: ModelConfig(keep_alive=float("inf"), snapshot=snapshot)},
            )
            async with await assemble_node(config) as node:
                ear = Ear()
                node.observe(ear)
                if snapshot:
                    await _start(node, name, keep=False)  # which captures it
                for number in range(rounds):
                    for condition in conditions:
                        rows.append(await _row(node, name, condition, number, ear))
                        console.print(f"{condition.name} {number + 1}: {rows[-1].took:.3f} s, {rows[-1].error:.1%} off")
    return rows


async def _row(node: Node, name: str, condition: Condition, number: int, ear: Ear) -> Row:
    if condition.dropped:
        await node.free_weights()
        await asyncio.to_thread(drop_page_cache)
    load, seconds = os.getloadavg()[0], arithmetic()
    await _start(node, name, keep=condition.keep)
    assert ear.heard is not None
    path, expected, took = ear.heard
    if path != condition.path:
        raise EngineError(f"{name} started by the path {path} instead of {condition.path}: {ear.error}")
    return Row(condition.name, number, expected, took, load, seconds)


def arithmetic() -> float:
    """The seconds of a computation that is always the same, some 0.3 s of one core."""
    began, total = time.perf_counter(), 0
    for number in range(_NUMBERS):
        total += number * number
    return time.perf_counter() - began


async def _start(node: Node, name: str, *, keep: bool) -> None:
    """Start it, ask it something, and have it sleep."""
    async with node.replica(name) as lease:
        async for _event in lease.generate(PROMPT, Sampling(max_tokens=8, temperature=0.0)):
            pass
    await node.sleep(name, keep=keep)
    async with asyncio.timeout(10):
        while not node.kept_weights():  # noqa: ASYNC110 - the process gives them back a moment after it sleeps
            await asyncio.sleep(0.01)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Errors of some starts: median and 99th percentile, relative and in milliseconds."""
    errors = sorted(row.error for row in rows)
    apart = sorted(1000 * abs(row.expected - row.took) for row in rows)
    spread = sorted(_spread(rows))
    last = _last(errors)
    return {
        "starts": len(rows),
        "median_s": statistics.median(row.took for row in rows),
        "median_error": statistics.median(errors),
        "p99_error": errors[last],
        "median_spread": statistics.median(spread),
        "p99_spread": spread[last],
        "median_error_ms": statistics.median(apart),
        "p99_error_ms": apart[last],
    }


def machine(rows: Sequence[Row]) -> dict[str, float]:
    """By how much the same arithmetic is off its own median."""
    middle = statistics.median(row.arithmetic for row in rows)
    spread = sorted(abs(row.arithmetic - middle) / row.arithmetic for row in rows)
    return {"median_s": middle, "median_spread": statistics.median(spread), "p99_spread": spread[_last(spread)]}


def _last(ordered: Sequence[float]) -> int:
    """Which of them is the 99th percentile."""
    return min(int(0.99 * len(ordered)), len(ordered) - 1)


def _spread(rows: Sequence[Row]) -> list[float]:
    """By how much each start is off the median of its condition, as a share of what it took."""
    middle = {
        name: statistics.median(row.took for row in rows if row.condition == name)
        for name in {row.condition for row in rows}
    }
    return [abs(row.took - middle[row.condition]) / row.took for row in rows]


def as_json(model: str, rows: Sequence[Row], learn: int) -> dict[str, Any]:
    counted = [row for row in rows if row.number >= learn]
    names = dict.fromkeys(row.condition for row in rows)
    return {
        "host": host_facts(),
        "model": model,
        "left_out_of_each": learn,
        "load_average": [min(row.load for row in rows), max(row.load for row in rows)],
        "all": summary(counted),
        "without_sleep": summary([row for row in counted if not row.condition.startswith("sleep")]),
        "arithmetic": machine(counted),
        "conditions": {name: summary([row for row in counted if row.condition == name]) for name in names},
        "rows": [asdict(row) | {"error": row.error} for row in rows],
    }


def render(figures: dict[str, Any]) -> Table:
    """A table of the conditions."""
    title = f"{figures['model']}: load average {figures['load_average'][0]:.1f} to {figures['load_average'][1]:.1f}"
    table = Table(title=title)
    for column in ("start", "starts", "median s", "error, median", "p99", "spread, median", "p99", "ms, median", "p99"):
        table.add_column(column, justify="left" if column == "start" else "right")
    lines = {**figures["conditions"], "without sleep": figures["without_sleep"], "all": figures["all"]}
    for name, one in lines.items():
        table.add_row(
            name,
            str(one["starts"]),
            f"{one['median_s']:.3f}",
            f"{one['median_error']:.1%}",
            f"{one['p99_error']:.1%}",
            f"{one['median_spread']:.1%}",
            f"{one['p99_spread']:.1%}",
            f"{one['median_error_ms']:.1f}",
            f"{one['p99_error_ms']:.1f}",
        )
    own = figures["arithmetic"]
    spread = f"{own['median_spread']:.1%}", f"{own['p99_spread']:.1%}"
    table.add_row("the same arithmetic", "", f"{own['median_s']:.3f}", "", "", *spread, "", "")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--learn", type=int, default=3, help="starts of each condition left out of the errors")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(stderr=True)
    rows = asyncio.run(measure(DataDir(default_data_dir(os.environ)), arguments.model, arguments.rounds, console))
    figures = as_json(arguments.model, rows, arguments.learn)
    Console().print(render(figures))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
