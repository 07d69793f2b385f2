"""Answers one job: waits for the replica, generates, and writes the response, whole or as server-sent events.

    producer task: node.replica -> generate -> (Start, events, end) -> bounded queue -> consumer task -> client

The two are apart so that the consumer can write a comment line while nothing comes, and so that a slow client holds
up only the consumer: behind the full queue the worker's tokens are joined, not dropped. A third task waits for the
client to go away; whichever ends first, all end, and leaving the replica cancels the generation.

What is known when the headers must go out decides them. Until the first ping is due nothing is sent: an error then
still gets its own status, and `x-dormouse-start` is exact. After that the header says `waiting` (unless the start is
known by then) and the start follows in a comment; an error becomes an `error` event before the final `[DONE]`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec
from starlette.types import Receive, Scope, Send

from dormouse.config import ServeConfig, TenantConfig
from dormouse.engine.messages import Delta, Finished
from dormouse.errors import DeadlineError, DormouseError, StoppingError
from dormouse.gateway.access import CLIENT_GONE, Story, cut_off_of, story_of
from dormouse.gateway.answers import Answer
from dormouse.gateway.metrics import Metrics
from dormouse.gateway.problems import json_response, problem_body, problem_response, status_of
from dormouse.gateway.requests import Job
from dormouse.node.node import Node
from dormouse.node.replica import Start

log = logging.getLogger(__name__)

START_HEADER = "x-dormouse-start"
_QUEUE = 16
_WRITE_GRACE = 5.0
_LAST_WORDS = 0.5  # within the second that the server gives its connections at the end
_DONE = b"data: [DONE]\n\n"
_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True)
class _End:
    """Nothing more comes; `error` says why when it is not all there."""

    error: Exception | None = None


_Item = Start | tuple[int, Delta | Finished] | _End


class Reply:
    """The ASGI response to one job."""

    def __init__(self, job: Job, node: Node, metrics: Metrics, config: ServeConfig) -> None:
        self._job = job
        self._node = node
        self._metrics = metrics
        self._config = config
        self._began = time.perf_counter()
        self._answer = Answer(job, identity=secrets.token_hex(12), created=int(time.time()))
        self._queue: asyncio.Queue[_Item] = asyncio.Queue(_QUEUE)
        self._story = Story()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._story = story_of(scope)
        self._story.model = self._node.label(self._job.model)
        consume = self._stream(scope, receive, send) if self._job.stream else self._whole(scope, receive, send)
        consumer = asyncio.create_task(consume)
        producer = asyncio.create_task(self._produce())
        gone = asyncio.create_task(_disconnected(receive))
        cut = asyncio.create_task(cut_off_of(scope).wait())
        limit = self._config.request_timeout + _WRITE_GRACE  # a client that takes nothing must not stay for ever
        try:
            await asyncio.wait({consumer, gone, cut}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if cut.done() and not consumer.done():
                await self._break_off(producer)
                await asyncio.wait({consumer, gone}, timeout=_LAST_WORDS, return_when=asyncio.FIRST_COMPLETED)
            if consumer.done():
                consumer.result()
            else:
                self._story.status = CLIENT_GONE
        finally:
            for task in (consumer, producer, gone, cut):
                task.cancel()
            await asyncio.wait((consumer, producer, gone, cut))

    async def _break_off(self, producer: asyncio.Task[None]) -> None:
        """Let an error follow what the client has got so far, in place of the rest."""
        producer.cancel()
        await asyncio.wait((producer,))
        while not self._queue.empty():
            self._queue.get_nowait()
        error = StoppingError("the server has shut down before the answer was complete", remedy="Try again later")
        self._queue.put_nowait(_End(error))

    # Producer

    async def _produce(self) -> None:
        try:
            async with asyncio.timeout(self._config.request_timeout):
                await self._generate()
        except TimeoutError:
            seconds = f"{self._config.request_timeout:g} s"
            error = DeadlineError(f"the request took longer than {seconds}", remedy="Ask for less, or try again later")
            await self._queue.put(_End(error))
        except DormouseError as error:
            await self._queue.put(_End(error))
        except Exception as error:
            log.exception("a request failed by a fault of ours")
            await self._queue.put(_End(error))
        else:
            await self._queue.put(_End())

    async def _generate(self) -> None:
        tenant = self._story.tenant
        priority = self._config.tenants.get(tenant, TenantConfig()).priority
        asked = time.perf_counter()
        async with self._node.replica(self._job.model, tenant=tenant, priority=priority) as lease:
            self._metrics.queued.labels(tenant).observe(time.perf_counter() - asked)
            self._story.start = str(lease.start)
            await self._queue.put(lease.start)
            streams = [
                lease.generate(prompt, self._job.sampling(seed, lease.context)) for prompt, seed in self._job.choices
            ]
            if len(streams) == 1:
                await self._pump(0, streams[0], lease.start)
                return
            try:
                async with asyncio.TaskGroup() as group:
                    for index, stream in enumerate(streams):
                        group.create_task(self._pump(index, stream, lease.start))
            except ExceptionGroup as several:
                raise several.exceptions[0] from several

    async def _pump(self, index: int, stream: AsyncIterator[Delta | Finished], start: Start) -> None:
        last: float | None = None
        async for event in stream:
            if isinstance(event, Delta):
                last = self._note_token(start, last)
                self._story.tokens += len(event.token_ids)
            await self._queue.put((index, event))

    def _note_token(self, start: Start, last: float | None) -> float:
        now = time.perf_counter()
        if last is not None:
            self._metrics.token_gap.labels(self._story.model).observe(now - last)
        if self._story.first_token is None:
            self._story.first_token = now - self._began
            self._metrics.first_token.labels(self._story.model, start.path).observe(self._story.first_token)
        return now

    # Consumer

    async def _next(self, seconds: float) -> _Item | None:
        """What comes next; None when nothing has come for so long."""
        try:
            async with asyncio.timeout(seconds):
                return await self._queue.get()
        except TimeoutError:
            return None

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        while not isinstance(item := await self._queue.get(), _End):
            if isinstance(item, tuple):
                self._answer.collect(*item)
        if item.error is not None:
            await problem_response(item.error)(scope, receive, send)
        else:
            headers = {START_HEADER: self._story.start}
            await json_response(self._answer.whole(), headers=headers)(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        due = self._began + self._config.ping_interval
        start: Start | None = None
        item = await self._next(due - time.perf_counter())
        if isinstance(item, Start):
            start = item
            item = await self._next(due - time.perf_counter())
        if isinstance(item, _End) and item.error is not None:
            await problem_response(item.error)(scope, receive, send)
            return
        shown = str(start) if start is not None else "waiting"
        headers = [*_SSE_HEADERS, (START_HEADER.encode(), shown.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        ready, opened = start is not None, False
        while not isinstance(item, _End):
            if item is None:
                text = self._ping(ready)
            elif isinstance(item, Start):
                ready = True
                text = f": {START_HEADER}: {item}\n\n".encode()
            else:
                text = self._event(*item, first=not opened)
                opened = True
            if text:
                await send({"type": "http.response.body", "body": text, "more_body": True})
            item = await self._next(self._config.ping_interval)
        await send({"type": "http.response.body", "body": self._ending(item), "more_body": False})

    def _ping(self, ready: bool) -> bytes:
        waited = time.perf_counter() - self._began
        what = "generating with" if ready else "waiting for"
        return f": {what} {self._job.model} ({waited:.1f} s)\n\n".encode()

    def _event(self, index: int, event: Delta | Finished, *, first: bool) -> bytes:
        chunks = self._answer.opening() if first else []
        chunk = self._answer.chunk(index, event)
        return b"".join(_sse(body) for body in (*chunks, *((chunk,) if chunk is not None else ())))

    def _ending(self, end: _End) -> bytes:
        if end.error is None:
            return b"".join(_sse(body) for body in self._answer.closing()) + _DONE
        self._story.status = status_of(end.error)
        return _sse(problem_body(end.error)) + _DONE


def _sse(body: object) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
