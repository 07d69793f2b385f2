"""The standard streams of a job: pipes to the keeper, which passes bytes on and keeps none.

    keeper's stdin --Input--> pipe --> job --> pipe --Output--> keeper's stdout, stderr, or the log

Pipes, never files: a file that grows between capture and restore would be refused by CRIU, and a pipe's other end can
be a new one. One thread per stream; a slow reader slows the job down, as with any pipe, and one that has gone is
noticed by the job. A full disk or a broken terminal costs words, never the job.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dormouse.jobs.record import Stream

_READ_SIZE = 1 << 16
_MAX_LINE = 1 << 16
_MAX_LOG = 16 << 20
_SPLICE_F_NONBLOCK = 2
_GLANCE = 0.5
_SAY_TIMEOUT = 1.0


@dataclass
class Pipes:
    """Our ends {stream: descriptor} and the job's, until those are handed over."""

    ours: dict[Stream, int]
    theirs: dict[Stream, int]

    @classmethod
    def make(cls) -> Pipes:
        """Three new pipes."""
        stdin_read, stdin_write = os.pipe()
        stdout_read, stdout_write = os.pipe()
        stderr_read, stderr_write = os.pipe()
        return cls(
            {"stdin": stdin_write, "stdout": stdout_read, "stderr": stderr_read},
            {"stdin": stdin_read, "stdout": stdout_write, "stderr": stderr_write},
        )

    def hand_over(self) -> None:
        """The job has its ends: close them here, so that it alone holds them."""
        for descriptor in self.theirs.values():
            os.close(descriptor)
        self.theirs.clear()

    def close(self) -> None:
        """Close what is still here."""
        self.hand_over()
        for descriptor in self.ours.values():
            os.close(descriptor)
        self.ours.clear()


class Sink(Protocol):
    """Where output goes."""

    def write(self, data: bytes) -> bool:
        """Take all of it; False when nobody wants more."""
        ...


class FileSink:
    """An open descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def write(self, data: bytes) -> bool:
        with self._lock:
            return _pass_on(self._descriptor, data)


class LogSink:
    """A log that is appended to; a long one becomes NAME.log.1, so that a job can't fill the disk with words. `also`
    are descriptors that shall lead to the log as well, whichever file it is."""

    def __init__(self, path: Path, also: Sequence[int] = ()) -> None:
        self._path = path
        self._also = also
        self._lock = threading.Lock()
        self._descriptor = self._open()

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, data: bytes) -> bool:
        with self._lock:
            try:
                if os.fstat(self._descriptor).st_size > _MAX_LOG:
                    self._rotate()
            except OSError:
                return True  # no room for a new one: these words are lost
            return _pass_on(self._descriptor, data)

    def _rotate(self) -> None:
        with suppress(FileNotFoundError):  # then a rotation has failed half-way, or somebody has removed it
            self._path.replace(self._path.with_name(self._path.name + ".1"))
        fresh = self._open()
        os.dup2(fresh, self._descriptor, inheritable=False)
        os.close(fresh)
        for number in self._also:
            os.dup2(self._descriptor, number)


class NumberedSink:
    """Whole lines with a number in front, for several replicas at one sink."""

    def __init__(self, number: int, sink: Sink) -> None:
        self._prefix = f"{number}| ".encode()
        self._sink = sink
        self._rest = b""

    def write(self, data: bytes) -> bool:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE:
            lines.append(self._rest)
            self._rest = b""
        return self._sink.write(b"".join(self._prefix + line + b"\n" for line in lines)) if lines else True

    def finish(self) -> None:
        """The last line, if it had no end."""
        if self._rest:
            self.write(b"\n")


class Output:
    """Passes one of the job's output streams on until its end, or until nobody wants more."""

    def __init__(self, descriptor: int, sink: Sink) -> None:
        self._descriptor = descriptor
        self._sink = sink
        self._thread = threading.Thread(target=self._run, name="job-output", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the end of the stream."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while data := os.read(self._descriptor, _READ_SIZE):
                if not self._sink.write(data):
                    break  # closing the pipe tells the job, as it would be told without us
            if isinstance(self._sink, NumberedSink):
                self._sink.finish()
        finally:
            os.close(self._descriptor)


class Input:
    """Passes bytes from `source` (a descriptor, or None: only what is pending) to the job's input."""

    def __init__(self, descriptor: int, source: int | None, pending: bytes = b"") -> None:
        self._descriptor = descriptor
        self._source = source
        self._pending = pending
        self._flowing = threading.Lock()
        self._stop = False
        threading.Thread(target=self._run, name="job-input", daemon=True).start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is taken from the source meanwhile."""
        with self._flowing:
            yield

    def stop(self) -> None:
        """Take nothing more."""
        self._stop = True

    def _run(self) -> None:
        try:
            # A new pipe takes at least what an old one held, so this does not wait for the job.
            if self._pending and not _write_all(self._descriptor, self._pending):
                return
            while self._source is not None and not self._stop:
                if not _ready(self._descriptor, select.POLLOUT) or not _readable(self._source):
                    continue
                with self._flowing:
                    # So little fits into a pipe that is ready: what is taken from the source is never held here,
                    # where a capture would lose it.
                    if self._stop or not (data := os.read(self._source, select.PIPE_BUF)):
                        return
                    if not _write_all(self._descriptor, data):
                        return
        except OSError:
            return  # the terminal, or the job's end of the pipe, has gone: no more input either way
        finally:
            os.close(self._descriptor)


def _readable(source: int) -> bool:
    """Whether there is input for us: a terminal's belongs to the foreground, and reading it otherwise would stop us."""
    if os.isatty(source) and os.tcgetpgrp(source) != os.getpgrp():
        time.sleep(_GLANCE)
        return False
    return _ready(source, select.POLLIN)


def _ready(descriptor: int, event: int) -> bool:
    """Whether it is, after a while of waiting. Raises OSError when its other end, for writing, has gone."""
    poll = select.poll()
    poll.register(descriptor, event)
    events = dict(poll.poll(_GLANCE * 1000)).get(descriptor, 0)
    if events & select.POLLERR:
        raise BrokenPipeError
    return bool(events)


def unread(path: str) -> bytes:
    """What is in the pipe behind `path` (/proc/PID/fd/N); it stays there. Raises OSError."""
    source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    reading, writing = os.pipe()
    try:
        size = fcntl.fcntl(source, fcntl.F_GETPIPE_SZ)
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, size)
        copied = ctypes.CDLL(None, use_errno=True).tee(source, writing, size, _SPLICE_F_NONBLOCK)
        return os.read(reading, copied) if copied > 0 else b""
    finally:
        for descriptor in (source, reading, writing):
            os.close(descriptor)


def standard_streams(inodes: Mapping[Stream, int]) -> list[tuple[int, list[Stream]]]:
    """The pipes behind the standard streams: (inode, which streams), each pipe once."""
    pipes: dict[int, list[Stream]] = {}
    for stream, inode in inodes.items():
        pipes.setdefault(inode, []).append(stream)
    return list(pipes.items())


def _write_all(descriptor: int, data: bytes) -> bool:
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except BrokenPipeError:
        return False
    return True


def _pass_on(descriptor: int, data: bytes) -> bool:
    """Write all of it, also where that needs waiting for; False when the reader has gone. What can't be written for
    another reason, such as a full disk, is lost: words are not worth a job."""
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[_write_some(descriptor, rest) :]
    except BrokenPipeError:
        return False
    except OSError:
        return True
    return True


def _write_some(descriptor: int, data: memoryview) -> int:
    try:
        return os.write(descriptor, data)
    except BlockingIOError:
        _ready(descriptor, select.POLLOUT)
        return 0


def say(descriptor: int, text: str) -> None:
    """A line for the user, when somebody takes it soon; else it is lost."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    if poll.poll(_SAY_TIMEOUT * 1000):
        with suppress(OSError):
            # No more than a pipe that is ready takes at once.
            os.write(descriptor, f"{text}\n".encode(errors="backslashreplace")[: select.PIPE_BUF])


def inode_of(descriptor: int) -> int:
    """The inode of an open descriptor."""
    return os.fstat(descriptor).st_ino


def inode_of_path(path: Path) -> int:
    """The inode behind a link of /proc/PID/fd."""
    return path.stat().st_ino
