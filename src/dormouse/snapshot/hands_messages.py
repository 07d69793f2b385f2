"""What the host service and its hands say to each other; msgpack, one message per packet.

    order socket, one per hand:       host service -> hand      BeginFill (with a descriptor), Go, Drop
    socket of a fill, all hands' end: host service -> hands     batches: each is taken by the hand that is first
                                      hand -> host service      Begun, Done
    socket of a capture, one per hand: host service -> hand     Take, then answers to what it asks
                                      hand -> host service      questions, then Taken

The kernel's queue of the second socket so is the queue of work: who is quick takes more. Its end is
the end of the work.
"""

from __future__ import annotations

import msgspec

from dormouse import errors
from dormouse.errors import DormouseError
from dormouse.snapshot.window_fill import WindowTask
from dormouse.store.chunk import MAX_CHUNK
from dormouse.store.pack import StoredChunk

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


class Take(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Store the pages `mask` of a window of the process `pid` (as its images have it). Of those in `sparse`, zero ones
    are dropped. `old`: the windows that the parent snapshot has there, and their widths."""

    pid: int
    host_pid: int
    number: int
    width: int
    mask: bytes
    sparse: bytes
    old: dict[int, int] | None


class Has(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Is this chunk stored already? Answered by Yes."""

    digest: bytes
    length: int


class Lacks(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """This chunk is used; must it be stored? Answered by Yes."""

    digest: bytes
    length: int


class Pays(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Do floats pay, of which this share would be stored? Answered by Yes."""

    stored: float


class Reserve(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A chunk as it will be stored wants a place. Answered by Placed."""

    chunk: StoredChunk


class Written(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The chunk is in the place that was reserved last. Not answered."""


class Old(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A window of the parent snapshot is wanted. Answered by OldIs."""

    number: int


class Taken(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The end of a Take: by window, the (chunk, held, used, width) of what was stored."""

    stored: dict[int, list[tuple[bytes, bytes, bytes, int]]]
    failure: Failure | None = None
    damaged: list[bytes] = []


Ask = Has | Lacks | Pays | Reserve | Written | Old | Taken


class Yes(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Or no."""

    yes: bool


class Placed(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Write it to this file, there; without a file, it is stored already."""

    path: str | None = None
    offset: int = 0


class OldIs(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The window, its pieces numbered by the chunks that come along; none if it can't be had."""

    task: WindowTask | None


Said = Take | Yes | Placed | OldIs

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
