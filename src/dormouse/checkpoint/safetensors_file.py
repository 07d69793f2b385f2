"""The safetensors format: a header read with suspicion, and a writer that streams.

A file is an 8-byte little-endian length, that many bytes of JSON (name -> dtype, shape, begin and end of the bytes),
then the bytes of all tensors without gaps. The writer pads the JSON with spaces until the data begins on a page, so
that a mapping of the file is aligned, and orders tensors by element size, so that every tensor is aligned too.

    tensors of any source --bfloat16_chunks--> at most 16 MiB at a time --write_file--> file + BLAKE3 of its bytes
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from dormouse.errors import ConfigError

MAX_HEADER = 100 << 20  # the limit of the safetensors library itself
_PAGE = 4096
_CHUNK = 16 << 20

ITEM_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}
_NARROWED = ("F64", "F32", "F16")


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. `offset` counts from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file in the order of their bytes. Raises ConfigError naming what is wrong with the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
            raise _malformed(path, f"its header can't be {length} bytes long in a file of {size} bytes")
        text = file.read(length)
    try:
        entries = msgspec.json.decode(text, type=dict[str, Any])
        entries.pop("__metadata__", None)
        parsed = msgspec.convert(entries, dict[str, _Entry])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _malformed(path, f"its header is wrong: {error}") from error
    tensors = sorted(
        (_checked(path, name, entry, 8 + length) for name, entry in parsed.items()),
        key=lambda tensor: (tensor.offset, tensor.length),
    )
    _check_coverage(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


_MAX_DIMENSIONS = 64
_MAX_EXTENT = 1 << 48


def _checked(path: Path, name: str, entry: _Entry, data: int) -> TensorInfo:
    begin, end = entry.data_offsets
    if entry.dtype not in ITEM_SIZES:
        raise _malformed(path, f"tensor {name} has the unknown type {entry.dtype}")
    if len(entry.shape) > _MAX_DIMENSIONS or any(not 0 <= n <= _MAX_EXTENT for n in entry.shape):
        raise _malformed(path, f"tensor {name} has an impossible shape")
    if math.prod(entry.shape) * ITEM_SIZES[entry.dtype] != end - begin or begin < 0:
        raise _malformed(path, f"tensor {name} of shape {entry.shape} can't have {end - begin} bytes")
    return TensorInfo(name, entry.dtype, tuple(entry.shape), data + begin, end - begin)


def _check_coverage(path: Path, tensors: Iterable[TensorInfo], data: int, size: int) -> None:
    at = data
    for tensor in tensors:
        if tensor.offset != at:
            raise _malformed(path, f"there is a gap or an overlap before tensor {tensor.name}")
        at += tensor.length
    if at != size:
        raise _malformed(path, f"it has {size} bytes where its header promises {at}; it may be truncated")


def _malformed(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path} is not a sound safetensors file: {why}", remedy="Download or copy it again")


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: `chunks()` yields exactly the bytes of `shape` and `dtype`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[bytes | memoryview]]

    @property
    def length(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def write_file(path: Path, tensors: Sequence[NewTensor], *, progress: Callable[[int, int], None]) -> str:
    """Write a new file (0600), fsync it, and return the BLAKE3 of its bytes in hex. `progress(done, total)`: bytes."""
    tensors = sorted(tensors, key=lambda tensor: -ITEM_SIZES[tensor.dtype])
    total = sum(tensor.length for tensor in tensors)
    hasher = blake3(max_threads=blake3.AUTO)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0) as file:  # noqa: PTH123
        for chunk in _encode(tensors):
            hasher.update(chunk)
            file.write(chunk)
            progress(min(file.tell(), total), total)
        os.fsync(file.fileno())
    return hasher.hexdigest()


def _encode(tensors: Sequence[NewTensor]) -> Iterator[bytes | memoryview]:
    yield _header(tensors)
    for tensor in tensors:
        written = 0
        for chunk in tensor.chunks():
            written += len(chunk)
            yield chunk
        if written != tensor.length:
            raise ConfigError(
                f"tensor {tensor.name} gave {written} bytes where its shape needs {tensor.length}",
                remedy="The source is damaged; download or copy it again",
            )


def _header(tensors: Sequence[NewTensor]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (at, at + tensor.length),
        }
        at += tensor.length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _PAGE)
    return len(text).to_bytes(8, "little") + text


def stored_dtype(dtype: str) -> str:
    """The type a tensor is stored in: wider floats become BF16, everything else stays."""
    return "BF16" if dtype in _NARROWED else dtype


def copied_tensor(path: Path, tensor: TensorInfo, name: str) -> NewTensor:
    """A tensor of an existing file, narrowed to BF16 if it is a wider float, read 16 MiB at a time."""

    def chunks() -> Iterator[bytes | memoryview]:
        with path.open("rb") as file:
            file.seek(tensor.offset)
            left = tensor.length
            while left:
                data = file.read(min(left, _CHUNK))
                if not data:
                    raise _malformed(path, f"it ends inside tensor {tensor.name}")
                left -= len(data)
                yield to_bfloat16(tensor.dtype, data) if tensor.dtype in _NARROWED else data

    return NewTensor(name, stored_dtype(tensor.dtype), tensor.shape, chunks)


def to_bfloat16(dtype: str, data: bytes) -> bytes:
    """Little-endian F64, F32 or F16 values as BF16, rounded to nearest even; NaN stays NaN."""
    import numpy as np

    source = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]
    with np.errstate(over="ignore"):  # a double out of range becomes infinity, as it should
        bits = np.frombuffer(data, source).astype("<f4").view("<u4")
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    narrow: bytes = np.where(nan, (bits >> 16) | 0x40, rounded).astype("<u2").tobytes()
    return narrow
