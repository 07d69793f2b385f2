"""The node's end of the control socket of a worker that a cell or a restore has made."""

from __future__ import annotations

import socket
from collections import deque
from pathlib import Path

from tests.engine.worker_client import WorkerClient

from dormouse.engine.frames import Inbox
from dormouse.engine.messages import FromWorker, Hello, Sampling, TextPrompt

QUESTION = TextPrompt("what does a dormouse do in winter")
GREEDY = Sampling(max_tokens=12, temperature=0.0)


class AttachedWorker(WorkerClient):
    """Speaks with a worker that exists already."""

    def __init__(self, control: socket.socket, log: Path, *, fresh: bool) -> None:
        control.setblocking(True)
        control.settimeout(60)
        self.socket, self.log = control, log
        self.weights = None
        self._inbox: Inbox[FromWorker] = Inbox(FromWorker)  # type: ignore[arg-type]
        self._ready: deque[FromWorker] = deque()
        if fresh:
            self.hello = self.expect(Hello)

    def answer(self) -> str:
        """The text of one fixed question."""
        return self.ask(QUESTION, GREEDY).text

    def close(self) -> None:
        self.socket.close()
        if self.weights is not None:
            self.weights.close()
