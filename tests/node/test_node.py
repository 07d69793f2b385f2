"""A node with real worker processes behind real sockets; only the host checkpoint service is a stand-in."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from dormouse.config import ModelConfig
from dormouse.engine.messages import Delta, Finished, Sampling, TextPrompt
from dormouse.errors import (
    BusyError,
    ConfigError,
    DamagedError,
    DeadlineError,
    DiskFullError,
    DormouseError,
    EngineError,
    HostError,
    IncompatibleError,
    NotFoundError,
    RequestError,
    SnapshotError,
    StoppingError,
    WeightsError,
)
from dormouse.node import link
from dormouse.node.node import Node
from dormouse.node.presence import read_node
from tests.node.standin import FakeModel, StandInHost, configure, on_loop, run_node, until


async def ask(node: Node, text: str = "a b", model: str = "mouse", tokens: int = 3) -> tuple[str, str]:
    """The answer and the start path."""
    async with node.replica(model) as lease:
        events = [event async for event in lease.generate(TextPrompt(text), Sampling(max_tokens=tokens))]
    assert isinstance(events[-1], Finished)
    return "".join(event.text for event in events if isinstance(event, Delta)), lease.start.path


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def state(node: Node, model: str = "mouse") -> str:
    return next(status.state for status in node.statuses() if status.name == model)


@on_loop
async def test_cold_hot_sleep_snapshot(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        assert await ask(node) == ("a b a", "cold")
        assert await ask(node) == ("a b a", "hot")
        assert (await node.sleep("mouse")).snapshot_id == "snap1"
        assert host.alive() == 0
        assert await ask(node) == ("a b a", "snapshot")
        await node.sleep("mouse")
        assert host.calls.count("capture") == 1
        assert host.alive() == 0
    assert host.calls[-1] == "stop_worker"


@on_loop
async def test_real_worker_with_the_null_engine(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "dormouse-null", "null": {"answer_tokens": 5}}')
    host = StandInHost(real_worker=True, faults={"capture": DiskFullError("no room")})
    models = {"mouse": FakeModel("mouse", path=tmp_path)}
    async with run_node(configure(tmp_path / "data", {"mouse": ModelConfig(keep_alive=0.3)}), host, models) as node:
        text, path = await ask(node, tokens=9)
        assert len(text.split()) == 5 and path == "cold"
        await until(lambda: "capture" in host.calls and state(node) == "ready")
        assert await ask(node, tokens=9) == (text, "hot")  # it was parked, and runs on as if nothing had happened
        with pytest.raises(RequestError, match="maximum context length"):
            await ask(node, "x " * 9000)


@on_loop
async def test_idle_model_sleeps_by_itself(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path, {"mouse": ModelConfig(keep_alive=0.05)}), host) as node:
        await ask(node)
        await until(lambda: state(node) == "asleep")
        assert host.alive() == 0 and list(host.snapshots) == ["snap1"]


@on_loop
async def test_fifty_requests_share_one_start(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await node.wake("mouse")
        await node.sleep("mouse")
        answers = await asyncio.gather(*(ask(node, f"w{number} x") for number in range(50)))
        assert answers == [(f"w{number} x w{number}", "snapshot") for number in range(50)]
        assert host.calls.count("restore") == 1


@on_loop
async def test_full_queue_is_busy(tmp_path: Path) -> None:
    host = StandInHost(gates={"start_worker": asyncio.Event()})
    async with run_node(configure(tmp_path, max_queue=2), host) as node:
        waiting = [asyncio.create_task(ask(node)) for _ in range(2)]
        await until(lambda: node.statuses()[0].waiting == 2)
        with pytest.raises(BusyError):
            await ask(node)
        host.gates["start_worker"].set()
        await asyncio.gather(*waiting)


@on_loop
async def test_more_than_max_concurrent_take_turns(tmp_path: Path) -> None:
    host = StandInHost(delay=0.01)
    async with run_node(configure(tmp_path, {"mouse": ModelConfig(max_concurrent=1)}), host) as node:
        answers = await asyncio.gather(*(ask(node) for _ in range(4)))
        assert [text for text, _ in answers] == ["a b a"] * 4


@on_loop
async def test_unknown_model_names_a_near_one(tmp_path: Path) -> None:
    async with run_node(configure(tmp_path), StandInHost()) as node:
        with pytest.raises(NotFoundError, match="Did you mean 'mouse'"):
            await ask(node, model="mose")


@pytest.mark.parametrize(
    "error", [IncompatibleError("other kernel"), DamagedError("flipped"), NotFoundError("removed")]
)
@on_loop
async def test_bad_snapshot_falls_back_to_cold_and_is_replaced(tmp_path: Path, error: Any) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await node.wake("mouse")
        await node.sleep("mouse")
        host.faults["restore"] = error
        assert await ask(node) == ("a b a", "cold")
        assert (await node.sleep("mouse")).snapshot_id == "snap2"
        await until(lambda: list(host.snapshots) == ["snap2"])
        assert await ask(node) == ("a b a", "snapshot")


@on_loop
async def test_late_clean_up_after_one_capture_spares_the_next(tmp_path: Path) -> None:
    host = StandInHost()
    late = threading.Event()
    host.clean_up_gates.append(late)
    async with run_node(configure(tmp_path), host) as node:
        await node.wake("mouse")
        await node.sleep("mouse")
        host.faults["restore"] = IncompatibleError("other kernel")
        await ask(node)
        await node.sleep("mouse")
        late.set()
        await until(lambda: host.calls.count("cleaned up") == 2)
        assert list(host.snapshots) == ["snap2"]


@pytest.mark.parametrize("fault", ["resume", "resume-exit", "resume-garbage"])
@on_loop
async def test_worker_that_fails_after_its_restore_is_restored_once_more(tmp_path: Path, fault: str) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await node.wake("mouse")
        await node.sleep("mouse")
        host.worker_fault = fault
        assert await ask(node) == ("a b a", "snapshot")
        assert host.calls.count("restore") == 2 and host.alive() == 1


@on_loop
async def test_snapshot_that_fails_twice_is_quarantined_for_good_and_captured_anew(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await node.wake("mouse")
        await node.sleep("mouse")
        host.lasting_faults["restore"] = SnapshotError("criu could not restore it")
        assert await ask(node) == ("a b a", "cold")
        assert host.calls.count("restore") == 2
        await until(lambda: host.quarantined == {"snap1": "criu could not restore it"})
    host.lasting_faults.clear()
    async with run_node(configure(tmp_path), host) as node:  # a new node keeps away from it, too
        assert await ask(node) == ("a b a", "cold")
        assert (await node.sleep("mouse")).snapshot_id == "snap2"
        await until(lambda: list(host.snapshots) == ["snap2"])
        assert await ask(node) == ("a b a", "snapshot")


@on_loop
async def test_host_that_is_out_of_something_is_no_reason_for_quarantine(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await node.wake("mouse")
        await node.sleep("mouse")
        host.faults["restore"] = HostError("no memory")
        assert await ask(node) == ("a b a", "cold")
        await node.sleep("mouse")
        assert await ask(node) == ("a b a", "snapshot")
        assert host.quarantined == {} and host.calls.count("capture") == 1


@on_loop
async def test_pinned_snapshot_stays_when_a_newer_one_comes(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        assert (await node.snapshot("mouse")).snapshot_id == "snap1"
        await node.pin("snap1", True)
        assert (await node.snapshot("mouse")).snapshot_id == "snap2"
        await until(lambda: host.calls.count("cleaned up") == 2)
        assert list(host.snapshots) == ["snap1", "snap2"]
        with pytest.raises(ConfigError):
            await node.remove("snap1", force=False)
        await node.remove("snap1", force=True)
        assert list(host.snapshots) == ["snap2"]


@on_loop
async def test_removed_snapshot_is_not_tried_and_a_released_one_is_used_again(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await node.snapshot("mouse")
        host.faults["restore"] = DamagedError("flipped")
        assert await ask(node) == ("a b a", "cold")
        await until(lambda: "snap1" in host.quarantined)
        await node.release("snap1")
        await node.sleep("mouse")
        assert await ask(node) == ("a b a", "snapshot")
        await node.remove("snap1", force=False)
        assert (await node.sleep("mouse")).snapshot_id == "snap2"
        with pytest.raises(NotFoundError):
            await node.release("snap1")


@on_loop
async def test_snapshot_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    host = StandInHost(faults={"capture": DiskFullError("no room")})
    models = {"mouse": ModelConfig(), "never": ModelConfig(snapshot=False)}
    async with run_node(configure(tmp_path, models), host) as node:
        with pytest.raises(DiskFullError):
            await node.snapshot("mouse")
        with pytest.raises(ConfigError, match="without snapshots"):
            await node.snapshot("never")
        assert (await node.snapshot("mouse")).snapshot_id == "snap1"


@pytest.mark.parametrize("fault", ["hello", "hello-exit", "load", "load-exit", "load-garbage"])
@on_loop
async def test_failed_cold_start_is_told_and_the_next_works(tmp_path: Path, fault: str) -> None:
    host = StandInHost(worker_fault=fault)
    async with run_node(configure(tmp_path), host) as node:
        with pytest.raises(EngineError):
            await ask(node)
        assert host.alive() == 0 and node.statuses()[0].last_error
        assert await ask(node) == ("a b a", "cold")
        assert node.statuses()[0].last_error is None


@on_loop
async def test_failed_start_of_the_cell_is_told(tmp_path: Path) -> None:
    host = StandInHost(faults={"start_worker": HostError("no root", remedy="Run as root")})
    async with run_node(configure(tmp_path), host) as node:
        with pytest.raises(HostError, match="Run as root"):
            await ask(node)


@on_loop
async def test_start_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    host = StandInHost(gates={"start_worker": asyncio.Event()})
    async with run_node(configure(tmp_path, start_timeout=0.05), host) as node:
        with pytest.raises(DeadlineError, match=r"longer than 0\.05 s"):
            await ask(node)


@on_loop
async def test_failed_capture_leaves_the_model_ready(tmp_path: Path) -> None:
    host = StandInHost(faults={"capture": DiskFullError("no room")})
    async with run_node(configure(tmp_path, {"mouse": ModelConfig(keep_alive=0.05)}), host) as node:
        await ask(node)
        await until(lambda: "capture" in host.calls)
        assert await ask(node) == ("a b a", "hot")
        await until(lambda: list(host.snapshots) == ["snap1"])


@pytest.mark.parametrize("fault", ["quiesce", "quiesce-exit"])
@on_loop
async def test_worker_that_cannot_park_is_ended(tmp_path: Path, fault: str) -> None:
    host = StandInHost(worker_fault=fault)
    async with run_node(configure(tmp_path), host) as node:
        await node.wake("mouse")
        with pytest.raises(EngineError):
            await node.sleep("mouse")
        assert host.alive() == 0
        assert await ask(node) == ("a b a", "cold")


@on_loop
async def test_worker_that_cannot_be_stopped_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dormouse.node.replica.STOP_RETRY", 0.01)
    host = StandInHost(faults={"stop_worker": SnapshotError("the cell does not end")})
    async with run_node(configure(tmp_path, {"mouse": ModelConfig(snapshot=False)}), host) as node:
        await node.wake("mouse")
        await node.sleep("mouse")
        assert host.calls.count("stop_worker") == 2


@on_loop
async def test_request_during_a_capture_is_answered_from_the_snapshot(tmp_path: Path) -> None:
    host = StandInHost(gates={"capture": asyncio.Event()})
    async with run_node(configure(tmp_path, {"mouse": ModelConfig(keep_alive=0.01)}), host) as node:
        await ask(node)
        await until(lambda: state(node) == "capturing")
        answer = asyncio.create_task(ask(node))
        await until(lambda: node.statuses()[0].waiting == 1)
        host.gates["capture"].set()
        assert await answer == ("a b a", "snapshot")


@on_loop
async def test_dead_worker_fails_its_requests_and_only_those(tmp_path: Path) -> None:
    host = StandInHost(delay=0.005)
    async with run_node(configure(tmp_path), host) as node:
        with pytest.raises(EngineError, match="ended unexpectedly"):
            await ask(node, "a die", tokens=9)
        assert (await ask(node))[0] == "a b a"


@on_loop
async def test_worker_killed_from_outside_is_noticed_while_idle(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await node.wake("mouse")
        os.kill(next(iter(host.processes.values())).pid, signal.SIGKILL)
        await until(lambda: state(node) == "asleep")
        assert "ended unexpectedly" in (node.statuses()[0].last_error or "")


@on_loop
async def test_refused_request_leaves_the_worker_alone(tmp_path: Path) -> None:
    async with run_node(configure(tmp_path), StandInHost()) as node:
        with pytest.raises(RequestError) as caught:
            await ask(node, "refuse")
        assert caught.value.reason == "context_length_exceeded"
        assert (await ask(node))[1] == "hot"


@on_loop
async def test_leaving_early_cancels_the_generation(tmp_path: Path) -> None:
    host = StandInHost(delay=0.01)
    async with run_node(configure(tmp_path), host) as node:
        async with node.replica("mouse") as lease:
            async with aclosing(lease.generate(TextPrompt("a"), Sampling(max_tokens=60))) as events:  # type: ignore[type-var]
                await anext(events)
        await node.sleep("mouse")  # the worker refuses to park while it generates
        assert host.snapshots


@on_loop
async def test_waiter_that_gives_up_is_not_counted(tmp_path: Path) -> None:
    host = StandInHost(gates={"start_worker": asyncio.Event()})
    async with run_node(configure(tmp_path), host) as node:
        waiting = asyncio.create_task(ask(node))
        await until(lambda: node.statuses()[0].waiting == 1)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert node.statuses()[0].waiting == 0
        host.gates["start_worker"].set()
        assert (await ask(node))[0] == "a b a"
        assert node.statuses()[0].in_flight == 0


@on_loop
async def test_slow_reader_gets_everything_and_holds_nobody_up(tmp_path: Path) -> None:
    async with run_node(configure(tmp_path), StandInHost()) as node, node.replica("mouse") as slow:
        events = slow.generate(TextPrompt("a b"), Sampling(max_tokens=60, logprobs=1))
        first = await anext(events)
        assert (await ask(node, tokens=60))[0].split() == ["a", "b"] * 30
        rest = [event async for event in events]
        deltas = [event for event in (first, *rest) if isinstance(event, Delta)]
        assert "".join(delta.text for delta in deltas).split() == ["a", "b"] * 30
        assert sum(len(delta.logprobs or ()) for delta in deltas) == 60
        assert len(deltas) < 60  # what piled up came in one piece


@on_loop
async def test_idle_model_makes_room_for_another(tmp_path: Path) -> None:
    host = StandInHost()
    models = {name: FakeModel(name, weight_bytes=400 << 20) for name in ("one", "two", "big")}
    models["big"] = FakeModel("big", weight_bytes=10 << 30)
    config = configure(tmp_path, {name: ModelConfig() for name in models}, memory="700MiB")
    async with run_node(config, host, models) as node:
        await ask(node, model="one")
        assert (await ask(node, model="two"))[1] == "cold"
        assert (state(node, "one"), state(node, "two")) == ("asleep", "ready")
        assert (await ask(node, model="one"))[1] == "snapshot"
        with pytest.raises(HostError, match="budget is 700 MiB"):
            await ask(node, model="big")


@on_loop
async def test_a_peak_above_the_budget_does_not_keep_a_model_from_starting_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = StandInHost()
    models = {name: FakeModel(name, weight_bytes=100 << 20) for name in ("one", "two")}
    config = configure(tmp_path, {name: ModelConfig() for name in models}, memory="700MiB")
    async with run_node(config, host, models) as node:
        await ask(node, model="one")
        with monkeypatch.context() as peak:
            peak.setattr("dormouse.node.runner.resident_bytes", lambda _pid: 1 << 30)
            await node.sleep("one")
        await ask(node, model="two")
        assert (await ask(node, model="one"))[1] == "snapshot"
        assert state(node, "two") == "asleep", "as much room was made as there is"


@on_loop
async def test_a_peak_of_another_makes_no_refusal_beside_one_that_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = StandInHost()
    models = {name: FakeModel(name, weight_bytes=100 << 20) for name in ("kept", "two")}
    settings = {"kept": ModelConfig(keep_alive=float("inf")), "two": ModelConfig()}
    async with run_node(configure(tmp_path, settings, memory="700MiB"), host, models) as node:
        await ask(node, model="two")
        with monkeypatch.context() as peak:
            peak.setattr("dormouse.node.runner.resident_bytes", lambda _pid: 600 << 20)
            await node.sleep("two")
        await ask(node, model="kept")
        assert (await ask(node, model="two"))[1] == "snapshot"
        assert state(node, "kept") == "ready"


@on_loop
async def test_a_snapshot_can_be_asked_for_where_nothing_is_kept_awake(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path, {"mouse": ModelConfig(keep_alive=0)}), host) as node:
        for number in (1, 2, 3):
            assert (await node.snapshot("mouse")).snapshot_id == f"snap{number}"


@pytest.mark.parametrize("error", [WeightsError("gone"), HostError("the service has ended")])
@on_loop
async def test_a_start_that_fails_for_want_of_weights_or_of_the_host_costs_no_snapshot(
    tmp_path: Path, error: DormouseError
) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await node.snapshot("mouse")
        host.lasting_faults = {"restore": error, "start_worker": error}
        for _ in range(3):
            with pytest.raises(type(error)):
                await ask(node)
        host.lasting_faults.clear()
        assert await ask(node) == ("a b a", "snapshot")
        assert host.quarantined == {}


@on_loop
async def test_a_model_whose_snapshots_never_restore_is_captured_no_more_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = StandInHost(lasting_faults={"restore": SnapshotError("criu failed")})
    async with run_node(configure(tmp_path, {"mouse": ModelConfig(keep_alive=0.01)}), host) as node:
        for _ in range(6):
            assert await ask(node) == ("a b a", "cold")
            await until(lambda: state(node) == "asleep")
        assert host.calls.count("capture") == 3 and host.calls.count("restore") == 6
        assert "is captured no more until `dormouse snapshot mouse`" in caplog.text
        host.lasting_faults.clear()
        await node.snapshot("mouse")
        assert await ask(node) == ("a b a", "snapshot")


@on_loop
async def test_models_on_one_gpu_make_room_there_and_nowhere_else(tmp_path: Path) -> None:
    host = StandInHost(gpu_bytes=1 << 30)
    sizes = {"one": 500, "two": 500, "other": 500, "cpu": 500, "big": 1000}
    models = {name: FakeModel(name, weight_bytes=size << 20) for name, size in sizes.items()}
    devices = {"one": "cuda", "two": "cuda:0", "other": "cuda:1", "cpu": "cpu", "big": "cuda:0"}
    settings = {name: ModelConfig(device=device) for name, device in devices.items()}
    async with run_node(configure(tmp_path, settings, memory="20GiB"), host, models) as node:
        for name in ("cpu", "other", "one"):
            await ask(node, model=name)
        assert (await ask(node, model="two"))[1] == "cold"
        assert [state(node, name) for name in ("cpu", "other", "one", "two")] == ["ready", "ready", "asleep", "ready"]
        async with node.replica("two"):
            waiting = asyncio.create_task(ask(node, model="one"))
            await until(lambda: any(status.waiting for status in node.statuses() if status.name == "one"))
            assert state(node, "two") == "ready"
        assert (await waiting)[1] == "snapshot"
        with pytest.raises(HostError, match="of cuda:0, its budget is 972 MiB"):
            await ask(node, model="big")
    assert [call for call in host.calls if call.startswith("gpu_memory")] == ["gpu_memory cuda:1", "gpu_memory cuda:0"]


@on_loop
async def test_a_model_kept_forever_on_a_gpu_leaves_the_others_an_error(tmp_path: Path) -> None:
    host = StandInHost(gpu_bytes=1 << 30)
    models = {name: FakeModel(name, weight_bytes=500 << 20) for name in ("one", "two")}
    settings = {"one": ModelConfig(device="cuda", keep_alive=math.inf), "two": ModelConfig(device="cuda")}
    async with run_node(configure(tmp_path, settings, memory="20GiB"), host, models) as node:
        await ask(node, model="one")
        with pytest.raises(HostError, match="kept forever take 564 MiB of its budget of 972 MiB"):
            await ask(node, model="two")


@on_loop
async def test_a_gpu_that_is_not_there_is_an_error_of_its_models_only(tmp_path: Path) -> None:
    host = StandInHost(lasting_faults={"gpu_memory cuda:7": HostError("there is no GPU 7 here")})
    settings = {"one": ModelConfig(device="cuda:7"), "two": ModelConfig()}
    async with run_node(configure(tmp_path, settings), host) as node:
        with pytest.raises(HostError, match="no GPU 7"):
            await ask(node, model="one")
        assert (await ask(node, model="two"))[0] == "a b a"


@on_loop
async def test_busy_model_is_not_evicted_and_the_other_waits(tmp_path: Path) -> None:
    host = StandInHost()
    models = {name: FakeModel(name, weight_bytes=400 << 20) for name in ("one", "two")}
    async with run_node(
        configure(tmp_path, dict.fromkeys(models, ModelConfig()), memory="700MiB"), host, models
    ) as node:
        async with node.replica("one"):
            given_up = asyncio.create_task(ask(node, model="two"))
            waiting = asyncio.create_task(ask(node, model="two"))
            await until(lambda: node.statuses()[1].waiting == 2)
            given_up.cancel()
            assert state(node, "one") == "ready" and host.alive() == 1
        assert (await waiting)[0] == "a b a"


@on_loop
async def test_start_nobody_waits_for_any_more_is_dropped(tmp_path: Path) -> None:
    models = {name: FakeModel(name, weight_bytes=400 << 20) for name in ("one", "two")}
    config = configure(tmp_path, dict.fromkeys(models, ModelConfig()), memory="700MiB")
    async with run_node(config, StandInHost(), models) as node, node.replica("one"):
        waiting = asyncio.create_task(ask(node, model="two"))
        await until(lambda: node.statuses()[1].waiting == 1)
        waiting.cancel()
        await until(lambda: node.statuses()[1].waiting == 0)
        assert (state(node, "one"), state(node, "two")) == ("ready", "asleep")


@on_loop
async def test_state_is_published_for_other_commands_and_withdrawn(tmp_path: Path) -> None:
    async with run_node(configure(tmp_path), StandInHost()) as node:
        await node.wake("mouse")

        def shown() -> bool:
            published = read_node(tmp_path / "run")
            return published is not None and [model.state for model in published.models] == ["ready"]

        await until(shown)
        assert (tmp_path / "run" / "node.json").stat().st_mode & 0o777 == 0o600
    assert read_node(tmp_path / "run") is None
    assert not (tmp_path / "run" / "node.json").exists()


@on_loop
async def test_second_node_on_a_data_folder_is_refused_by_pid(tmp_path: Path) -> None:
    async with run_node(configure(tmp_path), StandInHost()):
        with pytest.raises(HostError, match=f"pid {os.getpid()}"):
            async with run_node(configure(tmp_path), StandInHost()):
                pass


@on_loop
async def test_end_of_the_node_fails_who_waits_and_ends_who_runs(tmp_path: Path) -> None:
    host = StandInHost(delay=0.01, gates={"start_worker": asyncio.Event()})
    async with run_node(configure(tmp_path), host) as node:
        waiting = asyncio.create_task(ask(node))
        await until(lambda: node.statuses()[0].waiting == 1)
        asyncio.get_running_loop().call_later(0.05, host.gates["start_worker"].set)
    with pytest.raises(StoppingError):
        await waiting


@on_loop
async def test_twenty_cycles_leave_nothing_behind(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await node.wake("mouse")
        await node.sleep("mouse")
        before = descriptors(), len(asyncio.all_tasks())
        for _ in range(20):
            assert (await ask(node))[1] == "snapshot"
            await node.sleep("mouse")
        assert descriptors() <= before[0] and len(asyncio.all_tasks()) <= before[1]
        assert host.alive() == 0


@on_loop
async def test_worker_that_hangs_is_noticed_and_the_next_request_gets_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "PING_AFTER", 0.05)
    monkeypatch.setattr(link, "LOST_AFTER", 0.3)
    host = StandInHost(delay=0.1)
    async with run_node(configure(tmp_path), host) as node:
        asking = asyncio.create_task(ask(node, tokens=60))
        await until(lambda: node.statuses()[0].in_flight == 1)
        (worker,) = host.processes.values()
        worker.send_signal(signal.SIGSTOP)
        with pytest.raises(EngineError, match="sign of life"):
            await asking
        assert (await ask(node))[1] == "cold"


@on_loop
async def test_worker_that_only_takes_long_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "PING_AFTER", 0.05)
    monkeypatch.setattr(link, "LOST_AFTER", 0.3)
    host = StandInHost(delay=0.8)
    async with run_node(configure(tmp_path), host) as node:
        assert await ask(node, tokens=2) == ("a b", "cold")
        await asyncio.sleep(0.5)  # nor is one that has nothing to do
        assert await ask(node, tokens=1) == ("a", "hot")
