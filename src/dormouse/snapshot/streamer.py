"""Our end of `criu --stream`: image files travel through pipes, never through the disk.

CRIU connects to a unix socket in its image folder and asks for one file after another; each file is a pipe of its
own, several are open at once in both directions, so each gets a thread.

    dump     CRIU --(name, pipe's read end)-->  CaptureStream: pipe -> 1 MiB chunks -> Ingest (compress, append)
                                                private memory: memory_capture.py
    restore  CRIU --(name)--> RestoreStream: exists? --(pipe's write end)--> parts of the image, one after another

The protocol (CRIU's img-streamer.c): frames of a 4-byte little-endian length and a proto2 message, request
`{string filename = 1}`, reply on restore only `{bool exists = 1}`; then one byte that carries the pipe's descriptor.
A pipe's EOF ends a file, the socket's EOF ends the image. There are no error messages: a closed pipe is the message,
so the first error on our side is kept here and shown instead of CRIU's "broken pipe".
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Self

from dormouse.errors import DormouseError, HostError, SnapshotError
from dormouse.phases import host_clock
from dormouse.snapshot.images import INLINE_LIMIT, ImageFile
from dormouse.snapshot.memory_capture import drain, process_of
from dormouse.snapshot.memory_map import AddressSpace
from dormouse.snapshot.shortage import REMEDY, is_shortage, system_failure
from dormouse.store.chunk import Buffer, Digest
from dormouse.transfer.ingest import Ingest
from dormouse.transfer.readahead import ReadAhead

CAPTURE_SOCKET = "streamer-capture.sock"
SERVE_SOCKET = "streamer-serve.sock"

log = logging.getLogger(__name__)

_LENGTH = struct.Struct("<I")
_MAX_REQUEST = 4096
_PIPE_SIZE = 1 << 20


class _Connection:
    """CRIU's connection to our socket: exact reads, because a byte too many would swallow a descriptor."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def read_name(self) -> str | None:
        """The next requested file name, None at the end of the image."""
        head = self._read_exactly(_LENGTH.size, end_allowed=True)
        if not head:
            return None
        (length,) = _LENGTH.unpack(head)
        if length > _MAX_REQUEST:
            raise SnapshotError(f"CRIU's streaming request has {length} bytes; at most {_MAX_REQUEST} make sense")
        return parse_request(self._read_exactly(length))

    def reply_exists(self, exists: bool) -> None:
        """Tell whether the requested file is part of the image."""
        self._sock.sendall(_LENGTH.pack(2) + bytes([0x08, exists]))

    def receive_pipe(self) -> int:
        """The descriptor that follows a request, as wide a pipe as the system grants."""
        data, fds, _flags, _addr = socket.recv_fds(self._sock, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if len(data) != 1 or len(fds) != 1:
            for fd in fds:
                os.close(fd)
            raise SnapshotError("CRIU sent no pipe for an image file")
        with contextlib.suppress(PermissionError):  # over /proc/sys/fs/pipe-max-size: the default width also works
            fcntl.fcntl(fds[0], fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        return fds[0]

    def _read_exactly(self, length: int, *, end_allowed: bool = False) -> bytes:
        data = b""
        while len(data) < length:
            part = self._sock.recv(length - len(data))
            if not part:
                if end_allowed and not data:
                    return b""
                raise SnapshotError("CRIU closed its streaming socket in the middle of a request")
            data += part
        return data


def parse_request(body: bytes) -> str:
    """The file name in a request message: field 1, length-delimited. Raises SnapshotError for anything else."""
    if len(body) < 2 or body[0] != 0x0A:
        raise SnapshotError("CRIU sent a streaming request of unknown form")
    length, shift, at = 0, 0, 1
    while True:
        if at >= len(body) or shift > 14:
            raise SnapshotError("CRIU sent a streaming request of unknown form")
        length |= (body[at] & 0x7F) << shift
        shift += 7
        at += 1
        if not body[at - 1] & 0x80:
            break
    name = body[at:]
    if len(name) != length or not name.isascii() or b"/" in name or b"\0" in name or not name:
        raise SnapshotError("CRIU sent a streaming request of unknown form")
    return name.decode("ascii")


class _Stream:
    """Accepts CRIU's one connection, runs `_serve` on it in a thread and each file in another; keeps the first error.

    `close` ends everything at once; `finish` waits for the natural end and raises what went wrong on our side.
    """

    def __init__(self, directory: Path, socket_name: str) -> None:
        self.connected = threading.Event()
        """Set when CRIU has connected, or never will."""
        self.connected_at = self.last_image_at = host_clock()
        """When CRIU connected, and when the last image so far was through."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._listener.bind(f"/proc/self/fd/{folder}/{socket_name}")  # its full name may be too long for a socket
        finally:
            os.close(folder)
        self._listener.listen(1)
        self._lock = threading.Lock()
        self._error: DormouseError | None = None
        self._peer: socket.socket | None = None
        self._files: list[threading.Thread] = []
        self._main = threading.Thread(target=self._guard, args=(self._run,), name="criu-stream", daemon=True)
        self._main.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def error(self) -> DormouseError | None:
        """The first thing that went wrong on our side, if any."""
        return self._error

    def finish(self) -> None:
        """Wait until CRIU has closed the image and all files are through. Raises the first error."""
        self._hang_up(self._listener)  # CRIU has exited: if it never connected, it never will
        self._main.join()
        for thread in self._files:
            thread.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop now. CRIU, if it still runs, meets closed pipes and fails."""
        self._hang_up(self._listener)
        if self._peer is not None:
            self._hang_up(self._peer)
        self._main.join()
        for thread in self._files:
            thread.join()
        self._listener.close()

    def _serve(self, connection: _Connection) -> None:
        raise NotImplementedError

    def _run(self) -> None:
        try:
            peer, _addr = self._listener.accept()
        except OSError:
            return  # closed before CRIU connected; its exit code says why
        finally:
            self.connected_at = host_clock()
            self.connected.set()
        with peer:
            self._peer = peer
            self._serve(_Connection(peer))

    def _start_file(self, target: Callable[[], None], name: str, pipe: int) -> None:
        """Have a thread of its own take or give an image through `pipe`, which is the thread's to close."""
        thread = threading.Thread(target=self._guard, args=(target,), name=f"criu-image {name}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            os.close(pipe)
            raise HostError(f"no thread could be started for CRIU's image {name}: {error}") from error
        self._files.append(thread)

    def _guard(self, target: Callable[[], None]) -> None:
        with self._noting():
            target()

    @contextlib.contextmanager
    def _ending(self, pipe: int) -> Iterator[None]:
        """Close an image's pipe at the end. An error is noted before: CRIU meets the closed pipe and exits, and whoever
        sees that must find the reason."""
        try:
            with self._noting():
                yield
        finally:
            os.close(pipe)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except DormouseError as error:
            self._fail(error)
        except OSError as error:
            self._fail(system_failure("streaming CRIU's images failed", error))
        except Exception as error:  # the end of a thread must never pass for the end of an image
            log.exception("streaming CRIU's images failed")
            text = f"streaming CRIU's images failed: {error!r}"
            self._fail(HostError(text, remedy=REMEDY) if is_shortage(error) else SnapshotError(text))

    def _fail(self, error: DormouseError) -> None:
        with self._lock:
            self._error = self._error or error
        if self._peer is not None:
            self._hang_up(self._peer)

    @staticmethod
    def _hang_up(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):  # not connected, or closed already: hung up either way
            sock.shutdown(socket.SHUT_RDWR)


TakeMemory = Callable[[int, int], AddressSpace]
"""Captures the memory of the process with a pid (as CRIU knows it), whose page map comes through a pipe."""


class CaptureStream(_Stream):
    """Takes the images of `criu dump --stream -D directory` into a transaction; private memory by `take_memory`."""

    def __init__(self, directory: Path, ingest: Ingest, take_memory: TakeMemory) -> None:
        self._ingest = ingest
        self._take_memory = take_memory
        self._images: dict[str, ImageFile] = {}
        self._memory: dict[int, AddressSpace] = {}
        self._drained: dict[str, int] = {}
        self._asked: list[str] = []
        super().__init__(directory, CAPTURE_SOCKET)

    def memory(self) -> list[AddressSpace]:
        """After `finish`: the private memory of all processes, by pid. Raises SnapshotError when what was dropped as
        the pages of a process is not what its page map names, or when an image is not whole."""
        taken = len(self._images) + len(self._memory) + len(self._drained)
        if taken != len(self._asked):
            raise SnapshotError(f"CRIU sent {len(self._asked)} images, {taken} of them are whole")
        for name, pid in self._drained.items():
            if pid not in self._memory or self._memory[pid].pages_name != name:
                raise SnapshotError(f"CRIU sent {name} after the page map of process {pid}, which has other pages")
        return [self._memory[pid] for pid in sorted(self._memory)]

    def images(self) -> list[ImageFile]:
        """After `finish`: all images, by name."""
        return [self._images[name] for name in sorted(self._images)]

    def _serve(self, connection: _Connection) -> None:
        before = ""
        while (name := connection.read_name()) is not None:
            pipe = connection.receive_pipe()
            self._asked.append(name)
            self._start_file(self._taker(name, before, pipe), name, pipe)
            before = name

    def _taker(self, name: str, before: str, pipe: int) -> Callable[[], None]:
        """What takes an image. CRIU asks for the pages of a page map right after it."""
        pid = process_of(name)
        if pid is not None:
            return lambda: self._take_pages_of(pid, pipe)
        owner = process_of(before)
        if owner is not None and name.startswith("pages-"):
            self._drained[name] = owner
            return lambda: self._drop(pipe)
        return lambda: self._take(name, pipe)

    def _take_pages_of(self, pid: int, pipe: int) -> None:
        with self._ending(pipe):
            space = self._take_memory(pid, pipe)
            with self._lock:
                self._memory[pid] = space

    def _drop(self, pipe: int) -> None:
        with self._ending(pipe):
            drain(pipe)

    def _take(self, name: str, pipe: int) -> None:
        with self._ending(pipe):
            image = read_image(name, pipe, self._ingest)
            with self._lock:
                if name in self._images:
                    raise SnapshotError(f"CRIU wrote the image {name} twice")
                self._images[name] = image


def read_image(name: str, pipe: int, ingest: Ingest) -> ImageFile:
    """One image from its pipe: inline when small, else cut into chunks that go to `ingest` as they fill up."""
    chunks: list[Future[Digest]] = []
    size = 0
    while True:
        buffer = ingest.acquire()
        length = _fill(pipe, buffer)
        size += length
        last = length < len(buffer)
        if last and not chunks and size <= INLINE_LIMIT:
            inline = bytes(buffer[:length])
            ingest.release(buffer)
            return ImageFile(name=name, size=size, inline=inline)
        if length:
            chunks.append(ingest.submit(buffer[:length]))
        else:
            ingest.release(buffer)
        if last:
            return ImageFile(name=name, size=size, digests=b"".join(chunk.result() for chunk in chunks))


def _fill(pipe: int, buffer: memoryview) -> int:
    """Read until the buffer is full or the pipe ends; the number of bytes read."""
    length = 0
    while length < len(buffer):
        count = os.readv(pipe, [buffer[length:]])
        if count == 0:
            break
        length += count
    return length


Parts = Callable[[], Iterator[Buffer]]
"""Gives the bytes of an image, part after part, from the beginning at each call."""


def image_parts(image: ImageFile, chunks: ReadAhead) -> Generator[Buffer, None, None]:
    """The bytes of a stored image. Raises DamagedError."""
    if image.inline is not None:
        yield image.inline
    else:
        yield from chunks.stream(image.chunk_list())


class RestoreStream(_Stream):
    """Serves images by name to `criu restore --stream -D directory`."""

    def __init__(self, directory: Path, images: Mapping[str, Parts]) -> None:
        self.given_bytes = 0
        """What went through the pipes so far."""
        self._images = images
        super().__init__(directory, SERVE_SOCKET)

    def _serve(self, connection: _Connection) -> None:
        while (name := connection.read_name()) is not None:
            parts = self._images.get(name)
            connection.reply_exists(parts is not None)
            if parts is not None:
                pipe = connection.receive_pipe()
                give = lambda parts=parts, pipe=pipe: self._give(parts, pipe)  # noqa: E731
                self._start_file(give, name, pipe)

    def _give(self, parts: Parts, pipe: int) -> None:
        given = 0
        # CRIU closes an image it has seen enough of (it looks into some twice); if it died, its exit code tells.
        with self._ending(pipe), contextlib.suppress(BrokenPipeError):
            with contextlib.closing(_generator(parts)) as image:
                for part in image:
                    _drain(pipe, part)
                    given += len(part)
        with self._lock:
            self.given_bytes += given
            self.last_image_at = host_clock()


def _generator(parts: Parts) -> Generator[Buffer, None, None]:
    yield from parts()


def _drain(pipe: int, data: Buffer) -> None:
    """Write all of `data`."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(pipe, rest) :]
