from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dormouse.checkpoint.safetensors_file import copied_tensor, read_header, to_bfloat16
from dormouse.errors import ConfigError


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@given(values=arrays.arrays(np.float32, st.integers(0, 50), elements=st.floats(width=32)))
def test_float32_is_rounded_as_torch_does(values: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
    ours = np.frombuffer(to_bfloat16("F32", values.tobytes()), np.uint16)
    theirs = torch.from_numpy(values.copy()).bfloat16().view(torch.uint16).numpy()
    nan = np.isnan(values)
    assert (ours[~nan] == theirs[~nan]).all()
    assert ((ours[nan] & 0x7FFF) > 0x7F80).all()


def test_every_float16_becomes_what_torch_makes_of_it() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    ours = np.frombuffer(to_bfloat16("F16", every.tobytes()), np.uint16)
    theirs = torch.from_numpy(every).view(torch.float16).bfloat16().view(torch.uint16).numpy()
    finite = ~np.isnan(every.view(np.float16))
    assert (ours[finite] == theirs[finite]).all()
    assert ((ours[~finite] & 0x7FFF) > 0x7F80).all()


def test_floats_are_narrowed_and_other_types_copied(tmp_path: Path) -> None:
    source = raw_file(
        tmp_path / "source.safetensors",
        {
            "f64": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]},
            "i32": {"dtype": "I32", "shape": [1], "data_offsets": [8, 12]},
        },
        np.float64(1.5).tobytes() + np.int32(-7).tobytes(),
    )
    copied = {name: copied_tensor(source, tensor, name) for name, tensor in read_header(source).items()}
    assert (copied["f64"].dtype, copied["i32"].dtype) == ("BF16", "I32")
    assert b"".join(copied["f64"].chunks()) == torch.tensor([1.5]).bfloat16().view(torch.uint8).numpy().tobytes()
    assert b"".join(copied["i32"].chunks()) == np.int32(-7).tobytes()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"1234", "the unknown type F99"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234", "can't have 4 bytes"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, b"", "an impossible shape"),
        ({"a": {"dtype": "F32", "shape": [1 << 62] * 9, "data_offsets": [0, 4]}}, b"1234", "an impossible shape"),
        ({"a": {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}}, b"1234", "an impossible shape"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, b"123", "a gap or an overlap before tensor a"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"1", "it may be truncated"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"12", "promises"),
        ({"a": {"dtype": "U8"}}, b"", "its header is wrong"),
        ([1], b"", "its header is wrong"),
        (
            {
                "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
                "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
            },
            b"123",
            "an overlap before tensor b",
        ),
    ],
)
def test_each_fault_of_a_header_is_named(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_header(raw_file(tmp_path / "x.safetensors", header, data))
    assert caught.value.remedy


@pytest.mark.parametrize("data", [b"", b"1234567", b"\xff" * 8, (1 << 40).to_bytes(8, "little") + b"{}"])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="its header can't be"):
        read_header(path)


json_values = st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers(-9, 1 << 70), max_size=3),
    lambda inner: st.dictionaries(
        st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4
    ),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=80) | st.builds(lambda v: json.dumps(v).encode(), json_values), tail=st.binary(max_size=9)
)
def test_arbitrary_bytes_are_read_or_refused(tmp_path: Path, data: bytes, tail: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data + tail)
    try:
        for tensor in read_header(path).values():
            assert tensor.offset + tensor.length <= path.stat().st_size
            assert tensor.length % max(1, math.prod(tensor.shape)) == 0
    except ConfigError as error:
        assert "is not a sound safetensors file" in error.message


def test_a_source_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    source = raw_file(
        tmp_path / "s.safetensors", {"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}, b"123456789"
    )
    tensor = read_header(source)["a"]
    with source.open("r+b") as file:
        file.truncate(source.stat().st_size - 1)
    with pytest.raises(ConfigError, match="it ends inside tensor a"):
        list(copied_tensor(source, tensor, "a").chunks())
