"""What must go so that a model can start within the memory budget.

    residents, kept weights, bytes needed -> Plan: it fits, or what goes first

What costs least to have again goes first: weights that no worker has mapped (they are read and decoded again), then
processes that doze (they come back by their snapshot), then idle models that are ready.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Dozer:
    """A process that dozes: what it takes, since when it does, and the seconds its model would take to start without
    it."""

    name: str
    bytes: int
    since: float
    cost_of_return: float

    def waste(self, now: float) -> float:
        """How much memory it has held for how long, for each second that it may save."""
        return self.bytes * max(now - self.since, 0.0) / max(self.cost_of_return, 1e-3)


@dataclass(frozen=True)
class Resident:
    """A replica that holds memory. `idle_since` is None while it may not be put to sleep (busy, starting, kept
    forever); `leaving` is true when it is on its way out already."""

    name: str
    bytes: int
    idle_since: float | None = None
    leaving: bool = False


@dataclass(frozen=True)
class Plan:
    """`fits`: there is room now. Else free `weights`, put `evict` to sleep (without their process), and ask again when
    something has changed."""

    fits: bool
    weights: tuple[str, ...] = ()
    evict: tuple[str, ...] = ()


def most_wasteful_first(dozers: Iterable[Dozer], now: float) -> list[Dozer]:
    """The order in which processes that doze should go: long unused, large, and cheap to have again first."""
    return sorted(dozers, key=lambda dozer: (-dozer.waste(now), dozer.name))


def plan_eviction(
    residents: Sequence[Resident],
    *,
    needed: int,
    budget: int,
    dozers: Sequence[Dozer] = (),
    weights: Mapping[str, int] | None = None,
    now: float = 0.0,
) -> Plan:
    """Make room for `needed` bytes: no more goes than it takes, and nothing at all when even everything would not be
    enough (its users would pay and nobody would gain). `weights` come in the order in which they were last used."""
    kept = weights or {}
    held = sum(resident.bytes for resident in residents) + sum(dozer.bytes for dozer in dozers) + sum(kept.values())
    missing = held + needed - budget
    if missing <= 0:
        return Plan(fits=True)
    missing -= sum(resident.bytes for resident in residents if resident.leaving)
    idle = [resident for resident in residents if resident.idle_since is not None and not resident.leaving]
    idle.sort(key=lambda resident: (resident.idle_since or 0.0, resident.name))
    there = [(resident.name, resident.bytes) for resident in idle]
    dozing = [(dozer.name, dozer.bytes) for dozer in most_wasteful_first(dozers, now)]
    if missing > sum(size for _name, size in (*kept.items(), *dozing, *there)):
        return Plan(fits=False)
    freed, missing = _take(list(kept.items()), missing)
    roused, missing = _take(dozing, missing)
    slept, _missing = _take(there, missing)
    return Plan(fits=False, weights=freed, evict=roused + slept)


def _take(candidates: Sequence[tuple[str, int]], missing: int) -> tuple[tuple[str, ...], int]:
    """As many as it takes, from the first on, and what is missing then."""
    taken: list[str] = []
    for name, size in candidates:
        if missing <= 0:
            break
        taken.append(name)
        missing -= size
    return tuple(taken), missing
