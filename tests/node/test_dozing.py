"""Processes that stay when their model falls asleep: when they do, how they wake, and what becomes of them when
something fails or their room is needed."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from dormouse.config import ModelConfig, ServeConfig
from dormouse.errors import (
    DiskFullError,
    DormouseError,
    HostError,
    SnapshotError,
    StoppingError,
    WeightsError,
)
from dormouse.node.node import Node
from dormouse.node.parts import Evicted
from dormouse.node.replica import Start
from dormouse.schedule.cluster import StartPath
from tests.node.standin import FakeModel, StandInHost, configure, on_loop, run_node, until
from tests.node.test_node import ask, state

PARKED = {"mouse": ModelConfig(keep_alive=0.05)}


class Told:
    """An observer that remembers what it was told of starts and evictions."""

    def __init__(self, node: Node) -> None:
        self.fallbacks: list[tuple[str, str]] = []
        self.evictions: list[tuple[str, Evicted]] = []
        self.phases: dict[StartPath, Any] = {}
        self.failed_captures = self.unprotected_starts = 0
        node.observe(self)

    def started(self, model: str, start: Start, phases: Any) -> None:
        self.phases[start.path] = phases

    def fell_back(self, model: str, path: StartPath, error: DormouseError) -> None:
        self.fallbacks.append((path, type(error).__name__))

    def evicted(self, model: str, what: Evicted) -> None:
        self.evictions.append((model, what))

    def capture_failed(self, model: str, error: DormouseError) -> None:
        self.failed_captures += 1

    def _other(self, *_told: object) -> None:
        pass

    def unprotected(self, model: str) -> None:
        self.unprotected_starts += 1

    foretold = start_failed = retried = quarantined = captured = adapter_loaded = adapter_failed = _other


def dozy(tmp_path: Path, *names: str, memory: str = "4GiB", snapshot: bool = True, **settings: object) -> ServeConfig:
    """Models that fall asleep only when they are told to, and whose processes may stay."""
    models = {name: ModelConfig(keep_alive=float("inf"), snapshot=snapshot) for name in names or ("mouse",)}
    return configure(tmp_path, models, **({"memory": memory, "sleep_memory": 0.5} | settings))


@on_loop
async def test_an_idle_model_keeps_its_process_and_wakes_without_a_restore(tmp_path: Path) -> None:
    host = StandInHost()
    models = {"mouse": FakeModel("mouse", checkpoint="c")}
    async with run_node(configure(tmp_path, PARKED, sleep_memory=0.5), host, models) as node:
        told = Told(node)
        assert await ask(node) == ("a b a", "cold")
        await until(lambda: state(node) == "dozing")
        assert host.alive() == 1 and list(host.snapshots) == ["snap1"], "captured, and still there"
        for _ in range(3):
            assert await ask(node) == ("a b a", "sleep")
            await until(lambda: state(node) == "dozing")
        assert host.calls.count("capture") == 1 and "restore" not in host.calls
        assert host.calls.count("take_segment of the model") == 3 and "stop_worker" not in host.calls
        assert {"room", "segments", "resume"} <= told.phases["sleep"].seconds().keys()
        assert node.statuses()[0].rss_bytes > 0


@pytest.mark.parametrize(
    "settings",
    [{"sleep_memory": 0}, {"sleep_memory": 4096}, {"models": {"mouse": {"keep_alive": 0.05, "sleep": False}}}],
)
@on_loop
async def test_no_process_stays_where_it_may_not(tmp_path: Path, settings: dict[str, Any]) -> None:
    host = StandInHost()
    config = ServeConfig.model_validate({"data_dir": tmp_path, "models": PARKED, **settings})
    async with run_node(config, host) as node:
        await ask(node)
        await until(lambda: state(node) == "asleep")
        assert host.alive() == 0
        assert (await ask(node))[1] == "snapshot"


@pytest.mark.parametrize("snapshot", [True, False])
@on_loop
async def test_a_process_that_is_killed_while_it_dozes_is_cleared_away(tmp_path: Path, snapshot: bool) -> None:
    host = StandInHost()
    config = dozy(tmp_path, snapshot=snapshot)
    async with run_node(config, host) as node:
        for _ in range(3):
            await ask(node)
            assert (await node.sleep("mouse", keep=True)).state == "dozing"
            (process,) = (process for process in host.processes.values() if process.poll() is None)
            process.send_signal(signal.SIGKILL)
            await until(lambda: state(node) == "asleep")
        assert (await ask(node))[1] == ("snapshot" if snapshot else "cold")
        assert host.quarantined == {}


@on_loop
async def test_processes_that_doze_on_a_gpu_go_when_it_has_no_room_for_what_they_keep_there(tmp_path: Path) -> None:
    """Null models: 64 MiB each for the context, so 564 awake, of a budget of 972 MiB."""
    host = StandInHost(gpu_bytes=1 << 30)
    sizes = {"one": 500, "two": 500, "big": 850, "elsewhere": 100}
    models = {name: FakeModel(name, weight_bytes=size << 20) for name, size in sizes.items()}
    settings = {name: ModelConfig(device="cuda:1" if name == "elsewhere" else "cuda") for name in models}
    config = configure(tmp_path, settings, memory="20GiB", sleep_memory=0.5)
    async with run_node(config, host, models) as node:
        told = Told(node)
        for name in ("elsewhere", "one"):
            await ask(node, model=name)
            await node.sleep(name, keep=True)
        await ask(node, model="two")  # one's context is no hindrance
        assert [state(node, name) for name in ("elsewhere", "one", "two")] == ["dozing", "dozing", "ready"]
        await ask(node, model="big")
        assert [state(node, name) for name in ("elsewhere", "one", "two")] == ["dozing", "asleep", "asleep"]
        assert sorted(told.evictions) == [("one", "process"), ("two", "model")]


@on_loop
async def test_weights_that_a_worker_could_write_to_are_told(tmp_path: Path) -> None:
    host = StandInHost(worker_fault="writable")
    async with run_node(dozy(tmp_path), host) as node:
        told = Told(node)
        await ask(node)
        assert told.unprotected_starts == 1
        await node.sleep("mouse", keep=True)
        await ask(node)
        assert told.unprotected_starts == 2


@pytest.mark.parametrize("fault", ["resume", "resume-exit", "resume-garbage"])
@on_loop
async def test_a_worker_that_cannot_go_on_is_replaced_and_the_request_answered(tmp_path: Path, fault: str) -> None:
    host = StandInHost(worker_fault=fault)
    async with run_node(dozy(tmp_path), host) as node:
        told = Told(node)
        await ask(node)
        await node.sleep("mouse", keep=True)
        assert await ask(node) == ("a b a", "snapshot")
        assert told.fallbacks == [("sleep", "EngineError")]
        assert host.alive() == 1


@pytest.mark.parametrize(
    ("call", "error"),
    [("take_segment of the model", WeightsError("gone")), ("take_segment of the model", HostError("no descriptors"))],
)
@on_loop
async def test_weights_that_cannot_be_had_again_are_a_fallback(tmp_path: Path, call: str, error: DormouseError) -> None:
    host = StandInHost(faults={call: error})
    async with run_node(dozy(tmp_path), host, {"mouse": FakeModel("mouse", checkpoint="c")}) as node:
        told = Told(node)
        await ask(node)
        await node.sleep("mouse", keep=True)
        assert await ask(node) == ("a b a", "snapshot")
        assert told.fallbacks == [("sleep", type(error).__name__)]


@on_loop
async def test_weights_that_could_not_be_given_back_are_no_harm(tmp_path: Path) -> None:
    host = StandInHost(faults={"drop_segments": HostError("busy")})
    async with run_node(dozy(tmp_path), host) as node:
        await ask(node)
        await node.sleep("mouse", keep=True)
        assert await ask(node) == ("a b a", "sleep")


@on_loop
async def test_a_wake_that_hangs_ends_at_its_deadline(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(dozy(tmp_path, start_timeout=4.0), host) as node:
        told = Told(node)
        await ask(node)
        await node.sleep("mouse", keep=True)
        (process,) = host.processes.values()
        os.kill(process.pid, signal.SIGSTOP)
        assert await ask(node) == ("a b a", "snapshot")
        assert told.fallbacks == [("sleep", "DeadlineError")]


@on_loop
async def test_a_failed_capture_lets_the_process_sleep_all_the_same(tmp_path: Path) -> None:
    host = StandInHost(lasting_faults={"capture": DiskFullError("no room")})
    async with run_node(configure(tmp_path, PARKED, sleep_memory=0.5), host) as node:
        told = Told(node)
        for number in range(5):
            assert (await ask(node))[1] == ("sleep" if number else "cold")
            await until(lambda: state(node) == "dozing")
        assert told.failed_captures == 3, "after that it is tried no more"
        assert node.statuses()[0].snapshot_id is None


@on_loop
async def test_a_capture_that_ends_badly_takes_the_process_along(tmp_path: Path) -> None:
    host = StandInHost(gates={"capture": asyncio.Event()})
    async with run_node(dozy(tmp_path, start_timeout=4.0), host) as node:
        await ask(node)
        with pytest.raises(DormouseError, match="took longer than"):
            await node.sleep("mouse", keep=True)
        await until(lambda: state(node) == "asleep")
        assert (await ask(node))[1] == "cold"


@on_loop
async def test_told_to_sleep_a_model_gives_up_its_process(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(dozy(tmp_path), host) as node:
        await ask(node)
        assert (await node.sleep("mouse", keep=True)).state == "dozing"
        assert (await node.sleep("mouse", keep=True)).state == "dozing"
        assert (await node.sleep("mouse")).state == "asleep" and host.alive() == 0


@on_loop
async def test_a_snapshot_is_made_of_the_process_that_dozes(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(dozy(tmp_path), host) as node:
        await ask(node)
        await node.sleep("mouse", keep=True)
        assert (await node.snapshot("mouse")).snapshot_id == "snap2"
        assert (await ask(node))[1] == "snapshot"


@on_loop
async def test_fifty_requests_share_one_wake(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(dozy(tmp_path), host) as node:
        await ask(node)
        await node.sleep("mouse", keep=True)
        answers = await asyncio.gather(*(ask(node, f"w{number} x") for number in range(50)))
        assert answers == [(f"w{number} x w{number}", "sleep") for number in range(50)]


@on_loop
async def test_room_for_another_comes_from_weights_then_processes_then_models(tmp_path: Path) -> None:
    host = StandInHost()
    names = ("one", "two", "three")
    models = {name: FakeModel(name, weight_bytes=400 << 20) for name in names}
    config = configure(tmp_path, {name: ModelConfig() for name in names}, memory="930MiB", sleep_memory=0.5)
    async with run_node(config, host, models) as node:
        told = Told(node)
        await ask(node, model="one")
        await node.sleep("one", keep=True)
        await ask(node, model="two")
        host.kept_weights = {"old": 4 << 20, "older": 4 << 20}
        assert state(node, "one") == "dozing" and told.evictions == [], "there is room for all that"
        await ask(node, model="three")
        assert told.evictions == [("other", "weights"), ("other", "weights"), ("one", "process")]
        assert host.kept_weights == {} and state(node, "one") == "asleep" and state(node, "two") == "ready"
        await ask(node, model="one")
        assert told.evictions[3:] == [("two", "model")]


@on_loop
async def test_a_wake_makes_room_for_what_the_model_takes_awake(tmp_path: Path) -> None:
    host = StandInHost()
    models = {name: FakeModel(name, weight_bytes=400 << 20) for name in ("one", "two")}
    config = configure(tmp_path, {name: ModelConfig() for name in models}, memory="700MiB", sleep_memory=0.5)
    async with run_node(config, host, models) as node:
        await ask(node, model="one")
        await node.sleep("one", keep=True)
        await ask(node, model="two")
        assert (state(node, "one"), state(node, "two")) == ("dozing", "ready")
        for name, other in (("one", "two"), ("two", "one"), ("one", "two")):
            assert (await ask(node, model=name))[1] == "sleep"
            assert state(node, other) == "dozing", "what its process takes without weights is in nobody's way"
        assert "restore" not in host.calls


@on_loop
async def test_a_model_that_must_make_room_leaves_no_process_where_that_would_be_in_the_way(tmp_path: Path) -> None:
    host = StandInHost()
    models = {name: FakeModel(name, weight_bytes=400 << 20) for name in ("one", "two")}
    config = configure(tmp_path, {name: ModelConfig() for name in models}, memory="466MiB", sleep_memory=0.5)
    async with run_node(config, host, models) as node:
        for name, path in (("one", "cold"), ("two", "cold"), ("one", "snapshot"), ("two", "snapshot")):
            assert (await ask(node, model=name))[1] == path
            assert host.alive() == 1


@on_loop
async def test_two_that_wake_at_once_do_not_wait_for_each_other_for_ever(tmp_path: Path) -> None:
    host = StandInHost()
    models = {name: FakeModel(name, weight_bytes=400 << 20) for name in ("one", "two")}
    config = configure(tmp_path, {name: ModelConfig() for name in models}, memory="480MiB", sleep_memory=0.5)
    async with run_node(config, host, models) as node:
        for name in models:
            await ask(node, model=name)
            await node.sleep(name, keep=True)
        assert host.alive() >= 1
        answers = await asyncio.gather(*(ask(node, model=name) for name in ("one", "two") for _ in range(3)))
        assert {text for text, _path in answers} == {"a b a"}


@on_loop
async def test_the_newest_displaces_the_least_useful_within_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dormouse.node.runner.own_bytes", lambda _pid: 20 << 20)
    names = ("one", "two", "three")
    async with run_node(dozy(tmp_path, *names, sleep_memory=50 << 20), StandInHost()) as node:
        told = Told(node)
        for name in names:
            await ask(node, model=name)
        for name in names:
            await node.sleep(name, keep=True)
            await asyncio.sleep(0.01)
        await until(lambda: [state(node, name) for name in names] == ["asleep", "dozing", "dozing"])
        assert told.evictions == [("one", "process")]


@on_loop
async def test_shutting_down_ends_processes_that_doze(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(dozy(tmp_path), host) as node:
        await ask(node)
        await node.sleep("mouse", keep=True)
    with pytest.raises(StoppingError):
        await ask(node)


@on_loop
async def test_a_bad_snapshot_matters_only_when_the_process_has_gone(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(dozy(tmp_path), host) as node:
        await ask(node)
        await node.sleep("mouse", keep=True)
        await node.remove("snap1", force=False)
        assert (await ask(node))[1] == "sleep"
        await node.sleep("mouse")
        host.lasting_faults["restore"] = SnapshotError("criu failed")
        assert (await ask(node))[1] == "cold"
