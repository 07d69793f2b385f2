"""What a run of the benchmark found: rows, limits, conditions; as JSON, as a table on the terminal and in Markdown.

`python -m dormouse.bench_load.result FILE.json` prints the Markdown of a result that was written.
"""

from __future__ import annotations

import platform
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from dormouse.bench_load.codec import CodecFigures
from dormouse.bench_load.limits import Limit

GIGA = 1e9
_SELF_EVIDENT = ("date", "cpu", "memory")
COLUMNS = ("method", "cache", "seconds", "again", "GB/s", "CPU s", "host GB", "cached")
_PACKAGES = (
    *("dormouse", "torch", "triton", "numpy", "safetensors", "fastsafetensors", "runai-model-streamer"),
    *("instanttensor", "transformers", "peft"),
)


@dataclass
class Row:
    """One method under one condition. `outcome`: ok, wrong (the tensors are not those of the files), failed, missing,
    skipped. `peak_memory` is how far the process's own memory (anonymous, shared, pinned; no file pages) grew while it
    loaded; `resident_growth` counts file pages that it had mapped too.
    `again_seconds`: the same load once more in the same process, with what it keeps, such as pinned memory."""

    method: str
    condition: str
    how: str
    ours: bool = False
    outcome: str = "skipped"
    note: str = ""
    version: str = ""
    seconds: float | None = None
    plain_bytes: int = 0
    bytes_per_second: float | None = None
    again_seconds: float | None = None
    cpu_seconds: float | None = None
    peak_memory: int | None = None
    resident_growth: int | None = None
    device_bytes: int | None = None
    resident_before: float | None = None
    all_seconds: list[float] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str]:
        """What names it."""
        return self.method, self.condition

    def take(self, attempt: Row) -> None:
        """Another attempt at the same: the fastest counts, but for one that went wrong, which counts in any case."""
        runs = self.all_seconds + ([] if attempt.seconds is None else [attempt.seconds])
        if self._yields_to(attempt):
            self.__dict__.update(attempt.__dict__)
        self.all_seconds = runs

    def _yields_to(self, attempt: Row) -> bool:
        if self.outcome in ("failed", "wrong") or attempt.outcome in ("failed", "wrong"):
            return self.outcome not in ("failed", "wrong")
        return self.seconds is None or (attempt.seconds is not None and attempt.seconds < self.seconds)


@dataclass
class Result:
    """All of a run. `stored`: bytes on the disk of each imported checkpoint; `prepared`: seconds of what came first;
    `codec`, `lora`: what was asked for beside the rows."""

    device: str
    host: dict[str, str]
    weights: str = ""
    plain_bytes: int = 0
    files: int = 0
    tensors: int = 0
    stored: dict[str, int] = field(default_factory=dict)
    prepared: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    limits: dict[str, Limit | str] = field(default_factory=dict)
    codec: list[CodecFigures] | str = field(default_factory=list)
    lora: Result | str | None = None
    complete: bool = False

    def as_json(self) -> dict[str, Any]:
        """Everything; limits and codecs that could not be measured as the reason."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


def read_result(path: Path) -> Result:
    """What `as_json` was written of."""
    return msgspec.json.decode(path.read_bytes(), type=Result)


def host_facts() -> dict[str, str]:
    """What a figure depends on: date, machine, and the versions of what is installed."""
    info = Path("/proc/cpuinfo").read_text()
    cpu = re.search(r"^model name\s*: (.*)", info, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC",
        "cpu": f"{len(re.findall(r'^processor', info, re.MULTILINE))} cores of {cpu[1] if cpu else platform.machine()}",
        "memory": f"{int(memory[1]) * 1024 / GIGA:.0f} GB" if memory else "unknown",
        "kernel": platform.release(),
        "python": platform.python_version(),
        **_gpu_facts(),
        **{name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


def _gpu_facts() -> dict[str, str]:
    driver = Path("/proc/driver/nvidia")
    try:
        words = (driver / "version").read_text().split("\n")[0].split()
        models = [
            path.read_text().split("\n")[0].split(":", 1)[1].strip() for path in driver.glob("gpus/*/information")
        ]
    except (OSError, IndexError):
        return {}
    return {"gpu": ", ".join(models), "driver": next((word for word in words if word[0].isdigit()), "unknown")}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def line(row: Row) -> str:
    """A row as it is told while the benchmark runs."""
    figures = [f"{value} {name}" for name, value in zip(COLUMNS[2:], _cells(row)[2:], strict=True) if value]
    shown = ", ".join(figures) if row.seconds is not None else ""
    return ": ".join(part for part in (f"{row.method}, {row.condition}", shown, _remark(row)) if part)


def _remark(row: Row) -> str:
    return "" if row.outcome == "ok" else f"{row.outcome}: {row.note}"


def _cells(row: Row) -> tuple[str, ...]:
    seconds = _seconds(row.seconds) if row.outcome == "ok" else row.outcome
    return (
        row.method,
        row.condition,
        seconds,
        _seconds(row.again_seconds),
        _figure(row.bytes_per_second, "{:.2f}", GIGA),
        _figure(row.cpu_seconds, "{:.1f}"),
        _figure(row.peak_memory, "{:.2f}", GIGA),
        _figure(row.resident_before, "{:.0%}"),
    )


def _limit_cells(name: str, limit: Limit | str) -> tuple[str, ...]:
    if isinstance(limit, str):
        return (f"limit: {name}", "", "none", "", "", "", "", "")
    rate = f"{limit.bytes_per_second / GIGA:.2f}"
    return (f"limit: {name}", "", _seconds(limit.seconds), "", rate, "", "", "")


def _seconds(value: float | None) -> str:
    return _figure(value, "{:.3f}" if value is not None and value < 1 else "{:.2f}")


def _figure(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else form.format(value / unit)


def codec_line(figures: list[CodecFigures] | str) -> list[str]:
    """What there is to say of the codec, a line for each place where it was measured."""
    if isinstance(figures, str):
        return [f"codec: {figures}"]
    return [
        f"codec bf16, {each.where}: ratio {each.ratio:.3f}, encode {each.encode / GIGA:.2f} GB/s, "
        f"decode {each.decode / GIGA:.2f} GB/s{'' if each.right else ', WRONG'}"
        for each in figures
    ]


def table(result: Result) -> Group:
    """For the terminal: the rows, then what the machine itself can do, then what there is to say about them."""
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        left = column in COLUMNS[:2]
        made.add_column(column, justify="left" if left else "right", no_wrap=True)
    for cells in _all_cells(result):
        made.add_row(*(escape(cell) for cell in cells))
    adapter = [table(result.lora)] if isinstance(result.lora, Result) else []
    return Group(_title(result), made, *map(escape, remarks(result)), *adapter)


def markdown(result: Result) -> str:
    """The same for documentation."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * 2}{'---:|' * (len(COLUMNS) - 2)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in _all_cells(result)]
    adapter = ["", markdown(result.lora)] if isinstance(result.lora, Result) else []
    return "\n".join([*lines, "", *(f"* {remark}" for remark in remarks(result)), *adapter])


def remarks(result: Result) -> list[str]:
    """What each figure was made with, and why others are not there."""
    host = ", ".join(f"{name} {value}" if name not in _SELF_EVIDENT else value for name, value in result.host.items())
    ways = {row.method: row.how for row in result.rows if row.seconds is not None}
    stored = [f"{copy} {size / GIGA:.2f} GB" for copy, size in result.stored.items()]
    return [
        host,
        *([f"on the disk: plain {result.plain_bytes / GIGA:.2f} GB, {', '.join(stored)}"] if stored else []),
        *(f"{name}: {how}" for name, how in ways.items()),
        *(f"{row.method}, {row.condition}: {_remark(row)}" for row in result.rows if row.outcome != "ok"),
        *([f"LoRA: {result.lora}"] if isinstance(result.lora, str) else []),
        *codec_line(result.codec),
        *(f"limit: {name}: {limit if isinstance(limit, str) else limit.how}" for name, limit in result.limits.items()),
    ]


def _all_cells(result: Result) -> Iterable[tuple[str, ...]]:
    names = list(dict.fromkeys(row.method for row in result.rows))
    yield from (_cells(row) for row in sorted(result.rows, key=lambda row: (row.ours, names.index(row.method))))
    yield from (_limit_cells(name, limit) for name, limit in result.limits.items())


def _title(result: Result) -> str:
    size = f"{result.plain_bytes / GIGA:.2f} GB in {result.files} files ({result.weights})"
    return f"{size} to {result.device}" + ("" if result.complete else ", not complete")


if __name__ == "__main__":
    print(markdown(read_result(Path(sys.argv[1]))))
