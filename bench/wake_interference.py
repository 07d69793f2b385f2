"""What a waking model does to a hot one: inter-token gaps of a stream, with and without another model's wake-up.

    python bench/wake_interference.py MODEL [--wakes 5] [--json FILE]

Serves two copies of an imported model from a scratch data folder on this machine. `hot` streams all the time; `sleepy`
is captured once and then woken again and again. A gap counts as "waking" when any part of it lies between a request to
`sleepy` and that request's first token, and as "quiet" when `sleepy` is asleep. One run, both kinds side by side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from dormouse.bench_start import host_facts
from dormouse.checkpoint.models import open_model
from dormouse.checkpoint.writer import copy_checkpoint
from dormouse.data_dir import DataDir, default_data_dir
from dormouse.node.presence import read_node
from dormouse.store.store import Store

TIMEOUT = 300.0
# Made once: making one reads certificates for 0.1 s of CPU, which would show as a gap of the other stream.
CLIENT = httpx.Client(timeout=TIMEOUT)


@contextmanager
def served(model: str) -> Iterator[tuple[str, DataDir]]:
    """A server with the models `hot` and `sleepy`, both the imported `model`."""
    real = DataDir(default_data_dir(os.environ))
    with tempfile.TemporaryDirectory(prefix="bench-", dir=real.create().run) as folder:
        scratch = DataDir(Path(folder)).create()
        if real.criu.exists():
            scratch.criu.symlink_to(real.criu)
        for name in ("hot", "sleepy"):
            (scratch.models / name).symlink_to(real.models / model)
        if (checkpoint := open_model(real.models, model).checkpoint) is not None:
            with Store.open(real.store) as source, Store.open(scratch.store) as target:
                copy_checkpoint(checkpoint, source, target)
        config = Path(folder) / "serve.yaml"
        config.write_text(
            "port: 0\nlog_level: warning\nsleep_memory: 0\n"
            "models:\n  hot: {keep_alive: forever}\n  sleepy: {keep_alive: 1s}\n"
        )
        command = [sys.executable, "-m", "dormouse.cli", "serve", str(config), "--data-dir", folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                match = re.search(r"http://\S+", process.stdout.readline())
                if match is None:
                    sys.exit("dormouse serve did not start")
                yield match[0], scratch
            finally:
                process.terminate()
                process.wait(60)


def stream(address: str, model: str, tokens: int) -> Iterator[float]:
    """The arrival times of one answer's pieces of text."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Tell me a long story about a mouse that sleeps all winter."}],
        "temperature": 0,
        "max_tokens": tokens,
        "stream": True,
    }
    with CLIENT.stream("POST", f"{address}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                yield time.perf_counter()


def wait_asleep(data_dir: DataDir) -> None:
    """Until `sleepy` has no worker."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        node = read_node(data_dir.run)
        if node is not None and any(model.name == "sleepy" and model.state == "asleep" for model in node.models):
            return
        time.sleep(0.1)
    sys.exit("the model did not fall asleep")


def measure(model: str, wakes: int) -> dict[str, Any]:
    """All gaps of `hot` by kind, and the wake-ups' times, in seconds."""
    arrivals: list[list[float]] = []
    windows: list[tuple[float, float]] = []
    with served(model) as (address, data_dir):
        next(stream(address, "sleepy", 1))
        next(stream(address, "hot", 1))
        wait_asleep(data_dir)
        time.sleep(1)
        done = threading.Event()

        def keep_hot() -> None:
            while not done.is_set():
                arrivals.append(list(stream(address, "hot", 120)))

        hot = threading.Thread(target=keep_hot)
        hot.start()
        quiet_from = time.perf_counter()
        time.sleep(8)
        quiet = [(quiet_from, time.perf_counter())]
        for _ in range(wakes):
            begin = time.perf_counter()
            first = next(stream(address, "sleepy", 1))
            windows.append((begin, first))
            wait_asleep(data_dir)
            time.sleep(0.5)
            quiet_from = time.perf_counter()
            time.sleep(3)
            quiet.append((quiet_from, time.perf_counter()))
        done.set()
        hot.join()
    gaps = [(a, b) for answer in arrivals for a, b in itertools.pairwise(answer)]
    return {
        "quiet": sorted(b - a for a, b in gaps if any(start <= a and b <= end for start, end in quiet)),
        "waking": sorted(b - a for a, b in gaps if any(a < end and start < b for start, end in windows)),
        "wakes": [end - begin for begin, end in windows],
    }


def percentile(values: list[float], share: float) -> float:
    """The nearest-rank percentile of sorted values."""
    return values[min(len(values) - 1, int(len(values) * share))]


def main() -> None:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--wakes", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.model, arguments.wakes)
    result: dict[str, Any] = {
        "host": host_facts(),
        "model": arguments.model,
        "wake_s": found["wakes"],
    }
    table = Table(title="inter-token gap of a hot model, ms")
    for column in ("while the other model", "gaps", "p50", "p90", "p99"):
        table.add_column(column, justify="right")
    for kind in ("quiet", "waking"):
        gaps = found[kind]
        figures = {f"p{share}": percentile(gaps, share / 100) * 1000 for share in (50, 90, 99)}
        result[kind] = {"gaps": len(gaps)} | figures
        table.add_row(
            {"quiet": "sleeps", "waking": "wakes"}[kind], str(len(gaps)), *(f"{ms:.1f}" for ms in figures.values())
        )
    result["p99_ratio"] = result["waking"]["p99"] / result["quiet"]["p99"]
    console = Console()
    console.print(table)
    wakes = ", ".join(f"{seconds:.2f}" for seconds in found["wakes"])
    console.print(f"p99 while waking / p99 while asleep: {result['p99_ratio']:.2f}; wake-ups: {wakes} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
