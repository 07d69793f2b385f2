"""What test_decode_gpu.py looks at, in a process of its own: a kernel that goes astray ends this one alone.

python -m tests.engine.decode_on_gpu   prints a JSON object: what went wrong by scenario, "" where all was well
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from dormouse.engine.device_arena import DeviceArena, DeviceWeights
from dormouse.engine.transformers_batch import ATTENTION, Batch
from dormouse.engine.transformers_engine import _give_back
from dormouse.transfer.cuda_driver import Cuda

DEVICE = torch.device("cuda", 0)
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
    "attn_implementation": ATTENTION,
}
LENGTHS = (5, 31, 70, 900)
COUNT = 40
_KEPT: list[Any] = []  # pools and what computes in them: they last as long as the process, as in a worker


def model_of(window: int | None = None) -> Any:
    torch.manual_seed(0)
    config: Any = LlamaConfig(**SHAPE) if window is None else MistralConfig(**SHAPE, sliding_window=window)
    model = LlamaForCausalLM(config) if window is None else MistralForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model.eval().requires_grad_(False).to(DEVICE)


def prompt(length: int) -> list[int]:
    return [(7 * i + length) % 512 for i in range(length)]


class Run:
    """A batch whose logits are kept."""

    def __init__(self, model: Any, pool: Any, *, graphs: bool = True) -> None:
        _KEPT.append((self, pool))
        self.rows: dict[str, list[torch.Tensor]] = {}
        self.batch = Batch(model, kv_tokens=16384, sample=self._sample, pool=pool)
        if graphs:
            self.batch.capture()
            assert self.batch.captured, "nothing was captured; the log above says why"

    def _sample(self, ids: list[str], logits: torch.Tensor, best: list[int]) -> list[int]:
        for name, row in zip(ids, logits, strict=True):
            self.rows.setdefault(name, []).append(row.to("cpu", copy=True))
        return best

    def answer(self, lengths: tuple[int, ...], count: int = COUNT) -> dict[str, torch.Tensor]:
        """The logits of `count` tokens of each prompt, all at once."""
        self.rows = {}
        for length in lengths:
            self.batch.add(str(length), prompt(length))
        left = {str(length) for length in lengths}
        while left:
            assert self.batch.step()
            for name in [name for name in left if len(self.rows.get(name, ())) == count]:
                self.batch.remove(name)
                left.discard(name)
        self.batch.reset()
        return {name: torch.stack(rows) for name, rows in self.rows.items()}


def assert_same_answers(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """The same tokens, but where two were as good as equally likely; from there on the answers are others."""
    for name, expected in wanted.items():
        for at, (one, other) in enumerate(zip(found[name], expected, strict=True)):
            span = float(other.max() - other.min())
            off = float((one - other).abs().max())
            assert off < 0.03 * span, f"prompt {name}, token {at}: a logit is off by {off} of {span}"
            if int(one.argmax()) != int(other.argmax()):
                first, second = other.topk(2).values.tolist()
                assert first - second < 0.03 * span, f"prompt {name}, token {at}: {one.argmax()}, {other.argmax()}"
                break


def assert_same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, expected in wanted.items():
        same = [torch.equal(one, other) for one, other in zip(found[name], expected, strict=True)]
        assert all(same), f"prompt {name}: token {same.index(False)} is the first that differs"


def replayed_like_eager(window: int | None = None) -> None:
    model, pool = model_of(window), torch.cuda.MemPool()
    eager, graphs = Run(model, pool, graphs=False), Run(model, pool)
    for lengths in ((31,), LENGTHS):
        assert_same_answers(graphs.answer(lengths), eager.answer(lengths))
    assert graphs.batch.steps["replayed"] > 2 * COUNT - 10, graphs.batch.steps
    assert_same_bits(graphs.answer((70,)), graphs.answer((70,)))


def replayed_like_eager_in_a_window() -> None:
    replayed_like_eager(100)


def scratch_may_have_any_content() -> None:
    """All bits of the pool set, under cache, graphs and workspace: not a bit of an answer changes."""
    pool = torch.cuda.MemPool()
    run = Run(model_of(), pool)
    before = run.answer((31,)), run.answer(LENGTHS)
    for value in (255, 0, 127):
        _give_back(DEVICE, workspaces=False)
        for segment in pool.snapshot():
            whole = torch.as_tensor(DeviceWeights(segment["address"], segment["total_size"]), device=DEVICE)
            whole.fill_(value)
        torch.cuda.synchronize()
        assert_same_bits(run.answer((31,)), before[0])
        assert_same_bits(run.answer(LENGTHS), before[1])


def an_arena_may_take_its_scratch_away() -> None:
    arena = DeviceArena(Cuda(), 0)
    run = Run(model_of(), arena.scratch_pool())
    _KEPT.append(arena)
    run.batch.warm((3, 64, 500))
    before = run.answer((31,)), run.answer(LENGTHS)
    ranges = list(arena._scratch.items())
    lasting = [tensor.data_ptr() for tensor in run.batch.lasting]
    assert not [at for at in lasting for begin, size in ranges if begin <= at < begin + size], "in scratch, but lasts"
    cache = run.batch._cache.cache_tensor.data_ptr()
    assert any(begin <= cache < begin + size for begin, size in ranges), "the cache is not in scratch"
    for _ in range(3):
        run.batch.reset()
        _give_back(DEVICE, workspaces=False)
        awake = torch.cuda.mem_get_info(DEVICE)[0]
        arena.unmap()
        asleep = torch.cuda.mem_get_info(DEVICE)[0]
        assert asleep - awake >= arena.scratch_bytes, (awake, asleep, arena.scratch_bytes)
        began = time.perf_counter()
        arena.map([])
        run_first = run.answer((31,), 1)
        logging.warning("mapped and answered in %.1f ms", 1e3 * (time.perf_counter() - began))
        assert torch.equal(run_first["31"][0], before[0]["31"][0])
        assert_same_bits(run.answer((31,)), before[0])
        assert_same_bits(run.answer(LENGTHS), before[1])
    assert list(arena._scratch.items()) == ranges, "scratch has grown"


def sixty_four_at_once() -> None:
    model, pool = model_of(), torch.cuda.MemPool()
    run, eager = Run(model, pool), Run(model, pool, graphs=False)
    many = tuple(range(3, 67))
    assert_same_answers(run.answer(many, 12), eager.answer(many, 12))
    assert run.batch.steps["replayed"] >= 8, run.batch.steps


def adapters_go_without_graphs() -> None:
    run = Run(model_of(), torch.cuda.MemPool())
    plain = run.answer((31,), 5)
    adapter = run.batch.adapters.fit({}, {})  # one that changes nothing
    run.batch.adapters.bind(adapter)
    run.rows = {}
    run.batch.add("of an adapter", prompt(31), adapter)
    while len(run.rows.get("of an adapter", ())) < 5:
        run.batch.step()
    assert run.batch.steps["adapter"] >= 4, run.batch.steps
    assert_same_answers({"31": torch.stack(run.rows["of an adapter"])}, plain)


SCENARIOS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        replayed_like_eager,
        replayed_like_eager_in_a_window,
        scratch_may_have_any_content,
        an_arena_may_take_its_scratch_away,
        sixty_four_at_once,
        adapters_go_without_graphs,
    )
}


def main() -> None:
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(name)s: %(message)s")
    logging.getLogger("dormouse").setLevel(logging.DEBUG)
    logging.getLogger().setLevel(logging.WARNING)
    torch.cuda.set_device(DEVICE)
    outcome = {}
    for name, scenario in SCENARIOS.items():
        began = time.perf_counter()
        try:
            scenario()
            outcome[name] = ""
        except Exception:  # noqa: BLE001 (told to whoever asked)
            outcome[name] = traceback.format_exc()
        print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
        torch.cuda.empty_cache()
    print(json.dumps(outcome), flush=True)
    sys.stderr.flush()
    os._exit(0)  # in the order in which an interpreter ends, pools may outlive what they call


if __name__ == "__main__":
    main()
