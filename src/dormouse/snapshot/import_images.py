"""Import: a folder of ordinary CRIU images (`criu dump` without --stream) becomes a snapshot in the store.

    survey: every file is known and whole --> page maps + mm images --> spans --> pool: read the pages, drop zero ones,
    store --> windows, as a capture makes them;        all else --> image files;        one commit

The folder comes from anywhere, so everything is checked before a byte is stored: no links, no parent images, no pages
that are elsewhere, pages files exactly as long as their page maps say. Files are opened once and read from there.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dormouse.errors import ConfigError, DamagedError, SnapshotError
from dormouse.phases import Phases
from dormouse.snapshot.capture import PROCESS_KIND, CaptureResult, new_snapshot_id
from dormouse.snapshot.criu_images import (
    PAGE,
    PagemapParser,
    Run,
    check_inventory,
    machine_of,
    parse_mappings,
    parse_tree,
)
from dormouse.snapshot.export import INVENTORY
from dormouse.snapshot.images import BODY_VERSION, ImageFile, SnapshotBody, encode_body, is_image_name
from dormouse.snapshot.memory_capture import address_space, process_of
from dormouse.snapshot.memory_map import WINDOW, AddressSpace, Places, Span, Spans
from dormouse.snapshot.streamer import read_image
from dormouse.snapshot.tree import External
from dormouse.snapshot.window_store import Stored, store_spans
from dormouse.store.files import system_errors
from dormouse.store.store import Manifest, Store
from dormouse.transfer.ingest import Ingest, Putter

Progress = Callable[[int, int], None]

_PARSED_LIMIT = 64 << 20
"""The longest image that is read as a whole. (Page maps are read in pieces.)"""
_PIECE = 1 << 16
_WINDOWS_AHEAD = 256
_ORIGIN = "dormouse-import.json"
_IGNORED = re.compile(r"stats-(dump|restore)|.*\.(log|pid)|inventory\.img\.lock")
_OURS = re.compile(r"dormouse-[a-z]+\.(json|tar)")
_WHOLE_DUMP = "Import the folder of one whole `criu dump` (no --track-mem, --prev-images-dir, --lazy-pages or --stream)"


@dataclass(frozen=True)
class _Memory:
    """The private memory of a process, or memory shared between processes (`pid` None), in the folder's files."""

    pid: int | None
    pagemap: str
    pages: str
    sparse: Places


def import_images(
    folder: Path,
    store: Store,
    *,
    name: str,
    key: dict[str, str],
    machine: str,
    externals: Sequence[External],
    now: Callable[[], float],
    attach: Sequence[ImageFile] = (),
    progress: Progress = lambda _done, _all: None,
) -> CaptureResult:
    """Store the images in `folder` as a snapshot of a process tree. `machine` is what they must have been made on,
    `externals` the tree's ties to the outside, in the order in which a restore is given their replacements; `attach`
    are further images to store. `progress` gets bytes.

    Raises SnapshotError when the folder is not a whole dump, StoreError, DiskFullError; nothing is stored then.
    """
    phases = Phases()
    snapshot_id = new_snapshot_id()
    own = [_origin(folder), *attach]
    with _Folder(folder) as files, store.begin() as transaction:
        with phases.time("check"):
            dump = _Dump.read(files, machine)
        with phases.time("store"), Ingest(transaction) as ingest:
            counted = _Counted(progress, files.total())
            memory = [_store_memory(pid, part, files, ingest, counted) for pid, part in dump.private()]
            taken = {name for _pid, part in dump.private() for name in (part.pagemap, part.pages)}
            taken |= {image.name for image in own}
            images = [_store_image(name, files, ingest, counted) for name in files.names() if name not in taken]
        body = SnapshotBody(
            version=BODY_VERSION,
            name=name,
            key=key,
            pid=dump.root,
            externals=list(externals),
            images=[*images, *own],
            memory=memory,
            mapped=[],
            phases=phases.copy(),
        )
        with phases.time("commit"):
            transaction.commit(
                Manifest(
                    id=snapshot_id,
                    kind=PROCESS_KIND,
                    name=name,
                    created=now(),
                    body=encode_body(body),
                    refs=body.references(),
                )
            )
    return CaptureResult(snapshot_id, body.raw_bytes(), transaction.stored_bytes, phases)


def parse_external(text: str) -> External:
    """From `socket:INODE` or `pipe:INODE`. Raises ConfigError."""
    kind, _colon, inode = text.partition(":")
    if kind not in ("socket", "pipe") or not re.fullmatch("[0-9]{1,19}", inode):
        raise ConfigError(f"{text!r} is no tie to the outside", remedy="Write socket:INODE or pipe:INODE")
    return External("socket" if kind == "socket" else "pipe", int(inode))


def _origin(folder: Path) -> ImageFile:
    """A note for people that the compatibility key is a guess."""
    note = {"imported_from": str(folder.absolute()), "key": "of the importing host; that of the origin is not known"}
    data = msgspec.json.encode(note)
    return ImageFile(name=_ORIGIN, size=len(data), inline=data)


class _Folder:
    """The images in a folder, all open. A context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._exits = contextlib.ExitStack()
        self._files: dict[str, int] = {}

    def __enter__(self) -> _Folder:
        with contextlib.ExitStack() as exits, system_errors(self._path, "reading"):
            try:
                folder = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                raise SnapshotError(f"there is no folder {self._path}", remedy=_WHOLE_DUMP) from None
            exits.callback(os.close, folder)
            for name in sorted(os.listdir(folder)):  # noqa: PTH208
                self._check(name, os.stat(name, dir_fd=folder, follow_symlinks=False))
                if _is_ours_to_take(name):
                    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
                    exits.callback(os.close, fd)
                    self._files[name] = fd
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._exits.close()

    def names(self) -> list[str]:
        return list(self._files)

    def fd(self, name: str) -> int:
        """The open file. Raises SnapshotError when there is none."""
        if name not in self._files:
            raise self.refused(f"{name} is missing")
        return self._files[name]

    def size(self, name: str) -> int:
        return os.fstat(self.fd(name)).st_size

    def total(self) -> int:
        return sum(self.size(name) for name in self._files)

    def whole(self, name: str) -> bytes:
        """All of an image that is to be parsed. Raises SnapshotError."""
        size = self.size(name)
        if size > _PARSED_LIMIT:
            raise self.refused(f"{name} has {size} bytes, at most {_PARSED_LIMIT} make sense")
        with system_errors(self._path / name, "reading"):
            data = bytearray(size)
            if not _read_fully(self.fd(name), memoryview(data), 0):
                raise self.refused(f"{name} became shorter while it was read")
            return bytes(data)

    def runs(self, name: str, parser: PagemapParser) -> Iterator[Run]:
        """The runs of a page map. Raises DamagedError."""
        at = 0
        with system_errors(self._path / name, "reading"):
            while data := os.pread(self.fd(name), _PIECE, at):
                at += len(data)
                yield from parser.feed(data)

    def refused(self, why: str) -> SnapshotError:
        return SnapshotError(f"{self._path} can't be imported: {why}", remedy=_WHOLE_DUMP)

    def _check(self, name: str, status: os.stat_result) -> None:
        if name == "parent":
            raise self.refused("it has a link to a parent dump, so its own pages are not all there are")
        if not stat.S_ISREG(status.st_mode):
            raise self.refused(f"{name!r} is not a regular file")
        if not _is_ours_to_take(name) and not _IGNORED.fullmatch(name):
            raise self.refused(f"{name!r} is no file that CRIU writes")


def _is_ours_to_take(name: str) -> bool:
    return is_image_name(name) and (name.endswith(".img") or _OURS.fullmatch(name) is not None)


@dataclass(frozen=True)
class _Dump:
    """What a folder was found to hold."""

    root: int
    memory: list[_Memory]

    def private(self) -> list[tuple[int, _Memory]]:
        """The memory of processes, by pid."""
        found = ((part.pid, part) for part in self.memory if part.pid is not None)
        return sorted(found, key=lambda pair: pair[0])

    @classmethod
    def read(cls, files: _Folder, machine: str) -> _Dump:
        """Raises SnapshotError when the folder is not a whole dump of one tree of processes on such a machine."""
        try:
            check_inventory(files.whole(INVENTORY), INVENTORY)
            root = cls._root(files, machine)
            memory = [_memory(name, files) for name in files.names() if name.startswith("pagemap-")]
        except DamagedError as error:
            raise files.refused(error.message) from error
        pages = [part.pages for part in memory]
        unknown = sorted({name for name in files.names() if name.startswith("pages-")}.difference(pages))
        if unknown:
            raise files.refused(f"no page map tells what {unknown[0]} holds")
        if len(set(pages)) != len(pages):
            raise files.refused("two page maps share one file of pages")
        return cls(root, memory)

    @staticmethod
    def _root(files: _Folder, machine: str) -> int:
        tasks = parse_tree(files.whole("pstree.img"), "pstree.img")
        roots = [task.pid for task in tasks if task.parent == 0]
        if len(roots) != 1:
            raise files.refused(f"pstree.img has {len(roots)} roots")
        for task in tasks:
            core = f"core-{task.pid}.img"
            made_on = machine_of(files.whole(core), core)
            if made_on != machine:
                raise files.refused(f"it was made on {made_on or 'an unknown machine'}, and this is {machine}")
        return roots[0]


def _memory(name: str, files: _Folder) -> _Memory:
    parser = PagemapParser(name)
    expected = PAGE * sum(run.pages for run in files.runs(name, parser))
    pages_id, pid = parser.finish(), process_of(name)
    mappings = parse_mappings(files.whole(f"mm-{pid}.img"), f"mm-{pid}.img") if pid is not None else []
    sparse = Places((mapping.start, mapping.end) for mapping in mappings if mapping.sparse)
    pages = f"pages-{pages_id}.img"
    if files.size(pages) != expected:
        raise files.refused(f"{pages} has {files.size(pages)} bytes, and {name} tells of {expected}")
    return _Memory(pid, name, pages, sparse)


class _Counted:
    """Adds up bytes for a progress display."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, count: int) -> None:
        self._done += count
        self._progress(self._done, self._total)


def _store_image(name: str, files: _Folder, ingest: Ingest, counted: _Counted) -> ImageFile:
    image = read_image(name, files.fd(name), ingest)
    counted.add(image.size)
    return image


def _store_memory(pid: int, memory: _Memory, files: _Folder, ingest: Ingest, counted: _Counted) -> AddressSpace:
    fd = files.fd(memory.pages)
    windows: deque[Future[Stored]] = deque()
    stored: Stored = {}
    at = 0

    def take(keep: int) -> None:
        while len(windows) > keep:
            stored.update({number: pages for number, pages in windows.popleft().result().items() if pages})

    try:
        for span in _spans(files.runs(memory.pagemap, PagemapParser(memory.pagemap))):
            job = _window_job(fd, at, pid, span, memory.sparse.mask(span.number, span.width), files)
            windows.append(ingest.run(job, span.width * WINDOW))
            length = span.mask.bit_count() * PAGE
            at += length
            counted.add(length)
            take(_WINDOWS_AHEAD)
    finally:
        wait(windows)  # all of them: they use the file
    take(0)
    pages_id = int(memory.pages.removeprefix("pages-").removesuffix(".img"))
    return address_space(pid, pages_id, at // PAGE, stored)


def _spans(runs: Iterable[Run]) -> Iterator[Span]:
    spans = Spans()
    for run in runs:
        yield from spans.add(run)
    yield from spans.last()


def _window_job(
    fd: int, at: int, pid: int, span: Span, sparse: int, files: _Folder
) -> Callable[[memoryview, Putter], Stored]:
    def job(buffer: memoryview, put: Putter) -> Stored:
        data = buffer[: span.bytes]
        if not _read_fully(fd, data, at):
            raise files.refused("a file of pages became shorter while it was read")
        return store_spans([(span, sparse, data)], pid, None, put)

    return job


def _read_fully(fd: int, into: memoryview, offset: int) -> bool:
    """Fill a buffer from a file; whether there was enough."""
    at = 0
    while at < len(into):
        count = os.preadv(fd, [into[at:]], offset + at)
        if count == 0:
            return False
        at += count
    return True
