"""The float codecs (docs/formats.md) on a GPU, in Triton: chunks are decoded in place behind the link, coded before it.

    rows -> FloatDecoder.prepare() -> Tasks -> decode(tasks, first, count): coded staging memory -> plain destination
    plain weights -> encode_batch(): bases, counts by distance from them -> deltas, places -> coded chunks

Decoding runs one program for each unit of 8192 values, which knows its places in the streams of digits from the unit
table, so units need nothing of each other:

    level 1 -> ranks of the values that it leaves open (one scan) | level 2, 3 and raw in the order of these ranks
            -> their exponents, written as bytes into the unit's own place in the destination -> barrier
            -> exponents of all values -> barrier -> with signs and mantissas, as plain values

A program validates the header and the unit's counts before it relies on them: loads stay inside the payload and stores
inside the target whatever the payload says. A payload that does not fit sets the status word; whoever reads that word
throws the destination away.

Only this module and who needs a GPU imports Triton. Under TRITON_INTERPRET=1 everything here runs on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from dormouse.store.floats import FORMATS, UNIT, FloatFormat

ROW_FIELDS: Final = 5


class Kind(NamedTuple):
    """How one kind of float is cut: bytes of a value, lowest bit and width of its exponent field, widths of the planes
    that hold the rest."""

    item: int
    low: int
    bits: int
    widths: tuple[int, int, int]

    @property
    def constants(self) -> dict[str, int]:
        """As the kernels take it."""
        w0, w1, w2 = self.widths
        return {"ITEM": self.item, "LOW": self.low, "BITS": self.bits, "W0": w0, "W1": w1, "W2": w2}


def _kind(form: FloatFormat) -> Kind:
    first, second, third, *_ = (*form.planes, 0, 0)
    return Kind(form.item, form.low, form.bits, (first, second, third))


KINDS: Final = {int(codec): _kind(form) for codec, form in FORMATS.items()}
"""By codec number."""

DECODE_OPTIONS: Final[dict[str, Any]] = {"LANES": 256, "num_warps": 4, "maxnreg": 128}
WRITE_OPTIONS: Final[dict[str, Any]] = {"LANES": 256, "num_warps": 4, "maxnreg": 128}
"""Measured with bench/codec_gpu.py."""


# ---- what both directions share -------------------------------------------------------------------------------------


@triton.jit
def _spread(flags):
    """Flags at bits 0, 2, 4, 6 as counts in four 16-bit fields: one scan then counts for four values at a time."""
    wide = flags.to(tl.int64)
    return (wide & 1) | ((wide & 4) << 14) | ((wide & 16) << 28) | ((wide & 64) << 42)


@triton.jit
def _field(counts, k: tl.constexpr):
    return ((counts >> (16 * k)) & 0xFFFF).to(tl.int32)


@triton.jit
def _threes(packed):
    """A flag at the low bit of each 2-bit digit that is 3."""
    return packed & (packed >> 1) & 0x55


@triton.jit
def _flag(flags, k: tl.constexpr):
    return (flags & (1 << (2 * k))) != 0


# ---- decoding -------------------------------------------------------------------------------------------------------


@triton.jit
def _digit(stream, index, wanted):
    byte = tl.load(stream + (index >> 2), mask=wanted, other=0).to(tl.int32)
    return (byte >> ((index & 3) * 2)) & 3


@triton.jit
def _look_up(table, digit):
    return (table >> (8 * digit)) & 0xFF


@triton.jit
def _count(flags):
    pairs = (flags + (flags >> 2)) & 0x33
    return (pairs + (pairs >> 4)) & 0xF


@triton.jit
def _bytes(packed):
    """The four digits of a byte as the four bytes of a word."""
    half = (packed | (packed << 12)) & 0x000F000F
    return (half | (half << 6)) & 0x03030303


@triton.jit
def _read_plane(plane, value, WIDTH: tl.constexpr):
    if WIDTH == 16:
        rest = tl.load(plane.to(tl.pointer_type(tl.uint16)) + value).to(tl.int32)
    elif WIDTH == 8:
        rest = tl.load(plane + value).to(tl.int32)
    else:
        each: tl.constexpr = 1024 * WIDTH
        byte = tl.load(plane + value % each).to(tl.int32)
        rest = (byte >> (value // each * WIDTH)) & ((1 << WIDTH) - 1)
    return rest


@triton.jit
def _read_rest(
    payload,
    plane0,
    plane1,
    plane2,
    unit,
    value,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
):
    """Signs and mantissas. Planes start at a multiple of 16 in a payload that does, so the loads are vectors."""
    rest = tl.zeros_like(value)
    if plane0 >= 0:
        rest = _read_plane(payload + tl.multiple_of(plane0 + unit * (1024 * W0), 16), value, W0)
    if W1 > 0:  # noqa: SIM102 (decided by the compiler; the next by the GPU)
        if plane1 >= 0:
            rest |= _read_plane(payload + tl.multiple_of(plane1 + unit * (1024 * W1), 16), value, W1) << W0
    if W2 > 0:  # noqa: SIM102
        if plane2 >= 0:
            rest |= _read_plane(payload + tl.multiple_of(plane2 + unit * (1024 * W2), 16), value, W2) << (W0 + W1)
    return rest


@triton.jit
def _store_values(out, value, bits, left, ITEM: tl.constexpr, ALIGN: tl.constexpr):
    """A mask would undo the vectors, so only a last, partial unit has one."""
    if ALIGN >= ITEM:
        if ITEM == 1:
            typed = out
            item = bits.to(tl.uint8)
        elif ITEM == 2:
            typed = out.to(tl.pointer_type(tl.uint16))
            item = bits.to(tl.uint16)
        else:
            typed = out.to(tl.pointer_type(tl.int32))
            item = bits
        if left >= 8192:
            tl.store(typed + value, item)
        else:
            tl.store(typed + value, item, mask=value < left)
    else:
        for byte in tl.static_range(ITEM):
            tl.store(out + (value * ITEM + byte), (bits >> (8 * byte)).to(tl.uint8), mask=value < left)


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["status"])
def _decode(  # noqa: PLR0915 (a kernel is one function)
    staging,
    destination,
    status,
    tasks,
    programs,
    first,
    ITEM: tl.constexpr,
    LOW: tl.constexpr,
    BITS: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    ALIGN: tl.constexpr,
    LANES: tl.constexpr,
):
    program = first + tl.program_id(0)
    task = tasks + tl.load(programs + program).to(tl.int64) * 5
    source = tl.multiple_of(tl.load(task), 16)
    stored = tl.load(task + 1)
    target = tl.multiple_of(tl.load(task + 2), ALIGN)
    plain = tl.load(task + 3)
    unit = program - tl.load(task + 4)
    payload = staging + source
    out = destination + target

    # The header, and the places of the sections that follow from it.
    words = payload.to(tl.pointer_type(tl.uint32))
    there = stored >= 64
    form = tl.load(words, mask=there, other=0)
    n = tl.load(words + 1, mask=there, other=0).to(tl.int64)
    m2 = tl.load(words + 2, mask=there, other=0).to(tl.int64)
    m3 = tl.load(words + 3, mask=there, other=0).to(tl.int64)
    m4 = tl.load(words + 4, mask=there, other=0).to(tl.int64)
    lower = tl.load(words + 5, mask=there, other=0)
    upper = tl.load(words + 6, mask=there, other=0)
    reserved = (form >> 16) | (upper >> 16)
    for word in tl.static_range(7, 16):
        reserved |= tl.load(words + word, mask=there, other=0)
    absent = (form >> 8) & 0xFF
    units = (n + 8191) // 8192
    at = 64 + units * 16
    plane0 = tl.where((absent & 1) != 0, -1, at)
    at += tl.where((absent & 1) != 0, 0, units * (1024 * W0))
    plane1 = tl.where((absent & 2) != 0, -1, at)
    at += tl.where((absent & 2) != 0, 0, units * (1024 * W1))
    plane2 = tl.where((absent & 4) != 0, -1, at)
    at += tl.where((absent & 4) != 0, 0, units * (1024 * W2))
    level1 = at
    level2 = level1 + units * 2048
    level3 = (level2 + (m2 + 3) // 4 + 15) // 16 * 16
    raw = (level3 + (m3 + 3) // 4 + 15) // 16 * 16
    tail = (raw + m4 + 15) // 16 * 16
    trailing = plain - n * ITEM
    PLANES: tl.constexpr = 1 + (W1 > 0) + (W2 > 0)
    fits = there & ((form & 0xFF) == 1) & (absent < (1 << PLANES)) & (reserved == 0)
    fits = fits & (trailing >= 0) & (trailing < ITEM) & (tail + trailing == stored)
    fits = fits & ((n > 0) | ((m2 | m3 | m4) == 0))
    if not fits:
        tl.store(status, 1)
        return
    few = tl.arange(0, 4)
    mine = (unit == 0) & (few < trailing)
    tl.store(out + n * ITEM + few, tl.load(payload + tail + few, mask=mine, other=0), mask=mine)
    if n == 0:
        return

    # The unit's row, and where the next one says that this one ends.
    row = words + (16 + unit * 4)
    s2 = tl.load(row).to(tl.int64)
    s3 = tl.load(row + 1).to(tl.int64)
    s4 = tl.load(row + 2).to(tl.int64)
    base_word = tl.load(row + 3)
    more = unit + 1 < units
    e2 = tl.where(more, tl.load(row + 4, mask=more, other=0).to(tl.int64), m2)
    e3 = tl.where(more, tl.load(row + 5, mask=more, other=0).to(tl.int64), m3)
    e4 = tl.where(more, tl.load(row + 6, mask=more, other=0).to(tl.int64), m4)
    left = n - unit * 8192

    # Level 1: digit k of byte `lane` belongs to value k * 2048 + lane, so the order of ranks is: all of k = 0 first.
    lane = tl.arange(0, 2048)
    packed = tl.load(payload + tl.multiple_of(level1 + unit * 2048, 16) + lane).to(tl.int32)
    open1 = _threes(packed)
    counts = _spread(open1)
    before = tl.cumsum(counts, 0) - counts
    total = tl.sum(counts, 0)
    t1 = _field(total, 0)
    t2 = t1 + _field(total, 1)
    t3 = t2 + _field(total, 2)
    count = t3 + _field(total, 3)
    bad = (s2 + count != e2) | (e2 > m2) | (e3 < s3) | (e3 > m3) | (e4 < s4) | (e4 > m4) | (base_word > 0xFF)
    bad = bad | (count > left) | (e3 - s3 > count) | (e4 - s4 > count) | ((unit == 0) & ((s2 | s3 | s4) != 0))
    if bad:
        tl.store(status, 1)
        return

    # Levels 2, 3 and raw, four digits of level 2 a lane, from the last border of 16 bytes on: `rank` of a lane's first
    # digit is below 0 where it is another unit's. The exponents go to the unit's place in the destination for now:
    # there are at most as many as values, each a byte.
    base = base_word.to(tl.int32)
    count3 = (e3 - s3).to(tl.int32)
    count4 = (e4 - s4).to(tl.int32)
    table2 = (lower & 0xFFFFFF).to(tl.int32)
    table3 = ((lower >> 24) | ((upper & 0xFFFF) << 8)).to(tl.int32)
    skew2 = (s2 % 64).to(tl.int32)
    stream2 = payload + tl.multiple_of(level2 + s2 // 64 * 16, 16)
    skew3 = (s3 % 4).to(tl.int32)
    stream3 = payload + (level3 + s3 // 4)
    stream4 = payload + (raw + s4)
    out += unit * (8192 * ITEM)
    short = tl.arange(0, LANES)
    found3 = 0
    found4 = 0
    tile = 0
    while tile < skew2 + count:  # (The interpreter's ranges want numbers known before.)
        rank = (tile - skew2) + 4 * short
        second = tl.load(stream2 + (tile // 4) + short, mask=rank < count, other=0).to(tl.int32)
        ours = 0xFF << tl.minimum(tl.maximum(-2 * rank, 0), 8)
        ours &= 0xFF >> tl.minimum(tl.maximum(2 * (rank + 4 - count), 0), 8)
        open2 = _threes(second) & ours
        some = _count(open2)
        rank3 = tl.cumsum(some, 0) - some + found3
        found3 += tl.sum(some, 0)
        third = tl.zeros_like(second)
        for k in tl.static_range(4):
            third |= _digit(stream3, skew3 + rank3, _flag(open2, k) & (rank3 < count3)) << (2 * k)
            rank3 += (open2 >> (2 * k)) & 1
        open3 = _threes(third)
        some = _count(open3)
        rank4 = tl.cumsum(some, 0) - some + found4
        found4 += tl.sum(some, 0)
        for k in tl.static_range(4):
            delta3 = _look_up(table3, (third >> (2 * k)) & 3)
            delta = tl.where(_flag(open2, k), delta3, _look_up(table2, (second >> (2 * k)) & 3)).to(tl.uint8)
            delta = tl.load(stream4 + rank4, mask=_flag(open3, k) & (rank4 < count4), other=delta).to(tl.int32)
            rank4 += (open3 >> (2 * k)) & 1
            tl.store(out + (rank + k), (delta + base).to(tl.uint8), mask=(rank + k >= 0) & (rank + k < count))
        tile += 4 * LANES
    if (found3 != count3) | (found4 != count4):
        tl.store(status, 1)
        return

    # All exponents, four in a word: first those that level 1 tells, then those of the ranks.
    tl.debug_barrier()
    fields = (_bytes(packed) + (base & 0x7F) * 0x01010101) ^ tl.where(base >= 0x80, -0x7F7F7F80, 0)
    exponents = tl.load(out + _field(before, 0), mask=_flag(open1, 0), other=fields.to(tl.uint8)).to(tl.int32)
    place = out + (t1 + _field(before, 1))
    exponents |= tl.load(place, mask=_flag(open1, 1), other=(fields >> 8).to(tl.uint8)).to(tl.int32) << 8
    place = out + (t2 + _field(before, 2))
    exponents |= tl.load(place, mask=_flag(open1, 2), other=(fields >> 16).to(tl.uint8)).to(tl.int32) << 16
    place = out + (t3 + _field(before, 3))
    exponents |= tl.load(place, mask=_flag(open1, 3), other=(fields >> 24).to(tl.uint8)).to(tl.int32) << 24
    tl.debug_barrier()

    for k in tl.static_range(4):
        value = k * 2048 + lane
        exponent = (exponents >> (8 * k)) & ((1 << BITS) - 1)
        rest = _read_rest(payload, plane0, plane1, plane2, unit, value, W0, W1, W2)
        bits = (rest & ((1 << LOW) - 1)) | (exponent << LOW) | ((rest >> LOW) << (LOW + BITS))
        _store_values(out, value, bits, left, ITEM, ALIGN)


class _Batch(NamedTuple):
    """The rows of one codec. `places` are their numbers among all rows, `ends` where they end in the staging memory and
    in the destination, `starts` their first programs (one longer)."""

    kind: Kind
    align: int
    places: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    table: torch.Tensor
    programs: torch.Tensor


@dataclass(frozen=True)
class Tasks:
    """A whole plan's chunks, on the device."""

    batches: tuple[_Batch, ...]


class FloatDecoder:
    """Decodes chunks of float codecs on one device. Rows of other codecs are skipped: they are copies."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)

    def prepare(self, rows: npt.NDArray[np.int64]) -> Tasks:
        """Upload [codec, source, stored_length, target, plain_length] of many chunks, once for a whole plan. Sources
        are multiples of 16; targets may be anything, but multiples of 16 are decoded fastest."""
        rows = np.ascontiguousarray(rows, dtype=np.int64).reshape(-1, ROW_FIELDS)
        if (rows[:, 1:] < 0).any() or (rows[:, 1] % 16).any():
            raise ValueError("a chunk to decode has a place or length below 0, or a source that is no multiple of 16")
        found = ((kind, np.flatnonzero(rows[:, 0] == codec)) for codec, kind in KINDS.items())
        return Tasks(tuple(self._batch(kind, rows[places, 1:], places) for kind, places in found if len(places)))

    def _batch(self, kind: Kind, rows: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> _Batch:
        units = np.maximum(-(-(rows[:, 3] // kind.item) // UNIT), 1)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(units)])
        table = self._upload(np.column_stack([rows, starts[:-1]]))
        programs = self._upload(np.repeat(np.arange(len(places), dtype=np.int32), units))
        align = _alignment(int(np.bitwise_or.reduce(rows[:, 2])))
        return _Batch(kind, align, places, rows[:, 0::2] + rows[:, 1::2], starts, table, programs)

    def _upload(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def decode(
        self,
        tasks: Tasks,
        first: int,
        count: int,
        staging: torch.Tensor,
        destination: torch.Tensor,
        status: torch.Tensor,
    ) -> None:
        """Launch the decoding of rows `first` to `first + count` on the current stream; nothing is waited for. Places
        are counted from the starts of the two tensors (1-D, uint8). A malformed payload sets `status` (int32) to 1 and
        changes nothing outside its target."""
        for batch in tasks.batches:
            low, high = np.searchsorted(batch.places, (first, first + count)).tolist()
            if low < high:
                reached = batch.ends[low:high].max(axis=0).tolist()
                _check_memory("staging", staging, reached[0])
                _check_memory("destination", destination, reached[1])
                if staging.data_ptr() % 16:
                    raise ValueError("staging memory must start at a multiple of 16 bytes")
                self._launch(batch, int(batch.starts[low]), int(batch.starts[high]), staging, destination, status)

    def _launch(
        self,
        batch: _Batch,
        begin: int,
        end: int,
        staging: torch.Tensor,
        destination: torch.Tensor,
        status: torch.Tensor,
    ) -> None:
        align = _alignment(batch.align | destination.data_ptr())
        if align < 16:  # whole values, else bytes: few forms to compile
            align = batch.kind.item if align >= batch.kind.item else 1
        with torch.cuda.device_of(staging):
            _decode[(end - begin,)](
                staging,
                destination,
                status,
                batch.table,
                batch.programs,
                begin,
                ALIGN=align,
                **batch.kind.constants,
                **DECODE_OPTIONS,
            )

    def warm(self, codecs: Iterable[int]) -> None:
        """Compile (or take from Triton's cache) what decodes these codecs, so that no load waits for it later."""
        rows = np.array([[codec, 0, 0, 0, 0] for codec in codecs if codec in KINDS], np.int64)
        nothing = torch.zeros(16, dtype=torch.uint8, device=self._device)
        status = torch.zeros(1, dtype=torch.int32, device=self._device)
        self.decode(self.prepare(rows), 0, len(rows), nothing, nothing, status)


def _alignment(places: int) -> int:
    """The largest power of two, at most 16, that divides what is or-ed together."""
    return (places | 16) & -(places | 16)


def _check_memory(what: str, memory: torch.Tensor, end: int) -> None:
    if memory.dtype != torch.uint8 or memory.dim() != 1 or not memory.is_contiguous():
        raise ValueError(f"{what} memory must be a contiguous 1-D tensor of uint8")
    if end > memory.numel():
        raise ValueError(f"a chunk to decode ends at {end} of {memory.numel()} bytes of {what} memory")


# ---- encoding -------------------------------------------------------------------------------------------------------


@triton.jit
def _plain_values(plain, length, chunk_length, chunk, unit, ITEM: tl.constexpr):
    """Where a unit's values start, and how many there are."""
    start = tl.multiple_of(chunk * chunk_length, 16)
    n = tl.minimum(length - start, chunk_length) // ITEM
    typed = plain + (start + unit * (8192 * ITEM))
    if ITEM == 2:
        typed = typed.to(tl.pointer_type(tl.uint16))
    elif ITEM == 4:
        typed = typed.to(tl.pointer_type(tl.int32))
    return typed, n - unit * 8192


@triton.jit
def _load_values(values, value, left):
    if left >= 8192:
        bits = tl.load(values + value).to(tl.int32)
    else:
        bits = tl.load(values + value, mask=value < left, other=0).to(tl.int32)
    return bits


@triton.jit
def _rest_of(bits, LOW: tl.constexpr, BITS: tl.constexpr):
    return (bits & ((1 << LOW) - 1)) | (((bits >> (LOW + BITS)) & 1) << LOW)


@triton.jit(do_not_specialize=["length", "chunk_length", "chunk_units"])
def _measure(
    plain,
    length,
    chunk_length,
    chunk_units,
    histograms,
    measured,
    ITEM: tl.constexpr,
    LOW: tl.constexpr,
    BITS: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
):
    """One unit's base, the planes in which it has anything (from bit 8 on), and its histogram of distances from the
    base."""
    program = tl.program_id(0).to(tl.int64)
    values, left = _plain_values(plain, length, chunk_length, program // chunk_units, program % chunk_units, ITEM)
    value = tl.arange(0, 8192)
    bits = _load_values(values, value, left)
    rest = _rest_of(bits, LOW, BITS)
    some = (tl.max(rest & ((1 << W0) - 1), 0) > 0).to(tl.int32) << 8
    if W1 > 0:
        some |= (tl.max((rest >> W0) & ((1 << W1) - 1), 0) > 0).to(tl.int32) << 9
    if W2 > 0:
        some |= (tl.max((rest >> (W0 + W1)) & ((1 << W2) - 1), 0) > 0).to(tl.int32) << 10
    histogram = histograms + program * 256
    bins = tl.arange(0, 256)
    tl.store(histogram + bins, tl.histogram((bits >> LOW) & ((1 << BITS) - 1), 256, mask=value < left))
    tl.debug_barrier()

    # The first among the best windows is the one with the largest key.
    LAST: tl.constexpr = (1 << BITS) - 2
    inside = bins < LAST
    window = tl.load(histogram + bins, mask=inside, other=0)
    window += tl.load(histogram + bins + 1, mask=inside, other=0)
    window += tl.load(histogram + bins + 2, mask=inside, other=0)
    base = 255 - tl.max(tl.where(inside, window * 256 + (255 - bins), 0), 0) % 256
    shifted = tl.load(histogram + (bins + base) % 256)
    tl.debug_barrier()
    tl.store(histogram + bins, shifted)
    tl.store(measured + program, base | some)


@triton.jit(do_not_specialize=["length", "chunk_length", "chunk_units"])
def _choose(  # noqa: PLR0915
    length,
    chunk_length,
    chunk_units,
    histograms,
    measured,
    facts,
    unit_rows,
    ITEM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What the histograms of one chunk decide. `facts`: which planes have anything, how many values levels 1, 2 and 3
    pass on, six deltas. `unit_rows`: starts and base, as in the payload."""
    chunk = tl.program_id(0).to(tl.int64)
    units = (tl.minimum(length - chunk * chunk_length, chunk_length) // ITEM + 8191) // 8192
    first_unit = chunk * chunk_units
    rows = tl.arange(0, ROWS)
    bins = tl.arange(0, 256)
    cells = (first_unit + rows)[:, None] * 256 + bins[None, :]

    total = tl.zeros([256], tl.int32)
    some = 0
    at = 0
    while at < units:
        total += tl.sum(tl.load(histograms + at * 256 + cells, mask=(at + rows < units)[:, None], other=0), 0)
        flags = tl.load(measured + first_unit + at + rows, mask=at + rows < units, other=0) >> 8
        some |= tl.max(flags & 1, 0) | tl.max(flags & 2, 0) | tl.max(flags & 4, 0)
        at += ROWS
    keys = tl.where(bins >= 3, total.to(tl.int64) * 256 + (255 - bins), -1)
    facts += chunk * 10
    level2 = bins < 0
    level3 = bins < 0
    for k in tl.static_range(6):
        delta = (255 - tl.max(keys, 0) % 256).to(tl.int32)
        tl.store(facts + (4 + k), delta)
        keys = tl.where(bins == delta, -1, keys)
        if k < 3:
            level2 = level2 | (bins == delta)
        else:
            level3 = level3 | (bins == delta)
    leaves1 = (bins >= 3)[None, :]
    leaves2 = ((bins >= 3) & ~level2)[None, :]
    leaves3 = ((bins >= 3) & ~level2 & ~level3)[None, :]

    start2 = 0
    start3 = 0
    start4 = 0
    at = 0
    while at < units:
        inside = at + rows < units
        tile = tl.load(histograms + at * 256 + cells, mask=inside[:, None], other=0)
        passed1 = tl.sum(tl.where(leaves1, tile, 0), 1)
        passed2 = tl.sum(tl.where(leaves2, tile, 0), 1)
        passed3 = tl.sum(tl.where(leaves3, tile, 0), 1)
        row = unit_rows + (first_unit + at + rows) * 4
        base = tl.load(measured + first_unit + at + rows, mask=inside, other=0) & 0xFF
        tl.store(row, start2 + tl.cumsum(passed1, 0) - passed1, mask=inside)
        tl.store(row + 1, start3 + tl.cumsum(passed2, 0) - passed2, mask=inside)
        tl.store(row + 2, start4 + tl.cumsum(passed3, 0) - passed3, mask=inside)
        tl.store(row + 3, base, mask=inside)
        start2 += tl.sum(passed1, 0)
        start3 += tl.sum(passed2, 0)
        start4 += tl.sum(passed3, 0)
        at += ROWS
    tl.store(facts, some)
    tl.store(facts + 1, start2)
    tl.store(facts + 2, start3)
    tl.store(facts + 3, start4)


@triton.jit
def _code(value, table):
    """The digit of a delta: its place among a level's three, or 3."""
    digit = tl.where(value == (table >> 16), 2, 3)
    digit = tl.where(value == ((table >> 8) & 0xFF), 1, digit)
    return tl.where(value == (table & 0xFF), 0, digit)


@triton.jit
def _add_bits(section, place, bits, wanted):
    """Into a byte that other lanes or units add to as well; it was 0. Sections start at multiples of 4."""
    words = section.to(tl.pointer_type(tl.int32))
    tl.atomic_or(words + (place >> 2), bits << ((place & 3) * 8).to(tl.int32), wanted & (bits != 0), sem="relaxed")


@triton.jit
def _write_plane(
    plane,
    values,
    left,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    LOW: tl.constexpr,
    BITS: tl.constexpr,
):
    if WIDTH >= 8:
        value = tl.arange(0, 8192)
        rest = _rest_of(_load_values(values, value, left), LOW, BITS) >> SHIFT
        if WIDTH == 16:
            tl.store(plane.to(tl.pointer_type(tl.uint16)) + value, rest.to(tl.uint16))
        else:
            tl.store(plane + value, rest.to(tl.uint8))
    else:
        each: tl.constexpr = 1024 * WIDTH
        lane = tl.arange(0, each)
        byte = tl.zeros_like(lane)
        for k in tl.static_range(8 // WIDTH):
            rest = _rest_of(_load_values(values, lane + k * each, left), LOW, BITS) >> SHIFT
            byte |= (rest & ((1 << WIDTH) - 1)) << (WIDTH * k)
        tl.store(plane + lane, byte.to(tl.uint8))


@triton.jit(do_not_specialize=["length", "chunk_length", "chunk_units"])
def _write(  # noqa: PLR0915
    plain,
    length,
    chunk_length,
    chunk_units,
    coded,
    places,
    headers,
    unit_rows,
    passed,
    ITEM: tl.constexpr,
    LOW: tl.constexpr,
    BITS: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    LANES: tl.constexpr,
):
    """One unit's part of a payload whose place, header and counts are known. `coded` is all zeros before."""
    program = tl.program_id(0).to(tl.int64)
    chunk = program // chunk_units
    unit = program % chunk_units
    place = places + chunk * 11
    start = tl.multiple_of(tl.load(place), 16)
    if start < 0:
        return
    payload = coded + start
    values, left = _plain_values(plain, length, chunk_length, chunk, unit, ITEM)

    # Header (once), the unit's row, the bytes that are less than a value (once).
    words = tl.arange(0, 16)
    header = payload.to(tl.pointer_type(tl.int32))
    header_words = tl.load(headers + chunk * 16 + words)
    tl.store(header + words, header_words, mask=(words < 16) & (unit == 0))
    few = tl.arange(0, 4)
    row = unit_rows + program * 4
    tl.store(header + (16 + unit * 4) + few, tl.load(row + few))
    end = tl.minimum(length, (chunk + 1) * chunk_length)
    trailing = (end - chunk * chunk_length) % ITEM
    mine = (unit == 0) & (few < trailing)
    tl.store(payload + tl.load(place + 8) + few, tl.load(plain + end - trailing + few, mask=mine, other=0), mask=mine)

    # Planes.
    at = tl.multiple_of(tl.load(place + 1), 16)
    if at >= 0:
        _write_plane(payload + tl.multiple_of(at + unit * (1024 * W0), 16), values, left, 0, W0, LOW, BITS)
    if W1 > 0:
        at = tl.multiple_of(tl.load(place + 2), 16)
        if at >= 0:
            _write_plane(payload + tl.multiple_of(at + unit * (1024 * W1), 16), values, left, W0, W1, LOW, BITS)
    if W2 > 0:
        at = tl.multiple_of(tl.load(place + 3), 16)
        if at >= 0:
            _write_plane(payload + tl.multiple_of(at + unit * (1024 * W2), 16), values, left, W0 + W1, W2, LOW, BITS)

    # Level 1, four values a lane. The deltas of those that it leaves open go to `passed`, in their order.
    base = tl.load(row + 3)
    lane = tl.arange(0, 2048)
    first = tl.zeros_like(lane)
    deltas = tl.zeros_like(lane)
    for k in tl.static_range(4):
        value = k * 2048 + lane
        bits = _load_values(values, value, left)
        delta = (((bits >> LOW) & ((1 << BITS) - 1)) - base) & 0xFF
        first |= tl.where(value < left, tl.minimum(delta, 3), 0) << (2 * k)
        deltas |= delta << (8 * k)
    tl.store(payload + tl.multiple_of(tl.load(place + 4), 16) + unit * 2048 + lane, first.to(tl.uint8))
    s2 = tl.load(row).to(tl.int64)
    passed += tl.load(place + 10) + s2
    open1 = _threes(first)
    counts = _spread(open1)
    before = tl.cumsum(counts, 0) - counts
    total = tl.sum(counts, 0)
    t1 = _field(total, 0)
    t2 = t1 + _field(total, 1)
    t3 = t2 + _field(total, 2)
    count = t3 + _field(total, 3)
    tl.store(passed + _field(before, 0), deltas.to(tl.uint8), mask=_flag(open1, 0))
    tl.store(passed + (t1 + _field(before, 1)), (deltas >> 8).to(tl.uint8), mask=_flag(open1, 1))
    tl.store(passed + (t2 + _field(before, 2)), (deltas >> 16).to(tl.uint8), mask=_flag(open1, 2))
    tl.store(passed + (t3 + _field(before, 3)), (deltas >> 24).to(tl.uint8), mask=_flag(open1, 3))
    tl.debug_barrier()

    # Levels 2, 3 and raw, a byte of level 2 a lane. Its first and last byte may be shared with the neighbours.
    table = tl.load(place + 9)
    table2 = (table & 0xFFFFFF).to(tl.int32)
    table3 = (table >> 24).to(tl.int32)
    level2 = payload + tl.multiple_of(tl.load(place + 5), 16)
    level3 = payload + tl.multiple_of(tl.load(place + 6), 16)
    raw = payload + tl.load(place + 7)
    rank3 = tl.load(row + 1).to(tl.int64)
    rank4 = tl.load(row + 2).to(tl.int64)
    skew = (s2 % 4).to(tl.int32)
    short = tl.arange(0, LANES)
    tile = 0
    while tile < skew + count:
        rank = (tile - skew) + 4 * short
        second = tl.zeros_like(rank)
        quad = tl.zeros_like(rank)
        for k in tl.static_range(4):
            ours = (rank + k >= 0) & (rank + k < count)
            one = tl.load(passed + (rank + k), mask=ours, other=0).to(tl.int32)
            second |= tl.where(ours, _code(one, table2), 0) << (2 * k)
            quad |= one << (8 * k)
        place2 = s2 // 4 + tile // 4 + short
        whole = (rank >= 0) & (rank + 4 <= count)
        tl.store(level2 + place2, second.to(tl.uint8), mask=whole)
        _add_bits(level2, place2, second, (rank < count) & (rank + 4 > 0) & ~whole)
        open2 = _threes(second)
        some = _count(open2)
        at3 = rank3 + tl.cumsum(some, 0) - some
        rank3 += tl.sum(some, 0)
        third = tl.zeros_like(rank)
        for k in tl.static_range(4):
            digit = tl.where(_flag(open2, k), _code((quad >> (8 * k)) & 0xFF, table3), 0)
            _add_bits(level3, at3 >> 2, digit << ((at3 & 3) * 2).to(tl.int32), _flag(open2, k))
            third |= digit << (2 * k)
            at3 += (open2 >> (2 * k)) & 1
        open3 = _threes(third)
        some = _count(open3)
        at4 = rank4 + tl.cumsum(some, 0) - some
        rank4 += tl.sum(some, 0)
        for k in tl.static_range(4):
            tl.store(raw + at4, (quad >> (8 * k)).to(tl.uint8), mask=_flag(open3, k))
            at4 += (open3 >> (2 * k)) & 1
        tile += 4 * LANES


class Payloads(NamedTuple):
    """The payloads of a run of chunks: where each lies in one block of memory (start and length, starts are multiples
    of 16); None for a chunk that would save less than 1/8."""

    memory: torch.Tensor
    places: list[tuple[int, int] | None]


def encode_batch(plain: torch.Tensor, codec: int, chunk_length: int) -> list[torch.Tensor | None]:
    """The payloads of `plain` (1-D, uint8, on the device) cut into chunks: the same bytes as the reference codec makes,
    None for a chunk that would save less than 1/8. Waits once, for the payloads' lengths."""
    memory, places = encode_block(plain, codec, chunk_length)
    return [None if place is None else memory[place[0] : sum(place)] for place in places]


def encode_block(plain: torch.Tensor, codec: int, chunk_length: int) -> Payloads:
    """The same, in one block."""
    encoding = Encoding(plain, codec, chunk_length)
    encoding.measure()
    encoding.choose()
    return encoding.write()


class Encoding:
    """Chunks on their way through the three steps, each of which needs what the step before it left."""

    def __init__(self, plain: torch.Tensor, codec: int, chunk_length: int) -> None:
        kind = KINDS[codec]
        if not 0 < chunk_length <= _MAX_LENGTH or chunk_length % 16:
            raise ValueError(f"chunks of {chunk_length} bytes can't be coded; their length must be a multiple of 16")
        if plain.dtype != torch.uint8 or plain.dim() != 1 or not plain.is_contiguous() or plain.data_ptr() % kind.item:
            raise ValueError(
                "plain memory must be a contiguous 1-D tensor of uint8 that starts at a multiple of a value's size"
            )
        self._plain = _Plain(plain, kind, chunk_length)
        units, chunks = self._plain.units, self._plain.chunks
        self._histograms = self._empty(units, 256)
        self._measured = self._empty(units)
        self._facts = self._empty(chunks, _FACTS)
        self._unit_rows = self._empty(units, 4)
        self._layout = _Layout.of(self._plain, np.zeros((chunks, _FACTS), np.int64))

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=self._plain.memory.device)

    def measure(self) -> None:
        """Launch what finds the base of each unit and counts the distances from it."""
        self._per_unit(_measure, self._histograms, self._measured, num_warps=8)

    def choose(self) -> None:
        """Find the deltas of each chunk and lay out its payload; waits."""
        plain = self._plain
        if not plain.units:
            return
        with torch.cuda.device_of(plain.memory):
            _choose[(plain.chunks,)](
                plain.memory.numel(),
                plain.chunk_length,
                plain.chunk_units,
                self._histograms,
                self._measured,
                self._facts,
                self._unit_rows,
                ITEM=plain.kind.item,
                ROWS=32,
                num_warps=8,
            )
        self._layout = _Layout.of(plain, self._facts.cpu().numpy().astype(np.int64))

    def write(self) -> Payloads:
        """Launch what writes the payloads."""
        layout, device = self._layout, self._plain.memory.device
        coded = torch.zeros(layout.room, dtype=torch.uint8, device=device)
        passed = torch.empty(layout.passed + 16, dtype=torch.uint8, device=device)
        tables = [torch.from_numpy(table).to(device) for table in (layout.places, layout.headers)]
        if layout.room:
            self._per_unit(_write, coded, *tables, self._unit_rows, passed, **WRITE_OPTIONS)
        return Payloads(coded, layout.spans())

    def _per_unit(self, kernel: Any, *arguments: torch.Tensor, **options: Any) -> None:
        """Launch one program for each unit."""
        plain = self._plain
        if not plain.units:
            return
        with torch.cuda.device_of(plain.memory):
            kernel[(plain.units,)](
                plain.memory,
                plain.memory.numel(),
                plain.chunk_length,
                plain.chunk_units,
                *arguments,
                **plain.kind.constants,
                **options,
            )


_MAX_LENGTH: Final = 1 << 30
"""Of a chunk: so its counts fit 32 bits."""
_FACTS: Final = 10
"""What is chosen for a chunk: flags of the planes that have anything, three counts of values passed on, six deltas."""
_HEADER: Final = np.dtype(
    [
        ("version", "u1"),
        ("absent", "u1"),
        ("zero", "<u2"),
        ("values", "<u4"),
        ("passed", "<u4", (3,)),
        ("deltas", "u1", (6,)),
        ("zeros", "u1", (38,)),
    ]
)


@dataclass(frozen=True)
class _Plain:
    """What is coded, and how it is cut."""

    memory: torch.Tensor
    kind: Kind
    chunk_length: int

    @property
    def chunks(self) -> int:
        return -(-self.memory.numel() // self.chunk_length)

    @property
    def chunk_units(self) -> int:
        """Of each chunk but the last."""
        return -(-(self.chunk_length // self.kind.item) // UNIT)

    @property
    def units(self) -> int:
        whole, rest = divmod(self.memory.numel(), self.chunk_length)
        return whole * self.chunk_units + -(-(rest // self.kind.item) // UNIT)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The plain bytes of each chunk."""
        starts = np.arange(self.chunks, dtype=np.int64) * self.chunk_length
        return np.minimum(self.memory.numel() - starts, self.chunk_length)


class _Layout(NamedTuple):
    """Where all goes. By chunk: its length (0: it does not save enough); `places` as the writing kernel takes them
    (start in the block of all or -1, starts of the sections in the payload or -1, deltas, how many values the chunks
    before it pass on); header. Then the size of the block, and how many values are passed on by level 1 at all."""

    lengths: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    headers: npt.NDArray[np.int32]
    room: int
    passed: int

    @classmethod
    def of(cls, batch: _Plain, facts: npt.NDArray[np.int64]) -> _Layout:
        plain, widths = batch.lengths, np.array(batch.kind.widths)
        values = plain // batch.kind.item
        units = -(-values // UNIT)
        present = (facts[:, :1] >> np.arange(3) & 1).astype(np.bool_)
        passed = facts[:, 1:4]
        levels = [units * (UNIT // 4), -(-passed[:, 0] // 4), -(-passed[:, 1] // 4), passed[:, 2]]
        sizes = _aligned(np.column_stack([present * widths * (UNIT // 8) * units[:, None], *levels]))
        sections = (64 + 16 * units)[:, None] + np.column_stack([np.zeros_like(units), sizes.cumsum(axis=1)])
        lengths = sections[:, -1] + plain % batch.kind.item
        sections[:, :3][~present] = -1
        kept = (values > 0) & (8 * lengths <= 7 * plain)
        room, held = np.where(kept, _aligned(lengths), 0), np.where(kept, passed[:, 0], 0)
        starts = np.where(kept, room.cumsum() - room, -1)
        deltas = facts[:, 4:] @ (1 << 8 * np.arange(6))
        headers = np.zeros(len(plain), _HEADER)
        headers["version"] = 1
        headers["absent"] = (~present & (widths > 0)) @ (1 << np.arange(3))
        headers["values"], headers["passed"], headers["deltas"] = values, passed, facts[:, 4:]
        places = np.column_stack([starts, sections, deltas, held.cumsum() - held])
        return cls(np.where(kept, lengths, 0), places, headers.view(np.int32), int(room.sum()), int(held.sum()))

    def spans(self) -> list[tuple[int, int] | None]:
        """Where the payloads are."""
        pairs = zip(self.places[:, 0].tolist(), self.lengths.tolist(), strict=True)
        return [(start, length) if length else None for start, length in pairs]


def _aligned(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return -(-sizes // 16) * 16
