"""How long an idle replica keeps what it has, what is made ready before anybody asks, and who goes for others.

requests and idle replicas -> Policy -> Steps (when to go down to what), pre-warms, victims
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from dormouse.schedule.cluster import Cluster, Replica

Layer = Literal["hot", "sleep", "snapshot", "nothing"]


@dataclass(frozen=True, slots=True)
class Step:
    """At `at` (absolute), an idle replica goes down to `to`. "snapshot" ends the process and keeps its image near
    (DRAM or disk); "nothing" lets the image and weights go from the node's DRAM tier too."""

    to: Layer
    at: float


Steps = tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Need:
    """Memory that something needs on a node: bytes of each of these GPUs, and of the host."""

    node: str
    gpus: tuple[int, ...]
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True)
class Warm:
    """Have a replica of `model` in `layer` at `at`, and keep it till `until` if nobody asks."""

    model: str
    at: float
    until: float
    layer: Layer = "hot"


class Policy(Protocol):
    """Times are absolute. The caller tells of every request and of every replica that has become idle; steps of a
    replica that gets a request are void. `victims` never names a replica that is not idle."""

    def on_request(self, model: str, now: float) -> None: ...

    def on_idle(self, replica: Replica, view: Cluster, now: float) -> Steps: ...

    def prewarm(self, now: float) -> list[Warm]: ...

    def victims(self, need: Need, view: Cluster, now: float) -> tuple[str, ...] | None:
        """Replicas to end so that `need` fits; () when it fits already, None when it can't be."""
        ...
