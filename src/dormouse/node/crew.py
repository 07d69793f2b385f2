"""The replicas of one model on this host: which one leads, which takes a request, what they hold together.

    Runners (one for each replica that there may be) -> Standings for schedule/, one status for people

A model's replicas on one device map the same weights there: these are counted once, with the replica that *bears* them,
and whoever starts beside it needs none. The others bear them in turn when it goes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace

from dormouse.config import ModelConfig
from dormouse.node.forecast import Standing
from dormouse.node.parts import Model
from dormouse.node.presence import ModelStatus
from dormouse.node.replica import State
from dormouse.node.runner import Runner
from dormouse.node.templates import TemplateSpec
from dormouse.schedule.place import Option

_RANK = (
    State.READY,
    State.RESUMING,
    State.WAKING,
    State.RESTORING,
    State.STARTING,
    State.QUIESCING,
    State.CAPTURING,
    State.DOZING,
    State.STOPPING,
    State.ASLEEP,
)
_AWAKE = (State.READY, State.RESUMING, State.WAKING, State.RESTORING, State.STARTING)


class Crew:
    """One model's replicas, of which the first is named as the model is. `template` is what they could start from,
    `usual` tells how many seconds its requests take."""

    def __init__(
        self,
        model: Model,
        settings: ModelConfig,
        runners: Sequence[Runner],
        template: TemplateSpec | None,
        *,
        usual: Callable[[], float],
    ) -> None:
        self.model = model
        self.name = model.name
        self.settings = settings
        self.runners = tuple(runners)
        self.template = template
        self._usual = usual
        self.held_off_until = 0.0
        """By the event loop's clock; until then no replica starts beside those that there are."""

    def __iter__(self) -> Iterator[Runner]:
        return iter(self.runners)

    @property
    def leader(self) -> Runner:
        """The one that is nearest to being ready."""
        return min(self.runners, key=lambda runner: _RANK.index(runner.replica.state))

    @property
    def ready(self) -> list[Runner]:
        """Those that are ready, the first first."""
        return [runner for runner in self.runners if runner.replica.state is State.READY]

    @property
    def awake(self) -> list[Runner]:
        """Those that are ready or will be."""
        return [runner for runner in self.runners if runner.replica.state in _AWAKE]

    @property
    def bound(self) -> int:
        """Requests that wait at one of them."""
        return sum(runner.replica.waiting for runner in self.runners)

    @property
    def load(self) -> int:
        """Requests that they have, those that wait there included."""
        return sum(runner.load for runner in self.runners)

    @property
    def may_start(self) -> bool:
        """Whether there may be more of them than there are."""
        return len(self.awake) < len(self.runners)

    def open(self) -> Runner | None:
        """The one that takes a request at once: the least loaded that is ready, or one that is just being parked."""
        free = [runner for runner in self.ready if runner.load < runner.slots]
        if free:
            return min(free, key=lambda runner: runner.load)
        parked = (runner for runner in self.runners if runner.replica.state is State.QUIESCING)
        return next((runner for runner in parked if runner.load < runner.slots), None)

    def named(self, name: str) -> Runner:
        """The one of that name."""
        return next(runner for runner in self.runners if runner.name == name)

    def to_start(self, option: Option | None = None, but: Set[Runner] = frozenset()) -> Runner:
        """The one that starts next, there where placement says: the one that is to wake, else one that has no process,
        or whose process dozes, or that will have none soon. `but`: rather none of these."""
        if option is not None and option.replica is not None:
            return self.named(option.replica)
        order = (State.ASLEEP, State.DOZING, State.QUIESCING, State.STOPPING, State.CAPTURING)
        idle = [
            runner
            for runner in self.runners
            if runner.replica.state in order and not runner.replica.waiting and runner not in but
        ]
        chosen = min(idle, key=lambda runner: order.index(runner.replica.state), default=self.leader)
        if option is not None and option.gpus and chosen.replica.state is State.ASLEEP:
            chosen.move_to(f"cuda:{option.gpus[0]}")
        return chosen

    def captured_beside(self, runner: Runner) -> bool:
        """Whether another one is being captured."""
        return any(other.replica.capturing for other in self.runners if other is not runner)

    # Memory

    def bearer(self, gpu: str | None) -> Runner | None:
        """The one with which the weights on a device are counted: of those that have them, the one that will probably
        go last. While one stays whatever comes, so do they; with one that is going they would seem to be free soon."""

        def lasts(runner: Runner) -> tuple[bool, bool, float]:
            return runner.pinned, not runner.replica.leaving, runner.replica.idle_since or float("inf")

        having = (runner for runner in self.runners if runner.admitted and runner.gpu == gpu)
        return max(having, key=lasts, default=None)

    def held(self, runner: Runner) -> int:
        """Bytes of the host's memory to count for one of them now."""
        return runner.held - (0 if runner is self.bearer(runner.gpu) else runner.shared_bytes)

    def needed(self, runner: Runner) -> int:
        """Bytes of the host's memory that it is expected to take from a start on."""
        return runner.expected - self._mapped(runner)

    def needed_on_gpu(self, runner: Runner) -> int:
        """The same of its GPU."""
        return runner.gpu_bytes - self._mapped(runner) if runner.gpu else 0

    def _mapped(self, runner: Runner) -> int:
        """Bytes of weights that another one has mapped already, on the device that it will be on."""
        if runner.replica.state is State.ASLEEP and len(runner.devices) > 1:
            return 0
        bearer = self.bearer(runner.gpu)
        return 0 if bearer is None or bearer is runner else runner.shared_bytes

    def standing(self, runner: Runner, shift: float) -> Standing:
        """One of them for the view of schedule/, whose clock is `shift` ahead of the event loop's."""
        one = runner.standing(shift)
        one = replace(
            one,
            needs_host=self.needed(runner),
            needs_gpu=self.needed_on_gpu(runner),
            usual=self._usual(),
            most=self._most(),
        )
        if not runner.admitted or runner is self.bearer(runner.gpu):
            return one
        gpu = one.gpu_bytes - runner.shared_bytes if one.gpu else 0
        return replace(one, host_bytes=one.host_bytes - runner.shared_bytes, gpu_bytes=gpu)

    def _most(self) -> int:
        """How many there may be now."""
        held_off = asyncio.get_running_loop().time() < self.held_off_until
        return max(len(self.awake), 1) if held_off else len(self.runners)

    def standings(self, shift: float, starting: Mapping[Runner, int]) -> list[Standing]:
        """All of them; those that are to start have already what they need, or, if they wait for memory, so much."""
        found = []
        for runner in self.runners:
            one = self.standing(runner, shift)
            if runner.waits_for_room:
                room = max(starting.get(runner, one.needs_host), one.host_bytes)
                one = replace(one, host_bytes=room, gpu_bytes=one.needs_gpu)
            found.append(one)
        return found

    # For people

    def status(self, waiting: int, adapters: tuple[str, ...], wall_time: float) -> ModelStatus:
        """The model now; `waiting` requests wait at none of its replicas."""
        leader = self.leader
        errors = [runner.replica.last_error for runner in (leader, *self.runners)]
        return ModelStatus(
            name=self.name,
            state=leader.replica.state.value,
            since=leader.since(wall_time),
            in_flight=self.load - self.bound,
            waiting=self.bound + waiting,
            rss_bytes=sum(runner.resident_bytes for runner in self.runners),
            snapshot_id=leader.replica.snapshot_id,
            last_error=next((str(error) for error in errors if error is not None), None),
            adapters=adapters,
            replicas={
                runner.name: runner.replica.state.value
                for runner in self.runners
                if runner is leader or runner.replica.state is not State.ASLEEP
            },
        )
