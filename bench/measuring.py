"""What benchmarks of snapshots measure, and how: CPU time and memory of a tree of processes, bytes on a disk.

A measured operation runs in a process of its own (`Operation` on its side, `run_operation` on the benchmark's). It
prepares as long as it likes, says `begin`, works, says `end`. Between the two the benchmark samples the tree of
processes below it from outside, so that looking does not slow what is looked at.

The process that has the pid `SUBJECT_PID` in its cell is the subject of the operation: its memory is not the tool's.
CPU time is counted of all: the subject waits for a command all the time, so what it uses is work that CRIU does inside
it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dormouse import host_memory
from dormouse.snapshot.cell import worker_pid_floor

SUBJECT_PID = worker_pid_floor() + 1

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_KEEP_PAGE_CACHE = "DORMOUSE_KEEP_PAGE_CACHE"
_INTERVAL = 0.02
_TOUCH = 1 << 20
_TICK = os.sysconf("SC_CLK_TCK")
_GONE = (FileNotFoundError, ProcessLookupError)


def drop_page_cache() -> None:
    """Write back what is dirty, then drop all clean pages. Needs root. With DORMOUSE_KEEP_PAGE_CACHE nothing is
    dropped: for tries whose figures mean nothing, on a machine where others would wait for the disk."""
    if os.environ.get(_KEEP_PAGE_CACHE):
        return
    os.sync()
    _DROP_CACHES.write_text("1\n")


def tree(root: int) -> list[int]:
    """`root` and the pids of all below it."""
    found = [root]
    for pid in found:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(*_GONE):
                found += [int(word) for word in children.read_text().split()]
    return found


class CpuTime:
    """CPU time of `root` (its own only if `own`), everything below it, and all that has ended there, since now."""

    def __init__(self, root: int, *, own: bool) -> None:
        self._root, self._own = root, own
        self._before = self._read()

    def seconds(self) -> float:
        """Until now. When a whole cell has ended, its subject's time is in nobody's account any more."""
        now = self._read()
        lost = self._before[1] if not now[1] else 0
        return (now[0] - self._before[0] + lost) / _TICK

    def _read(self) -> tuple[int, int]:
        """Of all, and of the subjects alone, in ticks."""
        ticks = subjects = 0
        for pid in tree(self._root):
            with contextlib.suppress(*_GONE):
                times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
                used = sum(int(word) for word in (times if self._own or pid != self._root else times[2:]))
                ticks += used
                subjects += used if is_subject(status_of(pid)) else 0
        return ticks, subjects


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    return dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())


def is_subject(status: dict[str, str]) -> bool:
    """See the module."""
    inner = status["NSpid"].split()
    return len(inner) > 1 and int(inner[-1]) == SUBJECT_PID


def memory_bytes(root: int, *, only: str) -> int:
    """Anonymous memory of `root` and all below it, without the subject; with `only`, of those below whose command line
    contains that. (Mapped files, such as shared libraries, are left out: they are in memory once, whoever maps them.)
    """
    total = 0
    for pid in tree(root)[1:] if only else tree(root):
        with contextlib.suppress(*_GONE):
            status = status_of(pid)
            if not is_subject(status) and only in Path(f"/proc/{pid}/cmdline").read_text():
                total += int(status.get("RssAnon", "0 kB").split()[0]) << 10
    return total


def allocated_bytes(folders: Sequence[Path]) -> int:
    """What the files below some folders take of the disk."""
    total = 0
    for folder in folders:
        for place, _folders, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(place, name)).st_blocks * 512  # noqa: PTH118 - often, thus fast
    return total


@dataclass(frozen=True)
class Peaks:
    """The most that was seen at once."""

    disk_bytes: int
    memory_bytes: int


class Sampler:
    """Looks at an operation from `begin` to `stop`."""

    def __init__(self, root: int, folders: Sequence[Path], only: str) -> None:
        self._root, self._folders, self._only = root, folders, only
        self._peaks = Peaks(0, 0)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._sample()
        self._thread.start()

    def stop(self) -> Peaks:
        """The peaks."""
        self._done.set()
        self._thread.join()
        self._sample()
        return self._peaks

    def _run(self) -> None:
        while not self._done.wait(_INTERVAL):
            self._sample()

    def _sample(self) -> None:
        disk, memory = allocated_bytes(self._folders), memory_bytes(self._root, only=self._only)
        self._peaks = Peaks(max(self._peaks.disk_bytes, disk), max(self._peaks.memory_bytes, memory))


class Operation:
    """The measured process's side."""

    @staticmethod
    @contextlib.contextmanager
    def measured(name: str, folders: Sequence[Path], *, only: str = "") -> Iterator[dict[str, Any]]:
        """Measure the body as step `name`. It may put facts into the dict it gets. `only` as for `memory_bytes`: with
        it, this process itself is no part of the tool, and its CPU time does not count."""
        Operation.tell({"begin": name, "folders": [str(folder) for folder in folders], "only": only})
        sys.stdin.readline()
        facts: dict[str, Any] = {}
        cpu = CpuTime(os.getpid(), own=not only)
        begin = time.perf_counter()
        yield facts
        facts["seconds"] = time.perf_counter() - begin
        Operation.tell({"end": name})
        facts["cpu_seconds"] = cpu.seconds()
        Operation.add(name, **facts)

    @staticmethod
    def add(name: str, **facts: Any) -> None:
        """More facts of a step, found after its end."""
        Operation.tell({"add": name, "facts": facts})

    @staticmethod
    def tell(message: dict[str, Any]) -> None:
        """One line to the benchmark."""
        print(json.dumps(message), flush=True)


class OperationFailed(Exception):
    """An operation ended without a result; its last words."""


def touch_memory(length: int) -> None:
    """Use much memory for a moment, but leave a quarter. A virtual machine gets its memory page by page at the first
    use, and may give back what is free; then whoever comes first pays for it, and that would be a matter of luck."""
    length = min(length, host_memory.available() * 3 // 4)
    with mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        block = bytes(_TOUCH)
        for at in range(0, length - length % _TOUCH, _TOUCH):
            memory[at : at + _TOUCH] = block


def run_operation(program: Path, name: str, arguments: dict[str, Any], *, touch: int, timeout: float) -> dict[str, Any]:
    """Run `python program NAME ARGUMENTS`; facts by step, among them its peaks. Before each step, `touch` bytes of
    memory are touched. Raises OperationFailed."""
    steps: dict[str, Any] = {}
    sampler: Sampler | None = None
    command = [sys.executable, str(program), name, json.dumps(arguments)]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            watchdog = threading.Timer(timeout, process.kill)
            watchdog.start()
            for line in process.stdout:
                message = json.loads(line)
                if "begin" in message:
                    touch_memory(touch)
                    folders = [Path(folder) for folder in message["folders"]]
                    sampler = Sampler(process.pid, folders, message["only"])
                    process.stdin.write("\n")
                    process.stdin.flush()
                elif "end" in message:
                    assert sampler is not None
                    peaks = sampler.stop()
                    steps[message["end"]] = {
                        "peak_disk_bytes": peaks.disk_bytes,
                        "peak_memory_bytes": peaks.memory_bytes,
                    }
                else:
                    steps[message["add"]] |= message["facts"]
            watchdog.cancel()
        errors.seek(0)
        if process.returncode:
            raise OperationFailed(f"{name} ended with {process.returncode}: {errors.read()[-2000:]}")
    return steps


def timed(work: Callable[[], object]) -> float:
    """Seconds it takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def sync_files(folder: Path) -> None:
    """Make every file of a folder, and the folder, durable."""
    for path in (*sorted(folder.iterdir()), folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
