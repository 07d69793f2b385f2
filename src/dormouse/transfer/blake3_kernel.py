"""Checks the signatures of stored chunks in GPU memory, where they lie after the link, so that the CPUs need not read
them: the memory bus of the host is what limits a load.

    rows, identities, macs -> prepare() -> tables on the device, once per plan
    staging -> leaves -> tree, 256 leaves at a time -> tree of those -> compared with the signature -> status

A signature is keyed BLAKE3 of the stored bytes and an identity of 37 bytes, cut to 16 (store/pack.py, chunk_mac).
BLAKE3 cuts a message into leaves of 1024 bytes, of which each gives 32 bytes (a "value" here) by itself: one thread
hashes one leaf. The values are the lowest level of a tree, where each parent is the hash of two neighbours and a last
one without a neighbour moves up as it is. Leaves of stored bytes alone are hashed apart from the last one or two, where
the identity begins: these "tails" are put together word by word.

The kernels run under TRITON_INTERPRET=1 too, without a GPU. Arithmetic is on uint32 throughout.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from dormouse.store.pack import IDENTITY_SIZE, MAC_SIZE

_KEY_SIZE = 32
_LEAF = 1024
_GROUP = 256
_ALIGNMENT = 16
_LARGEST = _GROUP * _GROUP * _LEAF - IDENTITY_SIZE
_WORDS_OF_VALUE = 8

LEAF = tl.constexpr(_LEAF)
GROUP = tl.constexpr(_GROUP)
"""Leaves whose part of the tree one program computes; a second run over the results suffices, up to 64 MiB."""
IDENTITY = tl.constexpr(IDENTITY_SIZE)
IDENTITY_WORDS = tl.constexpr(10)
"""An identity that begins at any of the four bytes of a word fits in this many."""
COLUMNS = tl.constexpr(4)
"""Of the table of tasks: source / 16, stored length, leaves of the tasks before, groups of the tasks before."""

CHUNK_START = tl.constexpr(1)
CHUNK_END = tl.constexpr(2)
PARENT = tl.constexpr(4)
ROOT = tl.constexpr(8)
KEYED = tl.constexpr(16)

LEAF_LANES = tl.constexpr(64)
TREE_LANES = tl.constexpr(_GROUP // 2)


@dataclass(frozen=True)
class SignedTasks:
    """What `check` needs to know of all chunks of a plan. Tensors lie on the device, lists here: with them a launch is
    sized without asking the device. Keep it until the last check is done, not only launched."""

    table: torch.Tensor
    groups: torch.Tensor
    identities: torch.Tensor
    macs: torch.Tensor
    leaves_before: list[int]
    groups_before: list[int]
    ends: list[int]


class SignatureCheck:
    """Checks signatures made with one key (`key.chunks.secret`). Threads may share it, each with its own stream."""

    def __init__(self, device: torch.device | str, key_bytes: bytes) -> None:
        if len(key_bytes) != _KEY_SIZE:
            raise ValueError(f"a key has {_KEY_SIZE} bytes, not {len(key_bytes)}")
        self._device = torch.device(device)
        # An argument and no constant of the kernel: constants would end up in Triton's cache of compiled kernels.
        self._key = torch.frombuffer(bytearray(key_bytes), dtype=torch.int32).to(self._device)

    def prepare(self, rows: Any, identities: Any, macs: Any) -> SignedTasks:
        """Upload what is known of `rows` (int64 [n, 2]: source, a multiple of 16, and stored length), their identities
        (uint8 [n, 37], or all as bytes; store/pack.py, identity) and signatures (uint8 [n, 16], or all as bytes).
        Arrays and lists will do as well as tensors. Waits for the device."""
        rows = _array(rows, np.int64).reshape(-1, 2)
        source, length = rows[:, 0], rows[:, 1]
        _check_rows(source, length)
        leaves = (length + (IDENTITY_SIZE + _LEAF - 1)) // _LEAF
        groups = (leaves + (_GROUP - 1)) // _GROUP
        leaves_before, groups_before = _before(leaves), _before(groups)
        return SignedTasks(
            table=self._upload(
                np.stack((source // _ALIGNMENT, length, leaves_before[:-1], groups_before[:-1]), axis=1)
            ),
            groups=self._upload(np.repeat(np.arange(len(rows), dtype=np.int32), groups)),
            identities=self._upload(_shifted(_bytes(identities, len(rows), IDENTITY_SIZE), length)),
            macs=self._upload(_bytes(macs, len(rows), MAC_SIZE).view(np.int32)),
            leaves_before=leaves_before.tolist(),
            groups_before=groups_before.tolist(),
            ends=(source + length).tolist(),
        )

    def _upload(self, array: npt.NDArray[Any]) -> torch.Tensor:
        # numpy up to here: torch would start, and keep spinning, a thread on every CPU for tables of this size
        return torch.from_numpy(array).to(self._device)

    def check(self, tasks: SignedTasks, first: int, count: int, staging: torch.Tensor, status: torch.Tensor) -> None:
        """Check `count` tasks from `first` on, whose sources are offsets into `staging` (uint8), on the current stream:
        bit 0 of `status` (int32 [1]) is set when any of them has another signature. Does not wait for the device."""
        if count == 0:
            return
        end = first + count
        _check_call(tasks, first, end, staging, status)
        leaves = tasks.leaves_before[end] - tasks.leaves_before[first]
        groups = tasks.groups_before[end] - tasks.groups_before[first]
        with self._current():
            # Allocated per call, so that the allocator keeps calls on different streams apart.
            values = torch.empty(leaves * _WORDS_OF_VALUE, dtype=torch.int32, device=self._device)
            tails = triton.cdiv(2 * count, LEAF_LANES.value)
            known = (tasks.table, tasks.groups)
            _leaves[(tails + groups * (_GROUP // LEAF_LANES.value),)](
                staging, *known, tasks.identities, self._key, values, leaves, first, count, tails,
                num_warps=LEAF_LANES.value // 32, num_stages=1,
            )  # fmt: skip
            for again in (False, True) if groups > count else (False,):
                _tree[(count if again else groups,)](
                    *known, tasks.macs, self._key, values, status, leaves, first,
                    AGAIN=again, num_warps=TREE_LANES.value // 32, num_stages=1,
                )  # fmt: skip

    def warm(self) -> None:
        """Compile (or take from Triton's cache) what checks, so that no load waits for it later."""
        length = 2 * _GROUP * _LEAF  # more than one group: all forms of the kernels
        staging = torch.zeros(length, dtype=torch.uint8, device=self._device)
        status = torch.zeros(1, dtype=torch.int32, device=self._device)
        tasks = self.prepare([[0, length]], np.zeros((1, IDENTITY_SIZE), np.uint8), np.zeros((1, MAC_SIZE), np.uint8))
        self.check(tasks, 0, 1, staging, status)

    def _current(self) -> contextlib.AbstractContextManager[Any]:
        """Triton launches on the current device, whatever device the tensors are on."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()


def _check_rows(source: npt.NDArray[np.int64], length: npt.NDArray[np.int64]) -> None:
    if ((source < 0) | (source % _ALIGNMENT != 0)).any():
        raise ValueError(f"a source is no multiple of {_ALIGNMENT}")
    if ((length < 0) | (length > _LARGEST)).any():
        raise ValueError(f"a stored length is not within 0 .. {_LARGEST}")


def _check_call(tasks: SignedTasks, first: int, end: int, staging: torch.Tensor, status: torch.Tensor) -> None:
    """The kernels trust these: nothing is read past the end of a task."""
    if not 0 <= first < end <= len(tasks.ends):
        raise ValueError(f"there are no tasks {first} to {end}: {len(tasks.ends)} were prepared")
    if staging.dtype != torch.uint8 or not staging.is_contiguous() or staging.data_ptr() % _ALIGNMENT:
        raise ValueError(f"staging is not contiguous bytes that begin at a multiple of {_ALIGNMENT}")
    if max(tasks.ends[first:end]) > staging.numel():
        raise ValueError(f"a task of {first} to {end} ends after the {staging.numel()} bytes of staging")
    if status.dtype != torch.int32 or status.numel() != 1:
        raise ValueError("status is not one int32")
    if not staging.device == status.device == tasks.table.device:
        raise ValueError(f"staging is on {staging.device}, status on {status.device}, not on {tasks.table.device}")


def _bytes(values: Any, count: int, size: int) -> npt.NDArray[np.uint8]:
    flat = np.frombuffer(values, np.uint8) if isinstance(values, bytes) else _array(values, np.uint8)
    return np.array(flat.reshape(count, size))  # a copy: torch warns of sharing what must not be written


def _array(values: Any, kind: type[Any]) -> npt.NDArray[Any]:
    return np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values, kind)


def _before(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For each the sum of those before it, and at last the sum of all."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))


def _shifted(identities: npt.NDArray[np.uint8], length: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """The identities as words, beginning at the byte of a word where the stored bytes end; zeros around them."""
    shifted = np.zeros((len(length), IDENTITY_WORDS.value * 4), np.uint8)
    for begin in range(4):
        mine = length % 4 == begin
        shifted[mine, begin : begin + IDENTITY_SIZE] = identities[mine]
    return shifted.view(np.int32)


@triton.jit
def _rotated(x, by: tl.constexpr):
    return (x >> by) | (x << (32 - by))


@triton.jit
def _mixed(a, b, c, d, x, y):
    a = a + b + x
    d = _rotated(d ^ a, 16)
    c = c + d
    b = _rotated(b ^ c, 12)
    a = a + b + y
    d = _rotated(d ^ a, 8)
    c = c + d
    b = _rotated(b ^ c, 7)
    return a, b, c, d


@triton.jit
def _compressed(h, m, counter, length, flags):
    """The first 8 words of BLAKE3's compression of a block `m` with the value `h`; `counter`, `length` and `flags` are
    tensors of one shape with the words. The constants are those of SHA-256."""
    v0, v1, v2, v3, v4, v5, v6, v7 = h
    none = tl.zeros_like(counter)
    v8 = none + 0x6A09E667
    v9 = none + 0xBB67AE85
    v10 = none + 0x3C6EF372
    v11 = none + 0xA54FF53A
    v12 = counter
    v13 = none
    v14 = length
    v15 = flags
    for _ in range(7):  # not unrolled: Triton's passes take a time that grows with the square of the operations
        v0, v4, v8, v12 = _mixed(v0, v4, v8, v12, m[0], m[1])
        v1, v5, v9, v13 = _mixed(v1, v5, v9, v13, m[2], m[3])
        v2, v6, v10, v14 = _mixed(v2, v6, v10, v14, m[4], m[5])
        v3, v7, v11, v15 = _mixed(v3, v7, v11, v15, m[6], m[7])
        v0, v5, v10, v15 = _mixed(v0, v5, v10, v15, m[8], m[9])
        v1, v6, v11, v12 = _mixed(v1, v6, v11, v12, m[10], m[11])
        v2, v7, v8, v13 = _mixed(v2, v7, v8, v13, m[12], m[13])
        v3, v4, v9, v14 = _mixed(v3, v4, v9, v14, m[14], m[15])
        m = (m[2], m[6], m[3], m[10], m[7], m[0], m[4], m[13], m[1], m[11], m[12], m[5], m[9], m[14], m[15], m[8])
    return v0 ^ v8, v1 ^ v9, v2 ^ v10, v3 ^ v11, v4 ^ v12, v5 ^ v13, v6 ^ v14, v7 ^ v15


@triton.jit
def _word(pointer):
    return tl.load(pointer).to(tl.uint32, bitcast=True)


@triton.jit
def _start(key, none):
    """The value that leaves and parents begin with: the key, for every lane."""
    return (
        none + _word(key), none + _word(key + 1), none + _word(key + 2), none + _word(key + 3),
        none + _word(key + 4), none + _word(key + 5), none + _word(key + 6), none + _word(key + 7),
    )  # fmt: skip


@triton.jit
def _store(values, pitch, at, h, mask):
    """Word k of a value lies `pitch` words after word k - 1, so that neighbouring lanes store to neighbouring words."""
    for k in tl.static_range(8):
        tl.store(values + k * pitch + at, h[k].to(tl.int32, bitcast=True), mask=mask)


@triton.jit
def _load(values, pitch):
    return (
        _word(values), _word(values + pitch), _word(values + 2 * pitch), _word(values + 3 * pitch),
        _word(values + 4 * pitch), _word(values + 5 * pitch), _word(values + 6 * pitch), _word(values + 7 * pitch),
    )  # fmt: skip


@triton.jit
def _halves(words):
    """The columns of even and of odd number."""
    return tl.split(tl.reshape(words, (words.shape[0], words.shape[1] // 2, 2)))


@triton.jit
def _columns(words):
    """The columns of four."""
    even, odd = _halves(words)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _four(pointer, at):
    """Four neighbouring words for each lane, by one load of 16 bytes."""
    return _columns(tl.load(pointer + (at[:, None] + tl.arange(0, 4)[None, :])))


@triton.jit
def _block(pointer, at):
    return _four(pointer, at) + _four(pointer, at + 4) + _four(pointer, at + 8) + _four(pointer, at + 12)


@triton.jit
def _whole_leaves(words, source, key, values, pitch, begin, first, whole):
    """Hash leaves `first` and on of the `whole` ones of a task. None of them is the last, hence none the root."""
    lane = first + tl.arange(0, LEAF_LANES)
    leaf = tl.minimum(lane, whole - 1)
    counter = leaf.to(tl.uint32)
    none = tl.zeros_like(counter)
    h = _start(key, none)
    at = leaf * (LEAF // 4)
    for block in range(16):
        m = _block(words + source * 4, at + block * 16)
        flags = KEYED + tl.where(block == 0, CHUNK_START, 0) + tl.where(block == 15, CHUNK_END, 0)
        h = _compressed(h, m, counter, none + 64, none + flags.to(tl.uint32))
    _store(values, pitch, begin + lane, h, lane < whole)


@triton.jit
def _edge(stored, length, there):
    """The last stored bytes, of which there are less than a word."""
    edge = length & ~3
    word = tl.zeros_like(length).to(tl.uint32)
    for k in tl.static_range(3):
        byte = tl.load(stored + edge + k, mask=there & (edge + k < length), other=0)
        word |= byte.to(tl.uint32) << (8 * k)
    return word


@triton.jit
def _tail_block(stored, identity, edge, at, length, there):
    """The block at a position (in bytes) of a message: stored bytes, the identity, zeros, or the edge between them."""
    position = at[:, None] + tl.arange(0, 16)[None, :] * 4
    last = (length & ~3)[:, None]
    whole = tl.load(stored[:, None] + (position >> 2), mask=there[:, None] & (position < last), other=0)
    index = (position - last) >> 2
    inside = there[:, None] & (index >= 0) & (index < IDENTITY_WORDS)
    named = tl.load(identity[:, None] + index, mask=inside, other=0).to(tl.uint32, bitcast=True)
    even, odd = _halves(whole | named | tl.where(position == last, edge[:, None], 0))
    a, c = _halves(even)
    b, d = _halves(odd)
    a, b, c, d = _columns(a), _columns(b), _columns(c), _columns(d)
    return (
        a[0], b[0], c[0], d[0], a[1], b[1], c[1], d[1], a[2], b[2], c[2], d[2], a[3], b[3], c[3], d[3],
    )  # fmt: skip


@triton.jit
def _tails(staging, words, table, identities, key, values, pitch, first, count, program):
    """Hash the last one or two leaves of tasks, where the identities lie: two lanes per task."""
    lane = program * LEAF_LANES + tl.arange(0, LEAF_LANES)
    second = lane & 1
    task = first + tl.minimum(lane >> 1, count - 1)
    source = tl.load(table + task * COLUMNS)
    length = tl.load(table + task * COLUMNS + 1).to(tl.int32)
    begin = (tl.load(table + task * COLUMNS + 2) - tl.load(table + first * COLUMNS + 2)).to(tl.int32)
    leaf = (length // LEAF) + second
    rest = length + IDENTITY - leaf * LEAF
    there = ((lane >> 1) < count) & (rest > 0)
    alone = (leaf == 0) & (rest <= LEAF)
    last_block = (tl.minimum(rest, LEAF) - 1) // 64
    stored, identity = words + source * 4, identities + task * IDENTITY_WORDS
    edge = _edge(staging + source * 16, length, there)
    counter = leaf.to(tl.uint32)
    none = tl.zeros_like(counter)
    h = _start(key, none)
    end = tl.max(tl.where(there, last_block, 0), axis=0)
    block = 0
    while block <= end:
        at = leaf * LEAF + block * 64
        m = _tail_block(stored, identity, edge, at, length, there)
        flags = KEYED + tl.where(block == 0, CHUNK_START, 0) + tl.where(block == last_block, CHUNK_END, 0)
        flags += tl.where((block == last_block) & alone, ROOT, 0)
        size = tl.minimum(tl.maximum(rest - block * 64, 0), 64)
        after = _compressed(h, m, counter, size.to(tl.uint32), flags.to(tl.uint32))
        more = block <= last_block
        h = (
            tl.where(more, after[0], h[0]), tl.where(more, after[1], h[1]),
            tl.where(more, after[2], h[2]), tl.where(more, after[3], h[3]),
            tl.where(more, after[4], h[4]), tl.where(more, after[5], h[5]),
            tl.where(more, after[6], h[6]), tl.where(more, after[7], h[7]),
        )  # fmt: skip
        block += 1
    _store(values, pitch, begin + leaf, h, there)


@triton.jit(do_not_specialize=["pitch", "first", "count", "tails"])
def _leaves(staging, table, groups, identities, key, values, pitch, first, count, tails):
    """Fill `values` with those of all leaves of the tasks: the first `tails` programs see to the tails."""
    words = staging.to(tl.pointer_type(tl.uint32))
    program = tl.program_id(0)
    if program < tails:
        _tails(staging, words, table, identities, key, values, pitch, first, count, program)
    else:
        mine = program - tails
        group = tl.load(table + first * COLUMNS + 3) + mine // (GROUP // LEAF_LANES)
        task = tl.load(groups + group)
        row = table + task * COLUMNS
        leaf = ((group - tl.load(row + 3)) * GROUP).to(tl.int32) + (mine % (GROUP // LEAF_LANES)) * LEAF_LANES
        whole = (tl.load(row + 1) // LEAF).to(tl.int32)
        begin = (tl.load(row + 2) - tl.load(table + first * COLUMNS + 2)).to(tl.int32)
        if leaf < whole:
            _whole_leaves(words, tl.load(row), key, values, pitch, begin, leaf, whole)


@triton.jit(do_not_specialize=["pitch", "first"], do_not_specialize_on_alignment=["status"])
def _tree(table, groups, macs, key, values, status, pitch, first, AGAIN: tl.constexpr):
    """Put the value of up to 256 leaves in the place of the first of them; `AGAIN`: of up to 256 of these. Where that
    comes to the root, it is compared with the signature."""
    if AGAIN:
        task = first + tl.program_id(0)
    else:
        group = tl.load(table + first * COLUMNS + 3) + tl.program_id(0)
        task = tl.load(groups + group)
    row = table + task * COLUMNS
    leaves = ((tl.load(row + 1) + (IDENTITY + LEAF - 1)) // LEAF).to(tl.int32)
    begin = (tl.load(row + 2) - tl.load(table + first * COLUMNS + 2)).to(tl.int32)
    if AGAIN:
        left = (leaves + (GROUP - 1)) // GROUP
        whole = left > 1  # else the root was reached before
    else:
        leaf = ((group - tl.load(row + 3)) * GROUP).to(tl.int32)
        left = tl.minimum(leaves - leaf, GROUP)
        begin += leaf
        whole = leaves <= GROUP
    STRIDE: tl.constexpr = GROUP if AGAIN else 1
    base = values + begin
    while left > 1:
        _level(base, pitch, key, left, STRIDE, tl.where(whole & (left == 2), ROOT, 0))
        left = (left + 1) // 2
    if whole:
        differs = _word(base) ^ _word(macs + task * 4)
        for k in tl.static_range(1, 4):
            differs |= _word(base + k * pitch) ^ _word(macs + task * 4 + k)
        tl.atomic_or(status, (differs != 0).to(tl.int32), sem="relaxed")


@triton.jit
def _level(base, pitch, key, left, STRIDE: tl.constexpr, root):
    """One level of the tree, in place: neighbours give a parent each, a last one without a neighbour moves up."""
    lane = tl.arange(0, TREE_LANES)
    even = tl.minimum(lane * 2, (left - 1) & ~1)
    odd = tl.minimum(even + 1, left - 1)
    m = _load(base + even * STRIDE, pitch) + _load(base + odd * STRIDE, pitch)
    none = tl.zeros_like(m[0])
    flags = KEYED + PARENT + root
    h = _compressed(_start(key, none), m, none, none + 64, none + flags.to(tl.uint32))
    paired = lane * 2 + 1 < left
    tl.debug_barrier()  # all have read before any writes
    for k in tl.static_range(8):
        moved = tl.where(paired, h[k], m[k])
        tl.store(base + k * pitch + lane * STRIDE, moved.to(tl.int32, bitcast=True), mask=lane < (left + 1) // 2)
    tl.debug_barrier()  # and all have written before any reads
