"""Where a request should run: the way to its first token that takes least, within memory.

Request + Cluster + Estimator -> Decision: the option taken, those that were not, and why
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dormouse.schedule.cluster import Cluster, Request, StartPath
from dormouse.schedule.estimate import Estimate, Estimator

Action = Literal["queue", "start", "wait"]


@dataclass(frozen=True, slots=True)
class Migration:
    """A running request goes to `to` (another node's GPUs) so that its place is free after `seconds`."""

    request: str
    replica: str
    to: str
    gpus: tuple[int, ...]
    path: StartPath
    seconds: float
    reuse: str | None = None  # a replica of the same model over there that takes it


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that could be done. `seconds` is the estimated time from now to the first token; `penalty` what the
    evicted and migrated ones pay for it, in seconds; the least `score` wins."""

    action: Action
    path: StartPath
    node: str
    gpus: tuple[int, ...]
    replica: str | None  # the one that takes it (queue), or that is woken (start by `sleep`)
    seconds: float
    penalty: float
    estimate: Estimate
    evict: tuple[str, ...] = ()
    migrate: tuple[Migration, ...] = ()

    @property
    def score(self) -> float:
        return self.seconds + self.penalty


@dataclass(frozen=True, slots=True)
class Decision:
    """`chosen` is None when nothing fits now: the request waits, and `blocked` says for what."""

    request: Request
    chosen: Option | None
    alternatives: tuple[Option, ...]
    blocked: str = ""

    def why(self) -> str:
        """The decision with its alternatives and their numbers, for people."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Weights:
    """How much things count."""

    eviction: float = 0.1  # seconds for each second that the evicted one's return would take, times how likely it is
    candidates: int = 12  # nodes looked at for each kind of start


def place(
    request: Request, view: Cluster, estimator: Estimator, now: float, weights: Weights | None = None
) -> Decision:
    """The best of: a ready replica (perhaps behind others), a start on free memory, on evicted, on migrated ones."""
    raise NotImplementedError
