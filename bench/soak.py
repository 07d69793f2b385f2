"""A thousand sleeps and wakes of one small worker: nothing may grow.

    python bench/soak.py [--cycles 1000] [--memory-mb 8] [--json FILE]

Each cycle restores the worker from its newest snapshot, has it answer (the text must be what it was at first), parks
it and captures it again, sharing with the snapshot it came from; then the older snapshot goes and garbage is collected,
as in the node. After each cycle, with nothing running, the service's and this process's memory, descriptors and threads
are counted, and processes, temporary folders and the store's bytes. At the end they are compared with what they were
after the first tenth; more growth than `BOUNDS` allows is a failure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from dormouse.bench_start import host_facts
from dormouse.data_dir import DataDir, default_data_dir
from dormouse.engine.messages import Delta, Load, Sampling, TextPrompt
from dormouse.errors import DormouseError
from dormouse.node.catalog import StoreCatalog
from dormouse.node.link import WorkerLink
from dormouse.snapshot.service import HostService, WorkerHandle
from measuring import allocated_bytes, status_of, tree

MODEL = "soaked"
KEY = {"bench": "soak"}
MB = 1 << 20

BOUNDS = {
    "service_bytes": 16 * MB,
    "node_bytes": 8 * MB,
    "service_descriptors": 60,  # three per connection to the index; one per thread that asks at once, at most 20 idle
    "node_descriptors": 0,
    "service_threads": 16,  # one pool thread per call, at most 16, made when a call meets none that is idle
    "node_threads": 8,
    "processes": 0,
    "temporary": 0,
    "store_bytes": 16 * MB,
}
"""How much more of each there may be at the end than after the first tenth."""

_SETTLE = 0.02
_SETTLE_TRIES = 100


@dataclass(frozen=True)
class Sample:
    """What there was after a cycle, with the worker asleep. `seconds` are the cycle's."""

    seconds: float
    service_bytes: int
    node_bytes: int
    service_descriptors: int
    node_descriptors: int
    service_threads: int
    node_threads: int
    processes: int
    temporary: int
    store_bytes: int


class Soak:
    """One worker, going to sleep and waking."""

    def __init__(self, service: HostService, home: DataDir, temporary: Path, model: Path) -> None:
        self._service = service
        self._catalog = StoreCatalog(home.store)
        self._home = home
        self._temporary = temporary
        self._model = model
        self._log = home.logs / "soak.log"
        self._pid = next(pid for pid in tree(os.getpid()) if _is_service(pid))
        self._snapshot = ""
        self._text = ""

    async def begin(self) -> None:
        """Start the worker, and put it to sleep for the first time."""
        handle = await self._service.start_worker(log_path=self._log)
        link = await self._link(handle, fresh=True)
        await link.load(Load(engine="null", path=str(self._model)))
        self._text = await _answer(link)
        await self._sleep(handle, link)

    async def cycle(self) -> None:
        """Wake, answer, sleep. Raises what went wrong."""
        handle = await self._service.restore(self._snapshot, key=KEY)
        link = await self._link(handle, fresh=False)
        await link.resume(str(self._log))
        if (text := await _answer(link)) != self._text:
            raise ValueError(f"the worker answers {text!r} instead of {self._text!r}")
        await self._sleep(handle, link)

    async def _sleep(self, handle: WorkerHandle, link: WorkerLink) -> None:
        await link.quiesce()
        captured = await self._service.capture(handle, model=MODEL, key=KEY)
        await link.close()
        await self._service.stop_worker(handle)
        self._snapshot = captured.snapshot_id
        await asyncio.to_thread(self._catalog.drop_older, MODEL, self._snapshot)

    async def _link(self, handle: WorkerHandle, *, fresh: bool) -> WorkerLink:
        return await WorkerLink.open(MODEL, handle.control, fresh=fresh, on_lost=_ignore)

    async def settled(self, processes: int | None) -> Sample:
        """A sample, once the service has made its next spare cell: until then there are fewer processes, or more."""
        for _ in range(_SETTLE_TRIES):
            sample = self._sample()
            if processes is None or sample.processes == processes:
                return sample
            await asyncio.sleep(_SETTLE)
        return sample

    def _sample(self) -> Sample:
        node = os.getpid()
        return Sample(
            seconds=0.0,
            service_bytes=_memory(self._pid),
            node_bytes=_memory(node),
            service_descriptors=_entries(Path(f"/proc/{self._pid}/fd")),
            node_descriptors=_entries(Path(f"/proc/{node}/fd")),
            service_threads=_entries(Path(f"/proc/{self._pid}/task")),
            node_threads=_entries(Path(f"/proc/{node}/task")),
            processes=len(tree(node)),
            temporary=_entries(self._temporary),
            store_bytes=allocated_bytes([self._home.store]),
        )


def _ignore(_error: DormouseError) -> None:
    """What the link tells of a worker's end; each is meant here, or ends the soak in the call that meets it."""


def _is_service(pid: int) -> bool:
    return "dormouse.snapshot.service_main" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def _memory(pid: int) -> int:
    return int(status_of(pid)["RssAnon"].split()[0]) << 10


def _entries(folder: Path) -> int:
    return sum(1 for _entry in folder.iterdir())


async def _answer(link: WorkerLink) -> str:
    events = [event async for event in link.generate(TextPrompt("a mouse"), Sampling(max_tokens=8, temperature=0.0))]
    return "".join(event.text for event in events if isinstance(event, Delta))


async def soak(home: DataDir, temporary: Path, model: Path, cycles: int, step: Callable[[int], None]) -> list[Sample]:
    """A sample for each cycle."""
    service = await HostService.start(home.root)
    try:
        worker = Soak(service, home, temporary, model)
        await worker.begin()
        at_rest = (await _at_rest(worker)).processes
        samples = []
        for number in range(cycles):
            begin = time.perf_counter()
            await worker.cycle()
            seconds = time.perf_counter() - begin
            sample = await worker.settled(at_rest)
            samples.append(Sample(**asdict(sample) | {"seconds": seconds}))
            step(number + 1)
        return samples
    finally:
        await service.close()


async def _at_rest(worker: Soak) -> Sample:
    """The first sample; the service has had time to make its spare cell."""
    await asyncio.sleep(1.0)
    return await worker.settled(None)


def failures(samples: list[Sample]) -> list[str]:
    """What has grown more than it may, in words."""
    tenth = max(1, len(samples) // 10)
    found = []
    for name, bound in BOUNDS.items():
        before = statistics.median(getattr(sample, name) for sample in samples[:tenth])
        after = statistics.median(getattr(sample, name) for sample in samples[-tenth:])
        if after - before > bound:
            found.append(f"{name} grew from {before:,.0f} to {after:,.0f}; at most {bound:,} more are allowed")
    return found


def render(samples: list[Sample]) -> Table:
    """Ten rows, each the state after another tenth; the seconds are that tenth's median."""
    table = Table(box=box.MARKDOWN)
    for column in (
        *("cycles", "s per cycle", "service MB", "node MB", "descriptors", "threads"),
        *("processes", "temporary", "store MB"),
    ):
        table.add_column(column, justify="right")
    tenth = max(1, len(samples) // 10)
    for end in range(tenth, len(samples) + 1, tenth):
        last = samples[end - 1]
        table.add_row(
            str(end),
            f"{statistics.median(sample.seconds for sample in samples[end - tenth : end]):.3f}",
            *(f"{last.service_bytes / MB:.1f}", f"{last.node_bytes / MB:.1f}"),
            f"{last.service_descriptors} + {last.node_descriptors}",
            f"{last.service_threads} + {last.node_threads}",
            *(str(last.processes), str(last.temporary), f"{last.store_bytes / MB:.1f}"),
        )
    return table


@contextmanager
def folders(memory_mb: int) -> Iterator[tuple[DataDir, Path, Path]]:
    """A scratch data folder with CRIU, a folder for all temporary files, and a null model."""
    real = DataDir(default_data_dir(os.environ)).create()
    with (
        tempfile.TemporaryDirectory(prefix="soak-", dir=real.run) as scratch,
        tempfile.TemporaryDirectory(prefix="soak-") as temporary,
    ):
        home = DataDir(Path(scratch)).create()
        if real.criu.exists():
            home.criu.symlink_to(real.criu.resolve())
        model = Path(scratch) / "null-model"
        model.mkdir()
        settings = {"model_type": "dormouse-null", "null": {"memory_mb": memory_mb}}
        (model / "config.json").write_text(json.dumps(settings))
        tempfile.tempdir = os.environ["TMPDIR"] = temporary
        try:
            yield home, Path(temporary), model
        finally:
            del os.environ["TMPDIR"]
            tempfile.tempdir = None


def main() -> int:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--memory-mb", type=int, default=8)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    errors = Console(stderr=True)

    def step(done: int) -> None:
        if done % 50 == 0 or done == arguments.cycles:
            errors.print(f"{done} of {arguments.cycles} cycles")

    with folders(arguments.memory_mb) as (home, temporary, model):
        try:
            samples = asyncio.run(soak(home, temporary, model, arguments.cycles, step))
        except DormouseError as error:
            sys.exit(str(error))
    failed = failures(samples)
    out = Console(width=140)
    out.print(render(samples))
    for line in failed or ["nothing has grown beyond its bound"]:
        out.print(line)
    if arguments.json:
        result = {
            "host": host_facts(),
            "cycles": arguments.cycles,
            "memory_mb": arguments.memory_mb,
            "bounds": BOUNDS,
            "failures": failed,
            "samples": [asdict(sample) for sample in samples],
        }
        arguments.json.write_text(json.dumps(result) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
