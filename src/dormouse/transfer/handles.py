"""Handles of segments: what travels from who fills a segment, through the node, to the worker that maps it.

    service: Segment.handle() --SCM_RIGHTS--> node (holds it, looks at nothing) --SCM_RIGHTS--> worker: Arena.map

A handle is the description (`SegmentInfo`) and one or two descriptors: the memory, and, while the segment may still be
filling, the read end of a pipe on which the end of that is told. A worker can so map a segment before it is filled and
wait only where it needs the values. `kind` says what the memory descriptor is: a memfd, or memory of a GPU that its
driver has exported ("cuda").
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from dormouse import errors

MEMFD = "memfd"
CUDA = "cuda"
MAX_SEGMENTS = 4
"""The most segments of one worker; each takes two descriptors of a packet."""

_MAX_REPORT = 4096  # PIPE_BUF: a report is written at once or not at all


class SegmentInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A segment as it is announced. `size` is in bytes; `pending` tells that a pipe comes with it; `device` is the UUID
    of the GPU it is on."""

    kind: str
    size: int
    pending: bool
    device: str = ""


@dataclass
class SegmentHandle:
    """A segment in this process's hands; whoever holds it closes it."""

    kind: str
    size: int
    memory: int
    report: int | None = None
    device: str = ""

    @property
    def info(self) -> SegmentInfo:
        """What to announce it with."""
        return SegmentInfo(kind=self.kind, size=self.size, pending=self.report is not None, device=self.device)

    def descriptors(self) -> list[int]:
        """What to send with the announcement, in the order that `adopt` expects."""
        return [self.memory] if self.report is None else [self.memory, self.report]

    def forget_report(self) -> None:
        """The segment is known to be filled: announce it so from now on."""
        report, self.report = self.report, None
        if report is not None:
            os.close(report)

    def close(self) -> None:
        """Let go of the descriptors. Idempotent."""
        self.forget_report()
        memory, self.memory = self.memory, -1
        if memory >= 0:
            os.close(memory)


def adopt(infos: Sequence[SegmentInfo], descriptors: Iterator[int]) -> list[SegmentHandle]:
    """The handles of announced segments, taking their descriptors from those received. Raises EngineError when there
    are fewer than announced; those taken are closed then."""
    handles: list[SegmentHandle] = []
    with contextlib.ExitStack() as undo:
        for info in infos:
            memory = next(descriptors, None)
            if memory is None:
                raise errors.EngineError("a segment was announced without its descriptor")
            handle = SegmentHandle(info.kind, info.size, memory, device=info.device)
            undo.callback(handle.close)
            if info.pending:
                handle.report = next(descriptors, None)
                if handle.report is None:
                    raise errors.EngineError("a segment was announced without its pipe")
            handles.append(handle)
        undo.pop_all()
    return handles


class Filled(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a segment was filled: when, by `host_clock`, and with how many bytes, plain and as they were stored."""

    begin: float
    end: float
    bytes: int
    stored: int


class _Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    filled: Filled | None = None
    kind: str = ""
    message: str = ""
    remedy: str = ""


def send_report(pipe: int, error: errors.DormouseError | None, filled: Filled | None = None) -> None:
    """Tell through `pipe` that a segment is filled, or why it never will be, and close it. A reader that has gone
    needs no report."""
    report = (
        _Report(filled)
        if error is None
        else _Report(None, type(error).__name__, _cut(error.message, 3000), _cut(error.remedy, 500))
    )
    try:
        os.write(pipe, msgspec.msgpack.encode(report)[:_MAX_REPORT])
    except BrokenPipeError:
        return
    finally:
        os.close(pipe)


def _cut(text: str, size: int) -> str:
    """At most `size` bytes of it as UTF-8."""
    return text.encode()[:size].decode(errors="ignore")


def await_report(pipe: int) -> Filled | None:
    """Block until the segment behind `pipe` is filled; how it was, if that was told. Raises the error it failed with,
    EngineError when whoever filled it has died."""
    data = os.read(pipe, _MAX_REPORT)
    if not data:
        raise errors.EngineError(
            "the weights did not arrive: the process that loaded them ended before it was done", remedy="Try again"
        )
    try:
        report = msgspec.msgpack.decode(data, type=_Report)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise errors.EngineError(f"the weights did not arrive: the report is malformed: {error}") from error
    if report.kind:
        raise errors.of_kind(report.kind, report.message, report.remedy)
    return report.filled


def await_reports(pipes: list[int]) -> list[Filled]:
    """Block until all segments behind the pipes are filled; how those were that were not full already. Each pipe is
    closed and leaves the list when its segment is full. Raises what `await_report` does."""
    fills = []
    while pipes:
        filled = await_report(pipes[-1])
        os.close(pipes.pop())
        if filled is not None:
            fills.append(filled)
    return fills
