"""Attention and weights of the transformers engine against plain computations, on random models."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.generation.continuous_batching import model_runner

from dormouse.checkpoint.tensors import NewTensor, encode_table, lay_out
from dormouse.checkpoint.transformers_source import tensors_of
from dormouse.engine import transformers_batch
from dormouse.engine.arena import BASE, Arena
from dormouse.engine.transformers_model import load_model
from dormouse.errors import DamagedError, EngineError
from dormouse.transfer.segment import Segment

TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def tiny_model(folder: Path, *, window: int | None = None, tied: bool = True) -> tuple[torch.nn.Module, Arena]:
    """A random model, saved as an import saves it, and its weights as a worker gets them."""
    torch.manual_seed(0)
    if window is None:
        model: torch.nn.Module = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=tied))
    else:
        model = MistralForCausalLM(MistralConfig(**TINY, sliding_window=window, tie_word_embeddings=tied))
    for parameter in model.parameters():  # not model.bfloat16(): the rotary frequencies stay float32
        parameter.data = parameter.data.bfloat16()
    model.eval().config.save_pretrained(folder)
    return model, weights_of(folder, tensors_of(model))


_bases = itertools.count(BASE + (1 << 40), 1 << 30)


def weights_of(folder: Path, tensors: list[NewTensor]) -> Arena:
    """A table in the folder, and an arena of its own with the segment mapped."""
    body = lay_out(tensors)
    (folder / "weights.json").write_bytes(encode_table(body))
    segment = Segment.create("test", body.size)
    for placed, tensor in zip(body.tensors, tensors, strict=True):
        segment.write(placed.offset, b"".join(tensor.chunks()))
    segment.seal()
    arena = Arena(next(_bases))
    arena.map([segment.handle(None)])
    segment.close()
    return arena


def load(folder: Path, arena: Arena) -> Any:
    return load_model(folder, torch.device("cpu"), transformers_batch.ATTENTION, arena)


def generate(model: torch.nn.Module, prompts: dict[str, list[int]], count: int) -> dict[str, list[torch.Tensor]]:
    """The logits of `count` greedy tokens of each prompt, all run at once."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in prompts}

    def sample(ids: list[str], logits: torch.Tensor, best: list[int]) -> list[int]:
        for name, row in zip(ids, logits, strict=True):
            rows[name].append(row.clone())
        return best

    batch = transformers_batch.Batch(model, kv_tokens=2048, sample=sample)
    for name, prompt in prompts.items():
        batch.add(name, prompt)
    while any(len(found) < count for found in rows.values()):
        assert batch.step()
    return {name: found[:count] for name, found in rows.items()}


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("tied", [True, False])
def test_batched_logits_are_those_of_the_plain_model(tmp_path: Path, window: int | None, tied: bool) -> None:
    plain, weights = tiny_model(tmp_path, window=window, tied=tied)
    mapped = load(tmp_path, weights)
    prompts = {str(n): [(7 * i + n) % 64 for i in range(n)] for n in (1, 5, 64, 70, 300, 200)}
    for name, rows in generate(mapped, prompts, 3).items():
        ids = [*prompts[name], *(int(row.argmax()) for row in rows)]
        with torch.no_grad():
            expected = plain(torch.tensor([ids])).logits[0, len(prompts[name]) - 1 : -1].float()
        torch.testing.assert_close(torch.stack(rows), expected, atol=0.02, rtol=0.05)


def test_a_request_gets_the_same_bits_alone_and_in_company(tmp_path: Path) -> None:
    _plain, weights = tiny_model(tmp_path)
    model = load(tmp_path, weights)
    prompts = {str(n): [(5 * i + n) % 64 for i in range(n)] for n in (1, 2, 33, 65, 190, 300, 301)}
    together = generate(model, prompts, 4)  # 892 tokens: some prompts are cut in pieces
    for name, prompt in prompts.items():
        alone = generate(model, {name: prompt}, 4)[name]
        assert all(torch.equal(a, b) for a, b in zip(alone, together[name], strict=True)), name


@settings(max_examples=25, deadline=None)
@given(
    keys=st.integers(1, 200), queries=st.integers(1, 200), window=st.none() | st.integers(1, 80), seed=st.integers(0, 9)
)
def test_attention_in_blocks_is_attention(keys: int, queries: int, window: int | None, seed: int) -> None:
    queries = min(queries, keys)
    torch.manual_seed(seed)
    query, key, value = torch.randn(1, 4, queries, 8), torch.randn(1, 2, keys, 8), torch.randn(1, 2, keys, 8)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
    own = torch.arange(keys - queries, keys)[:, None]
    seen = torch.arange(keys)[None, :]
    hidden = (seen > own) | (seen <= own - (window or keys))
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(transformers_batch._prefill(query, key, value, window, None), expected)


def test_weights_lie_in_the_mapping_and_buffers_are_computed(tmp_path: Path) -> None:
    plain, weights = tiny_model(tmp_path)
    model = load(tmp_path, weights)
    assert weights.weights is not None
    begin, end = weights.weights.address, weights.weights.address + weights.weights.size
    assert all(begin <= parameter.data_ptr() < end for parameter in model.parameters())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)  # type: ignore[union-attr]


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    model, weights = tiny_model(tmp_path)
    model.config.num_hidden_layers = 3
    model.config.save_pretrained(tmp_path)
    with pytest.raises(EngineError, match=r"not those of LlamaForCausalLM: model\.layers\.2"):
        load(tmp_path, weights)


def test_a_table_that_does_not_fit_the_segment_is_refused(tmp_path: Path) -> None:
    _plain, weights = tiny_model(tmp_path)
    other = lay_out([NewTensor("a", "U8", (5,), lambda: iter([b"12345"]))])
    (tmp_path / "weights.json").write_bytes(encode_table(other))
    with pytest.raises(DamagedError, match="describes 5 bytes of weights where there are"):
        load(tmp_path, weights)
    with pytest.raises(EngineError, match="was sent no weights"):
        load(tmp_path, Arena())


def test_attention_that_is_not_supported_is_refused(tmp_path: Path) -> None:
    _plain, weights = tiny_model(tmp_path)
    model = load(tmp_path, weights)
    model.config.attn_logit_softcapping = 30.0
    with pytest.raises(EngineError, match="soft-capped attention"):
        transformers_batch.Batch(model, kv_tokens=64, sample=lambda ids, logits, best: [])


def test_other_internals_of_transformers_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers_batch.check_internals()
    monkeypatch.setattr(model_runner.ModelRunner, "_sample", lambda self: None)
    with pytest.raises(EngineError, match=r"has another ModelRunner\._sample") as caught:
        transformers_batch.check_internals()
    assert "pip install" in caught.value.remedy


def test_nothing_heavy_is_imported_with_the_worker() -> None:
    code = (
        "import sys, dormouse.engine.worker; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
