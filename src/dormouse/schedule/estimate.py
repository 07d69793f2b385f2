"""How long a start would take, from what starts have taken.

StartPlan + links as they are now -> Estimate;   Observed -> rates of links and phases of models -> the next Estimate
"""

from __future__ import annotations

from dataclasses import dataclass

from dormouse.schedule.cluster import Cluster, ModelCost, PhaseName, StartPath, StartPlan


@dataclass(frozen=True, slots=True)
class Estimate:
    """`parts` are the steps of the critical path, in order; they add up to `mean`."""

    mean: float
    p95: float
    parts: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Transferred:
    """A move that happened: `ahead` is what `Link.ahead` said of the slowest link when it began."""

    links: tuple[str, ...]
    size: int
    seconds: float
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class Observed:
    """A start that happened. `predicted` is the mean that was estimated when it was decided, for the statistics."""

    model: str
    engine: str
    node: str
    path: StartPath
    seconds: float
    transfers: tuple[Transferred, ...] = ()
    phases: tuple[tuple[PhaseName, float], ...] = ()
    predicted: float | None = None


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors |predicted - seconds| / seconds of the last starts."""

    count: int
    median: float
    p99: float


class Estimator:
    """What has been learned so far. `observe` is all that changes it."""

    def estimate(self, model: ModelCost, node: str, plan: StartPlan, view: Cluster) -> Estimate:
        raise NotImplementedError

    def observe(self, started: Observed) -> None:
        raise NotImplementedError

    def errors(self, path: StartPath | None = None) -> Errors:
        raise NotImplementedError
