"""Operations as a trace that chrome://tracing and ui.perfetto.dev show: one process per operation, one row per track.

    Operation (a start or a capture with its phases) -> chrome_trace -> {"traceEvents": [...]}, JSON-ready

All operations begin at zero, so that they can be compared; when they were is in their names. Viewers want the events
of a row to lie inside or after each other. Steps of one track that overlap otherwise get rows of their own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from dormouse.phases import Phase, Phases

_RESOLUTION = 1e-9  # seconds, of the clock
_ROUNDING = 1e-9  # seconds by which an end may differ from the same instant taken as a beginning


class Operation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was done: `kind` is start or capture, `name` of the model or job, `how` the start path or the snapshot's id,
    `at` when it ended in seconds of Unix time."""

    kind: str
    name: str
    how: str
    at: float
    phases: Phases

    @property
    def seconds(self) -> float:
        """From the beginning of its first step to the end of the last."""
        steps = self.phases.steps
        return max((step.end for step in steps), default=0.0) - min((step.start for step in steps), default=0.0)

    @property
    def title(self) -> str:
        """In a line."""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.at))
        return f"{self.kind} of {self.name} ({self.how}), {self.seconds:.3f} s, {when}"

    def as_json(self) -> dict[str, Any]:
        """As plain data; steps in the order of their starts."""
        return {
            "kind": self.kind,
            "name": self.name,
            "how": self.how,
            "at": self.at,
            "seconds": self.seconds,
            "phases": steps_json(self.phases),
        }


def steps_json(phases: Phases) -> list[dict[str, Any]]:
    """Steps as plain data, in the order of their starts."""
    return [msgspec.structs.asdict(step) for step in phases.in_order()]


def chrome_trace(operations: Iterable[Operation]) -> dict[str, Any]:
    """In the Trace Event Format: complete events ("X") in microseconds, and the names of processes and threads."""
    events: list[dict[str, Any]] = []
    for pid, operation in enumerate(operations, start=1):
        events += _events(pid, operation)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _events(pid: int, operation: Operation) -> Iterator[dict[str, Any]]:
    yield _metadata("process_name", pid, 0, name=operation.title)
    yield _metadata("process_sort_index", pid, 0, sort_index=pid)
    zero = min((step.start for step in operation.phases.steps), default=0.0)
    for tid, (row, steps) in enumerate(_rows(operation.phases), start=1):
        yield _metadata("thread_name", pid, tid, name=row)
        yield _metadata("thread_sort_index", pid, tid, sort_index=tid)
        for step in steps:
            yield {
                "ph": "X",
                "name": step.name,
                "cat": operation.kind,
                "pid": pid,
                "tid": tid,
                "ts": (step.start - zero) * 1e6,
                "dur": step.seconds * 1e6,
                "args": _moved(step),
            }


def _metadata(what: str, pid: int, tid: int, **args: object) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}


def _moved(step: Phase) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, count in (("bytes", step.bytes), ("stored bytes", step.stored)):
        if count is not None:
            found[name] = count
    if (rate := gigabytes_per_second(step)) is not None:
        found["GB/s"] = round(rate, 3)
    return found


def gigabytes_per_second(step: Phase) -> float | None:
    """The rate of a step's plain bytes, else of its stored ones; None for one that moved nothing."""
    count = step.bytes if step.bytes is not None else step.stored
    return count / step.seconds / 1e9 if count and step.seconds >= _RESOLUTION else None


def _rows(phases: Phases) -> list[tuple[str, list[Phase]]]:
    """The steps by row, rows by when they begin; a track has more than one where its steps overlap."""
    rows: list[tuple[str, list[Phase], list[float]]] = []
    for step in phases.in_order():
        track = step.track or "steps"
        mine = [row for row in rows if row[0] == track]
        row = next((row for row in mine if _fits(row[2], step)), None)
        if row is None:
            row = (track, [], [])
            rows.append(row)
        row[1].append(step)
        row[2].append(step.end)
    return [(track, steps) for track, steps, _ends in rows]


def _fits(open_ends: list[float], step: Phase) -> bool:
    """Whether a step lies inside or after those that have begun in a row before it; forgets those that have ended."""
    while open_ends and open_ends[-1] <= step.start + _ROUNDING:
        open_ends.pop()
    return not open_ends or step.end <= open_ends[-1] + _ROUNDING
