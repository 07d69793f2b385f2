"""How many replicas a model should have, from how many requests it has at once.

    (now, requests running + waiting) -> stable and panic windows -> Wanted replicas

The rules are those of Knative's autoscaler (knative.dev, "Autoscaling concepts" and the KPA's configuration): the mean
concurrency over a stable window decides; when that over a much shorter panic window asks for `panic_threshold` times
the replicas that are ready, the larger of both counts, and nothing goes down until the panic has been over for a
stable window. To zero goes only what had no request for a stable window, and the last replica stays for a grace period
more. Unlike there, means are over time, exactly, not over samples each second; and a burst is followed at once
(`burst`: a snapshot restores N replicas as fast as one).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from dormouse.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Scaling:
    """Knative's words and defaults; `target` is the requests that a replica should have at once."""

    target: float = 1.0
    utilization: float = 0.7  # of the target that is aimed at, so that there is room for the next
    stable_window: float = 60.0
    panic_window: float = 6.0
    panic_threshold: float = 2.0
    max_up_rate: float = 1000.0
    max_down_rate: float = 2.0
    scale_to_zero_grace: float = 30.0
    min_replicas: int = 0
    max_replicas: int = 0  # 0: no limit
    burst: bool = True  # what is waiting now counts at once, not when the windows have seen it

    def __post_init__(self) -> None:
        if self.max_replicas and self.max_replicas < self.min_replicas:
            raise ConfigError(
                f"max_replicas ({self.max_replicas}) is less than min_replicas ({self.min_replicas})",
                remedy="Raise max_replicas, or set it to 0 for no limit",
            )
        if not (0 < self.panic_window <= self.stable_window and self.target > 0 and 0 < self.utilization <= 1):
            raise ConfigError(
                "the autoscaler's windows or target contradict each other",
                remedy="Have 0 < panic_window <= stable_window, target > 0 and 0 < utilization <= 1",
            )
        if self.panic_threshold <= 1.0 or self.max_up_rate <= 1.0 or self.max_down_rate <= 1.0:
            raise ConfigError("panic_threshold, max_up_rate and max_down_rate must be more than 1")


@dataclass(frozen=True, slots=True)
class Wanted:
    """So many replicas should there be."""

    replicas: int
    panic: bool
    stable: float  # mean requests at once, over each window
    recent: float


class _Level:
    """A number that changes at times, and its mean over the last `window` seconds. Each change is added and taken off
    once, so a look costs the same however many there were."""

    def __init__(self, window: float) -> None:
        self._window = window
        self._changes: deque[tuple[float, float]] = deque([(-math.inf, 0.0)])  # (since, level)
        self._area = 0.0  # of all but the last, from the second on

    @property
    def now(self) -> float:
        return self._changes[-1][1]

    def set(self, now: float, level: float) -> None:
        self._forget(now)
        since, before = self._changes[-1]
        if since == now:
            self._changes[-1] = (now, level)
            return
        if len(self._changes) > 1:
            self._area += before * (now - since)
        self._changes.append((now, level))

    def mean(self, now: float) -> float:
        self._forget(now)
        since, level = self._changes[-1]
        begin = now - self._window
        if since <= begin:
            return level
        head = self._changes[0][1] * (self._changes[1][0] - begin)
        return max(head + self._area + level * (now - since), 0.0) / self._window

    def _forget(self, now: float) -> None:
        """Drop what ended before the window; the first that is left began before it."""
        changes = self._changes
        while len(changes) > 1 and changes[1][0] <= now - self._window:
            changes.popleft()
            if len(changes) > 1:
                since, level = changes[0]
                self._area -= level * (changes[1][0] - since)
            else:
                self._area = 0.0


class Autoscaler:
    """One for each model. Pure but for what it was told: `record` on every change of the requests running or waiting,
    `wanted` whenever an answer is needed, with times that do not go back."""

    def __init__(self, scaling: Scaling) -> None:
        self._rules = scaling
        self._stable = _Level(scaling.stable_window)
        self._recent = _Level(scaling.panic_window)
        self._panic_until: float | None = None
        self._panic_most = 0
        self._quiet_since: float | None = None

    def record(self, now: float, concurrency: float) -> None:
        """So many requests run or wait from now on."""
        self._stable.set(now, concurrency)
        self._recent.set(now, concurrency)
        if concurrency > 0:
            self._quiet_since = None
        elif self._quiet_since is None:
            self._quiet_since = now

    def wanted(self, now: float, ready: int) -> Wanted:
        """`ready` are the replicas that there are, starting ones too."""
        rules = self._rules
        stable = self._stable.mean(now)
        recent = self._recent.mean(now)
        if rules.burst:
            recent = max(recent, self._stable.now)
        by_stable, by_recent = self._replicas(stable), self._replicas(recent)
        panic = self._panics(now, by_recent, ready)
        replicas = by_stable
        if panic:
            self._panic_most = max(self._panic_most, by_stable, by_recent, ready)
            replicas = self._panic_most
        else:
            self._panic_most = 0
            replicas = max(replicas, self._replicas(self._stable.now) if rules.burst else 0)
        return Wanted(self._bounded(replicas, now, ready), panic, stable, recent)

    def _replicas(self, concurrency: float) -> int:
        return math.ceil(concurrency / (self._rules.target * self._rules.utilization) - 1e-9)

    def _panics(self, now: float, by_recent: int, ready: int) -> bool:
        if by_recent >= self._rules.panic_threshold * max(ready, 1):
            self._panic_until = now + self._rules.stable_window
        return self._panic_until is not None and now < self._panic_until

    def _bounded(self, replicas: int, now: float, ready: int) -> int:
        rules = self._rules
        most = math.ceil(max(ready, 1) * rules.max_up_rate)
        least = math.floor(ready / rules.max_down_rate) if ready > 1 else 0
        replicas = min(max(replicas, least), most)
        if replicas == 0 and ready > 0 and not self._may_end_last(now):
            replicas = 1
        replicas = max(replicas, rules.min_replicas)
        return min(replicas, rules.max_replicas) if rules.max_replicas else replicas

    def _may_end_last(self, now: float) -> bool:
        """Quiet for a stable window, and the grace period."""
        quiet = 0.0 if self._quiet_since is None else now - self._quiet_since
        return quiet >= self._rules.stable_window + self._rules.scale_to_zero_grace
