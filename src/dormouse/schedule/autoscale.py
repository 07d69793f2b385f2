"""How many replicas a model should have, from how many requests it has at once.

(now, requests running + waiting) -> stable and panic windows -> Wanted replicas
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scaling:
    """Knative's words and defaults; `target` is the requests that a replica should have at once."""

    target: float = 1.0
    stable_window: float = 60.0
    panic_window: float = 6.0
    panic_threshold: float = 2.0
    max_up_rate: float = 1000.0
    max_down_rate: float = 2.0
    scale_to_zero_grace: float = 30.0
    min_replicas: int = 0
    max_replicas: int = 0  # 0: no limit


@dataclass(frozen=True, slots=True)
class Wanted:
    replicas: int
    panic: bool


class Autoscaler:
    """One for each model."""

    def __init__(self, scaling: Scaling) -> None:
        raise NotImplementedError

    def record(self, now: float, concurrency: float) -> None:
        """Requests running and waiting, whenever that changes (or each second)."""
        raise NotImplementedError

    def wanted(self, now: float, ready: int) -> Wanted:
        raise NotImplementedError
