"""What must go so that a model can start within the memory limits of this host.

    Standings, kept weights, bytes needed, the policy -> Way: it fits, or what goes first

What costs least to have again goes first: weights that no worker has mapped (they are read and decoded again), then
what is idle, asleep or ready, and worth least for its bytes to the keep-alive policy of schedule/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dormouse.node.forecast import HERE, Limits, Standing, with_needs
from dormouse.schedule.cluster import Cluster
from dormouse.schedule.keepalive import Need

Victims = Callable[[Need, Cluster], tuple[str, ...] | None]
"""`schedule.keepalive.Policy.victims`, now."""


@dataclass(frozen=True)
class Way:
    """`fits`: there is room now. Else free `weights`, put `evict` to sleep or end what dozes of it, and ask again once
    something has changed."""

    fits: bool
    weights: tuple[str, ...] = ()
    evict: tuple[str, ...] = ()


def find_way(
    own: Standing,
    others: Sequence[Standing],
    needed: int,
    kept: Mapping[str, int],
    limits: Limits,
    view: Callable[[Sequence[Standing]], Cluster],
    victims: Victims,
) -> Way:
    """Room for `needed` bytes of the host's memory, and for what `own` needs of its GPU. `kept` are weights in memory,
    the longest unused first; its own are part of what it needs. No more goes than it takes, and nothing at all when
    even everything would not be enough (its users would pay and nobody would gain)."""
    kept = {name: size for name, size in kept.items() if name != own.checkpoint}
    over = sum(one.host_bytes for one in others) + sum(kept.values()) + needed - limits.host
    if over <= 0 and _over_on_gpu(own, others, limits, own.needs_gpu) <= 0:
        return Way(fits=True)
    staying = [one for one in others if not one.leaving]
    going = victims(_need(own, staying, needed, limits), view([*staying, with_needs(own)]))
    if going is None:
        return Way(fits=False)
    freed = sum(one.host_bytes for one in others if one.leaving or one.name in going)
    return Way(fits=False, weights=first_of(kept, over - freed), evict=going)


def _need(own: Standing, others: Sequence[Standing], needed: int, limits: Limits) -> Need:
    """What is taken beyond the limits must be freed besides: a view has no less than nothing free."""
    beyond = max(sum(one.host_bytes for one in others) - limits.host, 0)
    beyond_gpu = max(_over_on_gpu(own, others, limits, 0), 0)
    return Need(HERE, own.gpus, own.needs_gpu + beyond_gpu, needed + beyond)


def _over_on_gpu(own: Standing, others: Sequence[Standing], limits: Limits, needed: int) -> int:
    """By how much the GPU's limit is passed with `needed` bytes more."""
    if own.gpu is None:
        return 0
    return sum(one.gpu_bytes for one in others if one.gpu == own.gpu) + needed - limits.gpus[own.gpu]


def first_of(sizes: Mapping[str, int], missing: int) -> tuple[str, ...]:
    """As many as it takes to have `missing` bytes, from the first on."""
    taken: list[str] = []
    for name, size in sizes.items():
        if missing <= 0:
            break
        taken.append(name)
        missing -= size
    return tuple(taken)
