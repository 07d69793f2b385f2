"""Which bytes of which tensors go where in each device's memory. Pure: no file, no torch.

    tensors (name, type, shape, bytes in the source), devices, {name: dimension to cut} --place--> Placement

A device gets the tensors one after the other in one block, each at a multiple of 256: whole, or its part of one that is
cut. A cut along the first dimension is one run of bytes; along another one, a run per row. Runs that follow each other
in the source and in the block become one, so that a checkpoint loaded whole is a single run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dormouse.checkpoint.tensors import ALIGNMENT, ITEM_BITS, Tensor, aligned
from dormouse.errors import ConfigError
from dormouse.transfer.plan import Copy, clipped


@dataclass(frozen=True)
class Shard:
    """How tensors are cut over several devices: each along the dimension that the first matching pattern gives, as
    `torch.chunk` would, as in `Shard({"*.q_proj.weight": 0, "*.o_proj.weight": 1})`."""

    dimensions: Mapping[str, int]


@dataclass(frozen=True)
class Placement:
    """`tensors`: of each device, with offsets in its block. `copies`: from the source to the blocks, by source offset.
    `sizes`: of the blocks."""

    tensors: tuple[tuple[Tensor, ...], ...]
    copies: tuple[Copy, ...]
    sizes: tuple[int, ...]


def select(tensors: Sequence[Tensor], patterns: Iterable[str] | None, what: str) -> list[Tensor]:
    """The tensors that have one of the names or match one of the patterns (`*`, `?`, `[…]`), in their order; all for
    None. Raises ConfigError for a pattern that nothing matches."""
    if patterns is None:
        return list(tensors)
    wanted = set()
    for pattern in dict.fromkeys(patterns):
        wanted.update(_matching(tensors, pattern, what))
    return [tensor for tensor in tensors if tensor.name in wanted]


def cuts(tensors: Sequence[Tensor], shard: Shard | None, what: str) -> dict[str, int]:
    """The dimension that each tensor to be cut is cut along. Raises ConfigError for a pattern that nothing matches and
    a dimension that a tensor does not have."""
    found: dict[str, int] = {}
    for pattern, dimension in (shard.dimensions if shard is not None else {}).items():
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        for name in _matching(tensors, pattern, what):
            if not -len(shapes[name]) <= dimension < len(shapes[name]):
                raise ConfigError(
                    f"{name} of shape {list(shapes[name])} can't be cut along dimension {dimension}",
                    remedy=f"Change the pattern {pattern!r} of the shard",
                )
            found.setdefault(name, dimension % len(shapes[name]))
    return found


def _matching(tensors: Iterable[Tensor], pattern: str, what: str) -> list[str]:
    """An exact name first: it may contain what a pattern would understand in another way."""
    names = [tensor.name for tensor in tensors]
    found = [pattern] if pattern in names else [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ConfigError(f"no tensor of {what} is called {pattern!r}", remedy=f"There are {_some(names)}")
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"


def place(tensors: Sequence[Tensor], devices: int, cut: Mapping[str, int]) -> Placement:
    """Where all goes. `tensors` are in the order of their bytes; `cut` gives the dimension of those that are cut, all
    others go to every device. Raises ConfigError when a cut would split a byte."""
    rows: list[Copy] = []
    placed: list[tuple[Tensor, ...]] = []
    sizes: list[int] = []
    for device in range(devices):
        parts: list[Tensor] = []
        copies: list[Copy] = []
        end = 0
        for tensor in tensors:
            offset = aligned(end)
            part, copy = _part(tensor, device, devices, cut.get(tensor.name), offset)
            parts.append(part)
            copies.append(copy)
            end = offset + part.length
        placed.append(tuple(parts))
        sizes.append(end)
        rows += _joined(copies)
    return Placement(tuple(placed), tuple(sorted(rows, key=lambda copy: copy.source)), tuple(sizes))


def _part(tensor: Tensor, device: int, devices: int, dimension: int | None, offset: int) -> tuple[Tensor, Copy]:
    """One device's part of a tensor, at `offset` of its block, and the copy that brings it there."""
    if dimension is None or devices == 1:
        whole = Tensor(tensor.name, tensor.dtype, tensor.shape, offset, tensor.length)
        return whole, Copy(device, tensor.offset, offset, tensor.length)
    extent = tensor.shape[dimension]
    step = -(-extent // devices)
    first, until = min(device * step, extent), min((device + 1) * step, extent)
    shape = (*tensor.shape[:dimension], until - first, *tensor.shape[dimension + 1 :])
    rows = math.prod(tensor.shape[:dimension])
    item = math.prod(tensor.shape[dimension + 1 :]) * ITEM_BITS[tensor.dtype]
    if item * first % 8 or item * until % 8 or item * extent % 8:
        raise ConfigError(
            f"{tensor.name} of type {tensor.dtype} can't be cut along dimension {dimension}: it would split a byte",
            remedy="Cut it along another dimension",
        )
    width, pitch = item * (until - first) // 8, item * extent // 8
    part = Tensor(tensor.name, tensor.dtype, shape, offset, rows * width)
    return part, Copy(device, tensor.offset + item * first // 8, offset, width, rows, pitch, width)


def _joined(copies: Iterable[Copy]) -> Iterator[Copy]:
    """Empty ones left out, single rows as one, and runs that lie side by side, but for the padding between tensors, in
    the source as in the block, as one run."""
    run: Copy | None = None
    for copy in map(_simple, copies):
        if copy.row_bytes * copy.rows == 0:
            continue
        if run is not None and copy.rows == 1 == run.rows:
            gap = copy.source - run.source - run.row_bytes
            if 0 <= gap < ALIGNMENT and copy.source - run.source == copy.target - run.target:
                run = run._replace(row_bytes=run.row_bytes + gap + copy.row_bytes)
                continue
        if run is not None:
            yield run
        run = copy
    if run is not None:
        yield run


def _simple(copy: Copy) -> Copy:
    one = copy.rows == 1 or copy.row_bytes == copy.source_pitch
    return Copy(copy.device, copy.source, copy.target, copy.row_bytes * copy.rows) if one else copy


def by_chunk(copies: Sequence[Copy], size: int, chunk_size: int) -> Iterator[tuple[int, tuple[Copy, ...]]]:
    """What of each chunk is needed: the number of each that is, with the copies of its plain bytes. `copies` are in the
    order of their source offsets, in a source of `size` bytes."""
    waiting = [(_end(copy), copy) for copy in reversed(copies)]
    active: list[tuple[int, Copy]] = []
    for number in range(-(-size // chunk_size)):
        begin, end = number * chunk_size, min((number + 1) * chunk_size, size)
        if len(active) == 1 and not waiting and active[0][1].rows == 1 and active[0][0] >= end:
            copy = active[0][1]  # the rest of a checkpoint that is loaded whole
            yield number, (Copy(copy.device, 0, copy.target + begin - copy.source, end - begin),)
            continue
        active = [each for each in active if each[0] > begin]
        while waiting and waiting[-1][1].source < end:
            active.append(waiting.pop())
        if parts := tuple(clipped([copy for _until, copy in active], begin, end)):
            yield number, parts


def _end(copy: Copy) -> int:
    return copy.source + (copy.rows - 1) * copy.source_pitch + copy.row_bytes
