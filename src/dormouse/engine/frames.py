"""Frames on a stream socket: a 4-byte little-endian length, then that many bytes of msgpack.

A frame is at most MAX_FRAME bytes, so a broken or hostile peer can make the other end hold no more than that.
`Inbox` turns whatever bytes arrive (any split) into messages; it holds at most one unfinished frame.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

from dormouse.errors import EngineError

MAX_FRAME = 8 << 20

_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
T = TypeVar("T")


def pack_frame(message: msgspec.Struct) -> bytes:
    """One message as the bytes of one frame. Raises EngineError when it would be longer than MAX_FRAME."""
    try:
        body = _encoder.encode(message)
    except RecursionError as error:
        raise EngineError(f"a {type(message).__name__} message is nested too deeply") from error
    if len(body) > MAX_FRAME:
        raise EngineError(
            f"a {type(message).__name__} message of {len(body)} bytes is over the limit of {MAX_FRAME} bytes",
            remedy="Send a shorter prompt",
        )
    return _LENGTH.pack(len(body)) + body


class Inbox(Generic[T]):
    """Collects received bytes and yields whole messages of one type (a union of message structs)."""

    def __init__(self, message_type: type[T]) -> None:
        self._decoder = msgspec.msgpack.Decoder(message_type)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[T]:
        """Yield the messages that `data` completes. Raises EngineError on a frame that is too long or malformed."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME:
                raise EngineError(f"the peer announced a frame of {length} bytes; at most {MAX_FRAME} are allowed")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                message = self._decoder.decode(body)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise EngineError(f"the peer sent a malformed message: {error}") from error
            yield message
