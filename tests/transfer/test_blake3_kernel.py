"""Signatures checked by kernels: whatever the host's BLAKE3 signs is accepted, and whatever differs in a bit is found.

Without a GPU the kernels run in Triton's interpreter, which is slow: there, messages are short. Skipped, visibly, where
Triton is missing.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")

from dormouse.store.chunk import Digest  # noqa: E402
from dormouse.store.key import Key  # noqa: E402
from dormouse.store.pack import chunk_mac, identity  # noqa: E402
from dormouse.transfer import blake3_kernel  # noqa: E402
from dormouse.transfer.blake3_kernel import SignatureCheck, SignedTasks  # noqa: E402

KEY = Key(bytes(range(32)))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CODEC = 4
MIB = 1 << 20

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


@dataclass
class Signed:
    """Random chunks with their signatures, one after another in `staging`, each from a multiple of 16 on."""

    lengths: list[int]
    seed: int = 0
    sources: list[int] = field(init=False)
    staging: bytearray = field(init=False)
    identities: list[bytes] = field(init=False)
    macs: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        source = random.Random(self.seed)
        self.sources, end = [], 32
        for length in self.lengths:
            self.sources.append(end)
            end += -(-length // 16) * 16
        self.staging = bytearray(source.randbytes(end))  # what lies behind a chunk is not zeros
        self.identities, self.macs = [], []
        for at, length in zip(self.sources, self.lengths, strict=True):
            digest, plain_length = Digest(source.randbytes(32)), source.randrange(1 << 24)
            self.identities.append(identity(digest, CODEC, plain_length))
            self.macs.append(chunk_mac(KEY, digest, CODEC, plain_length, memoryview(self.staging)[at : at + length]))

    def prepared(self, check: SignatureCheck) -> SignedTasks:
        return check.prepare(
            list(zip(self.sources, self.lengths, strict=True)),
            b"".join(self.identities),
            b"".join(self.macs),
        )

    def bytes(self) -> torch.Tensor:
        return torch.frombuffer(self.staging, dtype=torch.uint8).to(DEVICE)

    def status(self, first: int = 0, count: int | None = None) -> int:
        """What a check of these says."""
        check, status = SignatureCheck(DEVICE, KEY.chunks.secret), zero()
        check.check(self.prepared(check), first, len(self.lengths) if count is None else count, self.bytes(), status)
        return int(status)


def zero() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=DEVICE)


def flipped(value: bytes, bit: int) -> bytes:
    changed = bytearray(value)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def with_changed_byte(signed: Signed, at: int) -> Signed:
    """The same chunks and signatures, with one byte of the staging changed."""
    bad = Signed.__new__(Signed)
    bad.__dict__.update(signed.__dict__, staging=bytearray(signed.staging))
    bad.staging[at] ^= 0x10
    return bad


# Around the ends of words, blocks and leaves, with the identity (37 bytes) before or after; trees of odd shapes.
LENGTHS = [0, 1, 26, 27, 28, 63, 64, 65, 987, 988, 1023, 1024, 2048, 39 * 1024 + 1]


def test_signatures_of_messages_of_all_shapes_are_accepted_at_once() -> None:
    assert Signed(LENGTHS).status() == 0


@pytest.mark.parametrize("length", [1, 30, 64, 1100])
def test_a_flipped_bit_of_the_stored_bytes_is_found(length: int) -> None:
    signed = Signed([length], seed=length)
    bit = signed.sources[0] * 8 + random.Random(length).randrange(length * 8)
    signed.staging[:] = flipped(signed.staging, bit)
    assert signed.status() == 1


@pytest.mark.parametrize("bit", [0, 100, 36 * 8 + 7])
def test_a_flipped_bit_of_the_identity_is_found(bit: int) -> None:
    signed = Signed([30])
    signed.identities[0] = flipped(signed.identities[0], bit)
    assert signed.status() == 1


@pytest.mark.parametrize("bit", [0, 45, 90, 127])
def test_a_flipped_bit_of_the_signature_is_found(bit: int) -> None:
    signed = Signed([30])
    signed.macs[0] = flipped(signed.macs[0], bit)
    assert signed.status() == 1


@pytest.mark.parametrize("more", [-1, 1, 16])
def test_another_length_is_found(more: int) -> None:
    signed = Signed([30, 30])
    signed.lengths[0] += more
    assert signed.status() == 1


def test_another_key_is_found() -> None:
    signed, status = Signed([30]), zero()
    check = SignatureCheck(DEVICE, KEY.tables.secret)
    check.check(signed.prepared(check), 0, 1, signed.bytes(), status)
    assert int(status) == 1


def test_only_the_tasks_of_a_call_are_checked_and_other_bits_of_the_status_stay() -> None:
    signed = Signed([40, 70, 100, 130])
    signed.macs[1] = flipped(signed.macs[1], 3)
    check = SignatureCheck(DEVICE, KEY.chunks.secret)
    tasks, staging, status = signed.prepared(check), signed.bytes(), zero()
    status += 4
    seen = []
    for first, count in [(0, 0), (0, 1), (2, 2), (0, 2), (3, 1)]:
        check.check(tasks, first, count, staging, status)
        seen.append(int(status))
    assert seen == [4, 4, 4, 5, 5]


def test_a_tree_of_more_leaves_than_one_program_reduces(monkeypatch: pytest.MonkeyPatch) -> None:
    signed = Signed([30, 256 * 1024 + 50])
    for lanes, bit in (128, None), (256, 77):
        if DEVICE == "cpu":  # the interpreter takes no longer for many leaves at once than for a few
            monkeypatch.setattr(blake3_kernel, "LEAF_LANES", type(blake3_kernel.LEAF_LANES)(lanes))
        if bit is not None:
            signed.macs[1] = flipped(signed.macs[1], bit)
        assert signed.status() == (bit is not None)


def test_tables_may_be_arrays_lists_or_tensors() -> None:
    numpy, signed = pytest.importorskip("numpy"), Signed([40])
    identities, macs = (numpy.frombuffer(b"".join(parts), numpy.uint8) for parts in (signed.identities, signed.macs))
    rows = numpy.array([[signed.sources[0], 40]], dtype=numpy.int64)
    for convert in (lambda array: array, lambda array: array.tolist(), torch.tensor):
        check, status = SignatureCheck(DEVICE, KEY.chunks.secret), zero()
        tasks = check.prepare(convert(rows), convert(identities.reshape(1, 37)), convert(macs.reshape(1, 16)))
        check.check(tasks, 0, 1, signed.bytes(), status)
        assert int(status) == 0


def test_a_plan_without_chunks_has_nothing_to_check() -> None:
    check, status = SignatureCheck(DEVICE, KEY.chunks.secret), zero()
    check.check(check.prepare([], b"", b""), 0, 0, torch.zeros(0, dtype=torch.uint8, device=DEVICE), status)
    assert int(status) == 0


def test_bytes_behind_a_chunk_do_not_matter() -> None:
    signed = Signed([30])
    end = signed.sources[0] + 30
    signed.staging[end:] = bytes(len(signed.staging) - end)
    assert signed.status() == 0
    del signed.staging[end:]  # nor need they be there
    assert signed.status() == 0


def test_what_does_not_fit_is_refused() -> None:
    check, signed = SignatureCheck(DEVICE, KEY.chunks.secret), Signed([30, 40])
    tasks = signed.prepared(check)
    with pytest.raises(ValueError, match="multiple of 16"):
        check.prepare([[8, 30]], [[0] * 37], [[0] * 16])
    with pytest.raises(ValueError, match="stored length"):
        check.prepare([[0, 64 * MIB]], [[0] * 37], [[0] * 16])
    with pytest.raises(ValueError, match="ends after"):
        check.check(tasks, 0, 2, signed.bytes()[:80], zero())
    with pytest.raises(ValueError, match="no tasks 1 to 3"):
        check.check(tasks, 1, 2, signed.bytes(), zero())
    with pytest.raises(ValueError, match="32 bytes"):
        SignatureCheck(DEVICE, b"short")


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from dormouse.transfer import blake3_kernel as kernels

WIDE, BYTES = {"table": "*i64"}, {"staging": "*u8"}
NUMBERS = {name: "i32" for name in ("pitch", "first", "count", "tails")}

for function, constants in [(kernels._leaves, {}), (kernels._tree, {"AGAIN": False}), (kernels._tree, {"AGAIN": True})]:
    names = function.arg_names
    types = {name: (WIDE | BYTES | NUMBERS).get(name, "*i32") for name in names} | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    source = ASTSource(function, types, {(names.index(name),): value for name, value in constants.items()}, aligned)
    lanes = kernels.TREE_LANES if constants else kernels.LEAF_LANES
    options = {"num_warps": lanes.value // 32, "num_stages": 1}
    code = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    print(code.count("ld.global.v4"))
"""


def test_the_kernels_compile_for_a_gpu_and_load_16_bytes_at_once() -> None:
    """The interpreter accepts more than the compiler does."""
    environ = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environ, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "0", "0"]


@gpu
@needs_gpu
@pytest.mark.parametrize("seed", range(3))
def test_large_chunks_of_random_lengths(seed: int) -> None:
    draw = random.Random(seed)
    large = [8 * MIB, 16 * MIB, 16 * MIB - 37, 256 * 1024 - 37, 256 * 1024 - 36, 64 * 1024]
    signed = Signed(large + [draw.randrange(1, 8 * MIB) for _ in range(8)], seed=seed)
    assert signed.status() == 0
    for i, (at, length) in enumerate(zip(signed.sources, signed.lengths, strict=True)):
        bad = with_changed_byte(signed, at + draw.randrange(length))
        assert bad.status(i, 1) == 1, f"task {i}"
        assert bad.status(0, i) == 0, f"tasks before {i}"


@gpu
@needs_gpu
def test_calls_on_several_streams_do_not_disturb_each_other() -> None:
    check, draw = SignatureCheck(DEVICE, KEY.chunks.secret), random.Random(5)
    signed = [Signed([draw.randrange(1, 4 * MIB) for _ in range(6)], seed=i) for i in range(4)]
    signed[2].macs[4] = flipped(signed[2].macs[4], 9)
    lanes = [(one.prepared(check), one.bytes(), zero(), torch.cuda.Stream()) for one in signed]
    torch.cuda.synchronize()
    for _ in range(20):
        for tasks, staging, status, stream in lanes:
            with torch.cuda.stream(stream):
                check.check(tasks, 0, 6, staging, status)
    torch.cuda.synchronize()
    assert [int(status) for _, _, status, _ in lanes] == [0, 0, 1, 0]
