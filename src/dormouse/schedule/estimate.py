"""How long a start would take, from what starts have taken.

    StartPlan + links as they are now -> Estimate
    Observed -> rates of links, phases of models -> the next Estimate

A start is weights that move while a process comes back, then what follows both (cluster.StartPlan). Bytes take
(queued ahead + size) / rate on the slowest link of their way. Rates are learned for each link of each node, what moves
over it and the path of the start (weights are decoded as they come, beside imports or CRIU, which is fed an image);
phases for each (model, path, kind of node, tiers that bytes come from); a model that has never started so takes its
engine's. All are medians of the last samples: an outlier, or a third of them, moves nothing; a lasting change is
followed after a few starts.

Besides, machines wander: for a while all starts of a node, whatever their model and path, take longer or shorter than
usual (other work on it, neighbours of a virtual machine). That is its `Pace`: estimates are multiplied by it, and what
is learned of a start is what it would have taken at the usual one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import exp, log
from statistics import median
from typing import Any

from dormouse.schedule.cluster import (
    SOURCE_LINK,
    Artifact,
    Cluster,
    ModelCost,
    Move,
    Moved,
    PhaseName,
    StartPath,
    StartPlan,
    Tier,
    share,
)

_WINDOW = 32
_RUN = 6  # so many samples in a row on the same side, far away, are no outliers but a change
_FAR = 4.0  # median absolute deviations
_LEAST_FAR = 0.1  # of the median; below, it is noise whatever the deviation says
_ERRORS = 512
_UNKNOWN_SPREAD = 0.3  # p95 over mean, minus one, before there are starts to tell
_ENOUGH_ERRORS = 8
_FOLLOWED = 0.5  # of what the latest start was off its node's pace
_USUAL = 0.2  # of a pace is lost with each start: one that lasts becomes what is usual
_DISTURBED = log(1.5)  # so far off, a start says nothing of the next
_TOO_SHORT = 0.05  # seconds: such starts vary by more than a node's pace
_WEIGHT_KEPT = 0.98  # with each start, of what earlier ones count in how far their node's pace is trusted
_FIRST_TRUST, _FIRST_WEIGHT = 0.5, 0.01  # as if a start had been 10 % off
_GUESSED_START = 1.0
_GUESSED_RATE = 2e9


@dataclass(frozen=True, slots=True)
class Estimate:
    """`parts` are the steps of the critical path, in order; they add up to `mean`. `pace` is what the node's pace has
    been multiplied into all of them."""

    mean: float
    p95: float
    parts: tuple[tuple[str, float], ...]
    pace: float = 1.0


@dataclass(frozen=True, slots=True)
class Transferred:
    """A move that happened: `ahead` is what `Link.ahead` said of the slowest link when it began, and what was `shared`
    with the start's other move. Who can tell the links of a way apart gives one of these for each of them, with `size`
    its share."""

    name: Moved
    links: tuple[str, ...]
    size: int
    seconds: float
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class Observed:
    """A start that happened. `predicted` is the mean that was estimated when it was decided, for the statistics, and
    `pace` the node's in it; without one, nothing is learned of that. `sources` are the tiers that its bytes
    came from (`sources(plan)`)."""

    model: str
    engine: str
    node: str
    path: StartPath
    seconds: float
    transfers: tuple[Transferred, ...] = ()
    phases: tuple[tuple[PhaseName, float], ...] = ()
    predicted: float | None = None
    kind: str = ""  # of the node
    sources: str = ""
    pace: float | None = None


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors |predicted - seconds| / seconds of the last starts."""

    count: int
    median: float
    p99: float


def sources(plan: StartPlan) -> str:
    """Where the bytes of a start come from, in words: "nothing" moves, or such as "weights disk"."""
    moves = (move for move in (plan.weights, plan.image) if move is not None)
    return ", ".join(f"{move.name} {move.source.name.lower()}" for move in moves) or "nothing"


def shared(beside: Move | None, link: str, size: int) -> int:
    """The bytes of another move of the same start that go over a link between `size` of one, if it comes from there,
    too: each has half of it."""
    return min(beside.size_on(link), size) if beside is not None and beside.links[0] == link else 0


class Median:
    """A running median that follows a lasting change."""

    __slots__ = ("_samples", "value")

    def __init__(self, samples: Iterable[float] = ()) -> None:
        self._samples: deque[float] = deque(samples, maxlen=_WINDOW)
        self.value = median(self._samples) if self._samples else 0.0

    @property
    def samples(self) -> list[float]:
        """Those that it is the median of, the oldest first."""
        return list(self._samples)

    def add(self, sample: float) -> None:
        self._samples.append(sample)
        if len(self._samples) > _RUN and self._changed():
            self._samples = deque(list(self._samples)[-_RUN:], maxlen=_WINDOW)
        self.value = median(self._samples)

    def _changed(self) -> bool:
        older = list(self._samples)[:-_RUN]
        newer = list(self._samples)[-_RUN:]
        middle = median(older)
        far = max(_FAR * median(abs(one - middle) for one in older), _LEAST_FAR * middle)
        return min(newer) > middle + far or max(newer) < middle - far


class Pace:
    """How much longer all starts of a node take at present than usual: by how much the latest were off, as far as that
    has foretold the next one so far (a regression: where starts differ by chance alone, it is not trusted)."""

    __slots__ = ("_lately", "_moments", "_squares")

    def __init__(self) -> None:
        self._lately = 0.0  # all logarithms
        self._squares = _FIRST_WEIGHT
        self._moments = _FIRST_WEIGHT * _FIRST_TRUST

    @property
    def value(self) -> float:
        """What usual seconds are to be multiplied by."""
        return exp(self._lately * min(max(self._moments / self._squares, 0.0), 1.0))

    def add(self, usual: float, seconds: float) -> None:
        """A start that would usually have taken so long took so many seconds."""
        off = log(seconds / usual) if min(usual, seconds) >= _TOO_SHORT else _DISTURBED
        if abs(off) >= _DISTURBED:
            return
        self._moments = _WEIGHT_KEPT * self._moments + self._lately * off
        self._squares = _WEIGHT_KEPT * self._squares + self._lately**2
        self._lately = (1.0 - _USUAL) * (self._lately + _FOLLOWED * (off - self._lately))


class _Errors:
    """The last relative errors, signed (positive: it took longer than predicted), and sorted by size."""

    def __init__(self) -> None:
        self._order: deque[tuple[float, float]] = deque()
        self._signed: list[float] = []
        self._sizes: list[float] = []

    def add(self, predicted: float, seconds: float) -> None:
        if len(self._order) == _ERRORS:
            signed, size = self._order.popleft()
            del self._signed[bisect_left(self._signed, signed)]
            del self._sizes[bisect_left(self._sizes, size)]
        signed = (seconds - predicted) / max(predicted, 1e-6)
        size = abs(seconds - predicted) / max(seconds, 1e-6)
        self._order.append((signed, size))
        insort(self._signed, signed)
        insort(self._sizes, size)

    def spread(self) -> float:
        """How much more than the mean the 95th percentile is, as a share of the mean."""
        if len(self._signed) < _ENOUGH_ERRORS:
            return _UNKNOWN_SPREAD
        return max(_quantile(self._signed, 0.95), 0.0)

    def summary(self) -> Errors:
        return Errors(len(self._sizes), _quantile(self._sizes, 0.5), _quantile(self._sizes, 0.99))


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


class Estimator:
    """What has been learned so far. `observe` is all that changes it."""

    def __init__(self) -> None:
        self._per_byte: dict[tuple[str, str], dict[tuple[str, str], Median]] = {}  # of each link, by (what, path)
        self._phases: dict[tuple[str, str, str, str, str], Median] = {}
        self._returns: dict[str, Median] = {}
        self._errors: dict[str, _Errors] = {"": _Errors()}
        self._paces: dict[str, Pace] = {}

    def estimate(self, model: ModelCost, node: str, plan: StartPlan, view: Cluster) -> Estimate:
        """A start by `plan` that begins now."""
        pace = self.pace(node)
        parts = tuple((name, pace * seconds) for name, seconds in self._critical(model, node, plan, view))
        mean = sum(seconds for _name, seconds in parts)
        return Estimate(mean, mean * (1.0 + self.spread(plan.path)), parts, pace)

    def pace(self, node: str) -> float:
        """How many times as long as usual its starts take at present."""
        pace = self._paces.get(node)
        return pace.value if pace else 1.0

    def spread(self, path: StartPath) -> float:
        """How much more than the mean the 95th percentile is, as a share of the mean."""
        errors = self._errors.get(path)
        return errors.spread() if errors else _UNKNOWN_SPREAD

    def move_seconds(
        self, node: str, move: Move, view: Cluster, path: StartPath | None = None, beside: Move | None = None
    ) -> float:
        """How long the slowest link of its way takes for it in a start by `path`, with what goes before it, and what
        moves `beside` it."""
        moves = max(self._seconds_on(node, link, move, view, path, beside) for link in move.links)
        return moves + (self._left_seconds(node, *move.behind, view) if move.behind else 0.0)

    def _seconds_on(
        self, node: str, name: str, move: Move, view: Cluster, path: StartPath | None, beside: Move | None
    ) -> float:
        link, size = view.link(node, name), move.size_on(name)
        total = link.ahead(size) + shared(beside, name, size) + size
        return total / self.rate(node, name, link.rate, move.name, path)

    def fetch_seconds(self, artifact: Artifact, node: str, tier: Tier, view: Cluster) -> float:
        """How long until an artifact, which is nearest in `tier`, is in a node's memory at the soonest."""
        behind = view.arriving(artifact.key, node)
        if behind:
            return self._left_seconds(node, *behind, view)
        source = SOURCE_LINK.get(tier)
        return self.link_seconds(node, source, artifact.coded_bytes, view) if source else 0.0

    def _left_seconds(self, node: str, name: str, left: int, view: Cluster) -> float:
        """How long one that is under way on a link still takes."""
        link = view.link(node, name)
        return link.ahead(left) / self.rate(node, name, link.rate)

    def link_seconds(self, node: str, name: str, size: int, view: Cluster) -> float:
        """How long one link takes for so many bytes of weights more."""
        link = view.link(node, name)
        return (link.ahead(size) + size) / self.rate(node, name, link.rate)

    def rate(
        self, node: str, link: str, declared: float, what: Moved = "weights", path: StartPath | None = None
    ) -> float:
        """Bytes a second, as learned for what moves in starts by `path`, or in any, or else as declared."""
        learned = self._per_byte.get((node, link), {})
        found = learned.get((what, path or "")) or learned.get((what, ""))
        return 1.0 / found.value if found else declared

    def phase_seconds(self, model: ModelCost, path: StartPath, name: str, kind: str, origin: str = "") -> float:
        """The model's own, or its engine's, or what was guessed for it; of starts whose bytes came from the same
        `origin` if there were any, else of all."""
        for who in (model.name, "engine " + model.engine):
            for one in (origin, "") if origin else ("",):
                learned = self._phases.get((who, path, name, kind, one))
                if learned:
                    return learned.value
        return next((guess for phase, guess in model.phases.get(path, {}).items() if phase == name), 0.0)

    def return_seconds(self, model: ModelCost) -> float:
        """What its starts without a process take as a rule, wherever: the worth of a replica that is there."""
        learned = self._returns.get(model.name)
        if learned:
            return learned.value
        return _GUESSED_START + model.weights.coded_bytes / _GUESSED_RATE

    def observe(self, started: Observed, view: Cluster) -> None:
        """Learn from a start. `view` knows the declared rates of the links that its bytes came over."""
        first = (started.model, started.path, "rest", started.kind, started.sources) not in self._phases
        self._learn(_at_usual_pace(started), view)
        if started.predicted is None:
            return
        for key in ("", started.path):
            self._errors.setdefault(key, _Errors()).add(started.predicted, started.seconds)
        if started.pace is not None and not first:
            self._paces.setdefault(started.node, Pace()).add(started.predicted / started.pace, started.seconds)

    def _learn(self, started: Observed, view: Cluster) -> None:
        for transfer in started.transfers:
            self._learn_rate(started, transfer, view)
        for name, seconds in started.phases:
            self._learn_phase(started, name, seconds)
        self._learn_phase(started, "rest", max(started.seconds - _accounted(started), 0.0))
        if started.path not in ("hot", "sleep"):
            self._returns.setdefault(started.model, Median()).add(started.seconds)

    def saved(self) -> dict[str, list[list[Any]]]:
        """What it has learned (not its errors), for JSON."""
        return {
            "rates": [
                [*key, *kind, one.samples] for key, kinds in self._per_byte.items() for kind, one in kinds.items()
            ],
            "phases": [[*key, one.samples] for key, one in self._phases.items()],
            "returns": [[model, one.samples] for model, one in self._returns.items()],
        }

    @classmethod
    def restored(cls, saved: Mapping[str, list[list[Any]]]) -> Estimator:
        """One that knows what another had `saved`."""
        found = cls()
        for node, link, what, path, samples in saved["rates"]:
            found._per_byte.setdefault((node, link), {})[what, path] = Median(samples)
        found._phases = {
            (who, path, name, kind, origin): Median(samples)
            for who, path, name, kind, origin, samples in saved["phases"]
        }
        found._returns = {model: Median(samples) for model, samples in saved["returns"]}
        return found

    def errors(self, path: StartPath | None = None) -> Errors:
        """Of one path, or of all."""
        return self._errors.get(path or "", _Errors()).summary()

    def _critical(self, model: ModelCost, node: str, plan: StartPlan, view: Cluster) -> list[tuple[str, float]]:
        kind = view.node(node).kind
        process: list[tuple[str, float]] = []
        if plan.image:
            seconds = self.move_seconds(node, plan.image, view, plan.path, plan.weights)
            process.append((f"{plan.image.name} from {plan.image.source.name.lower()}", seconds))
        origin = sources(plan)
        process.append(("process", self.phase_seconds(model, plan.path, "process", kind, origin)))
        branch = process
        if plan.weights:
            weights = self.move_seconds(node, plan.weights, view, plan.path, plan.image)
            if weights > sum(seconds for _name, seconds in process):
                branch = [(f"weights from {plan.weights.source.name.lower()}", weights)]
        after = [(name, self.phase_seconds(model, plan.path, name, kind, origin)) for name in ("ready", "rest")]
        return [part for part in (*branch, *after) if part[1] > 0.0]

    def _learn_rate(self, started: Observed, transfer: Transferred, view: Cluster) -> None:
        """What is learned goes to the link of the way that is thought the slowest."""
        if transfer.size <= 0 or transfer.seconds <= 0.0 or not transfer.links:
            return
        link = max(transfer.links, key=lambda name: self._thought_seconds(started, name, transfer, view))
        carried = share(transfer.size, link, transfer.links) + transfer.ahead
        kinds = self._per_byte.setdefault((started.node, link), {})
        for path in (started.path, ""):
            kinds.setdefault((transfer.name, path), Median()).add(transfer.seconds / carried)

    def _thought_seconds(self, started: Observed, link: str, transfer: Transferred, view: Cluster) -> float:
        """What its share of a transfer takes on a link, as far as is known or declared."""
        size = share(transfer.size, link, transfer.links)
        declared = view.link(started.node, link).rate
        return size / self.rate(started.node, link, declared, transfer.name, started.path)

    def _learn_phase(self, started: Observed, name: str, seconds: float) -> None:
        for who in (started.model, "engine " + started.engine):
            for origin in {"", started.sources}:
                self._phases.setdefault((who, started.path, name, started.kind, origin), Median()).add(seconds)


def _accounted(started: Observed) -> float:
    """What the parts of a start explain of its seconds."""
    phases = dict(started.phases)
    took: dict[str, float] = {}
    for transfer in started.transfers:
        took[transfer.name] = max(took.get(transfer.name, 0.0), transfer.seconds)
    weights = took.pop("weights", 0.0)
    return max(weights, max(took.values(), default=0.0) + phases.get("process", 0.0)) + phases.get("ready", 0.0)


def _at_usual_pace(started: Observed) -> Observed:
    """What it would have taken, had its node not been slower or quicker than usual."""
    pace = started.pace
    if pace is None or pace == 1.0:
        return started
    return replace(
        started,
        seconds=started.seconds / pace,
        transfers=tuple(replace(one, seconds=one.seconds / pace) for one in started.transfers),
        phases=tuple((name, seconds / pace) for name, seconds in started.phases),
    )
