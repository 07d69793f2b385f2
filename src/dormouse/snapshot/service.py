"""The host checkpoint service as the node sees it: async calls to the child process of service_main.py.

The child owns the cells, runs CRIU and moves all bytes, so none of that work shares the gateway's process. Requests
and replies are packets on a socket pair (service_messages.py); a worker's control socket comes back with its reply.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from dormouse.errors import SnapshotError
from dormouse.snapshot import service_messages as messages


@dataclass(frozen=True)
class WorkerHandle:
    """A live worker in its cell. `control` is the node's end of the control socket (AF_UNIX stream, the receiver
    owns it). `pid` is the worker's in the host's pid namespace. `phases`: seconds by name."""

    cell_id: str
    pid: int
    control: socket.socket
    phases: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CaptureResult:
    """A committed snapshot: bytes of all its images, bytes newly written to packs, seconds by phase."""

    snapshot_id: str
    raw_bytes: int
    stored_bytes: int
    phases: dict[str, float]


class HostService:
    """Async client of the service; all methods run on the node's event loop and never block it.

    If the service process dies, every pending and later call raises SnapshotError, and all its cells (and so all
    workers) are dead.
    """

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self._process = process
        self._sock = sock
        self._calls = itertools.count(1)
        self._pending: dict[int, asyncio.Future[tuple[messages.Reply, socket.socket | None]]] = {}
        self._stopping: set[asyncio.Task[object]] = set()
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._receive)

    @classmethod
    async def start(cls, data_dir: Path) -> Self:
        """Start the service and wait until it has checked the host. Raises HostError or StoreError."""
        process, own = await asyncio.to_thread(_spawn, data_dir)
        service = cls(process, own)
        hello: asyncio.Future[tuple[messages.Reply, socket.socket | None]] = service._loop.create_future()
        service._pending[0] = hello
        try:
            reply, _none = await hello
            if isinstance(reply, messages.Refused):
                raise messages.as_error(reply)
        except BaseException:
            await service.close()
            raise
        return service

    async def start_worker(self, *, log_path: Path) -> WorkerHandle:
        """A new cell with a fresh worker in it (its first message is Hello); its output goes to `log_path`."""
        call = next(self._calls)
        return self._handle(*await self._ask(messages.StartWorker(call=call, log_path=str(log_path))))

    async def capture(self, worker: WorkerHandle, *, model: str, key: dict[str, str]) -> CaptureResult:
        """Snapshot a quiesced worker, commit, then kill it. `key` is the compatibility key.

        On any error (SnapshotError, DiskFullError, StoreError) the worker is alive and as it was: send it Resume.
        """
        call = next(self._calls)
        request = messages.CaptureWorker(call=call, cell_id=worker.cell_id, model=model, key=key)
        reply, _none = await self._ask(request)
        assert isinstance(reply, messages.Captured)
        return CaptureResult(reply.snapshot_id, reply.raw_bytes, reply.stored_bytes, reply.phases)

    async def restore(self, snapshot_id: str, *, key: dict[str, str]) -> WorkerHandle:
        """A worker restored from a snapshot; send it Resume first.

        Raises IncompatibleError (names the field), DamagedError, SnapshotError, NotFoundError; nothing runs then.
        """
        call = next(self._calls)
        return self._handle(*await self._ask(messages.RestoreSnapshot(call=call, snapshot_id=snapshot_id, key=key)))

    async def stop_worker(self, worker: WorkerHandle) -> None:
        """Kill the cell with all in it and wait until its memory is free. Idempotent."""
        await self._ask(messages.StopCell(call=next(self._calls), cell_id=worker.cell_id))

    async def close(self) -> None:
        """End the service and with it all cells."""
        self._end("it was closed")
        await asyncio.to_thread(self._process.wait)

    async def _ask(self, request: messages.Request) -> tuple[messages.Reply, socket.socket | None]:
        if self._ended:
            raise _service_ended("it is not running")
        answer: asyncio.Future[tuple[messages.Reply, socket.socket | None]] = self._loop.create_future()
        self._pending[request.call] = answer
        try:
            await self._loop.sock_sendall(self._sock, messages.encode(request))
        except OSError as error:
            self._end(str(error))
        try:
            reply, control = await asyncio.shield(answer)
        except asyncio.CancelledError:
            answer.add_done_callback(self._abandon)
            raise
        if isinstance(reply, messages.Refused):
            raise messages.as_error(reply)
        return reply, control

    def _handle(self, reply: messages.Reply, control: socket.socket | None) -> WorkerHandle:
        assert isinstance(reply, messages.Started) and control is not None
        return WorkerHandle(cell_id=reply.cell_id, pid=reply.pid, control=control, phases=reply.phases)

    def _abandon(self, answer: asyncio.Future[tuple[messages.Reply, socket.socket | None]]) -> None:
        """The caller was cancelled before its answer came: nobody will ever stop that worker, so do it here."""
        if answer.exception() is not None:
            return
        reply, control = answer.result()
        if control is not None:
            control.close()
        if isinstance(reply, messages.Started) and not self._ended:
            stop = self._loop.create_task(self._ask(messages.StopCell(call=next(self._calls), cell_id=reply.cell_id)))
            self._stopping.add(stop)
            stop.add_done_callback(self._stopping.discard)

    def _receive(self) -> None:
        try:
            packet, fds, _flags, _addr = socket.recv_fds(self._sock, messages.MAX_PACKET, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(str(error))
            return
        if not packet:
            self._end(f"exit status {self._process.poll()}")
            return
        control = socket.socket(fileno=fds[0]) if fds else None
        reply = messages.decode_reply(packet)
        self._pending.pop(reply.call).set_result((reply, control))

    def _end(self, why: str) -> None:
        if self._ended:
            return
        self._ended = True
        self._loop.remove_reader(self._sock)
        self._sock.close()
        for answer in self._pending.values():
            answer.set_exception(_service_ended(why))
        self._pending.clear()


def _spawn(data_dir: Path) -> tuple[subprocess.Popen[bytes], socket.socket]:
    own, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    own.setblocking(False)
    with child:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "dormouse.snapshot.service_main"),
                *("--fd", str(child.fileno()), "--data-dir", str(data_dir)),
            ],
            pass_fds=(child.fileno(),),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal is for the node, which then stops it in order
        )
    return process, own


def _service_ended(why: str) -> SnapshotError:
    return SnapshotError(f"the host checkpoint service has ended: {why}", remedy="Restart `dormouse serve`")
