"""The codec of floating-point numbers, in numpy: the reference that other implementations are tested against, and what
runs where there is no GPU. docs/formats.md has the bytes and the reasons.

    plain -> values -> exponent fields --cascade of 2-bit digits--> levels 1, 2, 3, raw bytes
                    -> all other bits  --cut by bit positions-----> planes

Numbers of a tensor have few exponents, nearly evenly distributed other bits, and no repetitions. So the exponent alone
is coded: a digit names one of three exponents, or passes the value on to the next level, which has three others. A
value's place in the next level is the count of values passed on before it, which a table holds for each unit of values.
Encoder and decoder go through a chunk in blocks of units: small enough for a core's cache, and large enough that
threads spend their time in numpy's loops, which let go of the GIL, and little of it in waiting for each other.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dormouse.errors import DamagedError
from dormouse.store.chunk import Buffer
from dormouse.store.codec import Codec

Bytes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]
Words = npt.NDArray[Any]

VERSION = 1
UNIT = 8192
"""Values whose places in the levels are told by one row of the table, so that they can be decoded alone."""
HEADER_SIZE = 64
ROW_SIZE = 16
SECTION_ALIGNMENT = 16

_HEADER = struct.Struct("<BBHIIII3s3s38s")
_ROW = np.dtype([("starts", "<u4", (3,)), ("base", "u1"), ("zeros", "u1", (3,))])
_PASSED = 3
_DIGITS = np.array([[byte >> shift & 3 for shift in (0, 2, 4, 6)] for byte in range(256)], np.uint8)
_BLOCK_BYTES = 1 << 20
"""One thread is as fast with less; but threads that call numpy for longer at a time wait less for each other's GIL."""
_COMPARED = 8
"""Exponents that are counted one by one: all but one in a hundred values of a tensor have one of these."""
_SAMPLED = 61
"""One value of so many tells which exponents these are."""


@dataclass(frozen=True)
class FloatFormat:
    """How a kind of number is cut up. `item`: its bytes; `low`, `bits`: lowest bit and width of the exponent field;
    `planes`: the widths of what the other bits (those below the field, then the sign) are cut into."""

    item: int
    low: int
    bits: int
    planes: tuple[int, ...]

    @property
    def word(self) -> np.dtype[Any]:
        return np.dtype(f"<u{self.item}")

    @property
    def sign(self) -> int:
        """The sign's bit: the highest one."""
        return self.item * 8 - 1

    @property
    def block_units(self) -> int:
        """How many units are coded at once."""
        return _BLOCK_BYTES // (UNIT * self.item)

    def units(self, values: int) -> int:
        return -(-values // UNIT)


FORMATS = {
    Codec.BF16: FloatFormat(item=2, low=7, bits=8, planes=(8,)),
    Codec.FP16: FloatFormat(item=2, low=10, bits=5, planes=(8, 2, 1)),
    Codec.FP32: FloatFormat(item=4, low=23, bits=8, planes=(16, 8)),
    Codec.FP8_E4M3: FloatFormat(item=1, low=3, bits=4, planes=(4,)),
    Codec.FP8_E5M2: FloatFormat(item=1, low=2, bits=5, planes=(2, 1)),
}


class Header(NamedTuple):
    """The first 64 bytes but for the version: `passed` are the counts of values that level 1, 2 and 3 pass on, `deltas`
    the three exponents of level 2 and of level 3."""

    absent: int
    values: int
    passed: tuple[int, int, int]
    deltas: tuple[bytes, bytes]

    def pack(self) -> bytes:
        return _HEADER.pack(VERSION, self.absent, 0, self.values, *self.passed, *self.deltas, bytes(38))


class Sections(NamedTuple):
    """Where in the payload each section lies. A plane that is all zeros has none."""

    units: slice
    planes: tuple[slice | None, ...]
    levels: tuple[slice, slice, slice]
    raw: slice
    tail: slice


def sections(form: FloatFormat, header: Header, plain_length: int) -> Sections:
    """The sections of a payload with this header; the tail ends it."""
    padded = form.units(header.values) * UNIT
    end = HEADER_SIZE

    def section(length: int) -> slice:
        nonlocal end
        start = -(-end // SECTION_ALIGNMENT) * SECTION_ALIGNMENT
        end = start + length
        return slice(start, end)

    passed2, passed3, passed4 = header.passed
    return Sections(
        units=section(padded // UNIT * ROW_SIZE),
        planes=tuple(
            None if header.absent >> at & 1 else section(padded * width // 8) for at, width in enumerate(form.planes)
        ),
        levels=(section(padded // 4), section(-(-passed2 // 4)), section(-(-passed3 // 4))),
        raw=section(passed4),
        tail=section(plain_length - header.values * form.item),
    )


# Decoding


def decode(codec: Codec, stored: Buffer, plain_length: int) -> memoryview:
    """The plain bytes. Raises DamagedError for what `encode` cannot have made."""
    out: memoryview = np.empty(plain_length, np.uint8).data
    decode_into(codec, stored, out)
    return out


def decode_into(codec: Codec, stored: Buffer, out: memoryview) -> None:
    """Write the plain bytes to `out`, which has their length. Raises DamagedError, and then `out` has any content."""
    form, data = FORMATS[codec], np.frombuffer(stored, np.uint8)
    header = _parsed(form, data, len(out))
    at = sections(form, header, len(out))
    if at.tail.stop != len(data):
        raise _damaged(f"{len(data)} bytes where its header says {at.tail.stop}")
    end = header.values * form.item
    values = np.frombuffer(out[:end], form.word)
    combine = _BfloatCombiner(form, data, at) if codec is Codec.BF16 else _Combiner(form, data, at)
    for span, exponents in _Cascade(form, data, header, at).blocks():
        combine.block(span, exponents, values)
    out[end:] = data[at.tail].data


def _parsed(form: FloatFormat, data: Bytes, plain_length: int) -> Header:
    if len(data) < HEADER_SIZE:
        raise _damaged("it is shorter than a header")
    version, absent, zero, values, *passed, deltas2, deltas3, zeros = _HEADER.unpack(data[:HEADER_SIZE].tobytes())
    if version != VERSION:
        raise _damaged(f"it has the unknown version {version}")
    if zero or any(zeros) or absent >> len(form.planes):
        raise _damaged("its header has bits that mean nothing")
    if values != plain_length // form.item:
        raise _damaged(f"it claims {values} values for {plain_length} bytes")
    return Header(absent, values, (passed[0], passed[1], passed[2]), (deltas2, deltas3))


def _damaged(why: str) -> DamagedError:
    return DamagedError(f"a chunk of floating-point numbers is damaged: {why}")


class _Scratch(threading.local):
    """Each thread's own arrays for a block, used again for the next block and the next chunk: fresh memory costs a page
    fault per 4 KiB, which takes longer than decoding into it."""

    def __init__(self) -> None:
        self._arrays: dict[str, Bytes] = {}

    def array(self, name: str, count: int, dtype: Any = np.uint8) -> Words:
        """An array with any content, valid until the next one of that name."""
        size = count * np.dtype(dtype).itemsize
        found = self._arrays.get(name)
        if found is None or len(found) < size:
            found = self._arrays[name] = np.empty(size, np.uint8)
        return found[:size].view(dtype)


_scratch = _Scratch()


class _Level:
    """Level 2 or 3: its digits are read in order, a run for each block."""

    def __init__(self, name: str, packed: Bytes, deltas: bytes) -> None:
        self._name = name
        self.done = 0
        self.passed = next(byte for byte in range(256) if byte not in deltas)
        """What stands for a value that is passed on: a delta this level does not have."""
        self._packed = packed
        self._table = np.frombuffer(bytes([*deltas, self.passed]), np.uint8)[_DIGITS].view(np.uint32).reshape(-1)

    def take(self, count: int) -> Bytes:
        """The deltas of the next `count` values, which are there."""
        first, self.done = self.done, self.done + count
        packed = self._packed[first >> 2 : self.done + 3 >> 2]
        out = _scratch.array(self._name, len(packed), np.uint32)
        deltas: Bytes = self._table.take(packed, mode="clip", out=out).view(np.uint8)
        return deltas[first & 3 : (first & 3) + count]

    def passed_on(self, deltas: Bytes) -> Counts:
        """The places of those that are passed on."""
        mask = _scratch.array("passed", len(deltas), np.bool_)
        return np.equal(deltas, np.uint8(self.passed), out=mask).nonzero()[0]


class _Cascade:
    """Decodes the exponents, block by block, into memory that it uses again."""

    def __init__(self, form: FloatFormat, data: Bytes, header: Header, at: Sections) -> None:
        rows = data[at.units].view(_ROW)
        if rows["zeros"].any():
            raise _damaged("its units have bits that mean nothing")
        self._units = len(rows)
        self._base = rows["base"]
        # With the totals as the last row, each unit's counts must lead to the next row.
        self._starts = np.vstack([rows["starts"], np.array([header.passed], np.uint32)]).astype(np.int64)
        if (self._starts[1:] < self._starts[:-1]).any():
            raise _damaged("its units pass on other counts than it says")
        self._digits = data[at.levels[0]].reshape(self._units, UNIT // 4)
        self._level2 = _Level("level 2", data[at.levels[1]], header.deltas[0])
        self._level3 = _Level("level 3", data[at.levels[2]], header.deltas[1])
        self._raw, self._raw_done = data[at.raw], 0
        self._step = max(1, min(form.block_units, self._units))
        self._block = _scratch.array("deltas", self._step * UNIT).reshape(-1, 4, UNIT // 4)
        self._field = np.uint8((1 << form.bits) - 1)

    def blocks(self) -> Iterator[tuple[slice, Bytes]]:
        """Units from and to, and their exponents, which are valid until the next block."""
        if not self._units and self._starts.any():
            raise _damaged("it passes on values that it does not have")
        for first in range(0, self._units, self._step):
            span = slice(first, min(first + self._step, self._units))
            block = self._block[: span.stop - first]
            _unpack(self._digits[span], 2, block)
            self._resolve(span, block.reshape(-1))
            exponents = block.reshape(-1, UNIT)
            np.add(exponents, self._base[span, None], out=exponents)
            if self._field != 0xFF:
                np.bitwise_and(exponents, self._field, out=exponents)
            yield span, exponents.reshape(-1)

    def _resolve(self, span: slice, deltas: Bytes) -> None:
        """Put the deltas that levels 2 and 3 and the raw bytes have where level 1 passes values on."""
        mask = _scratch.array("passed", len(deltas), np.bool_)
        at1 = np.equal(deltas, np.uint8(_PASSED), out=mask).nonzero()[0]
        ends = np.searchsorted(at1, np.arange(1, span.stop - span.start + 1) * UNIT)
        self._check(span, 0, ends, self._level2.done)
        level2 = self._level2.take(len(at1))
        at2 = self._level2.passed_on(level2)
        ends = np.searchsorted(at2, ends)
        self._check(span, 1, ends, self._level3.done)
        level3 = self._level3.take(len(at2))
        at3 = self._level3.passed_on(level3)
        ends = np.searchsorted(at3, ends)
        self._check(span, 2, ends, self._raw_done)
        level3[at3] = self._raw[self._raw_done : self._raw_done + len(at3)]
        self._raw_done += len(at3)
        level2[at2] = level3
        deltas[at1] = level2

    def _check(self, span: slice, level: int, ends: Counts, done: int) -> None:
        """Whether the units' starts tell how many values are really passed on: `done` before them, then `ends`. Starts
        ascend to the header's totals, by which the sections were laid out, so nothing is read outside them."""
        starts = self._starts[span.start : span.stop + 1, level]
        if starts[0] != done or (starts[1:] - done != ends).any():
            raise _damaged(f"its units pass on other counts than it says in level {level + 1}")


def _unpack(packed: Bytes, width: int, out: Bytes) -> None:
    """Numbers of `width` bits from [units, bytes] to [units, parts, bytes]: part k is what stands in bits width · k."""
    parts = out.shape[1]
    for part in range(parts):
        np.right_shift(packed, np.uint8(width * part), out=out[:, part])
    np.bitwise_and(out[:, : parts - 1], np.uint8((1 << width) - 1), out=out[:, : parts - 1])


class _Combiner:
    """Puts numbers together again from their exponents and planes, for any kind."""

    def __init__(self, form: FloatFormat, data: Bytes, at: Sections) -> None:
        self._form = form
        self._planes = [
            None if place is None else _plane(data[place], width)
            for place, width in zip(at.planes, form.planes, strict=True)
        ]
        size = min(form.block_units * UNIT, (at.units.stop - at.units.start) // ROW_SIZE * UNIT)
        self._rest = _scratch.array("rest", size, form.word)
        self._wide = _scratch.array("wide", size, form.word)
        self._bits = _scratch.array("bits", size)

    def block(self, span: slice, exponents: Bytes, values: Words) -> None:
        """Write the units' values to their places in `values`, of which the last unit may have fewer."""
        form = self._form
        rest, wide = self._rest[: len(exponents)], self._wide[: len(exponents)]
        self._gather(span, rest, wide)
        # The sign moves up from `low`: s + s · (2^k - 1) = s · 2^k.
        np.bitwise_and(rest, form.word.type(1 << form.low), out=wide)
        np.multiply(wide, form.word.type((1 << (form.sign - form.low)) - 1), out=wide)
        np.add(rest, wide, out=rest)
        np.left_shift(exponents, form.word.type(form.low), out=wide)
        _store(rest, wide, span, values)

    def _gather(self, span: slice, rest: Words, wide: Words) -> None:
        """All planes side by side: the bits below the exponent field, and the sign above them."""
        shift, target = 0, rest
        for plane, width in zip(self._planes, self._form.planes, strict=True):
            if plane is not None:
                np.left_shift(self._plane_values(plane, width, span), self._form.word.type(shift), out=target)
                if target is wide:
                    np.bitwise_or(rest, wide, out=rest)
                target = wide
            shift += width
        if target is rest:
            rest.fill(0)

    def _plane_values(self, plane: Words, width: int, span: slice) -> Words:
        if width >= 8:
            return plane[span].reshape(-1)
        bits = self._bits[: (span.stop - span.start) * UNIT]
        _unpack(plane[span], width, bits.reshape(span.stop - span.start, 8 // width, -1))
        return bits


class _BfloatCombiner(_Combiner):
    """For bfloat16, whose only plane is a byte: the multiplication puts its top bit at the sign's place."""

    def block(self, span: slice, exponents: Bytes, values: Words) -> None:
        rest, wide = self._rest[: len(exponents)], self._wide[: len(exponents)]
        plane = self._planes[0]
        if plane is None:
            rest.fill(0)
        else:
            np.multiply(plane[span].reshape(-1), np.uint16(0x0101), out=rest)
            np.bitwise_and(rest, np.uint16(0x807F), out=rest)
        np.left_shift(exponents, np.uint16(7), out=wide)
        _store(rest, wide, span, values)


def _plane(data: Bytes, width: int) -> Words:
    """A plane as [units, bytes or words]."""
    words = data.view("<u2") if width == 16 else data
    return words.reshape(-1, UNIT * width // (8 * words.itemsize))


def _store(rest: Words, exponents: Words, span: slice, values: Words) -> None:
    place = values[span.start * UNIT : span.stop * UNIT]
    np.bitwise_or(rest[: len(place)], exponents[: len(place)], out=place)


# Encoding


def encode(plain: Buffer, codec: Codec) -> memoryview | None:
    """The payload, or None when it would save less than 1/8. The same plain bytes give the same payload everywhere."""
    form = FORMATS[codec]
    count = len(memoryview(plain).cast("B")) // form.item
    values = np.frombuffer(plain, form.word, count)
    length = memoryview(plain).nbytes
    if not count:
        return None
    choice = _Choice.of(form, values)
    header = Header(_absent(form, values), count, choice.totals, choice.deltas)
    at = sections(form, header, length)
    if at.tail.stop * 8 > length * 7:
        return None
    data = np.zeros(at.tail.stop, np.uint8)
    data[:HEADER_SIZE] = np.frombuffer(header.pack(), np.uint8)
    data[at.units] = choice.rows().view(np.uint8)
    _write_planes(form, values, data, at)
    _write_levels(form, values, choice, data, at)
    data[at.tail] = np.frombuffer(plain, np.uint8)[count * form.item :]
    payload: memoryview = data.data.toreadonly()
    return payload


def _blocks(form: FloatFormat, values: Words, bases: Bytes | None = None) -> Iterator[tuple[slice, Words]]:
    """The values as [units, UNIT]. With `bases`, the last unit is padded with values whose digit and other bits are 0;
    without, it comes alone and short."""
    whole = len(values) // UNIT
    units = values[: whole * UNIT].reshape(-1, UNIT)
    for first in range(0, whole, form.block_units):
        span = slice(first, min(first + form.block_units, whole))
        yield span, units[span]
    rest = values[whole * UNIT :]
    if len(rest):
        if bases is not None:
            padding = np.full(UNIT - len(rest), int(bases[whole]) << form.low, form.word)
            rest = np.concatenate([rest, padding])
        yield slice(whole, whole + 1), rest.reshape(1, -1)


def _exponents(form: FloatFormat, values: Words) -> Bytes:
    exponents: Bytes = np.right_shift(values, form.word.type(form.low)).astype(np.uint8)
    return exponents if form.bits == 8 else np.bitwise_and(exponents, np.uint8((1 << form.bits) - 1), out=exponents)


@dataclass(frozen=True)
class _Choice:
    """What the histograms of the units' exponents decide: the bases, the deltas, and so all counts."""

    bases: Bytes
    deltas: tuple[bytes, bytes]
    counts: Counts
    """[units, 3]: values that level 1, 2 and 3 pass on."""

    @classmethod
    def of(cls, form: FloatFormat, values: Words) -> _Choice:
        blocks = (_exponents(form, block) for _span, block in _blocks(form, values))
        histograms = np.concatenate([_histograms(exponents) for exponents in blocks])
        last = (1 << form.bits) - 2
        windows = histograms[:, :last] + histograms[:, 1 : last + 1] + histograms[:, 2 : last + 2]
        bases = windows.argmax(axis=1)
        # From here on by distance from the base.
        shifted = np.take_along_axis(histograms, (bases[:, None] + np.arange(256)) % 256, axis=1)
        common = np.argsort(-shifted[:, 3:].sum(axis=0), kind="stable")[:6] + 3
        passed1 = shifted[:, 3:].sum(axis=1)
        passed2 = passed1 - shifted[:, common[:3]].sum(axis=1)
        passed3 = passed2 - shifted[:, common[3:]].sum(axis=1)
        deltas = bytes(common.tolist())
        return cls(bases.astype(np.uint8), (deltas[:3], deltas[3:]), np.stack([passed1, passed2, passed3], axis=1))

    @property
    def totals(self) -> tuple[int, int, int]:
        first, second, third = self.counts.sum(axis=0).tolist()
        return first, second, third

    def rows(self) -> npt.NDArray[np.void]:
        """The table of the units."""
        rows = np.zeros(len(self.bases), _ROW)
        rows["starts"] = self.counts.cumsum(axis=0) - self.counts
        rows["base"] = self.bases
        return rows


def _histograms(exponents: Bytes) -> Counts:
    """How often each exponent occurs in each unit. The few that most values have are counted by comparisons, which are
    faster than np.bincount and, unlike it, let go of the GIL."""
    units, length = exponents.shape
    if length < UNIT:
        return np.bincount(exponents[0], minlength=256)[None]
    low = _commonest(exponents)
    counts = np.zeros((units, 256), np.int64)
    found = np.empty(exponents.shape, np.bool_)
    for exponent in range(low, low + _COMPARED):
        np.equal(exponents, np.uint8(exponent), out=found)
        # Eight bytes at a time: sums of 128 words, so no byte of a sum overflows.
        sums = np.add.reduce(found.view(np.uint64).reshape(units, -1, 128), axis=2)
        counts[:, exponent] = sums.view(np.uint8).sum(axis=1)
    np.greater_equal(exponents - np.uint8(low), np.uint8(_COMPARED), out=found)
    others = found.reshape(-1).nonzero()[0]
    keys = others // UNIT * 256 + exponents.reshape(-1)[others]
    counts += np.bincount(keys, minlength=units * 256).reshape(units, 256)
    return counts


def _commonest(exponents: Bytes) -> int:
    """The first of the neighbouring exponents that most values of a sample have."""
    sample = np.bincount(exponents.reshape(-1)[::_SAMPLED], minlength=256)
    return int(np.convolve(sample, np.ones(_COMPARED, np.int64), "valid").argmax())


def _absent(form: FloatFormat, values: Words) -> int:
    """The planes in which no value has a bit."""
    used = int(np.bitwise_or.reduce(values))
    rest = used & ((1 << form.low) - 1) | (used >> form.sign) << form.low
    absent = shift = 0
    for at, width in enumerate(form.planes):
        absent |= (not rest >> shift & ((1 << width) - 1)) << at
        shift += width
    return absent


def _write_planes(form: FloatFormat, values: Words, data: Bytes, at: Sections) -> None:
    planes = [
        None if place is None else _plane(data[place], w) for place, w in zip(at.planes, form.planes, strict=True)
    ]
    bases = np.zeros(form.units(len(values)), np.uint8)  # of no matter here
    for span, block in _blocks(form, values, bases):
        rest = np.right_shift(block, form.word.type(form.sign - form.low))
        np.bitwise_and(rest, form.word.type(1 << form.low), out=rest)
        np.bitwise_or(rest, np.bitwise_and(block, form.word.type((1 << form.low) - 1)), out=rest)
        shift = 0
        for plane, width in zip(planes, form.planes, strict=True):
            if plane is not None:
                part = np.right_shift(rest, form.word.type(shift)).astype(plane.dtype)
                if width < 8:
                    np.bitwise_and(part, np.uint8((1 << width) - 1), out=part)
                    part = _packed(part.reshape(len(block), 8 // width, -1), width)
                plane[span] = part
            shift += width


def _packed(parts: Bytes, width: int) -> Bytes:
    """[units, parts, bytes] to [units, bytes]: the inverse of `_unpack`."""
    packed = parts[:, 0].copy()
    for part in range(1, parts.shape[1]):
        np.bitwise_or(packed, np.left_shift(parts[:, part], np.uint8(width * part)), out=packed)
    return packed


def _write_levels(form: FloatFormat, values: Words, choice: _Choice, data: Bytes, at: Sections) -> None:
    level1 = data[at.levels[0]].reshape(-1, UNIT // 4)
    digits = [_Digits(total, deltas) for total, deltas in zip(choice.totals, choice.deltas, strict=False)]
    raw, raw_done = data[at.raw], 0
    for span, block in _blocks(form, values, choice.bases):
        deltas = _exponents(form, block)
        np.subtract(deltas, choice.bases[span, None], out=deltas)
        open1 = np.greater_equal(deltas, np.uint8(_PASSED))
        # The lesser of a delta and 3, four times as fast as np.minimum.
        digits1 = np.negative(open1.view(np.uint8))
        np.bitwise_and(np.bitwise_or(digits1, deltas, out=digits1), np.uint8(_PASSED), out=digits1)
        level1[span] = _packed(digits1.reshape(-1, 4, UNIT // 4), 2)
        passed = _where(deltas.reshape(-1), open1.reshape(-1))
        for level in digits:
            passed = level.add(passed)
        raw[raw_done : raw_done + len(passed)] = passed
        raw_done += len(passed)
    for level, place in zip(digits, at.levels[1:], strict=True):
        data[place] = level.packed()


class _Digits:
    """The digits of level 2 or 3, gathered in order."""

    def __init__(self, total: int, deltas: bytes) -> None:
        self._digits = np.zeros(-(-total // 4) * 4, np.uint8)
        self._done = 0
        self._deltas = deltas

    def add(self, deltas: Bytes) -> Bytes:
        """Take in deltas; those that this level passes on."""
        digits = self._digits[self._done : self._done + len(deltas)]
        self._done += len(deltas)
        digits.fill(_PASSED)
        for digit, delta in enumerate(self._deltas):  # in numpy, three comparisons are faster than one look-up
            found = np.equal(deltas, np.uint8(delta)).view(np.uint8)
            np.subtract(digits, np.multiply(found, np.uint8(_PASSED - digit), out=found), out=digits)
        return _where(deltas, digits == _PASSED)

    def packed(self) -> Bytes:
        fours = self._digits.view("<u4")
        packed: Bytes = (fours | fours >> 6 | fours >> 12 | fours >> 18).astype(np.uint8)
        return packed


def _where(deltas: Bytes, mask: npt.NDArray[np.bool_]) -> Bytes:
    """`deltas[mask]` without a branch for each, which would be guessed wrong every fourth time."""
    return deltas.take(mask.nonzero()[0], mode="clip")
