"""The codec of floating-point numbers: every number comes back bit for bit, the bytes are the format's, and no payload
does anything but decode to the right length or be refused."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from dormouse.errors import DamagedError
from dormouse.store import codec as codecs
from dormouse.store.chunk import MAX_CHUNK
from dormouse.store.codec import FLOATS, Codec
from dormouse.store.floats import FORMATS, UNIT, Header, decode, decode_into, encode, sections

KINDS = sorted(FORMATS)
each_kind = pytest.mark.parametrize("codec", KINDS)
kinds = st.sampled_from(KINDS)


def words(codec: Codec, exponents: Sequence[int] | npt.NDArray[np.int64], seed: int = 0) -> npt.NDArray[np.uint64]:
    """Numbers with these exponents and any other bits."""
    form, random = FORMATS[codec], np.random.default_rng(seed)
    field = np.asarray(exponents, np.uint64) << np.uint64(form.low)
    below = random.integers(0, 1 << form.low, len(field), np.uint64)
    return below | field | random.integers(0, 2, len(field), np.uint64) << np.uint64(form.sign)


def numbers(codec: Codec, count: int, seed: int = 0) -> bytes:
    """Numbers as weights have them: each exponent half as frequent as the next higher one."""
    form, random = FORMATS[codec], np.random.default_rng(seed)
    below_top = np.minimum(random.geometric(0.5, count) - 1, (1 << form.bits) - 3)
    return words(codec, (1 << form.bits) - 3 - below_top, seed).astype(form.word).tobytes()


def coded(plain: bytes, codec: Codec) -> bytes:
    stored = encode(plain, codec)
    assert stored is not None and len(stored) * 8 <= len(plain) * 7
    return bytes(stored)


def decoded(codec: Codec, stored: bytes, length: int) -> bytes:
    """Decoded twice, once into the middle of other bytes, which must stay as they are."""
    guarded = bytearray(b"guard" * 20 + bytes(length) + b"guard" * 20)
    decode_into(codec, stored, memoryview(guarded)[100 : 100 + length])
    assert guarded[:100] == guarded[100 + length :] == b"guard" * 20
    plain = bytes(decode(codec, stored, length))
    assert plain == guarded[100 : 100 + length]
    return plain


def assert_round_trip(plain: bytes, codec: Codec) -> bytes:
    stored = coded(plain, codec)
    assert decoded(codec, stored, len(plain)) == plain
    return stored


# Every number comes back


@each_kind
def test_every_pattern_of_bits_comes_back(codec: Codec) -> None:
    form = FORMATS[codec]
    if form.item == 4:  # all that 16 high bits can be, thrice
        low = np.random.default_rng(1).integers(0, 1 << 16, 3 << 16, np.uint64)
        patterns = np.tile(np.arange(1 << 16, dtype=np.uint64) << np.uint64(16), 3) | low
    else:
        patterns = np.arange(1 << 8 * form.item, dtype=np.uint64)
    usual = np.frombuffer(numbers(codec, 100_000 if form.item == 1 else 3_000_000), form.word)
    plain = np.random.default_rng(2).permutation(np.concatenate([patterns.astype(form.word), usual])).tobytes()
    assert_round_trip(plain, codec)


SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1.1754944e-38, 1.1754942e-38, 3.4028235e38, 1.0]


def test_special_numbers_of_fp32_come_back_with_every_bit() -> None:
    bits = struct.pack(f"<{len(SPECIAL)}f", *SPECIAL)
    odd = struct.pack("<6I", 0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0xFF800001, 0x7FBFFFFF, 0x00000001)
    plain = b"".join((numbers(Codec.FP32, 90_000, 1), bits, odd, numbers(Codec.FP32, 90_000, 2), odd, bits))
    assert_round_trip(plain, Codec.FP32)


@each_kind
@pytest.mark.parametrize("more", [-UNIT - 1, -UNIT, -1, 0, 1, 4, 7 * UNIT + 5])
def test_any_count_of_numbers_with_any_tail(codec: Codec, more: int) -> None:
    plain = numbers(codec, 64 * UNIT + more, 3)
    for tail in range(FORMATS[codec].item):
        assert_round_trip(plain + b"abc"[:tail], codec)


@given(kinds, st.integers(0, 3 * UNIT), st.integers(0, 3), st.floats(0.02, 1), st.integers(0, 2**32))
@settings(deadline=None, max_examples=150)
def test_numbers_of_any_spread_come_back_or_are_not_coded(
    codec: Codec, count: int, tail: int, spread: float, seed: int
) -> None:
    form, random = FORMATS[codec], np.random.default_rng(seed)
    weights = random.dirichlet(np.full(1 << form.bits, spread / 10))
    exponents = random.choice(1 << form.bits, count, p=weights)
    plain = words(codec, exponents, seed).astype(form.word).tobytes() + bytes(range(tail))
    stored = encode(plain, codec)
    if stored is not None:
        assert len(stored) * 8 <= len(plain) * 7
        assert decoded(codec, bytes(stored), len(plain)) == plain


@given(kinds, st.binary(max_size=300), st.integers(1, 2000))
@settings(deadline=None)
def test_any_bytes_come_back(codec: Codec, part: bytes, times: int) -> None:
    plain = part * times
    used, stored = codecs.encode(plain, codec)
    assert codecs.decode(used, stored, len(plain)) == plain
    out = memoryview(bytearray(len(plain)))
    codecs.decode_into(used, stored, out)
    assert out == plain


@each_kind
def test_a_whole_chunk_in_many_threads(codec: Codec) -> None:
    plain = numbers(codec, (4 << 20) // FORMATS[codec].item, 5)
    stored = coded(plain, codec)
    with ThreadPoolExecutor(4) as pool:
        assert all(result == plain for result in pool.map(lambda _at: decode(codec, stored, len(plain)), range(8)))
        assert all(result == stored for result in pool.map(lambda _at: encode(plain, codec), range(8)))


# The bytes are the format's: the same, said in the plainest way


def plain_encode(plain: bytes, codec: Codec) -> bytes | None:
    form = FORMATS[codec]
    values = [
        value for (value,) in struct.iter_unpack(f"<{'_BH_I'[form.item]}", plain[: len(plain) // form.item * form.item])
    ]
    field = [value >> form.low & ((1 << form.bits) - 1) for value in values]
    rests = [value & ((1 << form.low) - 1) | value >> form.sign << form.low for value in values]
    units = range(0, len(values), UNIT)
    bases = []
    for start in units:
        histogram = Counter(field[start : start + UNIT])
        candidates = range((1 << form.bits) - 2)
        bases.append(max(candidates, key=lambda b: (histogram[b] + histogram[b + 1] + histogram[b + 2], -b)))
    deltas = [(exponent - bases[at // UNIT]) % 256 for at, exponent in enumerate(field)]
    passed = Counter(delta for delta in deltas if delta > 2)
    common = sorted(range(3, 256), key=lambda delta: (-passed[delta], delta))[:6]
    padding = -len(values) % UNIT
    deltas += [0] * padding
    rests += [0] * padding
    level1 = [min(delta, 3) for delta in deltas]
    rows, streams = b"", ([], [], [])
    for unit, start in enumerate(units):
        rows += struct.pack("<IIIB3x", *map(len, streams), bases[unit])
        for delta in deltas[start : start + UNIT]:
            if delta > 2:
                streams[0].append(common.index(delta) if delta in common[:3] else 3)
                if delta not in common[:3]:
                    streams[1].append(common.index(delta) - 3 if delta in common else 3)
                    if delta not in common:
                        streams[2].append(delta)
    planes, absent, shift = [], 0, 0
    for at, width in enumerate(form.planes):
        parts = [rest >> shift & ((1 << width) - 1) for rest in rests]
        shift += width
        if any(parts):
            planes.append(
                b"".join(p.to_bytes(width // 8, "little") for p in parts) if width > 7 else striped(parts, width)
            )
        else:
            absent |= 1 << at
    head = struct.pack("<BBHIIII6B38x", 1, absent, 0, len(values), *map(len, streams), *common)
    body = [rows, *planes, striped(level1, 2), *map(in_order, streams[:2]), bytes(streams[2])]
    body.append(plain[len(values) * form.item :])
    for section in body:
        head += bytes(-len(head) % 16) + section
    return head if len(head) * 8 <= len(plain) * 7 else None


def striped(parts: list[int], width: int) -> bytes:
    per_byte = 8 // width
    step = UNIT // per_byte
    return bytes(
        sum(parts[unit + at + k * step] << width * k for k in range(per_byte))
        for unit in range(0, len(parts), UNIT)
        for at in range(step)
    )


def in_order(digits: list[int]) -> bytes:
    digits = digits + [0] * (-len(digits) % 4)
    return bytes(sum(digits[at + k] << 2 * k for k in range(4)) for at in range(0, len(digits), 4))


@each_kind
@pytest.mark.parametrize("seed", range(4))
def test_the_bytes_are_those_of_the_description(codec: Codec, seed: int) -> None:
    form, random = FORMATS[codec], np.random.default_rng(seed)
    exponents = random.choice(
        [5, 6, 7, 8, 9, 10, 4, 3, 0, 1, 11, 12, 13, 14],
        3 * UNIT - 50 * seed,
        p=[0.2, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05, 0.02, 0.02, 0.02, 0.01, 0.01, 0.01, 0.01],
    ) + random.integers(0, 2)
    values = words(codec, exponents, seed)
    if seed == 3:
        values &= np.uint64((1 << form.bits) - 1 << form.low)  # only powers of two: all planes absent
    plain = values.astype(form.word).tobytes() + b"xyz"[: form.item - 1]
    assert encode(plain, codec) == plain_encode(plain, codec)
    assert seed < 3 or encode(plain, codec) is not None


def golden_plain(codec: Codec) -> bytes:
    """Numbers that come from BLAKE3 alone, so that no library's random numbers are in the way."""
    form, count = FORMATS[codec], 3 * UNIT - 100
    top = (1 << form.bits) - 2
    plain = b""
    for bits, chance in struct.iter_unpack("<II", blake3(codec.name.encode()).digest(length=8 * count)):
        zeros = (chance & -chance).bit_length() - 1 if chance else 32
        value = (bits >> 31) << form.sign | max(top - zeros, 0) << form.low | bits & ((1 << form.low) - 1)
        plain += value.to_bytes(form.item, "little")
    return plain


GOLDEN = {
    Codec.BF16: ("a699760a27ad60607b68a49da69e1d01", "010000009c5f00008f0b0000740100002d000000fffefdfcfbfa"),
    Codec.FP16: ("472831cd534bf7c738a9c0ae8c5dec28", "010000009c5f0000f30b00006401000023000000fffefdfcfbfa"),
    Codec.FP32: ("d3228599810a5a79f7c6d6545c3588fb", "010000009c5f0000010c00007701000039000000fffefdfcfbfa"),
    Codec.FP8_E4M3: ("6d2fee274aaf121269f4f3df1816e187", "010000009c5f0000220c00008401000033000000fffefdfcfbfa"),
    Codec.FP8_E5M2: ("44d1ba862b8faf52c822155ac8d74335", "010000009c5f0000f70b0000870100002b000000fffefdfcfbfa"),
}


@each_kind
def test_the_bytes_are_what_they_were(codec: Codec) -> None:
    stored = coded(golden_plain(codec), codec)
    assert (blake3(stored).hexdigest()[:32], stored[:26].hex()) == GOLDEN[codec]


# What gains nothing


@each_kind
def test_what_gains_too_little_is_not_coded(codec: Codec) -> None:
    noise = blake3(b"noise").digest(length=100_000)
    assert encode(noise, codec) is None
    assert codecs.encode(noise, codec) == (Codec.RAW, noise)
    assert encode(b"", codec) is None
    assert encode(b"\1", codec) is None


@each_kind
def test_what_only_repeats_itself_is_left_to_lz4(codec: Codec) -> None:
    plain = blake3(b"part").digest(length=1000) * 200
    used, stored = codecs.encode(plain, codec)
    assert used is Codec.LZ4
    assert len(stored) < 10_000


def test_every_codec_of_floats_has_a_format() -> None:
    assert set(FORMATS) == FLOATS


def test_who_has_no_such_chunk_needs_no_numpy() -> None:
    code = "import sys, dormouse.cli, dormouse.store.store, dormouse.checkpoint.writer; print('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "False\n"


# Hostile payloads


def outcome(codec: Codec, stored: bytes, length: int) -> bool:
    """Whether it is refused. Anything but a refusal or bytes of the right length is an error of the test."""
    try:
        assert len(decoded(codec, stored, length)) == length
    except DamagedError as error:
        assert "damaged" in error.message
        return True
    return False


@pytest.fixture(scope="module", params=KINDS, ids=lambda codec: codec.name)
def sample(request: pytest.FixtureRequest) -> tuple[Codec, bytes, bytes]:
    """Not quite three units, with a tail where there can be one."""
    codec: Codec = request.param
    plain = numbers(codec, 3 * UNIT - 300, 7) + b"abc"[: FORMATS[codec].item - 1]
    return codec, plain, coded(plain, codec)


def parts(codec: Codec, plain: bytes, stored: bytes) -> list[slice]:
    """Where the sections of a good payload are."""
    _version, absent, _zero, count, *passed = struct.unpack_from("<BBHIIII", stored)
    header = Header(absent, count, (passed[0], passed[1], passed[2]), (stored[20:23], stored[23:26]))
    at = sections(FORMATS[codec], header, len(plain))
    return [at.units, *(place for place in at.planes if place), *at.levels, at.raw, at.tail]


def test_a_payload_cut_anywhere_is_refused(sample: tuple[Codec, bytes, bytes]) -> None:
    codec, plain, stored = sample
    ends = {
        end + off for place in parts(codec, plain, stored) for end in (place.start, place.stop) for off in (-1, 0, 1)
    }
    for end in sorted(ends | set(range(70)) | {len(stored) - 1}):
        if end < len(stored):
            assert outcome(codec, stored[:end], len(plain)), end
    assert outcome(codec, stored + b"\0", len(plain))
    assert outcome(codec, stored + bytes(16), len(plain))


def test_another_length_is_refused(sample: tuple[Codec, bytes, bytes]) -> None:
    codec, plain, stored = sample
    for length in (0, 1, len(plain) - 1, len(plain) + 1, 2 * len(plain), MAX_CHUNK):
        assert outcome(codec, stored, length)


def test_every_byte_of_the_header_matters(sample: tuple[Codec, bytes, bytes]) -> None:
    """All but the deltas, which are a matter of content."""
    codec, plain, stored = sample
    for at in range(64):
        for change in (1, 2, 4, 0x80, 0xFF):
            bad = bytearray(stored)
            bad[at] ^= change
            assert outcome(codec, bytes(bad), len(plain)) or 20 <= at < 26, (at, change)


def test_every_byte_of_the_units_matters(sample: tuple[Codec, bytes, bytes]) -> None:
    """All but the bases."""
    codec, plain, stored = sample
    units = parts(codec, plain, stored)[0]
    for at in range(units.start, units.stop):
        bad = bytearray(stored)
        bad[at] ^= 1
        assert outcome(codec, bytes(bad), len(plain)) == ((at - units.start) % 16 != 12), at


def test_digits_that_pass_on_another_count_are_refused(sample: tuple[Codec, bytes, bytes]) -> None:
    codec, plain, stored = sample
    *_others, level1, level2, level3, _raw, _tail = parts(codec, plain, stored)
    for level in (level1, level2, level3):
        for at in (level.start, (level.start + level.stop) // 2):
            bad = bytearray(stored)
            bad[at] = 0x55 if bad[at] & 3 == 3 or bad[at] == 0xFF else 0xFF
            assert outcome(codec, bytes(bad), len(plain)), at


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_changed_bytes_never_do_harm(sample: tuple[Codec, bytes, bytes], data: st.DataObject) -> None:
    codec, plain, stored = sample
    bad = bytearray(stored)
    places = st.integers(0, 127) | st.integers(0, len(stored) - 1)
    for at, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=8)):
        bad[at] = value
    outcome(codec, bytes(bad), len(plain))


@given(
    kinds,
    st.integers(0, 3),
    st.tuples(*[st.integers(0, 2**32 - 1) | st.integers(0, 300)] * 4),
    st.binary(min_size=6, max_size=6),
    st.binary(max_size=200),
    st.integers(0, 40_000),
)
@settings(deadline=None, max_examples=300)
def test_made_up_payloads_never_do_harm(
    codec: Codec, absent: int, counts: tuple[int, int, int, int], deltas: bytes, body: bytes, length: int
) -> None:
    head = struct.pack("<BBHIIII6s38x", 1, absent, 0, *counts, deltas)
    outcome(codec, head + body, length)
    values = length // FORMATS[codec].item
    header = Header(absent, values, (counts[1] % 9, counts[2] % 5, counts[3] % 3), (deltas[:3], deltas[3:]))
    total = sections(FORMATS[codec], header, length).tail.stop
    outcome(codec, header.pack() + (body + bytes(total))[: total - 64], length)


@each_kind
@pytest.mark.parametrize("level", range(3))
def test_a_level_that_ends_before_its_digits_are_all_read_is_refused(codec: Codec, level: int) -> None:
    """In the first of several blocks, whose units tell the truth; only the total does not."""
    plain = numbers(codec, 70 * UNIT, 8)
    stored = coded(plain, codec)
    places = parts(codec, plain, stored)
    cut = places[-4 + level]  # level 2, level 3, raw
    bad = bytearray(stored)
    bad[8 + 4 * level : 12 + 4 * level] = struct.pack("<I", 4)
    first = bytes(bad[: cut.start]) + bytes(bad[cut.start : cut.start + (4 if level == 2 else 1)])
    shorter = first + bytes(-len(first) % 16) + stored[cut.stop + -cut.stop % 16 :]
    with pytest.raises(DamagedError, match="other counts"):
        decode(codec, shorter, len(plain))


def test_nothing_is_fetched_for_a_level_that_is_not_there() -> None:
    """No values, but values passed on."""
    header = Header(0, 0, (4, 4, 1), (b"\3\4\5", b"\6\7\x08"))
    total = sections(FORMATS[Codec.BF16], header, 1).tail.stop
    assert outcome(Codec.BF16, header.pack().ljust(total, b"\0"), 1)


def test_no_chunk_is_longer_than_allowed() -> None:
    length = MAX_CHUNK + 2
    head = Header(0, length // 2, (0, 0, 0), (b"\3\4\5", b"\6\7\x08")).pack()
    with pytest.raises(DamagedError, match="at most"):
        codecs.decode(Codec.BF16, head, length)
    with pytest.raises(DamagedError, match="at most"):
        codecs.decode_into(Codec.BF16, head, memoryview(bytearray(length)))
