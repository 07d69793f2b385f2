"""Requests and replicas of a simulation, as plain data: what `World` keeps of each."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from dormouse.schedule.cluster import ModelCost, PhaseName, Request, Running, StartPath, State
from dormouse.schedule.estimate import Transferred
from dormouse.sim.events import Event
from dormouse.sim.links import Flow


@dataclass(eq=False, slots=True)
class Job:
    """A request under way. `started_by` is how the replica that it waited for became ready. `lost` is how long it stood
    still after it had begun (preempted or migrated)."""

    request: Request
    tokens_in: int
    tokens_out: int
    tenant: int = 0  # the number of its group
    worker: Worker | None = None
    began: float = math.nan  # for the first time
    resumed: float = math.nan  # for the last time
    tokens_done: int = 0
    stopped: float = math.nan
    lost: float = 0.0
    started_by: StartPath = "hot"
    first_token: float = math.nan
    ended: float = math.nan
    given_up: bool = False
    finish: Event | None = None
    deadline: Event | None = None


@dataclass(eq=False, slots=True)
class Worker:
    """A replica. `queue` are jobs that wait for it; `moving_to` is the worker that takes its jobs when it is ready."""

    name: str
    model: ModelCost
    node: str
    gpus: tuple[int, ...]
    path: StartPath
    state: State
    since: float
    predicted: float | None = None
    ready_at: float = 0.0
    running: dict[str, Job] = field(default_factory=dict)
    views: dict[str, Running] = field(default_factory=dict)
    queue: deque[Job] = field(default_factory=deque)
    begun: float = 0.0
    flows: dict[Flow, str] = field(default_factory=dict)  # what each of them brings
    pending: int = 0
    event: Event | None = None
    transfers: list[Transferred] = field(default_factory=list)
    phases: list[tuple[PhaseName, float]] = field(default_factory=list)
    takes_over: Worker | None = None
    moving_to: Worker | None = None
    steps: list[Event] = field(default_factory=list)
    placed_at: float = 0.0
    pinned: bool = False
    start_seconds: float = 0.0
    ready_since: float = 0.0
    then: Callable[[], None] | None = None  # once it has moved away

    @property
    def idle(self) -> bool:
        """It does nothing, nothing is to come, and it may go."""
        used = self.running or self.queue or self.takes_over or self.moving_to or self.pinned
        return not used and self.state in (State.HOT, State.SLEEPING)

    @property
    def room(self) -> int:
        """How many more requests it could run now."""
        if self.moving_to or self.state not in (State.HOT, State.BUSY):
            return 0
        return self.model.slots - len(self.running)
