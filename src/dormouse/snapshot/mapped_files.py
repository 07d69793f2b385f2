"""The files a process has mapped, as they must be again for its snapshot to be restored: size, time and BLAKE3.

    capture:  fingerprint(paths, cache)          -> stored with the snapshot
    restore:  first_changed_file(mapped, cache)  -> None, or the sentence that names the file

CRIU maps these files again by their names and takes whatever lies there, so a library that was replaced would be
mixed into a process that remembers the old one. A file whose size and time are as they were is taken as unchanged;
one of another size has changed; only one with another time and the same size is read (copied or restored from a
backup, perhaps). What was read is remembered in a file of the data folder, so that a library is read once per host.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
from blake3 import blake3

from dormouse.errors import SnapshotError
from dormouse.snapshot.shortage import system_failure

log = logging.getLogger(__name__)

CACHE_NAME = "file-digests"
"""The cache's name in the data folder."""

_VERSION = 1
_READ_SIZE = 4 << 20
_THREADS = 4
_MAX_ENTRIES = 1 << 16
_MAX_CACHE_BYTES = 64 << 20
# A file changed again within one tick of the file system's clock keeps its time: what is so young is not remembered.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class FileFingerprint:
    """What a file was: `digest` is the BLAKE3 of its bytes."""

    size: int
    mtime_ns: int
    digest: bytes


class Mapped(Protocol):
    """A file as a snapshot remembers it (images.MappedFile)."""

    @property
    def path(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def mtime_ns(self) -> int: ...

    @property
    def digest(self) -> bytes: ...


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """One file that was read. `identity` must all be as it was for the digest to hold; with the time of the last
    change of any kind (ctime) in it, a time of modification that was set by hand deceives nobody."""

    path: bytes
    identity: tuple[int, int, int, int, int]
    digest: bytes


class _Cache(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    entries: list[_Entry]


class DigestCache:
    """Digests of files by path and identity, kept in `path` (0600). Thread-safe; `save` blocks.

    Losing it costs time and nothing else: one that can't be read is thrown away with a line in the log, and of two
    processes that save at once, the last wins.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._entries = {entry.path: entry for entry in _read_cache(path)}
        self._changed = False

    def find(self, path: str, info: os.stat_result) -> bytes | None:
        """The digest of the file with this name and state, if it is known."""
        with self._lock:
            entry = self._entries.get(os.fsencode(path))
        return entry.digest if entry is not None and entry.identity == _identity(info) else None

    def add(self, path: str, info: os.stat_result, digest: bytes) -> None:
        """Remember a digest of a file in this state."""
        entry = _Entry(os.fsencode(path), _identity(info), digest)
        with self._lock:
            self._entries.pop(entry.path, None)  # so that the order is that of reading
            self._entries[entry.path] = entry
            self._changed = True
            while len(self._entries) > _MAX_ENTRIES:
                del self._entries[next(iter(self._entries))]

    def save(self) -> None:
        """Write the file anew if there is something new. A failure is logged: the next start reads files again."""
        with self._lock:
            if not self._changed:
                return
            self._changed = False
            data = msgspec.msgpack.encode(_Cache(_VERSION, list(self._entries.values())))
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.new")
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(data)
            temporary.replace(self._path)
        except OSError as error:
            log.warning("the digests of mapped files were not saved: %s", error)
            temporary.unlink(missing_ok=True)


def fingerprint(paths: Iterable[str], cache: DigestCache) -> dict[str, FileFingerprint]:
    """What each file is now; reads those the cache does not know, several at a time. Blocks.

    Raises SnapshotError that names the first file that is not a plain file or can't be read, HostError when this host
    is out of something.
    """
    wanted = list(dict.fromkeys(paths))
    try:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="fingerprint") as pool:
            return dict(zip(wanted, pool.map(lambda path: _fingerprint(path, cache), wanted), strict=True))
    finally:
        cache.save()


def first_changed_file(mapped: Iterable[Mapped], cache: DigestCache) -> str | None:
    """A sentence about the first file that is not what it was; None when all are. Blocks for as long as it takes to
    read the files that have another time and the same size, unless the cache knows them."""
    doubtful: list[Mapped] = []
    for file in mapped:
        finding, same_time = _compare_state(file)
        if finding is not None:
            return f"mapped file {file.path}: {finding}"
        if not same_time:
            doubtful.append(file)
    try:
        now = fingerprint((file.path for file in doubtful), cache) if doubtful else {}
    except SnapshotError as error:
        return error.message
    for file in doubtful:
        if now[file.path].digest != file.digest:
            then, here = file.digest.hex()[:16], now[file.path].digest.hex()[:16]
            return f"mapped file {file.path}: its content has changed (BLAKE3 {then} then, {here} now)"
    return None


def _compare_state(file: Mapped) -> tuple[str | None, bool]:
    """How it differs without a look inside, and whether its time is the same."""
    try:
        info = Path(file.path).stat()
    except OSError as error:
        return f"{error.strerror} now", False
    if not stat.S_ISREG(info.st_mode):
        return "is no longer a plain file", False
    if info.st_size != file.size:
        return f"had {file.size} bytes at the capture, has {info.st_size} now", False
    return None, info.st_mtime_ns == file.mtime_ns


def _fingerprint(path: str, cache: DigestCache) -> FileFingerprint:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO of that name must not hold us up
    except OSError as error:
        raise system_failure(f"the mapped file {path} can't be read", error) from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise SnapshotError(f"the mapped file {path} is not a plain file")
        digest = cache.find(path, info)
        if digest is None:
            digest = _read_digest(fd, path)
            if _identity(os.fstat(fd)) != _identity(info):
                raise SnapshotError(f"the mapped file {path} changed while it was read", remedy="Try again")
            if time.time_ns() - info.st_ctime_ns > _SETTLED_NS:
                cache.add(path, info, digest)
        return FileFingerprint(info.st_size, info.st_mtime_ns, digest)
    finally:
        os.close(fd)


def _read_digest(fd: int, path: str) -> bytes:
    """Read rather than mapped: a file that is cut short meanwhile must not kill the process that looks at it."""
    digest = blake3(max_threads=blake3.AUTO)
    buffer = bytearray(_READ_SIZE)
    try:
        while count := os.readv(fd, [buffer]):
            digest.update(memoryview(buffer)[:count])
    except OSError as error:
        raise system_failure(f"the mapped file {path} can't be read", error) from error
    return digest.digest()


def _identity(info: os.stat_result) -> tuple[int, int, int, int, int]:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _read_cache(path: Path) -> list[_Entry]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_CACHE_BYTES + 1)
        if len(data) > _MAX_CACHE_BYTES:
            raise msgspec.DecodeError(f"it has over {_MAX_CACHE_BYTES} bytes")
        cache = msgspec.msgpack.decode(data, type=_Cache)
        if cache.version != _VERSION or any(len(entry.digest) != blake3.digest_size for entry in cache.entries):
            raise msgspec.DecodeError("it is of another version or holds what is no digest")
    except FileNotFoundError:
        return []
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        log.warning("%s is not used, mapped files are read again: %s", path, error)
        return []
    return cache.entries
