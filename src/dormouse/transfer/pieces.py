"""One piece of a load on the CPU: is it what was stored, what does it decode to, and where do its bytes go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dormouse.errors import DamagedError, StoreError
from dormouse.store.chunk import Buffer
from dormouse.store.codec import Codec, decode, decode_into
from dormouse.store.files import VERIFY_REMEDY
from dormouse.store.key import Key, same
from dormouse.store.pack import chunk_mac
from dormouse.transfer.plan import Copy, LoadPlan, Piece

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]


class Checker:
    """Checks and decodes the pieces of one load. Its methods may be called by many threads at once."""

    def __init__(self, files: Sequence[Path], key: Key | None) -> None:
        self._files = files
        self._key = key

    def check(self, piece: Piece, stored: Buffer) -> None:
        """Raises DamagedError, which names pack and chunk, when the bytes do not match their signature. Bytes of plain
        files have none."""
        chunk = piece.chunk
        if chunk is None:
            return
        if self._key is None:
            raise _no_key()
        if not same(chunk_mac(self._key, chunk.digest, piece.codec, piece.plain_length, stored), chunk.mac):
            raise self.damaged(piece, "its bytes do not match their signature")

    def check_plan(self, plan: LoadPlan) -> None:
        """What can be told before anything is read: that there is a key for what is signed, that what is said to be
        zeros was stored as such, and that raw bytes are as many as they claim. Raises StoreError, DamagedError."""
        for piece in plan.zeros:
            self.check(piece, b"")
        for extent in plan.extents:
            for piece in extent.pieces:
                if self._key is None and piece.chunk is not None:  # nobody may take what nobody can check
                    raise _no_key()
                if piece.codec == Codec.RAW and piece.stored_length != piece.plain_length:
                    raise self.damaged(piece, f"it has {piece.stored_length} raw bytes instead of {piece.plain_length}")

    def decoded(self, piece: Piece, stored: Buffer) -> Buffer:
        """The plain bytes. Raises DamagedError."""
        try:
            return decode(piece.codec, stored, piece.plain_length)
        except DamagedError as error:
            raise self.damaged(piece, error.message) from error

    def decode_into(self, piece: Piece, stored: Buffer, out: memoryview) -> None:
        """Write the plain bytes to `out`, which has their length. Raises DamagedError."""
        try:
            if piece.codec == Codec.RAW and len(stored) == len(out):
                copy_bytes(stored, out)
            else:
                decode_into(piece.codec, stored, out)
        except DamagedError as error:
            raise self.damaged(piece, error.message) from error

    def damaged(self, piece: Piece, why: str) -> DamagedError:
        """The error for a piece."""
        path = self._files[piece.file]
        if piece.chunk is None:
            return DamagedError(f"{path} is damaged at {piece.offset}: {why}", remedy="Fetch the file again")
        return DamagedError(f"chunk {piece.chunk.digest.hex()} in {path} is damaged: {why}", remedy=VERIFY_REMEDY)


def _no_key() -> StoreError:
    return StoreError("chunks of a store can't be loaded without its key", remedy="Give the store's key")


def copy_bytes(source: Buffer, target: memoryview) -> None:
    """Copy, and let other threads run meanwhile: a memoryview's own copy would not."""
    import numpy as np

    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def place(plain: Buffer, copy: Copy, destination: memoryview) -> None:
    """Carry out one copy out of a piece's plain bytes."""
    if copy.rows == 1:
        copy_bytes(
            memoryview(plain)[copy.source : copy.source + copy.row_bytes],
            destination[copy.target : copy.target + copy.row_bytes],
        )
    else:
        _rows(destination, copy, copy.target, copy.target_pitch)[...] = _rows(
            plain, copy, copy.source, copy.source_pitch
        )


def _rows(memory: Buffer, copy: Copy, offset: int, pitch: int) -> Bytes:
    """The rows of a copy at one of its ends. Raises when they leave the memory."""
    import numpy as np

    return np.ndarray((copy.rows, copy.row_bytes), np.uint8, memory, offset, (pitch, 1))
