"""The host checkpoint service: the process that owns the cells and runs CRIU, so that the gateway's never blocks.

    node (service.py)  --requests-->  main thread  -->  one pool thread per call  --reply-->  node

Started by the node as `python -m dormouse.snapshot.service_main --fd N --data-dir DIR …`; the first packet it sends is
`Stopped(call=0)` when this host can do the job, or `Refused(call=0)`. When the node's end of the socket closes, in
whatever way the node died, this process exits and with it every cell.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec

from dormouse.checkpoint.loader import Loader, loader_command
from dormouse.checkpoint.pool import SegmentPool
from dormouse.errors import (
    DamagedError,
    DormouseError,
    EngineError,
    HostError,
    NotFoundError,
    SnapshotError,
    StoreError,
    UntrustedError,
    WeightsError,
)
from dormouse.phases import Phases
from dormouse.snapshot import service_messages as messages
from dormouse.snapshot.capture import CaptureResult, capture, run_on
from dormouse.snapshot.cell import CONTROL_FD, Cell, worker_pid_floor
from dormouse.snapshot.criu_setup import Criu, find_criu
from dormouse.snapshot.hands import Hands
from dormouse.snapshot.mapped_files import CACHE_NAME, DigestCache
from dormouse.snapshot.restore import note_damage, restore
from dormouse.snapshot.shortage import REMEDY, is_shortage
from dormouse.snapshot.tree import External, ProcessTree
from dormouse.snapshot.work_folder import criu_folders, sweep_work_folders
from dormouse.store.store import Store
from dormouse.transfer.handles import SegmentHandle
from dormouse.transfer.memory import keep_freed_memory

log = logging.getLogger(__name__)

_MAX_CALLS = 16
_CRIU_TIMEOUT = 600.0

Answer = tuple[messages.Reply, list[int]]
"""A reply and the descriptors that go with it; sent, then closed."""
_Worker = tuple[int, socket.socket, Phases]
_R = TypeVar("_R", messages.StartWorker, messages.RestoreSnapshot)

_PROBE_TIMEOUT = 20.0
_MAX_LOG = 16 << 20

# What a worker sees of the node's environment. A list of names rather than all but a few: the environment ends up in
# the snapshot, and secrets must not.
_PASSED_ON = (
    *("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV"),
    "TRITON_CACHE_DIR",  # where compiled kernels are found again
)
_PASSED_ON_PREFIXES = ("LC_", "OMP_", "MKL_", "CUDA_", "NVIDIA_", "TORCH_")


def worker_command() -> list[str]:
    """How a worker is started. Without address randomisation two workers of one engine have the same pages at the same
    places, and their snapshots share them; a snapshot keeps its addresses for its whole life anyway.

    Raises HostError.
    """
    setarch = shutil.which("setarch")
    if setarch is None:
        raise HostError("setarch is not installed", remedy="Install the package util-linux")
    worker = [sys.executable, "-m", "dormouse.engine.worker", "--control-fd", str(CONTROL_FD)]
    return [setarch, "--addr-no-randomize", *worker]


def worker_environment(environment: Mapping[str, str], hash_seed: int) -> dict[str, str]:
    """The environment of a new worker. One seed of Python's string hashes per host makes dictionaries equal too."""
    passed = {
        name: value for name, value in environment.items() if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)
    }
    return (
        passed
        | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        | {"PYTHONHASHSEED": str(hash_seed)}
    )


def rotate_log(path: Path) -> None:
    """Before a fresh worker writes to it, a log that has grown long becomes `NAME.log.1`."""
    if path.exists() and path.stat().st_size > _MAX_LOG:
        path.replace(path.with_name(f"{path.name}.1"))


class SpareCell:
    """One empty cell kept ready. Making one takes 25 ms, and ten times that when its program must come from the disk;
    a waking model need not wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cell: Cell | None = None

    def take(self) -> Cell:
        """The spare one if it is alive, else a new one."""
        with self._lock:
            cell, self._cell = self._cell, None
        if cell is not None and cell.alive:
            return cell
        if cell is not None:
            cell.close()
        return Cell.create()

    def refill(self) -> None:
        """Make the next one, if there is none."""
        with self._lock:
            if self._cell is None:
                self._cell = Cell.create()

    def close(self) -> None:
        """End the spare one."""
        with self._lock:
            if self._cell is not None:
                self._cell.close()


class Service:
    """The calls, each blocking and run in a thread of its own."""

    def __init__(
        self,
        store: Store,
        criu: Criu,
        digests: DigestCache,
        folders: Path,
        *,
        keep_bytes: int,
        loader: Loader,
        hands: Hands,
    ) -> None:
        self._store = store
        self._criu = criu
        self._digests = digests
        self._folders = folders
        self._spare = SpareCell()
        self._spare.refill()
        self._lock = threading.Lock()
        self._workers: dict[str, ProcessTree] = {}
        self._damaged: set[str] = set()
        self._loader = loader
        self._hands = hands
        self._segments = SegmentPool(store, keep_bytes=keep_bytes, loader=loader)
        self._latest: dict[str, str] = {}  # by engine, the snapshot that was captured or restored last

    def close(self) -> None:
        """End what no worker uses. Workers are the caller's to stop."""
        self._spare.close()

    @property
    def kept(self) -> dict[str, int]:
        """The weights that no worker uses, see `SegmentPool.kept`."""
        return self._segments.kept

    def prepare(self) -> None:
        """Work that a later call gains from, done after an answer."""
        self._spare.refill()
        with self._lock:
            damaged, self._damaged = self._damaged, set()
        for snapshot_id in damaged:
            note_damage(self._store, snapshot_id)

    def answer(self, request: messages.Request) -> Answer:
        """Carry out one request. Raises DormouseError."""
        match request:
            case messages.StartWorker():
                return self._with_segments(request, self._start)
            case messages.CaptureWorker():
                return self._capture(request), []
            case messages.RestoreSnapshot():
                return self._with_segments(request, self._restore)
            case messages.StopCell():
                self._stop(request.cell_id)
                return messages.Stopped(call=request.call), []
            case messages.DescribeGpu():
                return messages.GpuDescribed(call=request.call, total=self._loader.memory_of(request.device)), []
            case messages.TakeSegment() | messages.DropSegment() | messages.DropSegments():
                return self._of_segments(request)

    def _of_segments(self, request: messages.TakeSegment | messages.DropSegment | messages.DropSegments) -> Answer:
        if isinstance(request, messages.TakeSegment):
            return self._take_segment(request)
        self._drop(request)
        return messages.SegmentDropped(call=request.call), []

    def _drop(self, request: messages.DropSegment | messages.DropSegments) -> None:
        if isinstance(request, messages.DropSegments):
            self._segments.release(request.cell_id)
            return
        if request.cell_id is not None:
            self._segments.release(request.cell_id, request.checkpoint)
        if not request.keep:
            self._segments.forget(request.checkpoint)

    def _take_segment(self, request: messages.TakeSegment) -> Answer:
        handle = self._weights(request.checkpoint, request.cell_id, request.device, adapter=request.adapter)
        with self._lock:
            alive = request.cell_id in self._workers
        if not alive:  # what it was given is given back with the cell, and that has been
            handle.close()
            self._segments.release(request.cell_id)
            raise EngineError(f"cell {request.cell_id} is gone, it needs no segment", remedy="Try again")
        return messages.SegmentTaken(call=request.call, segment=handle.info), handle.descriptors()

    def _with_segments(self, request: _R, bring_up: Callable[[_R, str, str | None], _Worker]) -> Answer:
        """Have the model's segment fill while its worker starts or is restored."""
        cell_id = secrets.token_hex(6)
        handles: list[SegmentHandle] = []
        try:
            if request.checkpoint is not None:
                handles.append(self._weights(request.checkpoint, cell_id, request.device))
            pid, control, phases = bring_up(request, cell_id, self._gpu_of(request.device, handles))
        except BaseException:
            for handle in handles:
                handle.close()
            self._segments.release(cell_id)
            raise
        started = messages.Started(
            call=request.call,
            cell_id=cell_id,
            pid=pid,
            phases=phases,
            segments=[handle.info for handle in handles],
        )
        return started, [control.detach(), *(fd for handle in handles for fd in handle.descriptors())]

    def _gpu_of(self, device: str, handles: Sequence[SegmentHandle]) -> str | None:
        """The UUID of the GPU that a worker is to compute on: that of its weights. Raises HostError."""
        if device == "cpu":
            return None
        return handles[0].device if handles else self._loader.uuid_of(device)

    def _weights(self, checkpoint: str, cell_id: str, device: str, *, adapter: bool = False) -> SegmentHandle:
        """The segment. What is wrong with the weights must not be taken for a fault of the snapshot, nor a checkpoint
        that is gone for a model that is not served."""
        try:
            return self._segments.take(checkpoint, cell_id, keep=True, adapter=adapter, device=device)
        except (NotFoundError, StoreError) as error:
            raise WeightsError(error.message, remedy=error.remedy) from error

    def _start(self, request: messages.StartWorker, cell_id: str, gpu: str | None) -> _Worker:
        phases = Phases()
        with phases.time("cell"):
            cell = self._spare.take()
        try:
            rotate_log(Path(request.log_path))
            log_fd = os.open(request.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                spawned = cell.spawn(
                    worker_command(),
                    env=worker_environment(os.environ, self._store.key.number("worker hash seed")),
                    fds={1: log_fd, 2: log_fd},
                    control=CONTROL_FD,
                    pid_floor=worker_pid_floor(),
                    io_uring=False,
                )
            finally:
                os.close(log_fd)
            assert spawned.inode is not None and spawned.control is not None
            tree = ProcessTree(cell, spawned.pid, (External("socket", spawned.inode),), gpu=gpu)
            return self._started(cell_id, tree), spawned.control, phases
        except OSError as error:
            cell.close()
            raise HostError(f"could not start a worker: {error}", remedy=REMEDY) from error
        except BaseException:
            cell.close()
            raise

    def _restore(self, request: messages.RestoreSnapshot, cell_id: str, gpu: str | None) -> _Worker:
        try:
            restored = restore(
                request.snapshot_id,
                self._store,
                self._criu,
                key=self._full_key(request.key),
                take_home=self._spare.take,
                timeout=_CRIU_TIMEOUT,
                digests=self._digests,
                folders=self._folders,
                gpus=() if gpu is None else (gpu,),
                hands=self._hands,
            )
        except (DamagedError, UntrustedError):
            with self._lock:
                self._damaged.add(request.snapshot_id)
            raise
        self._latest[request.key.get("engine", "")] = request.snapshot_id
        try:
            assert restored.control is not None
            tree = dataclasses.replace(restored.tree, gpu=gpu)
            return self._started(cell_id, tree), restored.control, restored.phases
        except BaseException:
            if restored.control is not None:
                restored.control.close()
            restored.tree.home.close()
            raise

    def _capture(self, request: messages.CaptureWorker) -> messages.Reply:
        with self._lock:
            worker = self._workers.get(request.cell_id)
        if worker is None:
            raise SnapshotError(f"cell {request.cell_id} is gone, there is nothing to capture")
        result = capture(
            worker,
            self._store,
            self._criu,
            kind=request.kind,
            name=request.model,
            key=self._full_key(request.key),
            now=time.time,
            still_wanted=lambda: request.cell_id in self._workers,
            timeout=_CRIU_TIMEOUT,
            digests=self._digests,
            folders=self._folders,
            like=self._latest.get(request.key.get("engine", "")),
            hands=self._hands,
        )
        self._latest[request.key.get("engine", "")] = result.snapshot_id
        if request.keep:
            self._go_on(request.cell_id, result)
        else:
            self._stop(request.cell_id)
        return messages.Captured(
            call=request.call,
            snapshot_id=result.snapshot_id,
            raw_bytes=result.raw_bytes,
            stored_bytes=result.stored_bytes,
            phases=result.phases,
        )

    def _go_on(self, cell_id: str, captured: CaptureResult) -> None:
        """The worker runs on, parked as it was; its next capture shares pages with this one. Raises SnapshotError or
        HostError when its CUDA state could not be brought back; its cell is closed then."""
        with self._lock:
            worker = self._workers.get(cell_id)
            if worker is None:  # it has been stopped meanwhile
                return
            self._workers[cell_id] = dataclasses.replace(worker, snapshot_id=captured.snapshot_id)
        run_on(worker, captured)

    def _started(self, cell_id: str, worker: ProcessTree) -> int:
        pid = worker.home.outer_pid(worker.pid)
        with self._lock:
            self._workers[cell_id] = worker
        return pid

    def _stop(self, cell_id: str) -> None:
        with self._lock:
            worker = self._workers.pop(cell_id, None)
        if worker is not None:
            worker.home.close()
        self._segments.release(cell_id)

    def _full_key(self, key: dict[str, str]) -> dict[str, str]:
        return key | {"criu": self._criu.version_text}


def serve(sock: socket.socket, service: Service) -> None:
    """Answer until the node's end closes."""
    sending = threading.Lock()

    def run(request: messages.Request) -> None:
        descriptors: list[int] = []
        try:
            try:
                reply, descriptors = service.answer(request)
            except DormouseError as error:
                reply = messages.refused(request.call, error)
            except Exception as error:
                log.exception("%s failed", type(request).__name__)
                reply = messages.refused(request.call, _unexpected(error))
            with sending:
                told = msgspec.structs.replace(reply, kept=service.kept)  # the latest in the last packet
                socket.send_fds(sock, [messages.encode(told)], descriptors)
        except OSError as error:
            log.warning("an answer could not be sent, the node is gone: %s", error)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def prepare() -> None:
        try:
            service.prepare()
        except Exception:  # no call depends on it: the next one makes what it lacks
            log.exception("preparing for the next call failed")

    calls = ThreadPoolExecutor(_MAX_CALLS, thread_name_prefix="call")
    while packet := sock.recv(messages.MAX_PACKET):
        calls.submit(run, messages.decode_request(packet)).add_done_callback(lambda _done: prepare())


def _unexpected(error: Exception) -> DormouseError:
    text = f"unexpected {type(error).__name__}: {error}"
    return HostError(text, remedy=REMEDY) if isinstance(error, OSError) or is_shortage(error) else SnapshotError(text)


def warm(loader: Loader, devices: Sequence[str]) -> None:
    """Get the loader ready, beside all else. What fails here is told again to who needs it."""

    def run() -> None:
        for device in devices:
            try:
                loader.warm(device)
            except DormouseError as error:
                log.error("nothing can be loaded onto %s: %s", device, error)

    if devices:
        threading.Thread(target=run, name="warm", daemon=True).start()


def preflight(data_dir: Path, keep_bytes: int, loader: Loader) -> Service:
    """All that must hold before the first call. Raises HostError or StoreError."""
    criu = find_criu(data_dir)
    cell = Cell.create()
    try:
        code = cell.wait(cell.spawn(["/bin/true"], env={}).pid, _PROBE_TIMEOUT)
    except SnapshotError as error:
        raise HostError(
            f"no cell can be made here: {error.message}", remedy="Run as root; `dormouse doctor` tells what is missing"
        ) from error
    finally:
        cell.close()
    if code != 0:
        raise HostError(f"a program in a cell ended with status {code}", remedy="Run `dormouse doctor`")
    folders = criu_folders(data_dir / "run")
    sweep_work_folders(folders)
    store, digests = Store.open(data_dir / "store"), DigestCache(data_dir / CACHE_NAME)
    hands = Hands.of_this_machine()
    hands.warm()
    return Service(store, criu, digests, folders, keep_bytes=keep_bytes, loader=loader, hands=hands)


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--keep-bytes", type=int, default=0, help="memory for weights that no worker uses now")
    parser.add_argument("--dram-tier", type=int, default=0, help="memory for coded weights of models on GPUs")
    parser.add_argument("--device", action="append", default=[], help="a GPU to be ready for")
    arguments = parser.parse_args()
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with socket.socket(fileno=arguments.fd) as sock:
        sock.set_inheritable(False)
        loader = Loader(loader_command(arguments.data_dir, arguments.dram_tier))
        try:
            service = preflight(arguments.data_dir, arguments.keep_bytes, loader)
        except DormouseError as error:
            sock.send(messages.encode(messages.refused(0, error)))
            return
        sock.send(messages.encode(messages.Stopped(call=0)))
        warm(loader, arguments.device)
        serve(sock, service)
    # Calls may still be running in pool threads; nobody waits for their answers, and every cell ends with this process.
    os._exit(0)


if __name__ == "__main__":
    main()
