"""A model of transformers whose weights are a private mapping of the file they were imported to.

    config.json --> model on the meta device (no memory) --> parameters bound to slices of the mapped file
                                                         --> buffers that are in no file computed again

Nothing is copied on the CPU: the pages belong to the page cache, are shared by all workers of the model, and since
none is ever written a snapshot of the process holds no weights. A GPU gets a copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dormouse.checkpoint.safetensors_file import read_header
from dormouse.errors import EngineError

_DTYPES = {
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
}


def load_model(folder: Path, device: torch.device, attention: str) -> Any:
    """The model of an imported folder in eval mode, computing attention with the registered function `attention`.

    Raises ConfigError for a damaged weights file, EngineError when the weights are not those of the model.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    tensors = map_tensors(folder / "model.safetensors")
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    if wrong := [*(set(missing) - set(model.all_tied_weights_keys)), *unexpected]:
        raise EngineError(
            f"the weights in {folder} are not those of {type(model).__name__}: {sorted(wrong)[0]}",
            remedy="Import the model again with this version of transformers",
        )
    model.tie_weights()
    _compute_buffers(model)
    model.requires_grad_(False)
    return model.eval().to(device)


def map_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file as views of one private mapping of it."""
    header = read_header(path)
    whole = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    try:
        return {
            tensor.name: whole[tensor.offset : tensor.offset + tensor.length]
            .view(_DTYPES[tensor.dtype])
            .view(tensor.shape)
            for tensor in header.values()
        }
    except KeyError as error:
        raise EngineError(
            f"{path} has tensors of type {error}, which this engine can't use", remedy="Import the model again"
        ) from error


def _compute_buffers(model: Any) -> None:
    """Give every buffer that no file holds (rotary frequencies) memory and its values, by the model's own rules.

    What was loaded is marked, so that transformers' initialisation leaves it alone.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_meta:
            tensor._is_hf_initialized = True
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
    model.initialize_weights()
    if empty := [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]:
        raise EngineError(
            f"{type(model).__name__} has parts that its weights file lacks: {empty[0]}", remedy="Import it again"
        )
