"""Makes schedule's policies from what a scenario names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dormouse.schedule.estimate import Estimator
from dormouse.schedule.keepalive import Expected, FixedTtl, GreedyDual, Histogram, Layered, Lru, Oracle, Policy
from dormouse.sim.scenario import KeepAliveRule


def keep_alive_policy(
    rule: KeepAliveRule, estimator: Estimator, future: Mapping[str, Sequence[float]]
) -> Policy | None:
    """None for `load`, which is the simulator's own. `future` are the times of requests by model, for the oracle."""
    made: dict[str, Callable[[], Policy]] = {
        "fixed": lambda: FixedTtl(rule.seconds, reluctance=rule.reluctance),
        "lru": lambda: Lru(rule.reluctance),
        "greedy-dual": lambda: GreedyDual(estimator, rule.reluctance),
        "histogram": lambda: Histogram(reluctance=rule.reluctance),
        "layered": lambda: Layered(estimator),
        "expected": lambda: Expected(estimator, balance=rule.balance),
        "oracle": lambda: Oracle(future, estimator),
    }
    return None if rule.policy == "load" else made[rule.policy]()
