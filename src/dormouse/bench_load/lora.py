"""A LoRA adapter into a model that runs: loaded, fitted and bound, from the DRAM tier, the page cache and the disk.

The model is a Llama with random weights that has answered once; the adapter has factors for every linear module. A row
is measured like any other; its clock stops when the adapter's hooks are in place and all its bytes are there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dormouse.bench_load.method import Job, Method, MissingError, Tensors, kept
from dormouse.bench_load.ours import before_load, filled_tier, load_from, prepare_ours, prepare_tier
from dormouse.bench_load.weights import WIDTHS, Shapes, Widths, linear_layers, read_reference

_LEAST_RANK, _LAYERS = 128, 32
_A, _B = ".lora_A", ".lora_B"


def shapes(wanted: int) -> Shapes:
    """The factors of an adapter of about `wanted` bytes."""
    widths = next((each for each in WIDTHS if _LAYERS * _row_bytes(each) * _LEAST_RANK <= wanted), WIDTHS[-1])
    rank = max(_LEAST_RANK, round(wanted / (_LAYERS * _row_bytes(widths))))
    return {
        f"model.layers.{number}.{name}{part}": shape
        for number in range(_LAYERS)
        for name, (rows, columns) in linear_layers(widths).items()
        for part, shape in ((_A, (rank, columns)), (_B, (rows, rank)))
    }


def _row_bytes(widths: Widths) -> int:
    return sum(2 * sum(shape) for shape in linear_layers(widths).values())


def _prepare(device: str) -> str:
    try:
        import transformers

        from dormouse.engine.lora import Adapters
    except ImportError as error:
        raise MissingError(f"adapters need a package that is missing: {error.name}") from error
    _ = transformers.LlamaForCausalLM, Adapters
    return prepare_ours(device)


def _prepare_with_tier(device: str) -> str:
    prepare_tier(device)
    return _prepare(device)


def _running(job: Job) -> Any:
    """The adapters of a model on the device that has computed something."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dormouse.engine.lora import Adapters

    hidden = read_reference(Path(job.reference))[f"model.layers.0.self_attn.q_proj{_A}"].shape[1]
    widths = next(each for each in WIDTHS if each.hidden == hidden)
    head = 128 if widths.hidden >= 4096 else 64 if widths.hidden >= 512 else 32
    config = LlamaConfig(
        vocab_size=512,  # the adapter has nothing for the vocabulary
        hidden_size=widths.hidden,
        intermediate_size=widths.wide,
        num_hidden_layers=_LAYERS,
        num_attention_heads=widths.hidden // head,
        num_key_value_heads=widths.narrow // head,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(job.device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    with torch.inference_mode():
        model(torch.ones((1, 4), dtype=torch.long, device=job.device))
    return Adapters(model)


def _before(job: Job) -> tuple[Any, Any]:
    before_load(job)
    return _running(job), None


def _before_plain(job: Job) -> tuple[Any, Any]:
    """For a row that reads files: no model is imported for it, and no kernel of ours is used."""
    return _running(job), None


def _before_with_tier(job: Job) -> tuple[Any, Any]:
    return _running(job), filled_tier(job)


def _load(job: Job, prepared: tuple[Any, Any]) -> Tensors:
    adapters, tier = prepared
    return _bind(adapters, load_from(job, tier))


def _load_safetensors(job: Job, prepared: tuple[Any, Any]) -> Tensors:
    from safetensors.torch import load_file

    return _bind(prepared[0], load_file(job.files[0], device=job.device))


def _bind(adapters: Any, tensors: Tensors) -> Tensors:
    scalings = {name.removesuffix(_A): 1.0 for name in tensors if name.endswith(_A)}
    adapter = adapters.fit(tensors, scalings)
    adapters.bind(adapter)
    kept.append(adapter)
    return tensors


_HERE = __name__

LORA_TIER = Method(
    f"{_HERE}:LORA_TIER",
    "LoRA, DRAM tier",
    "dormouse.load from the tier, then bound to a running model",
    "coded",
    _prepare_with_tier,
    _load,
    _before_with_tier,
    conditions=("tier",),
    ours=True,
)
LORA = Method(
    f"{_HERE}:LORA",
    "LoRA, dormouse.load",
    "imported adapter, coded, then bound to a running model",
    "coded",
    _prepare,
    _load,
    _before,
    ours=True,
)
LORA_SAFETENSORS = Method(
    f"{_HERE}:LORA_SAFETENSORS",
    "LoRA, safetensors",
    "load_file, then bound to the same model in the same way",
    "plain",
    _prepare,
    _load_safetensors,
    _before_plain,
)
LORA_METHODS = (LORA_TIER, LORA, LORA_SAFETENSORS)
