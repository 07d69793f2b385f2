"""How fast the memory of a large process is captured and given back, by what lies in it, beside plain CRIU.

    python bench/process_memory.py [--size-mb 2048] [--kinds bf16,random] [--folder DIR]... [--runs 1]
                                   [--hands 0,12] [--seconds 60] [--json FILE]

The subject is a process with one large block of anonymous memory: `zero` (written zeros), `random` bytes, `bf16`
(numbers from N(0, 0.02), as weights are), `text`, or `mixed` (a quarter of each). So it is after the CUDA driver has
copied the memory of a GPU to the host. For each kind and folder it is captured and restored by Dormouse (`ours`) and by
CRIU with files (`plain`), and what came back is compared, all of it. Folders are where stores and images go: one in
memory (/dev/shm) and one on the disk show both limits. Captures of ours are durable when they return; those of CRIU are
synced within the time. `again` is a second capture of the restored process, which shares everything. `--cold` drops the
page cache before each restore. `hands` is how many helper processes did the work (0: threads); `memory` and
`fill` are the steps that they take part in. GB/s are of the subject's block; CPU seconds are those of everything that
takes part.

Before each step memory is touched in huge pages: a virtual machine may have given what was free back to its host, and
whoever comes first then pays for it, up to ten times what the step itself costs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import mmap
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3
from rich import box
from rich.console import Console
from rich.table import Table

from dormouse import host_memory
from dormouse.bench_start import host_facts
from dormouse.data_dir import default_data_dir
from dormouse.snapshot.capture import PROCESS_KIND, CaptureResult, capture
from dormouse.snapshot.cell import Cell, worker_pid_floor
from dormouse.snapshot.criu_setup import Criu, find_criu
from dormouse.snapshot.hands import Hands, hands_for
from dormouse.snapshot.mapped_files import CACHE_NAME, DigestCache
from dormouse.snapshot.restore import restore
from dormouse.snapshot.tree import ProcessTree
from dormouse.store.store import Store
from dormouse.transfer.memory import anonymous, keep_freed_memory
from measuring import CpuTime, allocated_bytes, drop_page_cache, sync_files

KINDS = ("zero", "random", "bf16", "text", "mixed")

_BLOCK = 16 << 20
_READY_TIMEOUT = 300.0
_CRIU_TIMEOUT = 600.0
_HANDS_START = 2.0


@dataclass
class Row:
    """One way of capturing and restoring one kind of memory."""

    kind: str
    folder: str
    way: str
    bytes: int
    hands: int = 0
    capture_seconds: float = 0.0
    capture_cpu_seconds: float = 0.0
    stored_bytes: int = 0
    restore_seconds: float = 0.0
    restore_cpu_seconds: float = 0.0
    again_seconds: float | None = None
    peak_rss_bytes: int = 0
    capture_phases: dict[str, float] = field(default_factory=dict)
    restore_phases: dict[str, float] = field(default_factory=dict)

    def rate(self, seconds: float) -> float:
        return self.bytes / seconds / 1e9 if seconds else 0.0


# The subject


def be_subject(kind: str, size: int, mark: Path) -> None:
    """Fill a block, say where it is, and sleep."""
    import numpy as np

    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = np.frombuffer(memory, np.uint8)
    for at in range(0, size, _BLOCK):
        part = view[at : at + _BLOCK]
        part[:] = _content(KINDS[at // _BLOCK % 4] if kind == "mixed" else kind, at, len(part))
    temporary = mark.with_suffix(".new")
    temporary.write_text(f"{view.ctypes.data}")
    temporary.rename(mark)
    while True:
        time.sleep(3600)


def _content(kind: str, seed: int, length: int) -> Any:
    import numpy as np

    random = np.random.default_rng(seed)
    if kind == "zero":
        return np.zeros(length, np.uint8)
    if kind == "random":
        return np.frombuffer(random.bytes(length), np.uint8)
    if kind == "bf16":
        numbers = random.standard_normal(length // 2, np.float32) * np.float32(0.02)
        return (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    words = np.frombuffer(b"".join(b"%09d the dormouse slept, " % n for n in range(length // 24 + 1)), np.uint8)
    return words[:length]


def start_subject(kind: str, size: int, folder: Path) -> tuple[ProcessTree, int]:
    """A ready subject in a cell of its own, and the address of its block."""
    mark = folder / f"ready-{kind}-{time.monotonic_ns()}"
    cell = Cell.create()
    words = [sys.executable, str(Path(__file__).resolve()), "--subject", kind, str(size), str(mark)]
    environment = {"PATH": os.defpath, "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "OPENBLAS_NUM_THREADS": "1"}
    spawned = cell.spawn(words, env=environment, pid_floor=worker_pid_floor())
    deadline = time.monotonic() + _READY_TIMEOUT
    while not mark.exists():
        if time.monotonic() > deadline or not cell.processes():
            raise SystemExit(f"the subject {kind} did not begin")
        time.sleep(0.02)
    return ProcessTree(cell, spawned.pid), int(mark.read_text())


def digest_of_block(tree: ProcessTree, address: int, size: int) -> str:
    """Of the subject's block, read from outside."""
    hashed = blake3()
    with Path(f"/proc/{tree.home.outer_pid(tree.pid)}/mem").open("rb", buffering=0) as memory:
        for at in range(0, size, _BLOCK):
            memory.seek(address + at)
            wanted = min(_BLOCK, size - at)
            part = memory.read(wanted)
            if len(part) != wanted:
                raise SystemExit("the subject's memory could not be read")
            hashed.update(part)
    return hashed.hexdigest()


# The ways


def touch_huge(length: int) -> None:
    """See the module. Leaves a quarter of what is free."""
    length = min(length, host_memory.available() * 3 // 4)
    with anonymous(length) as memory:
        block = bytes(1 << 20)
        for at in range(0, length - length % len(block), len(block)):
            memory[at : at + len(block)] = block


@contextlib.contextmanager
def timed(row: Row, what: str) -> Iterator[None]:
    """Wall and CPU seconds of a step, into the row."""
    touch_huge(row.bytes * 5 // 2)
    reset_peak()
    before = peak()
    cpu = CpuTime(os.getpid(), own=True)
    begin = time.perf_counter()
    yield
    setattr(row, f"{what}_seconds", time.perf_counter() - begin)
    row.peak_rss_bytes = max(row.peak_rss_bytes, peak() - before)
    setattr(row, f"{what}_cpu_seconds", cpu.seconds())


def ours(kind: str, size: int, folder: Path, criu: Criu, cold: bool, hands: Hands) -> Row:
    row = Row(kind, str(folder), "ours", size, hands.count)
    work = folder / "criu"
    work.mkdir(mode=0o700)
    digests = DigestCache(folder / CACHE_NAME)
    tree, address = start_subject(kind, size, folder)
    try:
        expected = digest_of_block(tree, address, size)
        with Store.open(folder / "store") as store:
            with timed(row, "capture"):
                result = _captured(tree, store, criu, digests, work, hands)
            row.stored_bytes, row.capture_phases = result.stored_bytes, result.phases.seconds()
            tree.home.close()
            tree = _restored(row, result, store, criu, digests, work, cold, hands)
            if digest_of_block(tree, address, size) != expected:
                raise SystemExit(f"{kind}: what came back is not what was captured")
            begin = time.perf_counter()
            _captured(tree, store, criu, digests, work, hands)
            row.again_seconds = time.perf_counter() - begin
    finally:
        tree.home.close()
    return row


def _captured(
    tree: ProcessTree, store: Store, criu: Criu, digests: DigestCache, work: Path, hands: Hands
) -> CaptureResult:
    return capture(
        tree,
        store,
        criu,
        kind=PROCESS_KIND,
        name="subject",
        key={},
        now=time.time,
        still_wanted=lambda: True,
        timeout=_CRIU_TIMEOUT,
        digests=digests,
        folders=work,
        hands=hands,
    )


def _restored(
    row: Row,
    result: CaptureResult,
    store: Store,
    criu: Criu,
    digests: DigestCache,
    work: Path,
    cold: bool,
    hands: Hands,
) -> ProcessTree:
    if cold:
        drop_page_cache()
    home = Cell.create()
    with timed(row, "restore"):
        made = restore(
            result.snapshot_id,
            store,
            criu,
            key={},
            take_home=lambda: home,
            timeout=_CRIU_TIMEOUT,
            digests=digests,
            folders=work,
            inherit=(),
            hands=hands,
        )
    row.restore_phases = made.phases.seconds()
    return made.tree


def plain(kind: str, size: int, folder: Path, criu: Criu, cold: bool, _hands: Hands) -> Row:
    row = Row(kind, str(folder), "plain", size)
    images = folder / "images"
    images.mkdir(mode=0o700)
    tree, address = start_subject(kind, size, folder)
    home = tree.home
    try:
        expected = digest_of_block(tree, address, size)
        with timed(row, "capture"):
            _criu(home, criu, ["dump", "--tree", str(tree.pid), "--leave-stopped"], images)
            sync_files(images)
        row.stored_bytes = allocated_bytes([images])
        home.close()
        if cold:
            drop_page_cache()
        home = Cell.create()
        with timed(row, "restore"):
            _criu(home, criu, ["restore", "--restore-detached", "--leave-stopped"], images)
        if digest_of_block(ProcessTree(home, tree.pid), address, size) != expected:
            raise SystemExit(f"{kind}: what CRIU gave back is not what it dumped")
    finally:
        home.close()
    return row


def _criu(home: Cell, criu: Criu, words: list[str], images: Path) -> None:
    common = ["--images-dir", ".", "--work-dir", ".", "--log-file", f"{words[0]}.log", "--manage-cgroups=ignore"]
    spawned = home.spawn([*criu.argv_prefix, *words, *common], env={"PATH": os.defpath}, cwd=str(images))
    code = home.wait(spawned.pid, _CRIU_TIMEOUT)
    if code != 0:
        raise SystemExit(f"criu {words[0]} ended with {code}: {(images / f'{words[0]}.log').read_text()[-1500:]}")


WAYS = {"ours": ours, "plain": plain}


def whom(way: str, counts: list[int]) -> list[int]:
    """With how many hands a way is tried."""
    return counts if way == "ours" else [0]


@contextlib.contextmanager
def hands_ready(count: int) -> Iterator[Hands]:
    """So many hands, as warm as a host service has them."""
    with Hands(count) as hands:
        hands.warm()
        time.sleep(_HANDS_START if count else 0)
        yield hands


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """This process's largest resident size since then."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


# The table


def run(arguments: argparse.Namespace) -> list[Row]:
    criu = find_criu(default_data_dir(os.environ))
    ends = time.monotonic() + arguments.seconds
    rows = []
    plan = itertools.product(arguments.folder, arguments.kinds.split(","), arguments.ways.split(","))
    for folder, kind, way in plan:
        for count in whom(way, arguments.hands) * arguments.runs:
            if time.monotonic() > ends:
                print(f"{kind} {folder} {way}, {count} hands: left out, the time is up")
                continue
            place = Path(tempfile.mkdtemp(prefix="dormouse-bench-", dir=folder))
            try:
                with hands_ready(count) as hands:
                    row = WAYS[way](kind, arguments.size_mb << 20, place, criu, arguments.cold, hands)
            finally:
                shutil.rmtree(place)
            row.folder = str(folder)
            rows.append(row)
            print(f"{kind} {folder} {way}, {count} hands: {row.capture_seconds:.2f} s, {row.restore_seconds:.2f} s")
    return rows


def table(rows: list[Row]) -> Table:
    shown = Table(box=box.SIMPLE)
    names = ("kind", "folder", "way", "hands", "capture", "memory", "again", "restore", "fill", "CPU s", "CPU s")
    for name in (*names, "stored", "peak"):
        shown.add_column(name, justify="left" if name in ("kind", "folder", "way") else "right")
    for row in rows:
        shown.add_row(
            *(row.kind, row.folder, row.way, str(row.hands) if row.way == "ours" else ""),
            *(f"{row.rate(row.capture_seconds):.2f} GB/s", _seconds(row.capture_phases.get("dump.memory"))),
            _seconds(row.again_seconds),
            *(f"{row.rate(row.restore_seconds):.2f} GB/s", _seconds(row.restore_phases.get("fill"))),
            *(f"{row.capture_cpu_seconds:.1f}", f"{row.restore_cpu_seconds:.1f}"),
            f"{row.stored_bytes / row.bytes:.1%}",
            f"{row.peak_rss_bytes >> 20} MiB" if row.peak_rss_bytes else "",
        )
    return shown


def _seconds(value: float | None) -> str:
    return f"{value:.2f} s" if value is not None else ""


def main() -> None:
    if sys.argv[1:2] == ["--subject"]:
        be_subject(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mb", type=int, default=2048)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--folder", type=Path, action="append")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--hands", help="numbers of helper processes, such as 0,12; left out: none and as a node has")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further step after so long")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    own = sorted({0, hands_for(len(os.sched_getaffinity(0)))})
    arguments.hands = [int(word) for word in arguments.hands.split(",")] if arguments.hands else own
    arguments.folder = arguments.folder or [Path("/dev/shm"), Path("/var/tmp")]
    keep_freed_memory()
    rows = run(arguments)
    Console(width=160).print(table(rows))
    if arguments.json:
        facts = {"host": host_facts(), "cold": arguments.cold, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
