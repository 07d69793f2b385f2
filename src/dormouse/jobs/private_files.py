"""The files of a cell's own tmpfs: into a snapshot and out again, as a tar archive beside CRIU's images.

CRIU, run inside the cell, sees these folders as outside the tree and only notes paths; so what is in them travels
here. The system's `tar` does it inside the cell, as it keeps sparse files, owners, links and extended attributes.

    capture   tar --create in the cell -> pipe -> chunks -> image      (while the tree is stopped)
    restore   image -> chunks -> pipe -> tar --extract in the new cell (before CRIU runs)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

from dormouse.errors import SnapshotError
from dormouse.jobs.record import FILES_IMAGE
from dormouse.snapshot.cell import Cell
from dormouse.snapshot.images import ImageFile
from dormouse.snapshot.streamer import read_image
from dormouse.store.chunk import Buffer
from dormouse.store.store import Store
from dormouse.transfer.ingest import Ingest
from dormouse.transfer.readahead import ReadAhead

DEFAULT_FOLDERS = ("/dev/shm",)

_TIMEOUT = 600.0
_TAR = ("tar", "--absolute-names", "--numeric-owner", "--sparse", "--xattrs", "--warning=no-file-ignored")


def pack_files(cell: Cell, folders: Sequence[str], ingest: Ingest) -> ImageFile:
    """The contents of `folders` of the cell as an image. Raises SnapshotError."""
    reading, writing = os.pipe()
    try:
        tar = cell.spawn([*_TAR, "--create", "--file=-", *folders], env={"PATH": os.defpath}, fds={1: writing})
    finally:
        os.close(writing)
    try:
        image = read_image(FILES_IMAGE, reading, ingest)
    finally:
        os.close(reading)
    _expect_success(cell, tar.pid, f"pack the files in {', '.join(folders)}")
    return image


def unpack_files(cell: Cell, image: ImageFile, store: Store) -> None:
    """Put the files of `image` where they were, in a cell whose folders are empty. Raises SnapshotError, StoreError."""
    reading, writing = os.pipe()
    try:
        tar = cell.spawn(
            [*_TAR, "--extract", "--same-permissions", "--file=-"], env={"PATH": os.defpath}, fds={0: reading}
        )
    finally:
        os.close(reading)
    try:
        _each_part(image, store, lambda part: _write_all(writing, part))
    except BrokenPipeError:
        pass  # tar gave up, and its exit code says so below
    finally:
        os.close(writing)
    _expect_success(cell, tar.pid, "unpack the snapshot's files")


def _each_part(image: ImageFile, store: Store, take: Callable[[Buffer], None]) -> None:
    if image.inline is not None:
        take(image.inline)
        return
    with ReadAhead(store) as chunks, contextlib.closing(chunks.stream(image.chunk_list())) as parts:
        for part in parts:
            take(part)


def _write_all(pipe: int, data: Buffer) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(pipe, rest) :]


def _expect_success(cell: Cell, pid: int, what: str) -> None:
    code = cell.wait(pid, _TIMEOUT)
    if code != 0:
        raise SnapshotError(
            f"tar could not {what}: it {'did not end in time' if code is None else f'ended with status {code}'}",
            remedy="See that `tar` is installed and that the tmpfs has room (its files take memory)",
        )
