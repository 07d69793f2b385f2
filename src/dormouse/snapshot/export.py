"""Export: a snapshot becomes a folder of ordinary CRIU images, which plain `criu restore` takes and `crit` reads.

    windows --> page map + pages, written anew (zero pages stay out of the page map; CRIU leaves them unmapped then)
    all other images --> as CRIU wrote them

One image after another, part after part, so memory stays bounded whatever the size. `inventory.img` comes last: a
folder without it is no dump for CRIU, should this process be killed in between. Any error removes what was written.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dormouse.errors import ConfigError, DamagedError
from dormouse.snapshot.criu_images import PAGE
from dormouse.snapshot.images import ImageFile, SnapshotBody, decode_body
from dormouse.snapshot.memory_restore import MemoryPlan, page_parts, pagemap_parts
from dormouse.snapshot.streamer import image_parts
from dormouse.snapshot.tree import External
from dormouse.store.chunk import Buffer
from dormouse.store.files import create_file, sync_folder, system_errors, write_all
from dormouse.store.store import Store
from dormouse.transfer.readahead import ReadAhead

INVENTORY = "inventory.img"

Progress = Callable[[int, int], None]
_FIRST_DESCRIPTOR = 3


@dataclass(frozen=True)
class Exported:
    """A written folder. `pid` is the root's, which must be free where it is restored; `externals` are the descriptors
    that whoever restores it must provide."""

    folder: Path
    images: int
    size: int
    pid: int
    externals: tuple[External, ...]

    def command(self, criu: Sequence[str] = ("criu",)) -> str:
        """The shell command that restores it; `criu` is how CRIU is called."""
        ties = [f"fd[{_FIRST_DESCRIPTOR + i}]:{tie.kind}:[{tie.inode}]" for i, tie in enumerate(self.externals)]
        words = [*criu, "restore", "--images-dir", str(self.folder.absolute()), "--restore-detached"]
        words += ["--manage-cgroups=ignore", *(word for tie in ties for word in ("--inherit-fd", tie))]
        return shlex.join(words)


def export(snapshot_id: str, store: Store, folder: Path, *, progress: Progress = lambda _done, _all: None) -> Exported:
    """Write the images of a snapshot into `folder`, which must be missing or empty. `progress` gets bytes.

    Raises ConfigError for such a folder, NotFoundError, DamagedError, DiskFullError, StoreError; nothing is left then.
    """
    body = decode_body(store.manifest(snapshot_id).body, snapshot_id)
    with ReadAhead(store) as chunks, _Folder(folder) as target:
        total = sum(image.size for image in body.images) + sum(s.used_pages() * PAGE for s in body.memory)
        done = 0
        for name, size, parts in _files(body, chunks):
            for written in target.write(name, size, parts):
                done += written
                progress(done, total)
        target.commit()
    return Exported(folder, target.files, done, body.pid, tuple(body.externals))


def _files(body: SnapshotBody, chunks: ReadAhead) -> Iterator[tuple[str, int | None, Iterator[Buffer]]]:
    """The (name, size if known, parts) of each file, the inventory last."""
    for space in body.memory:
        plan = MemoryPlan(space, piped=space.windows, filled=[])
        yield space.pagemap_name, None, pagemap_parts(plan)
        yield space.pages_name, space.used_pages() * PAGE, page_parts(plan, chunks)

    def is_inventory(image: ImageFile) -> bool:
        return image.name == INVENTORY

    for image in sorted(body.images, key=is_inventory):
        yield image.name, image.size, image_parts(image, chunks)


class _Folder:
    """A private folder of new files that is gone again unless `commit` is reached."""

    def __init__(self, path: Path) -> None:
        self.files = 0
        self._path = path
        self._written: list[Path] = []
        self._made = False
        self._committed = False

    def __enter__(self) -> _Folder:
        with system_errors(self._path, "creating the folder"):
            try:
                self._path.mkdir(mode=0o700)
                self._made = True
            except FileExistsError:
                _refuse_unless_empty(self._path)
                self._path.chmod(0o700)
            except FileNotFoundError:
                raise ConfigError(
                    f"there is no folder {self._path.parent} to make {self._path.name} in", remedy="Create it first"
                ) from None
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._committed:
            return
        with system_errors(self._path, "removing what was written to"):
            for path in self._written:
                path.unlink(missing_ok=True)
            if self._made:
                self._path.rmdir()

    def write(self, name: str, size: int | None, parts: Iterator[Buffer]) -> Iterator[int]:
        """Write a file, yielding the bytes of each part. Raises DamagedError when they are not `size` in all."""
        path = self._path / name
        length = 0
        with system_errors(path, "exporting"):
            fd = create_file(path)
            self._written.append(path)
            try:
                for part in parts:
                    write_all(fd, part, length)
                    length += len(part)
                    yield len(part)
                os.fsync(fd)
            finally:
                os.close(fd)
        self.files += 1
        if size is not None and length != size:
            raise DamagedError(
                f"the stored image {name} has {length} bytes instead of {size}",
                remedy="Remove the snapshot with `dormouse rm`",
            )

    def commit(self) -> None:
        """Keep the folder."""
        with system_errors(self._path, "exporting"):
            sync_folder(self._path)
        self._committed = True


def _refuse_unless_empty(path: Path) -> None:
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder", remedy="Name a folder that does not exist yet")
    if next(path.iterdir(), None) is not None:
        raise ConfigError(f"the folder {path} is not empty", remedy="Name an empty folder or one that does not exist")
