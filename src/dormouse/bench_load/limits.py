"""What the machine itself can do: the disk past the page cache, memory to memory, and the link to the GPU.

No loader can be faster than these, so they stand in the last rows, measured in the same run on the same files.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

BLOCK = 16 << 20
LINK_BYTES = 1 << 30
LINK_REPEATS = 5
_DISK_THREADS = (4, 8, 16)


@dataclass(frozen=True)
class Limit:
    """The best rate seen, with how many threads, over how many bytes."""

    bytes_per_second: float
    seconds: float
    bytes: int
    how: str


def told(limit: Limit) -> str:
    """In words."""
    return f"{limit.bytes_per_second / 1e9:.2f} GB/s ({limit.how})"


def best(attempts: Iterable[Limit]) -> Limit:
    """The fastest."""
    return max(attempts, key=lambda limit: limit.bytes_per_second)


def disk(files: Sequence[Path], most: int, drop: Callable[[], None]) -> Limit:
    """O_DIRECT reads of the files, cold, by several numbers of threads; the best. Raises OSError where the file system
    has no O_DIRECT."""
    return best(_disk(files, most, threads, drop) for threads in _DISK_THREADS)


def _disk(files: Sequence[Path], most: int, threads: int, drop: Callable[[], None]) -> Limit:
    drop()
    seconds, count = _read_all(files, most, threads, os.O_DIRECT)
    return Limit(count / seconds, seconds, count, f"O_DIRECT, {threads} threads of {BLOCK >> 20} MiB")


def host_copy(files: Sequence[Path], most: int, threads: int) -> Limit:
    """From the page cache into memory, which each thread uses again and again."""

    def once() -> Limit:
        seconds, count = _read_all(files, most, threads, 0)
        return Limit(count / seconds, seconds, count, f"page cache to memory, {threads} threads of {BLOCK >> 20} MiB")

    return best(once() for _ in range(2))


def _read_all(files: Sequence[Path], most: int, threads: int, flags: int) -> tuple[float, int]:
    """Seconds and bytes of reading all whole blocks of the files, `most` bytes at most."""
    opened = [os.open(file, os.O_RDONLY | os.O_CLOEXEC | flags) for file in files]
    try:
        blocks = [
            (descriptor, offset) for descriptor in opened for offset in range(0, os.fstat(descriptor).st_size, BLOCK)
        ][: max(1, most // BLOCK)]

        ready = threading.Barrier(threads + 1)

        def read(first: int) -> int:
            with mmap.mmap(-1, BLOCK) as buffer:  # O_DIRECT wants aligned memory
                buffer[:: mmap.PAGESIZE] = bytes(BLOCK // mmap.PAGESIZE)
                ready.wait()
                return sum(os.preadv(at[0], [buffer], at[1]) for at in blocks[first::threads])

        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(read, first) for first in range(threads)]
            ready.wait()
            start = time.perf_counter()
            count = sum(future.result() for future in futures)
            return time.perf_counter() - start, count
    finally:
        for descriptor in opened:
            os.close(descriptor)


def link(torch: Any, device: str) -> Limit:
    """Pinned host memory to the device, the best of several copies."""
    source = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(LINK_BYTES, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(LINK_REPEATS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    fastest = min(seconds)
    return Limit(LINK_BYTES / fastest, fastest, LINK_BYTES, f"pinned memory to the device, best of {LINK_REPEATS}")


def main() -> None:
    """`python -m dormouse.bench_load.limits DEVICE`: prepare, wait for a line, tell the link's limit."""
    import torch

    device = sys.argv[1]
    torch.ones(1, device=device)
    if sys.stdin.readline():
        sys.stdout.buffer.write(msgspec.json.encode({"link": link(torch, device)}) + b"\n")


if __name__ == "__main__":
    main()
