"""A disk that fails on purpose: wraps the functions of `os` that the store uses, for the files below one folder.

Between `armed()` and its end, any call may fail with ENOSPC or EIO, or do only a part of what was asked; and the power
may go. The real folder always shows what a running process sees. Beside it is kept what a disk would really hold: the
bytes of each file and the names in each folder as of their last fsync, and what has happened since. `restart` throws
the real folder away and makes it anew from the synced part and a random choice of the rest: whole writes, torn ones,
names.

SQLite does not go through `os`; its file is the index, which may be lost: after a power cut it is gone, or cut short,
or whole, which may be more or less than the rest of the disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock


class PowerCut(BaseException):
    """The machine has stopped: not an Exception, for no code may handle it."""


@dataclass
class File:
    """`writes` are those since the last fsync, which nobody may rely on."""

    synced: bytes = b""
    writes: list[tuple[int, bytes]] = field(default_factory=list)
    fsync_failed: bool = False

    def after_a_cut(self, chance: random.Random) -> bytes:
        content = bytearray(self.synced)
        for offset, data in self.writes:
            kept = data[: chance.choice([0, len(data), chance.randrange(len(data) + 1)])]
            if kept:
                content.extend(bytes(max(0, offset + len(kept) - len(content))))
                content[offset : offset + len(kept)] = kept
        if self.writes and chance.random() < 0.2:
            del content[chance.randrange(len(content) + 1) :]
        return bytes(content)


@dataclass
class Folder:
    """`synced` are the names as of the last fsync; each of `changes` is one step since, which happens as a whole."""

    synced: Names = field(default_factory=dict)
    names: Names = field(default_factory=dict)
    changes: list[Callable[[Names], object]] = field(default_factory=list)

    def change(self, step: Callable[[Names], object]) -> None:
        step(self.names)
        self.changes.append(step)

    def sync(self) -> None:
        self.synced, self.changes = dict(self.names), []

    def after_a_cut(self, chance: random.Random) -> Names:
        names = dict(self.synced)
        ordered, until = chance.random() < 0.5, chance.randrange(len(self.changes) + 1)
        for at, step in enumerate(self.changes):
            if at < until if ordered else chance.random() < 0.5:
                step(names)
        return names


Entry = File | Folder
Names = dict[str, Entry]


class FaultyDisk:
    """The folder `root` must be empty. `errors` is the share of calls that fail while armed, `shorts`
    that of reads and writes that do less than asked."""

    def __init__(self, root: Path, seed: int, *, errors: float = 0.0, shorts: float = 0.0) -> None:
        self.root = root
        self.errors = errors
        self.shorts = shorts
        self.faults: list[str] = []
        self._chance = random.Random(seed)
        self._tree = Folder()
        self._fds: dict[int, Entry] = {}
        self._calls_left = -1
        self._dead = False
        self._armed = False
        self._watching = True

    @property
    def open_files(self) -> int:
        """How many descriptors of files of this disk are open."""
        return len(self._fds)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """For the life of the test: everything below `root` that is done through `os` in this block is noted."""
        names = ("open", "close", "pread", "preadv", "pwrite", "fsync", "rename", "unlink", "mkdir")
        with contextlib.ExitStack() as stack:
            for name in names:
                original = getattr(os, name)
                wrapper = self._wrapped(name, getattr(self, f"_{name}", None), original)
                stack.enter_context(mock.patch.object(os, name, wrapper))
            yield

    @contextlib.contextmanager
    def armed(self, cut_after: int | None = None) -> Iterator[None]:
        """Faults happen in this block; the power goes at call number `cut_after`."""
        self._armed, self._calls_left = True, -1 if cut_after is None else cut_after
        try:
            yield
        finally:
            self._armed, self._calls_left = False, -1

    def revive(self) -> None:
        """Not the power went, but only the process died: what it has written without syncing is there, for now."""
        self._dead = False

    def restart(self) -> None:
        """What the disk holds after a power cut."""
        self._watching = False
        index = {path: path.read_bytes() for path in self.root.rglob("index.sqlite*")}
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.root)
        self._dead, self._fds = False, {}
        self._tree = self._rebuilt(self._tree, self.root)
        self._some_index(index)
        self._watching = True

    # the calls

    def _wrapped(self, name: str, ours: Callable[..., Any] | None, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if not self._concerns(name, arguments):
                return original(*arguments, **named)
            if ours is None:  # close
                self._fds.pop(arguments[0])
                return original(*arguments)
            self._maybe_cut()
            return ours(original, *arguments, **named)

        return call

    def _concerns(self, name: str, arguments: tuple[Any, ...]) -> bool:
        if name in ("close", "pread", "preadv", "pwrite", "fsync"):
            return arguments[0] in self._fds
        path = Path(os.fspath(arguments[0]))
        return (
            self._watching
            and (path == self.root or self.root in path.parents)
            and not path.name.startswith("index.sqlite")
        )

    def _maybe_cut(self) -> None:
        if self._calls_left == 0:
            self._dead = True
        self._calls_left -= 1
        if self._dead:
            raise PowerCut

    def _fail(self, call: str, what: object, *codes: int) -> None:
        if self._armed and self._chance.random() < self.errors:
            code = self._chance.choice(codes)
            self.faults.append(f"{errno.errorcode[code]} in {call} of {what}")
            raise OSError(code, os.strerror(code), os.fspath(what) if isinstance(what, Path) else None)

    def _part(self, length: int) -> int:
        """How much of a read or write of `length` is done: all of it, mostly."""
        if self._armed and length > 1 and self._chance.random() < self.shorts:
            return self._chance.randrange(1, length)
        return length

    def _open(self, original: Callable[..., int], name: Any, flags: int, *mode: int) -> int:
        path = Path(name)
        making = flags & os.O_CREAT and self._entry(path) is None
        self._fail("open", path, errno.EIO, *([errno.ENOSPC] if making else []))
        fd = original(name, flags, *mode)
        entry = self._entry(path)
        if entry is None:
            entry = File()
            self._change(path, lambda names, entry=entry: names.__setitem__(path.name, entry))  # type: ignore[misc]
        self._fds[fd] = entry
        return fd

    def _pread(self, original: Callable[..., bytes], fd: int, length: int, offset: int) -> bytes:
        self._fail("pread", fd, errno.EIO)
        return original(fd, self._part(length), offset)

    def _preadv(self, original: Callable[..., int], fd: int, buffers: list[memoryview], offset: int) -> int:
        self._fail("preadv", fd, errno.EIO)
        (buffer,) = buffers
        return original(fd, [buffer[: self._part(len(buffer))]], offset)

    def _pwrite(self, original: Callable[..., int], fd: int, data: Any, offset: int) -> int:
        self._fail("pwrite", fd, errno.EIO, errno.ENOSPC)
        part = bytes(data)[: self._part(len(data))]
        entry = self._fds[fd]
        assert isinstance(entry, File)
        entry.writes.append((offset, part))
        return original(fd, part, offset)

    def _fsync(self, _original: Callable[..., None], fd: int) -> None:
        entry = self._fds[fd]
        try:
            self._fail("fsync", fd, errno.EIO, errno.ENOSPC)
        except OSError:
            if isinstance(entry, File):
                entry.fsync_failed = True  # Linux forgets what it could not write: no later fsync makes up for it
            raise
        if isinstance(entry, Folder):
            entry.sync()
        elif not entry.fsync_failed:
            length = max([len(entry.synced), *(offset + len(data) for offset, data in entry.writes)])
            content = bytearray(entry.synced.ljust(length, b"\0"))
            for offset, data in entry.writes:
                content[offset : offset + len(data)] = data
            entry.synced, entry.writes = bytes(content), []

    def _rename(self, original: Callable[..., None], source: Any, target: Any) -> None:
        old, new = Path(source), Path(target)
        assert old.parent == new.parent, "a rename between folders is not what this disk knows"
        self._fail("rename", new, errno.EIO, errno.ENOSPC)
        original(source, target)
        entry = self._folder(old.parent).names[old.name]

        def step(names: Names) -> None:
            names.pop(old.name, None)
            names[new.name] = entry

        self._change(new, step)

    def _unlink(self, original: Callable[..., None], name: Any) -> None:
        path = Path(name)
        self._fail("unlink", path, errno.EIO)
        original(name)
        self._change(path, lambda names: names.pop(path.name, None))

    def _mkdir(self, original: Callable[..., None], name: Any, *mode: int) -> None:
        path = Path(name)
        self._fail("mkdir", path, errno.EIO, errno.ENOSPC)
        original(name, *mode)
        folder = Folder()
        self._change(path, lambda names: names.__setitem__(path.name, folder))

    # the disk beside

    def _folder(self, path: Path) -> Folder:
        found = self._tree
        for name in path.relative_to(self.root).parts:
            entry = found.names[name]
            assert isinstance(entry, Folder)
            found = entry
        return found

    def _entry(self, path: Path) -> Entry | None:
        return self._tree if path == self.root else self._folder(path.parent).names.get(path.name)

    def _change(self, path: Path, step: Callable[[Names], object]) -> None:
        self._folder(path.parent).change(step)

    def _rebuilt(self, folder: Folder, path: Path) -> Folder:
        """Write what a folder holds after a power cut; all of that is durable then."""
        path.mkdir(mode=0o700)
        names: Names = {}
        for name, entry in folder.after_a_cut(self._chance).items():
            if isinstance(entry, Folder):
                names[name] = self._rebuilt(entry, path / name)
            else:
                content = entry.after_a_cut(self._chance)
                (path / name).write_bytes(content)
                (path / name).chmod(0o600)
                names[name] = File(content)
        return Folder(dict(names), names)

    def _some_index(self, files: dict[Path, bytes]) -> None:
        fate = self._chance.choice(["lost", "whole", "cut"])
        for path, content in files.items():
            if fate != "lost" and path.parent.is_dir() and not path.name.endswith("-shm"):
                path.write_bytes(content if fate == "whole" else content[: self._chance.randrange(len(content) + 1)])
                path.chmod(0o600)
