"""Whether the process of a model that falls asleep stays in memory, and which others go for it.

A process that dozes is a cache: it saves its model the restore. It is worth its memory as long as nobody else needs
that, so two limits hold: its share of the budget (`sleep_memory`), within which the newest displaces what has been of
least use, and the budget itself, in which it takes no room from anybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dormouse.schedule.eviction import Dozer, most_wasteful_first


@dataclass(frozen=True)
class Stay:
    """`keep` it, once `evict` have gone."""

    keep: bool
    evict: tuple[str, ...] = ()


def plan_dozing(own: int, dozers: Sequence[Dozer], *, limit: int, free: int, wanted: bool, now: float) -> Stay:
    """Whether a process of `own` bytes may doze. `limit` is what all that doze may take together, `free` what of the
    budget nobody uses (these own bytes not counted), `wanted` whether a model waits for room."""
    if wanted or own > limit or own > free:
        return Stay(keep=False)
    over = own + sum(dozer.bytes for dozer in dozers) - limit
    evict: list[str] = []
    for dozer in most_wasteful_first(dozers, now):
        if over <= 0:
            break
        evict.append(dozer.name)
        over -= dozer.bytes
    return Stay(keep=True, evict=tuple(evict))
