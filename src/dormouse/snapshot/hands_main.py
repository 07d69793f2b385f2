"""The program of the hands: processes of one thread each that bring back memory for the host service, side by side as
threads of Python can't be (each step of theirs would wait for the interpreter's lock).

    foreman: imports all that a hand needs, then --one packet, one socket each--> forks a hand
    hand:    order socket + the sockets of its fills --poll--> one batch after another

Forked hands share the memory of what was imported, and a new one is there in a millisecond. Started as
`python -m dormouse.snapshot.hands_main --fd N`. Foreman and hands end when the host service's ends of their sockets
close, in whatever way it died.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import select
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import compress
from pathlib import Path

from dormouse.errors import DormouseError, HostError, SnapshotError, StoreError
from dormouse.snapshot import hands_messages as messages
from dormouse.snapshot.memory_map import Span, assemble, check_length, held_mask, window_mask
from dormouse.snapshot.process_memory import ProcessMemory
from dormouse.snapshot.shortage import REMEDY, is_shortage
from dormouse.snapshot.window_fill import WindowReader, WindowTask
from dormouse.snapshot.window_store import Named, OldWindow, SparseSpan, Stored, store_spans
from dormouse.store.chunk import Buffer, Digest
from dormouse.store.codec import FLOATS, Codec, encode
from dormouse.store.files import system_errors, write_all
from dormouse.store.key import Key
from dormouse.store.pack import StoredChunk, aligned, chunk_mac
from dormouse.store.pack_reader import PackReader
from dormouse.transfer.bulk_codec import guess
from dormouse.transfer.ingest import LARGE
from dormouse.transfer.memory import anonymous, keep_freed_memory

log = logging.getLogger(__name__)

_MOST_DESCRIPTORS = 4


class Ahead:
    """Memory for pages whose process is not there yet, given out piece by piece."""

    def __init__(self, size: int) -> None:
        self._memory = memoryview(anonymous(size)) if size else memoryview(b"")
        self._used = 0
        self.held: list[tuple[WindowTask, memoryview]] = []

    @property
    def room(self) -> int:
        """Bytes that are left."""
        return len(self._memory) - self._used

    def take(self, length: int) -> memoryview:
        """Memory that begins at a page."""
        at, self._used = self._used, self._used + aligned(length)
        return self._memory[at : at + length]

    def hold(self, task: WindowTask, pages: memoryview) -> None:
        """Keep pages, which lie in memory of `take` or elsewhere."""
        if pages.obj is not self._memory.obj:
            kept = self.take(len(pages))
            kept[:] = pages
            pages = kept
        self.held.append((task, pages))


class FillPart:
    """What one hand does of one fill."""

    def __init__(self, begin: messages.BeginFill, queue: socket.socket) -> None:
        self.queue = queue
        self._hand = begin.hand
        self._damaged: list[bytes] = []
        self._reader = PackReader(Path(begin.packs), Key(begin.key), self._damaged.append)
        self._windows = WindowReader(self._reader)
        self._ahead = Ahead(0)
        self._memories: dict[int, ProcessMemory] | None = None
        self._opened = contextlib.ExitStack()
        self._ahead_bytes = self._written_bytes = 0
        self._through = False
        self.done = False

    def prepare(self, ahead_bytes: int) -> None:
        """Take the memory for what is brought ahead."""
        self._ahead = Ahead(ahead_bytes)

    @property
    def wants_work(self) -> bool:
        """Whether it would take another batch now."""
        return not self._through and (self._memories is not None or self._ahead.room >= messages.BATCH_BYTES)

    def go(self, pids: Mapping[int, int]) -> None:
        """Write what is held, and from now on each batch at once."""
        self._memories = {}
        for pid, host_pid in pids.items():
            self._memories[pid] = self._opened.enter_context(ProcessMemory(host_pid))
        for task, pages in self._ahead.held:
            self._write(task, pages)
        self._ahead = Ahead(0)
        self._end_if_through()

    def step(self) -> None:
        """Take a batch, if no other hand has been quicker."""
        try:
            packet = self.queue.recv(messages.MAX_PACKET, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if not packet:
            self._through = True
            self._end_if_through()
            return
        batch = messages.decode_batch(packet)
        self._windows.advise(chunk for task in batch for chunk in task.chunks)
        for task in batch:
            if self._memories is None:
                self._ahead.hold(task, self._windows.pages(task, self._ahead.take))
                self._ahead_bytes += task.plain_bytes
            else:
                self._write(task, self._windows.pages(task, self._windows.buffer))

    def end(self, failure: messages.Failure | None) -> None:
        """Let go of everything and say so. Idempotent."""
        if self.done:
            return
        self.done = True
        self._ahead = Ahead(0)
        self._opened.close()
        self._windows.close()
        self._reader.close()
        done = messages.Done(self._hand, self._ahead_bytes, self._written_bytes, failure, self._damaged)
        with self.queue:
            try:
                self.queue.send(messages.encode(done))
            except ConnectionError as error:
                log.info("nobody waits for the end of a fill: %s", error)

    def _end_if_through(self) -> None:
        if self._through and self._memories is not None:
            self.end(None)

    def _write(self, task: WindowTask, pages: memoryview) -> None:
        assert self._memories is not None
        memory = self._memories[task.pid]
        self._written_bytes += memory.write(task.window.number, window_mask(task.window), pages)


class CapturePart:
    """What one hand does of one capture. As a store's transaction would `Put` (window_store.py): it asks what it does
    not know. And as a `Parent`: the windows of the parent snapshot that lie where the pages are from.

    A batch takes twice CAPTURE_BYTES: its pages, and what they are coded to, until there are places for it."""

    wants_work = True

    def __init__(self, begin: messages.BeginCapture, channel: socket.socket) -> None:
        self.queue = channel
        self.done = False
        self.turn = contextlib.nullcontext()
        self._damaged: list[Digest] = []
        self._key = Key(begin.key)
        self._reader = PackReader(Path(begin.packs), self._key, self._damaged.append)
        self._memories: dict[int, ProcessMemory] = {}
        self._packs: dict[str, int] = {}
        self._opened = contextlib.ExitStack()
        self._buffer = memoryview(anonymous(messages.CAPTURE_BYTES))
        self._old: dict[int, int] | None = None

    def step(self) -> None:
        """Carry out one Take."""
        packet = self.queue.recv(messages.MAX_PACKET)
        if not packet:
            self.end(None)
            return
        take = messages.decode_said(packet)
        assert isinstance(take, messages.Take)
        self._old = take.old
        read = self._memory(take.host_pid).read_spans(map(_span, take.parts), self._buffer)
        parent = self if take.old is not None else None
        self._taken(store_spans(read, take.pid, parent, self), None)

    def end(self, failure: messages.Failure | None) -> None:
        """Say what went wrong, which ends the step and not the capture; without a failure, let go of everything."""
        if failure is not None:
            try:
                self._taken({}, failure)
                return
            except ConnectionError as error:
                log.info("nobody waits for this error, %s: %s", error, failure.message)
        self.done = True
        self._opened.close()
        self._reader.close()
        self.queue.close()

    def _taken(self, stored: Stored, failure: messages.Failure | None) -> None:
        damaged = list(self._damaged)
        self._damaged.clear()
        self._tell(messages.Taken(stored, failure, damaged))

    # Put

    def known(self, chunks: Sequence[Named]) -> list[bool]:
        return self._asked_yes(messages.Has(_lengths(chunks)))

    def __call__(self, chunks: Sequence[Named]) -> None:
        new = list(compress(chunks, self._asked_yes(messages.Lacks(_lengths(chunks)))))
        if not new:
            return
        codecs = self._codecs([memoryview(plain) for _digest, plain in new])
        coded = [self._coded(*chunk, codec) for chunk, codec in zip(new, codecs, strict=True)]
        placed = self._asked(messages.Reserve([chunk for chunk, _stored in coded]))
        assert isinstance(placed, messages.Placed)
        for (_chunk, stored), offset in zip(coded, placed.offsets, strict=True):
            if offset is not None:
                with system_errors(Path(placed.path), "writing to", len(stored)):
                    write_all(self._pack(placed.path), stored, offset)

    def _coded(self, digest: Digest, plain: Buffer, wanted: Codec) -> tuple[StoredChunk, Buffer]:
        codec, stored = encode(plain, wanted)
        mac = chunk_mac(self._key, digest, codec, len(plain), stored)
        return StoredChunk(digest, mac, 0, 0, len(stored), len(plain), codec), stored

    def _codecs(self, plains: Sequence[memoryview]) -> list[Codec]:
        """As threads choose, but zstd for LZ4: pages of an engine take a third less, and there are cores enough to
        decode them while CRIU works."""
        guesses = [guess(plain) if len(plain) >= LARGE else (Codec.LZ4, 0.0) for plain in plains]
        floats = [stored for codec, stored in guesses if codec in FLOATS]
        pays = iter(self._asked_yes(messages.Pays(floats)) if floats else [])
        return [_codec(codec, pays) for codec, _stored in guesses]

    # Parent

    def has(self, pid: int, span: Span) -> bool:
        return self._old is not None and self._old.get(span.number) == span.width

    def cuts_narrow(self, pid: int, span: Span) -> bool:
        return any(self.has(pid, Span(span.number + at, 0)) for at in range(span.width))

    def windows(self, pid: int, numbers: Sequence[int]) -> Iterator[OldWindow | None]:
        answer = self._asked(messages.Old(list(numbers)))
        assert isinstance(answer, messages.OldAre)
        return map(self._window, answer.tasks)

    def _window(self, task: WindowTask | None) -> OldWindow | None:
        if task is None:
            return None
        window, chunks = task.window, task.chunks
        try:
            for piece, chunk in zip(window.pieces, chunks, strict=True):
                check_length(chunk.plain_length, held_mask(piece), chunk.digest)
            pages = assemble(window, lambda at: self._reader.plain(chunks[at]))
        except StoreError as error:
            log.warning("a window of the parent snapshot can't be read, it is stored anew: %s", error)
            return None
        return window, [chunk.digest for chunk in chunks], pages

    def _asked_yes(self, ask: messages.Ask) -> list[bool]:
        answer = self._asked(ask)
        assert isinstance(answer, messages.Yes)
        return answer.yes

    def _asked(self, ask: messages.Ask) -> messages.Said:
        self._tell(ask)
        packet = self.queue.recv(messages.MAX_PACKET)
        if not packet:
            raise ConnectionResetError("nobody waits for the capture any more")
        return messages.decode_said(packet)

    def _tell(self, ask: messages.Ask) -> None:
        self.queue.send(messages.encode(ask))

    def _memory(self, host_pid: int) -> ProcessMemory:
        if host_pid not in self._memories:
            self._memories[host_pid] = self._opened.enter_context(ProcessMemory(host_pid))
        return self._memories[host_pid]

    def _pack(self, path: str) -> int:
        if path not in self._packs:
            fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            self._opened.callback(os.close, fd)
            self._packs[path] = fd
        return self._packs[path]


def _span(part: messages.Part) -> SparseSpan:
    return Span(part.number, int.from_bytes(part.mask, "little"), part.width), int.from_bytes(part.sparse, "little")


def _lengths(chunks: Sequence[Named]) -> list[tuple[Digest, int]]:
    return [(digest, len(plain)) for digest, plain in chunks]


def _codec(guessed: Codec, pays: Iterator[bool]) -> Codec:
    if guessed in FLOATS:
        return guessed if next(pays) else Codec.RAW
    return Codec.ZSTD if guessed is Codec.LZ4 else guessed


Part = FillPart | CapturePart


class Hand:
    """One hand: takes part in any number of fills and captures at once, a batch of one at a time."""

    def __init__(self, orders: socket.socket) -> None:
        self._orders = orders
        self._parts: dict[int, Part] = {}

    def run(self) -> None:
        """Until the host service is gone."""
        while True:
            waiting = {part.queue.fileno(): part for part in self._parts.values() if part.wants_work}
            ready = _readable([self._orders.fileno(), *waiting])
            if self._orders.fileno() in ready and not self._obey():
                return
            for number in ready & waiting.keys():
                self._guarded(waiting[number], waiting[number].step)
            self._parts = {errand: part for errand, part in self._parts.items() if not part.done}

    def _obey(self) -> bool:
        """Take an order; False when there will be none any more."""
        packet, descriptors, _flags, _address = socket.recv_fds(
            self._orders, messages.MAX_PACKET, _MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
        )
        if not packet:
            return False
        order = messages.decode_order(packet)
        if isinstance(order, messages.BeginCapture):
            (descriptor,) = descriptors
            channel = socket.socket(fileno=descriptor)
            channel.send(messages.encode(messages.Begun(0, os.getpid())))
            self._parts[order.errand] = CapturePart(order, channel)
            return True
        if isinstance(order, messages.BeginFill):
            (descriptor,) = descriptors
            queue = socket.socket(fileno=descriptor)
            queue.send(messages.encode(messages.Begun(order.hand, os.getpid())))
            begun = self._parts[order.errand] = FillPart(order, queue)
            self._guarded(begun, partial(begun.prepare, order.ahead_bytes))
            return True
        part = self._parts.get(order.errand)
        if not isinstance(part, FillPart):
            pass  # it has failed, and said so
        elif isinstance(order, messages.Go):
            self._guarded(part, partial(part.go, order.pids))
        else:
            part.end(None)
        return True

    def _guarded(self, part: Part, step: Callable[[], None]) -> None:
        if part.done:
            return
        try:
            step()
        except DormouseError as error:
            part.end(messages.Failure.of(error))
        except ConnectionError as error:
            log.info("somebody hung up: %s", error)
            part.end(None)
        except Exception as error:  # whatever it is, it is the end of this piece of work and of no other
            log.exception("a piece of work failed")
            kind, remedy = (HostError, REMEDY) if is_shortage(error) else (SnapshotError, "")
            part.end(messages.Failure.of(kind(f"unexpected {type(error).__name__}: {error}", remedy=remedy)))


def _readable(numbers: Iterable[int]) -> set[int]:
    poll = select.poll()
    for number in numbers:
        poll.register(number, select.POLLIN)
    return {number for number, _event in poll.poll()}


def serve(sock: socket.socket) -> None:
    """The foreman: fork a hand for each socket that comes, until the host service is gone. In a hand, returns when that
    is through."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for hands: the host service sees their sockets close
    while True:
        packet, descriptors, _flags, _address = socket.recv_fds(sock, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not packet:
            return
        with socket.socket(fileno=descriptors[0]) as orders:
            if os.fork() == 0:
                sock.close()
                Hand(orders).run()
                return


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    keep_freed_memory()
    gc.collect()
    gc.freeze()  # the collector then leaves the memory that hands share alone
    with socket.socket(fileno=arguments.fd) as sock:
        sock.set_inheritable(False)
        try:
            serve(sock)
        except ConnectionError as error:
            log.warning("the host service is gone in the middle of something: %s", error)
    os._exit(0)


if __name__ == "__main__":
    main()
