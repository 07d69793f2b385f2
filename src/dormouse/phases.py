"""Seconds by phase name. Every step is timed once, where it happens; logs, metrics, headers and tables all show that
one figure."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Phases(dict[str, float]):
    """Fills itself: `with phases.time("criu"): ...`. The time of a body that raises counts too."""

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add the seconds the body takes to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self[name] = self.get(name, 0.0) + time.perf_counter() - start
