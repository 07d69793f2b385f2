"""Steps that are captured and replayed, against eager ones: which batches they take, what they read, how they are
padded. On the CPU a graph is a function that computes again into the same tensors."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("triton")

from dormouse.engine import decode_attention, decode_graphs, transformers_batch
from dormouse.engine.decode_graphs import Result, nothing_collected

from .test_lora import factors
from .test_transformers_batch import TINY, load, tiny_model

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

SIZES = (2, 4)
PROMPTS = {str(n): [(7 * i + n) % 64 for i in range(n)] for n in (5, 31, 70)}


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_attention, "_PROGRAMS", 8)


def recorded(compute: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
    result = compute()

    def replay() -> None:
        for kept, new in zip(result, compute(), strict=True):
            kept.copy_(new)

    return replay, result


class Run:
    """A batch whose logits are kept."""

    def __init__(self, model: Any, *, graphs: bool) -> None:
        self.rows: dict[str, list[torch.Tensor]] = {}
        self.batch = transformers_batch.Batch(model, kv_tokens=1024, sample=self._sample)
        if graphs:
            self.batch.capture(recorded, SIZES)

    def _sample(self, ids: list[str], logits: torch.Tensor, best: list[int]) -> list[int]:
        for name, row, likely in zip(ids, logits, best, strict=True):
            assert int(row.argmax()) == likely
            self.rows.setdefault(name, []).append(row.clone())
        return best

    def answer(self, counts: dict[str, int], prompts: dict[str, list[int]] = PROMPTS) -> dict[str, list[int]]:
        """So many tokens of each prompt; those that have theirs leave the batch."""
        self.rows = {}
        for name in counts:
            self.batch.add(name, prompts[name])
        left = dict(counts)
        while left:
            assert self.batch.step()
            for name in [name for name, count in left.items() if len(self.rows.get(name, ())) == count]:
                self.batch.remove(name)
                del left[name]
        return {name: [int(row.argmax()) for row in rows] for name, rows in self.rows.items()}


def assert_same(eager: Run, replayed: Run, counts: dict[str, int]) -> None:
    assert replayed.answer(counts) == eager.answer(counts)
    for name in counts:
        torch.testing.assert_close(
            torch.stack(replayed.rows[name]), torch.stack(eager.rows[name]), atol=0.02, rtol=0.05
        )


@pytest.mark.parametrize("window", [None, 40])
def test_replayed_steps_give_the_tokens_of_eager_ones(tmp_path: Path, window: int | None) -> None:
    """Alone and padded, in company that leaves, over the end of a page, and past a window."""
    _plain, weights = tiny_model(tmp_path, window=window)
    model = load(tmp_path, weights)
    eager, replayed = Run(model, graphs=False), Run(model, graphs=True)
    for counts in ({"5": 4}, {"31": 6, "5": 3, "70": 4}, {"70": 3}):
        assert_same(eager, replayed, counts)
    assert replayed.batch.steps["replayed"] >= 3 + 5 + 2 and replayed.batch.steps["eager"] <= 4
    assert eager.batch.steps["replayed"] == 0


def test_what_was_forgotten_and_spoilt_does_not_matter(tmp_path: Path) -> None:
    """A sleep: the bookkeeping is reset, scratch has any content afterwards."""
    _plain, weights = tiny_model(tmp_path)
    run = Run(load(tmp_path, weights), graphs=True)
    before = run.answer({"31": 4, "70": 4})
    run.batch.reset()
    run.batch._cache.cache_tensor.view(torch.bfloat16).fill_(torch.nan)
    assert run.batch._graphs is not None
    for _replay, result in run.batch._graphs._captured.values():
        result[0].fill_(torch.nan)
    assert run.answer({"31": 4, "70": 4}) == before


def test_batches_that_no_graph_fits_are_computed_eagerly(tmp_path: Path) -> None:
    _plain, weights = tiny_model(tmp_path)
    model = load(tmp_path, weights)
    run = Run(model, graphs=True)
    prompts = {f"p{i}": [i + 1, 2, 3] for i in range(5)}
    run.answer(dict.fromkeys(prompts, 2), prompts)
    assert run.batch.steps["replayed"] == 0  # five requests, four rows
    adapter = run.batch.adapters.fit(*factors(1))
    run.batch.adapters.bind(adapter)
    run.batch.add("of an adapter", [1, 2, 3], adapter)
    for _ in range(3):
        run.batch.step()
    assert run.batch.steps["replayed"] == 0 and run.batch.steps["adapter"] == 3
    run.batch.remove("of an adapter")
    run.answer({"5": 3})
    assert run.batch.steps["replayed"] == 2  # an adapter that is bound and not asked for is in nobody's way


def test_requests_that_come_while_others_decode(tmp_path: Path) -> None:
    _plain, weights = tiny_model(tmp_path)
    model = load(tmp_path, weights)
    found = []
    for graphs in (False, True):
        run = Run(model, graphs=graphs)
        run.batch.add("70", PROMPTS["70"])
        for _ in range(3):
            run.batch.step()
        run.batch.add("5", PROMPTS["5"])
        for _ in range(4):
            run.batch.step()
        found.append({name: [int(row.argmax()) for row in rows] for name, rows in run.rows.items()})
    assert found[0] == found[1] and {name: len(made) for name, made in found[0].items()} == {"70": 7, "5": 4}


def test_warming_up_leaves_nothing_behind(tmp_path: Path) -> None:
    _plain, weights = tiny_model(tmp_path)
    run = Run(load(tmp_path, weights), graphs=True)
    before = run.answer({"31": 3})
    run.rows = {}
    run.batch.warm((3, 33, 10_000))
    assert run.rows == {} and not run.batch.step()
    assert run.answer({"31": 3}) == before


def test_what_lasts_is_known(tmp_path: Path) -> None:
    """Inputs of graphs and buffers of the model are told from what a sleep may take; caches are not among them."""
    _plain, weights = tiny_model(tmp_path)
    model = load(tmp_path, weights)
    run = Run(model, graphs=True)
    kept = {tensor.data_ptr() for tensor in run.batch.lasting}
    assert {buffer.data_ptr() for buffer in model.buffers()} <= kept
    assert run.batch._cache.cache_tensor.data_ptr() not in kept
    assert sum(tensor.nbytes for tensor in run.batch.lasting) < 1 << 20


def test_a_model_that_cannot_be_captured_stays_eager_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _plain, weights = tiny_model(tmp_path)
    run = Run(load(tmp_path, weights), graphs=False)

    def refuse(compute: Callable[[], Result]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    run.batch.capture(refuse, SIZES)
    assert not run.batch.captured and "without CUDA graphs: RuntimeError('operation not permitted" in caplog.text
    assert len(run.answer({"5": 2})["5"]) == 2


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "rotary frequencies"),
        ({"num_local_experts": 4}, "experts"),
        ({}, None),
    ],
)
def test_models_whose_steps_depend_on_values_are_not_captured(more: dict[str, Any], why: str | None) -> None:
    found = decode_graphs.unfit(LlamaForCausalLM(LlamaConfig(**TINY, **more)))
    assert found is None if why is None else why in (found or "")


def test_no_garbage_is_collected_while_a_graph_is_captured() -> None:
    """A pool of memory that goes during a capture ends the process."""

    class Pool:
        me: Pool

    pool = Pool()
    pool.me = pool
    gone = weakref.ref(pool)
    assert gc.isenabled()
    with nothing_collected():
        del pool
        for _ in range(5):
            assert [[object()] for _ in range(2000)] and gone() is not None
        with nothing_collected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.collect()
    assert gone() is None
