"""The tensor table of a checkpoint: which tensor lies where in its segment.

    body of a "checkpoint" manifest (msgpack)  =  weights.json in the model's folder (JSON)  =  CheckpointBody

A checkpoint's bytes are its segment from beginning to end, cut into chunks of `chunk_size`; the manifest's refs are
these chunks in order. Tensors lie in the order in which a model asks for them, each at a multiple of `ALIGNMENT`, with
zeros in between. The node fills segments from the chunks and never looks at tensors; the worker looks at tensors and
never opens the store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from dormouse.errors import DamagedError

VERSION = 1
ALIGNMENT = 256
"""Of every tensor: a cache line's multiple, as vector units and GPUs like it."""
CHUNK_SIZE = 8 << 20
"""A compromise: what is read, copied and decoded as one, so that fewer are faster; and what one thread decodes."""
MAX_CHUNK_SIZE = 16 << 20

ITEM_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}
ITEM_BITS = {**{name: 8 * size for name, size in ITEM_SIZES.items()}, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
MAX_DIMENSIONS = 64
MAX_EXTENT = 1 << 48


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor: `length` bytes at `offset` of the segment."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


class CheckpointBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`size` is the segment's, in bytes."""

    version: int
    size: int
    chunk_size: int
    tensors: list[Tensor]


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: `chunks()` yields exactly the bytes of `shape` and `dtype`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[bytes | memoryview]]

    @property
    def length(self) -> int:
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8


def fits(dtype: str, shape: Sequence[int], length: int) -> bool:
    """Whether a tensor of this type and shape has exactly `length` bytes; packed types must end with a whole byte."""
    return math.prod(shape) * ITEM_BITS[dtype] == length * 8


def lay_out(tensors: Iterable[NewTensor]) -> CheckpointBody:
    """The table of tensors that are to be written in this order."""
    placed: list[Tensor] = []
    end = 0
    for tensor in tensors:
        offset = aligned(end)
        placed.append(Tensor(tensor.name, tensor.dtype, tensor.shape, offset, tensor.length))
        end = offset + tensor.length
    return CheckpointBody(version=VERSION, size=end, chunk_size=CHUNK_SIZE, tensors=placed)


def aligned(offset: int) -> int:
    """`offset` rounded up to where a tensor may begin."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def encode_body(body: CheckpointBody) -> bytes:
    """The body as it stands in the manifest."""
    return msgspec.msgpack.encode(body)


def decode_body(data: bytes, what: str) -> CheckpointBody:
    """A manifest's body. Raises DamagedError that says what is wrong with `what`."""
    return _checked(data, msgspec.msgpack.decode, what)


def encode_table(body: CheckpointBody) -> bytes:
    """The body as it stands in the model's folder."""
    return msgspec.json.encode(body)


def decode_table(data: bytes, what: str) -> CheckpointBody:
    """The table of a model's folder. Raises DamagedError that says what is wrong with `what`."""
    return _checked(data, msgspec.json.decode, what)


def _checked(data: bytes, decode: Callable[[bytes], object], what: str) -> CheckpointBody:
    try:
        plain = decode(data)
        version = plain.get("version") if isinstance(plain, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise DamagedError(f"{what} has version {version}, newer than {VERSION}", remedy="Update Dormouse")
        body = msgspec.convert(plain, CheckpointBody)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _wrong(what, f"{error}") from error
    if not 0 < body.size <= MAX_EXTENT or not 0 < body.chunk_size <= MAX_CHUNK_SIZE:
        raise _wrong(what, f"{body.size} bytes in chunks of {body.chunk_size} make no sense")
    _check_tensors(body.tensors, body.size, what)
    return body


def _check_tensors(tensors: Sequence[Tensor], size: int, what: str) -> None:
    end = 0
    names: set[str] = set()
    for tensor in tensors:
        if tensor.dtype not in ITEM_BITS:
            raise _wrong(what, f"tensor {tensor.name} has the unknown type {tensor.dtype}")
        if len(tensor.shape) > MAX_DIMENSIONS or any(not 0 <= n <= MAX_EXTENT for n in tensor.shape):
            raise _wrong(what, f"tensor {tensor.name} has an impossible shape")
        if not fits(tensor.dtype, tensor.shape, tensor.length):
            raise _wrong(what, f"tensor {tensor.name} of shape {tensor.shape} can't have {tensor.length} bytes")
        if tensor.offset != aligned(end) or tensor.name in names:
            raise _wrong(what, f"tensor {tensor.name} is not where it must be")
        end = tensor.offset + tensor.length
        names.add(tensor.name)
    if end != size:
        raise _wrong(what, f"its tensors end at {end}, it has {size} bytes")


def _wrong(what: str, why: str) -> DamagedError:
    return DamagedError(f"{what} is wrong: {why}", remedy="Import the model again: dormouse import … --replace")
