"""The routes of the gateway as one ASGI app over a node.

Gate (access.py) -> router -> parse (requests.py) -> Reply (serving.py) -> node
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from dormouse.config import ServeConfig
from dormouse.errors import ConfigError, DormouseError, NotFoundError, RequestError
from dormouse.gateway.access import CLIENT_GONE, Gate, Keys, read_body
from dormouse.gateway.metrics import Metrics
from dormouse.gateway.problems import HttpProblem, json_response, problem_response
from dormouse.gateway.requests import (
    Job,
    parse_chat,
    parse_completion,
    parse_load_adapter,
    parse_unload_adapter,
)
from dormouse.gateway.serving import Reply
from dormouse.node.node import Node


def create_app(node: Node, config: ServeConfig, keys: Mapping[str, str]) -> Gate:
    """The app, behind its gate. `keys` have the tenant of each; without any everyone who can connect may use it."""
    metrics = Metrics(node)
    routes = _Routes(node, config, metrics)
    app = Starlette(
        routes=[
            Route("/v1/models", routes.models, methods=["GET"]),
            Route("/v1/models/{id:path}", routes.model, methods=["GET"]),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/completions", routes.completion, methods=["POST"]),
            Route("/v1/load_lora_adapter", routes.load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", routes.unload_adapter, methods=["POST"]),
            Route("/healthz", routes.health, methods=["GET"]),
            Route("/readyz", routes.ready, methods=["GET"]),
            Route("/metrics", routes.metrics, methods=["GET"]),
        ],
        exception_handlers={
            DormouseError: _answer_problem,
            HttpProblem: _answer_problem,
            HTTPException: _answer_http_exception,
            ClientDisconnect: _answer_nobody,
            Exception: _answer_problem,
        },
    )
    app.router.redirect_slashes = False  # a redirect would name whatever host the client claims
    gate = Gate(app, keys=Keys(keys), metrics=metrics, metrics_open=config.metrics_open)
    routes.gate = gate
    return gate


class _Routes:
    """The endpoints."""

    gate: Gate

    def __init__(self, node: Node, config: ServeConfig, metrics: Metrics) -> None:
        self._node = node
        self._config = config
        self._metrics = metrics

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": list(self._models().values())})

    async def model(self, request: Request) -> Response:
        name = request.path_params["id"]
        models = self._models()
        if name not in models:
            raise NotFoundError(f"the model {name!r} is not served here", remedy="See /v1/models for those that are")
        return json_response(models[name])

    async def load_adapter(self, request: Request) -> Response:
        wanted = parse_load_adapter(await self._adapter_body(request))
        with _about_adapters():
            await self._node.load_adapter(wanted.lora_name, wanted.lora_path)
        return Response(f"Success: LoRA adapter '{wanted.lora_name}' added successfully.", media_type="text/plain")

    async def unload_adapter(self, request: Request) -> Response:
        wanted = parse_unload_adapter(await self._adapter_body(request))
        with _about_adapters():
            await self._node.unload_adapter(wanted.lora_name)
        return Response(f"Success: LoRA adapter '{wanted.lora_name}' removed successfully.", media_type="text/plain")

    async def _adapter_body(self, request: Request) -> bytes:
        if not self._config.adapter_routes:
            raise HttpProblem(
                403, "Adapters can't be changed over HTTP here. Set adapter_routes: true", code="adapter_routes_closed"
            )
        return await read_body(request, self._config.max_body_bytes)

    async def chat(self, request: Request) -> Reply:
        return await self._reply(request, parse_chat)

    async def completion(self, request: Request) -> Reply:
        return await self._reply(request, parse_completion)

    async def health(self, request: Request) -> Response:
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        if self.gate.draining:
            return json_response({"status": "shutting down"}, status=503)
        return json_response({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _reply(self, request: Request, parse: Callable[[bytes], Job]) -> Reply:
        job = parse(await read_body(request, self._config.max_body_bytes))
        return Reply(job, self._node, self._metrics, self._config)

    def _models(self) -> dict[str, dict[str, Any]]:
        """What /v1/models shows: the models, then their adapters."""
        common = {"object": "model", "created": int(self._node.started), "owned_by": "dormouse"}
        models = {name: {"id": name} | common for name in sorted(self._node.models)}
        return models | {
            served.name: {"id": served.name} | common | {"root": served.adapter.name, "parent": served.adapter.base}
            for served in self._node.adapters()
        }


@contextlib.contextmanager
def _about_adapters() -> Iterator[None]:
    """What is not found here is an adapter, and what is wrong with one is not the server's configuration."""
    try:
        yield
    except NotFoundError as error:
        remedy = "lora_path is the name of an adapter that was imported; /v1/models shows those that are loaded"
        raise HttpProblem(404, f"{error.message}. {remedy}", code="adapter_not_found") from error
    except ConfigError as error:
        raise RequestError(error.message, param="lora_path", reason="adapter_unusable", remedy=error.remedy) from error


async def _answer_problem(request: Request, error: Exception) -> Response:
    return problem_response(error)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    message = f"{phrase}: {request.method} {request.url.path}"
    code = phrase.lower().replace(" ", "_")
    return problem_response(HttpProblem(error.status_code, message, code=code, headers=error.headers))


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """The client went away while it was still sending: nobody reads this, but the log tells."""
    return Response(status_code=CLIENT_GONE)
