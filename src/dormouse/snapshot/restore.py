"""Restore: a committed snapshot becomes a running worker in a new cell.

Three things at once: the kernel reads ahead the files the worker will touch (prefetch.py), pool threads read, verify
and decode chunks (ReadAhead), and CRIU in the new cell rebuilds the process from the pipes (RestoreStream). On any
error the cell is killed and nothing is left.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dormouse.errors import DormouseError, IncompatibleError, SnapshotError, StoreError
from dormouse.phases import Phases
from dormouse.snapshot.capture import CellWorker, failure_of
from dormouse.snapshot.cell import Cell
from dormouse.snapshot.compatibility import first_mismatch
from dormouse.snapshot.criu import restore_command
from dormouse.snapshot.criu_setup import Criu
from dormouse.snapshot.images import SnapshotBody, decode_body
from dormouse.snapshot.prefetch import prefetch
from dormouse.snapshot.streamer import RestoreStream
from dormouse.store.store import Store
from dormouse.transfer.readahead import ReadAhead

log = logging.getLogger(__name__)

_CRIU_CONTROL_FD = 100
"""The control socket's number in the criu process: clear of the low numbers criu opens for itself."""


@dataclass(frozen=True)
class Restored:
    """A worker that runs again. `control` is the node's end of its control socket."""

    worker: CellWorker
    control: socket.socket
    phases: dict[str, float]


def restore(
    snapshot_id: str,
    store: Store,
    criu: Criu,
    *,
    key: dict[str, str],
    take_cell: Callable[[], Cell],
    timeout: float,
) -> Restored:
    """Restore a snapshot on this host, whose compatibility key for the model is `key`, in a cell of its own.

    Raises NotFoundError, IncompatibleError (names the field), DamagedError, SnapshotError.
    """
    phases = Phases()
    with phases.time("manifest"):
        body = decode_body(store.manifest(snapshot_id).body, snapshot_id)
        mismatch = first_mismatch(body.key, key)
        if mismatch is not None:
            raise IncompatibleError(
                f"snapshot {snapshot_id} of {body.model} does not fit this host: {mismatch}",
                remedy="The model starts cold and is captured anew",
            )
    with phases.time("cell"):
        cell = take_cell()
    try:
        worker, control = _run_criu(cell, body, store, criu, phases, timeout)
    except BaseException:
        cell.close()
        raise
    return Restored(worker, control, dict(phases))


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


def _run_criu(
    cell: Cell, body: SnapshotBody, store: Store, criu: Criu, phases: Phases, timeout: float
) -> tuple[CellWorker, socket.socket]:
    with tempfile.TemporaryDirectory(prefix="dormouse-") as folder, ReadAhead(store) as chunks:
        directory = Path(folder)
        command = restore_command(criu, directory, control_fd=_CRIU_CONTROL_FD, control_inode=body.control_inode)
        with RestoreStream(directory, body.images, chunks) as stream:
            threading.Thread(target=_read_ahead, args=(stream, body), name="prefetch", daemon=True).start()
            begin = time.perf_counter()
            process = cell.spawn(command, env={"PATH": os.defpath}, control=_CRIU_CONTROL_FD)
            assert process.control is not None and process.inode is not None
            try:
                code = cell.wait(process.pid, timeout)
                if stream.error is not None:
                    raise stream.error
                if code is None:
                    raise SnapshotError(f"criu restore did not end within {timeout:.0f} s")
                if code != 0:
                    why = failure_of(code, directory / "restore.log")
                    raise SnapshotError(f"criu could not restore the worker: {why}")
            except BaseException:
                process.control.close()
                cell.close()  # before the stream: its threads may wait for a CRIU that does not take what they write
                raise
            phases["criu start"] = stream.connected_at - begin
            phases["criu images"] = stream.last_image_at - stream.connected_at
            phases["criu finish"] = time.perf_counter() - stream.last_image_at
            return CellWorker(cell, body.pid, process.inode), process.control


def _read_ahead(stream: RestoreStream, body: SnapshotBody) -> None:
    """Not before CRIU runs: until then its own program must come from the same disk, and nothing works without it."""
    stream.connected.wait()
    prefetch(body.mapped)
