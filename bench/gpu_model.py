"""Models for bench/snapshot_gpu.py, made from nothing: random bfloat16 weights in the shapes of a Llama, a tokenizer
with a word for each token (so that any answer can be read), and the configuration that goes with them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from dormouse.bench_load.weights import WIDTHS, Widths, lay_out, make

SIZES = {"8b": 16_060_000_000, "3b": 6_400_000_000, "1b": 2_500_000_000, "tiny": 1_000_000}
"""Bytes of weights. The largest is Llama 3.1 8B in every shape."""

_HEAD_DIMS = {4096: 128, 2048: 128, 512: 64, 128: 32}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Made:
    """A folder as model hubs give it."""

    folder: Path
    plain_bytes: int
    layers: int
    kv_bytes_per_token: int


def make_model(folder: Path, size: str, threads: int) -> Made:
    """Write one; a folder that has one already is taken as it is."""
    parts = lay_out(SIZES[size], 8)
    names = [name for part in parts for name in part]
    layers = 1 + max(int(match[1]) for name in names if (match := _LAYER.match(name)))
    shapes = {name: shape for part in parts for name, shape in part.items()}
    words, hidden = shapes["lm_head.weight"]
    widths = next(each for each in WIDTHS if (each.hidden, each.words) == (hidden, words))
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder, parts, threads)
        _write_tokenizer(folder, words)
        (folder / "config.json").write_text(json.dumps(_config(widths, layers), indent=1))  # last: all is there now
    plain = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Made(folder, plain, layers, 2 * 2 * layers * widths.narrow)


def _config(widths: Widths, layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": widths.hidden,
        "intermediate_size": widths.wide,
        "num_hidden_layers": layers,
        "num_attention_heads": widths.hidden // _HEAD_DIMS[widths.hidden],
        "num_key_value_heads": max(1, widths.narrow // _HEAD_DIMS[widths.hidden]),
        "head_dim": _HEAD_DIMS[widths.hidden],
        "vocab_size": widths.words,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _write_tokenizer(folder: Path, words: int) -> None:
    vocabulary = {f"w{number}": number for number in range(words)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
