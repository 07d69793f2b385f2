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
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from dormouse.errors import DormouseError, HostError, SnapshotError
from dormouse.snapshot import hands_messages as messages
from dormouse.snapshot.memory_map import window_mask
from dormouse.snapshot.process_memory import ProcessMemory
from dormouse.snapshot.shortage import REMEDY, is_shortage
from dormouse.snapshot.window_fill import WindowReader, WindowTask
from dormouse.store.key import Key
from dormouse.store.pack import aligned
from dormouse.store.pack_reader import PackReader
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
            self.queue.send(messages.encode(done))

    def _end_if_through(self) -> None:
        if self._through and self._memories is not None:
            self.end(None)

    def _write(self, task: WindowTask, pages: memoryview) -> None:
        assert self._memories is not None
        memory = self._memories[task.pid]
        self._written_bytes += memory.write(task.window.number, window_mask(task.window), pages)


class Hand:
    """One hand: takes part in any number of fills at once, a batch of one at a time."""

    def __init__(self, orders: socket.socket) -> None:
        self._orders = orders
        self._parts: dict[int, FillPart] = {}

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
        if isinstance(order, messages.BeginFill):
            (descriptor,) = descriptors
            queue = socket.socket(fileno=descriptor)
            queue.send(messages.encode(messages.Begun(order.hand, os.getpid())))
            begun = self._parts[order.errand] = FillPart(order, queue)
            self._guarded(begun, partial(begun.prepare, order.ahead_bytes))
        elif (part := self._parts.get(order.errand)) is None:
            pass  # it has failed, and said so
        elif isinstance(order, messages.Go):
            self._guarded(part, partial(part.go, order.pids))
        else:
            part.end(None)
        return True

    def _guarded(self, part: FillPart, step: Callable[[], None]) -> None:
        if part.done:
            return
        try:
            step()
        except DormouseError as error:
            part.end(messages.Failure.of(error))
        except Exception as error:  # whatever it is, it is the end of this fill and of no other
            log.exception("a fill failed")
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
    import dormouse.store.floats  # noqa: F401 (now, not in the middle of a wake: it brings numpy)

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
