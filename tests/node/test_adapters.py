"""Adapters on a node, with real worker processes that make up their answers."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest

from dormouse.config import ModelConfig
from dormouse.engine.messages import Delta, Sampling, TextPrompt
from dormouse.errors import BusyError, ConfigError, EngineError, NotFoundError, RequestError, WeightsError
from dormouse.node.adapters import MAX_ADAPTERS
from tests.node.standin import StandInHost, configure, on_loop, run_node, until
from tests.node.test_node import ask, state


def loads(host: StandInHost) -> int:
    return host.calls.count("take_segment")


@on_loop
async def test_an_adapter_of_an_awake_model_is_loaded_at_once(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await ask(node)
        await node.load_adapter("tail", "mouse-tail")
        assert loads(host) == 1
        assert await ask(node, model="tail") == ("<tail#1> a b", "hot")
        assert (await ask(node))[0] == "a b a", "the base answers as before"
        assert loads(host) == 1
        assert node.statuses()[0].adapters == ("mouse-tail",)


@on_loop
async def test_an_adapter_of_a_sleeping_model_wakes_it_with_its_first_request(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await node.load_adapter("tail", "mouse-tail")
        assert state(node) == "asleep" and loads(host) == 0
        assert await ask(node, model="tail") == ("<tail#1> a b", "cold")


@on_loop
async def test_a_sleep_takes_adapters_from_the_worker_and_not_from_the_clients(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await node.load_adapter("tail", "mouse-tail")
        await node.load_adapter("ear", "mouse-ear")
        await ask(node, model="tail")
        await node.sleep("mouse")
        assert await ask(node, model="tail") == ("<tail#1> a b", "snapshot")
        assert await ask(node, model="ear") == ("<ear#2> a b", "hot")
        assert loads(host) == 3


@on_loop
async def test_a_worker_that_resumes_after_a_failed_capture_gets_its_adapters_again(tmp_path: Path) -> None:
    host = StandInHost(faults={"capture": EngineError("no")})
    models = {"mouse": ModelConfig(keep_alive=0.01)}
    async with run_node(configure(tmp_path, models), host) as node:
        await node.load_adapter("tail", "mouse-tail")
        await ask(node, model="tail")
        await until(lambda: "capture" in host.calls)
        assert (await ask(node, model="tail"))[0] == "<tail#1> a b"


@on_loop
async def test_many_first_requests_load_it_once(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await node.load_adapter("tail", "mouse-tail")
        answers = await asyncio.gather(*(ask(node, model=name) for name in ["tail", "mouse"] * 6))
        assert {text for text, _start in answers} == {"<tail#1> a b", "a b a"}
        assert loads(host) == 1


@on_loop
async def test_a_client_that_leaves_while_it_is_loaded_hurts_nobody(tmp_path: Path) -> None:
    host = StandInHost(gates={"take_segment": asyncio.Event()})
    async with run_node(configure(tmp_path), host) as node:
        await ask(node)
        leaving = asyncio.create_task(node.load_adapter("tail", "mouse-tail"))
        await until(lambda: loads(host) == 1)
        leaving.cancel()
        await asyncio.wait([leaving])
        assert node.adapters() == []
        asyncio.get_running_loop().call_later(0.05, host.gates["take_segment"].set)
        await node.sleep("mouse")  # waits for the loading, so that nothing is sent to a parked worker
        assert await ask(node) == ("a b a", "snapshot")


@on_loop
async def test_a_worker_that_ends_while_it_is_loaded_is_an_error_and_the_next_one_gets_it(tmp_path: Path) -> None:
    host = StandInHost(gates={"take_segment": asyncio.Event()})
    async with run_node(configure(tmp_path), host) as node:
        await ask(node)
        loading = asyncio.create_task(node.load_adapter("tail", "mouse-tail"))
        await until(lambda: loads(host) == 1)
        next(iter(host.processes.values())).kill()
        await asyncio.wait([loading])
        assert isinstance(loading.exception(), EngineError)
        host.gates["take_segment"].set()
        await node.load_adapter("tail", "mouse-tail")
        assert (await ask(node, model="tail"))[0] == "<tail#2> a b"


@on_loop
async def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        host.worker_fault = "adapter"
        await ask(node)
        with pytest.raises(EngineError, match="it does not fit"):
            await node.load_adapter("tail", "mouse-tail")
        assert node.adapters() == []
        host.faults["take_segment"] = WeightsError("the weights are gone")
        with pytest.raises(WeightsError):
            await node.load_adapter("tail", "mouse-tail")
        with pytest.raises(NotFoundError):
            await ask(node, model="tail")
        await node.load_adapter("tail", "mouse-tail")
        assert (await ask(node, model="tail"))[0] == "<tail#3> a b"


@on_loop
async def test_wrong_names(tmp_path: Path) -> None:
    async with run_node(configure(tmp_path), StandInHost()) as node:
        await node.load_adapter("tail", "mouse-tail")
        for name, source, error, said in (
            ("tail", "mouse-ear", RequestError, "has already been loaded"),
            ("mouse", "mouse-ear", RequestError, "is the name of a model"),
            ("x", "nothing", NotFoundError, "no model named"),
            ("x", "mouse-model", ConfigError, "is a model, not an adapter"),
            ("x", "shrew-tail", ConfigError, "adapter of shrew, which is not served"),
        ):
            with pytest.raises(error, match=said):
                await node.load_adapter(name, source)
        with pytest.raises(NotFoundError):
            await node.unload_adapter("x")
        for number in range(MAX_ADAPTERS - 1):
            await node.load_adapter(f"t{number}", "mouse-tail")
        with pytest.raises(RequestError, match="64 adapters already"):
            await node.load_adapter("more", "mouse-tail")


@on_loop
async def test_unloading_lets_requests_end_and_takes_no_new_ones(tmp_path: Path) -> None:
    host = StandInHost(delay=0.02)
    async with run_node(configure(tmp_path), host) as node:
        await node.load_adapter("tail", "mouse-tail")
        async with node.replica("tail") as lease:
            stream = lease.generate(TextPrompt("a b"), Sampling(max_tokens=20))
            async with aclosing(stream) as events:  # type: ignore[type-var]
                first = await anext(aiter(events))
                assert isinstance(first, Delta)
                unloading = asyncio.create_task(node.unload_adapter("tail"))
                await asyncio.sleep(0.01)
                with pytest.raises(NotFoundError, match="being unloaded"):
                    await ask(node, model="tail")
                with pytest.raises(NotFoundError, match="not loaded"):
                    await node.unload_adapter("tail")
                assert node.adapters() == []
                rest = [event async for event in events]
            assert sum(len(event.token_ids) for event in rest if isinstance(event, Delta)) == 19
            assert not unloading.done()
        await unloading
        assert host.calls[-1] == "drop_segment checkpoint of mouse-tail"
        with pytest.raises(NotFoundError, match="not served here"):
            await ask(node, model="tail")
        await node.load_adapter("tail", "mouse-tail")
        assert (await ask(node, model="tail", tokens=1))[0] == "<tail#2>"


@on_loop
async def test_unloading_one_whose_model_sleeps_or_that_no_worker_has(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await node.load_adapter("tail", "mouse-tail")
        await node.unload_adapter("tail")
        assert host.calls == ["drop_segment checkpoint of mouse-tail"]
        await node.load_adapter("tail", "mouse-tail")
        await ask(node)
        await node.unload_adapter("tail")
        assert loads(host) == 0


@on_loop
async def test_one_name_of_an_adapter_goes_without_the_segment_of_the_other(tmp_path: Path) -> None:
    dropped = "drop_segment checkpoint of mouse-tail"
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        for name in ("tail", "brush"):
            await node.load_adapter(name, "mouse-tail")
            await ask(node, model=name)
        await node.unload_adapter("tail")
        assert dropped not in host.calls, "the other's may be filling, and is used"
        assert (await ask(node, model="brush"))[0] == "<brush#2> a b"
        await node.unload_adapter("brush")
        assert host.calls.count(dropped) == 1


@on_loop
async def test_a_worker_on_a_gpu_gives_the_segment_back_once_it_has_its_copy(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path, {"mouse": ModelConfig(device="cuda:0")}), host) as node:
        await node.load_adapter("tail", "mouse-tail")
        assert (await ask(node, model="tail"))[0] == "<tail#1> a b"
        assert host.calls[-1] == "drop_segment checkpoint of mouse-tail, keep"


@on_loop
async def test_adapters_of_the_configuration_are_served_from_the_start(tmp_path: Path) -> None:
    models = {"mouse": ModelConfig(adapters=("mouse-tail", "mouse-ear"))}
    async with run_node(configure(tmp_path, models), StandInHost()) as node:
        assert [served.name for served in node.adapters()] == ["mouse-ear", "mouse-tail"]
        assert (await ask(node, model="mouse-ear"))[0] == "<mouse-ear#2> a b"


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("nothing", NotFoundError, "no model named"),
        ("vole-tail", ConfigError, "is an adapter of vole, not of mouse"),
        ("mouse-model", ConfigError, "not an adapter"),
    ],
)
def test_a_wrong_adapter_in_the_configuration_stops_the_start(
    tmp_path: Path, name: str, error: type[Exception], said: str
) -> None:
    async def start() -> None:
        models = {"mouse": ModelConfig(adapters=(name,)), "vole": ModelConfig()}
        async with run_node(configure(tmp_path, models), StandInHost()):
            raise AssertionError("it started")

    with pytest.raises(error, match=said):
        asyncio.run(start())


@on_loop
async def test_one_place_at_a_time_is_enough_for_an_adapter(tmp_path: Path) -> None:
    models = {"mouse": ModelConfig(max_concurrent=1)}
    async with run_node(configure(tmp_path, models, max_queue=8), StandInHost()) as node:
        await node.load_adapter("tail", "mouse-tail")
        answers = await asyncio.gather(*(ask(node, model="tail") for _ in range(4)), return_exceptions=True)
        assert all(not isinstance(answer, BusyError) and answer[0] == "<tail#1> a b" for answer in answers)  # type: ignore[index]


@on_loop
async def test_the_end_of_the_node_ends_what_is_being_loaded(tmp_path: Path) -> None:
    host = StandInHost(gates={"take_segment": asyncio.Event()})
    async with run_node(configure(tmp_path), host) as node:
        await ask(node)
        loading = asyncio.create_task(node.load_adapter("tail", "mouse-tail"))
        await until(lambda: loads(host) == 1)
    await asyncio.wait([loading])
    assert loading.exception() is not None
