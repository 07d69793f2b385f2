"""One running copy of a job, from its start or restore to its capture or end.

    start(spec) or restore(snapshot)  ->  Replica (home, root process, our pipe ends)  ->  capture()  ->  snapshot

A capture goes: look for what CRIU would refuse (survey.py), ask the program's hooks, dump, take its tmpfs and unread
input along, commit. Whatever fails, the job runs on, and hooks that were called hear of it. All calls block.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import msgspec

from dormouse.data_dir import DataDir
from dormouse.errors import IncompatibleError, SnapshotError
from dormouse.jobs.explain import explained
from dormouse.jobs.hook_calls import Hooks
from dormouse.jobs.private_files import pack_files, unpack_files
from dormouse.jobs.record import FILES_IMAGE, Connections, JobRecord, encode_record, record_of
from dormouse.jobs.streams import Input, Pipes, inode_of, inode_of_path, standard_streams, unread
from dormouse.jobs.survey import Survey, refusal, survey
from dormouse.phases import Phases
from dormouse.snapshot.capture import PROCESS_KIND, CaptureResult, capture, run_on
from dormouse.snapshot.cell import Cell, worker_pid_floor
from dormouse.snapshot.compatibility import system_key
from dormouse.snapshot.criu_setup import Criu, find_criu
from dormouse.snapshot.cuda_checkpoint import CUDA, Cuda
from dormouse.snapshot.hands import NO_HANDS, Hands
from dormouse.snapshot.images import ImageFile, SnapshotBody, decode_body
from dormouse.snapshot.mapped_files import CACHE_NAME, DigestCache
from dormouse.snapshot.restore import restore
from dormouse.snapshot.tree import External, Home, ProcessTree, stopped_processes
from dormouse.snapshot.work_folder import criu_folders
from dormouse.store.store import Store
from dormouse.transfer.ingest import Ingest

log = logging.getLogger(__name__)

# File locks: a database holds some even when idle. Deleted files go into the snapshot up to this size.
_ALWAYS = ("--file-locks", "--ghost-limit", "2G")
_CONNECTIONS: Mapping[Connections, tuple[str, ...]] = {
    "none": (),
    # Both ends are stopped together and nobody else is in their network: no packet comes that would need to be held.
    "kept": ("--tcp-established", "--network-lock", "skip"),
    "closed": ("--tcp-close", "--skip-in-flight"),
}


class JobHome(Home, Protocol):
    """A home in whose network we can make sockets. `insider` is the pid of a process in its namespaces."""

    def insider(self) -> int: ...

    def inner_socket(self, family: int, kind: int = ..., protocol: int = ...) -> socket.socket: ...


@dataclass(frozen=True)
class CaptureOptions:
    """How a capture is to go. `still_wanted` is asked last before the commit."""

    leave_running: bool = False
    close_connections: bool = False
    hook_timeout: float = 30.0
    still_wanted: Callable[[], bool] = lambda: True


@dataclass
class Replica:
    """`number` counts from 1. `pipes` are our ends of the standard streams, `feed` what writes to its input,
    `restored` the steps of its restore."""

    number: int
    home: JobHome
    pid: int
    record: JobRecord
    externals: tuple[External, ...]
    pipes: Pipes = field(default_factory=lambda: Pipes({}, {}))
    feed: Input | None = None
    snapshot_id: str | None = None
    restored: Phases | None = None

    @property
    def tree(self) -> ProcessTree:
        """What capture works on."""
        return ProcessTree(self.home, self.pid, self.externals, self.snapshot_id)

    def hooks(self, timeout: float) -> Hooks:
        """The hooks of its processes."""
        return Hooks(self.home.processes(), self.home.inner_socket, timeout)


def job_key(criu: Criu) -> dict[str, str]:
    """What must fit for a job's snapshot to be restored here."""
    return system_key(gpu=False) | {"criu": criu.version_text}


def start(record: JobRecord, argv: Sequence[str], environment: dict[str, str], cwd: Path) -> Replica:
    """Start a job's program in a new cell; the record has `argv` in a form that can be shown. Raises
    SnapshotError, HostError."""
    cell = Cell.create(host_network=record.network == "host", tmpfs=record.tmpfs)
    pipes = Pipes.make()
    try:
        inodes = {stream: inode_of(descriptor) for stream, descriptor in pipes.theirs.items()}
        spawned = cell.spawn(
            argv,
            env=environment,
            fds={0: pipes.theirs["stdin"], 1: pipes.theirs["stdout"], 2: pipes.theirs["stderr"]},
            pid_floor=worker_pid_floor(),
            cwd=str(cwd),
            io_uring=False,
        )
    except BaseException:
        pipes.close()
        cell.close()
        raise
    pipes.hand_over()
    grouped = standard_streams(inodes)
    record = msgspec.structs.replace(record, streams=[streams for _inode, streams in grouped])
    return Replica(1, cell, spawned.pid, record, tuple(External("pipe", inode) for inode, _streams in grouped), pipes)


@dataclass(frozen=True)
class Tools:
    """What captures and restores work with. `folders` is where CRIU's working folders are made, `timeout` is CRIU's. A
    context manager: at its end the hands end."""

    criu: Criu
    digests: DigestCache
    folders: Path
    timeout: float
    cuda: Cuda = CUDA
    hands: Hands = NO_HANDS

    def __enter__(self) -> Self:
        """Hands begin to start beside all that comes before they are needed."""
        self.hands.warm()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.hands.close()

    @classmethod
    def find(cls, data_dir: DataDir, timeout: float) -> Tools:
        """Those of a data folder. Raises HostError."""
        return cls(
            *(find_criu(data_dir.root), DigestCache(data_dir.root / CACHE_NAME), criu_folders(data_dir.run), timeout),
            hands=Hands.of_this_machine(),
        )


class Cells:
    """The cells of a restore under way, so that it can be given up: whatever works in them then fails."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cells: list[Cell] = []
        self._given_up = False

    def add(self, cell: Cell) -> None:
        """Raises SnapshotError when the restore has been given up."""
        with self._lock:
            if self._given_up:
                raise SnapshotError("the restore was given up")
            self._cells.append(cell)

    def give_up(self) -> None:
        """End them all, and let none be added."""
        with self._lock:
            self._given_up = True
            cells = list(self._cells)
        for cell in cells:
            cell.close()


@dataclass(frozen=True)
class StoredJob:
    """A snapshot of a job, ready to be restored as often as you like."""

    snapshot_id: str
    body: SnapshotBody
    record: JobRecord

    @classmethod
    def read(cls, snapshot_id: str, store: Store) -> StoredJob:
        """Raises NotFoundError, DamagedError, SnapshotError when it is none of a job."""
        manifest = store.manifest(snapshot_id)
        if manifest.kind != PROCESS_KIND:
            raise SnapshotError(
                f"snapshot {snapshot_id} is one of a model", remedy="`dormouse serve` restores it when it is needed"
            )
        body = decode_body(manifest.body, snapshot_id)
        return cls(snapshot_id, body, record_of(body, snapshot_id))

    def restore(
        self, number: int, record: JobRecord, store: Store, tools: Tools, cells: Cells, gpus: Sequence[str] = ()
    ) -> Replica:
        """One replica in a cell of its own, which `cells` gets to know; `record` may differ from the stored one in
        network and ports. `gpus` as for `dormouse.snapshot.restore`."""
        pipes = Pipes.make()
        inherit = [pipes.theirs[streams[0]] for streams in record.streams]
        inodes = [inode_of(descriptor) for descriptor in inherit]
        options = [*_ALWAYS[:1], *restore_options(record)]
        # Of images that were imported it is not known which CRIU made them.
        ours, theirs = job_key(tools.criu), self.body.key
        key = {field: value for field, value in ours.items() if field != "criu" or field in theirs}
        try:
            restored = restore(
                self.snapshot_id,
                store,
                tools.criu,
                key=key,
                take_home=lambda: self._cell(record, store, cells),
                timeout=tools.timeout,
                digests=tools.digests,
                folders=tools.folders,
                inherit=inherit,
                criu_options=options,
                gpus=gpus,
                cuda=tools.cuda,
                hands=tools.hands,
            )
        except IncompatibleError as error:
            pipes.close()
            raise IncompatibleError(
                error.message, remedy="Restore it on a machine like the one it was captured on"
            ) from error
        except SnapshotError as error:
            pipes.close()
            raise explained(error) from error
        except BaseException:
            pipes.close()
            raise
        pipes.hand_over()
        home = restored.tree.home
        assert isinstance(home, Cell)
        externals = tuple(External("pipe", inode) for inode in inodes)
        return Replica(
            *(number, home, restored.tree.pid, record, externals, pipes),
            snapshot_id=self.snapshot_id,
            restored=restored.phases,
        )

    def _cell(self, record: JobRecord, store: Store, cells: Cells) -> Cell:
        cell = Cell.create(host_network=record.network == "host", tmpfs=record.tmpfs)
        try:
            cells.add(cell)
            for image in self.body.images:
                if image.name == FILES_IMAGE:
                    unpack_files(cell, image, store)
        except BaseException:
            cell.close()
            raise
        return cell


def restore_options(record: JobRecord) -> list[str]:
    """What criu must be told at the dump and at the restore alike."""
    return [
        *(["--shell-job"] if record.shell_job else []),
        *_CONNECTIONS[record.connections],
    ]


def capture_replica(replica: Replica, store: Store, tools: Tools, options: CaptureOptions) -> CaptureResult:
    """Capture it. Afterwards its home is closed, or with `leave_running` it goes on. Raises SnapshotError, StoreError;
    it runs on then, unless CRIU itself was killed or hung."""
    found = survey(replica.home.processes(), replica.home.inner_socket, replica.home.insider())
    _refuse_what_cannot_be(found, replica, tools, options)
    record = msgspec.structs.replace(
        replica.record, connections=_connections(found, options), listening=found.listening()
    )
    hooks = replica.hooks(options.hook_timeout)
    stopped_before = stopped_processes(replica.home)
    try:
        hooks.before_capture()
        with replica.feed.paused() if replica.feed is not None else nullcontext():
            result = capture(
                replica.tree,
                store,
                tools.criu,
                kind=PROCESS_KIND,
                name=record.name,
                key=job_key(tools.criu),
                now=time.time,
                still_wanted=options.still_wanted,
                timeout=tools.timeout,
                digests=tools.digests,
                folders=tools.folders,
                criu_options=[*_ALWAYS, *restore_options(record)],
                attach=lambda ingest: attachments(replica, record, ingest),
                cuda=tools.cuda,
                hands=tools.hands,
            )
            if options.leave_running:
                run_on(replica.tree, result, but=stopped_before)
            else:
                if replica.feed is not None:
                    replica.feed.stop()
                replica.home.close()
    except SnapshotError as error:
        _go_on(hooks)
        raise explained(error) from error
    except BaseException:
        _go_on(hooks)
        raise
    if options.leave_running:
        _go_on(hooks)
    return result


def _connections(found: Survey, options: CaptureOptions) -> Connections:
    if options.close_connections:
        return "closed"
    return "kept" if found.open_connections() else "none"


def attachments(replica: Replica, record: JobRecord, ingest: Ingest) -> list[ImageFile]:
    """What the snapshot holds beside CRIU's images, taken while the tree is stopped."""
    pending = b""
    for external, streams in zip(replica.externals, record.streams, strict=True):
        input_of_root = Path(f"/proc/{replica.home.outer_pid(replica.pid)}/fd/0")
        if "stdin" in streams and input_of_root.exists() and inode_of_path(input_of_root) == external.inode:
            pending = unread(str(input_of_root))
    if record.connections == "kept":
        _refuse_late_connections(replica)
    images = [encode_record(msgspec.structs.replace(record, pending_input=pending))]
    if record.tmpfs:
        assert isinstance(replica.home, Cell)
        images.append(pack_files(replica.home, record.tmpfs, ingest))
    return images


def _refuse_what_cannot_be(found: Survey, replica: Replica, tools: Tools, options: CaptureOptions) -> None:
    criu = tools.criu
    known = {external.inode for external in replica.externals}
    using = tools.cuda.find(found.pids)
    refused = refusal(
        found,
        external=known,
        close_connections=options.close_connections,
        own_network=replica.record.network == "own",
        cuda=using,
    )
    if refused is not None:
        raise refused
    if not criu.captures_tcp and found.inodes("socket") & found.tcp.keys():
        raise SnapshotError(
            f"the job has TCP sockets, and CRIU {criu.version_text} can't capture those on kernel {platform.release()}",
            remedy="Run `dormouse setup criu`, which gets CRIU 4.2 or newer",
        )


def _refuse_late_connections(replica: Replica) -> None:
    """One to outside may have come between the survey and the stop, and CRIU was told to take connections."""
    found = survey(replica.home.processes(), replica.home.inner_socket, replica.home.insider())
    for connection in found.open_connections():
        if not found.stays_inside(connection):
            raise SnapshotError(
                f"a TCP connection came during the capture, {connection.local} with {connection.remote}",
                remedy="Try again when it has ended, or capture with --close-connections",
            )


def _go_on(hooks: Hooks) -> None:
    for problem in hooks.go_on():
        log.warning("%s", problem)


def announce_restore(replica: Replica, timeout: float) -> Sequence[str]:
    """Call the after-restore hooks; what went wrong, in words."""
    return replica.hooks(timeout).after_restore()


def environment_of_jobs() -> dict[str, str]:
    """A job sees the environment of the command that starts it."""
    return dict(os.environ)
