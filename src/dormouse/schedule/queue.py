"""Which of the requests that wait is placed next: by arrival within a model, by age and priority across them.

The order is `arrived - priority * step`: a higher priority is worth a head start of some seconds and no more, so
whoever waits long enough is first. A tenant at its cap is passed over, not waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dormouse.schedule.cluster import Cluster, Request
from dormouse.schedule.estimate import Estimator
from dormouse.schedule.place import Decision


@dataclass(frozen=True, slots=True)
class Fairness:
    priority_seconds: float = 10.0  # the head start that one step of priority is worth
    patience: float = 20.0  # after this long without a place, a request claims one: newer ones may not take it
    tenant_caps: Mapping[str, int] | None = None  # requests that a tenant may have running


class Queue:
    """The requests that wait. `dispatch` decides for as many as it can, in order, and calls `commit` with each decision
    that has something chosen; commit applies it to the view before the next request is looked at."""

    def push(self, request: Request) -> None:
        raise NotImplementedError

    def remove(self, name: str) -> bool:
        """It has been given up or has timed out."""
        raise NotImplementedError

    def finished(self, request: Request) -> None:
        """A request that ran has ended: its tenant may have another one."""
        raise NotImplementedError

    def dispatch(
        self, view: Cluster, estimator: Estimator, now: float, commit: Callable[[Decision], None], limit: int = 64
    ) -> int:
        raise NotImplementedError
