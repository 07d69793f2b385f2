"""Attention of one new token per request over a paged cache, in Triton: what a captured decode step computes with.

    query (rows, heads, size), keys and values in pages, a table of pages and a length per row
        --_attend, per row, group of heads and split--> partial sums over a stretch of the keys, float32
        --_join, per row and head--> their sum, in the query's type

Everything that changes from step to step is read from memory of the GPU (lengths, tables), nothing from the call: so a
CUDA graph of it stays true. The keys of a row are cut into as many stretches as it takes to give every multiprocessor
something; how many depends on the shapes alone, and the cut on the row's own length, so a row's result does not depend
on what its neighbours are. A row of length 0 (padding) reads nothing and is zero.

The order of the keys does not matter: a sliding window, which the cache keeps as a ring, is the ring's filled part.

Under TRITON_INTERPRET=1 it runs on CPU tensors.
"""

from __future__ import annotations

import os
from typing import Final

import torch
import triton
import triton.language as tl

MAX_SPLITS: Final = 32
_PROGRAMS: Final = 256  # about two for each multiprocessor of a large GPU
_BLOCK: Final = 64
_LOG2_E: Final = 1.4426950408889634
_INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    *,
    page: int,
    stride: int,
    scaling: float | None,
) -> torch.Tensor:
    """The attention of (rows, heads, size) queries, as (rows, heads, size).

    `keys` and `values` are (places, kv heads, size), where token t of a row is at `tables[row, t // page] * stride +
    t % page`; a row has `lengths[row]` tokens.
    """
    rows, heads, size = query.shape
    kv_heads = keys.shape[1]
    splits = split_count(rows, kv_heads)
    sums = torch.empty((rows, heads, splits, size), dtype=torch.float32, device=query.device)
    peaks = torch.empty((2, rows, heads, splits), dtype=torch.float32, device=query.device)
    output = torch.empty((rows, heads, size), dtype=query.dtype, device=query.device)
    padded = max(triton.next_power_of_2(size), 16)
    _attend[(rows, kv_heads, splits)](
        query,
        keys,
        values,
        tables,
        lengths,
        sums,
        peaks[0],
        peaks[1],
        (size**-0.5 if scaling is None else scaling) * _LOG2_E,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        tables.stride(0),
        stride,
        PAGE=page,
        GROUP=heads // kv_heads,
        GROUP_PADDED=max(triton.next_power_of_2(heads // kv_heads), 16),
        SIZE=size,
        SIZE_PADDED=padded,
        BLOCK=_BLOCK,
        UPCAST=_INTERPRETED,
        num_warps=4,
    )
    _join[(rows * heads,)](
        sums, peaks[0], peaks[1], output, splits, SIZE=size, SIZE_PADDED=padded, SPLITS=MAX_SPLITS, num_warps=4
    )
    return output


def split_count(rows: int, kv_heads: int) -> int:
    """Into how many stretches the keys of a row are cut."""
    return max(1, min(MAX_SPLITS, _PROGRAMS // (rows * kv_heads)))


@triton.jit(do_not_specialize=["query_row", "query_head", "table_row", "stride"])
def _attend(
    query,
    keys,
    values,
    tables,
    lengths,
    sums,
    peaks,
    totals,
    scaling,
    query_row,
    query_head,
    key_row,
    key_head,
    table_row,
    stride,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """One stretch of one row's keys, for the heads that share them: the sum of weighted values, the highest score (as
    an exponent of two) that the weights are relative to, and the sum of the weights."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    length = tl.load(lengths + row).to(tl.int32)
    stretch = tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK
    begin = split * stretch
    end = tl.minimum(begin + stretch, length)

    member = tl.arange(0, GROUP_PADDED)
    part = tl.arange(0, SIZE_PADDED)
    head = kv_head * GROUP + member
    real = member < GROUP
    wide = part < SIZE
    q = tl.load(
        query + row * query_row + head[:, None] * query_head + part[None, :],
        mask=real[:, None] & wide[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)

    peak = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    summed = tl.zeros([GROUP_PADDED, SIZE_PADDED], tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        block = tl.load(tables + row * table_row + at // PAGE, mask=inside, other=0).to(tl.int64)
        place = (block * stride + at % PAGE) * key_row + kv_head * key_head
        k = tl.load(keys + place[None, :] + part[:, None], mask=wide[:, None] & inside[None, :], other=0.0)
        v = tl.load(values + place[:, None] + part[None, :], mask=inside[:, None] & wide[None, :], other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * scaling
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        kept = tl.exp2(peak - higher)
        total = total * kept + tl.sum(weights, 1)
        summed = summed * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        peak = higher

    heads = tl.num_programs(1) * GROUP
    own = (row * heads + head) * splits + split
    tl.store(peaks + own, peak, mask=real)
    tl.store(totals + own, total, mask=real)
    tl.store(sums + own[:, None] * SIZE + part[None, :], summed, mask=real[:, None] & wide[None, :])


@triton.jit(do_not_specialize=["splits"])
def _join(
    sums,
    peaks,
    totals,
    output,
    splits,
    SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """One head of one row: its stretches together."""
    own = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    part = tl.arange(0, SIZE_PADDED)
    there = split < splits
    wide = part < SIZE
    peak = tl.load(peaks + own * splits + split, mask=there, other=float("-inf"))
    highest = tl.max(peak, 0)
    weight = tl.exp2(peak - tl.where(highest == float("-inf"), 0.0, highest))  # none when the row has no keys
    total = tl.sum(weight * tl.load(totals + own * splits + split, mask=there, other=0.0), 0)
    places = (own * splits + split[:, None]) * SIZE + part[None, :]
    summed = tl.load(sums + places, mask=there[:, None] & wide[None, :], other=0.0)
    result = tl.sum(summed * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(output + own * SIZE + part, result.to(output.dtype.element_ty), mask=wide)
