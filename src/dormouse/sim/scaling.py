"""How many replicas of each model there are, whatever requests alone would start.

    another Control, told of everything  ->  minima and autoscaler of schedule/  ->  starts without a request, pins
                                                                                 ->  idle ones that are let go

A model that is scaled has as many replicas ready as its autoscaler wants: what is more goes to sleep when it is idle
(and keep-alive says from then on what becomes of it), what lacks is started where `place_start` says. A minimum is
started, and pinned, at its borders. Both are looked at again every few seconds while there is anything to look at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dormouse.schedule.autoscale import Autoscaler, Scaling
from dormouse.schedule.cluster import Request, State
from dormouse.schedule.keepalive import Minima, standing
from dormouse.schedule.place import place_start
from dormouse.schedule.room import Worth
from dormouse.sim.carry import begin, evict
from dormouse.sim.events import Event
from dormouse.sim.worker import Job, Worker
from dormouse.sim.world import Control, World

_TICK = 2.0
"""Seconds between two looks at a model, as Knative has it."""


@dataclass(slots=True)
class _Crew:
    """The replicas of one model. `asked` are its requests that run or wait."""

    scaler: Autoscaler | None = None
    asked: int = 0
    tick: Event | None = None


class Scaled:
    """A control around another one. `scaling` has the models that are scaled."""

    def __init__(
        self, world: World, control: Control, scaling: Mapping[str, Scaling], minima: Minima, worth: Worth | None
    ) -> None:
        self.world = world
        self.control = control
        self._minima = minima
        self._worth = worth
        self._number = 0
        self._crews = {model: _Crew(Autoscaler(rules)) for model, rules in scaling.items()}
        for model in minima.by_model:
            self._crews.setdefault(model, _Crew())
        self._least = {model: rules.min_replicas for model, rules in scaling.items()}
        world.clock.at(world.now, self._begin)

    def _begin(self) -> None:
        for model, least in self._least.items():
            if least:
                self._look(model)
        self._at_border()

    def _at_border(self) -> None:
        for model in self._minima.by_model:
            self._look(model)
        following = self._minima.next_border(self.world.now)
        if following < float("inf"):
            self.world.clock.at(following, self._at_border)

    # --- what the world tells

    def submit(self, job: Job) -> None:
        self._asked(job, 1)
        self.control.submit(job)
        crew = self._crews.get(job.request.model)
        if crew and crew.scaler:
            self._look(job.request.model)

    def changed(self) -> None:
        self.control.changed()

    def became_idle(self, worker: Worker) -> None:
        crew = self._crews.get(worker.model.name)
        if crew is None or crew.scaler is None:
            self.control.became_idle(worker)
        else:
            self._tick_later(worker.model.name, crew)

    def going(self, worker: Worker) -> None:
        self.control.going(worker)

    def gave_up(self, job: Job) -> None:
        self._asked(job, -1)
        self.control.gave_up(job)

    def lost(self, jobs: Sequence[Job]) -> None:
        self.control.lost(jobs)
        for model in self._crews:
            self._look(model)

    def finished(self, job: Job) -> None:
        self._asked(job, -1)
        self.control.finished(job)

    def _asked(self, job: Job, more: int) -> None:
        crew = self._crews.get(job.request.model)
        if crew:
            crew.asked += more
            if crew.scaler:
                crew.scaler.record(self.world.now, crew.asked)

    # --- so many there should be

    def _look(self, model: str) -> None:
        """Start what lacks, let go what is too much."""
        crew, now, view = self._crews[model], self.world.now, self.world.view
        least = max(self._minima.least(model, now), self._least.get(model, 0))
        ready = view.ready_count(model)
        wanted = max(least, crew.scaler.wanted(now, ready).replicas) if crew.scaler else least
        for _ in range(wanted - ready):
            waits = crew.asked > view.ready_count(model) * view.model(model).slots
            if not self._start(model, may_evict=waits or view.ready_count(model) < least):
                break
        if crew.scaler:
            self._let_go(model, ready - wanted)
        self._pin(model, least)
        if view.ready_count(model) < least or (crew.scaler and (crew.asked or view.ready_count(model))):
            self._tick_later(model, crew)

    def _tick_later(self, model: str, crew: _Crew) -> None:
        if crew.tick is None:
            crew.tick = self.world.clock.at(self.world.now + _TICK, self._tick, model, crew)

    def _tick(self, model: str, crew: _Crew) -> None:
        crew.tick = None
        self._look(model)

    def _start(self, model: str, *, may_evict: bool) -> bool:
        world = self.world
        world.wires.refresh()
        self._number += 1
        request = Request(f"replica {self._number} of {model}", model, world.now)
        option = place_start(request, world.view, world.estimator, world.now, evict=may_evict, worth=self._worth).chosen
        if option is None:
            return False
        evict(world, option)
        begin(world, model, option)
        world.counts.scaled += 1
        return True

    def _let_go(self, model: str, count: int) -> None:
        """Those that are idle longest sleep."""
        if count <= 0:
            return
        for worker in self._idle(self.world.by_model.get(model, {}).values())[:count]:
            self.world.doze(worker)
            if worker.name in self.world.workers:
                self.control.became_idle(worker)
        self.world.control.changed()

    def _idle(self, workers: Iterable[Worker]) -> list[Worker]:
        idle = [worker for worker in workers if worker.idle and worker.state is State.HOT]
        return sorted(idle, key=lambda worker: worker.placed_at)

    def _pin(self, model: str, least: int) -> None:
        """Exactly the replicas that are the minimum stay whatever comes."""
        if self.world.view.model(model).pinned:
            return
        names = standing(model, self.world.view, least) if least else frozenset()
        for worker in list(self.world.by_model.get(model, {}).values()):
            if worker.pinned != (worker.name in names):
                self.world.pin(worker, worker.name in names)
