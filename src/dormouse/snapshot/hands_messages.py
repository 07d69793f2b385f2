"""What the host service and its hands say to each other; msgpack, one message per packet.

    order socket, one per hand:       host service -> hand      BeginFill (with a descriptor), Go, Drop
    socket of a fill, all hands' end: host service -> hands     batches: each is taken by the hand that is first
                                      hand -> host service      Begun, Done
    socket of a capture, one per hand: host service -> hand     Take, then answers to what it asks
                                      hand -> host service      questions, each once for all of the batch, then Taken

The kernel's queue of the second socket so is the queue of work: who is quick takes more. Its end is
the end of the work.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from dormouse import errors
from dormouse.errors import DormouseError
from dormouse.snapshot.window_fill import WindowTask
from dormouse.snapshot.window_store import Stored
from dormouse.store.chunk import MAX_CHUNK, Digest
from dormouse.store.pack import StoredChunk

MAX_PACKET = 1 << 20

BATCH_BYTES = MAX_CHUNK
"""Plain bytes of a batch at most."""

CAPTURE_BYTES = 16 << 20
"""Pages of a Take at most: a hand has room for them, and for as much of what they are coded to."""


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


class BeginCapture(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Take part in capture `errand`; its socket, which no other hand has, comes along. It ends with that socket."""

    errand: int
    key: bytes
    packs: str


Order = BeginFill | Go | Drop | BeginCapture


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


class Part(NamedTuple):
    """Pages `mask` of a window. Of those in `sparse`, zero ones are dropped."""

    number: int
    width: int
    mask: bytes
    sparse: bytes


class Take(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Store a batch of pages of the process `pid` (as its images have it), together CAPTURE_BYTES at most. `old`: the
    windows that the parent snapshot has there, and their widths."""

    pid: int
    host_pid: int
    parts: list[Part]
    old: dict[int, int] | None


class Has(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Are these chunks (name, length) stored already? Answered by Yes."""

    chunks: list[tuple[Digest, int]]


class Lacks(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """These chunks (name, length) are used; must they be stored? Answered by Yes."""

    chunks: list[tuple[Digest, int]]


class Pays(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Do floats pay, of which these shares would be stored? Answered by Yes."""

    stored: list[float]


class Reserve(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Chunks as they will be stored want places, once in a Take. Answered by Placed. Taken says whether they are
    there."""

    chunks: list[StoredChunk]


class Old(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Windows of the parent snapshot are wanted. Answered by OldAre."""

    numbers: list[int]


class Taken(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The end of a Take: what was stored, by window; without a failure, all that was reserved is written."""

    stored: Stored
    failure: Failure | None = None
    damaged: list[Digest] = []


Ask = Has | Lacks | Pays | Reserve | Old | Taken


class Yes(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Or no, to each."""

    yes: list[bool]


class Placed(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Write them to this file, there; those without an offset are stored already."""

    path: str
    offsets: list[int | None]


class OldAre(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The windows, the pieces of each numbered by the chunks that come along; none for one that can't be had."""

    tasks: list[WindowTask | None]


Said = Take | Yes | Placed | OldAre

_encoder = msgspec.msgpack.Encoder()
_orders: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_words: msgspec.msgpack.Decoder[Word] = msgspec.msgpack.Decoder(Word)
_asks: msgspec.msgpack.Decoder[Ask] = msgspec.msgpack.Decoder(Ask)
_said: msgspec.msgpack.Decoder[Said] = msgspec.msgpack.Decoder(Said)
_batches = msgspec.msgpack.Decoder(list[WindowTask])


def encode(message: Order | Word | Ask | Said | list[WindowTask]) -> bytes:
    """One packet."""
    return _encoder.encode(message)


def decode_order(packet: bytes) -> Order:
    """What a hand is told."""
    return _orders.decode(packet)


def decode_word(packet: bytes) -> Word:
    """What a hand says."""
    return _words.decode(packet)


def decode_ask(packet: bytes) -> Ask:
    """What a hand asks or tells in a capture."""
    return _asks.decode(packet)


def decode_pid(packet: bytes) -> int:
    """The pid in the first word of a hand."""
    word = decode_word(packet)
    assert isinstance(word, Begun)
    return word.pid


def decode_said(packet: bytes) -> Said:
    """What a hand is told in a capture."""
    return _said.decode(packet)


def decode_batch(packet: bytes) -> list[WindowTask]:
    """Windows to be filled."""
    return _batches.decode(packet)
