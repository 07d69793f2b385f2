"""Capture: a quiesced worker becomes a committed snapshot.

    note mapped files -> criu dump in the cell -> CaptureStream -> Ingest -> pack -> commit

The worker stays stopped from the dump to the commit and is the caller's to kill after it. If anything fails before
the commit is durable, it is continued as if nothing had happened and the transaction leaves no trace. (Only a
CRIU that was killed or hung while at work in it takes the worker along.)
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dormouse.errors import SnapshotError
from dormouse.phases import Phases
from dormouse.snapshot.cell import Cell
from dormouse.snapshot.criu import dump_command, failure_reason
from dormouse.snapshot.criu_setup import Criu
from dormouse.snapshot.images import BODY_VERSION, ImageFile, SnapshotBody, encode_body
from dormouse.snapshot.prefetch import mapped_files
from dormouse.snapshot.streamer import CaptureStream
from dormouse.store.store import Manifest, Store
from dormouse.transfer.ingest import Ingest

SNAPSHOT_KIND = "snapshot"
"""Manifests of workers with a model, by the model's name."""
TEMPLATE_KIND = "template"
"""Manifests of workers that have an engine and no model, by engine and options."""

_INVENTORY = "inventory.img"


@dataclass(frozen=True)
class CellWorker:
    """A worker in its cell: `pid` and `control_inode` as seen inside."""

    cell: Cell
    pid: int
    control_inode: int


@dataclass(frozen=True)
class CaptureResult:
    """A committed snapshot. `raw_bytes` are all images as CRIU wrote them, `stored_bytes` what the packs grew by."""

    snapshot_id: str
    raw_bytes: int
    stored_bytes: int
    phases: dict[str, float]


def new_snapshot_id() -> str:
    """A fresh, unguessable name of 12 characters."""
    return secrets.token_hex(6)


def capture(
    worker: CellWorker,
    store: Store,
    criu: Criu,
    *,
    kind: str,
    model: str,
    key: dict[str, str],
    now: Callable[[], float],
    still_wanted: Callable[[], bool],
    timeout: float,
) -> CaptureResult:
    """Dump and commit; the worker is then stopped and the caller's to kill. `timeout` is CRIU's, in seconds;
    `still_wanted` is asked last before the commit.

    Raises SnapshotError, DiskFullError or StoreError; nothing was stored then, and the worker runs on, unless CRIU
    was killed or hung within it: then its cell is closed, for what CRIU leaves half done can't be trusted.
    """
    phases = Phases()
    snapshot_id = new_snapshot_id()
    host_pid = worker.cell.outer_pid(worker.pid)
    try:
        with store.begin() as transaction:
            with phases.time("dump"), Ingest(transaction) as ingest:
                mapped = mapped_files(host_pid)
                images = _dump(worker, ingest, criu, timeout)
            body = SnapshotBody(
                version=BODY_VERSION,
                model=model,
                key=key,
                pid=worker.pid,
                control_inode=worker.control_inode,
                images=images,
                mapped=mapped,
                phases=dict(phases),
            )
            if not still_wanted():
                raise SnapshotError(f"the capture of {model} was given up")
            with phases.time("commit"):
                transaction.commit(
                    Manifest(
                        id=snapshot_id,
                        kind=kind,
                        name=model,
                        created=now(),
                        body=encode_body(body),
                        refs=body.references(),
                    )
                )
    except BaseException:
        _continue_all(worker.cell)
        raise
    return CaptureResult(snapshot_id, body.raw_bytes(), transaction.stored_bytes, dict(phases))


def _dump(worker: CellWorker, ingest: Ingest, criu: Criu, timeout: float) -> list[ImageFile]:
    with tempfile.TemporaryDirectory(prefix="dormouse-") as folder:
        directory = Path(folder)
        command = dump_command(criu, directory, pid=worker.pid, control_inode=worker.control_inode)
        with CaptureStream(directory, ingest) as stream:
            process = worker.cell.spawn(command, env={"PATH": os.defpath})
            code = worker.cell.wait(process.pid, timeout)
            if code is None or code < 0:
                worker.cell.close()  # also ends a CRIU that hangs
            if code is None:
                raise SnapshotError(f"criu dump did not end within {timeout:.0f} s")
            if stream.error is not None:
                raise stream.error
            if code != 0:
                raise SnapshotError(
                    f"criu could not dump the worker: {failure_of(code, directory / 'dump.log')}",
                    remedy="See `dormouse doctor` for what this machine lacks",
                )
            stream.finish()
            images = stream.images()
            if not any(image.name == _INVENTORY for image in images):
                raise SnapshotError("criu ended well but sent no inventory of its images")
            return images


def failure_of(code: int, log: Path) -> str:
    """Why CRIU ended with a code other than 0 (negative: a signal)."""
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    return failure_reason(log.read_text(errors="replace")) if log.exists() else "it wrote no log"


def _continue_all(cell: Cell) -> None:
    """Let every process of the cell run on, in whatever state the failed dump has left it."""
    for pid in cell.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
