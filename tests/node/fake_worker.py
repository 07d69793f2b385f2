"""A worker process without an engine: it speaks the real messages over the real socket and makes up its tokens.

    python fake_worker.py --control-fd N [--restored] [--fault load|quiesce|resume|hello|…-exit] [--delay SECONDS]

The answer to a prompt is the words of the prompt, over and over, up to `max_tokens`; a request that names an adapter
gets `<ADAPTER>` before them. Words that do things: `die` ends the process instead of a token, `refuse` fails the
request as too long, `break` fails it as the engine's fault.
"""

import argparse
import asyncio
import os
import socket

from dormouse.engine import messages as m
from dormouse.engine.frames import Inbox, pack_frame
from dormouse.phases import Phase, Phases, host_clock


def took(name: str) -> Phases:
    """One short step."""
    return Phases(host_clock(), [Phase(name, 0.0, 0.001)])


class FakeWorker:
    def __init__(self, writer: asyncio.StreamWriter, fault: str, delay: float) -> None:
        self.writer, self.fault, self.delay = writer, fault, delay
        self.adapters: set[str] = set()
        self.running: dict[str, asyncio.Task[None]] = {}

    def send(self, message: m.FromWorker) -> None:
        self.writer.write(pack_frame(message))

    def faulty(self, step: str) -> bool:
        if self.fault == f"{step}-exit":
            os._exit(1)
        if self.fault == f"{step}-garbage":
            self.writer.write(b"\xff" * 64)
        if self.fault == step:
            self.send(m.WorkerError(message=f"the engine could not {step}", remedy="Look into its log"))
        return self.fault == step

    def handle(self, message: m.ToWorker) -> None:
        match message:
            case m.Prepare() if not self.faulty("prepare"):
                self.send(m.Prepared(phases=took("import")))
            case m.Load() if not self.faulty("load"):
                self.send(m.Loaded(context=64, kv_tokens=64, phases=took("weights"), writable=self.fault == "writable"))
            case m.Generate():
                self.running[message.id] = asyncio.create_task(self.generate(message))
            case m.Cancel() if task := self.running.pop(message.id, None):
                task.cancel()
                self.send(m.Finished(id=message.id, reason="cancel", prompt_tokens=1, completion_tokens=0))
            case m.Ping():
                self.send(m.Pong())
            case m.AdapterSegment():
                pass
            case m.LoadAdapter() if self.fault != "adapter":
                self.adapters.add(message.name)
                self.send(m.AdapterLoaded(name=message.name))
            case m.LoadAdapter():
                self.fault = ""
                self.send(m.AdapterFailed(name=message.name, message="it does not fit", remedy="Take another"))
            case m.UnloadAdapter():
                assert not self.running, "unloaded with a request in flight"
                self.adapters.remove(message.name)
                self.send(m.AdapterUnloaded(name=message.name))
            case m.Quiesce() if not self.faulty("quiesce"):
                assert not self.running, "quiesced with a request in flight"
                self.adapters.clear()
                self.send(m.Quiesced(phases=took("park")))
            case m.Resume() if not self.faulty("resume"):
                self.send(m.Resumed(phases=took("unpark"), writable=self.fault == "writable"))

    async def generate(self, request: m.Generate) -> None:
        self.send(await self.answer(request))
        self.running.pop(request.id, None)

    async def answer(self, request: m.Generate) -> m.Finished | m.Failed:
        match request.prompt:
            case m.ChatPrompt(messages=chat):
                words = str(chat[-1]["content"]).split()
            case m.TextPrompt(text=text):
                words = text.split()
            case m.TokensPrompt(ids=ids):
                words = [f"t{token}" for token in ids]
        if request.adapter is not None:
            assert request.adapter in self.adapters, "a request for an adapter that is not there"
            words = [f"<{request.adapter}>", *words]
        if "refuse" in words:
            reason = "context_length_exceeded"
            return m.Failed(id=request.id, message="too long", reason=reason, bad_request=True, param="messages")
        sampling = request.sampling
        for index in range(min(sampling.max_tokens, 64)):
            await asyncio.sleep(self.delay)
            word = words[index % len(words)]
            if word == "die":
                os._exit(1)
            if word == "break":
                return m.Failed(id=request.id, message="the engine broke", reason="engine", bad_request=False)
            text = f" {word}" if index else word
            logprobs = None
            if sampling.logprobs is not None:
                own = m.TokenLogprob(token_id=index, text=text, logprob=-0.5)
                logprobs = [[own, *(m.TokenLogprob(k, f"alt{k}", -1.0 - k) for k in range(sampling.logprobs))]]
            self.send(m.Delta(id=request.id, token_ids=[index], text=text, logprobs=logprobs))
            await self.writer.drain()
        made = min(sampling.max_tokens, 64)
        return m.Finished(id=request.id, reason="length", prompt_tokens=len(words), completion_tokens=made)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--restored", action="store_true")
    parser.add_argument("--fault", default="")
    parser.add_argument("--delay", type=float, default=0.0)
    args = parser.parse_args()
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=args.control_fd))
    worker = FakeWorker(writer, args.fault, args.delay)
    if not args.restored and not worker.faulty("hello"):
        worker.send(m.Hello(version=m.PROTOCOL_VERSION, pid=os.getpid()))
    inbox: Inbox[m.ToWorker] = Inbox(m.ToWorker)
    while data := await reader.read(65536):
        for message in inbox.feed(data):
            worker.handle(message)


asyncio.run(main())
