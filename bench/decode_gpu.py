"""Tokens per second of the transformers engine on a GPU: captured steps against eager ones.

    python bench/decode_gpu.py [--json FILE] [--layers 32]

A Llama of 8B parameters (fewer layers on request) with random bfloat16 weights is made on the GPU itself; no file, no
worker, no store. For 1, 8 and 64 requests at once, with prompts of 256 tokens: seconds per step, and tokens per second
of all. The bytes that a step of one request can't avoid reading, the weights, give the share of the memory's speed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dormouse.bench_load.weights import SIGMA, WIDTHS
from dormouse.engine.transformers_batch import ATTENTION, Batch, kv_bytes_per_token

PROMPT = 256
STEPS = 64
EAGER_STEPS = 12


def config_of(layers: int) -> LlamaConfig:
    """Of a Llama in the widths of the 8B models."""
    widths = WIDTHS[0]
    return LlamaConfig(
        vocab_size=widths.words,
        hidden_size=widths.hidden,
        intermediate_size=widths.wide,
        num_hidden_layers=layers,
        num_attention_heads=widths.hidden // 128,
        num_key_value_heads=widths.narrow // 128,
        head_dim=128,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


def random_model(layers: int, device: torch.device) -> Any:
    config = config_of(layers)
    config._attn_implementation = ATTENTION
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(default)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, 0, SIGMA)
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.float()
    return model.eval().requires_grad_(False)


def steps_of(batch: Batch, requests: int, steps: int) -> float:
    """Seconds of one step in which each request gets a token."""
    for number in range(requests):
        batch.add(str(number), [(7 * i + number) % 1000 for i in range(PROMPT)])
    answering: set[str] = set()
    while len(answering) < requests:
        batch.step()
        answering |= {each.state.request_id for each in batch._inputs.requests_in_batch if each.has_new_token}
    batch.step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        batch.step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / steps
    batch.reset()
    return seconds


def report(layers: int) -> dict[str, Any]:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    model = random_model(layers, device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    batch = Batch(model, kv_tokens=64 * 1024, sample=lambda _ids, _logits, best: best, pool=torch.cuda.MemPool())
    rows = [row(batch, requests, EAGER_STEPS, weights) for requests in (1, 8, 64)]
    begin = time.perf_counter()
    batch.capture()
    captured = time.perf_counter() - begin
    rows += [row(batch, requests, STEPS, weights) for requests in (1, 8, 64)]
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "weights_gb": round(weights / 1e9, 2),
        "kv_bytes_per_token": kv_bytes_per_token(model),
        "capture_s": round(captured, 2),
        "steps": dict(batch.steps),
        "rows": rows,
    }


def row(batch: Batch, requests: int, steps: int, weights: int) -> dict[str, Any]:
    seconds = steps_of(batch, requests, steps)
    return {
        "graphs": batch.captured,
        "requests": requests,
        "ms_per_step": round(1e3 * seconds, 2),
        "tokens_per_s": round(requests / seconds, 1),
        "weights_gb_per_s": round(weights / seconds / 1e9),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(report(arguments.layers), indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
