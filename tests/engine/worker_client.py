"""A worker process and the node's end of its socket, for tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from dormouse.checkpoint.models import RECORD, open_model
from dormouse.checkpoint.pool import SegmentPool
from dormouse.engine.frames import Inbox, pack_frame
from dormouse.engine.messages import (
    Delta,
    Failed,
    Finished,
    FromWorker,
    Generate,
    Hello,
    Load,
    Loaded,
    Prepare,
    Prepared,
    Prompt,
    Quiesce,
    Quiesced,
    Resume,
    Resumed,
    Sampling,
    Segments,
)
from dormouse.store.store import Store
from dormouse.transfer.handles import SegmentHandle

if TYPE_CHECKING:
    from dormouse.checkpoint.device_blocks import DeviceBlocks

T = TypeVar("T")


class Answer(msgspec.Struct):
    """What a generation gave."""

    text: str = ""
    token_ids: list[int] = []
    deltas: list[Delta] = []
    end: Finished | Failed | None = None


class HeldWeights:
    """The segment of an imported model, as a node holds it; nothing for a model without weights. One on a GPU is
    this process's."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        folder = (folder / RECORD).resolve().parent  # of a folder of links, the one they lead to
        model = open_model(folder.parent, folder.name)
        self.handles: list[SegmentHandle] = []
        self._store = Store.open(folder.parent.parent / "store")
        self._pool = SegmentPool(self._store, loader=_blocks(self._store) if device != "cpu" else None)
        if model.checkpoint is not None:
            self.handles.append(self._pool.take(model.checkpoint, "test", device=device))

    def send(self, control: socket.socket) -> None:
        """Announce them, still filling or not."""
        if self.handles:
            frame = pack_frame(Segments(segments=[handle.info for handle in self.handles]))
            socket.send_fds(control, [frame], [fd for handle in self.handles for fd in handle.descriptors()])

    def filled(self) -> None:
        for handle in self.handles:
            handle.forget_report()

    def close(self) -> None:
        """Let go of them. Idempotent."""
        for handle in self.handles:
            handle.close()
        self._pool.release("test")
        self._store.close()


def _blocks(store: Store) -> DeviceBlocks:
    from dormouse.checkpoint.device_blocks import CudaGpus, DeviceBlocks

    return DeviceBlocks(store, CudaGpus(), None)


class WorkerClient:
    """Speaks the protocol with a real `python -m dormouse.engine.worker`."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.weights: HeldWeights | None = None
        self.socket, child = socket.socketpair()
        self.socket.settimeout(120)
        with child, log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dormouse.engine.worker", "--control-fd", str(child.fileno())],
                pass_fds=[child.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONWARNINGS": "default"},
            )
        self._inbox: Inbox[FromWorker] = Inbox(FromWorker)  # type: ignore[arg-type]
        self._ready: deque[FromWorker] = deque()
        self.hello = self.expect(Hello)

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.socket.close()
        self.process.wait(timeout=30)
        if self.weights is not None:
            self.weights.close()

    def send(self, message: msgspec.Struct) -> None:
        self.socket.sendall(pack_frame(message))

    def receive(self) -> FromWorker:
        while not self._ready:
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError(self.log.read_text())
            self._ready.extend(self._inbox.feed(data))
        return self._ready.popleft()

    def expect(self, kind: type[T]) -> T:
        message = self.receive()
        assert isinstance(message, kind), message
        return message

    def prepare(self, engine: str = "transformers", **options: Any) -> Prepared:
        self.send(Prepare(engine=engine, **options))
        return self.expect(Prepared)

    def load(self, path: Path, engine: str = "transformers", **options: Any) -> Loaded:
        """Load a model of a folder, with its segment if it was imported."""
        if (path / RECORD).exists():
            self.weights = HeldWeights(path, options.get("device", "cpu"))
            self.weights.send(self.socket)
        self.send(Load(engine=engine, path=str(path), **options))
        loaded = self.expect(Loaded)
        if self.weights is not None:
            self.weights.filled()
        return loaded

    def run(self, requests: dict[str, tuple[Prompt, Sampling]]) -> dict[str, Answer]:
        """Send all requests at once and collect the answers until each has ended."""
        for name, (prompt, sampling) in requests.items():
            self.send(Generate(id=name, prompt=prompt, sampling=sampling))
        return self.collect(requests)

    def ask(self, prompt: Prompt, sampling: Sampling) -> Answer:
        return self.run({"only": (prompt, sampling)})["only"]

    def collect(self, names: object) -> dict[str, Answer]:
        answers = {name: Answer() for name in names}  # type: ignore[attr-defined]
        while any(answer.end is None for answer in answers.values()):
            message = self.receive()
            assert isinstance(message, Delta | Finished | Failed), message
            answer = answers[message.id]
            assert answer.end is None
            if isinstance(message, Delta):
                answer.text += message.text
                answer.token_ids += message.token_ids
                answer.deltas.append(message)
            else:
                answer.end = message
        return answers

    def quiesce(self) -> Quiesced:
        self.send(Quiesce())
        return self.expect(Quiesced)

    def resume(self) -> Resumed:
        if self.weights is not None:
            self.weights.send(self.socket)
        self.send(Resume(log_path=str(self.log)))
        return self.expect(Resumed)
