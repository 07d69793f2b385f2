"""How many replicas the models of this host have that may have several: the autoscaler of schedule/, carried out.

    requests that run or wait, at every change -> Autoscaler -> replicas that start ahead of requests, idle ones that go

It decides on the replicas beyond the first: whether that one stays is the keep-alive policy's to say, which may end the
others sooner, too. What requests that wait need at once, placement starts without being told (placing.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dormouse.config import ModelConfig
from dormouse.node.crew import Crew
from dormouse.schedule.autoscale import Autoscaler, Scaling

_TICK = 2.0
"""Seconds between two looks at a model, as Knative has it."""


def rules_of(settings: ModelConfig) -> Scaling:
    """What the configuration says of a model's replicas."""
    given = settings.scaling.model_dump(exclude_none=True)
    return Scaling(**{"target": float(settings.max_concurrent), **given}, max_replicas=settings.max_replicas)


@dataclass
class _Scaled:
    crew: Crew
    scaler: Autoscaler
    asked: int = 0
    tick: asyncio.TimerHandle | None = field(default=None)


class ReplicaScaling:
    """For one node, on its event loop. `asked` says how many requests of a model run or wait; `start` makes one more
    replica ready, by the right of others' room or not, and says whether there is a place for it, `give_up` ends up to
    so many such starts that have no room yet after all; `standing` is how many stay whatever comes."""

    def __init__(
        self,
        crews: Mapping[str, Crew],
        *,
        asked: Callable[[str], int],
        start: Callable[[Crew, bool], bool],
        give_up: Callable[[Crew, int], None],
        standing: Callable[[str], int],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._asked = asked
        self._start = start
        self._give_up = give_up
        self._standing = standing
        several = (crew for crew in crews.values() if len(crew.runners) > 1)
        self._scaled = [_Scaled(crew, Autoscaler(rules_of(crew.settings))) for crew in several]

    def changed(self) -> None:
        """Something of some replica or of its requests has."""
        for one in self._scaled:
            asked = self._asked(one.crew.name)
            if asked != one.asked:
                more, one.asked = asked > one.asked, asked
                one.scaler.record(self._loop.time(), asked)
                if more:
                    self._look_soon(one, 0.0)
            if one.crew.awake:
                self._look_soon(one, _TICK)

    def close(self) -> None:
        """No more."""
        for one in self._scaled:
            if one.tick is not None:
                one.tick.cancel()
        self._scaled = []

    def _look_soon(self, one: _Scaled, seconds: float) -> None:
        when = self._loop.time() + seconds
        if one.tick is not None:
            if one.tick.when() <= when:
                return
            one.tick.cancel()
        one.tick = self._loop.call_at(when, self._look, one)

    def _look(self, one: _Scaled) -> None:
        one.tick = None
        crew, now = one.crew, self._loop.time()
        back = sum(runner.replica.leaving and runner.replica.waiting > 0 for runner in crew)  # soon
        awake = len(crew.awake) + back
        wanted = one.scaler.wanted(now, awake).replicas
        if one.asked and now >= crew.held_off_until:  # what keep-alive lets go while nobody asks stays away
            for ahead in range(awake, wanted):
                if not self._start(crew, one.asked > ahead * one.crew.runners[0].slots):
                    break
        self._let_go(crew, awake - max(wanted, self._standing(crew.name), 1))
        if crew.awake:
            self._look_soon(one, _TICK)

    def _let_go(self, crew: Crew, count: int) -> None:
        """Those that have no room yet do not start; those that are idle longest sleep, and their processes may stay."""
        if count > 0:
            self._give_up(crew, count)
        idle = [runner for runner in crew.ready if runner.replica.idle_since is not None and not runner.pinned]
        idle.sort(key=lambda runner: runner.replica.idle_since or 0.0)
        for runner in idle[: max(count, 0)]:
            runner.press(keep=True)
