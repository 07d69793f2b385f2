"""Runs a few tokens through a tiny random model, so that all that any model needs once has been done before one is
there: model classes imported, lazily built tables built, the libraries' first-call work over. On a GPU also: CUDA and
its libraries initialised, a graph captured, and our kernels compiled for heads as common models have them.

It leaves nothing of the tiny model behind, and binds the engine to no architecture: models of other families work as
well, only their first load does a little more.
"""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dormouse.engine.transformers_batch import ATTENTION, PAGE_TOKENS, Batch

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_PROMPT_TOKENS = 5
_NEW_TOKENS = 3


def rehearse(device: torch.device) -> None:
    """Import the common families and generate. Raises what the engine would raise with any model."""
    for family in _FAMILIES:
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    # In a thread that ends, like the engine's own will: what libraries keep per thread ends with it.
    with ThreadPoolExecutor(1, thread_name_prefix="rehearsal") as once:
        once.submit(_generate, device).result()


def _generate(device: torch.device) -> None:
    made = 0

    def sample(_ids: list[str], _logits: torch.Tensor, best: list[int]) -> list[int]:
        nonlocal made
        made += 1
        return best

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    pool = torch.cuda.MemPool() if on_gpu else None
    batch = Batch(_tiny_model().to(device), kv_tokens=4 * PAGE_TOKENS, sample=sample, pool=pool)
    if on_gpu:
        batch.capture()
    batch.add("rehearsal", list(range(_PROMPT_TOKENS)))
    while made < _NEW_TOKENS:
        batch.step()
    batch.remove("rehearsal")


def _tiny_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=128,
        attn_implementation=ATTENTION,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
