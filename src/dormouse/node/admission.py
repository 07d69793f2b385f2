"""Who may have memory of this host and its GPUs: what is free, who goes for whom, which processes may stay.

    a runner that starts -> make_room: kept weights and idle replicas go, until it fits -> admitted
    a runner that parks  -> may_doze, displace: processes without weights stay within `sleep_memory`

room.py decides, by what schedule/'s policy thinks of those that are idle; here it is carried out, with what workers
were measured to take. Whoever is told to go takes a while, so everything here asks again after each change.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Protocol

from dormouse.config import ServeConfig
from dormouse.errors import DormouseError, HostError
from dormouse.node.crew import Crew
from dormouse.node.forecast import Limits, Standing
from dormouse.node.memory import allotted, budget, context_bytes, dram_tier, gpu_budget
from dormouse.node.parts import Evicted, Host, Observer
from dormouse.node.replica import State
from dormouse.node.room import Victims, Way, find_way, first_of
from dormouse.node.runner import AbandonedError, Runner
from dormouse.schedule.cluster import Cluster
from dormouse.schedule.room import Worth

log = logging.getLogger(__name__)


class Around(Protocol):
    """What admission asks of the node. `starting`: a replica starts for a request, and those are to go for it; `change`
    is set at the next change of anything."""

    def view_of(self, standings: list[Standing]) -> Cluster: ...

    def victims(self) -> Victims: ...

    def worth_of(self, view: Cluster) -> Worth: ...

    def starting(self, runner: Runner, evicted: tuple[str, ...]) -> None: ...

    @property
    def change(self) -> asyncio.Event: ...


class Admission:
    """For one node, on its event loop."""

    def __init__(
        self,
        config: ServeConfig,
        host: Host,
        crews: Mapping[str, Crew],
        observers: list[Observer],
        shift: float,
        around: Around,
    ) -> None:
        self._config = config
        self._host = host
        self._crews = crews
        self._observers = observers
        self._shift = shift
        self._around = around
        self._budget = budget(config)
        self._sleep_limit = allotted(config.sleep_memory, self._budget)
        self._gpu_budgets: dict[str, int] = {}
        self._dram_tier = dram_tier(config)
        self._in_need: dict[Runner, int] = {}
        self._evicted_for: dict[Runner, list[str]] = {}
        self._waits_for_busy: set[Runner] = set()

    @property
    def limits(self) -> Limits:
        """What models may take."""
        return Limits(self._budget, self._gpu_budgets, self._dram_tier)

    @property
    def processes_stay(self) -> bool:
        """Whether there is memory for processes that doze."""
        return self._sleep_limit > 0

    def standings(self) -> list[Standing]:
        """All replicas, those that start and wait for memory as if they had it."""
        return [one for crew in self._crews.values() for one in crew.standings(self._shift, self._in_need)]

    def free(self, but: Runner | None = None) -> int:
        """What of the budget nobody takes."""
        held = sum(one.host_bytes for runner, one in self._held() if runner is not but)
        return self._budget - held - sum(self._host.kept_weights.values())

    def fits(self, runner: Runner) -> bool:
        """Whether it could start without anybody's going, for all that is known."""
        if runner.gpu is not None and runner.gpu not in self._gpu_budgets:
            return True
        return self._way_for(runner, self._crew(runner).needed(runner)).fits

    def evicted_for(self, runner: Runner) -> list[str]:
        """What has gone for its start under way, in words; told once."""
        return self._evicted_for.pop(runner, [])

    def held_up(self, runner: Runner) -> bool:
        """Whether a replica has to drain, since the only one of another model waits for memory that only busy ones
        have: on its GPU, or anywhere on the host."""
        others = (
            other
            for other in self._waits_for_busy
            if other.model is not runner.model and not any(mate.admitted for mate in self._crew(other))
        )
        return any(other.gpu is None or other.gpu == runner.gpu or self._lacks_host(other) for other in others)

    def _lacks_host(self, runner: Runner) -> bool:
        return self._in_need[runner] > self.free(but=runner)

    # Starts

    async def make_room(self, runner: Runner, *, for_request: bool = True) -> None:
        """Wait until the runner's worker fits the budget, freeing weights, ending processes that doze and putting idle
        replicas to sleep for it. What such a model is expected to take must fit; that it once took more only makes more
        room for it, as far as there is any.

        Raises HostError when it never can, and when a process that dozes would wait for others (it goes, so that no two
        of them wait for each other); AbandonedError when nobody waits for it any more."""
        needed = self._crew(runner).needed(runner)
        if (error := self._too_large(runner, needed)) is not None:
            raise error
        await self.check_gpu(runner)
        self._in_need[runner] = needed
        try:
            if for_request:
                self._around.starting(runner, self._way_for(runner, needed).evict)
            await self._until_room(runner)
        finally:
            del self._in_need[runner]
            self._waits_for_busy.discard(runner)

    async def know_gpus(self, crew: Crew) -> None:
        """Find out what may be taken of each GPU that a model may start on, before one is chosen. Raises HostError."""
        devices = crew.runners[0].devices
        for device in devices if len(devices) > 1 else ():
            await self._know_gpu(device)

    async def _know_gpu(self, device: str) -> None:
        if device not in self._gpu_budgets:
            self._gpu_budgets[device] = gpu_budget(self._config, await self._host.gpu_memory(device))

    async def check_gpu(self, runner: Runner) -> None:
        """Whether its GPU is there and large enough at all. Raises HostError."""
        if runner.gpu is None:
            return
        await self._know_gpu(runner.gpu)
        if (error := self._too_large_for_gpu(runner, runner.gpu)) is not None:
            raise error

    def blocked(self, crew: Crew) -> DormouseError | None:
        """Why a model can't start whatever goes, on any of its devices, as far as that is known already."""
        runner = crew.to_start()
        needed = crew.needed(runner)
        if (error := self._too_large(runner, needed) or self._beside_kept(runner, needed)) is not None:
            return error
        found = [self._blocked_on(runner, device) for device in runner.devices]
        return None if None in found else found[0]

    def _blocked_on(self, runner: Runner, gpu: str) -> HostError | None:
        return self._too_large_for_gpu(runner, gpu) or self._gpu_beside_kept(runner, gpu)

    async def _until_room(self, runner: Runner) -> None:
        self._evicted_for.pop(runner, None)
        while runner.replica.waiting > 0:
            crew = self._crew(runner)
            needed = crew.needed(runner)
            if (error := self._beside_kept(runner, needed) or self._gpu_beside_kept(runner, runner.gpu)) is not None:
                raise error
            extra = runner.peak - runner.expected
            room = self._in_need[runner] = min(needed + extra, self._budget - self._kept())
            way = self._way_for(runner, room)
            if way.fits:
                runner.admitted = True
                return
            leaving = any(other.replica.leaving for other in self._others(runner))
            if not (way.weights or way.evict or leaving):
                self._waits_for_busy.add(runner)
                if runner.replica.state is State.WAKING:
                    raise HostError(
                        f"there is no room for {runner.model.name} to wake beside what others take",
                        remedy="Raise `memory`; it waits for room without its process",
                    )
            change = self._around.change
            await self._make_way(way, runner)
            if not way.weights:
                await change.wait()
        raise AbandonedError

    def _too_large(self, runner: Runner, needed: int) -> HostError | None:
        if needed <= self._budget:
            return None
        return HostError(
            f"model {runner.model.name} needs about {needed >> 20} MiB, the budget is {self._budget >> 20} MiB",
            remedy="Raise `memory`, or serve a smaller model",
        )

    def _too_large_for_gpu(self, runner: Runner, gpu: str) -> HostError | None:
        most = self._gpu_budgets.get(gpu)
        if most is None or runner.gpu_bytes <= most:
            return None
        return HostError(
            f"model {runner.model.name} needs about {runner.gpu_bytes >> 20} MiB of {gpu}, its budget is"
            f" {most >> 20} MiB",
            remedy="Raise `gpu_memory`, give it a smaller cache (kv_tokens), or serve a smaller model",
        )

    def _kept(self) -> int:
        """Bytes that nobody else can have."""
        return sum(crew.held(runner) for crew in self._crews.values() for runner in crew if _is_kept(runner))

    def _beside_kept(self, runner: Runner, needed: int) -> HostError | None:
        kept = self._kept()
        if needed + kept <= self._budget:
            return None
        return HostError(
            f"model {runner.model.name} needs about {needed >> 20} MiB; models that are kept forever take "
            f"{kept >> 20} MiB of the budget of {self._budget >> 20} MiB",
            remedy="Raise `memory`, or give one of them a keep_alive",
        )

    def _gpu_beside_kept(self, runner: Runner, gpu: str | None) -> HostError | None:
        most = self._gpu_budgets.get(gpu) if gpu is not None else None
        if most is None:
            return None
        needed = self._crew(runner).needed_on_gpu(runner)
        kept = sum(
            one.gpu_bytes for other, one in self._held() if other is not runner and other.gpu == gpu and _is_kept(other)
        )
        if needed + kept <= most:
            return None
        return HostError(
            f"model {runner.model.name} needs about {needed >> 20} MiB of {gpu}; models that are kept forever"
            f" take {kept >> 20} MiB of its budget of {most >> 20} MiB",
            remedy="Raise `gpu_memory`, or give one of them a keep_alive or another GPU",
        )

    def _way_for(self, runner: Runner, needed: int) -> Way:
        """What must go so that the runner has `needed` bytes of the host's memory, and its GPU's. Not a replica of its
        own model that is ready: that serves as well."""
        mates = {mate.name for mate in self._crew(runner).ready}
        others = [one for other, one in self._held() if other is not runner]
        return find_way(
            self._crew(runner).standing(runner, self._shift),
            [replace(one, pinned=True) if one.name in mates else one for one in others],
            needed,
            self._host.kept_weights,
            self.limits,
            lambda standings: self._around.view_of(list(standings)),
            self._around.victims(),
        )

    async def _make_way(self, way: Way, runner: Runner) -> None:
        owners = {crew.model.checkpoint: name for name, crew in self._crews.items()}
        for checkpoint in way.weights:
            log.info("kept weights (%s) are freed to make room for %s", checkpoint, runner.name)
            await self._host.drop_segment(None, checkpoint)
            self._tell_evicted(owners.get(checkpoint, "other"), "weights", runner)
        for name in way.evict:
            other = self._named(name)
            dozing = other.replica.state is State.DOZING
            log.info("model %s must sleep to make room for %s", name, runner.name)
            other.press(keep=not dozing)  # a process without weights may leave room enough
            self._tell_evicted(other.model.name, "process" if dozing else "model", runner)

    def _tell_evicted(self, model: str, what: Evicted, runner: Runner | None = None) -> None:
        if runner is not None:
            self._evicted_for.setdefault(runner, []).append(f"{what} of {model}")
        for observer in self._observers:
            observer.evicted(model, what)

    # Processes that doze

    def may_doze(self, runner: Runner, own: int) -> bool:
        """Whether a process that was parked may stay, with so many bytes of its own."""
        free = self.free(but=runner) - sum(self._in_need.values())
        return own <= min(self._sleep_limit, free) and self._context_fits(runner)

    def _context_fits(self, runner: Runner) -> bool:
        """Whether what a process that dozes keeps of its GPU has room there, beside all others and those that wait."""
        if runner.gpu is None or runner.gpu not in self._gpu_budgets:
            return True
        held = sum(
            self._crew(other).needed_on_gpu(other) if other in self._in_need and not other.admitted else one.gpu_bytes
            for other, one in self._held()
            if other is not runner and other.gpu == runner.gpu
        )
        return held + context_bytes(runner.engine) <= self._gpu_budgets[runner.gpu]

    def displace(self) -> None:
        """One more process dozes: those worth least for their bytes go for it if they are too many."""
        standings = [one for _runner, one in self._held()]
        view = self._around.view_of(standings)
        worth = self._around.worth_of(view)
        sizes = {one.name: one.host_bytes for one in standings if one.doing is State.DOZING and one.host_bytes}
        ranked = sorted(sizes, key=lambda name: (worth(view.replica(name)) / sizes[name], name))
        over = sum(sizes.values()) - self._sleep_limit
        for name in first_of({name: sizes[name] for name in ranked}, over):
            log.info("the process of model %s goes, for others doze within `sleep_memory`", name)
            runner = self._named(name)
            runner.press()
            self._tell_evicted(runner.model.name, "process")

    # Who there is

    def _held(self) -> Iterator[tuple[Runner, Standing]]:
        """All replicas with what they have."""
        for crew in self._crews.values():
            for runner in crew:
                yield runner, crew.standing(runner, self._shift)

    def _others(self, runner: Runner) -> Iterator[Runner]:
        return (other for crew in self._crews.values() for other in crew if other is not runner)

    def _crew(self, runner: Runner) -> Crew:
        return self._crews[runner.model.name]

    def _named(self, name: str) -> Runner:
        return next(runner for crew in self._crews.values() for runner in crew if runner.name == name)


def _is_kept(runner: Runner) -> bool:
    """Whether a worker holds memory that nobody else can have."""
    return runner.admitted and runner.pinned
