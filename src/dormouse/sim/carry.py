"""Carries out what schedule/ has decided: who goes, and what starts.

Option -> evict, begin -> World
"""

from __future__ import annotations

from dormouse.schedule.place import Option
from dormouse.sim.worker import Worker
from dormouse.sim.world import World


def evict(world: World, option: Option) -> None:
    """Those go that an option needs to go."""
    for eviction in option.evict:
        worker = world.workers[eviction.replica]
        world.counts.evictions += 1
        if eviction.to == "sleep":
            world.doze(worker)
        else:
            world.end(worker)


def begin(world: World, model: str, option: Option) -> Worker:
    """The start that an option is: a replica wakes, or there is a new one."""
    if option.replica is None:
        return world.start(world.view.model(model), option.node, option.gpus, option.path, option.estimate.mean)
    worker = world.workers[option.replica]
    world.wake(worker, option.estimate.mean)
    return worker
