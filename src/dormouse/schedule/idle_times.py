"""How long models stay idle between requests: histograms, and what they say about the next request.

    requests, idle times that ended -> IdleTimes -> Outlook of one model: how soon it returns, given that it has not yet

What one model has shown is little, so it is joined with the shape that the idle times of all models have, measured by
how often each is asked for: bursts look alike, whether of a popular model or of a rare one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

_LARGE = 1e9
_FIRST, _LAST = 0.5, 86_400.0
_PER_DOUBLING = 2
_SHAPE_FADE = 0.999
_LEAST_SEEN = 60.0
_SHAPE_FIRST, _SHAPE_LAST = 2.0**-24, 2.0**20  # of the mean time between two requests for a model


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


class Outlook:
    """Of the idle time that has begun: in which bins it ends, as an index of how soon. The index at an age is the most
    that keeping something for the model from then on can bring: the chance that the next request comes until some time,
    by the seconds that it is expected to be kept until then, for the best such time (Gittins' index; where the chance
    per second only falls, it is that chance)."""

    __slots__ = ("_edges", "_index")

    def __init__(self, edges: Sequence[float], counts: Sequence[float]) -> None:
        self._edges = edges
        self._index = _indexes(edges, counts)

    def index(self, age: float) -> float:
        """Returns a second, given that it has not returned for `age`."""
        return self._index[bisect_right(self._edges, age) - 1]

    def until(self, least: float, age: float) -> float:
        """The age to which the index stays at `least` or above, from `age` on."""
        number = bisect_right(self._edges, age) - 1
        if self._index[number] < least:
            return age
        while number < len(self._index) and self._index[number] >= least:
            number += 1
        return self._edges[number] if number < len(self._index) else math.inf


def _indexes(edges: Sequence[float], counts: Sequence[float]) -> list[float]:
    """For each border the steepest way on in the plane of (seconds kept, chance that it has ended): the slope of the
    upper hull of the points after it, which is built from the end."""
    total = sum(counts) or 1.0
    kept, ended, left = [0.0], [0.0], 1.0
    for count, (begin, end) in zip(counts, pairwise(edges), strict=False):
        share = count / total
        kept.append(kept[-1] + (end - begin) * (left - share / 2))  # those that end in a bin do so in its middle
        ended.append(ended[-1] + share)
        left -= share

    def slope(begin: int, end: int) -> float:
        return (ended[end] - ended[begin]) / max(kept[end] - kept[begin], 1e-12)

    found = [0.0] * len(edges)
    hull = [len(edges) - 1]
    for number in range(len(edges) - 2, -1, -1):
        while len(hull) > 1 and slope(number, hull[-2]) >= slope(number, hull[-1]):
            hull.pop()
        found[number] = max(slope(number, hull[-1]), 0.0)
        hull.append(number)
    return found


class IdleTimes:
    """What is known of all models. `prior` is how many of its own idle times the common shape counts for; `memory` the
    seconds after which a request counts a third in how often a model is asked for."""

    def __init__(self, *, prior: float = 20.0, fade: float = 0.98, memory: float = 14_400.0) -> None:
        self._prior, self._fade, self._memory = prior, fade, memory
        self._edges = log_edges(_FIRST, _LAST, _PER_DOUBLING)
        self._shape = Bins(log_edges(_SHAPE_FIRST, _SHAPE_LAST, _PER_DOUBLING), _SHAPE_FADE)
        self._own: dict[str, Bins] = {}
        self._asked: dict[str, tuple[float, float]] = {}
        self._since: float | None = None
        self._outlooks: dict[str, Outlook] = {}

    def request(self, model: str, now: float) -> None:
        """Somebody asked for it."""
        if self._since is None:
            self._since = now
        count, last = self._asked.get(model, (0.0, now))
        self._asked[model] = (1.0 + count * math.exp((last - now) / self._memory), now)

    def ended(self, model: str, idle: float, now: float) -> None:
        """It had been idle for so long."""
        self._shape.add(idle * self.rate(model, now))
        self._own.setdefault(model, Bins(self._edges, self._fade)).add(idle)
        self._outlooks.pop(model, None)

    def rate(self, model: str, now: float) -> float:
        """Requests a second, lately."""
        count, last = self._asked.get(model, (0.0, now))
        seen = max(now - self._since, _LEAST_SEEN) if self._since is not None else _LEAST_SEEN
        count = max(count * math.exp((last - now) / self._memory), 0.5)
        return count / (self._memory * -math.expm1(-seen / self._memory))

    def outlook(self, model: str, now: float) -> Outlook:
        """As of its last idle time that ended."""
        found = self._outlooks.get(model)
        if found is None:
            own = self._own.get(model) or Bins(self._edges)
            counts = [count / own.unit for count in own.counts]
            common = self._common(self.rate(model, now))
            share = self._prior / (sum(common) or 1.0)
            both = [mine + share * one for mine, one in zip(counts, common, strict=True)]
            found = self._outlooks[model] = Outlook(self._edges, both if any(both) else common)
        return found

    def _common(self, rate: float) -> list[float]:
        """The idle times of all models at this one's rate; before anything is known, as if requests came by chance."""
        edges = self._edges
        if not self._shape.total:
            reached = [math.exp(-rate * edge) for edge in edges]
            return [*(before - after for before, after in pairwise(reached)), reached[-1]]
        counts = [0.0] * len(edges)
        shift = _PER_DOUBLING * math.log2(_SHAPE_FIRST / (rate * _FIRST))
        whole = math.floor(shift)
        part, last = shift - whole, len(edges) - 1
        for number, count in enumerate(self._shape.counts):
            if count:
                counts[min(max(number + whole, 0), last)] += count * (1.0 - part)
                counts[min(max(number + whole + 1, 0), last)] += count * part
        return counts
