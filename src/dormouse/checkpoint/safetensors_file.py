"""The safetensors format, a source of imports: a header read with suspicion, tensors read a piece at a time.

A file is an 8-byte little-endian length, that many bytes of JSON (name -> dtype, shape, begin and end of the bytes),
then the bytes of all tensors without gaps.

    read_header(file) -> TensorInfo --copied_tensor--> NewTensor: at most 16 MiB at a time, wide floats made BF16
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from dormouse.checkpoint.tensors import ITEM_BITS, MAX_DIMENSIONS, MAX_EXTENT, NewTensor, fits
from dormouse.errors import ConfigError, NotFoundError

MAX_HEADER = 100 << 20  # the limit of the safetensors library itself
_CHUNK = 16 << 20

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


def open_source(path: Path) -> BinaryIO:
    """A user's file, opened for reading. Raises NotFoundError, ConfigError for what is no file or may not be read."""
    try:
        # O_NONBLOCK: opening somebody's pipe would wait for ever. It means nothing to a regular file.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}", remedy="Check the path") from None
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}", remedy="Give a file you may read") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"{path} is no regular file", remedy="Give a .safetensors file")
    return os.fdopen(descriptor, "rb")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file in the order of their bytes. Raises ConfigError naming what is wrong with the file."""
    with path.open("rb") as file:
        return header_of(file, path)


def header_of(file: BinaryIO, path: Path) -> dict[str, TensorInfo]:
    """The same of an open file, which is read from where it stands: its beginning."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
        raise _malformed(path, f"its header can't be {length} bytes long in a file of {size} bytes")
    text = file.read(length)
    try:
        entries = msgspec.json.decode(text, type=dict[str, Any])
        entries.pop("__metadata__", None)
        parsed = msgspec.convert(entries, dict[str, _Entry])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(path, f"its header is wrong: {error}") from error
    tensors = sorted(
        (_checked(path, name, entry, 8 + length) for name, entry in parsed.items()),
        key=lambda tensor: (tensor.offset, tensor.length),
    )
    _check_coverage(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def _checked(path: Path, name: str, entry: _Entry, data: int) -> TensorInfo:
    begin, end = entry.data_offsets
    if entry.dtype not in ITEM_BITS:
        raise _malformed(path, f"tensor {name} has the unknown type {entry.dtype}")
    if len(entry.shape) > MAX_DIMENSIONS or any(not 0 <= n <= MAX_EXTENT for n in entry.shape):
        raise _malformed(path, f"tensor {name} has an impossible shape")
    if begin < 0 or not fits(entry.dtype, entry.shape, end - begin):
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
