"""What a decision sees: nodes, links, models, replicas and who holds which bytes, as plain data with indexes.

    node or simulator: tells what happened  ->  Cluster (this view)  ->  estimate, place, keepalive, autoscale

A `Cluster` does no I/O and knows no clock; whoever keeps it tells it of every change by a method, and it refuses a
change that would take more memory than there is. Times are seconds, sizes bytes, rates bytes a second. What lies in a
tier is an `Artifact`, named by a key, so that models that share weights or an engine's template share the bytes too.
Free memory is never told but derived: total - reserved - replicas - claims.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import Literal

from dormouse.errors import ConfigError

StartPath = Literal["hot", "sleep", "snapshot", "template", "cold"]
PhaseName = Literal["process", "ready"]
Moved = Literal["weights", "image", "libraries"]

NETWORK = "network"
DISK = "disk"
MEMORY = "memory"  # host memory into host memory: a process' pages, or the weights of a model without a GPU


_AT_ONCE = 1e9
_FEW = 2


def pcie(gpu: int) -> str:
    """The name of the link between the host and one GPU."""
    return f"pcie:{gpu}"


def share(size: int, link: str, links: tuple[str, ...]) -> int:
    """The bytes of a transfer over `links` that one of them carries: GPUs get a part each."""
    if not link.startswith("pcie:"):
        return size
    return -(-size // sum(other.startswith("pcie:") for other in links))


class Tier(IntEnum):
    """Where bytes can be; the smaller the nearer."""

    GPU = 0
    DRAM = 1
    DISK = 2
    REMOTE = 3


SOURCE_LINK: Mapping[Tier, str] = MappingProxyType({Tier.DISK: DISK, Tier.REMOTE: NETWORK})
"""The link that bytes of a tier come over before the last one."""
_BEFORE: Mapping[Tier, tuple[str, ...]] = MappingProxyType(
    {Tier.GPU: (), Tier.DRAM: (), Tier.DISK: (DISK,), Tier.REMOTE: (NETWORK,)}
)


class State(StrEnum):
    """What a replica is doing, as far as a decision cares."""

    STARTING = "starting"
    HOT = "hot"  # ready, with room for another request (perhaps some are running)
    BUSY = "busy"  # ready, as many requests as it takes at once
    SLEEPING = "sleeping"  # the process is there, in host memory only
    LEAVING = "leaving"  # on its way out; its memory is not free yet


@dataclass(frozen=True, slots=True)
class Artifact:
    """Bytes that can lie in a tier: a model's weights, its snapshot, or the template of an engine."""

    key: str
    plain_bytes: int
    coded_bytes: int


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a model needs. `kv_bytes` and the weights are sums over its `gpus`; with gpus=0 it all is host memory.

    `phases` are first guesses, for each start path, of "process" (cell, CRIU, or import and construction) and "ready"
    (resume, first token); the estimator learns the true ones. `image_kinds` are the kinds of node its snapshot fits.
    """

    name: str
    weights: Artifact
    engine: str = "transformers"
    kv_bytes: int = 0
    gpus: int = 1
    process_bytes: int = 0  # host memory of its process, asleep or ready
    asleep_bytes: int = 0  # of each of its GPUs, of its process while it sleeps (CUDA's context)
    image: Artifact | None = None  # its snapshot
    template: Artifact | None = None  # its engine's
    programs: Artifact | None = None  # what a cold start reads of its engine: libraries
    image_kinds: frozenset[str] = frozenset({""})
    paths: tuple[StartPath, ...] = ("snapshot", "template", "cold")  # that a start without a process may take
    slots: int = 1  # requests that a replica runs at once
    phases: Mapping[StartPath, Mapping[PhaseName, float]] = field(default_factory=lambda: MappingProxyType({}))
    token_seconds: float = 0.03  # between two tokens of one request
    prefill_seconds: float = 0.0  # for each token of a prompt; what a migrated request must recompute
    max_replicas: int = 0  # ready or starting at once; 0: no limit
    pinned: bool = False  # its replicas never go for others
    only_on: tuple[int, ...] = ()  # GPUs of a node that it may have; (): any
    device_bytes: int = field(init=False, default=0)  # what a ready replica takes of each of its GPUs
    host_bytes: int = field(init=False, default=0)  # what a ready replica takes of the host's memory
    awake: tuple[int, int] = field(init=False, default=(0, 0))  # both
    sleep_frees: int = field(init=False, default=0)  # bytes of each of its GPUs that one that falls asleep gives back

    def __post_init__(self) -> None:
        all_bytes = self.weights.plain_bytes + self.kv_bytes
        object.__setattr__(self, "device_bytes", -(-all_bytes // self.gpus) if self.gpus else 0)
        object.__setattr__(self, "host_bytes", self.process_bytes + (0 if self.gpus else all_bytes))
        object.__setattr__(self, "awake", (self.device_bytes, self.host_bytes))
        object.__setattr__(self, "sleep_frees", self.device_bytes - self.asleep_bytes)


@dataclass(frozen=True, slots=True)
class Link:
    """One way for bytes. `rate` is what is declared or was measured once; the estimator learns the true one.

    `queued` bytes are under way or wait on it, in `transfers` pieces. A link shares its rate among its transfers
    unless it is `fifo`.
    """

    rate: float
    queued: int = 0
    transfers: int = 0
    fifo: bool = False

    def ahead(self, size: int) -> int:
        """The bytes that go before the last one of a new transfer of `size` does."""
        return self.queued if self.fifo else min(self.queued, self.transfers * size)


@dataclass(frozen=True, slots=True)
class Node:
    """One host. `gpus` are the bytes of each GPU that Dormouse may use, `host_bytes` the memory for processes (and for
    models without a GPU), `dram_tier` and `disk_tier` the room for artifacts. `kind` says which snapshots fit it."""

    name: str
    gpus: tuple[int, ...]
    host_bytes: int
    links: Mapping[str, Link]
    dram_tier: int = 0
    disk_tier: int = 0
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Running:
    """A request that a replica runs: when it began, and how many tokens it has and is expected to have."""

    name: str
    began: float
    tokens: int = 0
    expected_tokens: int = 0
    prompt_tokens: int = 0
    movable: bool = True

    def ends_at(self, model: ModelCost) -> float:
        """When it should be done; 0 when that is not known."""
        if not self.expected_tokens:
            return 0.0
        left = max(self.expected_tokens - self.tokens, 1)
        return self.began + (self.prompt_tokens + self.tokens) * model.prefill_seconds + left * model.token_seconds


@dataclass(frozen=True, slots=True)
class Replica:
    """One worker of a model. `since` is when it entered its state; `ready_at` when one that starts should be ready.

    `expected` is when it should be done with all that it has, those that wait included: from then on it may go, and at
    the latest then a request that queues behind them begins."""

    name: str
    model: str
    node: str
    gpus: tuple[int, ...]
    state: State
    since: float
    requests: tuple[Running, ...] = ()
    waiting: int = 0  # requests that already queue behind it
    ready_at: float = 0.0
    expected: float = 0.0
    pinned: bool = False
    measured: tuple[int, int] | None = None  # bytes of each of its GPUs, of the host; else what its model's take

    @property
    def idle(self) -> bool:
        """Whether it may be put to sleep or ended for another one."""
        return not (self.pinned or self.requests or self.waiting) and self.state in (State.HOT, State.SLEEPING)

    def takes_next_at(self, model: ModelCost) -> float:
        """When it would take one more request; the less it has to do, the earlier, among those that would at once."""
        there = len(self.requests) + self.waiting
        if there < model.slots:
            return self.ready_at if self.state is State.STARTING else there - _AT_ONCE
        if self.state is State.STARTING or self.waiting >= len(self.requests):
            return max(self.ready_at, self.expected)
        return self.leave(model)[self.waiting]

    def leave(self, model: ModelCost) -> list[float]:
        """When those that it runs should be done, the first one first."""
        return sorted(running.ends_at(model) or self.expected for running in self.requests)


@dataclass(frozen=True, slots=True)
class Request:
    """One request. A higher `priority` goes first, but not forever (see queue.py)."""

    name: str
    model: str
    arrived: float
    priority: int = 0
    tenant: str = ""
    prompt_tokens: int = 0
    expected_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Move:
    """A transfer that a start needs: `size` bytes, pipelined over `links` (the slowest one decides). The links of
    several GPUs each carry their share. `behind`: it begins when another one, which brings the same bytes into DRAM,
    has come to its end: that one's first link, and what it has still to bring."""

    name: Moved
    key: str
    size: int
    source: Tier
    links: tuple[str, ...]
    behind: tuple[str, int] | None = None

    def size_on(self, link: str) -> int:
        """The bytes that one of its links carries."""
        return share(self.size, link, self.links)


@dataclass(frozen=True, slots=True)
class StartPlan:
    """How a start runs, for the estimator and for the simulator alike:

    weights -----------------+
                             +-> "ready" phase -> first token
    image -> "process" phase +
    """

    path: StartPath
    weights: Move | None
    image: Move | None


@dataclass(frozen=True, slots=True)
class Claim:
    """A place kept for a request that waits for it: nothing else starts on these GPUs of the node, and nothing more
    queues at their replicas, so that they drain. `whole`: on the whole node, since its host memory is what lacks."""

    request: str
    node: str
    gpus: frozenset[int]
    whole: bool = False


@dataclass(slots=True)
class _Site:
    """What the view keeps of one node."""

    node: Node
    links: dict[str, Link]
    free: list[int]  # of each GPU
    spare: list[int]  # the same, when all that is idle had gone
    free_host: int
    spare_host: int
    replicas: dict[str, None] = field(default_factory=dict)
    on_gpu: dict[int, dict[str, Replica]] = field(default_factory=dict)  # those that have memory of it
    idle_on_gpu: dict[int, dict[str, Replica]] = field(default_factory=dict)
    asleep_on_gpu: dict[int, dict[str, Replica]] = field(default_factory=dict)
    tiers: dict[str, set[Tier]] = field(default_factory=dict)
    arriving: dict[str, tuple[str, int]] = field(default_factory=dict)
    claims: dict[str, Claim] = field(default_factory=dict)


class _Ranking:
    """Names in the order of a number, kept by bisection."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, str]] = []
        self._value: dict[str, float] = {}

    def put(self, name: str, value: float) -> None:
        if self._value.get(name) == value:
            return
        self.drop(name)
        self._value[name] = value
        insort(self._entries, (value, name))

    def __len__(self) -> int:
        return len(self._entries)

    def drop(self, name: str) -> None:
        value = self._value.pop(name, None)
        if value is not None:
            del self._entries[bisect_left(self._entries, (value, name))]

    def ascending(self) -> Iterator[tuple[float, str]]:
        return iter(self._entries)

    def descending(self) -> Iterator[tuple[float, str]]:
        return reversed(self._entries)


class Cluster:
    """The view. Every look-up that placement needs is an index, none a scan over all nodes."""

    def __init__(self, nodes: Iterable[Node] = (), models: Iterable[ModelCost] = ()) -> None:
        self._sites: dict[str, _Site] = {}
        self._models: dict[str, ModelCost] = {}
        self._replicas: dict[str, Replica] = {}
        self._by_model: dict[str, dict[str, None]] = {}
        self._soonest: dict[str, _Ranking] = {}
        self._changes_of: dict[str, int] = {}
        self._sleeping: dict[str, dict[str, None]] = {}
        self._holders: dict[tuple[str, Tier], dict[str, None]] = {}
        self._remote: set[str] = set()
        self._claims: dict[str, Claim] = {}
        self._dirty: dict[str, None] = {}
        self._free: dict[int, _Ranking] = {0: _Ranking()}
        self._spare: dict[int, _Ranking] = {0: _Ranking()}
        self._size: dict[int, _Ranking] = {0: _Ranking()}
        self._network = _Ranking()
        self.sleepers_hold = False  # whether any model's processes hold memory of GPUs while they sleep
        self.changes = 0  # goes up whenever a request that found no place might find one
        for node in nodes:
            self.add_node(node)
        for model in models:
            self.add_model(model)

    # --- nodes and models

    def add_node(self, node: Node) -> None:
        """A new one, empty."""
        if node.name in self._sites:
            raise ConfigError(f"there are two nodes named {node.name}", remedy="Give each a name of its own")
        self.changes += 1
        self._sites[node.name] = _Site(
            node, dict(node.links), list(node.gpus), list(node.gpus), node.host_bytes, node.host_bytes
        )
        self._network.put(node.name, 0.0)
        self._dirty[node.name] = None

    def remove_node(self, name: str) -> tuple[Replica, ...]:
        """It is gone, with all it held; the answer are the replicas that went with it (their requests must be placed
        again)."""
        site = self._sites[name]
        lost = tuple(self._replicas[replica] for replica in site.replicas)
        for replica in lost:
            self.drop(replica.name)
        for key, tiers in list(site.tiers.items()):
            for tier in list(tiers):
                self.lose(key, name, tier)
        for request in list(site.claims):
            self.release(request)
        del self._sites[name]
        self._dirty.pop(name, None)
        for ranking in (self._network, *self._free.values(), *self._spare.values(), *self._size.values()):
            ranking.drop(name)
        return lost

    def node(self, name: str) -> Node:
        return self._sites[name].node

    @property
    def nodes(self) -> Iterable[str]:
        return self._sites.keys()

    def add_model(self, model: ModelCost) -> None:
        """Add it, or replace what is known of it while it has no replicas."""
        if self._by_model.get(model.name):
            raise ConfigError(f"model {model.name} changed while it has replicas", remedy="Stop them first")
        self._models[model.name] = model
        self.sleepers_hold = self.sleepers_hold or model.asleep_bytes > 0
        if model.gpus not in self._free:
            for rankings in (self._free, self._spare, self._size):
                rankings[model.gpus] = _Ranking()
            self._dirty.update(dict.fromkeys(self._sites))

    def model(self, name: str) -> ModelCost:
        return self._models[name]

    @property
    def models(self) -> Mapping[str, ModelCost]:
        """By name. The view's own."""
        return self._models

    # --- bytes

    def hold(self, key: str, node: str, tier: Tier) -> None:
        """A node has an artifact in one of its tiers."""
        self.changes += 1
        self._sites[node].tiers.setdefault(key, set()).add(tier)
        self._holders.setdefault((key, tier), {})[node] = None

    def lose(self, key: str, node: str, tier: Tier) -> None:
        """It has it there no more."""
        tiers = self._sites[node].tiers.get(key, set())
        tiers.discard(tier)
        if not tiers:
            self._sites[node].tiers.pop(key, None)
        holders = self._holders.get((key, tier), {})
        holders.pop(node, None)
        if not holders:
            self._holders.pop((key, tier), None)

    def expect(self, key: str, node: str, link: str, left: int) -> None:
        """An artifact is on its way over a link into a node's DRAM, where those who want it, too, find it."""
        self._sites[node].arriving[key] = (link, left)

    def arrived(self, key: str, node: str) -> None:
        """It is there, or comes no more."""
        self._sites[node].arriving.pop(key, None)

    def arriving(self, key: str, node: str) -> tuple[str, int] | None:
        """The link over which an artifact is coming into a node's DRAM, and the bytes still to come."""
        return self._sites[node].arriving.get(key)

    def hold_remote(self, key: str) -> None:
        """Every node can fetch it over its network."""
        self.changes += 1
        self._remote.add(key)

    def lose_remote(self, key: str) -> None:
        self._remote.discard(key)

    def is_remote(self, key: str) -> bool:
        return key in self._remote

    def nearest(self, key: str, node: str) -> Tier | None:
        """The nearest tier from which a node can have an artifact; None when it can't."""
        tiers = self._sites[node].tiers.get(key)
        if tiers:
            return min(tiers)
        return Tier.REMOTE if key in self._remote else None

    def holders(self, key: str, tier: Tier) -> Mapping[str, None]:
        """The nodes that have an artifact in one of their tiers."""
        return self._holders.get((key, tier), {})

    def held(self, node: str) -> Mapping[str, set[Tier]]:
        """All that lies on a node."""
        return self._sites[node].tiers

    def link(self, node: str, name: str) -> Link:
        """A link; one of a GPU that is not declared by itself is the node's `pcie`."""
        links = self._sites[node].links
        found = links.get(name) or links.get(name.partition(":")[0])
        if found is None:
            raise ConfigError(f"node {node} has no link {name}", remedy="Declare its rate")
        return found

    def set_link(self, node: str, name: str, queued: int, transfers: int) -> None:
        """What is under way on it now."""
        link = replace(self.link(node, name), queued=queued, transfers=transfers)
        self._sites[node].links[name] = link
        if name == NETWORK:
            self._network.put(node, queued / link.rate)

    def idlest_networks(self) -> Iterator[tuple[float, str]]:
        """(seconds of queue, node), the shortest first."""
        return self._network.ascending()

    # --- replicas

    def put(self, replica: Replica) -> None:
        """Add it, or say how it is now. Refused when it would take more memory than there is."""
        before = self._replicas.get(replica.name)
        if before is not None:
            self._take(before, -1)
        device, host = self.takes(replica)
        site = self._sites[replica.node]
        if host > site.free_host or any(device > site.free[gpu] for gpu in replica.gpus):
            if before is not None:
                self._take(before, +1)
            raise ConfigError(
                f"replica {replica.name} does not fit on node {replica.node}: it needs {device} bytes of each of GPUs "
                f"{list(replica.gpus)} and {host} of host memory, free are {site.free} and {site.free_host}",
                remedy="Evict first",
            )
        self._take(replica, +1)
        if before is not None:
            self._unlist(before)
        self._list(replica)
        self._replicas[replica.name] = replica
        self._by_model.setdefault(replica.model, {})[replica.name] = None
        site.replicas[replica.name] = None

    def drop(self, name: str) -> Replica:
        """It has ended."""
        replica = self._replicas.pop(name)
        self._take(replica, -1)
        self._unlist(replica)
        self._by_model[replica.model].pop(name)
        self._sites[replica.node].replicas.pop(name)
        return replica

    def takes(self, replica: Replica) -> tuple[int, int]:
        """Bytes of each of its GPUs, and of the host."""
        if replica.measured is not None:
            return replica.measured
        model = self._models[replica.model]
        if replica.state is State.SLEEPING:
            return model.asleep_bytes, model.process_bytes
        return model.awake

    def _take(self, replica: Replica, sign: int) -> None:
        site = self._sites[replica.node]
        device, host = self.takes(replica)
        idle = replica.idle
        site.free_host -= sign * host
        if not idle:
            site.spare_host -= sign * host
        for gpu in replica.gpus:
            site.free[gpu] -= sign * device
            if not idle:
                site.spare[gpu] -= sign * device
        self._changed(replica.node)
        self.changes += 1
        self._changes_of[replica.model] = self._changes_of.get(replica.model, 0) + 1

    def _list(self, replica: Replica) -> None:
        """Enter it in the indexes of what it can do."""
        site = self._sites[replica.node]
        if replica.state is State.SLEEPING:
            self._sleeping.setdefault(replica.model, {})[replica.name] = None
            if self.takes(replica)[0]:
                for gpu in replica.gpus:
                    site.asleep_on_gpu.setdefault(gpu, {})[replica.name] = replica
            return
        for gpu in replica.gpus:
            site.on_gpu.setdefault(gpu, {})[replica.name] = replica
            if replica.idle:
                site.idle_on_gpu.setdefault(gpu, {})[replica.name] = replica
        if replica.state is not State.LEAVING:
            at = replica.takes_next_at(self._models[replica.model])
            self._soonest.setdefault(replica.model, _Ranking()).put(replica.name, at)

    def _unlist(self, replica: Replica) -> None:
        site = self._sites[replica.node]
        if replica.state is State.SLEEPING:
            self._sleeping[replica.model].pop(replica.name)
            for gpu in replica.gpus:
                site.asleep_on_gpu.get(gpu, {}).pop(replica.name, None)
            return
        for gpu in replica.gpus:
            site.on_gpu[gpu].pop(replica.name)
            if replica.idle:
                site.idle_on_gpu[gpu].pop(replica.name)
        if replica.state is not State.LEAVING:
            self._soonest[replica.model].drop(replica.name)

    def replica(self, name: str) -> Replica:
        return self._replicas[name]

    def __contains__(self, name: str) -> bool:
        return name in self._replicas

    def replicas_of(self, model: str) -> Iterator[Replica]:
        return (self._replicas[name] for name in self._by_model.get(model, ()))

    def soonest(self, model: str) -> Iterator[Replica]:
        """Replicas of a model that are ready or starting, those that would take a request first coming first."""
        ranking = self._soonest.get(model)
        return (self._replicas[name] for _at, name in ranking.ascending()) if ranking else iter(())

    def takes_now(self, model: str) -> bool:
        """Whether a ready replica has room for a request."""
        ranking = self._soonest.get(model)
        first = next(ranking.ascending(), None) if ranking else None
        return first is not None and first[0] < 0.0

    def changes_of(self, model: str) -> int:
        """Goes up with every change of its replicas."""
        return self._changes_of.get(model, 0)

    def ready_count(self, model: str) -> int:
        """How many are ready or starting."""
        ranking = self._soonest.get(model)
        return len(ranking) if ranking else 0

    def has_all(self, model: str) -> bool:
        """Whether it has as many replicas as it may."""
        most = self._models[model].max_replicas
        return most > 0 and self.ready_count(model) >= most

    def sleeping(self, model: str) -> Iterator[Replica]:
        """Its replicas that sleep, the first to fall asleep first."""
        return (self._replicas[name] for name in self._sleeping.get(model, ()))

    def replicas_on_gpu(self, node: str, gpu: int) -> Iterable[Replica]:
        """Those that have memory of it."""
        return self._sites[node].on_gpu.get(gpu, {}).values()

    def idle_on_gpu(self, node: str, gpu: int) -> Iterable[Replica]:
        """Those of them that are idle."""
        return self._sites[node].idle_on_gpu.get(gpu, {}).values()

    def asleep_on_gpu(self, node: str, gpu: int) -> Iterable[Replica]:
        """Those that sleep, and whose processes hold memory of it all the same."""
        return self._sites[node].asleep_on_gpu.get(gpu, {}).values()

    def replicas_on(self, node: str) -> Iterator[Replica]:
        return (self._replicas[name] for name in self._sites[node].replicas)

    # --- room

    def free(self, node: str) -> list[int]:
        """Free bytes of each GPU. The list is the view's own: not to be changed."""
        return self._sites[node].free

    def free_host(self, node: str) -> int:
        return self._sites[node].free_host

    def spare(self, node: str) -> list[int]:
        """Free bytes of each GPU when all that is idle had gone. Not to be changed."""
        return self._sites[node].spare

    def spare_host(self, node: str) -> int:
        return self._sites[node].spare_host

    def most_free(self, gpus: int) -> Iterator[tuple[float, str]]:
        """(bytes that each of its `gpus` emptiest GPUs has free, node), the most first; host memory for gpus=0."""
        self._refresh()
        return self._free[gpus].descending()

    def most_spare(self, gpus: int) -> Iterator[tuple[float, str]]:
        """The same, counting what is idle as free."""
        self._refresh()
        return self._spare[gpus].descending()

    def largest(self, gpus: int) -> Iterator[tuple[float, str]]:
        """The same, counting all as free."""
        self._refresh()
        return self._size[gpus].descending()

    def _changed(self, node: str) -> None:
        """Its place in the rankings has changed. Few of these are left to the next look, which is not to take long."""
        self._dirty[node] = None
        if len(self._dirty) > _FEW:
            self._refresh()

    def _refresh(self) -> None:
        for name in self._dirty:
            site = self._sites[name]
            for rankings, devices, host in (
                (self._free, site.free, site.free_host),
                (self._spare, site.spare, site.spare_host),
                (self._size, site.node.gpus, site.node.host_bytes),
            ):
                ordered = sorted(devices, reverse=True)
                for width, ranking in rankings.items():
                    if width <= len(ordered):
                        ranking.put(name, ordered[width - 1] if width else host)
        self._dirty.clear()

    # --- claims

    def claim(self, claim: Claim) -> None:
        """Keep a place for a request. A request has at most one, and a GPU is kept for at most one."""
        if claim.request in self._claims or not self.claimable(claim.node, claim.gpus, whole=claim.whole):
            raise ConfigError(f"request {claim.request} can't claim GPUs {sorted(claim.gpus)} of node {claim.node}")
        self._sites[claim.node].claims[claim.request] = claim
        self._claims[claim.request] = claim

    def claimable(self, node: str, gpus: frozenset[int], *, whole: bool) -> bool:
        """Whether nobody else's claim is in the way."""
        others = self._sites[node].claims.values()
        return not any(whole or other.whole or gpus & other.gpus for other in others)

    def release(self, request: str) -> None:
        """The request has its place, or needs none any more; nothing happens when it had no claim."""
        claim = self._claims.pop(request, None)
        if claim is not None:
            self.changes += 1
            del self._sites[claim.node].claims[request]

    @property
    def claims(self) -> Iterable[Claim]:
        """All places that are kept."""
        return self._claims.values()

    def claim_of(self, request: str) -> Claim | None:
        return self._claims.get(request)

    def is_kept(self, node: str, gpus: tuple[int, ...], request: str) -> bool:
        """Whether (one of) these GPUs is kept for another request."""
        claims = self._sites[node].claims
        return bool(claims) and any(
            claim.whole or not claim.gpus.isdisjoint(gpus) for claim in claims.values() if claim.request != request
        )

    # --- starts

    def plan(self, model: ModelCost, node: str, path: StartPath, gpus: tuple[int, ...]) -> StartPlan | None:
        """What must move for a start by `path`; None when that path is not open there."""
        weights = self.weights_move(model, node, gpus)
        if weights is None and self.nearest(model.weights.key, node) is not Tier.GPU:
            return None
        image = self.image_move(model, node, path)
        return None if image is None and path in ("snapshot", "template") else StartPlan(path, weights, image)

    def weights_move(self, model: ModelCost, node: str, gpus: tuple[int, ...]) -> Move | None:
        """The weights from their nearest tier to where they are needed; None when they are there, or can't be had."""
        tier = self.nearest(model.weights.key, node)
        if tier is None or tier is Tier.GPU:
            return None
        return self._move("weights", model.weights, node, tier, tuple(pcie(gpu) for gpu in gpus) or (MEMORY,))

    def _move(self, name: Moved, artifact: Artifact, node: str, tier: Tier, last: tuple[str, ...]) -> Move:
        behind = self.arriving(artifact.key, node)
        if behind:
            return Move(name, artifact.key, artifact.coded_bytes, Tier.DRAM, last, behind)
        return Move(name, artifact.key, artifact.coded_bytes, tier, (*_BEFORE[tier], *last))

    def image_move(self, model: ModelCost, node: str, path: StartPath) -> Move | None:
        """The image that a path needs (a cold start: its engine's files) from its nearest tier; None when it needs none
        or can't have or use it."""
        image, tier = self.image_of(model, node, path)
        if image is None or tier is None:
            return None
        return self._move("libraries" if path == "cold" else "image", image, node, tier, (MEMORY,))

    def image_of(self, model: ModelCost, node: str, path: StartPath) -> tuple[Artifact | None, Tier | None]:
        """The image that a path needs, and its nearest tier; None where there is none, or it can't be had or used."""
        images: dict[StartPath, Artifact | None]
        images = {"snapshot": model.image, "template": model.template, "cold": model.programs}
        image = images.get(path)
        if image is None or (path == "snapshot" and self._sites[node].node.kind not in model.image_kinds):
            return None, None
        return image, self.nearest(image.key, node)
