"""The worker process: one engine behind one inherited socket.

    python -m dormouse.engine.worker --control-fd N

    node --frames--> main thread (this module) --submit, cancel--> engine's thread --emit--> frames to the node

The main thread reads the socket; whoever has a message to send writes it itself, under one lock, with a blocking
send. So there is no queue to bound: a node that reads slowly slows the engine down, and once `Quiesced` is sent
nothing is left to be sent. The end of the stream ends the process.

The process is snapshotted between `Quiesced` and `Resume`. Before `Quiesced` the engine's thread sleeps, the segments
are unmapped (arena.py), stdout and stderr go to /dev/null (a snapshot refuses a file that has changed since), free
memory is returned to the kernel, and the only descriptor left besides those is the control socket. Its new peer sends
the segments again.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import logging
import os
import socket
import sys
import threading
from collections import deque
from collections.abc import Iterator

import msgspec

from dormouse.engine.arena import Arena, Attached, SegmentArena
from dormouse.engine.frames import Inbox, pack_frame
from dormouse.engine.messages import (
    PROTOCOL_VERSION,
    AdapterFailed,
    AdapterSegment,
    Cancel,
    Failed,
    FromWorker,
    Generate,
    Hello,
    Load,
    LoadAdapter,
    Ping,
    Pong,
    Prepare,
    Prepared,
    Quiesce,
    Quiesced,
    Resume,
    Resumed,
    Segments,
    ToWorker,
    UnloadAdapter,
    WorkerError,
)
from dormouse.engine.protocol import Engine
from dormouse.errors import DormouseError, EngineError
from dormouse.phases import Phases
from dormouse.transfer.handles import MAX_SEGMENTS, SegmentHandle, SegmentInfo, adopt

_RECEIVE = 1 << 16
log = logging.getLogger(__name__)


def create_arena(device: str) -> SegmentArena:
    """For the segments of a model on this device. Raises HostError where there is no such GPU."""
    if not device.startswith("cuda"):  # whether there is such a device, the engine tells
        return Arena()
    from dormouse.engine.device_arena import DeviceArena
    from dormouse.transfer.cuda_driver import Cuda, ordinal_of

    return DeviceArena(Cuda(), ordinal_of(device))


def create_engine(name: str) -> Engine:
    """The engine of a name. Heavy imports happen here, not before: a worker that waits for Load costs 20 MB."""
    if name == "null":
        from dormouse.engine.null_engine import NullEngine

        return NullEngine()
    if name == "transformers":
        from dormouse.engine.transformers_engine import TransformersEngine

        return TransformersEngine()
    raise EngineError(f"there is no engine named {name!r}", remedy="Use 'transformers' or 'null'")


class Worker:
    """The main loop; `run` returns the process's exit status."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._sending = threading.Lock()
        self._arena: SegmentArena | None = None  # its kind is known when a model is
        self._early: list[SegmentHandle] = []  # segments that came before that
        self._descriptors: deque[int] = deque()
        self._prepared: tuple[Prepare, Engine] | None = None
        self._engine: Engine | None = None
        self._parked = False
        self._adapter_segment: SegmentHandle | None = None

    def run(self) -> int:
        inbox: Inbox[ToWorker] = Inbox(ToWorker)  # type: ignore[arg-type]  # a union is what the decoder wants
        try:
            self._send(Hello(version=PROTOCOL_VERSION, pid=os.getpid()))
            while data := self._receive():
                for message in inbox.feed(data):
                    self._handle(message)
        except EngineError as error:  # only the inbox lets one through: what follows it can't be understood
            self._send(WorkerError(message=error.message, remedy="Restart the worker"))
            return 1
        except ConnectionError:
            log.warning("the node has gone")
        finally:
            if self._engine is not None:
                self._engine.close()
        return 0

    def _receive(self) -> bytes:
        """Bytes of the control socket. Descriptors that come with them are kept for the message they belong to: the
        kernel gives them out with the first bytes of the frame they were sent with."""
        data, descriptors, _flags, _addr = socket.recv_fds(
            self._control, _RECEIVE, 2 * MAX_SEGMENTS, socket.MSG_CMSG_CLOEXEC
        )
        self._descriptors += descriptors
        return data

    def _handle(self, message: ToWorker) -> None:
        try:
            self._dispatch(message)
        except ConnectionError:
            raise
        except DormouseError as error:
            self._send(WorkerError(message=error.message, remedy=error.remedy, kind=type(error).__name__))
        except Exception as error:
            log.exception("%s failed", type(message).__name__)
            self._send(
                WorkerError(message=f"{type(message).__name__} failed: {error!r}", remedy="See the worker's log")
            )

    def _dispatch(self, message: ToWorker) -> None:
        match message:
            case Segments():
                self._take_segments(message)
            case Prepare():
                self._prepare(message)
            case Load():
                self._load(message)
            case Generate():
                self._generate(message)
            case Cancel() if self._engine is not None and not self._parked:
                self._engine.cancel(message.id)
            case Ping():
                self._send(Pong())
            case Quiesce():
                self._quiesce()
            case Resume():
                self._resume(message)
            case AdapterSegment():
                self._take_adapter_segment(message)
            case LoadAdapter():
                self._of_adapter(message)
            case UnloadAdapter():
                self._of_adapter(message)
            case _:
                pass

    def _take_segments(self, message: Segments) -> None:
        handles = self._adopted(message.segments)
        if self._arena is not None:
            self._arena.map(handles)
        else:
            self._drop_early()
            self._early = handles

    def _drop_early(self) -> None:
        early, self._early = self._early, []
        for handle in early:
            handle.close()

    def _arena_on(self, device: str) -> SegmentArena:
        """The arena, with the segments that have come so far mapped."""
        if self._arena is None:
            self._arena = create_arena(device)
        early, self._early = self._early, []
        if early:
            self._arena.map(early)
        return self._arena

    def _adopted(self, segments: list[SegmentInfo]) -> list[SegmentHandle]:
        received = self._received()
        try:
            return adopt(segments, received)
        finally:
            for left_over in received:
                os.close(left_over)

    def _received(self) -> Iterator[int]:
        while self._descriptors:
            yield self._descriptors.popleft()

    def _take_adapter_segment(self, message: AdapterSegment) -> None:
        if self._adapter_segment is not None:
            self._adapter_segment.close()
            self._adapter_segment = None
        # Only its own: a frame that arrives in two parts may bring the descriptor of the next adapter's along.
        (self._adapter_segment,) = adopt([message.segment], self._received())

    def _of_adapter(self, message: LoadAdapter | UnloadAdapter) -> None:
        """An adapter's fault is told under its name: other requests run."""
        segment, self._adapter_segment = self._adapter_segment, None
        try:
            if self._engine is None or self._parked:
                raise EngineError("the worker has no model now", remedy="Try again")
            if isinstance(message, UnloadAdapter):
                self._engine.unload_adapter(message.name)
            elif segment is None:
                raise EngineError(f"adapter {message.name} was announced without its segment")
            else:
                self._engine.load_adapter(message, Attached(segment))
        except ConnectionError:
            raise
        except DormouseError as error:
            kind = type(error).__name__
            self._send(AdapterFailed(name=message.name, message=error.message, remedy=error.remedy, kind=kind))
        except Exception as error:
            log.exception("%s failed", type(message).__name__)
            why = f"{type(message).__name__} failed: {error!r}"
            self._send(AdapterFailed(name=message.name, message=why, remedy="See the worker's log"))
        finally:
            if segment is not None:
                segment.close()

    def _prepare(self, spec: Prepare) -> None:
        if self._engine is not None or self._prepared is not None:
            raise EngineError("this worker has an engine already", remedy="Start another worker")
        with _much_that_stays():
            engine = create_engine(spec.engine)
            phases = engine.prepare(spec)
        self._prepared = spec, engine
        self._send(Prepared(phases=phases))

    def _load(self, spec: Load) -> None:
        if self._engine is not None:
            raise EngineError("this worker has a model already", remedy="Start another worker")
        with _much_that_stays():
            engine = self._fitting_engine(spec)
            arena = self._arena_on(spec.device)
            loaded = engine.load(spec, arena, self._emit)
        _await_weights(arena, loaded.phases)
        self._engine = engine
        self._send(msgspec.structs.replace(loaded, device_bytes=arena.device_bytes, writable=arena.writable))

    def _fitting_engine(self, spec: Load) -> Engine:
        if self._prepared is None:
            return create_engine(spec.engine)
        prepared, engine = self._prepared
        if prepared != Prepare(engine=spec.engine, device=spec.device, threads=spec.threads):
            raise EngineError(
                f"this worker was prepared for {prepared}, not for {spec.engine} on {spec.device}",
                remedy="Start another worker",
            )
        return engine

    def _generate(self, request: Generate) -> None:
        if self._engine is not None and not self._parked:
            try:
                self._engine.submit(request)
            except ConnectionError:
                raise
            except Exception as error:  # one request's fault must not end the others
                log.exception("request %s failed", request.id)
                why = f"the request failed: {error!r}"
                self._send(Failed(id=request.id, message=why, reason="engine_error", bad_request=False))
            return
        why = "the worker is parked" if self._engine is not None else "no model is loaded"
        self._send(Failed(id=request.id, message=why, reason="engine_error", bad_request=False))

    def _quiesce(self) -> None:
        phases = Phases()
        if self._engine is not None:
            with phases.time("engine"):
                self._engine.quiesce()
        elif self._prepared is None:
            raise EngineError("no engine is loaded", remedy="Send Load or Prepare first")
        self._parked = True
        self._drop_early()
        if self._arena is not None:
            with phases.time("unmap"):
                self._arena.unmap()
        with phases.time("memory"):
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
        _redirect_output(os.devnull, os.O_WRONLY)
        self._send(Quiesced(phases=phases))

    def _resume(self, message: Resume) -> None:
        phases = Phases()
        try:
            _redirect_output(message.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        except OSError as error:
            raise EngineError(
                f"the worker's log {message.log_path} can't be opened: {error.strerror}",
                remedy="Check the folder's permissions and free space",
            ) from error
        if self._engine is not None:
            self._wake_arena(phases)
            with phases.time("engine"):
                self._engine.resume()
        self._parked = False
        if self._arena is None:
            self._send(Resumed(phases=phases))
            return
        self._send(Resumed(phases=phases, device_bytes=self._arena.device_bytes, writable=self._arena.writable))

    def _wake_arena(self, phases: Phases) -> None:
        assert self._arena is not None
        if self._arena.weights is None:
            if not self._arena.mapped:  # scratch may have to come back
                self._arena.map([])
        elif not self._arena.mapped:
            raise EngineError("the worker was resumed without its weights", remedy="Start the model again")
        _await_weights(self._arena, phases)

    def _emit(self, message: FromWorker) -> None:
        """What the engine's thread calls. A node that has gone is the main thread's business: it sees the end of the
        stream and ends the process, so here the message is only dropped."""
        try:
            self._send(message)
        except ConnectionError:
            log.warning("the node has gone; a %s message is dropped", type(message).__name__)

    def _send(self, message: FromWorker) -> None:
        frame = pack_frame(message)
        with self._sending:
            self._control.sendall(frame)


@contextlib.contextmanager
def _much_that_stays() -> Iterator[None]:
    """Around imports: they make a million objects that all stay, and collecting among them costs a tenth of the time.
    What was made is then left out of all later collections."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _await_weights(arena: SegmentArena, phases: Phases) -> None:
    """The wait for them, and their filling, which began before and elsewhere."""
    with phases.time("weights"):
        fills = arena.wait()
    for fill in fills:
        phases.add("segment", fill.begin, fill.end, track="weights", bytes=fill.bytes, stored=fill.stored)


def _redirect_output(path: str, flags: int) -> None:
    """Make stdout and stderr go to `path` (0600 if it is created), keeping the descriptor numbers."""
    sys.stdout.flush()
    sys.stderr.flush()
    opened = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        for standard in (1, 2):
            os.dup2(opened, standard)
    finally:
        os.close(opened)


def _environment() -> None:
    """What libraries read when they are imported: no network, no telemetry, no threads of the tokenizer."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        DO_NOT_TRACK="1",
        TOKENIZERS_PARALLELISM="false",
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="dormouse-worker", description="Run one engine behind an inherited socket.")
    parser.add_argument("--control-fd", type=int, required=True, help="descriptor of the AF_UNIX stream socket")
    control_fd: int = parser.parse_args().control_fd
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    _environment()
    with socket.socket(fileno=control_fd) as control:
        return Worker(control).run()


if __name__ == "__main__":
    sys.exit(main())
