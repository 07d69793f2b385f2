"""Captures the memory of stopped processes by the hands of the host service.

    thread of the ingest --Take--> a hand: reads the pages of a batch of windows, drops zero ones, hashes
                         <--asks-- which chunks are stored? where do the others go?  answered from the transaction
                                   codes, signs, writes them into the pack, at the places it was given
                         <-Taken-- which chunk has which pages

So the bytes never pass through this process, and the pack is as if it had written them itself. Each word that is heard
costs a thread here its turn for the interpreter's lock, which is why all questions are asked once for a whole batch: a
batch that has not changed is four words. What a hand asks for with Lacks and Reserve it owes: if it fails or dies
before Taken, its places are given up as never written, and nothing of the capture can be committed. So another hand
that has met the same chunk meanwhile need not wait for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

from dormouse.errors import HostError
from dormouse.snapshot import hands_messages as messages
from dormouse.snapshot.batches import batches, shrinking
from dormouse.snapshot.hands import Hands
from dormouse.snapshot.memory_capture import ParentMemory
from dormouse.snapshot.memory_map import Span, mask_bytes
from dormouse.snapshot.shortage import REMEDY
from dormouse.snapshot.window_store import SparseSpan, Stored
from dormouse.store.key import Key
from dormouse.store.transaction import Reserved, Transaction

log = logging.getLogger(__name__)

_SECONDS = 120
"""A batch takes milliseconds; a hand that is just being started, and a disk that is behind, some seconds."""


class HandCapture:
    """The hands at work on one capture. A context manager: no call may be under way at its end."""

    def __init__(
        self,
        hands: Hands,
        transaction: Transaction,
        parent: ParentMemory | None,
        *,
        key: Key,
        packs: Path,
        pays: Callable[[float], bool],
    ) -> None:
        """`pays`: whether floats are worth coding of which this share would be stored."""
        self._transaction = transaction
        self._parent = parent
        self._pays = pays
        self._idle: queue.SimpleQueue[_Channel] = queue.SimpleQueue()
        self._channels: list[_Channel] = []
        begin = messages.BeginCapture(hands.new_errand(), key.secret, str(packs))
        for hand in hands.crew():
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                channel = _Channel(ours)
                self._channels.append(channel)
                self._idle.put(channel)
                hand.order(begin, (theirs.fileno(),))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for channel in self._channels:
            channel.close()

    def batches(self, spans: Iterable[SparseSpan], total: int) -> Iterator[list[SparseSpan]]:
        """Spans of about `total` bytes as they are best given to `store`."""

        def limit(given: int) -> int:
            return shrinking(total - given, len(self._channels), messages.CAPTURE_BYTES)

        return batches(spans, lambda sparse_span: sparse_span[0].bytes, limit)

    def store(self, pid: int, host_pid: int, spans: Sequence[SparseSpan]) -> Stored:
        """Store the pages of spans of the process `pid`, here `host_pid`, a batch of `batches`. Blocks until a hand is
        free, and until it is done. Raises SnapshotError, StoreError, and HostError when the hand dies."""
        take = messages.Take(
            pid=pid,
            host_pid=host_pid,
            parts=[_part(span, sparse) for span, sparse in spans],
            old=self._parent.widths(pid, [span for span, _sparse in spans]) if self._parent is not None else None,
        )
        with self._channel() as channel:
            channel.say(take)
            return self._converse(channel, pid)

    @contextlib.contextmanager
    def _channel(self) -> Iterator[_Channel]:
        channel = self._idle.get()
        try:
            yield channel
        except BaseException:
            channel.close()  # who knows what the hand waits for; its next user gets an error, and none waits for ever
            raise
        finally:
            self._idle.put(channel)

    def _converse(self, channel: _Channel, pid: int) -> Stored:
        """Answer until the hand has stored all."""
        reserved: Reserved | None = None
        whole = False
        try:
            while not isinstance(ask := channel.hear(), messages.Taken):
                if isinstance(ask, messages.Reserve):
                    assert reserved is None
                    reserved = self._transaction.reserve(ask.chunks)
                    channel.say(messages.Placed(str(reserved.writer.path), reserved.offsets))
                else:
                    channel.say(self._answer(ask, pid))
            whole = ask.failure is None
        finally:
            if reserved is not None:
                self._transaction.written(reserved, whole=whole)
        for digest in ask.damaged:
            assert self._parent is not None
            self._parent.note_damage(digest)
        if ask.failure is not None:
            raise ask.failure.error()
        return ask.stored

    def _answer(self, ask: messages.Has | messages.Lacks | messages.Pays | messages.Old, pid: int) -> messages.Said:
        match ask:
            case messages.Has():
                return messages.Yes(self._transaction.has(ask.chunks))
            case messages.Lacks():
                return messages.Yes(self._transaction.lacks(ask.chunks))
            case messages.Pays():
                return messages.Yes(list(map(self._pays, ask.stored)))
            case messages.Old():
                assert self._parent is not None
                return messages.OldAre(self._parent.tasks(pid, ask.numbers))


def _part(span: Span, sparse: int) -> messages.Part:
    return messages.Part(span.number, span.width, mask_bytes(span.mask, span.width), mask_bytes(sparse, span.width))


class _Channel:
    """The line to one hand; used by one thread at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._pid: int | None = None
        # By the kernel: Python's own time limit is a second call for each word, and so a second turn for the lock.
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", _SECONDS, 0))

    def say(self, said: messages.Said) -> None:
        """Raises HostError."""
        try:
            self._sock.send(messages.encode(said))
        except OSError as error:
            raise self._lost(error) from error

    def hear(self) -> messages.Ask:
        """What the hand asks or tells next. Raises HostError when it has died, or does not answer."""
        try:
            packet = self._sock.recv(messages.MAX_PACKET)
            if packet and self._pid is None:
                self._pid = messages.decode_pid(packet)
                packet = self._sock.recv(messages.MAX_PACKET)
        except OSError as error:
            raise self._lost(error) from error
        if not packet:
            raise self._lost(None)
        return messages.decode_ask(packet)

    def close(self) -> None:
        self._sock.close()

    def _lost(self, error: OSError | None) -> HostError:
        who = f"helper process {self._pid}" if self._pid is not None else "a helper process that had not begun"
        if isinstance(error, BlockingIOError):  # the time is up
            log.error("%s does not answer; it is killed", who)
            if self._pid is not None:
                os.kill(self._pid, signal.SIGKILL)
            return HostError(f"{who} took over {_SECONDS} s for a window of memory", remedy=REMEDY)
        return HostError(f"{who} died while memory was captured", remedy=REMEDY)
