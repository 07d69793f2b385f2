"""The hands of the host service: helper processes of one thread each, started together and kept warm, that do on many
cores what threads of Python can't (hands_main.py is their program, hand_fill.py gives them work).

    Hands.warm() --socket--> foreman --fork--> hand, hand, ...        crew(): those that live, dead ones replaced

A hand gets its orders through a socket of its own. It ends when that closes, so hands never outlive the host service.
"""

from __future__ import annotations

import itertools
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from typing import Self

from dormouse import host_memory
from dormouse.errors import HostError
from dormouse.snapshot import hands_messages as messages
from dormouse.snapshot.shortage import REMEDY

log = logging.getLogger(__name__)

_MOST = 12
"""More gain little: the kernel's own locks and the memory bus are what is waited for then."""
_FEWEST_CORES = 3
_AHEAD_LIMIT = 1536 << 20
_AHEAD_SHARE = 0.03
_SEND_SECONDS = 10.0
_END_SECONDS = 10.0


def hands_for(cores: int) -> int:
    """How many hands a machine with so many cores is to have. Where there are two, threads do as well."""
    return min(cores - 1, _MOST) if cores >= _FEWEST_CORES else 0


def ahead_limit(total: int, available: int) -> int:
    """Bytes of pages that all hands together may hold before their processes are there, on a machine with so much
    memory, of which so much is available."""
    return min(_AHEAD_LIMIT, int(total * _AHEAD_SHARE), available // 4)


class Hand:
    """One hand, as the host service sees it."""

    def __init__(self, orders: socket.socket) -> None:
        self.orders = orders
        """It never says anything through this, so that there is something to read means that it has died."""
        orders.settimeout(_SEND_SECONDS)

    @property
    def alive(self) -> bool:
        """Whether it has not died."""
        poll = select.poll()
        poll.register(self.orders, select.POLLIN)
        return not poll.poll(0)

    def order(self, order: messages.Order, descriptors: tuple[int, ...] = ()) -> None:
        """Tell it something. What can't be told to one that has died is lost, and its death is seen all the same."""
        try:
            socket.send_fds(self.orders, [messages.encode(order)], descriptors)
        except ConnectionError as error:
            log.warning("a hand takes no orders: %s", error)
        except OSError as error:
            raise HostError(f"a helper process takes no orders: {error}", remedy=REMEDY) from error


class Hands:
    """All hands of this process. Any thread may call. A context manager."""

    def __init__(self, count: int) -> None:
        """`count` 0: none, threads do the work."""
        self.count = count
        self._lock = threading.Lock()
        self._errands = itertools.count(1)
        self._hands: list[Hand] = []
        self._foreman: subprocess.Popen[bytes] | None = None
        self._to_foreman: socket.socket | None = None
        self._held = 0
        self._closed = False

    @classmethod
    def of_this_machine(cls) -> Self:
        """As many as the cores that this process may use are worth."""
        return cls(hands_for(len(os.sched_getaffinity(0))))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def warm(self) -> None:
        """Have them started, without waiting for it. Raises HostError."""
        if self.count:
            self.crew()

    def crew(self) -> list[Hand]:
        """All hands, new ones in place of those that have died. Those that are being started take orders already, and
        carry them out when they are there. Raises HostError."""
        with self._lock:
            if self._closed:
                raise HostError("the helper processes have been ended", remedy="Try again")
            living = []
            for hand in self._hands:
                if hand.alive:
                    living.append(hand)
                else:
                    log.error("a helper process has died; another takes its place")
                    hand.orders.close()
            self._hands = living
            while len(self._hands) < self.count:
                self._hands.append(self._new())
            return list(self._hands)

    def new_errand(self) -> int:
        """A number for a piece of work that hands are given."""
        return next(self._errands)

    def take_ahead(self, wanted: int) -> int:
        """Bytes that the hands may hold ahead for one piece of work: as many as wanted, or what is left. To be given
        back."""
        limit = ahead_limit(host_memory.total(), host_memory.available())
        with self._lock:
            granted = max(0, min(wanted, limit - self._held))
            self._held += granted
        return granted

    def give_ahead(self, granted: int) -> None:
        """Give back what `take_ahead` gave."""
        with self._lock:
            self._held -= granted

    def close(self) -> None:
        """End them all. They may not be at work. Idempotent."""
        with self._lock:
            self._closed = self.count > 0
            for hand in self._hands:
                hand.orders.close()
            self._hands = []
            self._drop_foreman()

    def _new(self) -> Hand:
        """A hand; a new foreman forks it if the last has died."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                for _attempt in range(2):
                    if self._to_foreman is None:
                        self._start_foreman()
                    assert self._to_foreman is not None
                    try:
                        socket.send_fds(self._to_foreman, [b"+"], [theirs.fileno()])
                        return Hand(ours)
                    except ConnectionError:
                        log.error("the process that starts helper processes has died")
                        self._drop_foreman()
                raise HostError("helper processes die as soon as they are started", remedy=REMEDY)
            except OSError as error:
                ours.close()
                raise HostError(f"a helper process could not be started: {error}", remedy=REMEDY) from error
            except BaseException:
                ours.close()
                raise

    def _start_foreman(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._foreman = subprocess.Popen(
                    [sys.executable, "-m", "dormouse.snapshot.hands_main", "--fd", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # more of its threads than one, and it can't fork
                    start_new_session=True,  # what is typed at a terminal is not for them
                )
            except BaseException:
                ours.close()
                raise
        ours.settimeout(_SEND_SECONDS)
        self._to_foreman = ours

    def _drop_foreman(self) -> None:
        if self._to_foreman is not None:
            self._to_foreman.close()
        foreman, self._foreman, self._to_foreman = self._foreman, None, None
        if foreman is not None:
            try:
                foreman.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                log.error("the process that starts helper processes does not end; it is killed")
                foreman.send_signal(signal.SIGKILL)
                foreman.wait()


NO_HANDS = Hands(0)
"""For where threads are to do the work."""
