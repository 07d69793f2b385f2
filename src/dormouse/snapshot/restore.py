"""Restore: a committed snapshot becomes a running process tree in a new home (a cell).

Three things at once: the kernel reads ahead the files the processes will touch (prefetch.py) and the chunks that will
be filled in; pool threads read, verify and decode what goes through CRIU's pipes (RestoreStream); and CRIU rebuilds
the processes. It leaves them stopped; the rest of their memory is then written straight into them (memory_restore.py),
and once the files they have mapped have been found unchanged, they run. Where there is CUDA state, the driver brings it
back before: of such a process only the driver's own thread runs until then (held_threads.py). On any error the home is
closed and nothing is left.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dormouse.errors import DormouseError, HostError, IncompatibleError, SnapshotError, StoreError
from dormouse.phases import Phases, host_clock
from dormouse.snapshot.capture import failure_of
from dormouse.snapshot.compatibility import first_mismatch, gpu_key
from dormouse.snapshot.criu import failures, restore_command
from dormouse.snapshot.criu_images import Task, parse_mappings, parse_tree, was_stopped, with_huge_pages
from dormouse.snapshot.criu_setup import Criu
from dormouse.snapshot.cuda_checkpoint import CUDA, Cuda, CudaState, CudaTree, gpu_pairs, restore_threads
from dormouse.snapshot.cuda_checkpoint import gpus as gpus_here
from dormouse.snapshot.hand_fill import make_fill
from dormouse.snapshot.hands import NO_HANDS, Hands
from dormouse.snapshot.held_threads import held_threads
from dormouse.snapshot.images import SnapshotBody, decode_body
from dormouse.snapshot.mapped_files import DigestCache, first_changed_file
from dormouse.snapshot.memory_restore import Fill, fill_plan, page_parts, pagemap_parts
from dormouse.snapshot.prefetch import prefetch
from dormouse.snapshot.shortage import REMEDY, tells_of_shortage
from dormouse.snapshot.streamer import Parts, RestoreStream, image_parts
from dormouse.snapshot.tree import Home, ProcessTree, continue_tree
from dormouse.snapshot.work_folder import work_folder
from dormouse.store.store import Store
from dormouse.transfer.memory import huge_pages_on_request
from dormouse.transfer.readahead import ReadAhead

log = logging.getLogger(__name__)

_LOG = "restore.log"
_GHOSTS = "ghosts.lock"
_FIRST_INHERITED_FD = 100
"""The inherited descriptors' numbers in the criu process: clear of the low numbers criu opens for itself."""


@dataclass(frozen=True)
class Restored:
    """A tree that runs again. `control` is the outer end of its control socket, when one was asked for."""

    tree: ProcessTree
    control: socket.socket | None
    phases: Phases


def restore(
    snapshot_id: str,
    store: Store,
    criu: Criu,
    *,
    key: dict[str, str],
    take_home: Callable[[], Home],
    timeout: float,
    digests: DigestCache,
    folders: Path,
    inherit: Sequence[int | None] = (None,),
    criu_options: Sequence[str] = (),
    fill: bool = True,
    gpus: Sequence[str] = (),
    cuda: Cuda = CUDA,
    hands: Hands = NO_HANDS,
) -> Restored:
    """Restore a snapshot on this host, whose compatibility key is `key`, in a home of its own.

    `inherit[i]` is the descriptor that takes the place of the snapshot's external i; None: a fresh control socket (one
    at most). In `folders` CRIU gets a folder to work in, which the home must see. With `fill` false every page goes
    through CRIU's pipe. `gpus` are the UUIDs of those that take the place of the GPUs it used, in their order; left
    out: the same ones, else the first there are. `hands` fill the memory, without any threads do.

    Raises NotFoundError, IncompatibleError (names the field), DamagedError, SnapshotError; HostError when it is not the
    snapshot's fault: this host is out of something, or somebody has killed what was at work.
    """
    phases = Phases()
    with phases.time("manifest"):
        body = decode_body(store.manifest(snapshot_id).body, snapshot_id)
        mismatch = first_mismatch(body.key, key | gpu_key() if body.cuda is not None else key)
        if mismatch is not None:
            raise _incompatible(snapshot_id, body, str(mismatch))
        if len(inherit) != len(body.externals):
            raise SnapshotError(
                f"snapshot {snapshot_id} has {len(body.externals)} ties to the outside, {len(inherit)} were given"
            )
        waking = _CudaWaking.plan(snapshot_id, body, gpus, cuda)
    with phases.time("cell"):
        home = take_home()
    try:
        with ReadAhead(store) as chunks:
            images = _Images(body, chunks)
            with phases.time("plan"):
                work = _Work(images, chunks, fill, hands)
            command = _Command(criu, inherit, criu_options, timeout, folders)
            with work.fill, ThreadPoolExecutor(2, thread_name_prefix="beside") as beside:
                if waking is not None:
                    beside.submit(cuda.driver)  # takes a while the first time; what it raises comes up when it is used
                compared = beside.submit(first_changed_file, [file for file in body.mapped if file.digest], digests)
                pid, control = _run_criu(home, body, work, command, phases)
                try:
                    with phases.time("fill", track="fill", bytes=work.fill.plain_bytes, stored=work.fill.stored_bytes):
                        work.fill_in(home)
                    if work.fill.begun is not None:
                        phases.add(
                            *("fill ahead", work.fill.begun, work.fill.run_at),
                            track="fill",
                            bytes=work.fill.ahead_bytes,
                        )
                    with phases.time("mapped files"):
                        changed = compared.result()
                    if changed is not None:
                        raise _incompatible(snapshot_id, body, changed)
                    if waking is not None:
                        waking.wake(home, phases, let_run=lambda: work.let_run(home))
                    else:
                        work.let_run(home)
                except BaseException:
                    if control is not None:
                        control[0].close()
                    raise
    except BaseException:
        home.close()
        raise
    externals = list(body.externals)
    if control is not None:
        externals[inherit.index(None)] = type(externals[0])("socket", control[1])
    tree = ProcessTree(home, pid, tuple(externals), snapshot_id)
    return Restored(tree, control[0] if control is not None else None, phases)


@dataclass(frozen=True)
class _CudaWaking:
    """How the CUDA state of a snapshot comes back: `gpus` maps old UUIDs to new ones where they differ."""

    state: CudaState
    gpus: Mapping[str, str]
    cuda: Cuda

    @classmethod
    def plan(cls, snapshot_id: str, body: SnapshotBody, wanted: Sequence[str], cuda: Cuda) -> _CudaWaking | None:
        """None when there is none. Raises IncompatibleError."""
        if body.cuda is None:
            return None
        try:
            return cls(body.cuda, gpu_pairs(body.cuda, [gpu.uuid for gpu in gpus_here()], wanted), cuda)
        except IncompatibleError as error:
            raise _incompatible(snapshot_id, body, error.message) from error

    def wake(self, home: Home, phases: Phases, *, let_run: Callable[[], None]) -> None:
        """Bring it back into the stopped tree, then let the tree run. Raises SnapshotError, HostError."""
        runners = restore_threads(self.state, home.outer_pid)
        tree = CudaTree(runners, self.cuda.driver(), home.close, self.cuda.limits)
        # The home is this restore's own: it dies with us, and what is half awake must die before it can run.
        with held_threads(runners, timeout=self.cuda.limits.call, die_with_us=True):
            try:
                for pid in runners:
                    os.kill(pid, signal.SIGCONT)
                tree.resume(phases, self.gpus)
                let_run()
            except BaseException:
                home.close()  # while they are held: none may run on half a state
                raise


def note_damage(store: Store, snapshot_id: str) -> None:
    """Check every chunk of a snapshot of which one was damaged; one seldom comes alone. What a read finds damaged is
    remembered by the store, and the next capture stores it afresh instead of sharing it."""
    try:
        references = set(store.manifest(snapshot_id).refs)
    except DormouseError as error:
        log.warning("the chunks of snapshot %s can't be checked: %s", snapshot_id, error)
        return
    damaged = 0
    with store.reader() as reader:
        for digest in references:
            try:
                reader.stored(reader.locate([digest])[0])
            except StoreError:
                damaged += 1
    log.warning("snapshot %s: %d of its %d chunks are damaged", snapshot_id, damaged, len(references))


def _incompatible(snapshot_id: str, body: SnapshotBody, why: str) -> IncompatibleError:
    return IncompatibleError(
        f"snapshot {snapshot_id} of {body.name} does not fit this host: {why}",
        remedy="A model starts cold and is captured anew; a process must be captured again",
    )


class _Images:
    """The images of a snapshot."""

    def __init__(self, body: SnapshotBody, chunks: ReadAhead) -> None:
        self.body = body
        self._chunks = chunks

    def whole(self, name: str) -> bytes:
        """All of it. Raises SnapshotError when there is none."""
        image = self.body.image(name)
        if image is None:
            raise SnapshotError(f"the snapshot has no image {name}")
        return b"".join(image_parts(image, self._chunks))


class _Work:
    """What is to be done beside and after CRIU: the images it is served, and the memory that is filled in later."""

    def __init__(self, images: _Images, chunks: ReadAhead, fill: bool, hands: Hands) -> None:
        body = images.body
        self._tasks = parse_tree(images.whole("pstree.img"), "pstree.img")
        names = {space.pid: f"mm-{space.pid}.img" for space in body.memory} if fill else {}
        mappings = {pid: parse_mappings(images.whole(name), name) for pid, name in names.items()}
        cuda = [] if body.cuda is None else [process.pid for process in body.cuda.processes]
        plans = fill_plan(body.memory, mappings, self._tasks, cuda)
        self.fill: Fill = make_fill(plans, chunks.reader, hands)
        self.served: dict[str, Parts] = {image.name: partial(image_parts, image, chunks) for image in body.images}
        for plan in plans:
            self.served[plan.space.pagemap_name] = partial(pagemap_parts, plan)
            self.served[plan.space.pages_name] = partial(page_parts, plan, chunks)
            if plan.huge and huge_pages_on_request():
                name = f"mm-{plan.space.pid}.img"
                self.served[name] = partial(iter, (with_huge_pages(images.whole(name), plan.huge, name),))
        self._stopped_before = [task.pid for task in self._tasks if _was_stopped(images, task)]

    def fill_in(self, home: Home) -> None:
        """Write what is missing into the stopped processes. They can't end by themselves."""
        try:
            self.fill.run({pid: home.outer_pid(pid) for pid in self.fill.pids})
        except SnapshotError as error:
            if all(_is_there(home, pid) for pid in self.fill.pids):
                raise
            raise HostError(f"the restored process was killed before it ran: {error.message}", remedy=REMEDY) from error

    def let_run(self, home: Home) -> None:
        """End the stop that CRIU has left the processes in, but not that in which some were captured."""
        continue_tree(home, but=[home.outer_pid(pid) for pid in self._stopped_before])


def _is_there(home: Home, pid: int) -> bool:
    try:
        home.outer_pid(pid)
    except SnapshotError:
        return False
    return True


def _was_stopped(images: _Images, task: Task) -> bool:
    name = f"core-{task.pid}.img"
    return images.body.image(name) is not None and was_stopped(images.whole(name), name)


@dataclass(frozen=True)
class _Command:
    criu: Criu
    inherit: Sequence[int | None]
    options: Sequence[str]
    timeout: float
    folders: Path


def _run_criu(
    home: Home, body: SnapshotBody, work: _Work, how: _Command, phases: Phases
) -> tuple[int, tuple[socket.socket, int] | None]:
    """The root's pid in its home, and the fresh control socket with the inode of its inner end."""
    numbers = [_FIRST_INHERITED_FD + i for i in range(len(how.inherit))]
    fds = {number: fd for number, fd in zip(numbers, how.inherit, strict=True) if fd is not None}
    control_number = next((n for n, fd in zip(numbers, how.inherit, strict=True) if fd is None), None)
    with work_folder(how.folders) as directory:
        command = restore_command(
            how.criu,
            inherited=dict(zip(numbers, body.externals, strict=True)),
            options=how.options,
        )
        with _ghosts_alone(body, how.folders), RestoreStream(directory, work.served) as stream:
            threading.Thread(target=_read_ahead, args=(stream, body, work.fill), name="prefetch", daemon=True).start()
            begin = host_clock()
            with _host_must("start criu"):
                process = home.spawn(
                    command, env={"PATH": os.defpath}, fds=fds, control=control_number, cwd=str(directory)
                )
            try:
                with _host_must("run criu"):
                    code = home.wait(process.pid, how.timeout)
                if code == -signal.SIGKILL:  # first: what went wrong on our side, too, follows from that
                    raise HostError(_why(code, directory), remedy=REMEDY)
                if stream.error is not None:
                    raise stream.error
                if code is None:
                    raise SnapshotError(f"criu restore did not end within {how.timeout:.0f} s")
                if code != 0:
                    raise _criu_failed(code, directory)
            except BaseException:
                if process.control is not None:
                    process.control.close()
                home.close()  # before the stream: its threads may wait for a CRIU that does not take what they write
                raise
            phases.add("criu start", begin, stream.connected_at, track="criu")
            phases.add("criu images", stream.connected_at, stream.last_image_at, track="criu", bytes=stream.given_bytes)
            phases.add("criu finish", stream.last_image_at, host_clock(), track="criu")
    if process.control is None:
        return body.pid, None
    assert process.inode is not None
    return body.pid, (process.control, process.inode)


@contextlib.contextmanager
def _ghosts_alone(body: SnapshotBody, folders: Path) -> Iterator[None]:
    """One restore at a time where deleted files come back that a process has open or mapped: CRIU makes each for a
    moment, under a name that follows from its old path, so two at once would take each other's files away. Whoever
    waits here waits no longer than the other's deadline."""
    if not any(image.name.startswith("ghost-file") for image in body.images):
        yield
        return
    fd = os.open(folders / _GHOSTS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _host_must(do: str) -> Iterator[None]:
    """What a home can't do is never the fault of what is restored in it."""
    try:
        yield
    except SnapshotError as error:
        raise HostError(f"this host could not {do}: {error.message}", remedy=error.remedy) from error


def _criu_failed(code: int, directory: Path) -> DormouseError:
    log = directory / _LOG
    if code > 0 and log.exists() and tells_of_shortage(failures(log.read_text(errors="replace"))):
        return HostError(_why(code, directory), remedy=REMEDY)
    return SnapshotError(_why(code, directory))


def _why(code: int, directory: Path) -> str:
    return f"criu could not restore the process: {failure_of(code, directory / _LOG)}"


def _read_ahead(stream: RestoreStream, body: SnapshotBody, fill: Fill) -> None:
    """Not before CRIU runs: until then its own program must come from the same disk, and nothing works without it."""
    stream.connected.wait()
    fill.begin()
    prefetch(body.mapped)
