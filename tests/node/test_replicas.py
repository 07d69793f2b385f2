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


@pytest.mark.parametrize("seed", range(3))
def test_whatever_comes_every_request_ends_and_memory_is_never_passed(tmp_path: Path, seed: int) -> None:
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
        settings = {name: several(3, 2, scaling=scaling, keep_alive=rng.choice([0, 0.05, 9])) for name in sizes}
        config = configure(
            tmp_path, settings, memory="500MiB", sleep_memory=rng.choice([0, 0.5]), tenants={"t": {"cap": 2}}
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
                    held = sum(one.host_bytes for _runner, one in node._admission._held() if one.awake)
                    assert held <= 500 * MIB
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
