"""The node's end of one worker's control socket: requests out, token events back to whoever asked for them.

A reader task feeds every received message to the generation it belongs to. A generation keeps one pending delta: what
arrives while its consumer is busy is joined to it. So a slow client costs at most the bytes of its own answer, never
delays another request of the same worker, and needs no queue.

When the worker ends, or says something that it must not, every generation and command under way gets an EngineError,
and `on_lost` is called once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from dormouse.checkpoint.adapters import ImportedAdapter
from dormouse.engine.frames import Inbox, pack_frame
from dormouse.engine.messages import (
    PROTOCOL_VERSION,
    AdapterFailed,
    AdapterLoaded,
    AdapterReply,
    AdapterSegment,
    AdapterUnloaded,
    Cancel,
    Delta,
    Failed,
    Finished,
    FromWorker,
    Generate,
    Hello,
    Load,
    LoadAdapter,
    Loaded,
    Ping,
    Pong,
    Prepare,
    Prepared,
    Prompt,
    Quiesce,
    Quiesced,
    Resume,
    Resumed,
    Sampling,
    Segments,
    TokenLogprob,
    ToWorker,
    UnloadAdapter,
    WorkerError,
)
from dormouse.errors import DormouseError, EngineError, RequestError, of_kind
from dormouse.transfer.handles import SegmentHandle

_READ_SIZE = 1 << 16
_BUSY_PAUSE = 0.002
PING_AFTER = 15.0
LOST_AFTER = 60.0
"""Seconds of silence, while something is being generated, after which a worker is asked for a sign, and given up."""
_Reply = TypeVar("_Reply", Hello, Prepared, Loaded, Quiesced, Resumed)


class _Generation:
    """What has come for one request and was not yet taken."""

    def __init__(self) -> None:
        self._arrived = asyncio.Event()
        self._deltas: list[Delta] = []
        self._end: Finished | DormouseError | None = None

    def put(self, delta: Delta) -> None:
        self._deltas.append(delta)
        self._arrived.set()

    def end(self, end: Finished | DormouseError) -> None:
        self._end = end
        self._arrived.set()

    async def take(self) -> Delta | Finished:
        """The next event; deltas that piled up come as one. Raises the error that ended the generation."""
        await self._arrived.wait()
        if self._deltas:
            deltas, self._deltas = self._deltas, []
            if self._end is None:
                self._arrived.clear()
            return deltas[0] if len(deltas) == 1 else _join(deltas)
        assert self._end is not None
        if isinstance(self._end, DormouseError):
            raise self._end
        return self._end


class _SegmentSender:
    """Sends a worker the segments it lacks, past asyncio, which knows no descriptors. The worker has them from `send`
    until it is parked. Nothing else is ever in the socket's way: before `open` and while a worker is parked, no other
    frame is under way, and before an adapter's is sent, asyncio has nothing left to write."""

    def __init__(self, model: str, control: socket.socket, handles: Sequence[SegmentHandle]) -> None:
        self._model = model
        self._handles = handles
        self._control = control.dup()
        self._there = not handles

    def send(self) -> None:
        """Send them, unless the worker has them. Raises EngineError when it has gone."""
        if self._there:
            return
        frame = pack_frame(Segments(segments=[handle.info for handle in self._handles]))
        descriptors = [fd for handle in self._handles for fd in handle.descriptors()]
        try:
            sent = socket.send_fds(self._control, [frame], descriptors)
        except OSError as error:
            raise EngineError(f"the worker of {self._model} is gone: {error.strerror}") from error
        if sent != len(frame):
            raise EngineError(f"the worker of {self._model} takes no messages", remedy="Start the model again")
        self._there = True

    def send_adapter(self, handle: SegmentHandle) -> bool:
        """Send the segment of an adapter to a worker that runs; False when the socket takes nothing now. Whoever calls
        has nothing left to be written before it. Raises EngineError when the worker has gone."""
        frame = pack_frame(AdapterSegment(segment=handle.info))
        try:
            return socket.send_fds(self._control, [frame], handle.descriptors()) == len(frame)
        except BlockingIOError:
            return False
        except OSError as error:
            raise EngineError(f"the worker of {self._model} is gone: {error.strerror}") from error

    def give_back(self) -> None:
        """Let go of the descriptors: the worker has none behind its addresses, and the memory may be freed."""
        for handle in self._handles:
            handle.close()
        self._handles = ()

    def replace(self, handles: Sequence[SegmentHandle]) -> None:
        """Take others of the same sizes for the worker that has let go of its own."""
        self.give_back()
        self._handles = handles
        self._there = not handles

    def taken_away(self) -> None:
        """The worker has let go of them."""
        self._there = not self._handles

    def filled(self) -> None:
        """The worker has seen that they are filled: from now on they can be sent without a promise."""
        for handle in self._handles:
            handle.forget_report()

    def close(self) -> None:
        """Let go of the segments. Idempotent."""
        for handle in self._handles:
            handle.close()
        self._control.close()


def _join(deltas: list[Delta]) -> Delta:
    logprobs: list[list[TokenLogprob]] | None = None
    if deltas[0].logprobs is not None:
        logprobs = [position for delta in deltas for position in delta.logprobs or ()]
    return Delta(
        id=deltas[0].id,
        token_ids=[token for delta in deltas for token in delta.token_ids],
        text="".join(delta.text for delta in deltas),
        logprobs=logprobs,
    )


class WorkerLink:
    """Owns `control` and the worker's segments from `open` until `close`. Commands (`prepare`, `load`, `quiesce`,
    `resume`) are given one at a time."""

    def __init__(
        self,
        model: str,
        sender: _SegmentSender,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        fresh: bool,
        on_lost: Callable[[DormouseError], None],
    ) -> None:
        self._model = model
        self._segments = sender
        self._reader = reader
        self._writer = writer
        self._ids = itertools.count(1)
        self._generations: dict[str, _Generation] = {}
        self._cancelled: set[str] = set()
        self._adapter_replies: dict[str, asyncio.Future[AdapterReply]] = {}
        self._settled = asyncio.Event()
        self._settled.set()
        self._fresh = fresh
        self._reply: asyncio.Future[FromWorker] | None = asyncio.get_running_loop().create_future() if fresh else None
        self._lost: DormouseError | None = None
        self._on_lost: Callable[[DormouseError], None] | None = on_lost
        self._heard = asyncio.get_running_loop().time()
        self._task = asyncio.create_task(self._receive(), name=f"link {model}")
        self._watcher = asyncio.create_task(self._watch(), name=f"watch {model}")

    @classmethod
    async def open(
        cls,
        model: str,
        control: socket.socket,
        *,
        fresh: bool,
        on_lost: Callable[[DormouseError], None],
        segments: Sequence[SegmentHandle] = (),
    ) -> WorkerLink:
        """Start to listen on `control`. A `fresh` worker says `Hello` first, a restored one has said it long ago.

        The segments of the worker's model go to it at once, as the first frame: while it starts, or is restored, they
        are being filled. Raises EngineError when the worker has gone already.
        """
        sender = _SegmentSender(model, control, segments)
        try:
            sender.send()
            control.setblocking(False)
            reader, writer = await asyncio.open_unix_connection(sock=control)
        except BaseException:
            sender.close()
            control.close()
            raise
        return cls(model, sender, reader, writer, fresh, on_lost)

    @property
    def lost(self) -> DormouseError | None:
        """Why the worker is gone; None while it is there."""
        return self._lost

    async def prepare(self, prepare: Prepare) -> Prepared:
        """Wait for a fresh worker's `Hello` and have it import an engine. Raises EngineError."""
        await self._greet()
        return await self._command(prepare, Prepared)

    async def load(self, load: Load) -> Loaded:
        """Have a worker load a model, after the `Hello` of a fresh one. Raises EngineError, or what reading the
        weights failed with."""
        await self._greet()
        loaded = await self._command(load, Loaded)
        self._segments.filled()
        return loaded

    async def _greet(self) -> None:
        if not self._fresh:
            return
        self._fresh = False
        hello = await self._expect(Hello)
        if hello.version != PROTOCOL_VERSION:
            raise EngineError(
                f"the worker of {self._model} speaks protocol {hello.version}, this node speaks {PROTOCOL_VERSION}",
                remedy="Install one version of Dormouse, then restart `dormouse serve`",
            )

    async def quiesce(self) -> Quiesced:
        """Park the worker, once the generations that were cancelled have ended. Raises EngineError."""
        await self._settled.wait()
        quiesced = await self._command(Quiesce(), Quiesced)
        self._segments.taken_away()
        return quiesced

    async def resume(self, log_path: str) -> Resumed:
        """Let a parked or restored worker go on. Raises EngineError, or what reading the weights failed with."""
        self._segments.send()
        resumed = await self._command(Resume(log_path=log_path), Resumed)
        if (
            "weights" in resumed.phases.seconds()
        ):  # it has a model and so has waited for them; a template waits at its load
            self._segments.filled()
        return resumed

    def give_back_segments(self) -> None:
        """Let go of the segments of a parked worker, so that their memory can be freed; it can't be resumed before it
        has them again. Idempotent."""
        self._segments.give_back()

    def take_segments(self, handles: Sequence[SegmentHandle]) -> None:
        """Own these segments of a parked worker; `resume` sends them."""
        self._segments.replace(handles)

    async def load_adapter(self, name: str, adapter: ImportedAdapter, segment: SegmentHandle) -> None:
        """Have a worker that runs load an adapter, whose segment is filled. Raises EngineError, also when it does not
        fit the model."""
        load = LoadAdapter(name=name, table=adapter.body, scalings=dict(adapter.scalings))
        while self._lost is None:
            # Nothing may be written between looking and sending: a frame with descriptors must not cut another in two.
            if not self._writer.transport.get_write_buffer_size() and self._segments.send_adapter(segment):
                break
            await asyncio.sleep(_BUSY_PAUSE)
        await self._of_adapter(load)

    async def unload_adapter(self, name: str) -> None:
        """Have a worker that runs let go of an adapter that no generation uses. Raises EngineError."""
        await self._of_adapter(UnloadAdapter(name=name))

    async def _of_adapter(self, message: LoadAdapter | UnloadAdapter) -> None:
        """Send it; its reply comes under the adapter's name. One at a time per name."""
        self._send(message)
        reply = self._adapter_replies[message.name] = asyncio.get_running_loop().create_future()
        try:
            found = await reply
        finally:
            del self._adapter_replies[message.name]
        if isinstance(found, AdapterFailed):
            raise of_kind(found.kind, found.message, found.remedy)

    async def generate(
        self, prompt: Prompt, sampling: Sampling, adapter: str | None = None
    ) -> AsyncIterator[Delta | Finished]:
        """Token events, the last one a `Finished`, of the model or with an adapter that is loaded. Closing the iterator
        early cancels the generation.

        Raises RequestError (the worker refuses the request) or EngineError.
        """
        number = str(next(self._ids))
        frame = _request_frame(Generate(id=number, prompt=prompt, sampling=sampling, adapter=adapter))
        if self._lost is not None:
            raise self._lost
        if not self._generations:
            self._heard = asyncio.get_running_loop().time()
        generation = self._generations[number] = _Generation()
        self._settled.clear()
        try:
            self._writer.write(frame)
            with contextlib.suppress(ConnectionError):  # the reader task sees it too, and tells the generation
                await self._writer.drain()
            while True:
                event = await generation.take()
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self._abandon(number)

    async def close(self) -> None:
        """Close the socket; a worker that is still there ends. Idempotent."""
        self._on_lost = None
        self._task.cancel()
        self._watcher.cancel()
        try:
            await asyncio.wait([self._task, self._watcher])
        finally:
            self._segments.close()
            self._lose(EngineError(f"the worker of {self._model} was stopped"))

    def _abandon(self, number: str) -> None:
        if self._generations.pop(number, None) is not None and self._lost is None:
            self._cancelled.add(number)
            self._send(Cancel(id=number))
        self._check_settled()

    def _send(self, message: ToWorker) -> None:
        if self._lost is not None:
            raise self._lost
        self._writer.write(pack_frame(message))

    async def _command(self, message: ToWorker, reply_type: type[_Reply]) -> _Reply:
        self._send(message)
        self._reply = asyncio.get_running_loop().create_future()
        return await self._expect(reply_type)

    async def _expect(self, reply_type: type[_Reply]) -> _Reply:
        assert self._reply is not None
        message = await self._reply
        if isinstance(message, WorkerError):
            raise of_kind(message.kind, message.message, message.remedy)
        if not isinstance(message, reply_type):
            raise EngineError(
                f"the worker of {self._model} answered {type(message).__name__} instead of {reply_type.__name__}"
            )
        return message

    async def _receive(self) -> None:
        inbox: Inbox[FromWorker] = Inbox(FromWorker)  # type: ignore[arg-type]
        ended = f"the worker of {self._model} ended unexpectedly"
        try:
            while data := await self._reader.read(_READ_SIZE):
                self._heard = asyncio.get_running_loop().time()
                for message in inbox.feed(data):
                    self._dispatch(message)
            self._lose(EngineError(ended, remedy="Look into its log"))
        except OSError as error:
            self._lose(EngineError(f"{ended}: {error}", remedy="Look into its log"))
        except EngineError as error:
            self._lose(error)

    async def _watch(self) -> None:
        """Notice a worker that is there but does nothing any more: it is lost like one that has ended."""
        while self._lost is None:
            await asyncio.sleep(PING_AFTER / 2)
            silence = asyncio.get_running_loop().time() - self._heard
            if not self._generations or silence < PING_AFTER or self._lost is not None:
                continue
            if silence < LOST_AFTER:
                self._send(Ping())
            else:
                said = f"the worker of {self._model} has not given a sign of life for {silence:.0f} s"
                self._lose(EngineError(said, remedy="Look into its log; the next request starts a new one"))

    def _dispatch(self, message: FromWorker) -> None:
        match message:
            case Delta():
                if generation := self._generations.get(message.id):
                    generation.put(message)
            case Finished():
                self._finish(message.id, message)
            case Failed():
                self._finish(message.id, _as_error(message))
            case Pong():
                pass
            case AdapterLoaded() | AdapterUnloaded() | AdapterFailed():
                if (waits := self._adapter_replies.get(message.name)) is not None and not waits.done():
                    waits.set_result(message)
            case _ if self._reply is not None and not self._reply.done():
                self._reply.set_result(message)
            case WorkerError():
                raise EngineError(message.message, remedy=message.remedy)
            case _:
                raise EngineError(f"the worker of {self._model} sent {type(message).__name__} unasked")

    def _finish(self, number: str, end: Finished | DormouseError) -> None:
        if generation := self._generations.pop(number, None):
            generation.end(end)
        self._cancelled.discard(number)
        self._check_settled()

    def _check_settled(self) -> None:
        if not self._generations and not self._cancelled:
            self._settled.set()

    def _lose(self, error: DormouseError) -> None:
        if self._lost is not None:
            return
        self._lost = error
        for generation in self._generations.values():
            generation.end(error)
        self._generations.clear()
        self._cancelled.clear()
        self._settled.set()
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(error)
            self._reply.exception()  # whoever awaits it gets it; that nobody does is no mistake
        for waits in self._adapter_replies.values():
            if not waits.done():
                waits.set_exception(error)
        self._writer.close()
        if self._on_lost is not None:
            self._on_lost(error)


def _request_frame(request: Generate) -> bytes:
    try:
        return pack_frame(request)
    except EngineError as error:
        raise RequestError(error.message, reason="request_too_large", remedy=error.remedy) from error
    except (OverflowError, RecursionError) as error:
        raise RequestError(f"the request holds what can't be passed on: {error}", reason="invalid_value") from error


def _as_error(failed: Failed) -> DormouseError:
    if failed.bad_request:
        return RequestError(failed.message, param=failed.param, reason=failed.reason)
    return EngineError(failed.message)
