"""How long idle models stay here, and what is made ready ahead: the policy of schedule/ that the configuration names.

    a replica became idle -> Policy.on_idle -> Steps -> Stay (for the replica), a time to let its weights go
    next_prewarm, provisioned models -> start(model), on free memory or by the right of others' room

Policies count in seconds of Unix time (`clock`), so that a time of the day means something; replicas in the event
loop's. Nothing here reads or waits.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dormouse.config import KeepAlivePolicy, ModelConfig, ServeConfig, parse_times
from dormouse.node.replica import Stay
from dormouse.schedule.cluster import Cluster, Replica
from dormouse.schedule.estimate import Estimator
from dormouse.schedule.keepalive import (
    Basic,
    Expected,
    FixedTtl,
    GreedyDual,
    Histogram,
    Layered,
    Lru,
    Minimum,
    Provisioned,
    Step,
    Steps,
)

_RETRY = 60.0  # a provisioned model that is not there is started anew as often
_SOONEST = 0.01


class PerModel(FixedTtl):
    """`fixed`: each model stays ready for its own `keep_alive`; then its process stays until its room is needed."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        super().__init__()
        self._seconds = seconds

    def on_idle(self, replica: Replica, view: Cluster, now: float) -> Steps:
        return (Step("sleep", now + self._seconds[replica.model]),)


def make_policy(config: ServeConfig, estimator: Estimator) -> Provisioned:
    """The one the configuration names, with the models that are provisioned."""
    seconds = {name: settings.keep_alive for name, settings in config.models.items()}
    made: dict[KeepAlivePolicy, Callable[[], Basic]] = {
        "fixed": lambda: PerModel(seconds),
        "lru": Lru,
        "greedy-dual": lambda: GreedyDual(estimator),
        "histogram": Histogram,
        "layered": lambda: Layered(estimator),
        "expected": lambda: Expected(estimator),
    }
    minima = {name: _minima(settings) for name, settings in config.models.items() if settings.provisioned}
    return Provisioned(made[config.keep_alive_policy](), minima)


def _minima(settings: ModelConfig) -> tuple[Minimum, ...]:
    if isinstance(settings.provisioned, int):  # true is 1
        return (Minimum(int(settings.provisioned)),)
    return tuple(Minimum(1, *parse_times(times)) for times in settings.provisioned)


@dataclass(frozen=True)
class Hooks:
    """What keeping does to the node: `view` shows it as it is, `start` makes one more replica of a model ready (with
    the right to others' room, or only if that takes nobody's), `let_go` frees weights in memory, `replan` has a
    model's idle replicas ask anew."""

    view: Callable[[], Cluster]
    start: Callable[[str, bool], None]
    let_go: Callable[[str], None]
    replan: Callable[[str], None]


class Keeping:
    """For one node, on its event loop."""

    def __init__(self, config: ServeConfig, estimator: Estimator, clock: Callable[[], float], hooks: Hooks) -> None:
        self.policy = make_policy(config, estimator)
        self.name = config.keep_alive_policy
        self._forever = {name for name, one in config.models.items() if math.isinf(one.keep_alive)}
        self._provisioned = tuple(name for name, one in config.models.items() if one.provisioned)
        self._clock = clock
        self._hooks = hooks
        self._loop = asyncio.get_running_loop()
        self._asked: dict[str, int] = {}
        self._steps: dict[str, Steps] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._closed = False

    # Told by the node

    def requested(self, model: str) -> None:
        """Somebody asks for it."""
        self._asked[model] = self._asked.get(model, 0) + 1
        self.policy.on_request(model, self._clock())

    def stay(self, name: str, model: str, *, pinned: bool) -> Stay:
        """A replica is idle from now on: for how long. `pinned`: it stays ready (`standing`)."""
        now, view = self._clock(), self._hooks.view()
        steps = self.policy.on_idle(view.replica(name), view, now)
        self._steps[name] = () if pinned else steps
        self._look_ahead()
        if pinned:
            return Stay()
        self._plan_end(model, steps)
        return as_stay(steps, self._loop.time() - now)

    def starting(self, model: str, evicted: Sequence[str]) -> None:
        """It starts or wakes for a request, and those replicas give up what they have for it."""
        view = self._hooks.view()
        self.policy.on_start(model, [view.replica(name) for name in evicted if name in view], self._clock())

    def gone(self, name: str) -> None:
        """A replica's process is about to be no more."""
        view = self._hooks.view()
        if name in view:
            self.policy.on_gone(view.replica(name), view, self._clock())

    def standing(self, model: str) -> int:
        """How many of its replicas that are ready stay so whatever the memory is needed for."""
        return max(self.policy.least(model, self._clock()), int(model in self._forever))

    def worth(self, view: Cluster) -> Callable[[Replica], float]:
        """What idle replicas are worth now."""
        now = self._clock()
        return lambda replica: self.policy.worth(replica, view, now)

    def next_step(self, name: str, *, asleep: bool) -> Step | None:
        """What an idle replica steps down to next, ready or with its process asleep."""
        now = self._clock()
        below = [step for step in self._steps.get(name, ()) if not (asleep and step.to == "sleep")]
        ahead = [step for step in below if step.at > now and math.isfinite(step.at)]
        return min(ahead, key=lambda step: step.at, default=None)

    def why(self, model: str) -> str:
        """In words, why it stays or goes."""
        if model in self._forever:
            return "kept forever"
        if self.policy.least(model, self._clock()) > 0:
            return "provisioned"
        return f"policy {self.name}"

    # By itself

    def begin(self) -> None:
        """Start what is provisioned, now and whenever it must be."""
        if self._provisioned and not self._closed:
            for model, count in self.policy.missing(self._hooks.view(), self._clock()).items():
                for _ in range(count):
                    self._hooks.start(model, True)
            now = self._clock()
            self._at("provisioned", min(now + _RETRY, self.policy.next_border(now)) + _SOONEST, self._border)

    def close(self) -> None:
        """No more."""
        self._closed = True
        for timer in self._timers.values():
            timer.cancel()

    def _border(self) -> None:
        for model in self._provisioned:
            self._hooks.replan(model)
        self.begin()

    def _plan_end(self, model: str, steps: Steps) -> None:
        """When its weights need not be kept in memory any more."""
        end = next((step.at for step in steps if step.to == "nothing" and math.isfinite(step.at)), None)
        asked = self._asked.get(model, 0)

        def let_go() -> None:
            if self._asked.get(model, 0) == asked:
                self._hooks.let_go(model)

        if end is not None:
            self._at(f"nothing {model}", end, let_go)

    def _look_ahead(self) -> None:
        following = self.policy.next_prewarm()
        if following is not None:
            self._at("prewarm", following, self._prewarm)

    def _prewarm(self) -> None:
        for warm in self.policy.prewarm(self._clock()):
            self._hooks.start(warm.model, False)
        self._look_ahead()

    def _at(self, what: str, when: float, then: Callable[[], None]) -> None:
        if (timer := self._timers.pop(what, None)) is not None:
            timer.cancel()
        if not self._closed:
            self._timers[what] = self._loop.call_later(max(when - self._clock(), _SOONEST), then)


def as_stay(steps: Steps, shift: float) -> Stay:
    """The times of the first step, and of the one that ends the process; `shift` leads to the replica's clock."""
    hot = min((step.at for step in steps), default=math.inf)
    doze = min((step.at for step in steps if step.to in ("snapshot", "nothing")), default=math.inf)
    return Stay(hot + shift, doze + shift)
