"""Kernels of the float codecs: they make and read the very bytes that the reference codec makes and reads, and write
nothing outside a target whatever a payload says.

Without a GPU the kernels run in Triton's interpreter, which is slow: there, tensors are small. Skipped, visibly, where
Triton is missing.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterable

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")

from dormouse.errors import DamagedError  # noqa: E402
from dormouse.store import floats  # noqa: E402
from dormouse.store.codec import Codec  # noqa: E402
from dormouse.transfer.float_kernels import KINDS, FloatDecoder, encode_batch  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNIT = 8192
MIB = 1 << 20
GUARD = 0xAB
CODECS = [Codec.BF16, Codec.FP16, Codec.FP32, Codec.FP8_E4M3, Codec.FP8_E5M2]
DTYPES = {
    Codec.BF16: torch.bfloat16,
    Codec.FP16: torch.float16,
    Codec.FP32: torch.float32,
    Codec.FP8_E4M3: torch.float8_e4m3fn,
    Codec.FP8_E5M2: torch.float8_e5m2,
}

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
codecs = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


def numbers(codec: Codec, count: int, *, seed: int = 0, outliers: int = 0, tail: int = 0) -> bytes:
    """Like weights: N(0, σ); some of the values are any bits, and some bytes that are no whole value follow."""
    draw = np.random.default_rng(seed)
    plain = torch.from_numpy(draw.normal(0, 1.2, count).astype(np.float32)).to(DTYPES[codec])
    data = plain.view(torch.uint8).numpy().copy()
    if outliers:
        places = draw.integers(0, count, outliers)
        data.reshape(count, -1)[places] = draw.integers(0, 256, (outliers, plain.itemsize), np.uint8)
    return data.tobytes() + bytes(range(1, tail + 1))


def coded(codec: Codec, plain: bytes) -> bytes:
    payload = floats.encode(plain, codec)
    assert payload is not None, "these values were meant to be worth coding"
    return bytes(payload)


def decoded(
    codec: Codec, payload: bytes, plain_length: int, *, target: int = 64, source: int = 48
) -> tuple[int, bytes]:
    """The status, and what stands in the target. Nothing around it may have changed."""
    staging = torch.frombuffer(bytearray(bytes(source) + payload + bytes(16)), dtype=torch.uint8).to(DEVICE)
    destination = torch.full((target + plain_length + 70,), GUARD, dtype=torch.uint8, device=DEVICE)
    status = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    decoder = FloatDecoder(DEVICE)
    tasks = decoder.prepare(np.array([[codec, source, len(payload), target, plain_length]], np.int64))
    decoder.decode(tasks, 0, 1, staging, destination, status)
    out = destination.cpu().numpy().tobytes()
    end = target + plain_length
    assert set(out[:target] + out[end:]) == {GUARD}, "bytes outside the target changed"
    return int(status.item()), out[target:end]


def on_device(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(DEVICE)


def payloads(plain: bytes, codec: Codec, chunk_length: int) -> list[bytes | None]:
    made = encode_batch(on_device(plain), codec, chunk_length)
    return [None if each is None else each.cpu().numpy().tobytes() for each in made]


def chunks(plain: bytes, chunk_length: int) -> list[bytes]:
    return [plain[at : at + chunk_length] for at in range(0, len(plain), chunk_length)]


def reference(plain: bytes, codec: Codec, chunk_length: int) -> list[bytes | None]:
    made = (floats.encode(chunk, codec) for chunk in chunks(plain, chunk_length))
    return [None if each is None else bytes(each) for each in made]


@codecs
def test_what_the_reference_codes_is_decoded(codec: Codec) -> None:
    item = KINDS[codec].item
    plain = numbers(codec, 2 * UNIT - 60, outliers=100, tail=item - 1)
    payload = coded(codec, plain)
    for target in (64, 64 + item, 65):  # vectors, whole values, bytes
        assert decoded(codec, payload, len(plain), target=target) == (0, plain), f"target {target}"


@codecs
def test_what_is_coded_is_what_the_reference_makes(codec: Codec) -> None:
    item = KINDS[codec].item
    plain = numbers(codec, 2 * UNIT - 60, outliers=100, tail=item - 1)
    (payload,) = payloads(plain, codec, 16 * MIB)
    assert payload == coded(codec, plain)
    assert decoded(codec, payload, len(plain)) == (0, plain)


def test_all_bfloat16_patterns() -> None:
    """No encoder makes this payload, as it saves nothing: all values pass all levels."""
    words = np.random.default_rng(6).permutation(1 << 16).astype(np.uint16)
    payload = deep_payload(words)
    assert bytes(floats.decode(Codec.BF16, payload, words.nbytes)) == words.tobytes()
    assert decoded(Codec.BF16, payload, words.nbytes) == (0, words.tobytes())


def test_all_bfloat16_patterns_between_others() -> None:
    """So many usual values around that all levels are used."""
    patterns = np.arange(0, 1 << 16, 1 if DEVICE == "cuda" else 16, dtype=np.uint16)
    usual = np.frombuffer(numbers(Codec.BF16, len(patterns) * 9), np.uint16).reshape(-1, 9)
    plain = np.concatenate([usual, patterns[:, None]], axis=1).tobytes()
    payload = coded(Codec.BF16, plain)
    assert decoded(Codec.BF16, payload, len(plain)) == (0, plain)
    assert payloads(plain, Codec.BF16, 16 * MIB) == [payload]


@codecs
def test_planes_that_are_all_zeros_are_left_out(codec: Codec) -> None:
    kind = KINDS[codec]
    words = np.random.default_rng(3).integers(1, 4, 2 * UNIT - 3).astype(f"<u{kind.item}") << kind.low
    plain = words.astype(f"<u{kind.item}").tobytes()
    payload = coded(codec, plain)
    planes = sum(1 for width in kind.widths if width)
    assert payload[1] == (1 << planes) - 1
    assert decoded(codec, payload, len(plain)) == (0, plain)
    assert payloads(plain, codec, 16 * MIB) == [payload]


def test_many_chunks_of_several_codecs_in_one_plan() -> None:
    """Rows of other codecs are left alone, and a range of rows is decoded without the others."""
    plains = [(codec, numbers(codec, UNIT - 30, seed=seed)) for seed, codec in enumerate([*CODECS, *CODECS[:2]])]
    staging, rows, target = bytearray(), [], 0
    for codec, plain in plains:
        payload = coded(codec, plain)
        rows.append([codec, len(staging), len(payload), target, len(plain)])
        rows.append([Codec.RAW, 0, 100, target, 100])
        staging += payload + bytes(-len(payload) % 16)
        target += -(-len(plain) // 256) * 256
    destination = torch.zeros(target, dtype=torch.uint8, device=DEVICE)
    status = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    decoder = FloatDecoder(DEVICE)
    tasks = decoder.prepare(np.array(rows, np.int64))
    for first, count in ((0, 3), (3, 1), (4, 0), (4, 5)):
        decoder.decode(tasks, first, count, on_device(bytes(staging)), destination, status)
    out = destination.cpu().numpy().tobytes()
    assert status.item() == 0
    for (_codec, plain), (_, _, _, at, length) in zip(plains[:5], rows[:10:2], strict=True):
        assert out[at : at + length] == plain
    assert not any(out[rows[10][3] :]), "rows that were not asked for"


def test_many_chunks_are_coded_at_once() -> None:
    """Whole chunks, one that does not save 1/8, a short last one; and a last one of less than a value."""
    length = 2 * UNIT * 2
    noise = np.random.default_rng(5).integers(0, 256, length, np.uint8).tobytes()
    plain = numbers(Codec.BF16, 2 * UNIT) + noise + numbers(Codec.BF16, 2 * UNIT, seed=2) + numbers(Codec.BF16, UNIT)
    for extra in (b"", b"\x07"):
        made = payloads(plain + extra, Codec.BF16, length)
        assert made == reference(plain + extra, Codec.BF16, length)
        assert [each is None for each in made] == [False, True, False, False]
    whole = plain[:length]
    assert payloads(whole + b"\x07", Codec.BF16, length) == [coded(Codec.BF16, whole), None]
    assert payloads(b"\x07", Codec.BF16, length) == [None]


def test_chunks_that_are_no_whole_number_of_units() -> None:
    plain = numbers(Codec.BF16, 40_000, outliers=100, tail=1)
    length = 2 * (UNIT + 3000) // 16 * 16
    assert payloads(plain, Codec.BF16, length) == reference(plain, Codec.BF16, length)


def test_equally_frequent_exponents_are_chosen_in_order() -> None:
    words = (np.arange(2 * UNIT, dtype=np.uint32) % 16 + 100).astype(np.uint16) << 7
    plain = words.tobytes()
    assert payloads(plain, Codec.BF16, MIB) == reference(plain, Codec.BF16, MIB)


def deep_payload(words: np.ndarray) -> bytes:
    """All values through all levels."""
    n, units = len(words), len(words) // UNIT
    rows = b"".join(struct.pack("<IIII", *[unit * UNIT] * 3, 0) for unit in range(units))
    rest = ((words & 0x7F) | (words >> 15 << 7)).astype(np.uint8).tobytes()
    raw = (words >> 7 & 0xFF).astype(np.uint8).tobytes()
    header = struct.pack("<BBHIIII6s38x", 1, 0, 0, n, n, n, n, bytes(range(3, 9)))
    return header + rows + rest + 3 * (b"\xff" * (n // 4)) + raw


# What cannot be


def cases(payload: bytes, units: int, sections: Iterable[int]) -> list[tuple[str, bytes]]:
    """Payloads that are wrong in one thing each."""

    def patched(at: int, *values: int) -> bytes:
        return payload[:at] + bytes(values) + payload[at + len(values) :]

    def word(at: int, change: int) -> bytes:
        old = int.from_bytes(payload[at : at + 4], "little")
        return patched(at, *((old + change) % (1 << 32)).to_bytes(4, "little"))

    wrong = [("version", patched(0, 2)), ("absent", patched(1, 0x80)), ("absent plane", patched(1, 1))]
    wrong += [(f"reserved {at}", patched(at, 1)) for at in (2, 3, 26, 31, 32, 63)]
    wrong += [(f"count at {at}", word(at, change)) for at in (4, 8, 12, 16) for change in (1, -1, 16, 1 << 31)]
    for unit in range(units):
        for field in range(3):
            wrong += [(f"start {unit} {field}", word(64 + unit * 16 + 4 * field, change)) for change in (1, 1 << 31)]
        wrong.append((f"row {unit}", patched(64 + unit * 16 + 13, 1)))
    wrong += [("longer", payload + b"\0"), ("a section longer", payload + bytes(16)), ("shorter", payload[:-1])]
    wrong += [(f"cut to {length}", payload[:length]) for length in (0, 3, 63, 64, 100, len(payload) // 2)]
    return wrong + [(f"digits at {at}", patched(at, *(payload[at] ^ 0xFF,) * 40)) for at in sections]


def test_a_wrong_payload_sets_the_status_and_touches_nothing_else() -> None:
    plain = numbers(Codec.BF16, 2 * UNIT - 50, outliers=100)
    payload = coded(Codec.BF16, plain)
    level1 = 64 + 32 + 2 * UNIT
    level2 = level1 + 2 * 2048
    for what, wrong in cases(payload, 2, (level1 + 5, level1 + 2100, level2 + 40)):
        with pytest.raises(DamagedError):
            floats.decode(Codec.BF16, wrong, len(plain))
        status, _out = decoded(Codec.BF16, wrong, len(plain), target=66)
        assert status == 1, what
    for length in (0, 1, len(plain) - 2, len(plain) + 2, len(plain) * 2):
        assert decoded(Codec.BF16, payload, length)[0] == 1, f"plain length {length}"


def test_a_header_alone_writes_nothing() -> None:
    plain = numbers(Codec.BF16, UNIT)
    payload = coded(Codec.BF16, plain)
    for wrong in (payload[:64], b"\x02" + payload[1:], payload + b"\0"):
        assert decoded(Codec.BF16, wrong, len(plain)) == (1, bytes([GUARD]) * len(plain))


@codecs
def test_random_changes_write_nothing_outside_the_target(codec: Codec) -> None:
    """And what both accept, both read alike."""
    draw = random.Random(codec)
    plain = numbers(codec, UNIT - 20, outliers=20)
    payload = coded(codec, plain)
    for _ in range(1_000 if DEVICE == "cuda" else 12):
        wrong = bytearray(payload)
        for _change in range(draw.choice((1, 1, 5))):
            area = draw.choice((64, 96, len(wrong)))
            wrong[draw.randrange(area)] = draw.randrange(256)
        status, out = decoded(codec, bytes(wrong), len(plain), target=draw.choice((64, 68, 71)))
        try:
            expected = bytes(floats.decode(codec, bytes(wrong), len(plain)))
        except DamagedError:
            assert status == 1
        else:
            assert status == 1 or out == expected


def test_places_that_do_not_fit_the_memory_are_refused() -> None:
    decoder = FloatDecoder(DEVICE)
    memory = torch.zeros(256, dtype=torch.uint8, device=DEVICE)
    status = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for row in ([4, 0, 300, 0, 16], [4, 240, 32, 0, 16], [4, 0, 64, 250, 16]):
        tasks = decoder.prepare(np.array([row], np.int64))
        with pytest.raises(ValueError, match="ends at"):
            decoder.decode(tasks, 0, 1, memory, memory, status)
    for row in ([4, 8, 64, 0, 16], [4, -16, 64, 0, 16], [4, 0, 64, 0, -1]):
        with pytest.raises(ValueError, match="chunk to decode"):
            decoder.prepare(np.array([row], np.int64))
    with pytest.raises(ValueError, match="multiple of 16"):
        encode_batch(memory, Codec.BF16, 1000)


def test_warming_up_compiles_and_changes_nothing() -> None:
    FloatDecoder(DEVICE).warm([Codec.RAW, *CODECS])


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from dormouse.transfer import float_kernels as kernels

DECODE = dict(staging="*u8", destination="*u8", status="*i32", tasks="*i64", programs="*i32", first="i32")
PLAIN = dict(plain="*u8", length="i64", chunk_length="i32", chunk_units="i32")
MEASURE = dict(PLAIN, histograms="*i32", present="*i32")
WRITE = dict(PLAIN, coded="*u8", places="*i64", headers="*i32", unit_rows="*i32", passed="*u8")
CASES = [
    (kernels._decode, DECODE, dict(ALIGN=16, LANES=256)),
    (kernels._decode, DECODE, dict(ALIGN=1, LANES=256)),
    (kernels._measure, MEASURE, {}),
    (kernels._write, WRITE, dict(LANES=256)),
]
for function, types, more in CASES:
    constants = {**kernels.KINDS[4].constants, **more}
    types = {**types, **dict.fromkeys(constants, "constexpr")}
    names = list(types)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    source = ASTSource(function, types, {(names.index(name),): value for name, value in constants.items()}, aligned)
    code = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]
    print(code.count("st.global.v4") + code.count("st.global.v2"))
"""


def test_the_kernels_compile_for_a_gpu() -> None:
    """The interpreter accepts more than the compiler does. Values are stored as vectors where they can be."""
    environ = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environ, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    fast, slow, _measure, _write = map(int, done.stdout.split())
    assert fast >= 4 and slow == 0


# On a real device


@gpu
@needs_gpu
@codecs
@pytest.mark.parametrize("seed", range(3))
def test_large_tensors_of_odd_lengths(codec: Codec, seed: int) -> None:
    item = KINDS[codec].item
    draw = random.Random(seed)
    count = draw.randrange(3 * MIB, 5 * MIB) // item
    plain = numbers(codec, count, seed=seed, outliers=count // 50, tail=draw.randrange(item))
    length = 2 * MIB - 16 * draw.randrange(1000)
    made = payloads(plain, codec, length)
    assert made == reference(plain, codec, length)
    for chunk, payload in zip(chunks(plain, length), made, strict=True):
        if payload is not None:
            assert decoded(codec, payload, len(chunk), target=256) == (0, chunk)


@gpu
@needs_gpu
def test_a_gigabyte_goes_round() -> None:
    plain = (torch.randn(1 << 29, device="cuda") * 0.02).to(torch.bfloat16).view(torch.uint8)
    made = encode_batch(plain, Codec.BF16, 8 * MIB)
    rows, start = [], made[0].data_ptr()
    for chunk, payload in enumerate(made):
        rows.append([Codec.BF16, payload.data_ptr() - start, len(payload), chunk * 8 * MIB, 8 * MIB])
    decoder = FloatDecoder("cuda")
    tasks = decoder.prepare(np.array(rows, np.int64))
    staging = torch.empty(0, dtype=torch.uint8, device="cuda").set_(made[0].untyped_storage())
    out = torch.zeros_like(plain)
    status = torch.zeros(1, dtype=torch.int32, device="cuda")
    decoder.decode(tasks, 0, len(rows), staging, out, status)
    assert status.item() == 0
    assert torch.equal(out, plain)
    assert sum(len(each) for each in made) * 1.41 < len(plain)
