"""`dormouse.load_file` against `safetensors.torch.load_file`, on what that writes and on what it refuses."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file as reference
from safetensors.torch import save_file

import dormouse
from dormouse.checkpoint import mapped_file
from dormouse.checkpoint.torch_tensors import DTYPES
from dormouse.errors import ConfigError, DamagedError, DormouseError, NotFoundError, StoreError

from .test_safetensors_file import raw_file

FUNCTION = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
shapes = st.lists(st.integers(0, 5), max_size=4)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Names, types, shapes and every bit."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).cpu().numpy()) if flat.numel() else b""


@FUNCTION
@given(
    kinds=st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=8),
    seed=st.binary(min_size=1, max_size=9),
    lead=st.integers(0, 9),
)
def test_every_type_and_shape_is_what_safetensors_makes_of_it(
    tmp_path: Path, kinds: list[tuple[str, list[int]]], seed: bytes, lead: int
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = seed * lead
    header["lead"] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}
    for number, (dtype, drawn) in enumerate(kinds):
        shape = [*drawn, 2] if dtype == "F4" else drawn
        count = torch.Size(shape).numel()
        size = count // 2 if dtype == "F4" else count * DTYPES[dtype].itemsize
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += (seed * size)[:size]
    path = raw_file(tmp_path / "any.safetensors", header, data)
    assert_same(dormouse.load_file(path), reference(path))


def test_names_come_in_the_order_that_safetensors_gives_them(tmp_path: Path) -> None:
    spans = {"z": [4, 6], "a": [0, 4], "m": [6, 6], "b": [6, 7]}
    header = {
        name: {"dtype": "U8", "shape": [end - at], "data_offsets": [at, end]} for name, (at, end) in spans.items()
    }
    path = raw_file(tmp_path / "order.safetensors", header, bytes(range(7)))
    assert list(dormouse.load_file(path)) == list(reference(path))


def test_tensors_can_be_written_to_and_the_file_never_changes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(5000.0), "b": torch.ones(3)}, path)
    before = path.read_bytes()
    tensors = dormouse.load_file(str(path))
    tensors["a"].zero_()
    assert tensors["b"].tolist() == [1, 1, 1]
    assert path.read_bytes() == before
    assert dormouse.load_file(path)["a"][7] == 7


def test_a_tensor_outlives_the_file_and_the_others(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(9000), "b": torch.ones(3)}, path)
    kept = dormouse.load_file(path)["a"]
    path.unlink()
    gc.collect()
    assert torch.equal(kept, torch.arange(9000))


def test_nothing_is_copied_but_what_its_type_needs_elsewhere(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        "c": {"dtype": "U8", "shape": [5], "data_offsets": [11, 16]},
    }
    found = dormouse.load_file(raw_file(tmp_path / "x.safetensors", header, bytes(range(16))))
    assert found["c"].data_ptr() - found["a"].data_ptr() == 11
    assert found["b"].data_ptr() % 4 == 0
    assert {tensor.untyped_storage().nbytes() for tensor in found.values()} == {3, 8, 5}


def test_a_file_without_tensors(tmp_path: Path) -> None:
    assert dormouse.load_file(raw_file(tmp_path / "x.safetensors", {"__metadata__": {"format": "pt"}})) == {}


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file seems to be in memory."""
    monkeypatch.setattr(mapped_file, "_is_there", lambda _descriptor, _offset: False)


@pytest.mark.usefixtures("cold")
def test_a_larger_file_is_told_as_it_comes_in(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {f"t{n}": torch.randint(0, 1 << 40, (1 << 20,)) for n in range(6)}
    save_file(tensors, path)
    told: list[tuple[int, int]] = []
    assert_same(dormouse.load_file(path, progress=lambda done, total: told.append((done, total))), reference(path))
    assert [done for done, _total in told] == sorted(done for done, _total in told)
    assert told[-1] == (path.stat().st_size,) * 2
    assert len(told) > 2


def test_what_is_in_memory_is_not_brought_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(40 << 20, dtype=torch.uint8)}, path)
    missing = [10 << 20, 12 << 20, 20 << 20]
    brought: list[int] = []
    monkeypatch.setattr(mapped_file, "_is_there", lambda _descriptor, offset: offset not in missing)
    monkeypatch.setattr(mapped_file._Bringing, "_step", lambda _self, offset, _length: brought.append(offset))
    told: list[tuple[int, int]] = []
    dormouse.load_file(path, progress=lambda done, total: told.append((done, total)))
    assert sorted(brought) == missing
    assert told[0][0] > 30 << 20
    assert told[-1] == (path.stat().st_size,) * 2


@pytest.mark.usefixtures("cold")
def test_a_load_that_is_cancelled_ends_and_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(64 << 20, dtype=torch.uint8)}, path)
    cancelled = threading.Event()
    gc.collect()  # mappings of other tests' tensors
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(StoreError, match="given up"):
        dormouse.load_file(path, progress=lambda _done, _total: cancelled.set(), cancelled=cancelled)
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("map")]


def test_a_file_cut_short_while_it_is_mapped_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(40 << 20))
    with path.open("r+b") as file:
        mapping = mapped_file.map_file(file.fileno(), path)
        file.truncate(1 << 20)
        with pytest.raises(DamagedError, match="can't be read at"):
            mapped_file.populate(mapping, file.fileno(), path)


def test_a_file_larger_than_the_free_memory_is_left_to_be_read_as_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(5000.0)}, path)
    monkeypatch.setattr(mapped_file.host_memory, "available", lambda: 100)
    assert_same(dormouse.load_file(path), reference(path))
    assert "larger than the free memory" in caplog.text


@pytest.mark.usefixtures("cold")
def test_a_kernel_that_can_not_bring_pages_in_leaves_it_to_their_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(5000.0)}, path)
    monkeypatch.setattr(mapped_file, "_POPULATE_READ", 9999)  # the kernel refuses what it does not know
    assert_same(dormouse.load_file(path), reference(path))


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2"])
def test_types_that_torch_lacks_are_named(tmp_path: Path, dtype: str) -> None:
    path = raw_file(tmp_path / "x.safetensors", {"a": {"dtype": dtype, "shape": [4], "data_offsets": [0, 3]}}, b"123")
    with pytest.raises(ConfigError, match=f"has no type for tensor a, which is {dtype}"):
        dormouse.load_file(path)


@pytest.mark.parametrize("shape", [[2, 3], [6, 1]])
def test_four_bit_numbers_that_are_no_pairs_are_refused(tmp_path: Path, shape: list[int]) -> None:
    path = raw_file(tmp_path / "x.safetensors", {"a": {"dtype": "F4", "shape": shape, "data_offsets": [0, 3]}}, b"123")
    with pytest.raises(ConfigError, match="packs its numbers in pairs"):
        dormouse.load_file(path)
    with pytest.raises(safetensors.SafetensorError):
        reference(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotFoundError, match="there is no file"):
        dormouse.load_file(tmp_path / "nothing")
    for name in ("pipe", "."):
        with pytest.raises(ConfigError, match="is no regular file"):
            dormouse.load_file(tmp_path / name)


@pytest.mark.parametrize("device", ["meta", "nonsense", "mps"])
def test_other_devices_are_refused(tmp_path: Path, device: str) -> None:
    with pytest.raises(ConfigError, match="Use cpu, cuda or cuda:N"):
        dormouse.load_file(tmp_path / "x", device=device)


def sound_file(path: Path) -> bytes:
    save_file({"a": torch.arange(30.0), "b": torch.arange(7, dtype=torch.int16), "c": torch.tensor(True)}, path)
    return path.read_bytes()


@FUNCTION
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.safetensors"
    whole = sound_file(path)
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ConfigError, match="is not a sound safetensors file") as caught:
        dormouse.load_file(path)
    assert caught.value.remedy


@FUNCTION
@given(data=st.data())
def test_a_flipped_bit_is_refused_or_is_what_safetensors_reads(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.safetensors"
    whole = bytearray(sound_file(path))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole)
    try:
        found = dormouse.load_file(path)
    except DormouseError as error:
        assert error.remedy
        return
    try:
        expected = reference(path)
    except safetensors.SafetensorError:
        return  # a stricter reader of JSON; what was found is in the file all the same
    assert_same(found, expected)


@FUNCTION
@given(header=st.binary(max_size=60), tail=st.binary(max_size=40))
def test_arbitrary_bytes_are_loaded_or_refused(tmp_path: Path, header: bytes, tail: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + tail)
    try:
        dormouse.load_file(path)
    except ConfigError as error:
        assert "is not a sound safetensors file" in error.message


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    path = tmp_path / "x.safetensors"
    save_file(
        {
            "a": torch.randn(3000, 1001).bfloat16(),
            "b": torch.tensor(3.5, dtype=torch.float64),
            "c": torch.ones(0, 3),
            "d": torch.randn(5, 7).to(torch.float8_e4m3fn),
            "e": torch.randn(4, dtype=torch.complex64),
            "f": torch.randint(0, 255, (40_000_001,), dtype=torch.uint8),
        },
        path,
    )
    for device in ("cuda", 0, torch.device("cuda:0")):
        found = dormouse.load_file(path, device)
        assert {tensor.device for tensor in found.values()} == {torch.device("cuda:0")}
        assert_same(found, reference(path))
    assert len({found[name].untyped_storage().data_ptr() for name in "abdef"}) == 1
