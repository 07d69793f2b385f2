"""A model of transformers from tensors that are in memory already, without a copy of them.

    config --empty_model--> model on the meta device (no memory) --bind(tensors)--> its parameters are the tensors,
                                                                    tied ones are one, other buffers are computed again

Unless tied tensors are both there, nothing looks at a value: the tensors may still be filling, and may be read-only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dormouse.errors import EngineError


def empty_model(config: Any, dtype: torch.dtype, attention: str | None = None) -> Any:
    """The model that a config describes, without memory, computing attention as transformers chooses or as told."""
    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **chosen)


def wanted_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """What a model needs: the shapes of its tensors by name, tied ones once."""
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


def bind(model: Any, tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Make the tensors the model's own. Raises EngineError when they are not exactly those that it needs."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = [name for name, tensor in tensors.items() if shapes.get(name) != tuple(tensor.shape)]
    if wrong:
        raise _misfit(model, what, min(wrong))
    missing = set(model.load_state_dict(tensors, strict=False, assign=True).missing_keys)
    # What transformers ties by itself when it loads: one of two that are both there and differ stays as it is.
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if missing:
        raise _misfit(model, what, min(missing))
    _compute_buffers(model)


def _misfit(model: Any, what: str, name: str) -> EngineError:
    return EngineError(
        f"the weights of {what} are not those of {type(model).__name__}: {name}",
        remedy="Import the model again with this version of transformers",
    )


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
