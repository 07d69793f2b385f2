"""A data folder with CRIU, and the command line in processes of its own, as a user has it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dormouse.data_dir import DataDir, default_data_dir
from dormouse.errors import HostError
from dormouse.jobs.control import running_jobs
from dormouse.snapshot.criu_setup import Criu, find_criu

PATIENCE = 40.0


def eventually(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)
    return value


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Command:
    """A `dormouse` command that runs; what it prints is gathered."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.out = b""
        self.err = b""
        self._readers = [threading.Thread(target=self._read, args=(name,), daemon=True) for name in ("out", "err")]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str) -> None:
        pipe = {"out": self.process.stdout, "err": self.process.stderr}[name]
        assert pipe is not None
        while part := os.read(pipe.fileno(), 65536):
            setattr(self, name, getattr(self, name) + part)

    def lines(self) -> list[str]:
        return self.out.decode().splitlines()

    def until(self, text: str, stream: str = "out") -> None:
        def seen() -> bool:
            assert text.encode() in getattr(self, stream) or self.process.poll() is None, (text, self.out, self.err)
            return text.encode() in getattr(self, stream)

        eventually(seen, f"{text!r} in {stream}: {self.out!r} {self.err!r}")

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def code(self, patience: float = PATIENCE) -> int:
        code = self.process.wait(patience)
        for reader in self._readers:
            reader.join(10)
        return code


class Dormouse:
    """The command line on one data folder. What it started is killed at the end."""

    def __init__(self, data_dir: DataDir) -> None:
        self.data_dir = data_dir
        self._started: list[Command] = []

    def start(self, *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> Command:
        process = subprocess.Popen(
            [sys.executable, "-m", "dormouse.cli", *arguments],
            env={**os.environ, "DORMOUSE_HOME": str(self.data_dir.root), "COLUMNS": "300", **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
        )
        command = Command(process)
        self._started.append(command)
        return command

    def run(self, *argv: str, name: str = "job", options: tuple[str, ...] = (), **more: Any) -> Command:
        return self.start("run", "--name", name, *options, "--", *argv, **more)

    def python(self, program: str, **more: Any) -> Command:
        return self.run(sys.executable, "-u", "-c", program, **more)

    def do(self, *arguments: str, expect: int = 0) -> dict[str, Any]:
        """A command with --json; its result, or its error."""
        command = self.start(*arguments, "--json")
        code = command.code(120)
        assert code == expect, (code, command.out, command.err)
        answer = json.loads(command.out) if command.out else {}
        return answer.get("error", answer) if isinstance(answer, dict) else answer

    def checkpoint(self, name: str = "job", *options: str) -> str:
        return str(self.do("checkpoint", name, *options)["id"])

    def refused(self, *arguments: str, expect: int = 6) -> str:
        error = self.do(*arguments, expect=expect)
        return f"{error['message']} | {error['remedy']}"

    def close(self) -> None:
        for command in self._started:
            if command.process.poll() is None:
                command.process.kill()
        for command in self._started:
            command.code()
        if (self.data_dir.run / "jobs").exists():
            for job in running_jobs(self.data_dir):  # the detached ones
                os.kill(job["keeper"], signal.SIGKILL)
        for command in self._started:
            for pipe in (command.process.stdin, command.process.stdout, command.process.stderr):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@pytest.fixture(scope="session")
def criu() -> Criu:
    """The CRIU that `dormouse setup criu` has set up for this user."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    try:
        return find_criu(default_data_dir(os.environ))
    except HostError as error:
        pytest.skip(str(error))


@pytest.fixture
def tcp(criu: Criu) -> None:
    """For tests of programs with TCP sockets."""
    if not criu.captures_tcp:
        pytest.skip(f"CRIU {criu.version_text} can't capture TCP sockets on this kernel: run `dormouse setup criu`")


@pytest.fixture
def data_dir(tmp_path: Path, criu: Criu) -> DataDir:
    """An empty data folder that shares the user's CRIU."""
    folder = DataDir(tmp_path / "data").create()
    shared = default_data_dir(os.environ) / "criu"
    if shared.exists():
        folder.criu.symlink_to(shared)
    return folder


@pytest.fixture
def dormouse(data_dir: DataDir) -> Iterator[Dormouse]:
    tool = Dormouse(data_dir)
    yield tool
    tool.close()
