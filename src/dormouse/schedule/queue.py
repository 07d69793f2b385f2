"""Which of the requests that wait is placed next: by arrival within a model, by age and priority across them.

    push -> heap of each model -> dispatch: the heads in order -> place -> commit (start, queue, migrate) or a claim

The order is `arrived - priority * step`: a higher priority is worth a head start of some seconds and no more, so
whoever waits long enough is first. A tenant at its cap is passed over, not waited for.

Nobody starves: a request for which waiting for a place is best *claims* it (Cluster.claim): nothing else starts there
or queues there, so it drains. One without a place for longer than `patience` looks at more nodes, and until it has a
claim nobody after it may claim anything, so that the claims in its way come to an end.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from dormouse.errors import ConfigError
from dormouse.schedule.cluster import Claim, Cluster, Request
from dormouse.schedule.estimate import Estimator
from dormouse.schedule.place import Decision, Option, Weights, place
from dormouse.schedule.room import Worth

_Entry = tuple[float, str]  # (place in the order, name)
_WIDE = 64  # nodes looked at for one that is out of patience


@dataclass(frozen=True, slots=True)
class Fairness:
    """The rules among those that wait."""

    priority_seconds: float = 10.0  # the head start that one step of priority is worth
    patience: float = 20.0
    tenant_caps: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))  # requests running at once
    blocked_models: int = 16  # a dispatch gives up after so many models that can't be placed


@dataclass(slots=True)
class _Pass:
    """What one dispatch knows."""

    view: Cluster
    estimator: Estimator
    now: float
    commit: Callable[[Decision], None]
    worth: Worth | None
    may_claim: bool = True
    placed: int = 0
    blocked: int = 0


class Queue:
    """The requests that wait. The caller bounds how many it pushes.

    A request leaves by `dispatch` (its decision goes to `commit`, which must bring the view up to date before it
    returns) or by `remove`. After it has run, `finished` gives its tenant's place back; if its node was lost,
    `finished` and `push` again, with the arrival it had.
    """

    def __init__(self, fairness: Fairness | None = None, weights: Weights | None = None) -> None:
        self._rules = fairness or Fairness()
        self._weights = weights or Weights()
        self._settled = replace(self._weights, migrate_above=float("inf"))
        self._wide = replace(self._weights, candidates=_WIDE)
        self._requests: dict[str, Request] = {}
        self._models: dict[str, list[_Entry]] = {}
        self._parked: dict[str, list[_Entry]] = {}
        self._running: dict[str, int] = {}
        self._blocked: dict[str, tuple[int, bool]] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, name: str) -> bool:
        return name in self._requests

    def waiting(self, model: str) -> int:
        """How many wait for a model, those of tenants at their cap not counted."""
        return sum(name in self._requests for _order, name in self._models.get(model, ()))

    def push(self, request: Request) -> None:
        """It waits from now on."""
        if request.name in self._requests:
            raise ConfigError(f"request {request.name} waits already", remedy="Give each request a name of its own")
        self._requests[request.name] = request
        self._line_up(request)

    def remove(self, name: str, view: Cluster) -> bool:
        """It has been given up, or has timed out; False when it did not wait."""
        view.release(name)
        self._blocked.pop(name, None)
        return self._requests.pop(name, None) is not None

    def finished(self, request: Request) -> None:
        """A request that was placed has ended: its tenant may have another one."""
        self._running[request.tenant] = self._running.get(request.tenant, 0) - 1
        parked = self._parked.get(request.tenant, [])
        while parked:
            _order, name = heapq.heappop(parked)
            if name in self._requests:
                self._line_up(self._requests[name])
                return

    def dispatch(
        self,
        view: Cluster,
        estimator: Estimator,
        now: float,
        commit: Callable[[Decision], None],
        worth: Worth | None = None,
    ) -> int:
        """Decide for all that can be placed now, in order; how many were. `commit` gets decisions to start or to queue,
        and those to wait that need a migration: that must be begun. For all else that waits nothing is to be done."""
        state = _Pass(view, estimator, now, commit, worth)
        heads = [(*entry, model) for model in list(self._models) if (entry := self._head(model))]
        heapq.heapify(heads)
        while heads and state.blocked < self._rules.blocked_models:
            _order, name, model = heapq.heappop(heads)
            if not self._serve(self._requests[name], state):
                state.blocked += 1
                continue
            following = self._head(model)
            if following:
                heapq.heappush(heads, (*following, model))
        return state.placed

    # --- order

    def _order(self, request: Request) -> float:
        return request.arrived - request.priority * self._rules.priority_seconds

    def _line_up(self, request: Request) -> None:
        heapq.heappush(self._models.setdefault(request.model, []), (self._order(request), request.name))

    def _head(self, model: str) -> _Entry | None:
        """The first of a model's line that may run; those that are gone drop out, those at their cap are parked."""
        line = self._models.get(model, [])
        while line:
            request = self._requests.get(line[0][1])
            if request is None:
                heapq.heappop(line)
            elif self._capped(request.tenant):
                heapq.heappush(self._parked.setdefault(request.tenant, []), heapq.heappop(line))
            else:
                return line[0]
        self._models.pop(model, None)
        return None

    def _capped(self, tenant: str) -> bool:
        cap = self._rules.tenant_caps.get(tenant)
        return cap is not None and self._running.get(tenant, 0) >= cap

    # --- one request

    def _serve(self, request: Request, state: _Pass) -> bool:
        """Place it; False when it must wait. True also for one whose tenant has reached its cap meanwhile."""
        if self._capped(request.tenant):
            return True
        claimed = state.view.claim_of(request.name) is not None
        impatient = state.now - self._order(request) > self._rules.patience
        moment = (state.view.changes, impatient)
        if self._blocked.get(request.name) == moment:
            return False
        decision = place(
            request, state.view, state.estimator, state.now, self._settled if claimed else self._weights, state.worth
        )
        if impatient and decision.chosen is None:
            decision = place(request, state.view, state.estimator, state.now, self._wide, state.worth)
        if decision.chosen is None or decision.chosen.action == "wait":
            self._wait(decision, state, claimed, impatient)
            self._blocked[request.name] = moment
            return False
        self._blocked.pop(request.name, None)
        del self._requests[request.name]
        self._running[request.tenant] = self._running.get(request.tenant, 0) + 1
        state.view.release(request.name)
        state.commit(decision)
        state.placed += 1
        return True

    def _wait(self, decision: Decision, state: _Pass, claimed: bool, impatient: bool) -> None:
        if claimed:
            return
        claim = _claim(decision.request.name, decision.chosen) if decision.chosen else None
        free = claim is not None and state.view.claimable(claim.node, claim.gpus, whole=claim.whole)
        if claim is not None and free and state.may_claim:
            state.view.claim(claim)
            if decision.chosen and decision.chosen.migrate:
                state.commit(decision)
        elif impatient:
            state.may_claim = False


def _claim(request: str, option: Option) -> Claim:
    return Claim(request, option.node, frozenset(option.gpus), whole=option.host_short or not option.gpus)
