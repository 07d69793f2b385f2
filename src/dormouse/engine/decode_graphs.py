"""Decode steps as captured CUDA graphs: every request of a batch gets one token, by one launch.

    requests --take--> numbers and page tables in fixed memory --run--> replay of the smallest graph that has room
                                                                        --> logits, and the most likely tokens

A graph is captured per number of rows (`SIZES`), at load; a batch between two sizes is padded with rows of length 0,
which read nothing and write their keys where nobody looks. What a graph reads is written anew before each replay, so
nothing in it outlives a step: numbers (token, position, where its keys go, how many there are) go over in one copy, a
row's page table only when it has changed.

Two kinds of memory. What is read across a sleep (numbers, tables, the model's own buffers) is ordinary memory, a
megabyte or so. What a graph computes in, its results, the KV cache and cuBLAS's workspace are scratch: a sleep takes
their contents, never their addresses.

How a computation is captured is the caller's (`Capture`), so that padding and bookkeeping are tested without a GPU.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton

from dormouse.engine.decode_attention import decode_attention

SIZES: Final = (1, 2, 4, 8, 16, 32, 64)
_TOKEN, _POSITION, _KINDS = range(3)  # rows of the numbers; then a place and a length for each kind of layer

CAPTURE_ERRORS: Final = (RuntimeError, triton.TritonError)
"""What a computation that can't be captured ends with: torch's errors, and those of our kernel."""

Result = tuple[torch.Tensor, torch.Tensor]
"""Logits (rows, words) in float32, and the most likely token of each row."""

Capture = Callable[[Callable[[], Result]], tuple[Callable[[], None], Result]]
"""Runs a computation and returns what repeats it, and the memory in which each repetition leaves its result."""


@dataclass(frozen=True)
class Keys:
    """Where a step finds the keys and values of one kind of layer."""

    tables: torch.Tensor
    places: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class Step:
    """What one captured step reads: `rows` tokens, one of each request, in memory that never moves."""

    tokens: torch.Tensor
    positions: torch.Tensor
    keys: dict[str, Keys]


class _Tables:
    """The pages of every row for one kind of layer, here and on the device."""

    def __init__(self, rows: int, pages: int, device: torch.device) -> None:
        self.there = torch.zeros((rows, pages), dtype=torch.int32, device=device)
        self._here = torch.zeros((rows, pages), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._known: list[list[int]] = [[] for _ in range(rows)]

    def put(self, row: int, pages: list[int]) -> None:
        if self._known[row] == pages:
            return
        self._known[row] = list(pages)
        count = len(pages)
        self._here[row, :count] = torch.tensor(pages, dtype=torch.int32)
        self.there[row, :count].copy_(self._here[row, :count], non_blocking=True)


class DecodeGraphs:
    """The captured steps of one model and its cache. Everything happens on one thread and one stream."""

    def __init__(self, model: Any, cache: Any, *, most_tokens: int, sizes: Sequence[int] = SIZES) -> None:
        self._model = model
        self._cache = cache
        self._sizes = sorted(sizes)
        rows, device = self._sizes[-1], model.device
        kinds = list(cache.cache_allocators)
        shape = (_KINDS + 2 * len(kinds), rows)
        self._numbers = torch.zeros(shape, dtype=torch.int64, device=device)
        self._staged = torch.zeros(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._tokens = torch.zeros(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._tables = {
            kind: _Tables(rows, _pages(allocator, most_tokens), device)
            for kind, allocator in cache.cache_allocators.items()
        }
        self._captured: dict[int, tuple[Callable[[], None], Result]] = {}
        self._rows = 0

    @property
    def memory(self) -> list[torch.Tensor]:
        """What must survive a sleep."""
        return [self._numbers, *(tables.there for tables in self._tables.values())]

    def capture(self, capture: Capture) -> None:
        """Capture all sizes, the largest first: the others compute in the memory that it took."""
        self._put([])
        for size in reversed(self._sizes):
            step = self._step(size)
            self._captured[size] = capture(lambda step=step: self._compute(step))  # type: ignore[misc]

    def take(self, requests: Sequence[Any]) -> bool:
        """Write down a batch of transformers' requests, if it is one that the graphs compute: one token of each."""
        if len(requests) > self._sizes[-1] or any(r.query_length != 1 or not r.has_new_token for r in requests):
            return False
        if not all(map(self._fits, requests)):
            return False
        self._put([request.state for request in requests])
        return True

    def run(self) -> Result:
        """Compute what was taken: the logits and the most likely tokens of its rows, valid until the next run."""
        size = next(size for size in self._sizes if size >= self._rows)
        replay, (logits, best) = self._captured[size]
        replay()
        return logits[: self._rows], best[: self._rows]

    def tokens(self, best: torch.Tensor) -> list[int]:
        """The tokens, here. Waits for the device."""
        here = self._tokens[: best.numel()]
        here.copy_(best, non_blocking=True)
        if best.device.type == "cuda":
            torch.cuda.current_stream(best.device).synchronize()
        found: list[int] = here.tolist()
        return found

    def _fits(self, request: Any) -> bool:
        return all(
            len(allocator.block_table[request.state.request_id]) <= self._tables[kind].there.shape[1]
            for kind, allocator in self._cache.cache_allocators.items()
        )

    def _put(self, states: Sequence[Any]) -> None:
        staged = self._staged
        self._rows = len(states)
        past = [state.position_offset for state in states]
        columns = [[state.tokens_to_process[0] for state in states], past]
        rest = [[0], [0]]
        for kind, allocator in self._cache.cache_allocators.items():
            for row, state in enumerate(states):
                self._tables[kind].put(row, allocator.block_table[state.request_id])
            columns.append([allocator.get_write_indices(s.request_id, s.position_offset, 1)[0] for s in states])
            columns.append([allocator.get_seqlen_k(p, 1) for p in past])
            rest += [[allocator.write_trash_index], [0]]
        empty = staged.shape[1] - len(states)
        staged.copy_(torch.tensor([used + unused * empty for used, unused in zip(columns, rest, strict=True)]))
        self._numbers.copy_(staged, non_blocking=True)

    def _step(self, rows: int) -> Step:
        numbers = self._numbers[:, :rows]
        keys = {
            kind: Keys(tables.there[:rows], numbers[_KINDS + 2 * i], numbers[_KINDS + 2 * i + 1])
            for i, (kind, tables) in enumerate(self._tables.items())
        }
        return Step(numbers[_TOKEN][None], numbers[_POSITION][None], keys)

    @torch.no_grad()
    def _compute(self, step: Step) -> Result:
        output = self._model(
            input_ids=step.tokens,
            position_ids=step.positions,
            attention_mask=None,
            use_cache=False,
            cache=self._cache,
            step=step,
        )
        logits = output.logits[0].float()
        return logits, logits.argmax(-1)


def step_attention(
    layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, cache: Any, step: Step, scaling: Any
) -> torch.Tensor:
    """Attention of a captured step: (1, heads, rows, size) to (1, rows, heads, size), after updating the cache."""
    allocator = cache.layer_to_allocator[layer]
    own = step.keys[allocator.layer_type]
    keys, values = allocator._kv_token_views[layer]
    keys.index_copy_(0, own.places, key[0].transpose(0, 1))
    values.index_copy_(0, own.places, value[0].transpose(0, 1))
    output = decode_attention(
        query[0].transpose(0, 1),
        keys,
        values,
        own.tables,
        own.lengths,
        page=allocator.tokens_per_page,
        stride=allocator.block_physical_stride,
        scaling=scaling,
    )
    return output[None]


def unfit(model: Any) -> str | None:
    """Why the steps of a model can't be captured, None when nothing is known to be in the way."""
    config = model.config.get_text_config()
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        return f"rotary frequencies that depend on the request ({rope})"
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "experts, which are chosen by looking at values"
    return None


def cuda_capture(stream: torch.cuda.Stream, pool: torch.cuda.MemPool) -> Capture:
    """Captures on a stream, with everything that the computation allocates in a pool.

    It runs twice before: kernels are compiled and chosen then, and cuBLAS gets its workspace for this thread and stream
    in the pool, where later steps use it too. A workspace may have any content, so it may be scratch.
    """

    def capture(compute: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        with torch.cuda.stream(stream), torch.cuda.use_mem_pool(pool, stream.device):
            for _ in range(2):
                compute()
            stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # "relaxed": what the pool asks of the driver meanwhile is none of the capture's business.
        with (
            nothing_collected(),
            torch.cuda.graph(graph, pool=pool.id, stream=stream, capture_error_mode="relaxed"),  # type: ignore[arg-type]
        ):
            result = compute()
        return _Replay(graph, pool), result

    return capture


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    """Within, no garbage is collected: a pool of memory among it would go, and torch ends the process when one goes
    during a capture. What is garbage already waits, too: to collect it first would cost a worker, which has imported a
    million objects, half a second per graph."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Replay:
    """A graph and the pool whose memory it computes in. It goes before the pool does: some versions of torch end the
    process when a pool goes that a graph still uses."""

    def __init__(self, graph: torch.cuda.CUDAGraph, pool: torch.cuda.MemPool) -> None:
        self._graph: torch.cuda.CUDAGraph | None = graph
        self._pool = pool

    def __call__(self) -> None:
        assert self._graph is not None
        self._graph.replay()

    def __del__(self) -> None:
        self._graph = None


def _pages(allocator: Any, most_tokens: int) -> int:
    window = getattr(allocator, "sliding_window", most_tokens)
    return -(-min(window, most_tokens) // int(allocator.tokens_per_page))
