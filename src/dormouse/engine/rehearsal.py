"""Runs a few tokens through a tiny random model, so that all that any model needs once has been done before one is
there: model classes imported, lazily built tables built, the libraries' first-call work over.

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


def rehearse() -> None:
    """Import the common families and generate. Raises what the engine would raise with any model."""
    for family in _FAMILIES:
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    # In a thread that ends, like the engine's own will: what libraries keep per thread ends with it.
    with ThreadPoolExecutor(1, thread_name_prefix="rehearsal") as once:
        once.submit(_generate).result()


def _generate() -> None:
    made = 0

    def sample(ids: list[str], logits: torch.Tensor) -> list[int]:
        nonlocal made
        made += 1
        return [int(row.argmax()) for row in logits]

    batch = Batch(_tiny_model(), kv_tokens=4 * PAGE_TOKENS, sample=sample)
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
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        attn_implementation=ATTENTION,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
