"""Fills the memory of restored processes by the hands of the host service.

    begin: a socket of this fill goes to every hand; batches of windows go into it, the hands take them, read, check,
           decode, and hold the pages as long as there is room
    run:   the pids go to every hand; it writes what it holds, then batch after batch until the socket ends

One thread of this process feeds the socket and listens. The first error, or the death of a hand, ends the fill for all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from dormouse.errors import DormouseError, HostError
from dormouse.phases import host_clock
from dormouse.snapshot import hands_messages as messages
from dormouse.snapshot.batches import batches, even
from dormouse.snapshot.hands import Hand, Hands
from dormouse.snapshot.memory_restore import Fill, MemoryPlan, ThreadFill
from dormouse.snapshot.shortage import REMEDY
from dormouse.store.chunk import Digest
from dormouse.store.store import Reader

log = logging.getLogger(__name__)

_LARGE_BATCH = 8 << 20
_WORTH_A_HAND = 2 << 20
_QUEUE_BYTES = 4 << 20

_LOOK_SECONDS = 0.1
_START_SECONDS = 60.0
_SLOWEST = 20e6
_DROP_SECONDS = 10.0


def make_fill(plans: Iterable[MemoryPlan], reader: Reader, hands: Hands) -> Fill:
    """The fill that suits the machine. Raises DamagedError."""
    return HandFill(plans, reader, hands) if hands.count else ThreadFill(plans, reader)


class HandFill(Fill):
    """By hands."""

    def __init__(self, plans: Iterable[MemoryPlan], reader: Reader, hands: Hands) -> None:
        super().__init__(plans, reader)
        self._hands = hands
        self._granted = 0
        self._lock = threading.Lock()
        self._running = False
        self._shift: _Shift | None = None
        self._driver = ThreadPoolExecutor(1, thread_name_prefix="fill")
        self._done: Future[None] | None = None

    def __exit__(self, *_exception: object) -> None:
        with self._lock:
            self._running = True
        if self._shift is not None:
            self._shift.give_up()
        self._driver.shutdown()
        self._hands.give_ahead(self._granted)
        self._granted = 0

    def begin(self) -> None:
        with self._lock:
            if not self._running and self._done is None:
                self.begun = host_clock()
                try:
                    self._start()
                except HostError as error:  # `run` tries again, and tells who waits
                    log.warning("memory is not read ahead: %s", error)

    def run(self, host_pids: Mapping[int, int]) -> None:
        with self._lock:
            self._running = True
            self.run_at = host_clock()
            if self._done is None:
                self._start()
        if self._shift is not None and self._done is not None:
            self._shift.go(host_pids)
            try:
                self._done.result()
            finally:
                self.ahead_bytes = self._shift.ahead_bytes
                for digest in self._shift.damaged:
                    self._reader.note_damage(digest)

    def _start(self) -> None:
        """Raises HostError when there are no hands to be had."""
        total = self.plain_bytes
        if not total:
            return
        crew = self._hands.crew()
        crew = crew[: max(1, min(len(crew), total // _WORTH_A_HAND))]
        self._granted = self._hands.take_ahead(total + 2 * messages.BATCH_BYTES * len(crew))
        size = even(total, len(crew), _LARGE_BATCH)
        lots = batches(self._tasks(), lambda task: task.plain_bytes, lambda _given: size)
        packets = map(messages.encode, lots)
        begin = messages.BeginFill(
            errand=self._hands.new_errand(),
            hand=0,
            key=self._reader.key.secret,
            packs=str(self._reader.packs),
            ahead_bytes=self._granted // len(crew),
        )
        self._shift = _Shift(crew, begin, packets, seconds=_START_SECONDS + total / _SLOWEST)
        self._done = self._driver.submit(self._shift.drive)


class _Shift:
    """The hands at work on one fill."""

    def __init__(
        self, crew: Sequence[Hand], begin: messages.BeginFill, packets: Iterator[bytes], *, seconds: float
    ) -> None:
        self.damaged: set[Digest] = set()
        self.ahead_bytes = 0
        self._errand = begin.errand
        self._packets = packets
        self._packet: bytes | None = None
        self._seconds = seconds
        self._deadline: float | None = None
        self._pids: dict[int, int] = {}
        self._error: DormouseError | None = None
        self._given_up = threading.Event()
        self._near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _QUEUE_BYTES)
        self._near.setblocking(False)
        self._at_work = dict(enumerate(crew))
        try:
            with far:
                for number, hand in self._at_work.items():
                    hand.order(_numbered(begin, number), (far.fileno(),))
        except BaseException:
            self._near.close()
            for hand in crew:
                with contextlib.suppress(HostError):
                    hand.order(messages.Drop(self._errand))
            raise

    def go(self, host_pids: Mapping[int, int]) -> None:
        """The processes are there."""
        self._deadline = time.monotonic() + self._seconds
        for hand in list(self._at_work.values()):
            hand.order(messages.Go(self._errand, dict(host_pids)))

    def give_up(self) -> None:
        """Nobody needs it any more; `drive` then ends soon."""
        self._given_up.set()

    def drive(self) -> None:
        """Feed the hands and listen, until no hand is at work any more. Raises the first error."""
        with self._near:
            try:
                self._next()
                while self._at_work and self._error is None and not self._given_up.is_set():
                    self._turn()
                    if self._deadline is not None and time.monotonic() > self._deadline:
                        self._fail(HostError(f"helper processes took over {self._seconds:.0f} s", remedy=REMEDY))
            finally:
                self._drop()
        if self._error is not None:
            raise self._error

    def _turn(self) -> None:
        """Wait for something, and do what can be done."""
        poll = select.poll()
        poll.register(self._near, select.POLLIN | (select.POLLOUT if self._packet is not None else 0))
        for hand in self._at_work.values():
            poll.register(hand.orders, select.POLLIN)
        ready = {number for number, _event in poll.poll(_LOOK_SECONDS * 1000)}
        dead = [number for number, hand in self._at_work.items() if hand.orders.fileno() in ready]
        self._listen()
        for number in dead:  # after what it may have said last
            self._bury(number)
        self._feed()

    def _listen(self) -> None:
        while self._at_work:
            try:
                packet = self._near.recv(messages.MAX_PACKET)
            except BlockingIOError:
                return
            except ConnectionResetError:  # said once, when the last hand has left work undone; what it said comes next
                continue
            if not packet:
                return
            word = messages.decode_word(packet)
            if isinstance(word, messages.Begun):
                self._pids[word.hand] = word.pid
                continue
            self._at_work.pop(word.hand, None)
            self.ahead_bytes += word.ahead_bytes
            self.damaged.update(map(Digest, word.damaged))
            if word.failure is not None:
                self._fail(word.failure.error())

    def _bury(self, number: int) -> None:
        if self._at_work.pop(number, None) is not None:
            who = self._pids.get(number, "that had not begun")
            self._fail(HostError(f"helper process {who} died while memory was filled", remedy=REMEDY))

    def _feed(self) -> None:
        while self._packet is not None and self._error is None:
            try:
                self._near.send(self._packet)
            except BlockingIOError:
                return
            except ConnectionError:  # no hand is left, which is found out by itself
                self._packet = None
                return
            self._next()

    def _next(self) -> None:
        self._packet = next(self._packets, None)
        if self._packet is None:
            self._near.shutdown(socket.SHUT_WR)

    def _fail(self, error: DormouseError) -> None:
        if self._error is None:
            self._error = error
        else:
            log.info("another helper process: %s", error)

    def _drop(self) -> None:
        """Have those that are still at work stop; kill who does not."""
        for hand in self._at_work.values():
            with contextlib.suppress(HostError):  # it is killed then
                hand.order(messages.Drop(self._errand))
        deadline = time.monotonic() + _DROP_SECONDS
        self._packet = None
        while self._at_work:
            if time.monotonic() > deadline:
                for number, hand in self._at_work.items():
                    self._kill(number, hand)
                deadline += _DROP_SECONDS
            self._turn()

    def _kill(self, number: int, hand: Hand) -> None:
        pid = self._pids.get(number)
        log.error("helper process %s does not answer; it is killed", pid)
        if pid is not None and hand.alive:
            os.kill(pid, signal.SIGKILL)
        else:
            hand.orders.shutdown(socket.SHUT_RDWR)


def _numbered(begin: messages.BeginFill, number: int) -> messages.BeginFill:
    return messages.BeginFill(begin.errand, number, begin.key, begin.packs, begin.ahead_bytes)
