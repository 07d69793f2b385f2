"""Whether the process of a model that falls asleep stays in memory, and which others go for it.

A process that dozes is a cache: it saves its model the restore. It is worth its memory as long as nobody else needs
that, so two limits hold: its share of the budget (`sleep_memory`), within which the newest displaces what has been of
least use, and the budget itself, in which it takes no room from anybody.
"""

from __future__ import annotations

from collections.abc import Sequence

from dormouse.schedule.eviction import Dozer, most_wasteful_first


def may_stay(own: int, *, limit: int, free: int, wanted: bool) -> bool:
    """Whether a process of `own` bytes may doze. `limit` is what all that doze may take together, `free` what of the
    budget nobody uses (these own bytes not counted), `wanted` whether a model waits for room."""
    return not wanted and own <= limit and own <= free


def displaced(dozers: Sequence[Dozer], *, limit: int, now: float) -> tuple[str, ...]:
    """Those that go, the least useful first, so that the others keep to the limit."""
    over = sum(dozer.bytes for dozer in dozers) - limit
    gone: list[str] = []
    for dozer in most_wasteful_first(dozers, now):
        if over <= 0:
            break
        gone.append(dozer.name)
        over -= dozer.bytes
    return tuple(gone)
