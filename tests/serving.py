"""`dormouse serve` as tests use it: real processes, real CRIU, HTTP over a real port."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from dormouse.checkpoint.importer import import_model
from dormouse.data_dir import DataDir, default_data_dir
from dormouse.errors import HostError
from dormouse.snapshot.criu_setup import find_criu

PATIENCE = 90.0
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def data_dir(tmp_path: Path) -> DataDir:
    """A data folder with a null-engine model called `null` and the user's CRIU."""
    try:
        find_criu(default_data_dir(os.environ))
    except HostError as error:
        pytest.skip(str(error))
    folder = DataDir(tmp_path / "data").create()
    shared = default_data_dir(os.environ) / "criu"
    if shared.exists():
        folder.criu.symlink_to(shared)
    source = tmp_path / "null-source"
    source.mkdir()
    settings = {"memory_mb": 12, "answer_tokens": 20, "weights_mb": 5}
    (source / "config.json").write_text(json.dumps({"model_type": "dormouse-null", "null": settings}))
    import_model(str(source), "null", folder, progress=lambda _step, _done, _total: None)
    return folder


@dataclass
class Server:
    """A running `dormouse serve`."""

    process: subprocess.Popen[str]
    address: str
    data_dir: DataDir

    def ask(self, model: str = "null", **fields: object) -> httpx.Response:
        """One greedy chat answer, whole."""
        body = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 20} | fields
        return httpx.post(f"{self.address}/v1/chat/completions", json=body, timeout=PATIENCE)

    def state(self, model: str = "null") -> str:
        """What the replica does now (`node.json` may be half a second old)."""
        text = httpx.get(f"{self.address}/metrics").text
        found = re.findall(rf'^dormouse_replicas{{model="{model}",state="(\w+)"}} 1.0$', text, re.MULTILINE)
        assert len(found) == 1, found
        return str(found[0])

    def until_asleep(self, model: str = "null") -> None:
        until(lambda: self.state(model) == "asleep")

    def workers(self) -> list[psutil.Process]:
        """The worker processes below the server."""
        return [child for child in self.family() if "dormouse.engine.worker" in command_of(child)]

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def metric(self, name: str, **labels: str) -> float:
        """One sample of /metrics; 0 when it has none."""
        for line in httpx.get(f"{self.address}/metrics").text.splitlines():
            if line.startswith(name) and all(f'{label}="{value}"' in line for label, value in labels.items()):
                return float(line.rsplit(" ", 1)[1])
        return 0.0


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@contextmanager
def serve(
    data_dir: DataDir, *models: str, keep_alive: str | None = None, exit_status: int = 0, sleep_memory: str = "0"
) -> Iterator[Server]:
    """`dormouse serve` on a free port; it must exit with 0 on SIGTERM (or as told) and leave no process."""
    command = [sys.executable, "-m", "dormouse.cli", "serve", *models, "--port", "0"]
    command += ["--keep-alive", keep_alive] if keep_alive is not None else []
    environment = os.environ | {"DORMOUSE_HOME": str(data_dir.root), "DORMOUSE_SLEEP_MEMORY": sleep_memory}
    log = data_dir.root / "serve.log"
    with log.open("a") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    with process:
        assert process.stdout is not None
        match = re.search(r"http://\S+", process.stdout.readline())
        assert match, log.read_text()
        server = Server(process, match[0], data_dir)
        family = []
        try:
            yield server
            family = server.family() if process.poll() is None else []
        finally:
            process.terminate()
            status = process.wait(30)
    assert status == exit_status, log.read_text()
    until(lambda: not any(member.is_running() and member.status() != "zombie" for member in family))
