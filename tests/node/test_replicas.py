"""Several replicas of a model on one node: who starts, who serves, who goes, and who waits for what."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from dormouse.config import ModelConfig
from dormouse.engine.messages import Delta, Finished, Sampling, TextPrompt
from dormouse.errors import BusyError, DormouseError, EngineError, HostError, StoppingError
from dormouse.node.node import Node
from tests.node.standin import FakeModel, StandInHost, configure, on_loop, run_node, until

MIB = 1 << 20


async def ask(node: Node, model: str = "mouse", tokens: int = 3, **who: Any) -> tuple[str, str]:
    """The answer and the start path."""
    async with node.replica(model, **who) as lease:
        events = [event async for event in lease.generate(TextPrompt("a b"), Sampling(max_tokens=tokens))]
    assert isinstance(events[-1], Finished)
    return "".join(event.text for event in events if isinstance(event, Delta)), lease.start.path


def replicas(node: Node, model: str = "mouse") -> dict[str, str]:
    """The state of each that has a process, and of the first."""
    return next(status.replicas for status in node.statuses() if status.name == model)


def ready(node: Node, model: str = "mouse") -> int:
    return list(replicas(node, model).values()).count("ready")


def several(most: int = 3, slots: int = 2, **settings: Any) -> ModelConfig:
    return ModelConfig.model_validate({"max_replicas": most, "max_concurrent": slots, **settings})


async def held(node: Node, count: int, model: str = "mouse") -> tuple[AsyncExitStack, list[str]]:
    """So many requests that run and do not end before the stack does, with their start paths."""
    stack = AsyncExitStack()
    leases = [await stack.enter_async_context(node.replica(model)) for _ in range(count)]
    return stack, [lease.start.path for lease in leases]


@on_loop
async def test_a_burst_is_served_by_several_replicas_out_of_one_snapshot(tmp_path: Path) -> None:
    host = StandInHost(delay=0.02)
    async with run_node(configure(tmp_path, {"mouse": several(3, 2)}), host) as node:
        await node.wake("mouse")
        await node.sleep("mouse")
        answers = await asyncio.gather(*(ask(node, tokens=20) for _ in range(6)))
        assert {text for text, _path in answers} == {"a b" + " a b" * 9}
        assert [path for _text, path in answers] == ["snapshot"] * 6
        assert host.calls.count("restore") == 3 and list(host.snapshots) == ["snap1"]
        assert ready(node) == 3


@on_loop
async def test_no_more_start_than_there_may_be_and_the_rest_takes_the_slots_in_turn(tmp_path: Path) -> None:
    host = StandInHost(delay=0.002)
    async with run_node(configure(tmp_path, {"mouse": several(2, 1)}), host) as node:
        order: list[int] = []

        async def one(number: int) -> None:
            async with node.replica("mouse") as lease:
                order.append(number)
                async for _event in lease.generate(TextPrompt("a"), Sampling(max_tokens=4)):
                    pass

        await asyncio.gather(*(one(number) for number in range(20)))
        assert host.calls.count("start_worker") == 2 and len(replicas(node)) == 2
        started = {0, 19}  # those two did not wait for a slot: a replica was started for each
        assert [number for number in order if number not in started] == list(range(1, 19))


@on_loop
async def test_idle_ones_go_when_they_are_too_many_and_the_last_stays_for_its_keep_alive(tmp_path: Path) -> None:
    scaling = {"stable_window": 0.3, "panic_window": 0.1, "max_down_rate": 10}
    config = configure(tmp_path, {"mouse": several(3, 1, scaling=scaling)}, sleep_memory="1GiB", memory="4GiB")
    async with run_node(config, StandInHost()) as node:
        stack, _paths = await held(node, 3)
        async with stack:
            await until(lambda: ready(node) == 3)
        await until(lambda: ready(node) == 1)
        await until(lambda: sorted(replicas(node).values()) == ["dozing", "dozing", "ready"])
        stack, paths = await held(node, 3)
        async with stack:
            assert paths[0] == "hot" and "sleep" in paths and set(paths) <= {"hot", "sleep"}


@on_loop
async def test_the_autoscaler_has_room_ready_before_it_is_needed(tmp_path: Path) -> None:
    config = configure(tmp_path, {"mouse": several(4, 4, scaling={"utilization": 0.5})})
    async with run_node(config, StandInHost()) as node:
        stack, _paths = await held(node, 3)
        async with stack:
            await until(lambda: ready(node) == 2)  # 3 of 4 slots are more than half


@on_loop
async def test_what_keep_alive_lets_go_is_not_started_again_while_nobody_asks(tmp_path: Path) -> None:
    scaling = {"target": 0.4, "utilization": 1}
    host = StandInHost()
    async with run_node(configure(tmp_path, {"mouse": several(2, 1, keep_alive=0.05, scaling=scaling)}), host) as node:
        await ask(node)
        await until(lambda: host.calls.count("start_worker") == 2 and replicas(node) == {"mouse": "asleep"})
        await asyncio.sleep(2.5)  # the autoscaler looks every two seconds, over a window of a minute
        assert host.calls.count("start_worker") + host.calls.count("restore") == 2


@on_loop
async def test_a_replica_that_does_not_start_costs_nobody_a_request_where_others_are(tmp_path: Path) -> None:
    host = StandInHost(delay=0.01)
    async with run_node(configure(tmp_path, {"mouse": several(2, 1, scaling={"target": 2})}), host) as node:
        await node.wake("mouse")
        host.lasting_faults["start_worker"] = HostError("no more processes")
        answers = await asyncio.gather(*(ask(node, tokens=30) for _ in range(5)))
        assert [path for _text, path in answers] == ["hot"] * 5
        assert host.calls.count("start_worker") == 2  # the second one is not tried again for each of them
        assert "no more processes" in (node.statuses()[0].last_error or "")


@on_loop
async def test_all_who_wait_get_the_error_of_the_only_start(tmp_path: Path) -> None:
    host = StandInHost(lasting_faults={"start_worker": HostError("no more processes")})
    async with run_node(configure(tmp_path, {"mouse": several(1, 1)}), host) as node:
        outcomes = await asyncio.gather(*(ask(node) for _ in range(8)), return_exceptions=True)
        assert all(isinstance(outcome, HostError) for outcome in outcomes)
        assert host.calls.count("start_worker") == 1 and node.statuses()[0].waiting == 0


@on_loop
async def test_replicas_share_their_weights(tmp_path: Path) -> None:
    """400 MiB of weights, 64 MiB beside them for each replica."""
    models = {"mouse": FakeModel("mouse", weight_bytes=400 * MIB, checkpoint="c")}
    config = configure(tmp_path, {"mouse": several(3, 1)}, memory="600MiB")
    async with run_node(config, StandInHost(), models) as node:
        stack, _paths = await held(node, 3)
        async with stack:
            assert ready(node) == 3
        assert sum(one.host_bytes for one in node._standings()) == (400 + 3 * 64) * MIB


@on_loop
async def test_without_weights_to_share_the_memory_decides_how_many_there_are(tmp_path: Path) -> None:
    models = {"mouse": FakeModel("mouse", weight_bytes=400 * MIB)}
    config = configure(tmp_path, {"mouse": several(3, 1)}, memory="1000MiB")
    async with run_node(config, StandInHost(delay=0.002), models) as node:
        stack, _paths = await held(node, 2)
        async with stack:
            third = asyncio.create_task(ask(node))
            await asyncio.sleep(0.1)
            assert ready(node) == 2 and not third.done() and node.statuses()[0].waiting == 1
        assert (await third)[0] == "a b a"


@on_loop
async def test_an_idle_replica_goes_for_another_model_and_a_busy_one_does_not(tmp_path: Path) -> None:
    models = {name: FakeModel(name, weight_bytes=200 * MIB) for name in ("mouse", "vole")}
    config = configure(tmp_path, {"mouse": several(2, 1), "vole": ModelConfig()}, memory="600MiB")
    async with run_node(config, StandInHost(), models) as node:
        stack, _paths = await held(node, 2)
        async with stack:
            await until(lambda: ready(node) == 2)
        async with node.replica("mouse") as lease:
            assert (await ask(node, "vole"))[1] == "cold"
            assert ready(node) == 1
            events = [event async for event in lease.generate(TextPrompt("x"), Sampling(max_tokens=1))]
            assert isinstance(events[-1], Finished)


@on_loop
async def test_a_model_without_room_is_not_starved_by_one_that_is_always_asked_for(tmp_path: Path) -> None:
    models = {name: FakeModel(name, weight_bytes=200 * MIB) for name in ("mouse", "vole")}
    config = configure(tmp_path, {"mouse": several(1, 2), "vole": ModelConfig()}, memory="300MiB")
    async with run_node(config, StandInHost(delay=0.005), models) as node:
        stop = asyncio.Event()

        async def keep_asking() -> None:
            while not stop.is_set():
                await ask(node, tokens=8)

        asking = [asyncio.create_task(keep_asking()) for _ in range(4)]
        await until(lambda: ready(node) == 1)
        assert (await asyncio.wait_for(ask(node, "vole"), 15))[0] == "a b a"
        stop.set()
        await asyncio.gather(*asking)


@on_loop
async def test_models_that_take_each_others_place_serve_many_of_their_line_in_a_turn(tmp_path: Path) -> None:
    models = {name: FakeModel(name, weight_bytes=200 * MIB) for name in ("mouse", "vole")}
    settings = {name: several(1, 2) for name in models}
    host = StandInHost(delay=0.005)
    async with run_node(configure(tmp_path, settings, memory="300MiB"), host, models) as node:
        answers = await asyncio.gather(*(ask(node, name) for _ in range(40) for name in models))
        assert len(answers) == 80
        assert host.calls.count("start_worker") + host.calls.count("restore") <= 20  # one for each request would be 80


@on_loop
async def test_a_tenant_at_its_cap_waits_and_others_pass(tmp_path: Path) -> None:
    tenants = {"small": {"cap": 1}, "large": {}}
    async with run_node(configure(tmp_path, tenants=tenants), StandInHost()) as node:
        async with node.replica("mouse", tenant="small"):
            second = asyncio.create_task(ask(node, tenant="small"))
            assert (await ask(node, tenant="large"))[0] == "a b a"
            assert (await ask(node))[0] == "a b a"
            await asyncio.sleep(0.05)
            assert not second.done() and node.statuses()[0].waiting == 1
        assert (await second)[0] == "a b a"
        assert (await ask(node, tenant="small"))[0] == "a b a"


@on_loop
async def test_those_at_their_cap_count_in_the_queue(tmp_path: Path) -> None:
    config = configure(tmp_path, tenants={"small": {"cap": 1}}, max_queue=1)
    async with run_node(config, StandInHost()) as node:
        async with node.replica("mouse", tenant="small"):
            second = asyncio.create_task(ask(node, tenant="small"))
            await until(lambda: node.statuses()[0].waiting == 1)
            with pytest.raises(BusyError):
                await ask(node, tenant="small")
            assert (await ask(node))[0] == "a b a"  # who need not wait is in nobody's way
        await second


@on_loop
async def test_priority_goes_first(tmp_path: Path) -> None:
    async with run_node(configure(tmp_path, {"mouse": several(1, 1)}), StandInHost()) as node:
        order: list[int] = []

        async def one(priority: int) -> None:
            async with node.replica("mouse", priority=priority):
                order.append(priority)

        async with node.replica("mouse"):
            asking = [asyncio.create_task(one(priority)) for priority in (0, -1, 2, 1)]
            await until(lambda: node.statuses()[0].waiting == 4)
        await asyncio.gather(*asking)
        assert order == [2, 1, 0, -1]


@on_loop
async def test_sleep_puts_all_to_sleep_and_a_new_snapshot_is_for_all(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path, {"mouse": several(3, 1)}), host) as node:
        stack, _paths = await held(node, 3)
        async with stack:
            pass
        status = await node.sleep("mouse")
        assert status.replicas == {"mouse": "asleep"} and host.alive() == 0
        newest = (await node.snapshot("mouse")).snapshot_id
        await until(lambda: list(host.snapshots) == [newest])
        stack, paths = await held(node, 3)
        async with stack:
            assert set(paths) <= {"snapshot", "hot"} and host.calls.count("start_worker") == 3


@on_loop
async def test_so_many_as_are_provisioned_are_there_and_stay(tmp_path: Path) -> None:
    models = {name: FakeModel(name, weight_bytes=200 * MIB) for name in ("mouse", "vole")}
    settings = {"mouse": several(3, 1, provisioned=2, keep_alive=0), "vole": ModelConfig()}
    async with run_node(configure(tmp_path, settings, memory="600MiB"), StandInHost(), models) as node:
        await until(lambda: ready(node) == 2)
        stack, paths = await held(node, 2)
        async with stack:
            assert paths == ["hot", "hot"]
        with pytest.raises(HostError, match="kept forever"):
            await ask(node, "vole")
        assert ready(node) == 2


@on_loop
async def test_a_worker_that_dies_takes_only_its_own_requests_along(tmp_path: Path) -> None:
    host = StandInHost(delay=0.01)
    async with run_node(configure(tmp_path, {"mouse": several(2, 1)}), host) as node:
        stack, _paths = await held(node, 2)
        async with stack:
            pass

        async def dies() -> None:
            async with node.replica("mouse") as lease:
                async for _event in lease.generate(TextPrompt("x x x die"), Sampling(max_tokens=9)):
                    pass

        dying = asyncio.create_task(dies())
        answers = [await ask(node, tokens=10) for _ in range(3)]
        assert {text for text, _path in answers} == {"a b a b a b a b a b"}
        with pytest.raises(EngineError):
            await dying


@on_loop
async def test_adapters_reach_whichever_replica_answers(tmp_path: Path) -> None:
    async with run_node(configure(tmp_path, {"mouse": several(2, 1)}), StandInHost()) as node:
        await node.load_adapter("tail", "mouse-tail")
        async with AsyncExitStack() as stack:
            leases = [await stack.enter_async_context(node.replica("tail")) for _ in range(2)]
            for lease in leases:
                events = [event async for event in lease.generate(TextPrompt("x"), Sampling(max_tokens=1))]
                assert isinstance(events[0], Delta) and events[0].text.startswith("<tail")
            assert ready(node) == 2
        await node.unload_adapter("tail")


@on_loop
async def test_the_end_of_the_node_fails_those_who_wait_for_a_slot(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path, {"mouse": several(1, 1)}), host) as node:
        async with node.replica("mouse"):
            waiting = asyncio.create_task(ask(node))
            await until(lambda: node.statuses()[0].waiting == 1)
            ending = asyncio.create_task(node.__aexit__(None, None, None))
            with pytest.raises(StoppingError):
                await waiting
            with pytest.raises(StoppingError):
                await ask(node)
        await ending


@on_loop
async def test_of_those_that_fall_asleep_at_once_one_is_captured(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path, {"mouse": several(3, 1)}), host) as node:
        stack, _paths = await held(node, 3)
        async with stack:
            pass
        await node.sleep("mouse")
        assert host.calls.count("capture") == 1 and list(host.snapshots) == ["snap1"]
        stack, paths = await held(node, 3)
        async with stack:
            assert "cold" not in paths and host.calls.count("start_worker") == 3


@on_loop
async def test_a_snapshot_that_goes_while_it_is_restored_gives_way_to_the_newer_one(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path, {"mouse": several(2, 1, scaling={"target": 9})}), host) as node:
        await node.wake("mouse")
        await node.sleep("mouse")
        gate = host.gates["restore"] = asyncio.Event()
        host.gates["restore"].set()
        async with node.replica("mouse"):
            gate.clear()
            second = asyncio.create_task(ask(node))
            await until(lambda: host.calls.count("restore") == 2)
            host.snapshots["snap2"] = host.snapshots.pop("snap1")  # as when another one has been captured
            host.models["snap2"], host.kinds["snap2"] = "mouse", host.kinds["snap1"]
            node._captured(host.kinds["snap2"], "mouse", "snap2")
            gate.set()
            assert (await second)[1] == "snapshot" and host.calls.count("start_worker") == 1


@on_loop
async def test_a_slot_is_given_back_even_when_a_stream_can_not_be_ended(tmp_path: Path) -> None:
    async with run_node(configure(tmp_path, tenants={"t": {"cap": 1}}), StandInHost(delay=0.05)) as node:
        with pytest.raises(RuntimeError, match="already running"):
            async with node.replica("mouse", tenant="t") as lease:
                reading = asyncio.ensure_future(anext(lease.generate(TextPrompt("a"), Sampling(max_tokens=3))))
                await asyncio.sleep(0)
        await reading
        assert node.statuses()[0].in_flight == 0
        assert await asyncio.wait_for(ask(node, tenant="t"), 5)


@on_loop
async def test_who_waits_behind_one_of_its_tenant_that_is_given_up_has_its_turn(tmp_path: Path) -> None:
    """The first one's turn has come, but all slots are taken; it goes, and so the turn is the second one's."""
    config = configure(tmp_path, {"mouse": several(1, 2)}, tenants={"t": {"cap": 1}})
    async with run_node(config, StandInHost()) as node:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(node.replica("mouse"))
            async with node.replica("mouse", tenant="t"):
                third = asyncio.create_task(held(node, 1))
                await asyncio.sleep(0.01)
                first = asyncio.create_task(ask(node, tenant="t"))
                await asyncio.sleep(0)
                second = asyncio.create_task(ask(node, tenant="t"))
                await until(lambda: node.statuses()[0].waiting == 3)
            await stack.enter_async_context((await third)[0])
            await until(lambda: node.statuses()[0].waiting == 2)
            await asyncio.sleep(0.01)
            first.cancel()
            await asyncio.sleep(0.01)
        assert (await asyncio.wait_for(second, 5))[0] == "a b a"


@on_loop
async def test_weights_that_stay_with_a_pinned_replica_are_not_waited_for(tmp_path: Path) -> None:
    models = {
        "mouse": FakeModel("mouse", weight_bytes=400 * MIB, checkpoint="c"),
        "vole": FakeModel("vole", weight_bytes=436 * MIB),
    }
    settings = {"mouse": several(2, 1, provisioned=1), "vole": ModelConfig()}
    async with run_node(configure(tmp_path, settings, memory="900MiB"), StandInHost(), models) as node:
        stack, _paths = await held(node, 2)
        async with stack:
            pass
        with pytest.raises(HostError, match="kept forever"):
            await asyncio.wait_for(ask(node, "vole"), 5)
        assert ready(node) == 2  # nobody went in vain


@on_loop
async def test_a_process_that_dozes_beside_a_replica_needs_no_weights_to_wake(tmp_path: Path) -> None:
    models = {"mouse": FakeModel("mouse", weight_bytes=400 * MIB, checkpoint="c")}
    config = configure(tmp_path, {"mouse": several(2, 1)}, memory="600MiB", sleep_memory="100MiB")
    async with run_node(config, StandInHost(), models) as node:
        stack, _paths = await held(node, 2)
        async with stack:
            pass
        node._crews["mouse"].named("mouse#2").press(keep=True)
        await until(lambda: replicas(node) == {"mouse": "ready", "mouse#2": "dozing"})
        async with node.replica("mouse"):
            assert (await asyncio.wait_for(ask(node), 5))[1] == "sleep"


@on_loop
async def test_the_autoscaler_starts_no_more_than_there_is_room_for(tmp_path: Path) -> None:
    models = {"mouse": FakeModel("mouse", weight_bytes=200 * MIB)}
    config = configure(tmp_path, {"mouse": several(4, 4, scaling={"target": 1})}, memory="600MiB")
    async with run_node(config, StandInHost(), models) as node:
        stack, _paths = await held(node, 4)
        async with stack:
            await until(lambda: ready(node) == 2)
            assert len(replicas(node)) == 2
            await asyncio.sleep(0.02)
            assert replicas(node) == {"mouse": "ready", "mouse#2": "ready"}


@on_loop
async def test_who_waits_for_the_end_of_a_capture_holds_nobody_up(tmp_path: Path) -> None:
    models = {name: FakeModel(name, weight_bytes=200 * MIB) for name in ("mouse", "vole")}
    host = StandInHost()
    config = configure(
        tmp_path, {"mouse": several(2, 1, scaling={"target": 9}), "vole": ModelConfig()}, memory="550MiB"
    )
    async with run_node(config, host, models) as node:
        await node.wake("mouse")
        await node.wake("vole")
        gate = host.gates["capture"] = asyncio.Event()
        sleeping = asyncio.create_task(node.sleep("mouse"))
        await until(lambda: "capture" in host.calls)
        asking = asyncio.create_task(ask(node))
        await asyncio.sleep(0.01)
        for _ in range(3):
            assert (await asyncio.wait_for(ask(node, "vole"), 5))[1] == "hot"
        gate.set()
        await asyncio.gather(sleeping, asking)


@on_loop
async def test_who_waits_for_memory_takes_a_slot_that_is_free_before(tmp_path: Path) -> None:
    """The room that a second replica was to have is taken by a request just then."""
    models = {name: FakeModel(name, weight_bytes=200 * MIB) for name in ("mouse", "vole")}
    settings = {"mouse": several(2, 1, scaling={"target": 9}), "vole": ModelConfig()}
    config = configure(tmp_path, settings, memory="550MiB")
    async with run_node(config, StandInHost(), models) as node:
        await node.wake("vole")
        async with AsyncExitStack() as vole:
            async with node.replica("mouse"):
                second = asyncio.create_task(ask(node))
                while "mouse#2" not in replicas(node):  # noqa: ASYNC110 - not a moment later
                    await asyncio.sleep(0)
                await vole.enter_async_context(node.replica("vole"))
                await asyncio.sleep(0.05)
                assert not second.done()
            assert (await asyncio.wait_for(second, 5))[1] == "hot"
            await until(lambda: list(replicas(node)) == ["mouse"])


@on_loop
async def test_a_replica_without_room_that_nobody_wants_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room that the autoscaler has seen is taken by a request just then, and who was to have it goes."""
    monkeypatch.setattr("dormouse.node.scaling._TICK", 0.05)
    models = {name: FakeModel(name, weight_bytes=200 * MIB) for name in ("mouse", "vole")}
    rules = {"stable_window": 0.1, "panic_window": 0.05, "target": 9}
    settings = {"mouse": several(2, 2, scaling=rules), "vole": ModelConfig()}
    async with run_node(configure(tmp_path, settings, memory="550MiB"), StandInHost(), models) as node:
        await node.wake("vole")
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(node.replica("mouse"))
            assert node._start_beside(node._crews["mouse"], True)
            await stack.enter_async_context(node.replica("vole"))
            assert replicas(node) == {"mouse": "ready", "mouse#2": "starting"}
            await until(lambda: replicas(node) == {"mouse": "ready"})


@on_loop
async def test_a_process_that_dozes_beside_what_is_provisioned_goes_for_others(tmp_path: Path) -> None:
    models = {name: FakeModel(name, weight_bytes=200 * MIB) for name in ("mouse", "vole")}
    scaling = {"stable_window": 0.2, "panic_window": 0.1}
    settings = {"mouse": several(2, 1, provisioned=1, scaling=scaling), "vole": ModelConfig()}
    config = configure(tmp_path, settings, memory="530MiB", sleep_memory=0.5)
    async with run_node(config, StandInHost(), models) as node:
        stack, _paths = await held(node, 2)
        async with stack:
            pass
        node._crews["mouse"].named("mouse#2").press(keep=True)
        await until(lambda: node._crews["mouse"].named("mouse#2").replica.state in ("dozing", "asleep"))
        assert (await asyncio.wait_for(ask(node, "vole"), 5))[1] == "cold"
        assert replicas(node) == {"mouse": "ready"}


@on_loop
async def test_an_adapter_leaves_all_workers_whatever_one_says(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path, {"mouse": several(2, 1)}), host) as node:
        await node.load_adapter("tail", "mouse-tail")
        async with AsyncExitStack() as stack:
            for _ in range(2):
                await stack.enter_async_context(node.replica("tail"))
        drop = "drop_segment checkpoint of mouse-tail"
        host.faults[drop] = HostError("no")
        with pytest.raises(HostError, match="no"):
            await node.unload_adapter("tail")
        assert host.calls.count(drop) == 2


Act = Callable[[Node], Awaitable[Any]]


def on_gpus(sizes: Mapping[str, int], **devices: str) -> tuple[dict[str, FakeModel], dict[str, ModelConfig]]:
    """Models of so many MiB of weights, with 64 MiB beside them."""
    models = {name: FakeModel(name, weight_bytes=size * MIB, checkpoint=f"c {name}") for name, size in sizes.items()}
    return models, {name: several(3, 1, device=devices[name]) for name in sizes}


@on_loop
async def test_replicas_spread_over_the_gpus_that_have_room(tmp_path: Path) -> None:
    """Of 972 MiB each: the second GPU has a model of its own."""
    models, settings = on_gpus({"mouse": 400, "vole": 700}, mouse="cuda:0,1", vole="cuda:1")
    host = StandInHost(gpu_bytes=1 << 30)
    async with run_node(configure(tmp_path, settings, memory="20GiB"), host, models) as node:
        vole, _paths = await held(node, 1, "vole")
        async with vole:
            stack, _paths = await held(node, 2)
            async with stack:
                assert [one.gpu for one in node._standings() if one.awake and one.model == "mouse"] == ["cuda:0"] * 2
        stack, _paths = await held(node, 3)
        async with stack:
            places = [one.gpu for one in node._standings() if one.awake and one.model == "mouse"]
            assert sorted(places) == ["cuda:0", "cuda:0", "cuda:1"]
            assert [one.name for one in node._standings() if one.awake and one.model == "vole"] == []


@on_loop
async def test_who_fits_on_none_of_its_gpus_is_told_at_once(tmp_path: Path) -> None:
    models, settings = on_gpus({"mouse": 1000}, mouse="cuda:0,1")
    async with run_node(configure(tmp_path, settings, memory="20GiB"), StandInHost(gpu_bytes=1 << 30), models) as node:
        with pytest.raises(HostError, match="1064 MiB of cuda:0, its budget is 972 MiB"):
            await ask(node)


@pytest.mark.parametrize(("seed", "device"), [(0, "cpu"), (2, "cuda")])
def test_whatever_comes_every_request_ends_and_memory_is_never_passed(tmp_path: Path, seed: int, device: str) -> None:
    """Requests of three models and two tenants, given up at times, over a host that fails at times."""
    import random

    rng = random.Random(seed)
    sizes: Mapping[str, int] = {"a": 200, "b": 150, "c": 100}

    @on_loop
    async def run() -> None:
        host = StandInHost(delay=0.001)
        models = {
            name: FakeModel(name, weight_bytes=size * MIB, checkpoint=f"c {name}") for name, size in sizes.items()
        }
        scaling = {"stable_window": 0.2, "panic_window": 0.1}
        settings = {
            name: several(3, 2, scaling=scaling, keep_alive=rng.choice([0, 0.05, 9]), device=device) for name in sizes
        }
        host_bytes, gpu_bytes = (500 * MIB, 0) if device == "cpu" else (2000 * MIB, 600 * MIB)
        config = configure(
            *(tmp_path, settings),
            memory=host_bytes,
            gpu_memory=gpu_bytes or None,
            sleep_memory=rng.choice([0, 0.5]),
            tenants={"t": {"cap": 2}},
        )
        async with run_node(config, host, models) as node:

            async def one(number: int) -> str:
                await asyncio.sleep(rng.random() * 1.5)
                if rng.random() < 0.1:
                    host.faults[rng.choice(["restore", "start_worker", "capture"])] = EngineError("chance")
                asking = asyncio.create_task(
                    ask(node, rng.choice("aabc"), rng.randint(1, 30), tenant=rng.choice(["", "t"]), priority=number % 3)
                )
                if rng.random() < 0.15:
                    await asyncio.sleep(rng.random() * 0.05)
                    asking.cancel()
                try:
                    return (await asking)[0]
                except asyncio.CancelledError:
                    return "given up"
                except DormouseError as error:
                    assert "chance" in str(error), error
                    return "failed"

            async def watch() -> None:
                while True:
                    held = [one for _runner, one in node._admission._held()]
                    assert sum(one.host_bytes for one in held) <= host_bytes
                    assert sum(one.gpu_bytes for one in held) <= gpu_bytes
                    await asyncio.sleep(0.002)

            watching = asyncio.create_task(watch())
            began = time.perf_counter()
            outcomes = await asyncio.wait_for(asyncio.gather(*(one(number) for number in range(80))), 20)
            assert time.perf_counter() - began < 20 and outcomes.count("failed") < 40
            assert not watching.done(), watching.exception()
            watching.cancel()
            await until(lambda: all(status.waiting == status.in_flight == 0 for status in node.statuses()))
            assert not node._placing._waiting and not len(node._placing._queue)
            assert not any(node._placing._queue._running.values())

    run()
