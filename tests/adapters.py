"""LoRA adapters as PEFT saves them, for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK = 8
ALPHA = 16


def factors(
    modules: Mapping[str, tuple[int, int]], *, seed: int = 0, rank: int = RANK, size: float = 0.1
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random A and B of modules given by their weights' shapes (out, in)."""
    torch.manual_seed(seed)
    return {
        name: (torch.randn(rank, columns) * size, torch.randn(rows, rank) * size)
        for name, (rows, columns) in modules.items()
    }


def save_peft(folder: Path, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], **config: Any) -> Path:
    """The folder that PEFT's save_pretrained writes; `config` replaces fields of its adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = sorted({name.rpartition(".")[2] for name in pairs})
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "someone/Tiny",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "target_modules": targets,
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "inference_mode": True,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    tensors = {}
    for name, pair in pairs.items():
        for letter, tensor in zip("AB", pair, strict=True):
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = tensor.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
