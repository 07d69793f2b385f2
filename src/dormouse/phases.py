"""What an operation took, step by step: when each began, how long it took, how many bytes it moved.

    with phases.time("fill", track="fill") as moved: ...    moved.bytes = n     (where the step happens)
    phases.nest("host", reply.phases, track="host")                             (where several processes' steps meet)

Every step is timed once, where it happens; logs, metrics, tables and traces (trace.py) all show that one figure. A
`Phases` travels as it is in msgspec messages and manifests.

Steps of several processes fall on one axis because all read one clock, the machine's own CLOCK_MONOTONIC. CRIU restores
a process into a time namespace in which its clock goes on from where it stopped, so `host_clock` takes that shift out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

_OFFSETS = Path("/proc/self/timens_offsets")


def host_clock() -> float:
    """Seconds of the machine's monotonic clock: the same in all of its processes, restored ones too."""
    return time.monotonic() - _clock_shift()


def _clock_shift() -> float:
    """By how much this process's clock is ahead of the machine's. Read each time: a restore changes it."""
    try:
        lines = _OFFSETS.read_text().splitlines()
    except FileNotFoundError:
        return 0.0  # a kernel without time namespaces has one clock
    for line in lines:
        clock, seconds, nanoseconds = line.split()
        if clock == "monotonic":
            return int(seconds) + int(nanoseconds) / 1e9
    return 0.0


class Phase(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One step. `start` is in seconds since the operation's, `bytes` are plain, `stored` as they were read or written.
    Steps of one `track` come after or inside each other; those of different tracks may overlap."""

    name: str
    start: float
    seconds: float
    bytes: int | None = None
    stored: int | None = None
    track: str = ""

    @property
    def end(self) -> float:
        """When it ended, in seconds since the operation's start."""
        return self.start + self.seconds


@dataclass
class Moved:
    """What a step that runs has moved so far; the step may set it when it knows."""

    bytes: int | None = None
    stored: int | None = None


class Phases(msgspec.Struct, forbid_unknown_fields=True):
    """The steps of one operation that began at `origin` on the host's clock. Any thread may add to it."""

    origin: float = msgspec.field(default_factory=host_clock)
    steps: list[Phase] = msgspec.field(default_factory=list)

    @contextmanager
    def time(
        self, name: str, *, track: str = "", bytes: int | None = None, stored: int | None = None
    ) -> Iterator[Moved]:
        """Time the body; one that raises counts too."""
        begin = host_clock()
        moved = Moved(bytes, stored)
        try:
            yield moved
        finally:
            self.add(name, begin, host_clock(), track=track, bytes=moved.bytes, stored=moved.stored)

    def add(
        self,
        name: str,
        begin: float,
        end: float,
        *,
        track: str = "",
        bytes: int | None = None,
        stored: int | None = None,
    ) -> None:
        """A step that has been timed elsewhere, by `host_clock`."""
        self.steps.append(Phase(name, begin - self.origin, max(0.0, end - begin), bytes, stored, track))

    def nest(self, name: str, inner: Phases, *, track: str) -> None:
        """The steps of a part of this operation, named after it; those without a track of their own go to `track`."""
        shift = inner.origin - self.origin
        for step in inner.steps:
            self.steps.append(
                msgspec.structs.replace(
                    step, name=f"{name}.{step.name}", start=step.start + shift, track=step.track or track
                )
            )

    def extend(self, others: Phases) -> None:
        """Further steps of the same operation, under their own names."""
        shift = others.origin - self.origin
        self.steps += (msgspec.structs.replace(step, start=step.start + shift) for step in others.steps)

    def copy(self) -> Self:
        """As it is now."""
        return type(self)(self.origin, list(self.steps))

    def in_order(self) -> list[Phase]:
        """By start; of those that start together the longest first, so that what is inside another comes after it."""
        return sorted(self.steps, key=lambda step: (step.start, -step.seconds))

    def seconds(self) -> dict[str, float]:
        """Seconds by name, in the order of their starts; steps of one name are added up."""
        found: dict[str, float] = {}
        for step in self.in_order():
            found[step.name] = found.get(step.name, 0.0) + step.seconds
        return found

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.seconds().items())
