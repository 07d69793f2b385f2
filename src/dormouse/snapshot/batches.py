"""How work is cut for the hands: neighbours go together, for each batch costs something beside its bytes; but every
hand is to get several, and all are to end together. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

MOST_ITEMS = 32
"""Items of a batch at most, so that what is said of one always fits into a packet."""

_LEAST = 1 << 20
_BATCHES_PER_HAND = 8
_LEFT_PER_HAND = 2

Item = TypeVar("Item")


def even(total: int, hands: int, most: int) -> int:
    """How many bytes each batch is to have when all are equal: so many that each costs little, so few that all hands
    end together."""
    return max(_LEAST, min(most, total // (hands * _BATCHES_PER_HAND)))


def shrinking(left: int, hands: int, most: int) -> int:
    """How many bytes the next batch is to have when so many are left: at the end ever fewer, for one may take many
    times as long as another."""
    return max(_LEAST, min(most, left // (hands * _LEFT_PER_HAND)))


def batches(items: Iterable[Item], size: Callable[[Item], int], limit: Callable[[int], int]) -> Iterator[list[Item]]:
    """All items in their order, neighbours together up to `limit` bytes, which is asked with what earlier batches have
    in all; a larger item is alone."""
    batch: list[Item] = []
    given = held = 0
    room = limit(given)
    for item in items:
        if batch and (held + size(item) > room or len(batch) == MOST_ITEMS):
            yield batch
            given += held
            batch, held, room = [], 0, limit(given)
        batch.append(item)
        held += size(item)
    if batch:
        yield batch
