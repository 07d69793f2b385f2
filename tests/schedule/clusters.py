"""Parts of clusters for the tests and for bench/placement.py, and a keeper that applies decisions as a node or the
simulator would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from dormouse.schedule.cluster import (
    DISK,
    MEMORY,
    NETWORK,
    Artifact,
    Cluster,
    Link,
    ModelCost,
    Node,
    Replica,
    Request,
    Running,
    State,
    Tier,
)
from dormouse.schedule.place import Decision

GB = 10**9
PHASES: Mapping = {
    "sleep": {"ready": 0.1},
    "snapshot": {"process": 0.7, "ready": 0.4},
    "template": {"process": 0.7, "ready": 4.0},
    "cold": {"process": 12.0, "ready": 6.0},
}


def links(disk: float = 5 * GB, network: float = 1.25 * GB, pcie: float = 50 * GB) -> dict[str, Link]:
    return {"pcie": Link(pcie), DISK: Link(disk), NETWORK: Link(network), MEMORY: Link(10 * GB)}


def node(name: str, gpus: int = 1, gpu_gb: int = 80, host_gb: int = 100) -> Node:
    return Node(name, (gpu_gb * GB,) * gpus, host_gb * GB, links())


def model(name: str, gb: int = 10, gpus: int = 1, *, snapshot: bool = True, slots: int = 1) -> ModelCost:
    return ModelCost(
        name,
        Artifact(f"weights {name}", gb * GB, gb * GB),
        gpus=gpus,
        process_bytes=GB,
        image=Artifact(f"image {name}", GB, GB // 4) if snapshot else None,
        slots=slots,
        phases=PHASES,
    )


def lay(view: Cluster, one: ModelCost, where: str, tier: Tier = Tier.DISK) -> None:
    """A node has a model's weights and snapshot."""
    view.hold(one.weights.key, where, tier)
    if one.image:
        view.hold(one.image.key, where, tier)


def hot(name: str, of: str, on: str, gpus: tuple[int, ...] = (0,), since: float = 0.0) -> Replica:
    return Replica(name, of, on, gpus, State.HOT, since)


def busy(name: str, of: str, on: str, gpus: tuple[int, ...] = (0,), until: float = 10.0) -> Replica:
    return Replica(name, of, on, gpus, State.BUSY, 0.0, (Running(f"on {name}", 0.0),), expected=until)


def check_memory(view: Cluster) -> None:
    """What is free is what was there less what the replicas take, and never below nothing."""
    for name in view.nodes:
        taken, host = [0] * len(view.node(name).gpus), 0
        for replica in view.replicas_on(name):
            one = view.model(replica.model)
            asleep = replica.state is State.SLEEPING
            usual = (one.asleep_bytes, one.process_bytes) if asleep else (one.device_bytes, one.host_bytes)
            of_device, of_host = replica.measured or usual
            host += of_host
            for gpu in replica.gpus:
                taken[gpu] += of_device
        free = [total - used for total, used in zip(view.node(name).gpus, taken, strict=True)]
        assert view.free(name) == free and view.free_host(name) == view.node(name).host_bytes - host
        assert min([*free, view.free_host(name)]) >= 0


@dataclass
class Keeper:
    """Carries decisions out at once: a start is busy for its seconds and `service` more."""

    view: Cluster
    service: float = 5.0
    now: float = 0.0
    checks: bool = True

    def commit(self, decision: Decision) -> None:
        option = decision.chosen
        assert option is not None
        if option.action == "wait":
            assert option.migrate or not self.checks
            return
        if option.action == "queue":
            self._queue(decision.request, option.replica or "")
            return
        for eviction in option.evict:
            gone = self.view.drop(eviction.replica)
            assert gone.idle
            if eviction.to == "sleep":
                self.view.put(replace(gone, state=State.SLEEPING, since=self.now, measured=None))
        name = option.replica or f"replica of {decision.request.name}"
        ready = self.now + option.seconds
        running = (Running(decision.request.name, self.now, movable=False),)
        started = Replica(name, decision.request.model, option.node, option.gpus, State.STARTING, self.now, running)
        self.view.put(replace(started, ready_at=ready, expected=ready + self.service))
        if self.checks:
            check_memory(self.view)

    def _queue(self, request: Request, name: str) -> None:
        one = self.view.replica(name)
        running = (*one.requests, Running(request.name, self.now, movable=False))
        expected = max(one.expected, self.now) + self.service
        state = State.BUSY if one.state is State.HOT else one.state
        self.view.put(replace(one, state=state, requests=running, expected=expected))

    def advance(self, now: float) -> list[str]:
        """Let time pass: what should be done by then is; the answer are the requests that have ended."""
        self.now = now
        ended = []
        for name in [replica.name for where in self.view.nodes for replica in self.view.replicas_on(where)]:
            one = self.view.replica(name)
            if one.requests and one.expected <= now:
                ended += [running.name for running in one.requests]
                self.view.put(replace(one, state=State.HOT, requests=(), since=now, expected=0.0))
        return ended


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """A few nodes with a few models that lie somewhere, and replicas in all states."""
    view = Cluster()
    for number in range(draw(st.integers(1, 5))):
        gpus, size, host = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([20, 40, 80])), 60
        view.add_node(node(f"n{number}", gpus, size, host))
    view.add_node(node("n-cpu", 0, 0, 40))
    for number in range(draw(st.integers(1, 6))):
        width = draw(st.sampled_from([0, 1, 1, 1, 2, 4]))
        one = model(
            f"m{number}", draw(st.integers(1, 50)), width, snapshot=draw(st.booleans()), slots=draw(st.integers(1, 2))
        )
        if width == 1:
            only, asleep = draw(st.sampled_from([(), (), (0,), (0, 1)])), draw(st.sampled_from([0, 0, GB // 2]))
            one = replace(one, only_on=only, asleep_bytes=asleep, max_replicas=draw(st.sampled_from([0, 0, 1, 2])))
        view.add_model(one)
        for where in list(view.nodes):
            tier = draw(st.sampled_from([None, Tier.DISK, Tier.DRAM]))
            if tier:
                lay(view, one, where, tier)
        if draw(st.booleans()):
            view.hold_remote(one.weights.key)
    for number in range(draw(st.integers(0, 12))):
        _put(draw, view, number)
    return view


def _put(draw: st.DrawFn, view: Cluster, number: int) -> None:
    one = view.model(draw(st.sampled_from(sorted(view.models))))
    where = view.node(draw(st.sampled_from(sorted(view.nodes))))
    if len(where.gpus) < one.gpus:
        return
    mine = [gpu for gpu in range(len(where.gpus)) if gpu in (one.only_on or range(len(where.gpus)))]
    gpus = tuple(sorted(draw(st.permutations(mine))[: one.gpus]))
    if view.has_all(one.name):
        return
    make = draw(st.sampled_from([hot, busy]))
    replica = make(f"r{number}", one.name, where.name, gpus)
    if make is hot and draw(st.booleans()):
        replica = replace(replica, state=State.SLEEPING)
    if draw(st.booleans()) and replica.state is not State.SLEEPING:
        spent = draw(st.integers(1, 6))  # quarters of what is usual, beside what stays while it sleeps
        device, process = one.device_bytes - one.asleep_bytes, one.host_bytes - one.process_bytes
        measured = one.asleep_bytes + device * spent // 4, one.process_bytes + process * spent // 4
        replica = replace(replica, measured=measured)
    device, host = view.takes(replica)
    if host <= view.free_host(where.name) and all(device <= view.free(where.name)[gpu] for gpu in gpus):
        view.put(replica)
