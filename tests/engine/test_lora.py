"""Adapters in a batch against the same model with its weights merged, on a random model."""

from __future__ import annotations

import gc
import itertools
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dormouse.engine.lora import Adapter, Adapters
from dormouse.engine.transformers_batch import Batch, marked
from dormouse.errors import EngineError
from tests.engine.test_transformers_batch import TINY, load, tiny_model

MODULES = [
    f"model.layers.{layer}.{module}"
    for layer in range(2)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]
SIZES = {"q_proj": (64, 64), "v_proj": (32, 64), "down_proj": (64, 96)}


def factors(seed: int, rank: int = 8, modules: list[str] = MODULES) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The tensors and scalings of a random adapter that changes much."""
    torch.manual_seed(seed)
    tensors = {}
    for module in modules:
        rows, columns = SIZES[module.rpartition(".")[2]]
        tensors[f"{module}.lora_A"] = (torch.randn(rank, columns) * 0.3).bfloat16()
        tensors[f"{module}.lora_B"] = (torch.randn(rows, rank) * 0.3).bfloat16()
    return tensors, dict.fromkeys(modules, 0.5 + 0.25 * seed)


def merged(folder: Path, tensors: dict[str, torch.Tensor], scalings: dict[str, float]) -> torch.nn.Module:
    """The plain model in float32 with W + scaling * B A."""
    plain, _arena = tiny_model(folder)
    plain.float()
    for module, scaling in scalings.items():
        delta = scaling * tensors[f"{module}.lora_B"].float() @ tensors[f"{module}.lora_A"].float()
        plain.get_submodule(module).weight.data += delta  # type: ignore[operator,union-attr]
    return plain


class Stage:
    """A batch over the mapped model; collects the rows of logits that greedy decoding gives."""

    def __init__(self, folder: Path) -> None:
        _plain, self._arena = tiny_model(folder)
        self.model = load(folder, self._arena)
        self.rows: dict[str, list[torch.Tensor]] = {}
        self.batch = Batch(self.model, kv_tokens=2048, sample=self._sample)

    def _sample(self, ids: list[str], logits: torch.Tensor, best: list[int]) -> list[int]:
        for name, row in zip(ids, logits, strict=True):
            self.rows[name].append(row.clone())
        return best

    def adapter(self, seed: int, **options: int) -> Adapter:
        adapter = self.batch.adapters.fit(*factors(seed, **options))
        self.batch.adapters.bind(adapter)
        return adapter

    def generate(self, requests: dict[str, tuple[list[int], Adapter | None]], count: int) -> dict[str, torch.Tensor]:
        self.rows = {name: [] for name in requests}
        for name, (prompt, adapter) in requests.items():
            self.batch.add(name, prompt, adapter)
        while any(len(found) < count for found in self.rows.values()):
            assert self.batch.step()
        for name in requests:
            self.batch.remove(name)
        return {name: torch.stack(found[:count]) for name, found in self.rows.items()}


def prompt_of(length: int) -> list[int]:
    return [(5 * i + length) % 64 for i in range(length)]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_each_request_of_a_mixed_batch_gets_the_merged_models_logits(stage: Stage, tmp_path: Path) -> None:
    adapters = {None: None} | {seed: stage.adapter(seed) for seed in (1, 2, 3)}
    lengths = (1, 5, 33, 64, 70, 200, 7, 90)
    seeds = itertools.cycle(adapters)
    whose = {str(length): next(seeds) for length in lengths}
    requests = {name: (prompt_of(int(name)), adapters[seed]) for name, seed in whose.items()}
    rows = stage.generate(requests, 4)
    for name, seed in whose.items():
        plain = merged(tmp_path, *(factors(seed) if seed is not None else ({}, {})))
        ids = [*requests[name][0], *(int(row.argmax()) for row in rows[name])]
        with torch.no_grad():
            expected = plain(torch.tensor([ids])).logits[0, len(requests[name][0]) - 1 : -1]
        torch.testing.assert_close(rows[name], expected, atol=0.03, rtol=0.05, msg=lambda text, n=name: f"{n}: {text}")
    base = stage.generate({"5": (prompt_of(5), None)}, 4)["5"]
    assert not torch.allclose(base, rows["5"], atol=0.1), "the adapter changes something"


def test_neighbours_of_other_adapters_do_not_change_a_bit(stage: Stage) -> None:
    adapters = [None, stage.adapter(1), stage.adapter(2, rank=16)]
    lengths = (1, 2, 33, 65, 190, 300, 301)
    requests = {str(n): (prompt_of(n), adapters[n % 3]) for n in lengths}
    together = stage.generate(requests, 4)
    for name, request in requests.items():
        stage.batch.drop_cache()
        assert torch.equal(stage.generate({name: request}, 4)[name], together[name]), name


def test_an_adapter_of_infinite_numbers_spoils_its_own_answers_only(stage: Stage) -> None:
    tensors, scalings = factors(1)
    tensors[f"{MODULES[0]}.lora_A"].fill_(float("nan"))
    bad = stage.batch.adapters.fit(tensors, scalings)
    stage.batch.adapters.bind(bad)
    good = stage.adapter(2)
    company: dict[str, tuple[list[int], Adapter | None]] = {"70": (prompt_of(70), None), "33": (prompt_of(33), good)}
    alone = stage.generate(company, 3)
    stage.batch.drop_cache()
    together = stage.generate({"40": (prompt_of(40), bad)} | company, 3)
    assert bool(together["40"].isnan().all())
    assert all(torch.equal(together[name], alone[name]) for name in company)
    stage.batch.drop_cache()
    again = stage.generate(company, 3)
    assert all(torch.equal(again[name], alone[name]) for name in company), "nothing of it is left in the cache"


def test_prefixes_are_shared_within_an_adapter_and_with_nobody_else(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = stage.adapter(1), stage.adapter(2)
    prompt = prompt_of(100)
    cache = stage.batch._processor.cache
    found: list[int] = []
    search = cache.search_prefix_match
    monkeypatch.setattr(cache, "search_prefix_match", lambda *of: found.append(search(*of)) or found[-1])
    alone = {}
    for name, adapter in (("base", None), ("first", first), ("second", second)):
        alone[name] = stage.generate({name: (prompt, adapter)}, 2)[name]
    assert found == [0, 0, 0], "nothing of another's was taken"
    for name, adapter in (("first", first), ("base", None), ("second", second)):
        assert torch.equal(stage.generate({name: (prompt, adapter)}, 2)[name], alone[name])
    assert found[3:] == [96, 96, 96]
    stage.batch.adapters.unbind(first)
    again = stage.adapter(1)
    assert torch.equal(stage.generate({"again": (prompt, again)}, 2)["again"], alone["first"])
    assert found[6:] == [0], "an adapter that was loaded anew may be another one"


@given(
    one=st.lists(st.integers(0, 2**21 - 1), min_size=1, max_size=6),
    other=st.lists(st.integers(0, 2**21 - 1), min_size=4, max_size=6),
    serials=st.tuples(st.integers(1, 2**40 - 1), st.integers(1, 2**40 - 1)),
)
def test_marked_tokens_tell_tokens_and_adapters_apart(
    one: list[int], other: list[int], serials: tuple[int, int]
) -> None:
    assert (marked(one, serials[0]) == marked(other, serials[0])) == (one == other)
    assert (marked(other, serials[0]) == marked(other, serials[1])) == (serials[0] == serials[1])
    assert all(-(2**31) <= token < 0 for token in marked(other, serials[0])[:4])


def test_without_adapters_the_model_has_no_hooks(stage: Stage) -> None:
    before = stage.generate({"a": (prompt_of(40), None)}, 3)["a"]
    one, two = stage.adapter(1), stage.adapter(2)
    q_proj = stage.model.get_submodule(MODULES[0])
    assert len(q_proj._forward_hooks) == 1
    stage.batch.adapters.unbind(one)
    stage.batch.adapters.unbind(one)
    assert len(q_proj._forward_hooks) == 1
    stage.batch.adapters.unbind(two)
    assert not any(module._forward_hooks for module in stage.model.modules())
    assert torch.equal(stage.generate({"a": (prompt_of(40), None)}, 3)["a"], before)


def test_an_adapter_that_was_unbound_takes_no_memory(stage: Stage) -> None:
    adapter = stage.adapter(1)
    stage.generate({"a": (prompt_of(5), adapter)}, 2)
    gone = weakref.ref(adapter)
    stage.batch.adapters.unbind(adapter)
    del adapter
    gc.collect()
    assert gone() is None


def test_an_adapter_that_does_not_fit_is_refused_by_module_and_shapes(stage: Stage) -> None:
    adapters: Adapters = stage.batch.adapters
    tensors, scalings = factors(1, modules=["model.layers.0.self_attn.q_proj"])
    wrong = {name: tensor.T.contiguous() for name, tensor in tensors.items()}
    with pytest.raises(EngineError, match=r"model\.layers\.0\.self_attn\.q_proj: A \(64, 8\) and B \(8, 64\) where"):
        adapters.fit(wrong, scalings)
    for module, said in (
        ("model.layers.9.self_attn.q_proj", "LlamaForCausalLM does not have"),
        ("model.layers.0.input_layernorm", "LlamaRMSNorm"),
        ("model.embed_tokens", "Embedding"),
        ("lm_head", "no linear layer inside the model"),
    ):
        moved = {f"{module}.{name[-6:]}": tensor for name, tensor in tensors.items()}
        with pytest.raises(EngineError, match=said):
            adapters.fit(moved, {module: 1.0})
    assert not any(module._forward_hooks for module in stage.model.modules())
    assert TINY["hidden_size"] == 64


def test_a_module_that_sees_only_some_tokens_is_an_error_not_a_wrong_answer() -> None:
    class Some(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)
            self.device = torch.device("cpu")

        def get_output_embeddings(self) -> None:
            return None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.inner(x[:1])
            return result

    model = Some()
    adapters = Adapters(model)
    adapter = adapters.fit({"inner.lora_A": torch.zeros(1, 4), "inner.lora_B": torch.zeros(4, 1)}, {"inner": 1.0})
    adapters.bind(adapter)
    adapters.route([(None, 2), (adapter, 3)])
    with pytest.raises(EngineError, match="1 rows for 5 tokens"):
        model(torch.zeros(5, 4))
