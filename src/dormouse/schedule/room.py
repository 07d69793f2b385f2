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

MORE_GPUS = 2  # so many more than needed are compared
_LATE = 0.5
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
    """What it takes to have room on one GPU: who goes to `sleep` (a part of their worth is lost), and who ends."""

    wait: float
    loss: float
    queue: int
    free: int
    gpu: int
    sleep: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    blockers: tuple[str, ...] = ()

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
    host = max(model.host_bytes - (view.takes(wake)[1] if wake else 0), 0)
    gpus = wake.gpus if wake else _allowed(model, len(view.node(node).gpus))
    if model.gpus == 0 and view.is_kept(node, (), request):
        return None
    quick = _free_now(model, node, view, gpus, host, request)
    if quick is not None:
        return Room(quick)
    devices = _devices(model, node, view, worth, now, gpus, request)
    if len(devices) < model.gpus:
        return None
    chosen = sorted(devices, key=_Device.key)[: model.gpus]
    missing = host - view.free_host(node)
    if missing <= 0:
        return _on_devices(chosen)
    return _with_host(chosen, missing, node, view, worth, now, wake)


def _allowed(model: ModelCost, count: int) -> Iterable[int]:
    """Those of a node's GPUs that a model may have."""
    return [gpu for gpu in model.only_on if gpu < count] if model.only_on else range(count)


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
    model: ModelCost, node: str, view: Cluster, worth: Worth, now: float, gpus: Iterable[int], request: str
) -> list[_Device]:
    """GPUs on which there could be room: the most promising, which are those with most spare bytes."""
    if not model.gpus:
        return []
    spare = view.spare(node)
    found: list[_Device] = []
    for gpu in sorted(gpus, key=lambda gpu: -spare[gpu]):
        if not view.is_kept(node, (gpu,), request):
            device = _device(model.device_bytes, node, gpu, view, worth, now)
            if device:
                found.append(device)
        if len(found) >= model.gpus + MORE_GPUS:
            break
    return found


def _device(need: int, node: str, gpu: int, view: Cluster, worth: Worth, now: float) -> _Device | None:
    free = view.free(node)[gpu]
    queue = view.link(node, pcie(gpu)).queued
    missing = need - free
    if missing <= 0:
        return _Device(0.0, 0.0, queue, free, gpu)
    models = view.models
    idle = [
        (worth(one), models[one.model].sleep_frees if one.measured is None else _frees(one, view), one.name)
        for one in view.idle_on_gpu(node, gpu)
    ]
    gone, freed, lost = _cheapest(idle, missing)
    missing, loss = missing - freed, _ASLEEP_SHARE * lost
    ended: tuple[str, ...] = ()
    if missing <= 0:
        return _Device(0.0, loss, queue, free, gpu, gone)
    if view.sleepers_hold:
        ended, freed, lost = _cheapest(_asleep(node, gpu, gone, view, worth), missing)
        missing, loss = missing - freed, loss + lost
        gone = tuple(name for name in gone if name not in ended)
        if missing <= 0:
            return _Device(0.0, loss, queue, free, gpu, gone, ended)
    wait, blockers = 0.0, []
    busy = {one.name: one for one in view.replicas_on_gpu(node, gpu) if not (one.idle or one.pinned)}
    for end, name in sorted([(ends(one, now), name) for name, one in busy.items()]):
        one = busy[name]
        wait, missing = end, missing - (one.measured or models[one.model].awake)[0]
        loss += _ASLEEP_SHARE * worth(one)
        blockers.append(name)
        if missing <= 0:
            return _Device(wait, loss, queue, free, gpu, gone, ended, tuple(blockers))
    return None


def _frees(replica: Replica, view: Cluster) -> int:
    """The bytes of each of its GPUs that are free once it sleeps."""
    return view.takes(replica)[0] - view.models[replica.model].asleep_bytes


def _asleep(node: str, gpu: int, gone: tuple[str, ...], view: Cluster, worth: Worth) -> list[tuple[float, int, str]]:
    """What ends of those that sleep, those that have just `gone` to sleep too, would lose and free."""
    there = [(worth(one), view.takes(one)[0], one.name) for one in view.asleep_on_gpu(node, gpu)]
    return there + [
        (worth(one) * (1.0 - _ASLEEP_SHARE), view.models[one.model].asleep_bytes, one.name)
        for one in map(view.replica, gone)
    ]


def ends(replica: Replica, now: float) -> float:
    """Seconds until a busy replica should have done what it has."""
    if replica.state is State.STARTING:
        return left(max(replica.ready_at, replica.expected), replica.since, now)
    since = min((running.began for running in replica.requests), default=now)
    return left(replica.expected, since, now)


def left(due: float, since: float, now: float) -> float:
    """Seconds until something should be over. What is late is thought to take a share of its time once more: the longer
    it has taken already, the longer it still does."""
    return due - now if due > now else max(now - since, 0.0) * _LATE


def _cheapest(idle: list[tuple[float, int, str]], missing: int) -> tuple[tuple[str, ...], int, float]:
    """Of (worth, bytes, name), those that free `missing` bytes (or all): least worth for their size first, and none in
    vain. With the bytes that they free, and what they are worth."""
    gone: list[tuple[float, int, str]] = []
    freed = 0
    ranked = sorted([(value / size, name, value, size) for value, size, name in idle if size > 0])
    for _share, name, value, size in ranked:
        if freed >= missing:
            break
        gone.append((value, size, name))
        freed += size
    if len(gone) > 1:
        for one in sorted(gone, reverse=True):
            if freed - one[1] >= missing:
                gone.remove(one)
                freed -= one[1]
    return tuple([one[2] for one in gone]), freed, sum([one[0] for one in gone])


def _on_devices(chosen: list[_Device]) -> Room:
    ended = dict.fromkeys(name for device in chosen for name in device.end)
    slept = dict.fromkeys(name for device in chosen for name in device.sleep if name not in ended)
    blockers = dict.fromkeys(name for device in chosen for name in device.blockers)
    return Room(
        tuple(sorted(device.gpu for device in chosen)),
        (*(Eviction(name, "sleep") for name in slept), *(Eviction(name, "end") for name in ended)),
        sum(device.loss for device in chosen),
        max((device.wait for device in chosen), default=0.0),
        tuple(blockers),
    )


def _with_host(
    chosen: list[_Device], missing: int, node: str, view: Cluster, worth: Worth, now: float, wake: Replica | None
) -> Room | None:
    """The same with `missing` bytes of the host's memory: those that go may have to end, others that sleep as well."""
    room = _on_devices(chosen)
    replicas = [one for one in view.replicas_on(node) if wake is None or one.name != wake.name]
    slept = {eviction.replica for eviction in room.evict if eviction.to == "sleep"}
    gone = {eviction.replica for eviction in room.evict if eviction.to == "end"}
    sizes = {one.name: view.takes(one)[1] for one in replicas}
    missing -= sum(sizes.get(name, 0) for name in gone)
    idle = [(_more(one, slept, worth), sizes[one.name], one.name) for one in replicas if one.idle]
    ended, freed, lost = _cheapest([one for one in idle if one[2] not in gone], missing)
    missing -= freed
    wait, blockers = room.wait, dict.fromkeys(room.blockers)
    for end, name in sorted((ends(one, now), one.name) for one in replicas if not (one.idle or one.pinned)):
        if missing <= 0:
            break
        wait, missing = max(wait, end), missing - sizes[name]
        blockers[name] = None
    if missing > 0:
        return None
    both = dict.fromkeys((*sorted(slept), *sorted(gone), *ended))
    evict = [Eviction(name, "sleep" if name in slept and name not in ended else "end") for name in both]
    host_short = len(blockers) > len(room.blockers)
    return Room(room.gpus, tuple(evict), room.loss + lost, wait, tuple(blockers), host_short)


def _more(replica: Replica, slept: set[str], worth: Worth) -> float:
    """What ending it loses beyond what it loses anyway."""
    return worth(replica) * (1.0 - _ASLEEP_SHARE if replica.name in slept else 1.0)
