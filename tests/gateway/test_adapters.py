"""The routes for adapters, and adapters as models, over a stand-in host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from dormouse.config import ModelConfig
from tests.gateway.http import Rig, assert_problem, rig
from tests.node.standin import StandInHost, on_loop


async def load(gateway: Rig, name: str = "tail", path: str = "mouse-tail", **fields: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path, **fields}
    return await gateway.client.post("/v1/load_lora_adapter", json=body)


async def unload(gateway: Rig, name: str = "tail") -> httpx.Response:
    return await gateway.client.post("/v1/unload_lora_adapter", json={"lora_name": name})


@on_loop
async def test_load_answer_and_unload(tmp_path: Path) -> None:
    async with rig(tmp_path, adapter_routes=True) as gateway:
        assert (await gateway.chat()).json()["choices"][0]["message"]["content"] == "a b a"
        loaded = await load(gateway)
        assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'tail' added successfully.")
        answer = await gateway.chat(model="tail")
        assert answer.json()["model"] == "tail"
        assert answer.json()["choices"][0]["message"]["content"] == "<tail#1> a b"
        assert answer.headers["x-dormouse-start"].startswith("hot")
        text = await gateway.complete(model="tail", max_tokens=2)
        assert text.json()["choices"][0]["text"] == "<tail#1> a"
        stream = await gateway.chat(model="tail", stream=True)
        assert "tail#1" in stream.text
        unloaded = await unload(gateway)
        assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'tail' removed successfully.")
        assert_problem(await gateway.chat(model="tail"), 404, "model_not_found", param="model", mentions="'tail'")
        loads = 'dormouse_adapter_load_seconds_count{adapter="mouse-tail",model="mouse"}'
        assert await gateway.metric(loads) == 1
        counted = 'dormouse_requests_total{model="mouse-tail",route="/v1/chat/completions",status="200",'
        assert await gateway.metric(counted) == 2
        route = 'dormouse_requests_total{model="",route="/v1/load_lora_adapter",status="200",'
        assert await gateway.metric(route) == 1


@on_loop
async def test_adapters_are_listed_with_their_parent(tmp_path: Path) -> None:
    models = {"mouse": ModelConfig(adapters=("mouse-ear",)), "vole": ModelConfig()}
    async with rig(tmp_path, models=models, adapter_routes=True) as gateway:
        await load(gateway)
        listed = (await gateway.client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["mouse", "vole", "mouse-ear", "tail"]
        assert "parent" not in listed[0]
        assert (listed[3]["parent"], listed[3]["root"], listed[3]["object"]) == ("mouse", "mouse-tail", "model")
        assert (await gateway.client.get("/v1/models/tail")).json() == listed[3]
        assert_problem(await gateway.client.get("/v1/models/nose"), 404, "model_not_found", param="model")


@on_loop
async def test_the_routes_are_closed_unless_opened_and_need_a_key(tmp_path: Path) -> None:
    async with rig(tmp_path, keys={"secret": ""}, adapter_routes=True) as gateway:
        assert_problem(await load(gateway), 401, "invalid_api_key")
        assert_problem(await unload(gateway), 401, "invalid_api_key")
        gateway.client.headers["authorization"] = "Bearer secret"
        assert (await load(gateway)).status_code == 200


@on_loop
async def test_the_routes_are_closed_by_default(tmp_path: Path) -> None:
    async with rig(tmp_path) as gateway:
        assert_problem(await load(gateway), 403, "adapter_routes_closed", mentions="adapter_routes: true")
        assert_problem(await unload(gateway), 403, "adapter_routes_closed")


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"lora_name": "x", "lora_path": "nothing"}, 404, "adapter_not_found", None),
        ({"lora_name": "x", "lora_path": "../../etc"}, 404, "adapter_not_found", None),
        ({"lora_name": "x", "lora_path": "mouse-model"}, 400, "adapter_unusable", "lora_path"),
        ({"lora_name": "x", "lora_path": "shrew-tail"}, 400, "adapter_unusable", "lora_path"),
        ({"lora_name": "mouse", "lora_path": "mouse-tail"}, 400, "invalid_value", "lora_name"),
        ({"lora_name": "tail", "lora_path": "mouse-tail"}, 400, "adapter_loaded", "lora_name"),
        ({"lora_path": "mouse-tail"}, 400, "missing_required_parameter", "lora_name"),
        ({"lora_name": "", "lora_path": "mouse-tail"}, 400, "invalid_value", "lora_name"),
        ({"lora_name": "x\n\ndata: {}", "lora_path": "mouse-tail"}, 400, "invalid_value", "lora_name"),
        ({"lora_name": "x\n", "lora_path": "mouse-tail"}, 400, "invalid_value", "lora_name"),
        ({"lora_name": "x", "lora_path": "mouse-tail", "load_inplace": True}, 400, "invalid_value", "load_inplace"),
        ({"lora_name": "x", "lora_path": "mouse-tail", "base": 1}, 400, "unknown_parameter", "base"),
        ([], 400, "invalid_type", None),
    ],
)
def test_what_is_wrong_is_told_in_openais_shape(
    tmp_path: Path, body: object, status: int, code: str, param: str | None
) -> None:
    @on_loop
    async def run() -> None:
        async with rig(tmp_path, adapter_routes=True) as gateway:
            await load(gateway)
            answer = await gateway.client.post("/v1/load_lora_adapter", json=body)
            assert_problem(answer, status, code, param=param)
            assert_problem(await unload(gateway, "nothing"), 404, "adapter_not_found")

    run()


@on_loop
async def test_an_adapter_that_the_worker_refuses_is_not_served(tmp_path: Path) -> None:
    async with rig(tmp_path, StandInHost(worker_fault="adapter"), adapter_routes=True) as gateway:
        await gateway.chat()
        assert_problem(await load(gateway), 500, "engine_error", mentions="it does not fit")
        assert_problem(await gateway.chat(model="tail"), 404, "model_not_found", param="model")
        failures = 'dormouse_adapter_failures_total{adapter="mouse-tail",model="mouse",reason="engine_error"}'
        assert await gateway.metric(failures) == 1
