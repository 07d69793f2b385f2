"""The decode kernel against torch's attention: in Triton's interpreter, and compiled where there is a GPU."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

triton = pytest.importorskip("triton")

from dormouse.engine import decode_attention as kernel  # noqa: E402

PAGE = 4
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:  # each takes milliseconds there
        monkeypatch.setattr(kernel, "_PROGRAMS", 12)


def paged(
    lengths: list[int], *, heads: int, kv_heads: int, size: int, page: int, layers: int, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Random queries, and keys and values in pages that lie in no order, with numbers that are none in between."""
    torch.manual_seed(sum(lengths) + size)
    most = max(-(-max(lengths) // page), 1)
    blocks = torch.randperm(len(lengths) * most)
    stride = page * layers * 2
    cache = torch.full((blocks.numel() * stride, kv_heads, size), torch.nan, dtype=dtype, device=device)
    tables = blocks.reshape(len(lengths), most).to(torch.int32)
    keys, values = cache[2 * page :], cache[3 * page :]  # the second layer's, as transformers cuts them
    plain = []
    for row, length in enumerate(lengths):
        k, v = (torch.randn(length, kv_heads, size, dtype=dtype, device=device) for _ in range(2))
        places = [int(tables[row, t // page]) * stride + t % page for t in range(length)]
        keys[places], values[places] = k, v
        plain.append((k, v))
    query = torch.randn(len(lengths), heads, size, dtype=dtype, device=device)
    return {
        "query": query,
        "keys": keys,
        "values": values,
        "tables": tables.to(device),
        "lengths": torch.tensor(lengths, device=device),
        "stride": stride,
        "plain": plain,
    }


def expected(query: torch.Tensor, plain: list[tuple[torch.Tensor, torch.Tensor]], scaling: float | None) -> Any:
    rows = []
    for q, cached in zip(query.float(), plain, strict=True):
        if not len(cached[0]):
            rows.append(torch.zeros_like(q))
            continue
        k, v = (x.float().repeat_interleave(q.shape[0] // x.shape[1], 1).transpose(0, 1) for x in cached)
        rows.append(scaled_dot_product_attention(q[:, None], k, v, scale=scaling)[:, 0])
    return torch.stack(rows)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "size", "scaling", "dtype"),
    [
        ([1], 4, 2, 16, None, torch.float32),
        ([0, 3, 70], 4, 2, 8, None, torch.float32),
        ([150, 0, 64, 65], 6, 2, 12, 0.3, torch.float32),
        ([130, 7], 4, 1, 16, None, torch.bfloat16),
    ],
)
def test_the_kernel_computes_attention(
    lengths: list[int], heads: int, kv_heads: int, size: int, scaling: float | None, dtype: torch.dtype
) -> None:
    made = paged(lengths, heads=heads, kv_heads=kv_heads, size=size, page=PAGE, layers=2, device="cpu", dtype=dtype)
    plain = made.pop("plain")
    found = kernel.decode_attention(**made, page=PAGE, scaling=scaling)
    exact = dtype == torch.float32
    torch.testing.assert_close(
        found.float(),
        expected(made["query"], plain, scaling),
        atol=1e-5 if exact else 2e-2,
        rtol=1e-5 if exact else 2e-2,
    )


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_a_row_does_not_depend_on_its_neighbours_or_on_where_its_pages_lie() -> None:
    lengths = [70, 9, 0]
    made = paged(lengths, heads=2, kv_heads=1, size=16, page=PAGE, layers=1 + 1, device="cpu", dtype=torch.float32)
    plain = made.pop("plain")
    together = kernel.decode_attention(**made, page=PAGE, scaling=None)
    other = paged(lengths[::-1], heads=2, kv_heads=1, size=16, page=PAGE, layers=2, device="cpu", dtype=torch.float32)
    other.pop("plain")
    other["query"] = made["query"].flip(0)
    for row, (k, v) in enumerate(reversed(plain)):
        places = [int(other["tables"][row, t // PAGE]) * other["stride"] + t % PAGE for t in range(len(k))]
        other["keys"][places], other["values"][places] = k, v
    assert torch.equal(kernel.decode_attention(**other, page=PAGE, scaling=None).flip(0), together)


def test_every_multiprocessor_has_something_to_do_and_no_split_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_PROGRAMS", 256)
    for rows, kv_heads in itertools.product((1, 2, 4, 8, 16, 32, 64), (1, 2, 8, 32)):
        splits = kernel.split_count(rows, kv_heads)
        assert 1 <= splits <= kernel.MAX_SPLITS
        assert splits in (1, kernel.MAX_SPLITS) or rows * kv_heads * splits >= 128


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from dormouse.engine import decode_attention as kernels

def ptx(function, types, constants):
    types = {**types, **dict.fromkeys(constants, "constexpr")}
    names = list(types)
    assert names == function.arg_names, function.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    aligned |= {(names.index(n),): [["tt.divisibility", 16]] for n in ("key_row", "key_head") if n in names}
    source = ASTSource(function, types, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]

for group, size in ((4, 128), (3, 64), (2, 80)):
    padded = max(16, 1 << (size - 1).bit_length())
    pointers = dict.fromkeys(("query", "keys", "values"), "*bf16") | {"tables": "*i32", "lengths": "*i64"}
    pointers |= dict.fromkeys(("sums", "peaks", "totals"), "*fp32") | {"scaling": "fp32"}
    numbers = dict.fromkeys(("query_row", "query_head", "key_row", "key_head", "table_row", "stride"), "i32")
    constants = {"PAGE": 32, "GROUP": group, "GROUP_PADDED": 16, "SIZE": size, "SIZE_PADDED": padded, "BLOCK": 64}
    code = ptx(kernels._attend, pointers | numbers, constants | {"UPCAST": False})
    print("mma" in code, code.count("ld.global.v4") + code.count("ld.global.L1::evict_normal.v4") + code.count(
        "cp.async.cg.shared.global"))
    types = dict.fromkeys(("sums", "peaks", "totals"), "*fp32") | {"output": "*bf16", "splits": "i32"}
    ptx(kernels._join, types, {"SIZE": size, "SIZE_PADDED": padded, "SPLITS": kernels.MAX_SPLITS})
"""


def test_the_kernels_compile_for_a_gpu() -> None:
    """The interpreter accepts more than the compiler does. Products go to tensor cores, and keys come in 16 bytes."""
    environ = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environ, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        products, wide = line.split()
        assert products == "True" and int(wide) > 0, done.stdout


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("lengths", [[1], [4000], [33, 0, 1000, 64], [700] * 40])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(32, 8, 128), (9, 3, 64), (4, 2, 8)])
def test_the_compiled_kernel_computes_attention(lengths: list[int], heads: int, kv_heads: int, size: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    made = paged(
        lengths, heads=heads, kv_heads=kv_heads, size=size, page=32, layers=2, device="cuda:0", dtype=torch.bfloat16
    )
    plain = made.pop("plain")
    found = kernel.decode_attention(**made, page=32, scaling=None).float()
    torch.testing.assert_close(found, expected(made["query"], plain, None), atol=2e-2, rtol=2e-2)
