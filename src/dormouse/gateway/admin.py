"""The admin API: the same node by HTTP over a unix socket that only its owner may open (`run/admin.sock`, mode 0600).

GET  /admin/models                        all models with their states
GET  /admin/models/{name}/trace           its latest starts and captures, step by step
GET  /admin/models/{name}/explain         the decision a request would get now; estimates of its latest starts
GET  /admin/outlook                       of all models: next start path, estimate, when they step down
POST /admin/models/{name}/snapshot        capture now (once idle), which puts the model to sleep
POST /admin/models/{name}/wake | sleep
POST /admin/adapters/{name}/load | unload  serve an imported adapter under its own name, or no more
GET  /admin/snapshots                     all snapshots and templates
POST /admin/snapshots/{id}/pin | unpin | release
DELETE /admin/snapshots/{id}[?force=true]

Errors have the gateway's shape. The socket needs no keys: the file's mode is the key.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dormouse.errors import ConfigError, DormouseError, NotFoundError
from dormouse.gateway.asgi_server import AsgiServer
from dormouse.gateway.problems import HttpProblem, json_response, problem_response
from dormouse.node.node import Node
from dormouse.node.presence import ADMIN_SOCKET, short_path

_BACKLOG = 16
_Action = TypeVar("_Action")


def create_admin_app(node: Node) -> Starlette:
    """The routes over a node."""
    routes = _Routes(node)
    app = Starlette(
        routes=[
            Route("/admin/models", routes.models, methods=["GET"]),
            Route("/admin/models/{name}/trace", routes.trace, methods=["GET"]),
            Route("/admin/models/{name}/explain", routes.explain, methods=["GET"]),
            Route("/admin/outlook", routes.outlook, methods=["GET"]),
            Route("/admin/models/{name}/{action}", routes.model_action, methods=["POST"]),
            Route("/admin/adapters/{name}/{action}", routes.adapter_action, methods=["POST"]),
            Route("/admin/snapshots", routes.snapshots, methods=["GET"]),
            Route("/admin/snapshots/{id}", routes.remove, methods=["DELETE"]),
            Route("/admin/snapshots/{id}/{action}", routes.snapshot_action, methods=["POST"]),
        ],
        exception_handlers={
            DormouseError: _answer_problem,
            HTTPException: _answer_http_exception,
            Exception: _answer_problem,
        },
    )
    app.router.redirect_slashes = False
    return app


@contextlib.asynccontextmanager
async def serve_admin(node: Node, run_dir: Path) -> AsyncIterator[None]:
    """Answer on the admin socket for as long as the block runs. The caller is the folder's only node: what lies there
    under the socket's name is a dead node's, and is replaced."""
    with listen_privately(run_dir) as listener:
        server = AsgiServer(create_admin_app(node))
        serving = asyncio.create_task(server.serve(sockets=[listener]), name="admin")
        try:
            yield
        finally:
            server.should_exit = True
            await serving


@contextlib.contextmanager
def listen_privately(run_dir: Path) -> Iterator[socket.socket]:
    """The listening socket, removed at the end. Raises ConfigError when it can't be made."""
    path = run_dir / ADMIN_SOCKET
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            path.unlink(missing_ok=True)
            with short_path(run_dir) as folder:
                listener.bind(f"{folder}/{ADMIN_SOCKET}")
            path.chmod(0o600)  # nobody can connect before `listen`
            listener.listen(_BACKLOG)
        except OSError as error:
            raise ConfigError(
                f"the admin socket {path} can't be made: {error.strerror}",
                remedy="Put the data folder on a file system that has unix sockets",
            ) from error
        yield listener
    finally:
        listener.close()
        path.unlink(missing_ok=True)


class _Routes:
    """The endpoints."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._model_actions: dict[str, Callable[[str], Awaitable[object]]] = {
            "snapshot": node.snapshot,
            "sleep": node.sleep,
            "doze": lambda name: node.sleep(name, keep=True),
            "wake": node.wake,
        }
        self._adapter_actions: dict[str, Callable[[str], Awaitable[object]]] = {
            "load": lambda name: node.load_adapter(name, name),
            "unload": node.unload_adapter,
        }
        self._snapshot_actions: dict[str, Callable[[str], Awaitable[None]]] = {
            "pin": lambda snapshot_id: node.pin(snapshot_id, True),
            "unpin": lambda snapshot_id: node.pin(snapshot_id, False),
            "release": node.release,
        }

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [asdict(status) for status in self._node.statuses()]})

    async def snapshots(self, request: Request) -> Response:
        return json_response({"object": "list", "data": await self._node.snapshots()})

    async def trace(self, request: Request) -> Response:
        operations = self._node.operations(request.path_params["name"])
        return json_response({"object": "list", "data": [msgspec.to_builtins(operation) for operation in operations]})

    async def explain(self, request: Request) -> Response:
        return json_response(await self._node.explain(request.path_params["name"]))

    async def outlook(self, request: Request) -> Response:
        return json_response({"object": "list", "data": await self._node.outlooks()})

    async def model_action(self, request: Request) -> Response:
        name, action = request.path_params["name"], request.path_params["action"]
        done = await _known(self._model_actions, action)(name)
        start = {"start": str(done)} if action == "wake" else {}
        status = next(status for status in self._node.statuses() if status.name == name)
        return json_response(asdict(status) | start)

    async def adapter_action(self, request: Request) -> Response:
        name = request.path_params["name"]
        await _known(self._adapter_actions, request.path_params["action"])(name)
        return json_response({"adapters": {served.name: served.adapter.base for served in self._node.adapters()}})

    async def snapshot_action(self, request: Request) -> Response:
        identity = request.path_params["id"]
        await _known(self._snapshot_actions, request.path_params["action"])(identity)
        rows = await self._node.snapshots()
        return json_response(next((row for row in rows if row["id"] == identity), {"id": identity}))

    async def remove(self, request: Request) -> Response:
        identity = request.path_params["id"]
        await self._node.remove(identity, force=request.query_params.get("force") == "true")
        return json_response({"id": identity, "deleted": True})


def _known(actions: dict[str, _Action], name: str) -> _Action:
    if name not in actions:
        raise HTTPException(404)
    return actions[name]


async def _answer_problem(request: Request, error: Exception) -> Response:
    if isinstance(error, NotFoundError):  # on the gateway this is always about a model
        error = HttpProblem(error.http_status, str(error), code=error.code)
    return problem_response(error)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    message = f"{phrase}: {request.method} {request.url.path}"
    return problem_response(HttpProblem(error.status_code, message, code=phrase.lower().replace(" ", "_")))
