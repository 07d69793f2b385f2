"""The loader as the host service sees it: blocking calls, from any thread, to the child process of loader_main.py.

The child is started at the first need, or ahead of it by `warm`. If it dies, every pending call raises HostError, the
workers keep what they have mapped, and the next call starts a new one; that is logged as an error. No call waits
forever: a loader that does not answer in time is killed.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Self

from dormouse import errors
from dormouse.checkpoint import loader_messages as messages
from dormouse.errors import DormouseError, HostError
from dormouse.transfer.cuda_driver import ordinal_of
from dormouse.transfer.handles import SegmentHandle, adopt

log = logging.getLogger(__name__)

START_SECONDS = 120.0
"""Importing torch from a slow disk, and starting CUDA with eight GPUs, takes most of it."""
CALL_SECONDS = 60.0
HOLD_SECONDS = 600.0
_END_SECONDS = 10.0
_SEND_SECONDS = 30
"""A loader that reads no requests for so long has stopped."""

_KILLED = "does not end; it is killed"
_STUCK = "does not even end when it is killed; see the kernel's log (NVRM)"

_Answer = tuple[messages.Reply, list[int]]


def loader_command(data_dir: Path, tier_bytes: int) -> list[str]:
    """How a loader is started, but for its socket."""
    module = [sys.executable, "-m", "dormouse.checkpoint.loader_main"]
    return [*module, "--data-dir", str(data_dir), "--dram-tier", str(tier_bytes)]


class Loader:
    """Weights on GPUs, in a process of their own."""

    def __init__(self, command: Sequence[str], *, call_seconds: float = CALL_SECONDS) -> None:
        """`command`: what starts it; `--fd N` is added."""
        self._command = command
        self._call_seconds = call_seconds
        self._process: _Process | None = None
        self._starting = threading.Lock()
        self._users: dict[str, set[str]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def warm(self, device: str) -> None:
        """Have it ready to load onto a GPU. Raises HostError."""
        process = self._living()
        process.ask(messages.Warm(call=process.new_call(), device=device), START_SECONDS)

    def take(self, checkpoint: str, user: str, device: str) -> SegmentHandle:
        """The segment of a checkpoint on a GPU for `user`, filled or filling. Raises NotFoundError, DamagedError, and
        HostError when the GPU has no memory or the loader dies."""
        process = self._living()
        with self._lock:
            self._users.setdefault(user, set()).add(checkpoint)
        request = messages.Take(call=process.new_call(), checkpoint=checkpoint, user=user, device=device)
        reply, descriptors = process.ask(request, self._call_seconds)
        assert isinstance(reply, messages.Taken)
        return adopt([reply.segment], iter(descriptors))[0]

    def release(self, user: str, checkpoint: str | None = None) -> None:
        """The user has let go of its segments, or of that of one checkpoint; when this returns, what nobody else uses
        is free. What can't be told to a loader that has died is free, too. Idempotent."""
        with self._lock:
            taken = self._users.get(user, set())
            if not taken or (checkpoint is not None and checkpoint not in taken):
                return
            if checkpoint is not None:
                taken.discard(checkpoint)
            if checkpoint is None or not taken:
                del self._users[user]
        process = self._process
        if process is None or process.ended is not None:
            return
        try:
            process.ask(messages.Release(call=process.new_call(), user=user, checkpoint=checkpoint), self._call_seconds)
        except DormouseError as error:
            log.error("segments of %s were not given back in order: %s", user, error)

    def hold(self, checkpoint: str) -> messages.Held:
        """Bring the chunks of a checkpoint into the DRAM tier now. Raises DormouseError."""
        process = self._living()
        reply, _none = process.ask(messages.Hold(call=process.new_call(), checkpoint=checkpoint), HOLD_SECONDS)
        assert isinstance(reply, messages.Held)
        return reply

    def forget(self, checkpoint: str) -> None:
        """The chunks of a checkpoint need not be in the tier any more. Raises DormouseError."""
        process = self._process
        if process is not None and process.ended is None:
            process.ask(messages.Forget(call=process.new_call(), checkpoint=checkpoint), self._call_seconds)

    def memory_of(self, device: str) -> int:
        """The bytes that a GPU has in all. Raises HostError."""
        return self._gpu(device).total

    def uuid_of(self, device: str) -> str:
        """What a GPU is called in every process. Raises HostError."""
        return self._gpu(device).uuid

    def _gpu(self, device: str) -> messages.GpuMemory:
        self.warm(device)
        told = self.describe()
        name = f"cuda:{ordinal_of(device)}"
        found = {gpu.device: gpu for gpu in told.gpus} if told is not None else {}
        if name not in found:
            raise HostError(f"the loader knows nothing of {name}", remedy="Try again; see the node's log")
        return found[name]

    def describe(self) -> messages.Statistics | None:
        """Figures of a loader that runs. Raises HostError."""
        process = self._process
        if process is None or process.ended is not None:
            return None
        reply, _none = process.ask(messages.Describe(call=process.new_call()), self._call_seconds)
        assert isinstance(reply, messages.Statistics)
        return reply

    @property
    def pid(self) -> int | None:
        """Of a loader that runs."""
        process = self._process
        return None if process is None or process.ended is not None else process.pid

    def close(self) -> None:
        """End the process. Idempotent."""
        with self._starting:
            self._closed = True
            if self._process is not None:
                self._process.close("it was closed")

    def _living(self) -> _Process:
        """The process, a new one if the last has died."""
        with self._starting:
            if self._closed:
                raise HostError("the loader has been closed", remedy="This node is shutting down; try again later")
            if self._process is None or self._process.ended is not None:
                if self._process is not None:
                    log.error("the loader has died (%s); starting a new one", self._process.ended)
                    self._process.close("it has died")
                    with self._lock:
                        self._users.clear()
                self._process = _Process.start(self._command)
            return self._process


class _Process:
    """One loader and the calls it has not answered yet. `ended` says why it is no more."""

    def __init__(self, child: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self.ended: str | None = None
        self._child = child
        self._sock = sock
        self._calls = itertools.count()
        self._pending: dict[int, Future[_Answer]] = {}
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._expected = False

    @classmethod
    def start(cls, command: Sequence[str]) -> Self:
        own, childs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _SEND_SECONDS, 0))
        try:
            with childs:
                child = subprocess.Popen(
                    [*command, "--fd", str(childs.fileno())], pass_fds=(childs.fileno(),), stdin=subprocess.DEVNULL
                )
        except OSError as error:
            own.close()
            raise HostError(
                f"the loader can't be started: {error}", remedy="Look at memory and process limits"
            ) from error
        process = cls(child, own)
        ready = process._expect(process.new_call())
        threading.Thread(target=process._receive, name="loader", daemon=True).start()
        try:
            process._answered(ready, START_SECONDS)
        except BaseException:
            process.close("it could not start")
            raise
        return process

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def new_call(self) -> int:
        """A number for the next request."""
        return next(self._calls)

    def ask(self, request: messages.Request, seconds: float) -> _Answer:
        """The answer to one request. Raises what the loader refused it with, HostError when it ends or does not answer
        in time (and is killed)."""
        answer = self._expect(request.call)
        try:
            with self._sending:
                self._sock.sendall(messages.encode(request))
        except OSError as error:
            self._end(str(error))
        return self._answered(answer, seconds)

    def close(self, why: str) -> None:
        """End the process and wait for it."""
        self._expected = True
        self._end(why)
        self._reap()

    def _answered(self, answer: Future[_Answer], seconds: float) -> _Answer:
        try:
            reply, descriptors = answer.result(seconds)
        except TimeoutError as error:
            self._child.kill()
            self._end(f"it did not answer within {seconds:.0f} s and was killed")
            if answer.done() and answer.exception() is None:  # it came at the last moment
                _close(answer.result()[1])
            raise _has_ended(self.ended) from error
        if isinstance(reply, messages.Refused):
            raise errors.of_kind(reply.kind, reply.message, reply.remedy)
        return reply, descriptors

    def _expect(self, call: int) -> Future[_Answer]:
        answer: Future[_Answer] = Future()
        with self._lock:
            if self.ended is not None:
                raise _has_ended(self.ended)
            self._pending[call] = answer
        return answer

    def _receive(self) -> None:
        """What the thread does: hand out answers until there are no more."""
        try:
            while self._hand_out(*socket.recv_fds(self._sock, messages.MAX_PACKET, 2, socket.MSG_CMSG_CLOEXEC)):
                pass
            self._end("it closed its socket")
        except Exception as error:
            self._end(f"{type(error).__name__}: {error}")
            if not isinstance(error, OSError):
                log.exception("what the loader says can't be understood")
                self._child.kill()
        if not self._expected:
            self._bury()

    def _bury(self) -> None:
        """Tell how it ended."""
        status = self._reap()
        if status is not None:
            log.error("the loader has died, status %d", status)

    def _reap(self) -> int | None:
        """Its exit status, once it has ended, by itself or killed; None when not even that ends it: the driver holds
        it, and with it the memory of the GPUs."""
        for last in (False, True):
            try:
                return self._child.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                log.error("the loader (process %d) %s", self._child.pid, _STUCK if last else _KILLED)
                self._child.kill()
        return None

    def _hand_out(self, packet: bytes, descriptors: list[int], _flags: int, _address: object) -> bool:
        if not packet:
            return False
        try:
            reply = messages.decode_reply(packet)
        except BaseException:
            _close(descriptors)
            raise
        with self._lock:
            answer = self._pending.pop(reply.call, None)
        if answer is None:
            _close(descriptors)
        else:
            answer.set_result((reply, descriptors))
        return True

    def _end(self, why: str) -> None:
        with self._lock:
            if self.ended is not None:
                return
            self.ended = why
            pending, self._pending = list(self._pending.values()), {}
        with contextlib.suppress(OSError):  # it may have gone by itself
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads, which then lets go of it
        self._sock.close()
        for answer in pending:
            answer.set_exception(_has_ended(why))


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _has_ended(why: str | None) -> HostError:
    return HostError(
        f"the loader, which brings weights onto GPUs, has ended: {why}", remedy="Try again; see the node's log"
    )
