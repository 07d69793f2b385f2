"""The latest starts and captures of each model with their phases, for `dormouse trace`. In memory, and bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from dormouse.errors import DormouseError
from dormouse.node.parts import Evicted
from dormouse.node.replica import Start
from dormouse.phases import Phases
from dormouse.schedule.cluster import StartPath
from dormouse.snapshot.service import CaptureResult
from dormouse.trace import Operation

KEPT = 20
"""Operations per model; those that were longest ago go first."""


class History:
    """`dormouse.node.parts.Observer`. Models are those that are served, so their number is bounded, too."""

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._of: dict[str, deque[Operation]] = {}

    def of(self, model: str) -> list[Operation]:
        """The latest of a model, or of a template by its name, oldest first."""
        return list(self._of.get(model, ()))

    def started(self, model: str, start: Start, phases: Phases) -> None:
        self._note(Operation("start", model, start.path, self._wall_clock(), phases))

    def captured(self, model: str, result: CaptureResult, phases: Phases) -> None:
        self._note(Operation("capture", model, result.snapshot_id, self._wall_clock(), phases))

    def start_failed(self, model: str, error: DormouseError) -> None:
        pass

    def foretold(self, model: str, path: StartPath, expected: float, took: float) -> None:
        pass

    def fell_back(self, model: str, path: StartPath, error: DormouseError) -> None:
        pass

    def retried(self, model: str, error: DormouseError) -> None:
        pass

    def quarantined(self, model: str, error: DormouseError) -> None:
        pass

    def capture_failed(self, model: str, error: DormouseError) -> None:
        pass

    def unprotected(self, model: str) -> None:
        pass

    def evicted(self, model: str, what: Evicted) -> None:
        pass

    def adapter_loaded(self, model: str, adapter: str, seconds: float) -> None:
        pass

    def adapter_failed(self, model: str, adapter: str, error: DormouseError) -> None:
        pass

    def _note(self, operation: Operation) -> None:
        self._of.setdefault(operation.name, deque(maxlen=KEPT)).append(operation)
