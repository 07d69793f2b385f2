"""Weights coded by a device while they are imported: what is stored is what the CPU would have stored, whatever the
device does. The real coder runs in Triton's interpreter, on chunks that are small."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dormouse.checkpoint.coding import Coding
from dormouse.checkpoint.tensors import NewTensor
from dormouse.checkpoint.writer import float_bytes, write_tensors
from dormouse.errors import HostError, StoreError
from dormouse.store import floats
from dormouse.store.codec import Codec
from dormouse.store.store import Manifest, Store
from dormouse.transfer.coder import Coded
from dormouse.transfer.ingest import Ingest

CHUNK = 64 << 10
FAILURE = HostError("the device is on fire", remedy="Put it out")


class FakeCoder:
    """Codes as the CPU does, and remembers what it was given. Fails in the run of number `fails`."""

    name = "a fake"

    def __init__(self, fails: int | None = None) -> None:
        self.runs: list[tuple[Codec, list[int]]] = []
        self.closed = False
        self._fails = fails

    def code(self, plains: Sequence[memoryview], codec: Codec) -> list[Coded]:
        self.runs.append((codec, [len(plain) for plain in plains]))
        if len(self.runs) - 1 == self._fails:
            raise FAILURE
        made = [floats.encode(plain, codec) for plain in plains]
        return [Coded(Codec.LZ4, None) if payload is None else Coded(codec, payload) for payload in made]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as opened:
        yield opened


def numbers(seed: int, length: int = CHUNK) -> memoryview:
    normal = np.random.default_rng(seed).normal(0, 0.02, length // 2).astype("<f4")
    return memoryview(bytearray((normal.view("<u4") >> 16).astype("<u2").tobytes()))


def noise(seed: int) -> memoryview:
    return memoryview(bytearray(np.random.default_rng(seed).bytes(CHUNK)))


def stored(store: Store, chunks: Sequence[tuple[memoryview, Codec]], coder: Any) -> list[tuple[int, int]]:
    """Put all chunks; the codec and the length of each in the store. All of them come back."""
    with store.begin() as transaction:
        with Ingest(transaction, threads=2) as ingest, Coding(ingest, coder, run_bytes=4 * CHUNK) as coding:
            for plain, codec in chunks:
                coding.add(plain, codec)
            refs = coding.digests()
        transaction.commit(store_manifest(refs))
    assert [bytes(store.read(digest)) for digest in refs] == [bytes(plain) for plain, _ in chunks]
    with store.reader() as reader:
        return [(chunk.codec, chunk.stored_length) for chunk in reader.locate(refs)]


def store_manifest(refs: list[Any]) -> Any:
    return Manifest(id="0123456789ab", kind="checkpoint", name="m", created=1.0, body=b"", refs=refs)


def mixed() -> list[tuple[memoryview, Codec]]:
    return [
        *((numbers(seed), Codec.BF16) for seed in range(6)),
        (noise(6), Codec.LZ4),
        (memoryview(bytearray(CHUNK)), Codec.BF16),
        (noise(7), Codec.BF16),
        (numbers(8), Codec.FP16),
        (numbers(9), Codec.BF16),
        (numbers(10, CHUNK - 1000), Codec.BF16),
    ]


def test_a_device_codes_runs_and_the_store_has_what_the_cpu_makes(store: Store, tmp_path: Path) -> None:
    coder = FakeCoder()
    with Store.open(tmp_path / "other") as other:
        assert stored(store, mixed(), coder) == stored(other, mixed(), None)
    bf16, fp16 = Codec.BF16, Codec.FP16
    assert coder.runs == [
        (bf16, [CHUNK] * 4),
        (bf16, [CHUNK] * 2),
        (bf16, [CHUNK] * 2),
        (fp16, [CHUNK]),
        (bf16, [CHUNK, CHUNK - 1000]),
    ]
    assert coder.closed


@pytest.mark.parametrize("fails", [0, 1])
def test_a_device_that_fails_leaves_the_rest_to_the_cpu(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture, fails: int
) -> None:
    coder = FakeCoder(fails)
    with Store.open(tmp_path / "other") as other:
        assert stored(store, mixed(), coder) == stored(other, mixed(), None)
    assert len(coder.runs) == fails + 1
    assert "from here on the CPU codes the weights: the device is on fire" in caplog.text


def test_no_more_than_one_run_waits_for_the_device(store: Store) -> None:
    class Slow(FakeCoder):
        gate = threading.Semaphore(0)

        def code(self, plains: Sequence[memoryview], codec: Codec) -> list[Coded]:
            self.gate.acquire(timeout=20)
            return super().code(plains, codec)

    coder, added = Slow(), []
    with store.begin() as transaction, Ingest(transaction) as ingest, Coding(ingest, coder, run_bytes=CHUNK) as coding:

        def feed() -> None:
            for seed in range(5):
                coding.add(numbers(seed), Codec.BF16)
                added.append(seed)

        feeder = threading.Thread(target=feed)
        feeder.start()
        feeder.join(0.3)
        assert len(added) == 2  # one at the device, one to follow; the next one waits
        for _ in range(5):
            coder.gate.release()
        feeder.join(20)
        assert len(coding.digests()) == 5


def test_a_payload_that_saves_too_little_is_refused(store: Store) -> None:
    class Wrong(FakeCoder):
        def code(self, plains: Sequence[memoryview], codec: Codec) -> list[Coded]:
            return [Coded(codec, plain) for plain in plains]

    with pytest.raises(StoreError, match="is not what BF16 stores"):
        stored(store, [(numbers(1), Codec.BF16)] * 3, Wrong())
    with store.begin() as transaction, pytest.raises(StoreError, match="is not what LZ4 stores"):
        transaction.put(numbers(1), codec=Codec.LZ4, payload=b"x")


def test_an_error_of_the_source_ends_the_coding(store: Store) -> None:
    def broken() -> Iterator[bytes]:
        yield bytes(numbers(1))
        raise OSError("the source is gone")

    tensor = NewTensor("t", "BF16", (CHUNK,), broken)
    coder = FakeCoder()
    with store.begin() as transaction, pytest.raises(OSError, match="the source is gone"):
        write_tensors(transaction, [tensor], lambda _done, _total: None, coder=coder)
    assert coder.closed


def test_tensors_are_written_with_a_device(store: Store) -> None:
    data = bytes(numbers(3, 9 << 20))
    tensor = NewTensor("t", "BF16", (len(data) // 2,), lambda: iter([data]))
    coder = FakeCoder()
    with store.begin() as transaction:
        written = write_tensors(transaction, [tensor], lambda _done, _total: None, coder=coder)
        transaction.commit(written.manifest("m", 1.0))
    assert b"".join(store.read(digest) for digest in written.refs) == data
    assert coder.runs == [(Codec.BF16, [8 << 20, 1 << 20])]
    assert float_bytes([tensor, NewTensor("u", "I8", (5,), lambda: iter([]))]) == len(data)


def test_looking_for_a_device_imports_no_torch_where_there_is_none() -> None:
    code = (
        "import sys; from pathlib import Path; from dormouse.transfer import coder; "
        "coder._DRIVER = Path('/nowhere'); assert coder.find_coder(1 << 40) is None; "
        "import dormouse.checkpoint.importer; assert not {'torch', 'triton', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# The real coder


@pytest.fixture
def gpu_coder() -> Any:
    pytest.importorskip("triton", reason="triton is not installed")
    import torch

    from dormouse.transfer.float_coder import GpuCoder

    return GpuCoder("cuda" if torch.cuda.is_available() else "cpu")


def test_a_run_that_would_be_cut_elsewhere_is_refused(gpu_coder: Any) -> None:
    with pytest.raises(ValueError, match="only the last chunk"):
        gpu_coder.code([memoryview(bytearray(40_010))] * 2, Codec.BF16)


def test_the_gpu_codes_what_the_cpu_codes(gpu_coder: Any) -> None:
    plains = [numbers(1), noise(2), numbers(3, CHUNK - 1001 * 2)]
    wanted = [floats.encode(plain, Codec.BF16) for plain in plains]
    assert wanted[1] is None
    assert gpu_coder.code(plains, Codec.BF16) == [
        Coded(Codec.BF16, wanted[0]),
        Coded(Codec.LZ4, None),
        Coded(Codec.BF16, wanted[2]),
    ]
    odd = memoryview(bytearray(bytes(numbers(4, 30002)) + b"x"))
    assert gpu_coder.code([odd], Codec.BF16) == [Coded(Codec.BF16, floats.encode(odd, Codec.BF16))]
    assert gpu_coder.code([noise(2)], Codec.BF16) == [Coded(Codec.LZ4, None)]
    gpu_coder.close()


def test_what_does_not_come_back_is_left_to_the_cpu(
    gpu_coder: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dormouse.transfer import float_coder

    honest = float_coder.encode_block

    def wrong(plain: Any, codec: int, length: int) -> Any:
        made = honest(plain, codec, length)
        made.memory[made.places[1][0] + 200] ^= 1  # a bit of a mantissa of the second chunk
        return made

    monkeypatch.setattr(float_coder, "encode_block", wrong)
    first, second = gpu_coder.code([numbers(1), numbers(2)], Codec.BF16)
    assert first == Coded(Codec.BF16, floats.encode(numbers(1), Codec.BF16))
    assert second == Coded(Codec.BF16, None)
    assert "wrongly" in caplog.text

    def nonsense(plain: Any, codec: int, length: int) -> Any:
        made = honest(plain, codec, length)
        made.memory[0] = 9  # a version that nobody knows
        return made

    monkeypatch.setattr(float_coder, "encode_block", nonsense)
    assert gpu_coder.code([numbers(1), numbers(2)], Codec.BF16) == [Coded(Codec.BF16, None)] * 2


def test_a_failure_of_the_gpu_is_an_error_of_the_host(gpu_coder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dormouse.transfer import float_coder

    def fail(*_arguments: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(float_coder, "encode_block", fail)
    with pytest.raises(HostError, match="could not code weights: CUDA error: an illegal memory access"):
        gpu_coder.code([numbers(1)], Codec.BF16)


@pytest.mark.gpu
def test_a_gpu_codes_an_import(store: Store) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    from dormouse.transfer.float_coder import GpuCoder

    data = bytes(numbers(5, 300 << 20))
    tensor = NewTensor("t", "BF16", (len(data) // 2,), lambda: iter([data]))
    with store.begin() as transaction:
        written = write_tensors(transaction, [tensor], lambda _done, _total: None, coder=GpuCoder.open())
        transaction.commit(written.manifest("m", 1.0))
    assert b"".join(store.read(digest) for digest in written.refs) == data
    with store.reader() as reader:
        chunks = list(reader.locate(written.refs))
    assert {chunk.codec for chunk in chunks} == {Codec.BF16}
    last = floats.encode(data[-(4 << 20) :], Codec.BF16)
    assert last is not None and chunks[-1].stored_length == len(last)
