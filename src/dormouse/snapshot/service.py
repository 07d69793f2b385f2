"""The host checkpoint service as the node sees it: async calls to the child process of service_main.py.

The child owns the cells, runs CRIU and moves all bytes, so none of that work shares the gateway's process. Requests
and replies are packets on a socket pair (service_messages.py); a worker's control socket comes back with its reply,
and so do the segments with its model's weights, which the service holds in memory for all workers of a model.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

from dormouse.errors import DormouseError, HostError
from dormouse.phases import Phases
from dormouse.snapshot import service_messages as messages
from dormouse.snapshot.capture import SNAPSHOT_KIND, CaptureResult
from dormouse.transfer.handles import SegmentHandle, adopt

__all__ = ["CaptureResult", "HostService", "WorkerHandle"]

log = logging.getLogger(__name__)

_END_TIMEOUT = 10.0


@dataclass(frozen=True)
class WorkerHandle:
    """A live worker in its cell. `control` is the node's end of the control socket (AF_UNIX stream, the receiver
    owns it), `segments` what must be sent through it (and closed by the receiver, too). `pid` is the worker's in the
    host's pid namespace. `phases`: what it took the service."""

    cell_id: str
    pid: int
    control: socket.socket
    phases: Phases = field(default_factory=Phases)
    segments: Sequence[SegmentHandle] = ()


class ServiceOptions(NamedTuple):
    """What `HostService.start` was told."""

    keep_bytes: int
    dram_tier: int
    devices: tuple[str, ...]


class HostService:
    """Async client of the service; all methods run on the node's event loop and never block it.

    If the service process dies, every pending call raises HostError, and all its cells (and so all workers) are
    dead. The next start or restore begins a new process; that is logged as an error.
    """

    def __init__(self, data_dir: Path, options: ServiceOptions) -> None:
        self._data_dir = data_dir
        self._options = options
        self._process: _Process | None = None
        self._starting = asyncio.Lock()
        self._closed = False

    @classmethod
    async def start(
        cls, data_dir: Path, *, keep_bytes: int = 0, dram_tier: int = 0, devices: Sequence[str] = ()
    ) -> Self:
        """Start the service and wait until it has checked the host. `keep_bytes`: what weights of models and adapters
        may take in memory that no worker uses at the moment; `dram_tier`: what the loader may take for coded weights of
        models on GPUs; `devices`: the GPUs it gets ready for now, not at the first need. Raises HostError or
        StoreError."""
        service = cls(data_dir, ServiceOptions(keep_bytes, dram_tier, tuple(devices)))
        await service._living()
        return service

    @property
    def kept_weights(self) -> Mapping[str, int]:
        """The bytes of weights in memory that no worker uses, by checkpoint, the longest unused first; as of the last
        call that was answered. `drop_segment` frees any of them."""
        process = self._process
        return process.kept if process is not None and process.ended is None else {}

    async def start_worker(self, *, log_path: Path, checkpoint: str | None = None, device: str = "cpu") -> WorkerHandle:
        """A new cell with a fresh worker in it (its first message is Hello); its output goes to `log_path`.

        With the id of a model's checkpoint, its segment fills meanwhile, or is shared if another worker has it on the
        same device (the CPU's is shared by all). Raises
        WeightsError when there is no such checkpoint; what goes wrong later, the worker is told. HostError when this
        host can't, now or at all.
        """
        process = await self._living()
        request = messages.StartWorker(
            call=process.new_call(), log_path=str(log_path), checkpoint=checkpoint, device=device
        )
        return _handle(*await process.ask(request))

    async def capture(
        self, worker: WorkerHandle, *, model: str, key: dict[str, str], kind: str = SNAPSHOT_KIND, keep: bool = False
    ) -> CaptureResult:
        """Snapshot a quiesced worker, commit, then kill it, or leave it as it was if it is to `keep`. `key` is the
        compatibility key; `kind` and `model` are the manifest's kind and name.

        On any error (SnapshotError, DiskFullError, StoreError, HostError) the worker is alive and as it was: send it
        Resume. (Only when CRIU itself was killed or hung at work in it, its cell is closed.)
        """
        process = self._process
        if process is None or process.ended is not None:
            raise HostError(f"the worker of {model} is gone, and the service that made it")
        request = messages.CaptureWorker(
            call=process.new_call(), cell_id=worker.cell_id, kind=kind, model=model, key=key, keep=keep
        )
        reply, _none = await process.ask(request)
        assert isinstance(reply, messages.Captured)
        return CaptureResult(reply.snapshot_id, reply.raw_bytes, reply.stored_bytes, reply.phases)

    async def restore(
        self, snapshot_id: str, *, key: dict[str, str], checkpoint: str | None = None, device: str = "cpu"
    ) -> WorkerHandle:
        """A worker restored from a snapshot; send it its segments, then Resume. `checkpoint` and `device` as for
        `start_worker`.

        Raises IncompatibleError (names the field), DamagedError, SnapshotError, NotFoundError; HostError and
        WeightsError where it is not the snapshot's fault. Nothing runs then.
        """
        process = await self._living()
        request = messages.RestoreSnapshot(
            call=process.new_call(), snapshot_id=snapshot_id, key=key, checkpoint=checkpoint, device=device
        )
        return _handle(*await process.ask(request))

    async def take_segment(
        self, worker: WorkerHandle, checkpoint: str, *, adapter: bool = True, device: str = "cpu"
    ) -> SegmentHandle:
        """The segment of a checkpoint on a device for this worker, filled or filling: an adapter's, or its model's when
        it has given that back; it is the worker's until its cell ends, `drop_segment` or `drop_segments`. Raises
        WeightsError, HostError, EngineError when the worker is gone."""
        process = self._process
        if process is None or process.ended is not None:
            raise HostError("the worker is gone, and the service that made it", remedy="Try again")
        request = messages.TakeSegment(
            call=process.new_call(),
            cell_id=worker.cell_id,
            checkpoint=checkpoint,
            adapter=adapter,
            device=device,
        )
        reply, descriptors = await process.ask(request)
        assert isinstance(reply, messages.SegmentTaken)
        return adopt([reply.segment], iter(descriptors))[0]

    async def drop_segment(self, worker: WorkerHandle | None, checkpoint: str, *, keep: bool = False) -> None:
        """A segment is not this worker's any more (None: it is no worker's), and need not be kept, unless told to
        `keep` it within the budget for that. Idempotent."""
        process = self._process
        if process is None or process.ended is not None:
            return
        cell_id = worker.cell_id if worker is not None else None
        await process.ask(
            messages.DropSegment(call=process.new_call(), cell_id=cell_id, checkpoint=checkpoint, keep=keep)
        )

    async def drop_segments(self, worker: WorkerHandle) -> None:
        """A parked worker gives back all of its segments; they are kept within the budget for that. Idempotent."""
        process = self._process
        if process is not None and process.ended is None:
            await process.ask(messages.DropSegments(call=process.new_call(), cell_id=worker.cell_id))

    async def gpu_memory(self, device: str) -> int:
        """The bytes that a GPU has in all. Waits until the loader can use it. Raises HostError."""
        process = await self._living()
        reply, _none = await process.ask(messages.DescribeGpu(call=process.new_call(), device=device))
        assert isinstance(reply, messages.GpuDescribed)
        return reply.total

    async def stop_worker(self, worker: WorkerHandle) -> None:
        """Kill the cell with all in it and wait until its memory is free. Idempotent."""
        process = self._process
        if process is None or process.ended is not None:
            return
        try:
            await process.ask(messages.StopCell(call=process.new_call(), cell_id=worker.cell_id))
        except DormouseError:
            if process.ended is None:  # else the worker has ended with the service
                raise

    async def close(self) -> None:
        """End the service and with it all cells."""
        self._closed = True
        if self._process is not None:
            await self._process.close("it was closed")

    async def _living(self) -> _Process:
        """The process, a new one if the last has died."""
        async with self._starting:
            if self._closed:
                raise HostError("the host checkpoint service has been closed")
            if self._process is None or self._process.ended is not None:
                if self._process is not None:
                    log.error("the host checkpoint service has died (%s); starting a new one", self._process.ended)
                    await self._process.close("it has died")
                self._process = await _Process.start(self._data_dir, self._options)
            return self._process


class _Process:
    """One service process and the calls it has not answered yet. `ended` says why it is no more."""

    def __init__(self, child: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self.ended: str | None = None
        self.kept: dict[str, int] = {}
        self._child = child
        self._sock = sock
        self._calls = itertools.count()
        self._pending: dict[int, asyncio.Future[_Answer]] = {}
        self._stopping: set[asyncio.Task[object]] = set()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._receive)

    @classmethod
    async def start(cls, data_dir: Path, options: ServiceOptions) -> Self:
        process = cls(*await asyncio.to_thread(_spawn, data_dir, options))
        try:
            _answered(await asyncio.shield(process._expect(process.new_call())))  # call 0, see service_main
        except BaseException:
            await process.close("it could not start")
            raise
        return process

    def new_call(self) -> int:
        """A number for the next request."""
        return next(self._calls)

    async def ask(self, request: messages.Request) -> _Answer:
        """The answer to one request. Raises what the service refused it with, HostError when the process ends."""
        if self.ended is not None:
            raise _has_ended(self.ended)
        answer = self._expect(request.call)
        try:
            await self._loop.sock_sendall(self._sock, messages.encode(request))
        except OSError as error:
            self._end(str(error))
        try:
            return _answered(await asyncio.shield(answer))
        except asyncio.CancelledError:
            answer.add_done_callback(self._abandon)
            raise

    async def close(self, why: str) -> None:
        """End the process and wait for it."""
        self._end(why)
        try:
            await asyncio.to_thread(self._child.wait, _END_TIMEOUT)
        except subprocess.TimeoutExpired:
            log.error("the host checkpoint service does not end; it is killed")
            self._child.kill()
            await asyncio.to_thread(self._child.wait)

    def _expect(self, call: int) -> asyncio.Future[_Answer]:
        answer: asyncio.Future[_Answer] = self._loop.create_future()
        self._pending[call] = answer
        return answer

    def _abandon(self, answer: asyncio.Future[_Answer]) -> None:
        """The caller was cancelled before its answer came: nobody will ever stop that worker, so do it here."""
        if answer.exception() is not None:
            return
        reply, descriptors = answer.result()
        for descriptor in descriptors:
            os.close(descriptor)
        if isinstance(reply, messages.Started) and self.ended is None:
            stop = messages.StopCell(call=self.new_call(), cell_id=reply.cell_id)
            task = self._loop.create_task(self.ask(stop))
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)

    def _receive(self) -> None:
        try:
            packet, fds, _flags, _addr = socket.recv_fds(
                self._sock, messages.MAX_PACKET, messages.MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError as error:
            self._end(str(error))
            return
        if not packet:
            self._end("it closed its socket")
            return
        reply = messages.decode_reply(packet)
        self.kept = reply.kept
        self._pending.pop(reply.call).set_result((reply, fds))

    def _end(self, why: str) -> None:
        if self.ended is not None:
            return
        self.ended = why
        self._loop.remove_reader(self._sock)
        self._sock.close()
        for answer in self._pending.values():
            answer.set_exception(_has_ended(why))
        self._pending.clear()


_Answer = tuple[messages.Reply, list[int]]


def _answered(answer: _Answer) -> _Answer:
    if isinstance(answer[0], messages.Refused):
        raise messages.as_error(answer[0])
    return answer


def _handle(reply: messages.Reply, descriptors: list[int]) -> WorkerHandle:
    assert isinstance(reply, messages.Started)
    control, *of_segments = descriptors
    return WorkerHandle(
        cell_id=reply.cell_id,
        pid=reply.pid,
        control=socket.socket(fileno=control),
        phases=reply.phases,
        segments=adopt(reply.segments, iter(of_segments)),
    )


def _spawn(data_dir: Path, options: ServiceOptions) -> tuple[subprocess.Popen[bytes], socket.socket]:
    own, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    own.setblocking(False)
    with child:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "dormouse.snapshot.service_main"),
                *("--fd", str(child.fileno()), "--data-dir", str(data_dir)),
                *("--keep-bytes", str(options.keep_bytes), "--dram-tier", str(options.dram_tier)),
                *(word for device in options.devices for word in ("--device", device)),
            ],
            pass_fds=(child.fileno(),),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal is for the node, which then stops it in order
        )
    return process, own


def _has_ended(why: str) -> HostError:
    return HostError(f"the host checkpoint service has ended: {why}", remedy="Try again; see the node's log")
