"""Where a request should run: the way to its first token that takes least, within memory.

    Request + Cluster + Estimator -> Decision: the option taken, those that were not, and why

Looked at are: every ready or starting replica of the model (behind what it has already), every sleeping one, and a new
start on the nodes that hold the model nearest: on free GPUs, on those of idle replicas, on those that busy ones leave
soon, and on one whose request migrates away. Of many nodes that hold it, those with most room and those with the
shortest queues are looked at, so the work does not grow with the cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from dormouse.schedule.cluster import Cluster, ModelCost, Replica, Request, StartPath, State, Tier
from dormouse.schedule.estimate import Estimate, Estimator
from dormouse.schedule.room import Eviction, Room, Worth, ends, find_room

Action = Literal["queue", "start", "wait"]

_PATHS: tuple[StartPath, ...] = ("snapshot", "template", "cold")
_SCAN = 25  # for each candidate wanted, so many nodes are looked at to find it


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

    eviction: float = 0.1  # seconds for each second that the evicted one's return would take
    half_life: float = 60.0  # idle for so long, it is half as likely to be asked for soon
    candidates: int = 8  # nodes looked at for each tier
    migrate_above: float = 1.0  # seconds; quicker than that, nobody is migrated
    alternatives: int = 8


_DEFAULT = Weights()
_READY = Estimate(0.0, 0.0, ())


def place(
    request: Request,
    view: Cluster,
    estimator: Estimator,
    now: float,
    weights: Weights = _DEFAULT,
    worth: Worth | None = None,
) -> Decision:
    """The best that can be done for a request. `worth` says what an idle replica is worth to its model, in seconds
    (keep-alive policies know better than the default: what a return takes, fading with the time it has been idle)."""
    search = _Search(request, view, estimator, now, weights, worth or default_worth(view, estimator, now, weights))
    options = sorted(search.options(), key=lambda option: (option.score, option.action != "queue"))
    if not options:
        return Decision(request, None, (), search.blocked())
    return Decision(request, options[0], tuple(options[1 : 1 + weights.alternatives]))


def default_worth(view: Cluster, estimator: Estimator, now: float, weights: Weights = _DEFAULT) -> Worth:
    """A return's seconds, halved for each half-life that the replica has been idle."""

    def worth(replica: Replica) -> float:
        back = estimator.return_seconds(view.model(replica.model))
        age = min(max(now - replica.since, 0.0) / weights.half_life, 60.0)
        return float(weights.eviction * back * 0.5**age)

    return worth


@dataclass(slots=True)
class _Search:
    """One search for a place. Out of patience, it looks at many nodes (Weights.candidates)."""

    request: Request
    view: Cluster
    estimator: Estimator
    now: float
    weights: Weights
    worth: Worth

    @property
    def model(self) -> ModelCost:
        return self.view.model(self.request.model)

    def options(self) -> list[Option]:
        """All that is worth comparing. When a replica is ready at once, nothing else is looked at."""
        found, sleeping = self._ready()
        if any(option.seconds <= 0.0 for option in found):
            return found
        found += [option for replica in sleeping if (option := self._wake(replica))]
        nodes = list(dict.fromkeys(self._nodes()))
        found += [option for node in nodes if (option := self._start(node))]
        if min((option.score for option in found), default=float("inf")) > self.weights.migrate_above:
            found += self._migrations(nodes)
        return found

    def blocked(self) -> str:
        """Why there is no option."""
        model = self.model
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
        yield from (bool(self.view.holders(model.weights.key, tier)) for tier in (Tier.GPU, Tier.DRAM, Tier.DISK))
        yield self.view.is_remote(model.weights.key)

    # --- replicas that are there

    def _ready(self) -> tuple[list[Option], list[Replica]]:
        """Queueing at replicas that are ready or starting, the shortest first; and those that sleep."""
        waits: list[tuple[float, int, Replica]] = []
        sleeping = []
        slots = self.model.slots
        for replica in self.view.replicas_of(self.request.model):
            if replica.state is State.SLEEPING:
                sleeping.append(replica)
            elif replica.state is not State.LEAVING and not self._kept(replica):
                there = len(replica.requests) + replica.waiting
                waits.append((self._wait(replica, there < slots), there, replica))
        waits.sort(key=lambda one: (one[0], one[1], one[2].name))
        most = self.weights.candidates
        return [self._queue(replica, wait) for wait, _there, replica in waits[:most]], sleeping[:most]

    def _wait(self, replica: Replica, room: bool) -> float:
        starting = max(replica.ready_at - self.now, 0.0) if replica.state is State.STARTING else 0.0
        return starting if room else max(starting, ends(replica, self.now))

    def _kept(self, replica: Replica) -> bool:
        return self.view.is_kept(replica.node, replica.gpus, self.request.name)

    def _queue(self, replica: Replica, wait: float) -> Option:
        parts = ((("queue", wait),)) if wait > 0.0 else ()
        estimate = Estimate(wait, wait, parts) if wait > 0.0 else _READY
        return Option("queue", "hot", replica.node, replica.gpus, replica.name, wait, 0.0, estimate)

    def _wake(self, replica: Replica) -> Option | None:
        room = find_room(
            self.model, replica.node, self.view, self.worth, self.now, request=self.request.name, wake=replica
        )
        plan = self.view.plan(self.model, replica.node, "sleep", replica.gpus) if room else None
        if room is None or plan is None:
            return None
        return self._option(
            replica.node,
            room,
            self.estimator.estimate(self.model, replica.node, plan, self.view),
            "sleep",
            replica.name,
        )

    # --- new starts

    def _nodes(self) -> Iterator[str]:
        """Nodes worth looking at: near tiers first, with room, with short queues; and one that is sure to have room."""
        key, most = self.model.weights.key, self.weights.candidates
        for tier in (Tier.GPU, Tier.DRAM, Tier.DISK):
            yield from self._some(self.view.holders(key, tier), most)
        if self.view.is_remote(key):
            yield from self._some(None, most)
            yield from self._idlest(most)
            yield from (name for _bytes, name in islice(self.view.largest(self.model.gpus), most))

    def _some(self, among: Iterable[str] | None, most: int) -> Iterator[str]:
        """Those of `among` (of all nodes, when None) with most room, also counting idle replicas: all of a few."""
        if among is not None:
            among = among if isinstance(among, dict) else dict.fromkeys(among)
            if len(among) <= 2 * most:
                yield from among
                return
        for ranking in (self.view.most_free(self.model.gpus), self.view.most_spare(self.model.gpus)):
            ranked = islice(ranking, most * _SCAN if among is not None else most)
            yield from islice((name for _bytes, name in ranked if among is None or name in among), most)

    def _idlest(self, most: int) -> Iterator[str]:
        """Nodes with the shortest queue on their network that have room."""
        need, gpus = self.model.device_bytes, self.model.gpus
        ranked = islice(self.view.idlest_networks(), most * _SCAN)
        roomy = (name for _seconds, name in ranked if _count(self.view.free(name), need) >= gpus)
        yield from islice(roomy, most)

    def _start(self, node: str) -> Option | None:
        room = find_room(self.model, node, self.view, self.worth, self.now, request=self.request.name)
        best = self._best_path(self.model, node, room.gpus) if room else None
        return self._option(node, room, best[1], best[0]) if room and best else None

    def _best_path(self, model: ModelCost, node: str, gpus: tuple[int, ...]) -> tuple[StartPath, Estimate] | None:
        best: tuple[StartPath, Estimate] | None = None
        for path in _PATHS:
            plan = self.view.plan(model, node, path, gpus)
            if plan is not None:
                estimate = self.estimator.estimate(model, node, plan, self.view)
                if best is None or estimate.mean < best[1].mean:
                    best = (path, estimate)
        return best

    def _option(self, node: str, room: Room, estimate: Estimate, path: StartPath, replica: str | None = None) -> Option:
        return Option(
            "wait" if room.blockers else "start",
            path,
            node,
            room.gpus,
            replica,
            room.wait + estimate.mean,
            room.loss,
            estimate,
            room.evict,
            (),
            room.blockers,
            room.host_short,
        )

    # --- migration

    def _migrations(self, nodes: list[str]) -> Iterator[Option]:
        """Starts in the place of one running request that goes elsewhere, on the nearest few nodes."""
        for node in nodes[:4]:
            movable = (one for one in self.view.replicas_on(node) if self._may_move(one))
            for replica in islice(movable, 4):
                option = self._instead_of(replica)
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
            and not self._kept(replica)
        )

    def _instead_of(self, replica: Replica) -> Option | None:
        """A start on the GPUs of a replica whose request has gone elsewhere; only where that alone makes room."""
        model, view = self.model, self.view
        device, host = view.takes(replica)
        free = view.free(replica.node)
        roomy = [gpu for gpu in replica.gpus if free[gpu] + device >= model.device_bytes]
        if not model.gpus or len(roomy) < model.gpus or view.free_host(replica.node) + host < model.host_bytes:
            return None
        gpus = tuple(roomy[: model.gpus])
        migration = self._elsewhere(replica)
        best = self._best_path(model, replica.node, gpus) if migration else None
        if migration is None or best is None:
            return None
        path, estimate = best
        seconds = migration.seconds + estimate.mean
        loss = migration.pause + self.worth(replica)
        return Option(
            "wait", path, replica.node, gpus, None, seconds, loss, estimate, (), (migration,), (replica.name,)
        )

    def _elsewhere(self, replica: Replica) -> Migration | None:
        """The quickest way to carry on a replica's request on another node, on free memory."""
        model, running = self.view.model(replica.model), replica.requests[0]
        pause = model.prefill_seconds * (running.prompt_tokens + running.tokens)
        for other in self.view.replicas_of(model.name):
            if self._takes_over(other, replica):
                return Migration(
                    running.name, replica.name, other.node, other.gpus, "hot", pause, pause, reuse=other.name
                )
        best: Migration | None = None
        for node in islice(self._near(model, replica.node), 4):
            room = find_room(model, node, self.view, self.worth, self.now, request=self.request.name)
            if room is None or room.blockers or room.evict:
                continue
            found = self._best_path(model, node, room.gpus)
            if found and (best is None or found[1].mean + pause < best.seconds):
                seconds = found[1].mean + pause
                best = Migration(running.name, replica.name, node, room.gpus, found[0], seconds, pause)
        return best

    def _takes_over(self, other: Replica, replica: Replica) -> bool:
        room = len(other.requests) + other.waiting < self.view.model(other.model).slots
        return other.name != replica.name and other.state is State.HOT and room and other.node != replica.node

    def _near(self, model: ModelCost, but: str) -> Iterator[str]:
        for tier in (Tier.GPU, Tier.DRAM, Tier.DISK):
            yield from (node for node in islice(self.view.holders(model.weights.key, tier), 8) if node != but)


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
