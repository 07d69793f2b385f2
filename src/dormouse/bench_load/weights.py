"""Weights to measure with: safetensors files of random bfloat16 in the shapes of a Llama, written by many threads.

    lay_out(bytes, shards) -> shapes per file --make--> model-00001-of-0000N.safetensors --reference--> what is in them

The reference is what every method's tensors are compared with: type and shape, the sum of all bytes (as 64-bit
integers that wrap around) and the BLAKE3 of three samples of each tensor. It is read from the files themselves, so
that weights somebody brings are checked in the same way.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
from blake3 import blake3

from dormouse.checkpoint.safetensors_file import TensorInfo, read_header

SIGMA = 0.02
SAMPLE = 64 << 10
_BLOCK_VALUES = 1 << 20
_SEED = 20_26
_LEAST_LAYERS = 6

Shapes = dict[str, tuple[int, ...]]


class Widths(NamedTuple):
    """Of a Llama."""

    hidden: int
    wide: int
    narrow: int
    words: int


WIDTHS = (
    Widths(4096, 14336, 1024, 128256),
    Widths(2048, 8192, 512, 32000),
    Widths(512, 1536, 128, 4096),
    Widths(128, 384, 32, 256),
)
"""The first whose weights are not too large is taken."""


class TensorReference(msgspec.Struct, frozen=True):
    """What a tensor must be. `dtype` is written as safetensors does."""

    dtype: str
    shape: list[int]
    total: int
    sample: str


Reference = dict[str, TensorReference]


@dataclass(frozen=True)
class Weights:
    """The files, their plain bytes (tensors only, no headers), and where the reference was written."""

    files: tuple[Path, ...]
    plain_bytes: int
    tensors: int
    reference: Path


def lay_out(wanted: int, shards: int) -> list[Shapes]:
    """Tensors of about `wanted` bytes in `shards` files of about the same size."""
    widths = next(
        (each for each in WIDTHS if _bytes(_outer(each)) + _LEAST_LAYERS * _bytes(_layer(0, each)) <= wanted),
        WIDTHS[-1],
    )
    count = max(1, shards, round((wanted - _bytes(_outer(widths))) / _bytes(_layer(0, widths))))
    layers = (_layer(number, widths).items() for number in range(count))
    shapes = _outer(widths) | dict(itertools.chain.from_iterable(layers))
    return _split(shapes, shards)


def _outer(widths: Widths) -> Shapes:
    return {
        "model.embed_tokens.weight": (widths.words, widths.hidden),
        "model.norm.weight": (widths.hidden,),
        "lm_head.weight": (widths.words, widths.hidden),
    }


def _layer(number: int, widths: Widths) -> Shapes:
    at = f"model.layers.{number}"
    linear = {f"{at}.{name}.weight": shape for name, shape in linear_layers(widths).items()}
    norms = (f"{at}.input_layernorm.weight", f"{at}.post_attention_layernorm.weight")
    return linear | dict.fromkeys(norms, (widths.hidden,))


def linear_layers(widths: Widths) -> Shapes:
    """The linear modules of one layer, with the shapes of their weights."""
    hidden, wide, narrow, _ = widths
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }


def _bytes(shapes: Shapes) -> int:
    return sum(2 * math.prod(shape) for shape in shapes.values())


def _split(shapes: Shapes, shards: int) -> list[Shapes]:
    """Runs of neighbours, cut where the bytes before reach the next equal share."""
    share = _bytes(shapes) / shards
    parts: list[Shapes] = [{} for _ in range(shards)]
    before = 0
    for name, shape in shapes.items():
        parts[min(int(before / share), shards - 1)][name] = shape
        before += 2 * math.prod(shape)
    return [part for part in parts if part]


def make(folder: Path, parts: Sequence[Shapes], threads: int) -> tuple[Path, ...]:
    """Write a file for each part. Every value is drawn anew: no two tensors are alike."""
    files = tuple(folder / f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1))
    jobs: list[tuple[Path, int, int, int]] = []
    for file, shapes in zip(files, parts, strict=True):
        header = _header(shapes)
        values = _bytes(shapes) // 2
        with file.open("xb") as out:
            out.write(header)
            out.truncate(len(header) + 2 * values)
        jobs += [
            (file, len(header) + 2 * at, min(_BLOCK_VALUES, values - at), len(jobs) + at // _BLOCK_VALUES)
            for at in range(0, values, _BLOCK_VALUES)
        ]
    with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
        list(pool.map(_write_block, jobs))
    return files


def _header(shapes: Shapes) -> bytes:
    """The header as safetensors writes it, its end at a multiple of 8."""
    entries, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_block(job: tuple[Path, int, int, int]) -> None:
    import numpy as np

    file, offset, count, number = job
    random = np.random.Generator(np.random.SFC64([_SEED, number]))
    bits = (random.standard_normal(count, dtype=np.float32) * np.float32(SIGMA)).view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)  # to the nearest bfloat16, ties to even
    data = memoryview((bits >> 16).astype("<u2").tobytes())
    descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        while data:
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written
    finally:
        os.close(descriptor)


def write_reference(files: Sequence[Path], target: Path, threads: int) -> Weights:
    """Read what is in the files. Raises ConfigError for one that is not safetensors."""
    tensors = [(file, tensor) for file in files for tensor in read_header(file).values()]
    with ThreadPoolExecutor(threads, thread_name_prefix="reference") as pool:
        found = list(pool.map(_read_reference, tensors))
    reference = {tensor.name: seen for (_, tensor), seen in zip(tensors, found, strict=True)}
    target.write_bytes(msgspec.json.encode(reference))
    return Weights(tuple(files), sum(tensor.length for _, tensor in tensors), len(tensors), target)


def read_reference(path: Path) -> Reference:
    """What `write_reference` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=Reference)


def _read_reference(place: tuple[Path, TensorInfo]) -> TensorReference:
    import numpy as np

    file, tensor = place
    total, words = 0, tensor.length // 8
    step = _BLOCK_VALUES
    with file.open("rb", buffering=0) as stream:
        for at in range(0, words, step):
            data = _read(stream.fileno(), tensor.offset + 8 * at, 8 * min(step, words - at))
            total += int(np.frombuffer(data, "<i8").sum())
        ranges = sample_ranges(tensor.length)
        samples = b"".join(_read(stream.fileno(), tensor.offset + start, count) for start, count in ranges)
    return TensorReference(tensor.dtype, list(tensor.shape), wrapped(total), blake3(samples).hexdigest())


def _read(descriptor: int, offset: int, count: int) -> bytes:
    data = os.pread(descriptor, count, offset)
    if len(data) != count:
        raise OSError(f"{count} bytes were asked for at {offset}, {len(data)} came")
    return data


def wrapped(total: int) -> int:
    """A sum as 64-bit arithmetic gives it."""
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


def sample_ranges(length: int) -> Iterator[tuple[int, int]]:
    """Start and length of the samples: the beginning, the middle, the end."""
    count = min(SAMPLE, length)
    yield from ((start, count) for start in (0, (length - count) // 2, length - count))
