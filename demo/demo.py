"""The main job in one go: a model answers, falls asleep to disk, and wakes for the next question.

Run by `make demo`, which has installed dormouse and CRIU and imported the model. Serves it on a free port of this
machine, asks a question (cold start), waits until the worker is gone, asks again (restore), compares the two answers
and prints a table. Exit status 0 only if the second start was a restore and both texts are the same.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table

MODEL = "smollm2-135m"
QUESTION = "What does a dormouse do in winter? Answer in two sentences."
KEEP_ALIVE = "2s"
PATIENCE = 240.0

console = Console(highlight=False)


@dataclass
class Answer:
    """One answer as the client saw it."""

    start: str
    first_token_s: float
    total_s: float
    text: str


def dormouse(*arguments: str) -> Any:
    """A dormouse verb's JSON result."""
    command = [sys.executable, "-m", "dormouse.cli", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


@contextmanager
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`dormouse serve` on a free port, and its address."""
    command = [sys.executable, "-m", "dormouse.cli", "serve", MODEL, "--port", "0", "--keep-alive", KEEP_ALIVE]
    without_processes = os.environ | {"DORMOUSE_SLEEP_MEMORY": "0"}  # the way back is to be from the disk
    command += ["--log-level", "warning"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=without_processes) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.search(r"http://\S+", line)
            if match is None:
                sys.exit(f"dormouse serve did not start: {line}")
            yield process, match[0]
        finally:
            process.terminate()
            process.wait(60)


def ask(address: str) -> Answer:
    """Stream one greedy answer and show it as it comes."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 60,
        "stream": True,
    }
    begin = time.perf_counter()
    first, text, start = 0.0, "", ""
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=PATIENCE) as response:
        response.raise_for_status()
        start = response.headers["x-dormouse-start"]
        for line in response.iter_lines():
            if line.startswith(": x-dormouse-start:"):
                start = line.removeprefix(": x-dormouse-start:").strip()
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                sys.exit(f"the server answered with an error: {event['error']['message']}")
            piece = event["choices"][0]["delta"].get("content") or ""
            if piece and not text:
                first = time.perf_counter() - begin
            text += piece
            console.print(f"[green]{piece}[/]" if piece.isprintable() else piece, end="")
    console.print()
    return Answer(start, first, time.perf_counter() - begin, text)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The worker processes below the server."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if any("dormouse.engine.worker" in word for word in child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def wait_until_asleep() -> dict[str, Any]:
    """Wait for the snapshot to be committed and the model to be asleep; its snapshot as `dormouse ls` shows it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        listing = dormouse("ls")
        state = next(model["state"] for model in listing["models"] if model["name"] == MODEL)
        snapshots = [snapshot for snapshot in listing["snapshots"] if snapshot["model"] == MODEL]
        if state == "asleep" and snapshots:
            return dict(snapshots[0])
        time.sleep(0.2)
    sys.exit(f"{MODEL} did not fall asleep within {PATIENCE:.0f} s; see `dormouse ls` and the log")


def main() -> int:
    """The whole demonstration; the exit status."""
    old = [snapshot["id"] for snapshot in dormouse("ls")["snapshots"] if snapshot["model"] == MODEL]
    if old:
        console.print(f"Removing {len(old)} snapshot(s) of an earlier run, so that the first start is a cold one.")
        dormouse("rm", *old)
    with server() as (process, address):
        console.print(f"[bold]1. Serving {MODEL} on {address}; no worker runs yet. Asking: {QUESTION}[/]")
        cold = ask(address)
        console.print(f"   start path and seconds until ready: {cold.start}")
        console.print(f"[bold]2. Nobody asks for {KEEP_ALIVE}: the model falls asleep.[/]")
        snapshot = wait_until_asleep()
        left = workers(process)
        console.print(f"   workers left: {len(left)}; on disk: snapshot {snapshot['id']}")
        console.print("[bold]3. Asking the same again.[/]")
        warm = ask(address)
        console.print(f"   start path and seconds until ready: {warm.start}")
    same = cold.text == warm.text
    raw, stored = snapshot["raw_bytes"], snapshot["stored_bytes"]
    console.print(f"[bold]{MODEL}: a cold start against a wake-up, page cache as it was[/]")
    table = Table()
    for name in ("start", "first token s", "raw MB", "stored MB", "stored / raw"):
        table.add_column(name, justify="left" if name == "start" else "right")
    table.add_row("cold", f"{cold.first_token_s:.2f}", "", "", "")
    ratio = f"{stored / raw:.2f}"
    table.add_row("snapshot", f"{warm.first_token_s:.2f}", f"{raw / 1e6:.0f}", f"{stored / 1e6:.0f}", ratio)
    console.print(table)
    console.print(f"Woke {cold.first_token_s / warm.first_token_s:.1f}x faster; same greedy text: {same}")
    ok = same and not left and warm.start.startswith("snapshot") and cold.start.startswith("cold")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
