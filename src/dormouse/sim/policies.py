"""Makes schedule's policies from what a scenario names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dormouse.schedule.cluster import Cluster
from dormouse.schedule.keepalive import Policy
from dormouse.schedule.queue import Queue
from dormouse.sim.scenario import KeepAliveRule


def keep_alive_policy(
    rule: KeepAliveRule, view: Cluster, future: Mapping[str, Sequence[float]] | None
) -> Policy | None:
    """None for the rules that the simulator has itself. `future` are the times of requests by model."""
    if rule.policy in ("fixed", "load"):
        return None
    raise NotImplementedError(rule.policy)


def request_queue() -> Queue:
    """With the defaults that the node uses."""
    return Queue()
