"""Bytes as tensors of torch: its types by the names they have in files, and the devices that can be loaded to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import torch

from dormouse.checkpoint.tensors import Tensor
from dormouse.errors import ConfigError, HostError

_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
    "C64": "complex64",
    "BOOL": "bool",
    **{
        f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
    },
}
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, attribute) for name, attribute in _TYPES.items() if hasattr(torch, attribute)
}
"""What this torch knows."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WIDE_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What a cast applies to. Narrower floats are packed by whoever made them, and their scales stand elsewhere."""


def typed(data: torch.Tensor, tensor: Tensor) -> torch.Tensor:
    """The bytes of a tensor (uint8, one dimension) as what they are, without a copy unless its type needs another
    alignment. Raises ConfigError for what torch has no type for."""
    dtype, shape = torch_type(tensor)
    if not data.numel():
        return torch.empty(shape, dtype=dtype, device=data.device)
    if data.data_ptr() % dtype.itemsize or data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(shape)


def views(block: torch.Tensor, tensors: Iterable[Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that lie in one block of memory. There may be thousands, so each is one call of torch where it can be."""
    blocks: dict[torch.dtype, torch.Tensor] = {}
    found = {}
    for tensor in tensors:
        dtype, shape = torch_type(tensor)
        size = dtype.itemsize
        if not tensor.length or tensor.offset % size or math.prod(shape) * size != tensor.length:
            found[tensor.name] = typed(block[tensor.offset : tensor.offset + tensor.length], tensor)
            continue
        if dtype not in blocks:
            blocks[dtype] = _typed_block(block, dtype)
        whole = blocks[dtype]
        found[tensor.name] = whole.as_strided(shape, _strides(shape), whole.storage_offset() + tensor.offset // size)
    return found


def _typed_block(block: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As many whole items as there are."""
    return block[: len(block) // dtype.itemsize * dtype.itemsize].view(dtype)


@lru_cache(maxsize=1024)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor without room between its items."""
    return tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))


def torch_type(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    """What torch calls a tensor's type and shape; it counts pairs of 4-bit floats where files count the floats. Raises
    ConfigError for what it does not know."""
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise ConfigError(
            f"torch {torch.__version__} has no type for tensor {tensor.name}, which is {tensor.dtype}",
            remedy="Use a newer torch, or convert the file",
        )
    if tensor.dtype != "F4":
        return dtype, tensor.shape
    if not tensor.shape or tensor.shape[-1] % 2:
        raise ConfigError(
            f"tensor {tensor.name} of type F4 has the shape {list(tensor.shape)}, and torch packs its numbers in pairs",
            remedy="Pad its last dimension to an even size",
        )
    return dtype, (*tensor.shape[:-1], tensor.shape[-1] // 2)


def find_device(device: str | int | torch.device) -> torch.device:
    """The CPU or one GPU; a number means a GPU's. Raises ConfigError for others, HostError when there is none."""
    try:
        found = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    except RuntimeError as error:
        raise ConfigError(f"there is no device {device!r}", remedy="Use cpu, cuda or cuda:N") from error
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type != "cuda":
        raise ConfigError(f"nothing can be loaded to {device!r}", remedy="Use cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise HostError(f"torch sees no GPU, and {device!r} was asked for", remedy="Run `dormouse doctor`, or use cpu")
    index = torch.cuda.current_device() if found.index is None else found.index
    if index >= torch.cuda.device_count():
        raise ConfigError(f"there is no device {device!r}", remedy=f"There are {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)
