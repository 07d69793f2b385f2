"""What the node and the host checkpoint service say to each other: one msgpack struct per SOCK_SEQPACKET packet.

Every request carries a `call` number and gets exactly one reply with it, in any order. `Started` comes with
descriptors: the node's end of the worker's control socket, then those of its segments (transfer/handles.py).
`SegmentTaken` comes with those of its segment. Every reply tells which weights are kept in memory that no worker uses.
"""

from __future__ import annotations

import msgspec

from dormouse import errors
from dormouse.phases import Phases
from dormouse.transfer.handles import MAX_SEGMENTS, SegmentInfo

MAX_PACKET = 128 << 10
MAX_DESCRIPTORS = 1 + 2 * MAX_SEGMENTS


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    call: int


class StartWorker(_Message, frozen=True, tag="start_worker"):
    """A fresh worker in a new cell, its output appended to `log_path`, while the segment of the checkpoint fills on a
    device: "cpu" or "cuda:N"."""

    log_path: str
    checkpoint: str | None = None
    device: str = "cpu"


class CaptureWorker(_Message, frozen=True, tag="capture"):
    """Snapshot the quiesced worker of a cell, then kill it, or let it be as it was, if it is to `keep`."""

    cell_id: str
    kind: str
    model: str
    key: dict[str, str]
    keep: bool = False


class RestoreSnapshot(_Message, frozen=True, tag="restore"):
    """Restore a snapshot in a new cell, while the segment of the checkpoint fills on a device, where the worker's CUDA
    state goes, too, wherever it was captured."""

    snapshot_id: str
    key: dict[str, str]
    checkpoint: str | None = None
    device: str = "cpu"


class StopCell(_Message, frozen=True, tag="stop"):
    """Kill a cell with all in it; unknown ones are gone already."""

    cell_id: str


class TakeSegment(_Message, frozen=True, tag="take_segment"):
    """One more segment for the worker of a cell, filled or filling: an adapter's checkpoint, or that of its model when
    it has given it back."""

    cell_id: str
    checkpoint: str
    adapter: bool = True
    device: str = "cpu"


class DropSegment(_Message, frozen=True, tag="drop_segment"):
    """A segment is not needed any more: by the worker of this cell (None: of none), nor to be kept for the next one,
    unless `keep`."""

    cell_id: str | None
    checkpoint: str
    keep: bool = False


class DropSegments(_Message, frozen=True, tag="drop_segments"):
    """The worker of this cell has unmapped all of its segments and gives them back; they are kept within the budget."""

    cell_id: str


class DescribeGpu(_Message, frozen=True, tag="describe_gpu"):
    """Tell what memory a GPU ("cuda:N") has."""

    device: str


class _Reply(_Message, frozen=True, kw_only=True):
    kept: dict[str, int] = {}
    """The bytes of the weights that no worker uses now, by checkpoint, the longest unused first."""


class Started(_Reply, frozen=True, kw_only=True, tag="started"):
    """A worker runs; the packet carries its control socket and segments. `pid` is the host's."""

    cell_id: str
    pid: int
    phases: Phases
    segments: list[SegmentInfo]


class Captured(_Reply, frozen=True, kw_only=True, tag="captured"):
    """The snapshot is committed and the worker is gone, or kept."""

    snapshot_id: str
    raw_bytes: int
    stored_bytes: int
    phases: Phases


class SegmentTaken(_Reply, frozen=True, kw_only=True, tag="segment_taken"):
    """The packet carries the segment."""

    segment: SegmentInfo


class SegmentDropped(_Reply, frozen=True, kw_only=True, tag="segment_dropped"):
    """It is freed, or will be with its last user."""


class GpuDescribed(_Reply, frozen=True, kw_only=True, tag="gpu_described"):
    """Its bytes in all."""

    total: int


class Stopped(_Reply, frozen=True, kw_only=True, tag="stopped"):
    """The cell is gone and its memory free."""


class Refused(_Reply, frozen=True, kw_only=True, tag="refused"):
    """The call failed. `kind` is a class name in dormouse.errors."""

    kind: str
    message: str
    remedy: str


Request = (
    StartWorker | CaptureWorker | RestoreSnapshot | StopCell | TakeSegment | DropSegment | DropSegments | DescribeGpu
)
Reply = Started | Captured | Stopped | SegmentTaken | SegmentDropped | GpuDescribed | Refused

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(message: Request | Reply) -> bytes:
    """One message as one packet."""
    return _encoder.encode(message)


def decode_request(packet: bytes) -> Request:
    """One packet from the node."""
    return _requests.decode(packet)


def decode_reply(packet: bytes) -> Reply:
    """One packet from the service."""
    return _replies.decode(packet)


def refused(call: int, error: errors.DormouseError) -> Refused:
    """An error as a reply."""
    return Refused(call=call, kind=type(error).__name__, message=error.message, remedy=error.remedy)


def as_error(reply: Refused) -> errors.DormouseError:
    """The error a reply stands for, as the class it was raised with."""
    kind = getattr(errors, reply.kind, errors.SnapshotError)
    error: errors.DormouseError = kind(reply.message, remedy=reply.remedy)
    return error
