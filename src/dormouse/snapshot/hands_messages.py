"""What the host service and its hands say to each other; msgpack, one message per packet.

    order socket, one per hand:       host service -> hand      BeginFill (with a descriptor), Go, Drop
    socket of a fill, all hands' end: host service -> hands     batches: each is taken by the hand that is first
                                      hand -> host service      Begun, Done

The kernel's queue of the second socket so is the queue of work: who is quick takes more. Its end is
the end of the work.
"""

from __future__ import annotations

import msgspec

from dormouse import errors
from dormouse.errors import DormouseError
from dormouse.snapshot.window_fill import WindowTask
from dormouse.store.chunk import MAX_CHUNK

MAX_PACKET = 1 << 20

BATCH_BYTES = MAX_CHUNK
"""Plain bytes of a batch at most."""


class BeginFill(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Take part in fill `errand`, whose socket comes along, under the number `hand`. Windows may be brought ahead into
    `ahead_bytes` of memory. `key` is the secret of the store's key, `packs` the folder of its packs."""

    errand: int
    hand: int
    key: bytes
    packs: str
    ahead_bytes: int


class Go(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The processes are there; their pids here, by those in their images."""

    errand: int
    pids: dict[int, int]


class Drop(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Nobody needs the fill any more. Answered by Done, unless that has been said."""

    errand: int


Order = BeginFill | Go | Drop


class Begun(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The first word of a hand in a fill; `pid` is its own."""

    hand: int
    pid: int


class Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An error of the tree in errors.py."""

    kind: str
    message: str
    remedy: str

    @classmethod
    def of(cls, error: DormouseError) -> Failure:
        return cls(type(error).__name__, error.message, error.remedy)

    def error(self) -> DormouseError:
        """As it was raised there."""
        return errors.of_kind(self.kind, self.message, self.remedy)


class Done(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The last word of a hand in a fill: it touches neither packs nor processes for it any more. `damaged` names the
    chunks that it has found to be so."""

    hand: int
    ahead_bytes: int
    written_bytes: int
    failure: Failure | None = None
    damaged: list[bytes] = []


Word = Begun | Done

_encoder = msgspec.msgpack.Encoder()
_orders: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_words: msgspec.msgpack.Decoder[Word] = msgspec.msgpack.Decoder(Word)
_batches = msgspec.msgpack.Decoder(list[WindowTask])


def encode(message: Order | Word | list[WindowTask]) -> bytes:
    """One packet."""
    return _encoder.encode(message)


def decode_order(packet: bytes) -> Order:
    """What a hand is told."""
    return _orders.decode(packet)


def decode_word(packet: bytes) -> Word:
    """What a hand says."""
    return _words.decode(packet)


def decode_batch(packet: bytes) -> list[WindowTask]:
    """Windows to be filled."""
    return _batches.decode(packet)
