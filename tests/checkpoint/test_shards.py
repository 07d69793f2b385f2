"""Where the bytes of tensors go: against what torch makes of the same tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dormouse.checkpoint.shards import Placement, Shard, by_chunk, cuts, place, select
from dormouse.checkpoint.tensors import ITEM_SIZES, NewTensor, Tensor, lay_out
from dormouse.checkpoint.torch_tensors import views
from dormouse.errors import ConfigError
from dormouse.transfer.plan import Copy

shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)


def table(kinds: list[tuple[str, tuple[int, ...]]]) -> list[Tensor]:
    return lay_out(
        [NewTensor(f"t{n}", dtype, shape, lambda: iter(())) for n, (dtype, shape) in enumerate(kinds)]
    ).tensors


def source_of(tensors: list[Tensor]) -> torch.Tensor:
    size = max((tensor.offset + tensor.length for tensor in tensors), default=0)
    return torch.arange(size).mul(37).remainder(251).to(torch.uint8)


def carry_out(copies: tuple[Copy, ...], source: torch.Tensor, blocks: list[torch.Tensor], begin: int = 0) -> None:
    for copy in copies:
        for row in range(copy.rows):
            at, to = begin + copy.source + row * copy.source_pitch, copy.target + row * copy.target_pitch
            blocks[copy.device][to : to + copy.row_bytes] = source[at : at + copy.row_bytes]


def by_torch(whole: torch.Tensor, dimension: int | None, devices: int, device: int) -> torch.Tensor:
    if dimension is None:
        return whole
    parts = torch.chunk(whole, devices, dimension)
    return parts[device] if device < len(parts) else whole.narrow(dimension, 0, 0)


def assert_like_torch(
    tensors: list[Tensor], placement: Placement, blocks: list[torch.Tensor], cut: dict[str, int]
) -> None:
    source = views(source_of(tensors), tensors)
    for device, block in enumerate(blocks):
        for name, found in views(block, placement.tensors[device]).items():
            expected = by_torch(source[name], cut.get(name), len(blocks), device)
            assert found.shape == expected.shape
            assert torch.equal(found, expected), name


@st.composite
def cut_tables(draw: st.DrawFn) -> tuple[list[Tensor], int, dict[str, int]]:
    kinds = draw(st.lists(st.tuples(st.sampled_from(["U8", "I16", "I64"]), shapes), min_size=1, max_size=6))
    tensors = table(kinds)
    cut = {
        tensor.name: draw(st.integers(0, len(tensor.shape) - 1))
        for tensor in tensors
        if tensor.shape and draw(st.booleans())
    }
    return tensors, draw(st.integers(1, 4)), cut


@given(cut_tables(), st.integers(1, 700))
def test_every_device_gets_what_torch_would_cut_for_it(
    given_table: tuple[list[Tensor], int, dict[str, int]], chunk_size: int
) -> None:
    tensors, devices, cut = given_table
    placement = place(tensors, devices, cut)
    source = source_of(tensors)
    blocks = [torch.zeros(size, dtype=torch.uint8) for size in placement.sizes]
    carry_out(placement.copies, source, blocks)
    assert_like_torch(tensors, placement, blocks, cut)
    blocks = [torch.zeros(size, dtype=torch.uint8) for size in placement.sizes]
    for number, copies in by_chunk(placement.copies, len(source), chunk_size):
        assert copies
        carry_out(copies, source[number * chunk_size :][:chunk_size], blocks, 0)
    assert_like_torch(tensors, placement, blocks, cut)


def test_a_checkpoint_loaded_whole_is_one_run_and_each_chunk_goes_to_its_place_as_it_is() -> None:
    tensors = table([("BF16", (100,)), ("BF16", (3, 5)), ("I64", ()), ("U8", (0, 4)), ("BF16", (700,))])
    placement = place(tensors, 1, {})
    size = tensors[-1].offset + tensors[-1].length
    assert placement.copies == (Copy(0, 0, 0, size),)
    assert placement.sizes == (size,)
    whole = list(by_chunk(placement.copies, size, 256))
    assert [number for number, _copies in whole] == list(range(-(-size // 256)))
    assert all(copies == (Copy(0, 0, number * 256, min(256, size - number * 256)),) for number, copies in whole)


def test_only_chunks_with_a_wanted_tensor_are_needed() -> None:
    tensors = table([("U8", (256,)) for _ in range(8)])
    placement = place(select(tensors, ["t2", "t7"], "it"), 1, {})
    assert [number for number, _copies in by_chunk(placement.copies, 2048, 512)] == [1, 3]
    assert placement.sizes == (512,)


def test_packed_numbers_are_cut_where_bytes_end() -> None:
    tensors = table([("F4", (4, 6))])
    placement = place(tensors, 3, {"t0": 1})
    assert [part[0].shape for part in placement.tensors] == [(4, 2)] * 3
    blocks = [torch.zeros(size, dtype=torch.uint8) for size in placement.sizes]
    carry_out(placement.copies, torch.arange(12, dtype=torch.uint8), blocks)
    assert [block.tolist() for block in blocks] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    with pytest.raises(ConfigError, match="it would split a byte"):
        place(tensors, 2, {"t0": 1})


def test_the_first_pattern_that_matches_gives_the_dimension() -> None:
    tensors = [Tensor(name, "U8", (2, 3), 0, 6) for name in ("a.q", "b.q", "b.o", "[x]")]
    assert cuts(tensors, Shard({"a.*": 1, "*.q": 0, "[x]": -1}), "it") == {"a.q": 1, "b.q": 0, "[x]": 1}


@pytest.mark.parametrize(
    ("shard", "message"),
    [({"nothing.*": 0}, "no tensor of it is called 'nothing.*'"), ({"a": 2}, "can't be cut along dimension 2")],
)
def test_a_shard_that_can_mean_nothing_is_refused(shard: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        cuts([Tensor("a", "U8", (2, 3), 0, 6)], Shard(shard), "it")
    assert caught.value.remedy


def test_all_types_have_a_size() -> None:
    assert {tensor.length for tensor in table([(dtype, (1,)) for dtype in ITEM_SIZES])} == {1, 2, 4, 8}
