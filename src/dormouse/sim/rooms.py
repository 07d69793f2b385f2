"""Where on a node a replica fits, and which idle ones would have to go for it."""

from __future__ import annotations

from dataclasses import dataclass

from dormouse.schedule.cluster import Cluster, ModelCost, Replica


@dataclass(frozen=True, slots=True)
class Room:
    gpus: tuple[int, ...]
    victims: tuple[str, ...] = ()


def room_on(view: Cluster, node: str, model: ModelCost, *, evict: bool) -> Room | None:
    """The fullest GPUs that have room; when none have, those where the longest idle replicas go for it."""
    free = view.free(node)
    need = model.device_bytes
    enough_host = view.free_host(node) >= model.host_bytes
    fits = [gpu for gpu, there in enumerate(free) if there >= need]
    if enough_host and len(fits) >= model.gpus:
        fits.sort(key=lambda gpu: (free[gpu], gpu))
        return Room(tuple(sorted(fits[: model.gpus])))
    return _by_eviction(view, node, model) if evict else None


def _by_eviction(view: Cluster, node: str, model: ModelCost) -> Room | None:
    idle = sorted((one for one in view.replicas_on(node) if one.idle), key=lambda one: (one.since, one.name))
    free, host = list(view.free(node)), view.free_host(node)
    gone: list[Replica] = []
    for replica in idle:
        device, of_host = view.takes(replica)
        for gpu in replica.gpus:
            free[gpu] += device
        host += of_host
        gone.append(replica)
        fits = [gpu for gpu, there in enumerate(free) if there >= model.device_bytes]
        if host >= model.host_bytes and len(fits) >= model.gpus:
            fits.sort(key=lambda gpu: (-free[gpu], gpu))
            gpus = tuple(sorted(fits[: model.gpus]))
            return Room(gpus, _needed(view, node, model, gpus, gone))
    return None


def _needed(view: Cluster, node: str, model: ModelCost, gpus: tuple[int, ...], gone: list[Replica]) -> tuple[str, ...]:
    """Of those that could go, the ones that must."""
    kept = list(gone)
    free, host = list(view.free(node)), view.free_host(node)
    for replica in gone:
        device, of_host = view.takes(replica)
        host += of_host
        for gpu in replica.gpus:
            free[gpu] += device
    for replica in reversed(gone):
        device, of_host = view.takes(replica)
        after = {gpu: free[gpu] - (device if gpu in replica.gpus else 0) for gpu in gpus}
        if host - of_host >= model.host_bytes and all(there >= model.device_bytes for there in after.values()):
            kept.remove(replica)
            host -= of_host
            for gpu in replica.gpus:
                free[gpu] -= device
    return tuple(one.name for one in kept)
