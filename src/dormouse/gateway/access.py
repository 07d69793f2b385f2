"""The outermost layer of the app: who may come in, when, and what is written down about it.

request -> [key? 401] -> tenant -> [draining? 503] -> route -> response + x-request-id -> one log line, one count
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dormouse.errors import StoppingError
from dormouse.gateway.metrics import Metrics
from dormouse.gateway.problems import HttpProblem, problem_response

log = logging.getLogger(__name__)

_STORY = "dormouse.story"
_CUT_OFF = "dormouse.cut_off"
_OPEN_ROUTES = ("/healthz", "/readyz")
_ROUTES = frozenset(
    {
        *_OPEN_ROUTES,
        "/metrics",
        "/v1/models",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    }
)
CLIENT_GONE = 499
BODY_SECONDS = 60.0
"""Time to send a body of a few MiB."""


@dataclass
class Story:
    """What becomes known about a request on its way; `status` overrides the response's (a stream that broke off)."""

    tenant: str = ""
    model: str = ""
    start: str = ""
    first_token: float | None = None
    tokens: int = 0
    status: int | None = None


def story_of(scope: Scope) -> Story:
    """The story of the request with this scope."""
    story = scope[_STORY]
    assert isinstance(story, Story)
    return story


def cut_off_of(scope: Scope) -> asyncio.Event:
    """Set when this request must come to its end now, because the server does."""
    event = scope[_CUT_OFF]
    assert isinstance(event, asyncio.Event)
    return event


class Keys:
    """API keys, each of a tenant. They are kept and compared as digests, all of them each time, so that the time an
    answer takes says nothing about any key."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._tenants = [(hashlib.sha256(key.encode()).digest(), tenant) for key, tenant in keys.items()]

    def tenant_of(self, authorization: str) -> str | None:
        """Whose request this is, by its Authorization header; None: it may not come in. Without keys everybody may."""
        scheme, _, key = authorization.partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        found = None if self._tenants else ""
        for digest, tenant in self._tenants:
            if hmac.compare_digest(digest, given):
                found = tenant
        return found if not self._tenants or scheme.lower() == "bearer" else None


class Gate:
    """ASGI middleware around everything. `draining` refuses new work; `idle` is set while nothing is answered; whoever
    sets `cut_off` ends what is still running, each with an error of its own."""

    def __init__(self, app: ASGIApp, *, keys: Keys, metrics: Metrics, metrics_open: bool) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._open = {*_OPEN_ROUTES, "/metrics"} if metrics_open else set(_OPEN_ROUTES)
        self.draining = False
        self.idle = asyncio.Event()
        self.idle.set()
        self.cut_off = asyncio.Event()
        self._active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began = time.perf_counter()
        request_id = f"req_{secrets.token_hex(8)}"
        story = scope[_STORY] = Story()
        scope[_CUT_OFF] = self.cut_off
        status = CLIENT_GONE

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        self._active += 1
        self.idle.clear()
        try:
            await self._enter(scope, receive, noting_send)
        finally:
            self._active -= 1
            if not self._active:
                self.idle.set()
            self._write_down(scope, story, story.status or status, time.perf_counter() - began, request_id)

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope, story_of(scope))
        if problem is None:
            await self._app(scope, receive, send)
        else:
            await problem_response(problem)(scope, receive, send)

    def _problem(self, scope: Scope, story: Story) -> Exception | None:
        path: str = scope["path"]
        if path not in self._open:
            tenant = self._keys.tenant_of(Headers(scope=scope).get("authorization", ""))
            if tenant is None:
                message = "Incorrect or missing API key. Send it as `Authorization: Bearer KEY`"
                return HttpProblem(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
            story.tenant = tenant
        if self.draining and path.startswith("/v1/"):
            return StoppingError("the server is shutting down", remedy="Try again later")
        return None

    def _write_down(self, scope: Scope, story: Story, status: int, seconds: float, request_id: str) -> None:
        route = _route(scope["path"])
        self._metrics.requests.labels(route, story.model, str(status), story.tenant).inc()
        log.log(
            logging.INFO if route.startswith("/v1/") else logging.DEBUG,
            "%s %s %d tenant=%s model=%s start=%s first_token=%s tokens=%d seconds=%.3f id=%s",
            *(scope["method"], route, status, story.tenant or "-", story.model or "-", story.start or "-"),
            *(f"{story.first_token:.3f}" if story.first_token is not None else "-", story.tokens, seconds, request_id),
        )


def _route(path: str) -> str:
    """The path as a label: there must not be as many labels as there are typos."""
    if path in _ROUTES:
        return path
    return "/v1/models/{id}" if path.startswith("/v1/models/") else "other"


async def read_body(request: Request, limit: int) -> bytes:
    """The body, refused as soon as it is longer than `limit` bytes or on its way for too long."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _read_body(request, limit)
    except TimeoutError:
        message = f"The body has not arrived within {BODY_SECONDS:g} s"
        raise HttpProblem(408, message, code="request_timeout", headers={"connection": "close"}) from None


async def _read_body(request: Request, limit: int) -> bytes:
    announced = request.headers.get("content-length", "0")
    body = bytearray()
    if announced.isdigit() and int(announced) <= limit:
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                break
        else:
            return bytes(body)
    raise HttpProblem(413, f"The body is longer than {limit} bytes", code="request_too_large")
