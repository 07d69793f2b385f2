"""Capture: a process tree becomes a committed snapshot.

    CUDA state into memory -> note mapped files -> criu dump where the tree lives -> CaptureStream -> Ingest -> pack
                                                                                                             -> commit

The tree stays stopped, and its GPU state where CRIU can see it, from the dump to the commit; it is the caller's to kill
or to continue (`run_on`) after it. If anything fails before the commit is durable, it is continued as if nothing had
happened and the transaction leaves no trace. (Only a CRIU or a CUDA driver that was killed or hung while at work in it
takes the tree along.)
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dormouse.errors import DamagedError, DormouseError, NotFoundError, SnapshotError
from dormouse.phases import Phases
from dormouse.snapshot.compatibility import gpu_key
from dormouse.snapshot.criu import dump_command, failure_reason
from dormouse.snapshot.criu_images import PAGE
from dormouse.snapshot.criu_setup import Criu
from dormouse.snapshot.cuda_checkpoint import CUDA, Cuda, CudaTree, cuda_state, require_closed
from dormouse.snapshot.hand_capture import HandCapture
from dormouse.snapshot.hands import NO_HANDS, Hands
from dormouse.snapshot.images import (
    BODY_VERSION,
    ImageFile,
    MappedFile,
    SnapshotBody,
    decode_body,
    encode_body,
    raw_bytes,
)
from dormouse.snapshot.mapped_files import DigestCache, fingerprint
from dormouse.snapshot.memory_capture import Elsewhere, ParentMemory, capture_memory
from dormouse.snapshot.memory_map import AddressSpace
from dormouse.snapshot.prefetch import MappedRanges, mapped_ranges, merge
from dormouse.snapshot.streamer import CaptureStream
from dormouse.snapshot.tree import ProcessTree, continue_tree, stopped_processes
from dormouse.snapshot.work_folder import work_folder
from dormouse.store.codec import Codec
from dormouse.store.store import Manifest, Store, Transaction
from dormouse.transfer.ingest import Ingest

SNAPSHOT_KIND = "snapshot"
"""Of a worker with a model, by the model's name."""
TEMPLATE_KIND = "template"
"""Of a worker that has an engine and no model, by engine and options."""
PROCESS_KIND = "process"
"""Of a job: any other process tree."""

_INVENTORY = "inventory.img"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptureResult:
    """A committed snapshot. `raw_bytes` are all images as CRIU wrote them, `stored_bytes` what the packs grew by."""

    snapshot_id: str
    raw_bytes: int
    stored_bytes: int
    phases: Phases
    suspended: CudaTree | None = None
    """What of the tree has its CUDA state in memory, if any."""


def new_snapshot_id() -> str:
    """A fresh, unguessable name of 12 characters."""
    return secrets.token_hex(6)


def capture(
    tree: ProcessTree,
    store: Store,
    criu: Criu,
    *,
    kind: str,
    name: str,
    key: dict[str, str],
    now: Callable[[], float],
    still_wanted: Callable[[], bool],
    timeout: float,
    digests: DigestCache,
    folders: Path,
    like: str | None = None,
    criu_options: Sequence[str] = (),
    attach: Callable[[Ingest], Sequence[ImageFile]] = lambda _ingest: (),
    cuda: Cuda = CUDA,
    hands: Hands = NO_HANDS,
) -> CaptureResult:
    """Dump and commit a tree as a manifest of `kind` and `name`; it is then stopped and the caller's to kill or to
    continue (`run_on`). `timeout` is CRIU's, in seconds; `still_wanted` is asked last before the commit;
    `digests` remembers those of mapped files; in `folders` CRIU gets a folder to work in, which the tree's
    home must see. A tree that was restored from a snapshot shares with it all pages that
    have not changed; another tree shares those that are the same at the same addresses in the snapshot `like`.
    `attach` is called while the tree is stopped and makes further images, which are stored with CRIU's. What was
    stopped before stays so. `hands` read and store the memory, without any threads do.

    Raises SnapshotError, DiskFullError or StoreError; HostError when CUDA can't be reached. Nothing was stored then,
    and the tree runs on, unless CRIU or the CUDA driver was killed or hung within it: then its home is closed, for what
    they leave half done can't be trusted.
    """
    phases = Phases()
    snapshot_id = new_snapshot_id()
    stopped_before = stopped_processes(tree.home)
    using = cuda.find(tree.home.processes())
    state = cuda_state(using, computes_on=tree.gpu) if using else None
    suspended = CudaTree(using, cuda.driver(), tree.home.close, cuda.limits) if using else None
    if suspended is not None:
        key = key | gpu_key()
        suspended.suspend(phases)
    try:
        require_closed(using)
        with store.begin() as transaction:
            files = mapped_ranges(tree.home.processes())
            with (
                ThreadPoolExecutor(1, thread_name_prefix="mapped") as beside,
                phases.time("dump", track="criu") as dumped,
                _parent(store, tree.snapshot_id or like) as parent,
                _elsewhere(hands, transaction, parent, store) as elsewhere,
                Ingest(transaction, threads=hands.count or None, choose=BulkChoice(store.root)) as ingest,
            ):
                noted = beside.submit(note_mapped, files, digests)
                images, memory = _dump(tree, ingest, parent, elsewhere, criu, timeout, criu_options, folders, phases)
                images += attach(ingest)
                dumped.bytes, dumped.stored = raw_bytes(images, memory), transaction.stored_bytes
            with phases.time("mapped files"):
                mapped = noted.result()
            body = SnapshotBody(
                version=BODY_VERSION,
                name=name,
                key=key,
                pid=tree.pid,
                externals=list(tree.externals),
                images=images,
                memory=memory,
                mapped=mapped,
                phases=phases.copy(),
                cuda=state,
            )
            if not still_wanted():
                raise SnapshotError(f"the capture of {name} was given up")
            with phases.time("commit", track="disk", stored=transaction.stored_bytes):
                transaction.commit(
                    Manifest(
                        id=snapshot_id,
                        kind=kind,
                        name=name,
                        created=now(),
                        body=encode_body(body),
                        refs=body.references(),
                    )
                )
    except BaseException as error:
        try:
            continue_tree(tree.home, but=stopped_before)
        finally:  # no lock of the driver's may stay
            lost = suspended.bring_back(phases) if suspended is not None else None
        if lost is not None:
            raise SnapshotError(f"{error}; {lost}", remedy="Start it afresh") from error
        raise
    return CaptureResult(snapshot_id, body.raw_bytes(), transaction.stored_bytes, phases, suspended)


def run_on(tree: ProcessTree, captured: CaptureResult, *, but: Sequence[int] = ()) -> None:
    """Continue a tree that was captured, except for the (host) pids in `but`, as if nothing had happened. Raises
    SnapshotError or HostError when its CUDA state could not be brought back; its home is closed then."""
    continue_tree(tree.home, but=but)
    if captured.suspended is not None:
        try:
            captured.suspended.resume(Phases())
        except BaseException:
            tree.home.close()
            raise


@contextlib.contextmanager
def _parent(store: Store, snapshot_id: str | None) -> Iterator[ParentMemory | None]:
    """The memory of the snapshot to share pages with, if it is still there."""
    if snapshot_id is None:
        yield None
        return
    with store.reader() as reader:
        try:
            parent = ParentMemory(decode_body(store.manifest(snapshot_id).body, snapshot_id), reader)
        except (NotFoundError, DamagedError) as error:
            log.warning("no pages are shared with snapshot %s: %s", snapshot_id, error)
            parent = None
        yield parent


@contextlib.contextmanager
def _elsewhere(
    hands: Hands, transaction: Transaction, parent: ParentMemory | None, store: Store
) -> Iterator[Elsewhere | None]:
    """What has hands store memory, if there are any."""
    if not hands.count:
        yield None
        return
    pays = BulkChoice(store.root, hands.count).pays
    with HandCapture(hands, transaction, parent, key=store.key, packs=store.packs, pays=pays) as crew:
        yield crew


@dataclass(frozen=True)
class BulkChoice:
    """Chooses the codec of large pieces; nothing is imported for it before there is one."""

    folder: Path
    threads: int | None = None
    """So many code at once. None: the threads of this process."""

    def __call__(self, plain: memoryview) -> Codec:
        from dormouse.transfer.bulk_codec import BulkCodec

        return BulkCodec(self.folder, threads=self.threads)(plain)

    def pays(self, stored: float) -> bool:
        """See `BulkCodec.pays`."""
        from dormouse.transfer.bulk_codec import BulkCodec

        return BulkCodec(self.folder, threads=self.threads).pays(stored)


def _dump(
    tree: ProcessTree,
    ingest: Ingest,
    parent: ParentMemory | None,
    elsewhere: Elsewhere | None,
    criu: Criu,
    timeout: float,
    options: Sequence[str],
    folders: Path,
    phases: Phases,
) -> tuple[list[ImageFile], list[AddressSpace]]:
    def take_memory(pid: int, pagemap: int) -> AddressSpace:
        with phases.time("dump.memory", track="memory") as moved:
            space = capture_memory(pid, tree.home.outer_pid(pid), pagemap, ingest, parent, elsewhere)
            moved.bytes = PAGE * space.pages
        return space

    with work_folder(folders) as directory:
        command = dump_command(criu, pid=tree.pid, externals=tree.externals, options=options)
        with CaptureStream(directory, ingest, take_memory) as stream:
            process = tree.home.spawn(command, env={"PATH": os.defpath}, cwd=str(directory))
            code = tree.home.wait(process.pid, timeout)
            if code is None or code < 0:
                tree.home.close()  # also ends a CRIU that hangs
            if code is None:
                raise SnapshotError(f"criu dump did not end within {timeout:.0f} s")
            if stream.error is not None and not _is_consequence(stream.error, code):
                raise stream.error
            if code != 0:
                raise SnapshotError(
                    f"criu could not dump the process: {failure_of(code, directory / 'dump.log')}",
                    remedy="See `dormouse doctor` for what this machine lacks",
                )
            stream.finish()
            images = stream.images()
            if not any(image.name == _INVENTORY for image in images):
                raise SnapshotError("criu ended well but sent no inventory of its images")
            return images, stream.memory()


def _is_consequence(error: DormouseError, code: int) -> bool:
    """Whether an error on our side only follows from CRIU's own end: images break off when it fails, and when it is
    killed the tree it was at work in goes too."""
    return isinstance(error, DamagedError | SnapshotError) if code < 0 else code > 0 and isinstance(error, DamagedError)


def note_mapped(files: Mapping[str, MappedRanges], digests: DigestCache) -> list[MappedFile]:
    """What a restore will want of mapped files, and what it will compare: programs, libraries, data mapped privately.
    Files that are shared with whoever writes to them may change, and those in a mount of the tree's own are not seen
    from here. Raises SnapshotError for one that can't be read."""
    compared = [path for path, file in files.items() if file.private and _inode(path) == file.inode]
    prints = fingerprint(compared, digests)
    noted = []
    for path, file in files.items():
        known = prints.get(path)
        size, mtime_ns, digest = (known.size, known.mtime_ns, known.digest) if known else (0, 0, b"")
        noted.append(
            MappedFile(
                path=path,
                ranges=merge(file.ranges),
                written=merge(file.written),
                size=size,
                mtime_ns=mtime_ns,
                digest=digest,
            )
        )
    return noted


def _inode(path: str) -> int | None:
    try:
        return Path(path).stat().st_ino
    except OSError:
        return None


def failure_of(code: int, log: Path) -> str:
    """Why CRIU ended with a code other than 0 (negative: a signal)."""
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    return failure_reason(log.read_text(errors="replace")) if log.exists() else "it wrote no log"
