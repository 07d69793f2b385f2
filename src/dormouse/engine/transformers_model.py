"""A model of transformers whose weights are a segment that the node owns.

    config.json --> model without memory --bind--> parameters are views of the arena's segment

Nothing is copied: all workers of the model share the segment, in the machine's memory or in a GPU's, and since it is
unmapped whenever a worker sleeps, a snapshot of the process holds no weights. The parameters' addresses stay what they
were. None of this looks at a value, so the segment may still be filling.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from dormouse.checkpoint.models import read_table
from dormouse.checkpoint.torch_tensors import views
from dormouse.checkpoint.transformers_binding import bind, empty_model
from dormouse.engine.arena import Attached, SegmentArena, Weights
from dormouse.engine.device_arena import DeviceWeights
from dormouse.engine.device_copy import to_device
from dormouse.engine.messages import LoadAdapter
from dormouse.errors import EngineError


def load_model(folder: Path, device: torch.device, attention: str, arena: SegmentArena) -> Any:
    """The model of an imported folder in eval mode, computing attention with the registered function `attention`. Its
    weights have their values once `arena.wait()` has returned. Its buffers are ordinary memory of the device.

    Raises DamagedError for a table that does not fit the segment, EngineError when the weights are not the model's.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = empty_model(config, torch.bfloat16, attention)
    bind(model, segment_tensors(folder, arena.weights, device), folder.name)
    model.requires_grad_(False)
    return model.eval().to(device)


def segment_tensors(folder: Path, weights: Weights | None, device: torch.device) -> dict[str, torch.Tensor]:
    """All tensors of a model as views of its segment, which is memory of the device or of the machine. Raises
    ConfigError for a type that torch does not know."""
    if weights is None:
        raise EngineError(f"the worker was sent no weights for {folder.name}", remedy="Import the model again")
    body = read_table(folder, weights.size)
    if isinstance(weights, DeviceWeights):
        return views(torch.as_tensor(weights, device=device), body.tensors)
    return views(torch.frombuffer(weights.array(), dtype=torch.uint8), body.tensors)


def adapter_tensors(spec: LoadAdapter, segment: Attached, device: torch.device) -> dict[str, torch.Tensor]:
    """The factors of an adapter as views of its segment; on a GPU, of a copy, for which the segment is not needed any
    more. Raises EngineError, ConfigError for a type that torch does not know."""
    if spec.table.size != segment.weights.size:
        raise EngineError(
            f"adapter {spec.name} has {segment.weights.size} bytes where its table says {spec.table.size}",
            remedy="Import it again with --replace",
        )
    whole = torch.frombuffer(segment.weights.array(), dtype=torch.uint8)
    if device.type != "cpu":
        whole = to_device(whole, device)
        segment.close()
    return views(whole, spec.table.tensors)
