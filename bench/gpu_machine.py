"""The machine of bench/snapshot_gpu.py: what it is, what it can do, and what of its memory is taken.

The limits are what no capture or restore can be faster than: the disk (read and written past the page cache), memory to
memory, and the link to the GPU, each measured in the same run.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dormouse import host_memory
from dormouse.bench_load import limits
from measuring import drop_page_cache

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_INTERVAL = 0.02
_LINK_TIMEOUT = 60.0


class Gpu:
    """One GPU as the driver's management library sees it, which takes no memory of it."""

    def __init__(self, number: int) -> None:
        """Raises OSError where there is no driver."""
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._call("nvmlInit_v2")
        self._device = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(number), ctypes.byref(self._device))

    def used_bytes(self) -> int:
        """What is taken of its memory by anybody."""
        return int(self._memory()[2])

    def total_bytes(self) -> int:
        """All of its memory."""
        return int(self._memory()[0])

    def facts(self) -> dict[str, Any]:
        """Name, memory and driver."""
        return {
            "gpu": self._text("nvmlDeviceGetName", self._device),
            "gpu_bytes": self.total_bytes(),
            "driver": self._text("nvmlSystemGetDriverVersion"),
        }

    def _memory(self) -> Any:
        found = (ctypes.c_ulonglong * 3)()  # total, free, used
        self._call("nvmlDeviceGetMemoryInfo", self._device, found)
        return found

    def _text(self, name: str, *arguments: Any) -> str:
        text = ctypes.create_string_buffer(96)
        self._call(name, *arguments, text, ctypes.c_uint(len(text)))
        return text.value.decode()

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise OSError(f"{name} failed with {code}")


def filesystem(folder: Path) -> str:
    """The kind of file system that a folder is on, such as ext4 or tmpfs."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [(len(place), kind) for place, kind in mounts if folder.resolve().is_relative_to(place)]
    return max(above, default=(0, "unknown"))[1]


def find_gpu(device: str) -> Gpu | None:
    """The GPU of a device such as cuda:0; None for the CPU. Raises OSError."""
    return Gpu(int(device.partition(":")[2] or 0)) if device.startswith("cuda") else None


def facts(gpu: Gpu | None, criu: str) -> dict[str, Any]:
    """What the figures depend on."""
    model = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}",
        "memory_bytes": host_memory.total(),
        "kernel": platform.release(),
        "huge_pages": re.sub(r".*\[(.*)\].*", r"\1", _HUGE_PAGES.read_text().strip()),
        "python": platform.python_version(),
        "criu": criu,
        **{name: _version(name) for name in ("dormouse", "torch", "transformers", "triton", "cuda-bindings")},
        **(gpu.facts() if gpu is not None else {"gpu": None}),
    }


def _version(package: str) -> str | None:
    """None for one that is not installed, or runs from its sources."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def measure_limits(folder: Path, device: str, size: int) -> dict[str, float]:
    """Bytes per second by name, measured with so many bytes. Raises OSError."""
    found = {"disk write": disk_write(folder, size)}
    file = folder / "limit"
    try:
        found["disk read"] = limits.disk([file], size, drop_page_cache).bytes_per_second
        file.read_bytes()
        found["host copy"] = limits.host_copy([file], size, min(8, os.cpu_count() or 1)).bytes_per_second
    finally:
        file.unlink()
    if device.startswith("cuda"):
        found["link"] = link(device)
    return found


def disk_write(folder: Path, size: int, threads: int = 4, block: int = 16 << 20) -> float:
    """Of new bytes past the page cache, by several threads, synced at the end; leaves the file `limit`."""
    size = size // (threads * block) * threads * block
    with (folder / "limit").open("xb") as made:
        made.truncate(size)

    def write(number: int) -> None:
        with mmap.mmap(-1, block) as memory:  # O_DIRECT wants aligned memory
            memory.write(os.urandom(block))
            descriptor = os.open(folder / "limit", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
            try:
                for at in range(number * block, size, threads * block):
                    os.pwritev(descriptor, [memory], at)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(threads)))
    return size / (time.perf_counter() - begin)


def link(device: str) -> float:
    """Pinned memory to the GPU, measured by a process of its own so that none of its memory stays taken."""
    command = [sys.executable, "-m", "dormouse.bench_load.limits", device]
    done = subprocess.run(command, input="go\n", capture_output=True, text=True, timeout=_LINK_TIMEOUT, check=False)
    if done.returncode:
        raise OSError(f"the link could not be measured: {done.stderr[-500:]}")
    return float(json.loads(done.stdout)["link"]["bytes_per_second"])


@dataclass
class Peak:
    """The most host memory that was taken beyond what was at the beginning. Page cache does not count."""

    bytes: int = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Watch it while the body runs."""
    peak, done, before = Peak(), threading.Event(), available()

    def look() -> None:
        while not done.wait(_INTERVAL):
            peak.bytes = max(peak.bytes, before - available())

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def available() -> int:
    """What could be taken, in bytes; page cache counts as free. (Control groups would count it as taken.)"""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/meminfo has no MemAvailable")
