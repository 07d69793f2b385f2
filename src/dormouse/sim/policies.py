"""Makes schedule's policies from what a scenario names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dormouse.schedule.estimate import Estimator
from dormouse.schedule.keepalive import Expected, FixedTtl, GreedyDual, Histogram, Layered, Lru, Oracle, Policy
from dormouse.sim.scenario import KeepAliveRule


def keep_alive_policy(
    rule: KeepAliveRule, estimator: Estimator, future: Mapping[str, Sequence[float]]
) -> Policy | None:
    """None for `load`, which is the simulator's own. `future` are the times of requests by model, for the oracle."""
    match rule.policy:
        case "load":
            return None
        case "fixed":
            return FixedTtl(rule.seconds)
        case "lru":
            return Lru()
        case "greedy-dual":
            return GreedyDual(estimator)
        case "histogram":
            return Histogram()
        case "layered":
            return Layered(estimator)
        case "expected":
            return Expected(estimator)
        case "oracle":
            return Oracle(future, estimator)
