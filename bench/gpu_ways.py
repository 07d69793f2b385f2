"""The ways of bench/snapshot_gpu.py to stop a program and to have it back.

    Subject       a program of gpu_subjects.py: asked by files, so that it can be captured at any time
    Raw           plain CRIU and the driver's checkpoint calls, files on the disk: our own measure to compare with
    Transparent   dormouse run, checkpoint, restore
    Served        dormouse serve with a configuration, asked over HTTP

Every wait has a deadline; what is not done by then is a RowFailed, which becomes the row's text.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from dormouse.phases import Phases
from dormouse.snapshot.criu import failure_reason
from dormouse.trace import steps_json

SUBJECTS = Path(__file__).with_name("gpu_subjects.py")
_POLL = 0.001
_PID_PATIENCE = 10.0
_LZ4_BLOCK = 4 << 20
_LOCK_MS = 10_000
_WORDS = 300
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_fallocate = ctypes.CDLL(None).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


class RowFailed(Exception):
    """Why a row has no figures."""


@dataclass(frozen=True)
class Deadline:
    """When a row must be through, by the monotonic clock."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """In so many seconds."""
        return cls(time.monotonic() + seconds)

    def left(self, what: str) -> float:
        """Seconds for a wait. Raises RowFailed when there are none."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise RowFailed(f"out of time: {what}")
        return left

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for it. Raises RowFailed."""
        while not condition():
            self.left(what)
            time.sleep(_POLL)


def run(command: Sequence[str], deadline: Deadline, env: Mapping[str, str] | None = None) -> str:
    """What a command prints. Raises RowFailed."""
    name = " ".join(Path(word).name for word in command[:4])
    try:
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=deadline.left(name),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RowFailed(f"out of time: {name}") from error
    if done.returncode:
        raise RowFailed(f"{name} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-_WORDS:]}")
    return done.stdout


class Subject:
    """One program that answers questions in `folder`."""

    def __init__(self, kind: str, folder: Path, options: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.command = [sys.executable, str(SUBJECTS), kind, json.dumps({**options, "folder": str(folder)})]
        self._asked = 0

    def ask(self) -> None:
        """Put the next question, whether or not it runs now."""
        self._asked += 1
        (self.folder / f"ask-{self._asked}").touch()

    def first_token(self, deadline: Deadline, alive: Callable[[], bool]) -> float:
        """Wait for it; when it came, by the monotonic clock."""
        self._wait(f"first-{self._asked}", deadline, alive)
        return time.monotonic()

    def answer(self, deadline: Deadline, alive: Callable[[], bool]) -> str:
        """Wait for the whole."""
        return self._wait(f"answer-{self._asked}", deadline, alive).read_text()

    def _wait(self, name: str, deadline: Deadline, alive: Callable[[], bool]) -> Path:
        path = self.folder / name
        looked = time.monotonic()
        while not path.exists():
            deadline.left(f"the subject has not written {name}")
            if time.monotonic() > looked + 0.5:
                looked = time.monotonic()
                if not alive() and not path.exists():
                    raise RowFailed(f"the subject ended before it wrote {name}: {self.log()}")
            time.sleep(_POLL)
        return path

    def log(self) -> str:
        """Its last words, where they are known."""
        error = self.folder / "error"
        return error.read_text(errors="replace").strip()[-_WORDS:] if error.exists() else "it left no words"


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def folder_bytes(folder: Path) -> int:
    """What its files have in all."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def resident_bytes(pid: int) -> int:
    """Memory of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) << 10


# Plain CRIU and CUDA


class Cuda:
    """The driver's checkpoint calls, for one process."""

    def __init__(self) -> None:
        """Raises RowFailed where there are no bindings or no driver."""
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise RowFailed(f"cuda-bindings is not installed: {error}") from error
        self._driver = driver
        self._call("cuInit", Deadline.after(60), driver.cuInit, 0)

    def stop(self, pid: int, phases: Phases, deadline: Deadline) -> None:
        """Its GPU memory becomes memory of the process."""
        arguments = self._driver.CUcheckpointLockArgs()
        arguments.timeoutMs = _LOCK_MS
        with phases.time("cuda lock", track="cuda"):
            self._call("lock", deadline, self._driver.cuCheckpointProcessLock, pid, arguments)
        with phases.time("cuda checkpoint", track="cuda"):
            self._call("checkpoint", deadline, self._driver.cuCheckpointProcessCheckpoint, pid, None)

    def go_on(self, pid: int, phases: Phases, deadline: Deadline) -> None:
        """The other way."""
        with phases.time("cuda restore", track="cuda"):
            self._call("restore", deadline, self._driver.cuCheckpointProcessRestore, pid, None)
        with phases.time("cuda unlock", track="cuda"):
            self._call("unlock", deadline, self._driver.cuCheckpointProcessUnlock, pid, None)

    def _call(self, what: str, deadline: Deadline, function: Callable[..., Any], *arguments: Any) -> None:
        """In a thread, because a driver may take for ever; the subject is killed then, which ends the call."""
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(function(*arguments)), daemon=True)
        thread.start()
        thread.join(deadline.left(f"CUDA {what}"))
        if not found:
            raise RowFailed(f"CUDA {what} did not end")
        if found[0][0] != self._driver.CUresult.CUDA_SUCCESS:
            raise RowFailed(f"CUDA {what} failed: {found[0][0]!r}")


class Raw:
    """One subject of the host, without cells: CRIU writes its images as files."""

    def __init__(self, subject: Subject, criu: Sequence[str], images: Path, cuda: Cuda | None) -> None:
        self.subject = subject
        self.images = images
        self._criu = list(criu)
        self._cuda = cuda
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = 0

    @property
    def pid(self) -> int:
        """Of the subject."""
        return self._pid

    def alive(self) -> bool:
        """Whether it runs."""
        return runs(self._pid)

    def start(self, env: Mapping[str, str] | None = None) -> None:
        """In a session of its own, without a terminal: CRIU would need to be told of one."""
        self._process = subprocess.Popen(
            self.subject.command, env=env, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._pid = self._process.pid

    def capture(self, deadline: Deadline) -> Phases:
        """To files, synced; the subject ends."""
        self.images.mkdir()
        phases = Phases()
        if self._cuda is not None:
            self._cuda.stop(self._pid, phases, deadline)
        with phases.time("criu dump", track="criu") as moved:
            self._run_criu(["dump", "--tree", str(self._pid)], "dump.log", deadline)
            moved.bytes = folder_bytes(self.images)
        with phases.time("sync", track="disk"):
            os.sync()
        self._reap(deadline)
        return phases

    def restore(self, deadline: Deadline, phases: Phases) -> None:
        """From the files; it runs when this returns."""
        with phases.time("criu restore", track="criu", bytes=folder_bytes(self.images)):
            self._restore_images(deadline)
        if self._cuda is not None:
            self._cuda.go_on(self._pid, phases, deadline)

    def _restore_images(self, deadline: Deadline) -> None:
        """Without namespaces a pid may be taken: by a short-lived process, or one that ended unreaped."""
        patience = time.monotonic() + _PID_PATIENCE
        while True:
            try:
                self._run_criu(["restore", "--restore-detached"], "restore.log", deadline)
            except RowFailed as error:
                if time.monotonic() > patience or "File exists" not in str(error):
                    raise
                time.sleep(0.2)
            else:
                return

    def close(self) -> None:
        """End it, and remove its files."""
        with contextlib.suppress(RowFailed):  # the kernel takes its time; nothing more can be done here
            self.end()
        shutil.rmtree(self.images, ignore_errors=True)

    def end(self) -> None:
        """Kill it. Raises RowFailed."""
        if self._pid and runs(self._pid):
            os.kill(self._pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait(30)
        Deadline.after(30).until(lambda: not runs(self._pid), "the end of a subject")  # restored, it is not our child

    def _run_criu(self, words: Sequence[str], log: str, deadline: Deadline) -> None:
        common = ["--images-dir", str(self.images), "--work-dir", str(self.images), "--log-file", log, "-v2"]
        try:
            run([*self._criu, *words, *common, "--manage-cgroups=ignore"], deadline)
        except RowFailed as error:
            path = self.images / log
            why = failure_reason(path.read_text(errors="replace")) if path.exists() else "no log"
            raise RowFailed(f"{error}; {why}"[: 2 * _WORDS]) from error

    def _reap(self, deadline: Deadline) -> None:
        assert self._process is not None
        try:
            self._process.wait(deadline.left("the end of the dumped subject"))
        except subprocess.TimeoutExpired as error:
            raise RowFailed("the dumped subject did not end") from error


def compress(folder: Path, phases: Phases, threads: int) -> None:
    """Each file to FILE.lz4, frames of independent blocks, by many threads; the originals go."""
    import lz4.frame

    def job(place: tuple[Path, int]) -> bytes:
        path, at = place
        with path.open("rb") as file:
            file.seek(at)
            return lz4.frame.compress(file.read(_LZ4_BLOCK), store_size=True)

    with phases.time("lz4 compress", track="lz4", bytes=folder_bytes(folder)) as moved:
        with ThreadPoolExecutor(threads) as pool:
            for path in _image_files(folder):
                with path.with_name(path.name + ".lz4").open("xb") as target:
                    places = [(path, at) for at in range(0, path.stat().st_size, _LZ4_BLOCK)]
                    for (_path, at), frame in zip(places, _batches(pool, job, places), strict=True):
                        target.write(len(frame).to_bytes(8, "little") + frame)
                        _give_back(path, at, _LZ4_BLOCK)
                path.unlink()
        os.sync()
        moved.stored = folder_bytes(folder)


def decompress(folder: Path, phases: Phases, threads: int) -> None:
    """Back to the files that CRIU reads."""
    import lz4.frame

    def job(place: tuple[Path, int, int]) -> bytes:
        path, at, length = place
        with path.open("rb") as file:
            file.seek(at)
            return bytes(lz4.frame.decompress(file.read(length)))

    with phases.time("lz4 decompress", track="lz4", stored=folder_bytes(folder)) as moved:
        with ThreadPoolExecutor(threads) as pool:
            for path in sorted(folder.glob("*.lz4")):
                with path.with_suffix("").open("xb") as target:
                    places = list(_frames(path))
                    for (_path, at, length), part in zip(places, _batches(pool, job, places), strict=True):
                        target.write(part)
                        _give_back(path, at, length)
                path.unlink()
        moved.bytes = folder_bytes(folder)


def _give_back(path: Path, offset: int, length: int) -> None:
    """The disk need not hold both forms at once: what is through becomes a hole."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        _fallocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, offset, length)  # a disk that can't do it needs more room
    finally:
        os.close(descriptor)


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix == ".img")


def _frames(path: Path) -> Iterator[tuple[Path, int, int]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        at = 0
        while at < size:
            file.seek(at)
            length = int.from_bytes(file.read(8), "little")
            yield path, at + 8, length
            at += 8 + length


def _batches(pool: ThreadPoolExecutor, job: Callable[[Any], bytes], places: Sequence[Any]) -> Iterator[bytes]:
    """The results in order; a bounded number of them in memory."""
    for first in range(0, len(places), 64):
        yield from pool.map(job, places[first : first + 64])


# Ours, transparent


class Transparent:
    """One subject as a job."""

    def __init__(self, subject: Subject, home: Path, name: str, env: Mapping[str, str] | None = None) -> None:
        self.subject = subject
        self.name = name
        self._env = {**os.environ, **(env or {}), "DORMOUSE_HOME": str(home)}
        self._pid = 0

    @property
    def pid(self) -> int:
        """Of the subject, as this machine sees it."""
        return self._pid

    def alive(self) -> bool:
        """Whether it runs."""
        return runs(self._pid)

    def start(self, deadline: Deadline) -> None:
        """dormouse run."""
        words = ["run", "--detach", "--json", "--name", self.name, "--", *self.subject.command]
        self._pid = self._do(words, deadline)["pids"][0]

    def capture(self, deadline: Deadline, *options: str) -> dict[str, Any]:
        """dormouse checkpoint: its answer, with `phases`."""
        timeout = str(int(deadline.left("the capture")) + 1)
        return self._do(["checkpoint", self.name, "--json", "--timeout", timeout, *options], deadline)

    def restore(self, snapshot: str, deadline: Deadline) -> dict[str, Any]:
        """dormouse restore: how the restore went, with `phases`."""
        state = self._do(["restore", "--detach", "--json", "--name", self.name, snapshot], deadline)
        self._pid = state["pids"][0]
        return dict(state["restores"][0])

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(RowFailed):  # it has ended already
            self._do(["stop", self.name, "--grace", "0"], Deadline.after(60))
        if self._pid and runs(self._pid):
            os.kill(self._pid, signal.SIGKILL)

    def remove(self, snapshot: str) -> None:
        """Free the disk."""
        self._do(["rm", snapshot], Deadline.after(60))

    def _do(self, words: Sequence[str], deadline: Deadline) -> dict[str, Any]:
        text = run([sys.executable, "-m", "dormouse.cli", *words], deadline, self._env)
        return dict(json.loads(text)) if text.startswith("{") else {}


# Ours, served


@dataclass(frozen=True)
class Reply:
    """One request: the start that it waited for, the seconds to its first token, the text."""

    path: str
    start_seconds: float
    first_token: float
    text: str


@dataclass
class Served:
    """A `dormouse serve` process and the requests to it."""

    home: Path
    config: dict[str, Any]
    log: Path
    _process: subprocess.Popen[bytes] | None = None
    _address: str = ""
    _env: dict[str, str] = field(default_factory=dict)

    def start(self, deadline: Deadline) -> None:
        """Wait until it listens."""
        self._env = {**os.environ, "DORMOUSE_HOME": str(self.home)}
        file = self.home / "bench-serve.yaml"
        file.write_text(yaml.safe_dump(self.config))
        self._out.unlink(missing_ok=True)
        with self.log.open("ab") as log, self._out.open("xb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dormouse.cli", "serve", str(file), "--port", "0"],
                env=self._env, stdin=subprocess.DEVNULL, stdout=out, stderr=log,
            )  # fmt: skip
        deadline.until(self._listens, "the server does not listen")

    def _listens(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RowFailed(f"the server ended: {self.last_words()}")
        line = self._out.read_text()
        if line.startswith("listening on ") and line.endswith("\n"):
            self._address = line.split()[-1]
        return bool(self._address)

    @property
    def _out(self) -> Path:
        return self.log.with_suffix(".out")

    def last_words(self) -> str:
        """Of its log."""
        return self.log.read_text(errors="replace").strip()[-_WORDS:]

    def has_said(self, words: str, seconds: float) -> bool:
        """Whether its log has the words, within so many seconds."""
        end = time.monotonic() + seconds
        while words not in self.log.read_text(errors="replace"):
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    @property
    def runs(self) -> bool:
        """Whether it does."""
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """SIGTERM, and SIGKILL when it does not end; its cells end with it."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(30)
        self._process = None
        self._address = ""

    def ask(self, model: str, prompt: Sequence[int], tokens: int, deadline: Deadline) -> Reply:
        """A greedy streamed completion. Raises RowFailed for any answer but a whole one."""
        place = urlsplit(self._address)
        body = {"model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "stream": True}
        connection = http.client.HTTPConnection(
            place.hostname or "", place.port, timeout=deadline.left(f"a request to {model}")
        )
        begin = time.monotonic()
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RowFailed(f"{model} answered {response.status}: {response.read(_WORDS).decode()}")
            return _read_stream(response, begin, model)
        except (OSError, http.client.HTTPException) as error:
            raise RowFailed(f"no answer of {model}: {error!r}; {self.last_words()}") from error
        finally:
            connection.close()

    def do(self, *words: str, deadline: Deadline) -> Any:
        """A command of the command line; its JSON."""
        text = run([sys.executable, "-m", "dormouse.cli", *words, "--json"], deadline, self._env)
        return json.loads(text) if text.strip() else None

    def last(self, model: str, kind: str, deadline: Deadline) -> dict[str, Any]:
        """The latest start or capture of a model, step by step."""
        found = [each for each in self.do("trace", model, deadline=deadline) if each["kind"] == kind]
        if not found:
            raise RowFailed(f"the node knows of no {kind} of {model}")
        return dict(found[-1])


def _read_stream(response: http.client.HTTPResponse, begin: float, model: str) -> Reply:
    start, text, first = response.headers.get("x-dormouse-start", ""), "", None
    for raw in response:
        line = raw.decode().strip()
        if line.startswith(": x-dormouse-start:"):
            start = line.partition("start:")[2].strip()
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise RowFailed(f"{model} failed: {event['error'].get('message')}")
        if first is None and event.get("choices"):
            first = time.monotonic() - begin
        text += "".join(choice["text"] for choice in event.get("choices", ()))
    if first is None:
        raise RowFailed(f"{model} answered nothing")
    path, _, seconds = start.partition(";")
    return Reply(path.strip(), float(seconds or 0), first, text)


def steps_of(phases: Phases) -> list[dict[str, Any]]:
    """As the traces of ours have them."""
    return steps_json(phases)
