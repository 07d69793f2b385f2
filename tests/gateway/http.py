"""A gateway over a stand-in host, reached in-process or over a real port, and what every answer must look like."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from dormouse.config import ModelConfig
from dormouse.gateway.access import Gate
from dormouse.gateway.app import create_app
from dormouse.node.node import Node
from tests.node.standin import StandInHost, configure, run_node


@dataclass
class Rig:
    client: httpx.AsyncClient
    node: Node
    host: StandInHost
    gate: Gate

    async def chat(self, text: str = "a b", **fields: Any) -> httpx.Response:
        body = {"model": "mouse", "messages": [{"role": "user", "content": text}], "max_tokens": 3, **fields}
        return await self.client.post("/v1/chat/completions", json=body)

    async def complete(self, prompt: object = "a b", **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": "mouse", "prompt": prompt, **fields})

    async def metric(self, line: str) -> float:
        """The value of one sample, named as /metrics names it; 0 when it is not there."""
        page = (await self.client.get("/metrics")).text
        return next((float(row.rsplit(" ", 1)[1]) for row in page.splitlines() if row.startswith(line)), 0.0)


@asynccontextmanager
async def rig(
    data_dir: Path,
    host: StandInHost | None = None,
    *,
    keys: Mapping[str, str] | None = None,
    models: dict[str, ModelConfig] | None = None,
    **settings: object,
) -> AsyncIterator[Rig]:
    """In-process, without a socket. A response comes as a whole."""
    host = host or StandInHost()
    config = configure(data_dir, models, **settings)
    async with run_node(config, host) as node:
        gate = create_app(node, config, keys or {})
        transport = httpx.ASGITransport(gate, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield Rig(client, node, host, gate)


@asynccontextmanager
async def live_rig(data_dir: Path, host: StandInHost | None = None, **settings: Any) -> AsyncIterator[Rig]:
    """The same over a real port: responses stream, and clients can go away."""
    async with rig(data_dir, host, **settings) as inner:
        server = uvicorn.Server(
            uvicorn.Config(inner.gate, port=0, http="h11", ws="none", lifespan="off", log_config=None)
        )
        serving = asyncio.create_task(server._serve())
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield Rig(client, inner.node, inner.host, inner.gate)
        server.should_exit = True
        await serving


def assert_problem(
    response: httpx.Response, status: int, code: str, *, param: str | None = None, mentions: str = ""
) -> None:
    """Every error, on every route, has OpenAI's shape and gives nothing away."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert list(body) == ["error"]
    assert_problem_body(body, code, param=param, mentions=mentions)


def assert_problem_body(body: dict[str, Any], code: str, *, param: str | None = None, mentions: str = "") -> None:
    error = body["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert error["code"] == code and error["param"] == param
    assert error["type"] in ("invalid_request_error", "rate_limit_error", "server_error")
    assert mentions in error["message"] and "Traceback" not in error["message"]


def events(text: str) -> list[dict[str, Any]]:
    """The data of a stream that must be well-formed and end with [DONE]; comments are left out."""
    blocks = text.split("\n\n")
    assert blocks.pop() == "", "the stream ends with an empty line"
    data = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
    assert all("\n" not in block for block in blocks)
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


def comments(text: str) -> list[str]:
    """The comment lines of a stream."""
    return [line.removeprefix(": ") for line in text.splitlines() if line.startswith(":")]
