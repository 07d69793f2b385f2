"""Which of the requests that wait is placed next: by arrival within a model, by age and priority across them.

    push -> line of each model -> dispatch: the heads in order -> place -> commit (start, queue, migrate) or a claim

The order is `arrived - priority * step`: a higher priority is worth a head start of some seconds and no more, so
whoever waits long enough is first. A tenant at its cap is passed over, not waited for.

A request is bound to a replica only when that has room for it at once, or is started for it. Until then it stays in its
line, so that whichever slot is free first takes the one that came first. Those behind the head of a line do not wait
with it when a start of their own is quicker than their turn: the line gets as many replicas as that is so for.

Nobody starves: a request for which waiting for a place is best *claims* it (Cluster.claim): nothing else starts there
or queues there, so it drains. One without a place for longer than `patience` looks at more nodes, and until it has a
claim nobody after it may claim anything, so that the claims in its way come to an end.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from dormouse.errors import ConfigError
from dormouse.schedule.cluster import Claim, Cluster, Request
from dormouse.schedule.estimate import Estimator
from dormouse.schedule.place import Decision, Line, Option, Weights, place
from dormouse.schedule.room import Worth

_Entry = tuple[float, str]  # (place in the order, name)
_LOOK_AGAIN = 0.25
_WIDE = 64  # nodes looked at for one that is out of patience


@dataclass(frozen=True, slots=True)
class Fairness:
    """The rules among those that wait."""

    priority_seconds: float = 10.0  # the head start that one step of priority is worth
    patience: float = 20.0
    tenant_caps: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))  # requests running at once
    blocked_models: int = 16  # a dispatch looks again at so many models that can't be placed


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


@dataclass(frozen=True, slots=True)
class _Wait:
    """What was found when a request was looked at last and had to wait: a slot of `replica`, or a place of its own, at
    `place_at`. It holds until there has been a `change` that may matter (all, or those of its own model), or until
    `again`."""

    change: int
    own_change: int
    again: float
    order: float
    replica: str | None = None
    place_at: float | None = None
    ahead: int = 0

    def holds(self, model: str, view: Cluster, now: float) -> bool:
        if self.replica is None:
            return self.change == view.changes and now < self.again
        return now < self.again and self.own_change == view.changes_of(model)


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
        self._lines: dict[str, list[_Entry]] = {}
        self._parked: dict[str, list[_Entry]] = {}
        self._running: dict[str, int] = {}
        self._waits: dict[str, _Wait] = {}
        self._behind: dict[str, _Wait] = {}  # of the last one in the line of a model

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, name: str) -> bool:
        return name in self._requests

    def waiting(self, model: str) -> int:
        """How many wait for a model, those of tenants at their cap not counted."""
        return len(self._lines.get(model, ()))

    def push(self, request: Request) -> None:
        """It waits from now on."""
        if request.name in self._requests:
            raise ConfigError(f"request {request.name} waits already", remedy="Give each request a name of its own")
        self._requests[request.name] = request
        self._line_up(request)

    def head(self, model: str) -> Request | None:
        """The first of a model's line that may run."""
        entry = self._head(model)
        return self._requests[entry[1]] if entry else None

    def take(self, request: Request) -> None:
        """A free slot is a head's, without a look at the cluster: it is placed."""
        self._leave(request)
        self._running[request.tenant] = self._running.get(request.tenant, 0) + 1

    def remove(self, name: str, view: Cluster | None = None) -> bool:
        """It has been given up, or has timed out; False when it did not wait. `view`: where it may have a claim."""
        if view is not None:
            view.release(name)
        request = self._requests.get(name)
        if request is None:
            return False
        self._leave(request)
        self._unpark(request.tenant)  # it may have had the turn that has come
        return True

    def finished(self, request: Request) -> None:
        """A request that was placed has ended: its tenant may have another one."""
        self._running[request.tenant] = self._running.get(request.tenant, 0) - 1
        self._unpark(request.tenant)

    def look_anew(self) -> None:
        """The next dispatch gets another view: what was found in the last one holds no more."""
        self._waits.clear()
        self._behind.clear()

    def dispatch(
        self,
        view: Cluster,
        estimator: Estimator,
        now: float,
        commit: Callable[[Decision], None],
        worth: Worth | None = None,
        only: str | None = None,
    ) -> int:
        """Decide for all that can be placed now (of one model only), in order; how many were. `commit` gets decisions
        to start or to queue, and those to wait that need a migration: that must be begun. For all else that waits
        nothing is to be done."""
        state = _Pass(view, estimator, now, commit, worth)
        self._pass_claims_on(view)
        lines = [only] if only else list(self._lines)
        heads = [(*entry, model) for model in lines if (entry := self._head(model))]
        heapq.heapify(heads)
        while heads:
            _order, name, model = heapq.heappop(heads)
            if self._is_settled(name, model, state):
                continue
            if not self._serve(self._requests[name], state):
                state.blocked += 1
                self._serve_behind(model, state)
                continue
            following = self._head(model)
            if following:
                heapq.heappush(heads, (*following, model))
        return state.placed

    def _is_settled(self, name: str, model: str, state: _Pass) -> bool:
        """Whether a head is not to be looked at again: what was found holds, for those behind it as well, or enough
        others have been looked at in vain, and nothing of its model is free."""
        wait = self._waits.get(name)
        if wait is None:
            return False
        if state.blocked >= self._rules.blocked_models and not state.view.takes_now(model):
            return True
        if not wait.holds(model, state.view, state.now):
            return False
        behind = self._behind.get(model)
        grown = len(self._lines[model]) - 1 > (behind.ahead if behind else 0)
        return not grown and (behind is None or behind.holds(model, state.view, state.now))

    def _pass_claims_on(self, view: Cluster) -> None:
        """A place that is kept is the head's, whoever of its line has claimed it: else one of higher priority, or one
        whose tenant may run, would wait for a place that is kept for one behind it."""
        for claim in list(view.claims):
            request = self._requests.get(claim.request)
            head = self._head(request.model) if request else None
            if head is None or head[1] != claim.request:
                view.release(claim.request)
                if head is not None and view.claim_of(head[1]) is None:
                    view.claim(replace(claim, request=head[1]))

    def _unpark(self, tenant: str) -> None:
        """One more of a tenant's may run, if any of them was at the cap."""
        parked = self._parked.get(tenant)
        if parked and not self._capped(tenant):
            self._line_up(self._requests[parked.pop(0)[1]])

    # --- order

    def _order(self, request: Request) -> float:
        return request.arrived - request.priority * self._rules.priority_seconds

    def _line_up(self, request: Request) -> None:
        insort(self._lines.setdefault(request.model, []), (self._order(request), request.name))

    def _leave(self, request: Request) -> None:
        """It waits no more."""
        del self._requests[request.name]
        self._waits.pop(request.name, None)
        for lines, key in ((self._lines, request.model), (self._parked, request.tenant)):
            line, entry = lines.get(key, []), (self._order(request), request.name)
            at = bisect_left(line, entry)
            if line[at : at + 1] == [entry]:
                del line[at]
            if not line:
                lines.pop(key, None)

    def _head(self, model: str) -> _Entry | None:
        """The first of a model's line that may run."""
        return self._may_run(model, 0)

    def _may_run(self, model: str, end: int) -> _Entry | None:
        """The first (0) or last (-1) of a model's line; those whose tenant is at its cap are parked."""
        line = self._lines.get(model, [])
        while line:
            request = self._requests[line[end][1]]
            if not self._capped(request.tenant):
                return line[end]
            insort(self._parked.setdefault(request.tenant, []), line.pop(end))
        self._lines.pop(model, None)
        return None

    def _capped(self, tenant: str) -> bool:
        cap = self._rules.tenant_caps.get(tenant)
        return cap is not None and self._running.get(tenant, 0) >= cap

    # --- one request

    def _serve(self, request: Request, state: _Pass) -> bool:
        """Place the head of a line; False when it must wait. True also for one whose tenant has reached its cap
        meanwhile."""
        if self._capped(request.tenant):
            return True
        wait = self._waits.get(request.name)
        if wait is not None and wait.holds(request.model, state.view, state.now):
            return False
        impatient = state.now - self._order(request) > self._rules.patience
        claimed = state.view.claim_of(request.name) is not None
        decision = self._decide(request, state, self._settled if claimed else self._weights)
        if impatient and decision.chosen is None:
            decision = self._decide(request, state, self._wide)
        if _at_once(decision.chosen):
            self._place(decision, state)
            return True
        self._wait(decision, state, claimed, impatient)
        return False

    def _serve_behind(self, model: str, state: _Pass) -> None:
        """Those behind a head that waits: the last ones start replicas, as long as that is quicker than their turn."""
        head = self._head(model)
        wait = self._waits.get(head[1]) if head else None
        self._behind.pop(model, None)
        while head and (last := self._may_run(model, -1)) and last != head:
            line = Line(len(self._lines[model]) - 1, wait.place_at if wait else None)
            decision = self._decide(self._requests[last[1]], state, self._settled, line)
            if not _at_once(decision.chosen):
                self._behind[model] = self._found(decision, state, ahead=line.ahead)
                return
            self._place(decision, state)

    def _found(self, decision: Decision, state: _Pass, *, place_at: float | None = None, ahead: int = 0) -> _Wait:
        """What to remember of a decision to wait. Who waits for a slot is looked at again when a part of that time has
        passed, who waits for a place when anything changes, or its patience ends."""
        request, option, view = decision.request, decision.chosen, state.view
        order = self._order(request)
        queues = option if option is not None and option.action == "queue" else None
        ends = order + self._rules.patience
        again = state.now + _LOOK_AGAIN * queues.seconds if queues else ends if ends > state.now else float("inf")
        own = view.changes_of(request.model)
        return _Wait(view.changes, own, again, order, queues.replica if queues else None, place_at, ahead)

    def _decide(self, request: Request, state: _Pass, weights: Weights, line: Line | None = None) -> Decision:
        return place(request, state.view, state.estimator, state.now, weights, state.worth, line)

    def _place(self, decision: Decision, state: _Pass) -> None:
        request = decision.request
        self.take(request)
        state.view.release(request.name)
        state.commit(decision)
        state.placed += 1

    def _wait(self, decision: Decision, state: _Pass, claimed: bool, impatient: bool) -> None:
        """Remember what it waits for; claim its place, if it is to have one of its own."""
        request, option = decision.request, decision.chosen
        place_at = None
        if option is None or option.action == "wait":
            new = not claimed and option is not None and self._claims(request.name, option, self._order(request), state)
            if new and option is not None and option.migrate:
                state.commit(decision)
            if not (claimed or new) and impatient:
                state.may_claim = False
            place_at = state.now + option.seconds if option is not None and (claimed or new) else None
        self._waits[request.name] = self._found(decision, state, place_at=place_at)

    def _claims(self, name: str, option: Option, order: float, state: _Pass) -> bool:
        """Whether it has claimed its place now: not what another one wants, or has waited for longer."""
        claim = _claim(name, option)
        free = state.may_claim and state.view.claimable(claim.node, claim.gpus, whole=claim.whole)
        if not free or any(one.replica in option.blockers and one.order < order for one in self._waits.values()):
            return False
        state.view.claim(claim)
        return True


def _at_once(option: Option | None) -> bool:
    """Whether it can be done now: a start, or a replica that has room already."""
    return option is not None and (option.action == "start" or (option.action == "queue" and option.seconds <= 0.0))


def _claim(request: str, option: Option) -> Claim:
    return Claim(request, option.node, frozenset(option.gpus), whole=option.host_short or not option.gpus)
