"""Snapshots of processes without a GPU, side by side: plain CRIU, what people add to it, and Dormouse.

    python bench/snapshot_cpu.py [--heap-mb 4096] [--runs 3] [--only 'heap/*'] [--json FILE]

Two subjects (snapshot_subjects.py): `heap`, memory as services have it, and `model`, SmolLM2-135M loaded by
transformers with its weights in ordinary memory. The ways:

    plain          criu dump to files, criu restore from them
    lz4, zstd      plain, and the files are compressed afterwards; decompressed to files before the restore
    criu-compress  CRIU's own --compress, where the installed one knows it
    ours           dormouse, any process: compressed while it is captured, filled in beside CRIU
    ours-pipe      the same snapshot restored with every page through CRIU's pipe
    plain-huge, ours-huge   the subject asks for huge pages (madvise)
    cooperative    dormouse with a worker of its own that has the same model: weights are not in the image

Each operation is a process of its own (snapshot_operations.py). Before each capture and restore the page cache is
dropped; only the files to be compressed are in memory, as they are right after a dump. `durable` is the time until what
was written is on the disk: ours always is when it returns; for the others it is with fsync. `running` is the time until
the restored process answers; `checked` adds a checksum over all of its memory (heap) or a whole answer (model). A
process that answers anything else than before is an error and has no row. CPU seconds are those of everything that
takes part; memory is the tool's alone, without the subject's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dormouse import disk_speed
from dormouse.bench_start import host_facts
from dormouse.catalogue import human
from dormouse.checkpoint.models import open_model
from dormouse.data_dir import DataDir, default_data_dir
from dormouse.errors import DormouseError
from dormouse.snapshot.criu_setup import Criu, find_criu
from measuring import OperationFailed, run_operation

MODEL = "smollm2-135m"
SUBJECTS = ("heap", "model")
WAYS = ("plain", "lz4", "zstd", "criu-compress", "ours", "ours-pipe", "plain-huge", "ours-huge", "cooperative")
CODECS = ("lz4", "zstd")

_OPERATIONS = Path(__file__).with_name("snapshot_operations.py")
_TIMEOUT = 1800.0
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MUTABLE = (".lock", ".sqlite", ".sqlite-wal", ".sqlite-shm", ".tmp")

Facts = dict[str, Any]


@dataclass
class Row:
    """All runs of one way for one subject. A restore without a capture of its own leaves `captures` empty."""

    captures: list[Facts] = field(default_factory=list)
    restores: list[Facts] = field(default_factory=list)
    error: str | None = None

    def capture(self, name: str) -> float | None:
        """The median of a figure of the captures."""
        return _median(self.captures, name)

    def restore(self, name: str) -> float | None:
        """The median of a figure of the restores."""
        return _median(self.restores, name)


def _median(runs: list[Facts], name: str) -> float | None:
    return statistics.median(run[name] for run in runs) if runs else None


class Bench:
    """Runs the operations and keeps their rows."""

    def __init__(self, home: DataDir, scratch: Path, only: list[str], heap_mb: int, say: Callable[[str], None]) -> None:
        """Raises HostError."""
        self.rows: dict[tuple[str, str], Row] = {}
        self._home = home
        self.criu = find_criu(home.root)
        self.scratch = scratch
        self._only = only
        self._touch = (heap_mb * 5 // 2 + 512) << 20  # the subject, and its images in the page cache
        self._say = say

    def wants(self, subject: str, *ways: str) -> bool:
        """Whether any of the ways is asked for."""
        return any(fnmatch(f"{subject}/{way}", pattern) for way in ways for pattern in self._only)

    def run(self, subject: str, words: list[str]) -> None:
        """Every way once."""
        if self.wants(subject, "plain", *CODECS):
            self._plain(subject, words)
        if self.wants(subject, "criu-compress"):
            self._criu_compress(subject, words)
        if self.wants(subject, "ours", "ours-pipe"):
            self._ours(subject, "ours", words)
        if subject == "heap":
            huge = [*words, "--huge-pages", "on"]
            if self.wants(subject, "plain-huge"):
                self._plain(subject, huge, "plain-huge")
            if self.wants(subject, "ours-huge"):
                self._ours(subject, "ours-huge", huge)
        if subject == "model" and self.wants(subject, "cooperative"):
            self._cooperative()

    def _plain(self, subject: str, words: list[str], way: str = "plain", options: tuple[str, ...] = ()) -> None:
        with self._folder("images") as images, self._row(subject, way) as row:
            taken = self._operate(
                *(subject, way, "plain_capture"), words=words, images=str(images), options=list(options)
            )["capture"]
            _add(row.captures, _capture(taken))
            restored = self._operate(*(subject, way, "plain_restore"), images=str(images), snapshot=taken["snapshot"])[
                "restore"
            ]
            _add(row.restores, _restore(restored))
            for codec in CODECS if way == "plain" else ():
                if self.wants(subject, codec):
                    self._compressed(subject, codec, images, taken)

    def _compressed(self, subject: str, codec: str, images: Path, taken: Facts) -> None:
        with self._folder(codec) as packed, self._row(subject, codec) as row:
            made = self._operate(subject, codec, "compress", images=str(images), target=str(packed), codec=codec)
            _add(row.captures, _capture(_one_after_another(taken, made["capture"])))
            with self._folder("plain-again") as again:
                restored = self._operate(
                    *(subject, codec, "decompressed_restore"),
                    images=str(packed),
                    target=str(again),
                    codec=codec,
                    snapshot=taken["snapshot"],
                )["restore"]
            _add(row.restores, _restore(restored))

    def _criu_compress(self, subject: str, words: list[str]) -> None:
        if "--compress" not in _help_of(self.criu):
            self.rows[subject, "criu-compress"] = Row(error=f"not in this build ({self.criu.version_text})")
            return
        self._plain(subject, words, "criu-compress", ("--compress",))

    def _ours(self, subject: str, way: str, words: list[str]) -> None:
        with self._folder("store") as store:
            snapshot: Facts | None = None
            with self._row(subject, way) as row:
                taken = self._operate(subject, way, "our_capture", words=words, store=str(store))["capture"]
                snapshot = taken["snapshot"]
                _add(row.captures, _capture(taken))
                restored = self._operate(
                    *(subject, way, "our_restore"), store=str(store), snapshot=snapshot, fill=True
                )["restore"]
                _add(row.restores, _restore(restored))
            if snapshot is not None and way == "ours" and self.wants(subject, "ours-pipe"):
                with self._row(subject, "ours-pipe") as row:
                    restored = self._operate(
                        *(subject, "ours-pipe", "our_restore"), store=str(store), snapshot=snapshot, fill=False
                    )["restore"]
                    _add(row.restores, _restore(restored))

    def _cooperative(self) -> None:
        with self._folder("home") as folder, self._row("model", "cooperative") as row:
            _link_home(self._home.root, folder)
            steps = self._operate("model", "cooperative", "cooperative", home=str(folder), model=MODEL)
            _add(row.captures, _capture(steps["capture"]))
            _add(row.restores, _restore(steps["restore"]))

    def plain_model(self) -> Path:
        """The model as transformers loads it by itself."""
        target = self.scratch / "plain-model"
        self._operate("model", "any way", "plain_model", model=MODEL, target=str(target))
        return target

    def _operate(self, subject: str, way: str, operation: str, **arguments: Any) -> Facts:
        self._say(f"{subject}, {way}: {operation.replace('_', ' ')}")
        arguments = arguments if operation == "compress" else {"home": str(self._home.root)} | arguments
        return run_operation(_OPERATIONS, operation, arguments, touch=self._touch, timeout=_TIMEOUT)

    @contextlib.contextmanager
    def _folder(self, name: str) -> Iterator[Path]:
        folder = self.scratch / name
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    @contextlib.contextmanager
    def _row(self, subject: str, way: str) -> Iterator[Row]:
        """A row, unless an operation of it fails: then it has an error instead."""
        row = self.rows.setdefault((subject, way), Row())
        try:
            yield row
        except OperationFailed as error:
            row.error = str(error)
            self._say(f"{subject}, {way}: {error}")


def _add(runs: list[Facts], facts: Facts) -> None:
    runs.append({name: value for name, value in facts.items() if name != "snapshot"})


def _capture(facts: Facts) -> Facts:
    return facts | {"durable_seconds": facts["seconds"] + facts["sync_seconds"]}


def _restore(facts: Facts) -> Facts:
    return facts | {"checked_seconds": facts["seconds"] + facts["proof_seconds"]}


def _one_after_another(first: Facts, second: Facts) -> Facts:
    """Two steps as one; what the first wrote need not be durable."""
    sums = {name: first[name] + second[name] for name in ("seconds", "cpu_seconds")}
    peak = max(first["peak_memory_bytes"], second["peak_memory_bytes"])
    return second | sums | {"peak_memory_bytes": peak, "dump_seconds": first["seconds"]}


def _help_of(criu: Criu) -> str:
    return subprocess.run([*criu.argv_prefix, "--help"], stdout=subprocess.PIPE, text=True, check=False).stdout


def _link_home(home: Path, folder: Path) -> None:
    """A data folder with the same models and store, without a copy: what never changes is linked."""

    def link(source: str, target: str) -> None:
        (shutil.copy2 if source.endswith(_MUTABLE) else os.link)(source, target)

    for path in home.iterdir():
        if path.is_symlink() or (path.is_dir() and path.name == "criu"):
            (folder / path.name).symlink_to(path.resolve())
        elif path.is_dir() and path.name not in ("run", "logs"):
            shutil.copytree(path, folder / path.name, copy_function=link)
        elif path.is_file():
            shutil.copy2(path, folder / path.name)


@dataclass(frozen=True)
class Goal:
    """`have` is what was measured, and must be at least `want`: a factor by which ours is better."""

    text: str
    have: float
    want: float

    @property
    def met(self) -> bool:
        return self.have >= self.want


def goals(rows: dict[tuple[str, str], Row]) -> Iterator[Goal]:
    """The goals for which there are figures."""
    for subject in SUBJECTS:
        ours, plain = rows.get((subject, "ours"), Row()), rows.get((subject, "plain"), Row())
        packed = [rows.get((subject, codec), Row()) for codec in CODECS]
        durable, running = ours.capture("durable_seconds"), ours.restore("seconds")
        compared = [
            ("capture: ours / plain + fsync, both durable", plain.capture("durable_seconds"), durable, 1.0),
            ("capture: ours, durable / plain, not yet on the disk", plain.capture("seconds"), durable, 1.0),
            ("restore: ours / plain, until it runs", plain.restore("seconds"), running, 1.0),
            (
                "restore: ours / plain, until all memory is checked",
                *(plain.restore("checked_seconds"), ours.restore("checked_seconds"), 1.0),
            ),
            ("capture: ours / compressed afterwards, durable", _least(packed, "durable_seconds"), durable, 2.0),
            ("restore: ours / decompressed before", _least(packed, "seconds", restores=True), running, 2.0),
            (
                "peak disk of a capture: ours / compressed afterwards",
                *(_least(packed, "peak_disk_bytes"), ours.capture("peak_disk_bytes"), 3.0),
            ),
            (
                "peak disk of a restore: ours / decompressed before",
                *(_least(packed, "peak_disk_bytes", restores=True), ours.restore("peak_disk_bytes"), 3.0),
            ),
        ]
        if subject == "model":
            wake = rows.get(("model", "cooperative"), Row()).restore("seconds")
            compared.append(("wake: cooperative / transparent, until it runs", running, wake, 2.0))
        for text, theirs, own, want in compared:
            if theirs is not None and own:
                yield Goal(f"{subject}, {text}", theirs / own, want)


def _least(rows: list[Row], name: str, *, restores: bool = False) -> float | None:
    """The best of several ways."""
    values = [row.restore(name) if restores else row.capture(name) for row in rows]
    return min((value for value in values if value is not None), default=None)


_SECONDS: Callable[[float], str] = "{:.2f}".format
_BYTES: Callable[[float], str] = human
_CAPTURE_COLUMNS = (
    ("capture s", "seconds", _SECONDS),
    ("durable s", "durable_seconds", _SECONDS),
    ("CPU s", "cpu_seconds", _SECONDS),
    ("stored", "stored_bytes", _BYTES),
    ("peak disk", "peak_disk_bytes", _BYTES),
    ("memory", "peak_memory_bytes", _BYTES),
)
_RESTORE_COLUMNS = (
    ("running s", "seconds", _SECONDS),
    ("checked s", "checked_seconds", _SECONDS),
    ("CPU s", "cpu_seconds", _SECONDS),
    ("peak disk", "peak_disk_bytes", _BYTES),
    ("memory", "peak_memory_bytes", _BYTES),
)


def render(rows: dict[tuple[str, str], Row], title: str) -> Table:
    """One table: a line per subject and way."""
    table = Table(title=title, box=box.MARKDOWN)
    for column in ("subject", "way"):
        table.add_column(column)
    for column, _name, _shown in (*_CAPTURE_COLUMNS, *_RESTORE_COLUMNS):
        table.add_column(column, justify="right")
    for (subject, way), row in rows.items():
        figures = [(row.capture(name), shown) for _title, name, shown in _CAPTURE_COLUMNS]
        figures += [(row.restore(name), shown) for _title, name, shown in _RESTORE_COLUMNS]
        cells = ["" if value is None else shown(value) for value, shown in figures]
        if row.error is not None:
            cells = [row.error.splitlines()[0][:40], *[""] * (len(figures) - 1)]
        table.add_row(subject, way, *cells)
    return table


def as_json(bench: Bench, settings: Facts) -> Facts:
    """Medians, then every run."""
    return {
        "host": facts_of_host(bench),
        "settings": settings,
        "rows": [
            {
                "subject": subject,
                "way": way,
                "error": row.error,
                "capture": {name: row.capture(name) for _title, name, _shown in _CAPTURE_COLUMNS},
                "restore": {name: row.restore(name) for _title, name, _shown in _RESTORE_COLUMNS},
                "captures": row.captures,
                "restores": row.restores,
            }
            for (subject, way), row in bench.rows.items()
        ],
        "goals": [
            {"goal": goal.text, "factor": goal.have, "wanted": goal.want, "met": goal.met} for goal in goals(bench.rows)
        ],
    }


def facts_of_host(bench: Bench) -> Facts:
    """What the figures depend on."""
    return {
        **host_facts(),
        "criu": bench.criu.version_text,
        "disk_read_bytes_per_second": disk_speed.measure(bench.scratch).bytes_per_second,
        "transparent_huge_pages": _HUGE_PAGES.read_text().strip() if _HUGE_PAGES.exists() else "none",
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heap-mb", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", action="append", metavar="SUBJECT/WAY", help="a pattern such as 'heap/*'; repeatable")
    parser.add_argument("--quick", action="store_true", help="256 MB, one run")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.heap_mb, arguments.runs = 256, 1
    return arguments


def main() -> int:
    """Measure, print, write."""
    arguments = parse()
    errors = Console(stderr=True)
    home = DataDir(default_data_dir(os.environ)).create()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=home.run) as folder:
        try:
            bench = Bench(home, Path(folder), arguments.only or ["*"], arguments.heap_mb, errors.print)
            if shutil.disk_usage(folder).free < 4 * arguments.heap_mb << 20:
                sys.exit(f"the disk below {home.run} needs room for four times the heap")
            words = {"heap": ["heap", "--mb", str(arguments.heap_mb)]}
            if bench.wants("model", *WAYS):
                open_model(home.models, MODEL)
                words["model"] = ["transformers", "--path", str(bench.plain_model())]
        except (DormouseError, OperationFailed) as error:
            sys.exit(str(error))
        for number in range(arguments.runs):
            errors.print(f"run {number + 1} of {arguments.runs}")
            for subject, command in words.items():
                bench.run(subject, command)
            if arguments.json:  # after each run: a long measurement that is ended early is not lost
                result = as_json(bench, {"heap_mb": arguments.heap_mb, "runs": number + 1, "model": MODEL})
                arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    out = Console(width=200)
    out.print(render(bench.rows, f"median of {arguments.runs}, heap of {arguments.heap_mb} MiB, page cache dropped"))
    for goal in goals(bench.rows):
        out.print(f"{'met   ' if goal.met else 'MISSED'} {goal.have:5.2f}x of {goal.want:.0f}x  {goal.text}")
    failed = [row for (_subject, way), row in bench.rows.items() if row.error is not None and way != "criu-compress"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
