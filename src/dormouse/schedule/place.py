"""Where a request should run: the way to its first token that takes least, within memory.

    Request + Cluster + Estimator -> Decision: the option taken, those that were not, and why

Looked at are: every ready or starting replica of the model (behind what it has already), every sleeping one, and a new
start on the nodes that hold the model nearest: on free GPUs, on those of idle replicas, on those that busy ones leave
soon, and on one whose request migrates away. Of many nodes that hold it, those with most room and those with the
shortest queues are looked at, so the work does not grow with the cluster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal

from dormouse.schedule.cluster import (
    MEMORY,
    Cluster,
    ModelCost,
    Replica,
    Request,
    StartPath,
    StartPlan,
    State,
    Tier,
)
from dormouse.schedule.estimate import Estimate, Estimator
from dormouse.schedule.room import MORE_GPUS, Eviction, Room, Worth, ends, find_room, left

Action = Literal["queue", "start", "wait"]

_NEAR = (Tier.GPU, Tier.DRAM, Tier.DISK)
_SCAN = 25  # for each candidate wanted, so many nodes are looked at to find it
_USUAL = 16  # more candidates than that are wanted for one that is out of patience
_WORTH_LOOKING = 1.02  # a node that could be better by less than this is not looked at
_ENOUGH_GPUS = 12  # once there is a place for a start, no more are looked at for a better one
_ENOUGH_OF_MANY = 6  # the same where there are more nodes than a few
_FEW_NODES = 4
_MIGRATION_NODES = 3
_MIGRATIONS = 3


@dataclass(frozen=True, slots=True)
class Migration:
    """A running request goes to other GPUs, so that its replica can end: its model starts there by `path` (or is there
    already: `reuse`), the tokens so far are computed again, and then it changes over. It runs on meanwhile."""

    request: str
    replica: str
    node: str
    gpus: tuple[int, ...]
    path: StartPath
    seconds: float  # until it has changed over
    pause: float  # for the one whose request it is
    reuse: str | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that could be done.

    "queue": at `replica`. "start": now, after `evict`. "wait": the same start, once `blockers` have ended: by
    themselves, or since `migrate` takes their request elsewhere. `seconds` is the estimated time from now to the first
    token, `penalty` what others lose by it; the least `score` wins."""

    action: Action
    path: StartPath
    node: str
    gpus: tuple[int, ...]
    replica: str | None  # the one that takes it (queue), or that is woken (path "sleep")
    seconds: float
    penalty: float
    estimate: Estimate
    evict: tuple[Eviction, ...] = ()
    migrate: tuple[Migration, ...] = ()
    blockers: tuple[str, ...] = ()
    host_short: bool = False

    @property
    def score(self) -> float:
        return self.seconds + self.penalty


@dataclass(frozen=True, slots=True)
class Decision:
    """`chosen` is None when there is no place, now or soon: `blocked` says why. A chosen "wait" is a place worth
    waiting for; the request stays in the queue."""

    request: Request
    chosen: Option | None
    alternatives: tuple[Option, ...]
    blocked: str = ""

    def why(self) -> str:
        """The decision with its alternatives and their numbers, for people."""
        head = f"request {self.request.name} for {self.request.model}: "
        if self.chosen is None:
            return head + self.blocked
        others = [f"  or    {_told(option)}" for option in self.alternatives]
        return "\n".join([head.rstrip(), f"  taken {_told(self.chosen)}", *others])


@dataclass(frozen=True, slots=True)
class Weights:
    """How much things count."""

    start: float = 0.3  # seconds for each second that a start takes: its links and GPUs are lost to others meanwhile
    eviction: float = 0.1  # seconds for each second that the evicted one's return would take
    half_life: float = 60.0  # idle for so long, it is half as likely to be asked for soon
    candidates: int = 6  # nodes looked at for each tier
    migrate_above: float = 1.0  # seconds; quicker than that, nobody is migrated
    migrate_gain: float = 0.5  # seconds that a migration must promise
    alternatives: int = 8


_DEFAULT = Weights()


@dataclass(frozen=True, slots=True)
class Line:
    """Requests of the same model that wait before one: how many, and when the place that the first of them waits for
    should be there (a replica with all its slots), if it waits for one."""

    ahead: int = 0
    place_at: float | None = None


def place(
    request: Request,
    view: Cluster,
    estimator: Estimator,
    now: float,
    weights: Weights = _DEFAULT,
    worth: Worth | None = None,
    line: Line | None = None,
) -> Decision:
    """The best that can be done for a request. `worth` says what an idle replica is worth to its model, in seconds
    (keep-alive policies know better than the default: what a return takes, fading with the time it has been idle).
    `line` are those of its model that come first; one that has any queues behind them or starts, but waits for no
    place."""
    worth = worth or default_worth(view, estimator, now, weights)
    search = _Search(request, view, estimator, now, weights, worth, line or Line())
    options = sorted(search.options(), key=lambda option: (option.score, option.action != "queue"))
    if not options:
        return Decision(request, None, (), search.blocked())
    return Decision(request, options[0], tuple(options[1 : 1 + weights.alternatives]))


def place_start(
    request: Request, view: Cluster, estimator: Estimator, now: float, *, evict: bool, worth: Worth | None = None
) -> Decision:
    """The quickest start of one more replica, whoever is ready already: for nobody's request, so it neither waits nor
    migrates anybody, and only with `evict` do idle replicas go for it."""
    worth = worth or default_worth(view, estimator, now)
    search = _Search(request, view, estimator, now, _DEFAULT, worth, Line(), starts_only=True, may_evict=evict)
    options = sorted(search.starts(), key=lambda option: option.score)
    chosen = options[0] if options else None
    return Decision(request, chosen, tuple(options[1:]), "" if chosen else search.blocked())


def default_worth(view: Cluster, estimator: Estimator, now: float, weights: Weights = _DEFAULT) -> Worth:
    """A return's seconds, halved for each half-life that the replica has been idle."""

    returns: dict[str, float] = {}

    def worth(replica: Replica) -> float:
        back = returns.get(replica.model)
        if back is None:
            back = weights.eviction * estimator.return_seconds(view.model(replica.model))
            returns[replica.model] = back
        age = now - replica.since
        return float(back * 0.5 ** min(age / weights.half_life, 60.0)) if age > 0.0 else back

    return worth


@dataclass(slots=True)
class _Candidate:
    """A node for a start. Each way is (path, seconds until its process is there, seconds after both); `bound` is the
    least that a start can take there, when the GPU's link is free."""

    bound: float
    node: str
    ways: list[tuple[StartPath, float, float]]

    def best(self, weights: float) -> tuple[float, StartPath]:
        """The quickest way when the weights take so many seconds."""
        return min((max(weights, process) + after, path) for path, process, after in self.ways)


class _Search:
    """One search for a place. Nodes are looked at in the order of their bounds, tier by tier, and no longer than one
    could still be better."""

    def __init__(
        self, request: Request, view: Cluster, estimator: Estimator, now: float, weights: Weights, worth: Worth,
        line: Line, *, starts_only: bool = False, may_evict: bool = True,
    ) -> None:  # fmt: skip
        self.request, self.view, self.estimator, self.now = request, view, estimator, now
        self._starts_only, self._may_evict = starts_only, may_evict
        self.weights, self.worth, self.line = weights, worth, line
        self.model = view.model(request.model)
        self._phases: dict[tuple[str, StartPath, str], tuple[float, float]] = {}
        self._best = float("inf")
        self._found: list[Option] = []
        self._may_start = False
        self._looked = 0  # GPUs for which room was looked for

    def options(self) -> list[Option]:
        """All that is worth comparing. When a replica is ready at once, nothing else is looked at."""
        self._ready()
        if self._best <= 0.0:
            return self._found
        near = self._new_ones()
        if self._best > self.weights.migrate_above and near:
            for option in self._migrations(near):
                self._add(option)
        return self._found

    def starts(self) -> list[Option]:
        """One more replica, whoever is ready already."""
        self._new_ones()
        return self._found

    def _new_ones(self) -> list[_Candidate]:
        """Look at replicas that sleep and at new starts; the answer are the nodes that hold the weights near."""
        if self.view.has_all(self.model.name):
            return []
        for replica in islice(self.view.sleeping(self.model.name), self.weights.candidates):
            self._add(self._wake(replica))
        return self._stages()

    def _add(self, option: Option | None) -> None:
        if option is not None and self._allowed(option):
            self._found.append(option)
            self._may_start = self._may_start or option.action == "start"
            self._best = min(self._best, option.score)

    def _allowed(self, option: Option) -> bool:
        """What has infinite worth goes for nobody."""
        if self.line.ahead and option.action == "wait":
            return False
        starts = option.action == "start" or not self._starts_only
        return starts and (self._may_evict or not option.evict) and option.score < math.inf

    def blocked(self) -> str:
        """Why there is no option."""
        model = self.model
        if self.view.has_all(model.name):
            return f"{model.name} has {model.max_replicas} replicas, as many as it may have"
        if not self._anywhere(model):
            return f"no node can hold {model.name}: {model.gpus} GPUs with {model.device_bytes} bytes each, and " + (
                f"{model.host_bytes} bytes of host memory"
            )
        if not any(self._sources(model)):
            return f"no node has the weights of {model.name} in any tier, and they can't be fetched"
        return f"no room for {model.name}: all that it could have is in use or kept for others"

    def _anywhere(self, model: ModelCost) -> bool:
        for size, name in self.view.largest(model.gpus):
            if model.gpus and size < model.device_bytes:
                return False
            if self.view.node(name).host_bytes >= model.host_bytes:
                return True
        return False

    def _sources(self, model: ModelCost) -> Iterator[bool]:
        yield from (bool(self.view.holders(model.weights.key, tier)) for tier in _NEAR)
        yield self.view.is_remote(model.weights.key)

    # --- replicas that are there

    def _ready(self) -> None:
        """Queueing at the replicas that would take it first; behind others of its model, at the one whose turn it is
        when they have their slots."""
        model = self.model
        some = islice(self.view.soonest(model.name), self.weights.candidates)
        replicas = [one for one in some if not self.view.is_kept(one.node, one.gpus, self.request.name)]
        if not self.line.ahead:
            for replica in replicas:
                self._queue(replica, slot_waits(replica, model, self.now, 1)[0])
        elif replicas:
            self._queue(*self._turn(replicas))

    def _queue(self, replica: Replica, wait: float) -> None:
        parts = (("queue", wait),) if wait > 0.0 else ()
        estimate = Estimate(wait, wait, parts)
        self._add(Option("queue", "hot", replica.node, replica.gpus, replica.name, wait, 0.0, estimate))

    def _turn(self, replicas: list[Replica]) -> tuple[Replica, float]:
        """The replica and the wait of one that comes after others: all slots of these replicas in the order in which
        they become free, and then once more."""
        model, line = self.model, self.line
        ahead = line.ahead * len(replicas) // max(self.view.ready_count(model.name), len(replicas))
        slots = [(wait, one) for one in replicas for wait in slot_waits(one, model, self.now, ahead + 1)]
        if line.place_at is not None:
            slots += [(max(line.place_at - self.now, 0.0), replicas[0])] * model.slots
        slots.sort(key=lambda slot: slot[0])
        rounds, turn = divmod(ahead, len(slots))
        wait, replica = slots[turn]
        return replica, wait + rounds * max(self._usual(replicas), slots[-1][0])

    def _usual(self, replicas: list[Replica]) -> float:
        """How long a slot is taken: by what the request is expected to be, or as those before it."""
        if self.request.expected_tokens:
            return self.request.expected_tokens * self.model.token_seconds
        return max(one.expected - min((r.began for r in one.requests), default=one.expected) for one in replicas)

    def _wake(self, replica: Replica) -> Option | None:
        node, model = replica.node, self.model
        room = find_room(model, node, self.view, self.worth, self.now, request=self.request.name, wake=replica)
        plan = self.view.plan(model, node, "sleep", replica.gpus) if room else None
        if room is None or plan is None:
            return None
        return self._option(node, room, "sleep", self.estimator.estimate(model, node, plan, self.view), replica.name)

    def _option(self, node: str, room: Room, path: StartPath, estimate: Estimate, replica: str | None = None) -> Option:
        action: Action = "wait" if room.blockers else "start"
        penalty = room.loss + self.weights.start * estimate.mean
        rest = (room.evict, (), room.blockers, room.host_short)
        return Option(action, path, node, room.gpus, replica, room.wait + estimate.mean, penalty, estimate, *rest)

    # --- new starts

    def _stages(self) -> list[_Candidate]:
        """Look at nodes tier by tier; the answer are those that hold the weights near, the best first."""
        key, most = self.model.weights.key, self.weights.candidates
        near: list[_Candidate] = []
        seen: set[str] = set()
        for tier in _NEAR:
            holders = self.view.holders(key, tier)
            near += self._look([name for name in self._some(holders, most) if name not in seen], seen)
        if self.view.is_remote(key):
            idlest = next(self.view.idlest_networks(), None)
            least = self._candidate(self.model, idlest[1]) if idlest else None
            if least and self._least(least) < self._best:
                self._look([name for name in self._far(most) if name not in seen], seen)
        return sorted(near, key=lambda one: (one.bound, one.node))

    def _look(self, nodes: list[str], seen: set[str]) -> list[_Candidate]:
        """Starts on these nodes, as long as one could be better than what there is."""
        found = [one for node in dict.fromkeys(nodes) if (one := self._candidate(self.model, node))]
        found.sort(key=lambda one: (one.bound, one.node))
        seen.update(nodes)
        enough = _ENOUGH_GPUS if len(nodes) <= _FEW_NODES else _ENOUGH_OF_MANY
        for candidate in found:
            if self._least(candidate) * _WORTH_LOOKING >= self._best or (self._looked > enough and self._may_start):
                break
            self._looked += self.model.gpus + MORE_GPUS
            self._add(self._start(candidate))
        return found

    def _least(self, candidate: _Candidate) -> float:
        """The least score of a start there."""
        return candidate.bound * (1.0 + self.weights.start)

    def _some(self, among: Mapping[str, None], most: int) -> list[str]:
        """Those of `among` with most room, free or spare: all of a few."""
        if len(among) <= 2 * most:
            return list(among)
        found: list[str] = []
        for ranking in (self.view.most_free(self.model.gpus), self.view.most_spare(self.model.gpus)):
            ranked = islice(ranking, most * _SCAN)
            found += islice((name for _bytes, name in ranked if name in among), most)
        return found or list(islice(among, most))

    def _far(self, most: int) -> Iterator[str]:
        """Nodes with most room, and those with the shortest queue on their network that have room."""
        model, view = self.model, self.view
        for ranking in (view.most_free(model.gpus), view.most_spare(model.gpus)):
            yield from (name for _bytes, name in islice(ranking, most // 2))
        if most > _USUAL:
            yield from (name for _bytes, name in islice(view.largest(model.gpus), most))
        ranked = islice(view.idlest_networks(), most * _SCAN)
        roomy = (name for _seconds, name in ranked if _count(view.free(name), model.device_bytes) >= model.gpus)
        yield from islice(roomy, most // 2)

    def _candidate(self, model: ModelCost, node: str) -> _Candidate | None:
        """A node's ways to start a model; None when it has none."""
        view, estimator = self.view, self.estimator
        tier = view.nearest(model.weights.key, node)
        if tier is None:
            return None
        weights = estimator.fetch_seconds(model.weights, node, tier, view)
        ways: list[tuple[StartPath, float, float]] = []
        for path in model.paths:
            moved = self._image_seconds(model, node, path)
            if moved is not None:
                process, after = self._phase_seconds(model, path, view.node(node).kind)
                ways.append((path, moved + process, after))
        if not ways:
            return None
        least = min(max(weights, process) + after for _path, process, after in ways)
        return _Candidate(least * estimator.pace(node), node, ways)

    def _image_seconds(self, model: ModelCost, node: str, path: StartPath) -> float | None:
        """What the image of a path takes to a node; None when that path is not open there."""
        image, tier = self.view.image_of(model, node, path)
        if image is None or tier is None:
            return 0.0 if path == "cold" else None
        one = partial(self.estimator.link_seconds, node, size=image.coded_bytes, view=self.view)
        return max(self.estimator.fetch_seconds(image, node, tier, self.view), one(MEMORY))

    def _phase_seconds(self, model: ModelCost, path: StartPath, kind: str) -> tuple[float, float]:
        key = (model.name, path, kind)
        found = self._phases.get(key)
        if found is None:
            one = partial(self.estimator.phase_seconds, model, path, kind=kind)
            found = self._phases[key] = (one(name="process"), one(name="ready") + one(name="rest"))
        return found

    def _start(self, candidate: _Candidate) -> Option | None:
        room = find_room(self.model, candidate.node, self.view, self.worth, self.now, request=self.request.name)
        best = self._estimated(self.model, candidate, room.gpus) if room else None
        return self._option(candidate.node, room, *best) if room and best else None

    def _estimated(
        self, model: ModelCost, candidate: _Candidate, gpus: tuple[int, ...]
    ) -> tuple[StartPath, Estimate] | None:
        """The quickest way to start on these GPUs."""
        move = self.view.weights_move(model, candidate.node, gpus)
        if move is None and self.view.nearest(model.weights.key, candidate.node) is not Tier.GPU:
            return None
        _seconds, path = candidate.best(self.estimator.move_seconds(candidate.node, move, self.view) if move else 0.0)
        plan = StartPlan(path, move, self.view.image_move(model, candidate.node, path))
        return path, self.estimator.estimate(model, candidate.node, plan, self.view)

    # --- migration

    def _migrations(self, near: list[_Candidate]) -> Iterator[Option]:
        """Starts in the place of one running request that goes elsewhere, on the nearest few nodes."""
        for candidate in near[:_MIGRATION_NODES]:
            if self._least(candidate) + self.weights.migrate_gain >= self._best:
                return
            some = islice(self.view.replicas_on(candidate.node), _SCAN)
            movable = (one for one in some if self._may_move(one))
            for replica in islice(movable, _MIGRATIONS):
                option = self._instead_of(replica, candidate)
                if option:
                    yield option

    def _may_move(self, replica: Replica) -> bool:
        ready = replica.state in (State.HOT, State.BUSY) and len(replica.requests) == 1 and not replica.waiting
        return (
            ready
            and not replica.pinned
            and replica.model != self.request.model
            and replica.requests[0].movable
            and ends(replica, self.now) > self.weights.migrate_above
            and self._gpus_after(replica) is not None
            and not self.view.is_kept(replica.node, replica.gpus, self.request.name)
        )

    def _gpus_after(self, replica: Replica) -> tuple[int, ...] | None:
        """The GPUs for a start once a replica has ended; None where that alone makes no room."""
        device, host = self.view.takes(replica)
        free = self.view.free(replica.node)
        mine = self.model.only_on or replica.gpus
        roomy = [gpu for gpu in replica.gpus if gpu in mine and free[gpu] + device >= self.model.device_bytes]
        enough = len(roomy) >= self.model.gpus and self.view.free_host(replica.node) + host >= self.model.host_bytes
        return tuple(roomy[: self.model.gpus]) if enough and self.model.gpus else None

    def _instead_of(self, replica: Replica, candidate: _Candidate) -> Option | None:
        """A start on the GPUs of a replica whose request has gone elsewhere."""
        gpus = self._gpus_after(replica)
        migration = self._elsewhere(replica) if gpus else None
        best = self._estimated(self.model, candidate, gpus) if gpus and migration else None
        if gpus is None or migration is None or best is None:
            return None
        path, estimate = best
        seconds = migration.seconds + estimate.mean
        loss = migration.pause + self.worth(replica) + self.weights.start * estimate.mean
        return Option(
            "wait", path, replica.node, gpus, None, seconds, loss, estimate, (), (migration,), (replica.name,)
        )

    def _elsewhere(self, replica: Replica) -> Migration | None:
        """The quickest way to carry on a replica's request on another node, on free memory."""
        model, running = self.view.model(replica.model), replica.requests[0]
        pause = model.prefill_seconds * (running.prompt_tokens + running.tokens)
        for other in islice(self.view.soonest(model.name), _MIGRATIONS):
            if self._takes_over(other, replica):
                return Migration(
                    running.name, replica.name, other.node, other.gpus, "hot", pause, pause, reuse=other.name
                )
        if self.view.has_all(model.name):
            return None
        found = [one for node in self._others(model, replica.node) if (one := self._candidate(model, node))]
        for candidate in sorted(found, key=lambda one: (one.bound, one.node)):
            room = find_room(model, candidate.node, self.view, self.worth, self.now, request=self.request.name)
            if room and not (room.blockers or room.evict):
                best = self._estimated(model, candidate, room.gpus)
                if best:
                    return Migration(
                        running.name, replica.name, candidate.node, room.gpus, best[0], best[1].mean + pause, pause
                    )
        return None

    def _takes_over(self, other: Replica, replica: Replica) -> bool:
        room = len(other.requests) + other.waiting < self.view.model(other.model).slots
        return other.name != replica.name and other.state is State.HOT and room and other.node != replica.node

    def _others(self, model: ModelCost, but: str) -> list[str]:
        """Some nodes that hold a model near and seem to have room."""
        need, view = model.device_bytes, self.view
        holders = (node for tier in _NEAR for node in islice(view.holders(model.weights.key, tier), _SCAN))
        roomy = (node for node in holders if node != but and _count(view.free(node), need) >= model.gpus)
        return list(dict.fromkeys(islice(roomy, _MIGRATIONS)))


def slot_waits(replica: Replica, model: ModelCost, now: float, most: int) -> list[float]:
    """Seconds until each slot of a replica is free for one more request, `most` of them; at least one."""
    taken, waiting = len(replica.requests), replica.waiting
    if replica.state is State.STARTING:
        room = min(model.slots - taken - waiting, most)
        return [left(replica.ready_at, replica.since, now)] * room or [ends(replica, now)]
    began = min((running.began for running in replica.requests), default=now)
    waits = [*[0.0] * (model.slots - taken), *(left(at, began, now) for at in replica.leave(model))]
    return waits[waiting : waiting + most] or [ends(replica, now)]


def _count(free: list[int], need: int) -> int:
    return sum(size >= need for size in free)


def _told(option: Option) -> str:
    """One option in a line."""
    where = f"{option.node} GPU {','.join(map(str, option.gpus))}" if option.gpus else option.node
    words = [f"{option.action:<5} {option.path:<8} {where:<18} {option.seconds:8.3f} s"]
    waited = option.seconds - option.estimate.mean
    parts = [f"{name} {seconds:.3f}" for name, seconds in option.estimate.parts]
    if waited > 1e-9:
        parts.insert(0, f"until there is room {waited:.3f}")
    if parts:
        words.append(f"({' + '.join(parts)}; p95 {waited + option.estimate.p95:.3f})")
    if option.replica:
        words.append(f"replica {option.replica}")
    words += [f"evicts {one.replica} ({one.to})" for one in option.evict]
    words += [f"migrates {one.request} to {one.node} in {one.seconds:.3f} s" for one in option.migrate]
    if option.blockers:
        words.append(f"after {', '.join(option.blockers)}")
    if option.penalty > 0.0:
        words.append(f"+ {option.penalty:.3f} s for what others lose")
    return " ".join(words)
