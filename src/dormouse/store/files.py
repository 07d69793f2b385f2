"""What packs, manifests and the store share at the file system: private files, durable renames, locks between
processes, the preamble of every format of ours, and the one place where system errors become StoreErrors.

Nothing is opened through a link, and nothing is read that other users could have written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import shutil
import stat
import struct
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import xxhash

from dormouse.errors import BusyError, DamagedError, DiskFullError, StoreError, UntrustedError

log = logging.getLogger(__name__)

_PREAMBLE = struct.Struct("<8sII8s")
PREAMBLE_SIZE = _PREAMBLE.size + 8
_POLL_SECONDS = 0.02
_OTHERS_WRITE = 0o022

_SYNC_FILE_RANGE_WRITE = 2


def preamble(magic: bytes, version: int, key_id: bytes) -> bytes:
    """The first bytes of a file of ours: magic, version, four reserved bytes, id of its key, and their XXH3-64."""
    head = _PREAMBLE.pack(magic, version, 0, key_id)
    return head + xxhash.xxh3_64_digest(head)


def check_preamble(data: bytes, magic: bytes, version: int, key_id: bytes, what: str) -> None:
    """Raises DamagedError when `data` does not begin a file of this kind, StoreError when it is of a newer version,
    UntrustedError when another key signed it."""
    head = data[: _PREAMBLE.size]
    if len(data) < PREAMBLE_SIZE or xxhash.xxh3_64_digest(head) != data[_PREAMBLE.size : PREAMBLE_SIZE]:
        raise DamagedError(f"{what} does not begin as such a file does", remedy=VERIFY_REMEDY)
    found_magic, found_version, _reserved, found_key = _PREAMBLE.unpack(head)
    if found_magic != magic:
        raise DamagedError(f"{what} is a file of another kind", remedy=VERIFY_REMEDY)
    if found_version > version:
        raise StoreError(
            f"{what} has format version {found_version}; this program reads up to {version}",
            remedy="Update dormouse, or use another data folder",
        )
    if found_key != key_id:
        raise UntrustedError(
            f"{what} was signed with key {found_key.hex()}, and this store's key is {key_id.hex()}",
            remedy="Take in that key with `dormouse key import`, or remove what it signed with `dormouse rm`",
        )


VERIFY_REMEDY = "Run `dormouse verify` to see what is hit, and remove those snapshots with `dormouse rm`"


@contextlib.contextmanager
def system_errors(path: Path, doing: str, needed: int = 0) -> Iterator[None]:
    """Turns an OSError of the block into a StoreError that says what was done to which path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(path, doing, needed) from error
        raise StoreError(
            f"{doing} {path} failed: {error.strerror}", remedy="See `dormouse doctor` and the system log for the disk"
        ) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Like `system_errors`, but what the disk can't give back is damaged, and what is not there stays not found."""
    try:
        with system_errors(path, "reading"):
            yield
    except StoreError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError):
            raise cause from None
        if isinstance(cause, OSError) and cause.errno == errno.EIO:
            raise DamagedError(f"{path} is damaged: the disk can't read it", remedy=VERIFY_REMEDY) from cause
        raise


def disk_full(path: Path, doing: str, needed: int = 0) -> DiskFullError:
    """The error for a full disk, with how much was wanted and how much there is."""
    folder = next(each for each in path.absolute().parents if each.is_dir())
    free = shutil.disk_usage(folder).free
    wanted = f"{needed} bytes were needed, " if needed else ""
    return DiskFullError(
        f"the disk is full: {doing} {path} failed, {wanted}{free} are free",
        remedy="Free some space there (`dormouse rm` removes snapshots) or move the data folder to a larger disk",
    )


def private_folder(path: Path, *, may_be_link: bool = False) -> None:
    """Make a folder that only its owner may enter, with its parents. Raises UntrustedError for one that is there and
    that others may write to, or that is a link."""
    with system_errors(path, "creating the folder"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat() if may_be_link else path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise _link(path)
    refuse_open_to_others(path, status, _OTHERS_WRITE)


def discard(path: Path) -> None:
    """Remove what was not committed. A failure is only logged: this tidies up after a success or
    another failure, which is what the caller has to tell, and the next start tidies up again."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s could not be removed, which is left to the next start: %s", path, error)


def open_ours(path: Path) -> int:
    """Open a file for reading. Raises UntrustedError for links, what is no file, and what others may write to."""
    try:
        # O_NONBLOCK: opening somebody's pipe would wait for ever. It means nothing to a regular file.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _link(path) from error
        raise
    try:
        check_ours(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    """Closes the descriptor at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)


def check_ours(path: Path, status: os.stat_result, forbidden: int = _OTHERS_WRITE) -> None:
    """Raises UntrustedError for what is no regular file (a link's own status) and what is open to others."""
    if not stat.S_ISREG(status.st_mode):
        raise _link(path)
    refuse_open_to_others(path, status, forbidden)


def refuse_open_to_others(path: Path, status: os.stat_result, forbidden: int) -> None:
    """Raises UntrustedError when the group or others have any of the `forbidden` rights."""
    if status.st_mode & forbidden:
        raise UntrustedError(
            f"{path} is open to other users (mode {stat.S_IMODE(status.st_mode):04o})",
            remedy=f"Find out who could have changed or read it, then run `chmod go-rwx {path}`",
        )


def _link(path: Path) -> UntrustedError:
    return UntrustedError(
        f"{path} is a link or something else that does not belong in a store; it is not followed",
        remedy="Find out who put it there, and move it away",
    )


def read_all(fd: int, length: int, offset: int) -> bytes:
    """`length` bytes at `offset`, fewer only at the end of the file."""
    parts = []
    while length > 0 and (part := os.pread(fd, length, offset)):
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset`; the bytes read, fewer than its length only at the end of the file."""
    done = 0
    while done < len(buffer) and (count := os.preadv(fd, [buffer[done:]], offset + done)):
        done += count
    return done


def read_file(path: Path) -> bytes:
    """All of a file of ours."""
    with closing_fd(open_ours(path)) as fd:
        return read_all(fd, os.fstat(fd).st_size, 0)


def create_file(path: Path) -> int:
    """A new private file, open for reading and writing."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(fd, rest, offset)
        rest = rest[count:]
        offset += count


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Have the kernel begin to write these bytes to the disk, so that the sync at the end has less to wait for. A hint:
    nothing depends on it, and the sync reports what fails. (A C library or file system without it does nothing.)"""
    sync_file_range = _sync_file_range()
    if sync_file_range is not None:
        sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    with closing_fd(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        os.fsync(fd)


def replace_file(path: Path, data: bytes, written: Callable[[], None] = lambda: None) -> None:
    """Put a private file of this content at `path`: whole and durable, or not at all. `written` is called when only the
    rename is left to do. The caller has a lock that keeps others from writing the same file."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a process that was killed
    fd = create_file(temporary)
    try:
        write_all(fd, data, 0)
        os.fsync(fd)
        written()
        temporary.rename(path)
    except BaseException:
        discard(temporary)
        raise
    finally:
        os.close(fd)
    sync_folder(path.parent)


_NOT_OURS_TO_SYNC = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.ENOTSUP)


def sync_path(path: Path) -> None:
    """Make the name of a file or folder durable, and those of all folders above it: we may have made them, or another
    process of ours that died before it synced them. Those that we may not sync, we can't have made anything in."""
    for folder in path.absolute().parents:
        try:
            sync_folder(folder)
        except OSError as error:
            if error.errno not in _NOT_OURS_TO_SYNC:
                raise


class FileLock:
    """A lock between processes and threads (flock), freed by `release` or by the death of the process."""

    def __init__(self, path: Path, *, shared: bool = False, wait: float | None = None) -> None:
        """Takes the lock; raises BusyError when `wait` seconds have passed (None waits for ever)."""
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        with system_errors(path, "locking"):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                self._take(path, mode, wait)
            except BaseException:
                os.close(self._fd)
                raise

    def _take(self, path: Path, mode: int, wait: float | None) -> None:
        if wait is None:
            fcntl.flock(self._fd, mode)
            return
        deadline = time.monotonic() + wait
        while not try_lock(self._fd, mode):
            if time.monotonic() >= deadline:
                raise BusyError(
                    f"{path.parent} has been in use for {wait:.0f} s", retry_after=wait, remedy="Try again later"
                )
            time.sleep(_POLL_SECONDS)

    def release(self) -> None:
        """Free the lock. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_exception: object) -> None:
        self.release()


def try_lock(fd: int, mode: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file if nobody else holds it."""
    try:
        fcntl.flock(fd, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
