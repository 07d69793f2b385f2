"""The place that a start could have on one node: which GPUs, who must go for it, or until when it would have to wait.

    model + node of the view -> Room: GPUs, evictions with what they lose, seconds until the last blocker has ended

Each GPU is judged by itself (free, free once idle replicas have gone, free once busy ones are done), the cheapest are
taken, and then the host's memory is made to suffice. A replica over several GPUs counts on each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from dormouse.schedule.cluster import Cluster, ModelCost, Replica, State, pcie

Worth = Callable[[Replica], float]
"""The seconds that somebody is expected to lose when an idle replica goes."""

_ASLEEP_SHARE = 0.2  # of a replica's worth that is lost when it only goes to sleep


@dataclass(frozen=True, slots=True)
class Eviction:
    """An idle replica goes: to "sleep" (its process stays, its GPUs are free), or "end" (nothing of it stays)."""

    replica: str
    to: Literal["sleep", "end"]


@dataclass(frozen=True, slots=True)
class Room:
    """`wait` seconds from now it is there, after `evict`, who lose `loss` seconds; `blockers` are who is waited for."""

    gpus: tuple[int, ...]
    evict: tuple[Eviction, ...] = ()
    loss: float = 0.0
    wait: float = 0.0
    blockers: tuple[str, ...] = ()
    host_short: bool = False  # it is the host's memory that is waited for


@dataclass(frozen=True, slots=True)
class _Device:
    """What it takes to have room on one GPU."""

    wait: float
    loss: float
    queue: int
    free: int
    gpu: int
    evict: tuple[str, ...]
    blockers: tuple[str, ...]

    def key(self) -> tuple[float, float, int, int, int]:
        return (self.wait, self.loss, self.queue, self.free, self.gpu)


def find_room(
    model: ModelCost,
    node: str,
    view: Cluster,
    worth: Worth,
    now: float,
    *,
    request: str = "",
    wake: Replica | None = None,
) -> Room | None:
    """Room for a new replica of `model` (or to `wake` one, on its own GPUs); None when there can't be any soon: too
    small, kept for others, or held by replicas that do not go."""
    host = model.host_bytes - (model.process_bytes if wake else 0)
    gpus = wake.gpus if wake else range(len(view.node(node).gpus))
    if model.gpus == 0 and view.is_kept(node, (), request):
        return None
    quick = _free_now(model, node, view, gpus, host, request)
    if quick is not None:
        return Room(quick)
    replicas = [one for one in view.replicas_on(node) if wake is None or one.name != wake.name]
    devices = _devices(model, node, view, worth, now, gpus, replicas, request)
    if len(devices) < model.gpus:
        return None
    chosen = sorted(devices, key=_Device.key)[: model.gpus]
    return _with_host(
        Room(tuple(sorted(device.gpu for device in chosen))), chosen, host, node, view, worth, now, replicas
    )


def _free_now(
    model: ModelCost, node: str, view: Cluster, gpus: Iterable[int], host: int, request: str
) -> tuple[int, ...] | None:
    """GPUs on which there is room as it is: those with the shortest queue, the fullest first."""
    if host > view.free_host(node) or view.is_kept(node, (), request):
        return None
    free = view.free(node)
    need = model.device_bytes
    fit = [gpu for gpu in gpus if free[gpu] >= need and not view.is_kept(node, (gpu,), request)]
    if len(fit) < model.gpus:
        return None
    if len(fit) > model.gpus:
        fit.sort(key=lambda gpu: (view.link(node, pcie(gpu)).queued, free[gpu]))
    return tuple(sorted(fit[: model.gpus]))


def _devices(
    model: ModelCost,
    node: str,
    view: Cluster,
    worth: Worth,
    now: float,
    gpus: Iterable[int],
    replicas: list[Replica],
    request: str,
) -> list[_Device]:
    """Every GPU on which there could be room."""
    on: dict[int, list[Replica]] = {}
    for replica in replicas:
        if replica.state is not State.SLEEPING:
            for gpu in replica.gpus:
                on.setdefault(gpu, []).append(replica)
    if not model.gpus:
        return []
    found = []
    for gpu in gpus:
        if not view.is_kept(node, (gpu,), request):
            device = _device(model.device_bytes, node, gpu, view, worth, now, on.get(gpu, []))
            if device:
                found.append(device)
    return found


def _device(
    need: int, node: str, gpu: int, view: Cluster, worth: Worth, now: float, replicas: list[Replica]
) -> _Device | None:
    free = view.free(node)[gpu]
    queue = view.link(node, pcie(gpu)).queued
    missing = need - free
    if missing <= 0:
        return _Device(0.0, 0.0, queue, free, gpu, (), ())
    sizes = {replica.name: view.takes(replica)[0] for replica in replicas}
    idle = [(worth(replica), replica.name) for replica in replicas if replica.idle]
    gone = _cheapest(idle, sizes, missing)
    missing -= sum(sizes[name] for name in gone)
    loss = _ASLEEP_SHARE * sum(value for value, name in idle if name in gone)
    if missing <= 0:
        return _Device(0.0, loss, queue, free, gpu, gone, ())
    wait, blockers = 0.0, []
    busy = {one.name: one for one in replicas if not (one.idle or one.pinned)}
    for end, name in sorted((ends(one, now), name) for name, one in busy.items()):
        wait, missing = end, missing - sizes[name]
        loss += _ASLEEP_SHARE * worth(busy[name])
        blockers.append(name)
        if missing <= 0:
            return _Device(wait, loss, queue, free, gpu, gone, tuple(blockers))
    return None


def ends(replica: Replica, now: float) -> float:
    """Seconds until a busy replica should have done what it has."""
    return max(replica.expected - now, replica.ready_at - now if replica.state is State.STARTING else 0.0, 0.0)


def _cheapest(idle: list[tuple[float, str]], sizes: dict[str, int], missing: int) -> tuple[str, ...]:
    """Idle ones that free `missing` bytes (or all of them): least worth for their size first, and none in vain."""
    gone: list[tuple[float, str]] = []
    for value, name in sorted(idle, key=lambda one: (one[0] / max(sizes[one[1]], 1), one[1])):
        if missing <= 0:
            break
        if sizes[name] > 0:
            gone.append((value, name))
            missing -= sizes[name]
    for value, name in sorted(gone, reverse=True):
        if missing + sizes[name] <= 0:
            gone.remove((value, name))
            missing += sizes[name]
    return tuple(name for _value, name in gone)


def _with_host(
    room: Room,
    chosen: list[_Device],
    host: int,
    node: str,
    view: Cluster,
    worth: Worth,
    now: float,
    replicas: list[Replica],
) -> Room | None:
    """The same room with the host's memory too: those that go may have to end, others that sleep as well."""
    slept = dict.fromkeys(name for device in chosen for name in device.evict)
    blockers = dict.fromkeys(name for device in chosen for name in device.blockers)
    wait = max((device.wait for device in chosen), default=0.0)
    missing = host - view.free_host(node)
    sizes = {one.name: view.takes(one)[1] for one in replicas}
    idle = [(_value(one, slept, worth), one.name) for one in replicas if one.idle]
    ended = dict.fromkeys(_cheapest(idle, sizes, missing)) if missing > 0 else {}
    missing -= sum(sizes[name] for name in ended)
    host_short = missing > 0
    if missing > 0:
        for end, name in sorted((ends(one, now), one.name) for one in replicas if not (one.idle or one.pinned)):
            wait, missing = max(wait, end), missing - sizes[name]
            blockers[name] = None
            if missing <= 0:
                break
        else:
            return None
    values = {one.name: worth(one) for one in replicas if one.name in slept or one.name in ended}
    loss = sum(value * (1.0 if name in ended else _ASLEEP_SHARE) for name, value in values.items())
    loss += _ASLEEP_SHARE * sum(worth(one) for one in replicas if one.name in blockers)
    evict = [Eviction(name, "end" if name in ended else "sleep") for name in {**slept, **ended}]
    return Room(room.gpus, tuple(evict), loss, wait, tuple(blockers), host_short)


def _value(replica: Replica, slept: dict[str, None], worth: Worth) -> float:
    """What ending it loses beyond what it loses anyway."""
    return worth(replica) * (1.0 - _ASLEEP_SHARE if replica.name in slept else 1.0)
