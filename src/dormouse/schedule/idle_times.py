"""How long models stay idle between requests: histograms, and what they say about the next request.

each idle time that ended -> bins -> how likely the next request comes in each bin, given that it has not come yet
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

_LARGE = 1e9


def log_edges(first: float, last: float, per_doubling: int) -> tuple[float, ...]:
    """Borders of bins that grow with time: 0, `first`, and on to `last`."""
    edges, step = [0.0, first], 2.0 ** (1.0 / per_doubling)
    while edges[-1] < last:
        edges.append(edges[-1] * step)
    return tuple(edges)


@dataclass(slots=True)
class Bins:
    """Counts of idle times between `edges`; the last count is of those beyond. With `fade` < 1 older ones count less
    (each new one counts more, rather, so that adding one is cheap)."""

    edges: tuple[float, ...]
    fade: float = 1.0
    counts: list[float] = field(default_factory=list)
    total: float = 0.0
    unit: float = 1.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0.0] * len(self.edges)

    def add(self, idle: float) -> None:
        self.unit /= self.fade
        self.counts[bisect_right(self.edges, idle) - 1] += self.unit
        self.total += self.unit
        if self.unit > _LARGE:
            self.counts = [count / self.unit for count in self.counts]
            self.total, self.unit = self.total / self.unit, 1.0

    @property
    def weight(self) -> float:
        """How many recent idle times it stands for."""
        return self.total / self.unit

    @property
    def beyond(self) -> float:
        """The share of idle times that were longer than the last border."""
        return self.counts[-1] / self.total if self.total else 0.0

    def bin_at(self, share: float) -> int:
        """The first bin by whose end at least that share of those within the borders has come."""
        wanted, so_far = share * (self.total - self.counts[-1]), 0.0
        for number, count in enumerate(self.counts[:-1]):
            so_far += count
            if so_far >= wanted and count > 0.0:
                return number
        return len(self.counts) - 2

    def variation(self) -> float:
        """Coefficient of variation of the counts: low when the idle times are spread evenly, so tell nothing."""
        inner = self.counts[:-1]
        mean = sum(inner) / len(inner)
        if mean == 0.0:
            return 0.0
        return float((sum((count - mean) ** 2 for count in inner) / len(inner)) ** 0.5 / mean)


@dataclass(frozen=True, slots=True)
class Outlook:
    """Of the idle time that has begun: the chance that it ends in each bin, and the seconds it is expected to last
    there."""

    edges: tuple[float, ...]
    chance: tuple[float, ...]
    lasts: tuple[float, ...]
    reached: tuple[float, ...]  # the chance that it lasts at least to the bin's begin

    def ends_within(self, age: float, until: float) -> float:
        """The chance that it ends before `until`, given that it has lasted for `age`."""
        there = self._survival(age)
        return (there - self._survival(until)) / there if there > 1e-9 else 0.0

    def _survival(self, age: float) -> float:
        number = bisect_right(self.edges, age) - 1
        if number >= len(self.chance):
            return self.reached[-1]
        width = self.edges[number + 1] - self.edges[number]
        return self.reached[number] - self.chance[number] * (age - self.edges[number]) / width


def outlook(own: Bins, others: Bins, prior: float) -> Outlook:
    """From a model's own idle times, and as many as `prior` of those that all models have."""
    share = min(prior, others.weight) / others.total if others.total else 0.0
    counts = [mine / own.unit + share * one for mine, one in zip(own.counts, others.counts, strict=True)]
    total = sum(counts)
    if total <= 0.0:
        counts, total = [1.0] * len(counts), float(len(counts))
    chance = [count / total for count in counts[:-1]]
    reached, left = [], 1.0
    for one in chance:
        reached.append(left)
        left -= one
    lasts = _lasts(own.edges, chance, reached)
    return Outlook(own.edges, tuple(chance), tuple(lasts), (*reached, max(left, 0.0)))


def _lasts(edges: Sequence[float], chance: Sequence[float], reached: Sequence[float]) -> list[float]:
    """Those that end in a bin do so in its middle, on average."""
    widths = [after - before for before, after in pairwise(edges)]
    return [width * (there - one / 2) for width, one, there in zip(widths, chance, reached, strict=True)]
