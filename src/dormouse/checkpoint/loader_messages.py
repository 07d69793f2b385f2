"""What the host service and the loader say to each other: one msgpack struct per SOCK_SEQPACKET packet.

Every request carries a `call` number and gets exactly one reply with it, in any order; call 0 is answered unasked, once
the loader can be used. `Taken` comes with the descriptors of its segment (transfer/handles.py).
"""

from __future__ import annotations

import msgspec

from dormouse import errors
from dormouse.transfer.handles import SegmentInfo

MAX_PACKET = 64 << 10


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    call: int


class Warm(_Message, frozen=True, tag="warm"):
    """Get ready to load onto a GPU ("cuda:N")."""

    device: str


class Take(_Message, frozen=True, tag="take"):
    """The segment of a checkpoint on a GPU for a user, filled or filling."""

    checkpoint: str
    user: str
    device: str


class Release(_Message, frozen=True, tag="release"):
    """A user has let go of its segments, or of those of one checkpoint."""

    user: str
    checkpoint: str | None = None


class Hold(_Message, frozen=True, tag="hold"):
    """Bring the chunks of a checkpoint into the DRAM tier now."""

    checkpoint: str


class Forget(_Message, frozen=True, tag="forget"):
    """The chunks of a checkpoint need not be in the DRAM tier any more."""

    checkpoint: str


class Describe(_Message, frozen=True, tag="describe"):
    """Tell the statistics."""


class Done(_Message, frozen=True, tag="done"):
    """That was all."""


class Taken(_Message, frozen=True, tag="taken"):
    """The packet carries the segment."""

    segment: SegmentInfo


class Held(_Message, frozen=True, tag="held"):
    """All chunks are in the tier; `read_bytes` of them had to be read."""

    stored_bytes: int
    read_bytes: int


class GpuMemory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A GPU in bytes, `segments` of them those of weights."""

    device: str
    uuid: str
    total: int
    free: int
    segments: int


class Statistics(_Message, frozen=True, tag="statistics"):
    """The GPUs in use, and the DRAM tier in bytes. `refused`: how often a checkpoint did not go into it."""

    gpus: list[GpuMemory]
    tier_budget: int
    tier_taken: int
    tier_held: int
    refused: int


class Refused(_Message, frozen=True, tag="refused"):
    """The call failed. `kind` is a class name in dormouse.errors."""

    kind: str
    message: str
    remedy: str


Request = Warm | Take | Release | Hold | Forget | Describe
Reply = Done | Taken | Held | Statistics | Refused

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(message: Request | Reply) -> bytes:
    """One message as one packet."""
    return _encoder.encode(message)


def decode_request(packet: bytes) -> Request:
    """One packet from the host service."""
    return _requests.decode(packet)


def decode_reply(packet: bytes) -> Reply:
    """One packet from the loader."""
    return _replies.decode(packet)


def refused(call: int, error: errors.DormouseError) -> Refused:
    """An error as a reply."""
    return Refused(call=call, kind=type(error).__name__, message=error.message, remedy=error.remedy)
