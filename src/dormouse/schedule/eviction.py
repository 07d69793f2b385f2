"""Which idle replicas must sleep so that another can start within the memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
    """`fits`: there is room now. Else put `evict` to sleep and ask again when something has changed."""

    fits: bool
    evict: tuple[str, ...] = ()


def plan_eviction(residents: Sequence[Resident], *, needed: int, budget: int) -> Plan:
    """Make room for `needed` bytes: least recently used first, no more of them than it takes, and none at all when
    even all of them would not be enough (their users would pay and nobody would gain)."""
    missing = sum(resident.bytes for resident in residents) + needed - budget
    if missing <= 0:
        return Plan(fits=True)
    missing -= sum(resident.bytes for resident in residents if resident.leaving)
    idle = [resident for resident in residents if resident.idle_since is not None and not resident.leaving]
    if missing > sum(resident.bytes for resident in idle):
        return Plan(fits=False)
    evict: list[str] = []
    for resident in sorted(idle, key=lambda resident: (resident.idle_since or 0.0, resident.name)):
        if missing <= 0:
            break
        evict.append(resident.name)
        missing -= resident.bytes
    return Plan(fits=False, evict=tuple(evict))
