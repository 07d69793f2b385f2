"""What a run leaves behind: what every request met, what the cluster spent, and the time of each GPU.

World -> Records, Counts, Spans -> report.py, plots.py
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

from dormouse.schedule.cluster import StartPath
from dormouse.sim.worker import Job


@dataclass(slots=True)
class Counts:
    """What a run adds up. Seconds of GPUs are those that a replica has them; of these, `busy` is with a request. Idle
    byte-seconds are those of replicas without any: ready ones (or made ready for nobody), in GPUs and host, and asleep.
    """

    gpu_seconds: float = 0.0
    gpu_busy_seconds: float = 0.0
    process_byte_seconds: float = 0.0
    idle_gpu_byte_seconds: float = 0.0
    idle_host_byte_seconds: float = 0.0
    asleep_byte_seconds: float = 0.0
    tier_byte_seconds: float = 0.0
    starts: dict[str, int] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    evictions: int = 0
    preemptions: int = 0
    migrations: int = 0
    prewarms: int = 0
    scaled: int = 0  # starts for a minimum or by the autoscaler
    most_replicas: int = 0  # ready or starting at once
    nodes_lost: int = 0
    placed_again: int = 0  # requests that a lost node had


PATHS: tuple[StartPath, ...] = ("hot", "sleep", "snapshot", "template", "cold")
_PATH_NUMBER = {path: number for number, path in enumerate(PATHS)}


class Records:
    """What every request met, as columns: when it came, seconds until it began (plus those it stood still later),
    seconds to its first token, seconds in all, how its replica had become ready, and its group of tenants. Of one that
    was given up, the seconds are those that it waited."""

    def __init__(self) -> None:
        self.arrived = array("d")
        self.start = array("d")
        self.first = array("d")
        self.total = array("d")
        self.path = array("b")
        self.given_up = array("b")
        self.tenant = array("i")

    def __len__(self) -> int:
        return len(self.arrived)

    def add(self, job: Job) -> None:
        arrived = job.request.arrived
        total = job.ended - arrived
        self.arrived.append(arrived)
        self.start.append(total if math.isnan(job.began) else job.began - arrived + job.lost)
        self.first.append(total if math.isnan(job.first_token) else job.first_token - arrived)
        self.total.append(total)
        self.path.append(_PATH_NUMBER[job.started_by])
        self.given_up.append(job.given_up)
        self.tenant.append(job.tenant)


@dataclass(frozen=True, slots=True)
class Span:
    """A GPU's time, for the picture."""

    node: str
    gpu: int
    model: str
    begin: float
    end: float
    what: str
