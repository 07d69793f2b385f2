"""Which request runs where on this host: the queue and the placement of schedule/, over the replicas that there are.

    ask -> Queue.push -> a slot is free and it is the head of its model's line ------------------> Seat at a replica
                      -> dispatch (a view of now, place) -> commit: a slot, a start, or the place stays claimed -^
                             ^-- soon after any change, and once a second while somebody waits who could start

A request is bound to a replica only when that has room for it at once, or starts for it; the others wait here, so that
they get the slot that is free first. When a start fails and no other replica of the model is there, all that wait for
the model get its error: for each of them to try in turn would only take longer. When others are there, who has waited
for the failed one waits on, and for a while no replica starts beside them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from dormouse.errors import BusyError, DormouseError, StoppingError
from dormouse.node.crew import Crew
from dormouse.node.forecast import HERE, number_of
from dormouse.node.replica import State as Doing
from dormouse.node.replica import shutting_down
from dormouse.node.runner import Lease, Runner
from dormouse.schedule.cluster import Claim, Cluster, Replica, Request, Running, State
from dormouse.schedule.estimate import Estimator
from dormouse.schedule.place import Decision, Option
from dormouse.schedule.queue import Fairness, Queue
from dormouse.schedule.room import Worth

log = logging.getLogger(__name__)

HOLD_OFF = 30.0
"""Seconds after a start beside other replicas has failed in which none is tried again."""
_IDLE = (Doing.ASLEEP, Doing.DOZING)
_LOOK_AGAIN = 1.0
_TURN = 3.0
"""So many times as long as it took to start, a replica serves its model's line before it makes room for others."""
_FIRST_GUESS = 5.0
_NEWEST = 0.2  # share of the newest request in what requests of a model usually take


class Around(Protocol):
    """What placing asks of the node. `blocked`: why a model can't start at all, as the memory is; `fits`: whether a
    replica could start without anybody's going."""

    def view(self) -> Cluster: ...

    def worth_of(self, view: Cluster) -> Worth: ...

    def now(self) -> float: ...

    def blocked(self, crew: Crew) -> DormouseError | None: ...

    def fits(self, runner: Runner) -> bool: ...

    def held_up(self, runner: Runner) -> bool: ...

    def changed(self) -> None: ...


@dataclass(eq=False)
class Seat:
    """A request at a replica; `lease` is there once the replica is ready."""

    request: Request
    runner: Runner
    waiter: int
    lease: asyncio.Future[Lease]
    since: float


@dataclass(eq=False)
class _Waiting:
    crew: Crew
    request: Request
    since: float  # by the event loop's clock
    seat: asyncio.Future[Seat] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Placing:
    """For one node, on its event loop."""

    def __init__(
        self,
        crews: Mapping[str, Crew],
        fairness: Fairness,
        max_queue: int,
        estimator: Estimator,
        around: Around,
    ) -> None:
        self._crews = crews
        self._max_queue = max_queue
        self._estimator = estimator
        self._around = around
        self._loop = asyncio.get_running_loop()
        self._queue = Queue(fairness)
        self._numbers = itertools.count(1)
        self._waiting: dict[str, _Waiting] = {}
        self._coming: list[Seat] = []
        self._claims: list[Claim] = []
        self._usual: dict[str, float] = {}
        self._soon: asyncio.Handle | None = None
        self._later: asyncio.TimerHandle | None = None
        self._closing = False

    def waiting(self, model: str) -> int:
        """Requests for a model that wait at none of its replicas."""
        return sum(one.request.model == model for one in self._waiting.values())

    def usual(self, model: str) -> float:
        """Seconds that its requests took lately; 0 before the first one."""
        return self._usual.get(model, 0.0)

    async def ask(self, crew: Crew, tenant: str = "", priority: int = 0) -> Seat:
        """A seat at a replica that is ready, for `leave`. Raises BusyError, StoppingError, and what the last start path
        raised or kept the model from starting."""
        request = Request(f"request {next(self._numbers)}", crew.name, self._around.now(), priority, tenant)
        since = self._loop.time()
        again = False
        while True:
            seat = await self._seat(crew, request, since, again=again)
            try:
                await self._ready(seat)
            except BaseException as error:
                self.leave(seat)
                others = any(runner is not seat.runner for runner in crew.awake)
                if not isinstance(error, DormouseError) or isinstance(error, StoppingError) or not others:
                    raise
                again = True
            else:
                return seat

    def leave(self, seat: Seat) -> None:
        """The request is over, or goes without having been served."""
        self._queue.finished(seat.request)
        if seat.lease.done() and not seat.lease.cancelled() and seat.lease.exception() is None:
            self._note_usual(seat)
        seat.runner.release(seat.waiter)
        self.look()

    def failed(self, runner: Runner, error: DormouseError) -> None:
        """No start path has led a replica anywhere. Called before anything else is decided."""
        crew = self._crews[runner.model.name]
        if isinstance(error, StoppingError):
            return
        if any(other is not runner for other in crew.awake):
            log.warning("model %s goes on without its replica %s: %s", crew.name, runner.name, error)
            crew.held_off_until = self._loop.time() + HOLD_OFF
        else:
            self._fail_all(crew, error)

    def look(self) -> None:
        """Something has changed: see, soon, whether somebody who waits can go on."""
        if (self._waiting or self._coming) and self._soon is None and not self._closing:
            self._soon = self._loop.call_soon(self._dispatch)

    def close(self) -> None:
        """All who wait get an error, as everybody does from now on."""
        self._closing = True
        for timer in (self._soon, self._later):
            if timer is not None:
                timer.cancel()
        for one in list(self._waiting.values()):
            self._fail(one, shutting_down(one.crew.name))

    # One request

    async def _ready(self, seat: Seat) -> None:
        """Wait for its replica, or for the one that it is given to meanwhile. Raises what the start raised."""
        self._coming.append(seat)
        try:
            while not seat.lease.done():
                await asyncio.wait([seat.lease])
            seat.lease.result()
        finally:
            self._coming.remove(seat)

    async def _seat(self, crew: Crew, request: Request, since: float, *, again: bool) -> Seat:
        """Wait until a replica has room for it, or starts for it; `again`: its first one did not start, and it has its
        place in the queue already."""
        if self._closing:
            raise shutting_down(crew.name)
        one = self._waiting[request.name] = _Waiting(crew, request, since)
        self._queue.push(request)
        self._take_slots(crew)
        if request.name in self._waiting:
            if not again and self.waiting(crew.name) + crew.bound > self._max_queue:
                del self._waiting[request.name]
                self._forget(request)
                raise self._too_many(crew)
            self._around.changed()
        try:
            return await one.seat
        except BaseException:
            if one.seat.done() and not one.seat.cancelled() and one.seat.exception() is None:
                self.leave(one.seat.result())  # it was given a place while it went away
            elif self._waiting.pop(request.name, None) is not None:
                self._forget(request)
            raise

    def _take_slots(self, crew: Crew) -> None:
        """Slots that are free are for those who wait longest for the model."""
        while (runner := crew.open() or self._back_soon(crew)) is not None:
            request = self._queue.head(crew.name)
            if request is None or self._is_claimed(runner, request):
                return
            self._queue.take(request)
            self._claims = [claim for claim in self._claims if claim.request != request.name]
            self._seat_at(self._waiting.pop(request.name), runner)

    def _back_soon(self, crew: Crew) -> Runner | None:
        """One that is being captured, or ends, when there is none that could start beside it: it starts again in its
        own room. To claim that as a place would hold up all other models meanwhile."""
        going = [runner for runner in crew if runner.replica.leaving and runner.load < runner.slots]
        if not going or crew.awake:
            return None
        beside = any(self._around.fits(runner) for runner in crew if runner.replica.state in _IDLE)
        return None if beside else going[0]

    def _is_claimed(self, runner: Runner, request: Request) -> bool:
        """Whether somebody else waits for its place, so that it must drain. Not before its turn is over: models that
        take each other's place would else start again and again for a request each."""
        start, ready_at = runner.replica.last_start, runner.replica.ready_at
        if start is not None and ready_at is not None and self._loop.time() - ready_at < _TURN * start.seconds:
            return False
        others = [claim for claim in self._claims if claim.request != request.name]
        gpus = frozenset({number_of(runner.gpu)}) if runner.gpu is not None else frozenset()
        return any(claim.whole or claim.gpus & gpus for claim in others) or self._around.held_up(runner)

    def _seat_at(self, one: _Waiting, runner: Runner) -> None:
        waiter, lease = runner.enter(one.since)
        seat = Seat(one.request, runner, waiter, lease, one.since)
        if one.seat.done():
            self.leave(seat)  # it went away in this very moment
        else:
            one.seat.set_result(seat)

    def _too_many(self, crew: Crew) -> BusyError:
        last = crew.leader.replica.last_start
        return BusyError(
            f"{self._max_queue} requests already wait for model {crew.name}",
            retry_after=max(1.0, last.seconds if last is not None else _FIRST_GUESS),
            remedy="Try again later, or raise max_queue",
        )

    def _fail_all(self, crew: Crew, error: DormouseError) -> None:
        for one in [one for one in self._waiting.values() if one.crew is crew]:
            self._fail(one, error)

    def _fail(self, one: _Waiting, error: DormouseError) -> None:
        del self._waiting[one.request.name]
        self._forget(one.request)
        if not one.seat.done():
            one.seat.set_exception(error)

    def _forget(self, request: Request) -> None:
        self._queue.remove(request.name)
        self._claims = [claim for claim in self._claims if claim.request != request.name]
        self._around.changed()

    def _note_usual(self, seat: Seat) -> None:
        """How long it had its slot."""
        began = seat.runner.replica.began(seat.waiter)
        if began is None:
            return
        took, name = self._loop.time() - began, seat.request.model
        before = self._usual.get(name, took)
        self._usual[name] = before + _NEWEST * (took - before)

    # All who wait

    def _move_seats(self) -> None:
        """Who has a seat at a replica that waits for memory takes a slot of another one that has become free: nobody
        knows how long that memory is in use."""
        for seat in sorted(self._coming, key=lambda seat: seat.since):
            crew = self._crews[seat.request.model]
            free = crew.open() if seat.runner.waits_for_room else None
            if free is not None and free is not seat.runner and not self._is_claimed(free, seat.request):
                seat.runner.release(seat.waiter)
                left, seat.runner = seat.lease, free
                seat.waiter, seat.lease = free.enter(seat.since)
                left.cancel()

    def _dispatch(self) -> None:
        self._soon = None
        if self._later is not None:
            self._later.cancel()
        self._move_seats()
        if self._closing:
            return
        for crew in {one.crew for one in self._waiting.values()}:
            self._take_slots(crew)
        if not any(one.crew.may_start for one in self._waiting.values()):
            return  # as many replicas as there may be, and all are busy
        self._later = self._loop.call_later(_LOOK_AGAIN, self.look)
        view = self._around.view()
        for claim in self._claims:
            if claim.request in self._waiting and view.claimable(claim.node, claim.gpus, whole=claim.whole):
                view.claim(claim)
        self._queue.look_anew()
        self._queue.dispatch(
            view,
            self._estimator,
            self._around.now(),
            lambda decision: self._commit(decision, view),
            self._around.worth_of(view),
        )
        claims = (view.claim_of(name) for name in self._waiting)
        self._claims = [claim for claim in claims if claim is not None]
        for crew in {one.crew for one in self._waiting.values()}:
            if not crew.awake and (error := self._around.blocked(crew)) is not None:
                self._fail_all(crew, error)

    def _commit(self, decision: Decision, view: Cluster) -> None:
        """Carry out a decision to queue or to start; on one host nobody migrates."""
        option = decision.chosen
        assert option is not None and option.action != "wait"
        one = self._waiting.pop(decision.request.name)
        if option.action == "queue":
            assert option.replica is not None
            runner = one.crew.named(option.replica)
        else:
            runner = one.crew.to_start(option)
            log.debug("%s", decision.why())
        self._seat_at(one, runner)
        self._bring_up_to_date(view, option, runner, one.request)

    def _bring_up_to_date(self, view: Cluster, option: Option, runner: Runner, request: Request) -> None:
        """The view has the decision carried out. Who goes keeps its memory until it has gone; who starts takes what is
        left."""
        if option.action == "queue":
            replica = view.replica(runner.name)
            running = Running(request.name, self._around.now(), expected_tokens=1, movable=False)
            requests = (*replica.requests, running)
            full = len(requests) + replica.waiting >= runner.slots
            state = State.BUSY if full and replica.state is State.HOT else replica.state
            view.put(replace(replica, requests=requests, state=state))
            return
        for eviction in option.evict:
            view.put(replace(view.replica(eviction.replica), state=State.LEAVING))
        if runner.name in view:
            view.drop(runner.name)
        now, model, free = self._around.now(), view.model(request.model), view.free(HERE)
        device = min([model.device_bytes, *(free[gpu] for gpu in option.gpus)])
        ready = now + option.estimate.mean
        view.put(
            Replica(
                *(runner.name, request.model, HERE, option.gpus, State.STARTING, now, (), 1, ready, ready),
                measured=(device, min(model.host_bytes, view.free_host(HERE))),
            )
        )
