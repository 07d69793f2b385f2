"""A model of transformers whose weights are a segment that the node owns.

    config.json --> model on the meta device (no memory) --> parameters bound to views of the arena's segment
                                                         --> buffers that no segment holds computed again

Nothing is copied on the CPU: all workers of the model share the segment, and since it is unmapped whenever a worker
sleeps, a snapshot of the process holds no weights. The parameters' addresses stay what they were. None of this looks
at a value, so the segment may still be filling. A GPU gets a copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dormouse.checkpoint.models import read_table
from dormouse.checkpoint.tensors import CheckpointBody
from dormouse.engine.arena import Arena, Attached, Weights
from dormouse.engine.device_copy import to_device
from dormouse.engine.messages import LoadAdapter
from dormouse.errors import EngineError

_DTYPES = {
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
}


def load_model(folder: Path, device: torch.device, attention: str, arena: Arena) -> Any:
    """The model of an imported folder in eval mode, computing attention with the registered function `attention`. On
    the CPU its weights have their values once `arena.wait()` has returned; a GPU has its copy already.

    Raises DamagedError for a table that does not fit the segment, EngineError when the weights are not the model's.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    tensors = segment_tensors(folder, arena.weights)
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    if wrong := [*(set(missing) - set(model.all_tied_weights_keys)), *unexpected]:
        raise EngineError(
            f"the weights of {folder.name} are not those of {type(model).__name__}: {sorted(wrong)[0]}",
            remedy="Import the model again with this version of transformers",
        )
    model.tie_weights()
    _compute_buffers(model)
    model.requires_grad_(False)
    if device.type != "cpu":
        arena.wait()
    return model.eval().to(device)


def segment_tensors(folder: Path, weights: Weights | None) -> dict[str, torch.Tensor]:
    """All tensors of a model as views of its segment."""
    if weights is None:
        raise EngineError(f"the worker was sent no weights for {folder.name}", remedy="Import the model again")
    whole = torch.frombuffer(weights.array(), dtype=torch.uint8)
    return tensor_views(read_table(folder, weights.size), whole, folder.name)


def tensor_views(body: CheckpointBody, whole: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a table as views of the bytes of its segment. Raises EngineError."""
    try:
        return {
            tensor.name: whole[tensor.offset : tensor.offset + tensor.length]
            .view(_DTYPES[tensor.dtype])
            .view(tensor.shape)
            for tensor in body.tensors
        }
    except KeyError as error:
        raise EngineError(
            f"{name} has tensors of type {error}, which this engine can't use", remedy="Import the model again"
        ) from error


def adapter_tensors(spec: LoadAdapter, segment: Attached, device: torch.device) -> dict[str, torch.Tensor]:
    """The factors of an adapter as views of its segment; on a GPU, of a copy, for which the segment is not needed any
    more. Raises EngineError."""
    if spec.table.size != segment.weights.size:
        raise EngineError(
            f"adapter {spec.name} has {segment.weights.size} bytes where its table says {spec.table.size}",
            remedy="Import it again with --replace",
        )
    whole = torch.frombuffer(segment.weights.array(), dtype=torch.uint8)
    if device.type != "cpu":
        whole = to_device(whole, device)
        segment.close()
    return tensor_views(spec.table, whole, spec.name)


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
            f"{type(model).__name__} has parts that its weights lack: {empty[0]}", remedy="Import it again"
        )
