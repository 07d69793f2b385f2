"""Captures the memory of stopped processes by the hands of the host service.

    thread of the ingest --Take--> a hand: reads the pages, drops zero ones, hashes
                         <--asks-- is this chunk stored? where does it go?      answered from the transaction
                                   codes, signs, writes it into the pack, at the place it was given
                         <-Taken-- which chunk has which pages

So the bytes never pass through this process, and the pack is as if it had written them itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from dormouse.errors import HostError
from dormouse.snapshot import hands_messages as messages
from dormouse.snapshot.hands import Hands
from dormouse.snapshot.memory_capture import ParentMemory
from dormouse.snapshot.memory_map import Span, mask_bytes
from dormouse.snapshot.shortage import REMEDY
from dormouse.snapshot.window_store import Stored, StoredPages
from dormouse.store.chunk import Digest
from dormouse.store.key import Key
from dormouse.store.transaction import Place, Transaction

log = logging.getLogger(__name__)

_SECONDS = 120.0
"""A window takes milliseconds; a hand that is just being started, and a disk that is behind, some seconds."""


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

    def store(self, pid: int, host_pid: int, span: Span, sparse: int) -> Stored:
        """Store the pages of a span of the process `pid`, here `host_pid`. Blocks until a hand is free, and until it is
        done. Raises SnapshotError, StoreError, and HostError when the hand dies."""
        take = messages.Take(
            pid=pid,
            host_pid=host_pid,
            number=span.number,
            width=span.width,
            mask=mask_bytes(span.mask, span.width),
            sparse=mask_bytes(sparse, span.width),
            old=self._parent.widths(pid, span) if self._parent is not None else None,
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
        reserved: tuple[Place, int] | None = None
        try:
            while not isinstance(ask := channel.hear(), messages.Taken):
                match ask:
                    case messages.Reserve():
                        place = self._transaction.reserve(ask.chunk)
                        if place is not None:
                            reserved = place, ask.chunk.stored_length
                        channel.say(_placed(place))
                    case messages.Written():
                        assert reserved is not None
                        self._transaction.written(*reserved, whole=True)
                        reserved = None
                    case _:
                        channel.say(self._answer(ask, pid))
        finally:
            if reserved is not None:
                self._transaction.written(*reserved, whole=False)
        for digest in ask.damaged:
            assert self._parent is not None
            self._parent.note_damage(Digest(digest))
        if ask.failure is not None:
            raise ask.failure.error()
        return {number: [_pages(*part) for part in parts] for number, parts in ask.stored.items()}

    def _answer(self, ask: messages.Has | messages.Lacks | messages.Pays | messages.Old, pid: int) -> messages.Said:
        match ask:
            case messages.Has():
                return messages.Yes(self._transaction.has(Digest(ask.digest), ask.length))
            case messages.Lacks():
                return messages.Yes(self._transaction.lacks(Digest(ask.digest), ask.length))
            case messages.Pays():
                return messages.Yes(self._pays(ask.stored))
            case messages.Old():
                return messages.OldIs(self._parent.task(pid, ask.number) if self._parent is not None else None)


def _placed(place: Place | None) -> messages.Placed:
    return messages.Placed() if place is None else messages.Placed(str(place.writer.path), place.offset)


def _pages(digest: bytes, held: bytes, used: bytes, width: int) -> StoredPages:
    return StoredPages(Digest(digest), int.from_bytes(held, "little"), int.from_bytes(used, "little"), width)


class _Channel:
    """The line to one hand; used by one thread at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._pid: int | None = None
        sock.settimeout(_SECONDS)

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
        if isinstance(error, TimeoutError):
            log.error("%s does not answer; it is killed", who)
            if self._pid is not None:
                os.kill(self._pid, signal.SIGKILL)
            return HostError(f"{who} took over {_SECONDS:.0f} s for a window of memory", remedy=REMEDY)
        return HostError(f"{who} died while memory was captured", remedy=REMEDY)
