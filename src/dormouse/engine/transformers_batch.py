"""transformers' continuous batching, driven step by step.

    requests --> scheduler, paged cache, inputs (transformers) --> model --> paged_attention --> logits --> our sampler
                      on a GPU, one token of each request: --> captured graph (decode_graphs.py) --^

`ContinuousBatchingManager` is left out: its thread polls ten times a second, where a sleeping model must use no CPU,
and it can't stop at an exact point, which a snapshot needs. Below it we drive `ContinuousBatchProcessor`, and change
four things:

- **Sampling.** transformers draws for a whole batch from the global generator. We take the logits where it would
  sample (`ModelRunner._sample`) and choose by each request's own seed.
- **Prefixes.** It shares cached keys and values between requests that begin with the same tokens. Those of an adapter
  are not those of the base, so requests of different adapters never look the same to it.
- **Attention.** Its SDPA path puts all requests of a batch side by side under one mask: the mask is a tensor of
  (batch tokens x cache tokens), work grows with the square of the batch, and rounding depends on the neighbours. Ours
  computes each request by itself over its own keys, so the mask disappears and neighbours can't change a result.
- **Steps on a GPU.** A batch in which each request gets one token and none has an adapter is replayed from a graph,
  once `capture` has made some; neither transformers' inputs nor its forward pass take part. All else is computed
  eagerly, prompts above all. `steps` counts both. Everything runs on one stream, from the inputs on.

On a GPU the cache's memory may be scratch (a pool given by the caller): forgetting what is in it is then all that a
sleep asks for.

These are internals, so `check_internals` compares them with what was tested before anything is built on them.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import cache as cb_cache
from transformers.generation.continuous_batching import (
    continuous_api,
    input_outputs,
    model_runner,
    requests,
    scheduler,
)
from transformers.generation.continuous_batching.cache_allocators import cache_allocator
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.initialization import resolve_continuous_batching_config
from transformers.generation.logits_process import LogitsProcessorList
from transformers.modeling_utils import AttentionInterface

from dormouse.engine.lora import Adapter, Adapters
from dormouse.errors import EngineError

if TYPE_CHECKING:
    from dormouse.engine.decode_graphs import Capture, DecodeGraphs, Step

ATTENTION = "dormouse_paged"
PAGE_TOKENS = 32
BLOCK = 64
MAX_BATCH_TOKENS = 512
MAX_BATCH_REQUESTS = 64
TESTED_VERSION = "5.23"

_TOKEN_BITS = 21  # no vocabulary is larger
_DIGIT_BITS = 10
_DIGIT = (1 << _DIGIT_BITS) - 1

_FOOTPRINT_SHARE = 16.0
"""transformers refuses a cache by its own reckoning of what it takes, which counts masks that we don't have and not
what others hold of a GPU. Whether a cache fits is decided by who asks for it."""

log = logging.getLogger(__name__)

Sampler = Callable[[list[str], torch.Tensor, list[int]], list[int]]
"""Takes the ids of the requests that get a token now, their rows of logits, and the most likely token of each; returns
the tokens."""


def check_internals() -> None:
    """Raise EngineError when this transformers is not built as the one that was tested."""
    expected = {
        (continuous_api.ContinuousBatchProcessor, "prepare_next_batch"): ["self"],
        (continuous_api.ContinuousBatchProcessor, "update_batch"): ["self"],
        (continuous_api.ContinuousBatchProcessor, "reset"): ["self"],
        (continuous_api.ContinuousBatchProcessor, "_generation_step"): ["self", "model"],
        (model_runner.ModelRunner, "_sample"): ["self", "scores", "output_ids"],
        (cb_cache.PagedAttentionCache, "reset"): ["self"],
        (cb_cache.PagedAttentionCache, "search_prefix_match"): ["self", "request_id", "prompt_ids"],
        (cache_allocator.CacheAllocator, "mark_complete_blocks"): ["self", "request_id", "token_ids", "new_new_blocks"],
        (cb_cache.PagedAttentionCache, "update"): ["self", "key_states", "value_states", "layer_idx", "kwargs"],
        (cache_allocator.CacheAllocator, "get_write_indices"): ["self", "request_id", "past_length", "query_length"],
        (cache_allocator.CacheAllocator, "get_seqlen_k"): ["self", "past_length", "query_length"],
        (input_outputs.ContinuousBatchingIOs, "prepare_batch_update"): ["self"],
        (input_outputs.ContinuousBatchingIOs, "prepare_batch_tensors"): [
            "self",
            "requests_in_batch",
            "logits_processors",
            "use_decode_fast_path",
            "num_q_tokens",
            "max_kv_read",
            "use_padding",
        ],
        (scheduler.Scheduler, "add_waiting_request"): ["self", "state"],
        (scheduler.Scheduler, "set_request_cancellation"): ["self", "request_id"],
        (scheduler.Scheduler, "clear_cancelled_requests"): ["self"],
    }
    for (owner, name), parameters in expected.items():
        found = getattr(owner, name, None)
        if found is None or list(inspect.signature(found).parameters) != parameters:
            raise EngineError(
                f"transformers {transformers.__version__} has another {owner.__name__}.{name} than the one that "
                f"Dormouse drives",
                remedy=f"Install the tested version: pip install 'transformers=={TESTED_VERSION}.*'",
            )


@dataclass(frozen=True)
class Share:
    """One request's part of a batch: how many tokens are computed, how many keys (by kind of layer) they look at, and
    whether the token is one of the answer rather than of the prompt."""

    queries: int
    keys: dict[str, int]
    decoding: bool


class Batch:
    """The requests in flight on one model. Not thread-safe: everything happens on the engine's thread."""

    def __init__(self, model: Any, *, kv_tokens: int, sample: Sampler, pool: torch.cuda.MemPool | None = None) -> None:
        """With a pool, the cache lies in its memory, whose contents a sleep takes away."""
        _check_attention(model)
        self._model = model
        self._sample = sample
        self.adapters = Adapters(model)
        self._adapter_of: dict[str, Adapter] = {}
        text_config = model.config.get_text_config()
        config = resolve_continuous_batching_config(
            text_config, _batching_config(kv_tokens), None, has_logit_processors=False, device=model.device
        )
        with _NoZeroing(), _memory_of(pool, model.device):
            cache = cb_cache.PagedAttentionCache(
                text_config,
                config,
                model.device,
                DistributedHelper(None, None),
                dtype=model.dtype,
                model_supports_logits_to_keep=model._supports_logits_to_keep(),
            )
        self._processor = continuous_api.ContinuousBatchProcessor(
            cache=cache,
            config=text_config,
            generation_config=model.generation_config,
            continuous_batching_config=config,
            logit_processor=ContinuousBatchingLogitsProcessorList(LogitsProcessorList()),
            input_queue=None,
            cancel_queue=None,
            output_router=continuous_api.OutputRouter(),  # stays empty: requests never finish by themselves (see add)
            background_thread_status=continuous_api.BackgroundThreadStatus(),
            model_device=model.device,
            model_dtype=model.dtype,
            scheduler=scheduler.FIFOScheduler(cache, None, MAX_BATCH_REQUESTS),
            distributed_helper=DistributedHelper(None, None),
        )
        self._pool = pool
        self._cache = cache
        self._inputs = self._processor.inputs_and_outputs
        self._graphs: DecodeGraphs | None = None
        self._replaying = False
        self._new_tokens: list[int] = []
        self.steps: Counter[str] = Counter()
        self._processor.model_runner._sample = self._take_logits
        self._prepare_eagerly = self._inputs.prepare_batch_tensors
        self._inputs.prepare_batch_tensors = self._prepare
        self._inputs.prepare_batch_update = self._update
        self._part_prefixes(cache)
        self._cache_bytes = cache.cache_tensor.untyped_storage().nbytes()
        self.drop_cache()

    def add(self, request_id: str, token_ids: list[int], adapter: Adapter | None = None) -> None:
        """Queue a request, of a bound adapter or of the base. It runs until `remove`: when to stop is the caller's
        decision."""
        if adapter is not None:
            self._adapter_of[request_id] = adapter
        state = requests.RequestState(request_id=request_id, initial_tokens=token_ids, max_new_tokens=None)
        self._processor.scheduler.add_waiting_request(state)

    def remove(self, request_id: str) -> None:
        """Forget a request, wherever it is. Between steps only."""
        self._processor.scheduler.set_request_cancellation(request_id)
        self._processor.scheduler.clear_cancelled_requests()
        self._processor.scheduler.block_new_requests = False
        self._adapter_of.pop(request_id, None)

    def step(self) -> bool:
        """One forward pass over a part of every request that fits. False when there was nothing to do."""
        with self._on_stream():
            if not self._processor.prepare_next_batch():
                return False
            if self._replaying:
                self._replay()
            else:
                self._processor._generation_step(self._forward)
            self._processor.update_batch()
        return True

    def capture(self, capture: Capture | None = None, sizes: Sequence[int] | None = None) -> None:
        """Have steps of one token per request replayed from now on, as `capture` says or by CUDA graphs in the pool.
        The weights must have their values, for the model runs. A model that can't be captured stays eager, and the log
        says so. Call it on the thread that steps: libraries keep what they warm up per thread."""
        try:
            from dormouse.engine import decode_graphs
        except ImportError as error:
            log.warning("decoding goes without CUDA graphs, for Triton can't be imported: %s", error)
            return
        if (why := decode_graphs.unfit(self._model)) is None:
            own = decode_graphs.SIZES if sizes is None else sizes
            graphs = decode_graphs.DecodeGraphs(self._model, self._cache, most_tokens=self._most_tokens(), sizes=own)
            try:
                with self._on_stream():
                    graphs.capture(capture or self._cuda_capture())
                self._graphs = graphs
            except decode_graphs.CAPTURE_ERRORS as error:
                log.debug("the capture failed", exc_info=True)
                why = repr(error)
        if why is not None:
            log.warning("%s decodes without CUDA graphs: %s", type(self._model).__name__, why)

    def _cuda_capture(self) -> Capture:
        from dormouse.engine.decode_graphs import cuda_capture

        assert self._pool is not None, "on a GPU a batch is made with a pool"
        return cuda_capture(self._inputs.compute_stream, self._pool)

    def warm(self, lengths: Sequence[int]) -> None:
        """Answer made-up prompts of these lengths, each beside the one before, then forget them: so that libraries have
        chosen and loaded what requests will need."""
        answered: set[str] = set()

        def note(ids: list[str], _logits: torch.Tensor, best: list[int]) -> list[int]:
            answered.update(ids)
            return best

        sample, self._sample = self._sample, note
        words = self._model.config.get_text_config().vocab_size
        try:
            before = ""
            for length in lengths:
                if length >= self._most_tokens() // 2:
                    continue
                self.add(name := f"warm-{length}", [length % words] * length)
                while name not in answered and self.step():
                    pass
                self.step()
                self.remove(before)
                before = name
        finally:
            self._sample = sample
            self.reset()

    @property
    def captured(self) -> bool:
        """Whether there are graphs."""
        return self._graphs is not None

    @property
    def lasting(self) -> list[torch.Tensor]:
        """What is read after a sleep without having been written: none of it may lie in scratch."""
        return [*self._model.buffers(), *([] if self._graphs is None else self._graphs.memory)]

    def reset(self) -> None:
        """Forget all requests, and all that is known about the cache's contents."""
        with self._on_stream():
            self._processor.reset()
            self._cache.reset()
        self._adapter_of.clear()

    def drop_cache(self) -> None:
        """Forget the cache's contents, and give its memory back: take fresh memory, which costs nothing until it is
        used. Memory of a pool is taken away and given back behind our back.

        The tensors that transformers made of it stay valid: they look at the storage, whose memory is exchanged.
        """
        self.reset()
        if self._pool is not None:
            return
        storage = self._cache.cache_tensor.untyped_storage()
        storage.resize_(0)
        if storage.device.type == "cuda":
            torch.cuda.empty_cache()
        storage.resize_(self._cache_bytes)

    def _on_stream(self) -> contextlib.AbstractContextManager[Any]:
        """transformers computes on a stream of its own. It fills the inputs on whichever is the current one: on that
        one too, or the computation may begin before they are there."""
        stream = self._inputs.compute_stream
        return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)

    def _most_tokens(self) -> int:
        """Of one request."""
        room = int(self._cache.max_tokens_read)
        own = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return min(room, own or room)

    def _prepare(self, requests_in_batch: Any, *args: Any, **kwargs: Any) -> None:
        """Stands in for ContinuousBatchingIOs.prepare_batch_tensors: writes the inputs of a graph where one fits."""
        self._replaying = self._graphs is not None and self._one_token_each(requests_in_batch)
        self.steps["replayed" if self._replaying else "eager"] += 1
        if not self._replaying:
            self._prepare_eagerly(requests_in_batch, *args, **kwargs)
            return
        self._inputs.requests_in_batch = list(requests_in_batch)
        for future in requests_in_batch:
            future.state.position_offset += 1
            future.state.tokens_to_process = [requests.TMP_TOKEN_ID]

    def _one_token_each(self, requests_in_batch: Any) -> bool:
        """Whether the graphs took the batch."""
        assert self._graphs is not None
        if any(future.state.request_id in self._adapter_of for future in requests_in_batch):
            if not self.steps["adapter"]:
                log.info("steps of requests with adapters run without CUDA graphs")
            self.steps["adapter"] += 1
            return False
        return self._graphs.take(requests_in_batch)

    def _replay(self) -> None:
        assert self._graphs is not None
        logits, best = self._graphs.run()
        ids = [future.state.request_id for future in self._inputs.requests_in_batch]
        self._new_tokens = self._sample(ids, logits, self._graphs.tokens(best))

    def _update(self) -> tuple[Any, list[int], None]:
        """Stands in for ContinuousBatchingIOs.prepare_batch_update."""
        return self._inputs.requests_in_batch, self._new_tokens, None

    def _forward(self, **batch: Any) -> Any:
        """What transformers takes for the model.

        Adds each request's share of the batch as plain numbers, so that no layer has to ask a tensor for them. And
        repeats a row that is alone: the products of one row are computed by another kernel than those of two or more,
        with other rounding, so a request would get other numbers when it has company.
        """
        for name in ("input_ids", "position_ids"):
            if batch[name].shape[1] == 1:
                batch[name] = batch[name].repeat(1, 2)
        if "logits_to_keep" in batch and batch["logits_to_keep"].numel() == 1:
            batch["logits_to_keep"] = batch["logits_to_keep"].repeat(2)
        keys = {kind: _lengths(ends) for kind, ends in batch["cu_seq_lens_k"].items()}
        in_batch = self._inputs.requests_in_batch
        batch["shares"] = [
            Share(
                queries=future.query_length,
                keys={kind: lengths[i] for kind, lengths in keys.items()},
                decoding=bool(future.state.generated_tokens),
            )
            for i, future in enumerate(in_batch)
        ]
        self.adapters.route([(self._adapter_of.get(f.state.request_id), f.query_length) for f in in_batch])
        return self._model(**batch)

    def _part_prefixes(self, cache: Any) -> None:
        """Have the cache find and note the prefixes of an adapter's requests under tokens of their own."""
        search = cache.search_prefix_match
        cache.search_prefix_match = lambda request_id, ids: search(request_id, self._as_cached(request_id, ids))
        for allocator in cache.cache_allocators.values():
            self._part_marks(allocator)

    def _part_marks(self, allocator: Any) -> None:
        mark = allocator.mark_complete_blocks
        allocator.mark_complete_blocks = lambda request_id, ids, count: mark(
            request_id, self._as_cached(request_id, ids), count
        )

    def _as_cached(self, request_id: str, token_ids: list[int]) -> list[int]:
        adapter = self._adapter_of.get(request_id)
        return token_ids if adapter is None else marked(token_ids, adapter.serial)

    def _take_logits(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        """Stands in for ModelRunner._sample: row i belongs to the i-th request that is past its prompt."""
        states = self._inputs.requests_in_batch
        ids = [future.state.request_id for future in states if future.has_new_token]
        logits = scores[0, : len(ids)]
        self._new_tokens = self._sample(ids, logits, logits.argmax(-1).tolist()) if ids else []


def marked(token_ids: list[int], serial: int) -> list[int]:
    """Tokens that differ from those of the base and of every other serial, and from each other as before: the first
    four of them (a page has more) carry the serial's digits, and are negative, as no token is."""
    digits = [serial >> shift & _DIGIT for shift in range(0, 4 * _DIGIT_BITS, _DIGIT_BITS)]
    return [~(digit << _TOKEN_BITS | token) for digit, token in zip(digits, token_ids, strict=False)] + token_ids[4:]


class _NoZeroing(TorchFunctionMode):
    """Inside, torch.zeros takes memory without writing to it. For the cache: writing to it would take 0.6 s per 400 MB
    at load, and a place of it is never read before it is written."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (torch.empty if func is torch.zeros else func)(*args, **(kwargs or {}))


def kv_bytes_per_token(model: Any) -> int:
    """Bytes of keys and values that one token takes in all layers."""
    config = model.config.get_text_config()
    heads = cb_cache.find_num_key_value_heads(config)
    return int(2 * config.num_hidden_layers * heads * cb_cache.find_head_dim(config) * model.dtype.itemsize)


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    cache: Any,
    shares: list[Share] | None = None,
    step: Step | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed batch (1, heads, tokens, size) after updating the paged cache: of a captured step, or one
    request at a time.

    Rows beyond those of the requests (see Batch._forward) are left out, and zero in the result.
    """
    if step is not None:
        from dormouse.engine.decode_graphs import step_attention

        return step_attention(module.layer_idx, query, key, value, cache=cache, step=step, scaling=scaling), None
    assert shares is not None
    padding = query.shape[2] - sum(share.queries for share in shares)
    if padding:
        query, key, value = (x[:, :, :-padding] for x in (query, key, value))
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    allocator = cache.layer_to_allocator[module.layer_idx]
    window = getattr(allocator, "sliding_window", None)
    keys = [share.keys[allocator.layer_type] for share in shares]
    own = zip(
        shares,
        query.split_with_sizes([share.queries for share in shares], 2),
        key.split_with_sizes(keys, 2),
        value.split_with_sizes(keys, 2),
        strict=True,
    )
    outputs = [
        _grouped(q, k, v, None, scaling) if share.decoding else _prefill(q, k, v, window, scaling)
        for share, q, k, v in own
    ]
    if padding:
        outputs.append(torch.zeros_like(outputs[0][:, :, :padding]))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Attention of (1, heads, rows, size) where several heads share keys: they become more rows of one head, so that
    no key is repeated."""
    _, heads, rows, size = query.shape
    kv_heads = key.shape[1]
    packed = query.reshape(1, kv_heads, heads // kv_heads * rows, size)
    if mask is not None:
        mask = mask.repeat(heads // kv_heads, 1)
    output = scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(1, heads, rows, value.shape[-1])


def _prefill(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scaling: float | None
) -> torch.Tensor:
    """Causal attention of the last tokens of a request over all of its tokens so far.

    On the CPU in blocks of rows that begin at multiples of BLOCK and are filled up to it, over keys filled up to the
    block's end: so the numbers of a token are the same whether its prompt was computed at once, in pieces beside
    other requests, or after a shared prefix. A kernel called with other shapes rounds otherwise.
    """
    queries, keys = query.shape[2], key.shape[2]
    past = keys - queries
    block = BLOCK if query.device.type == "cpu" else keys
    first, end = past // block * block, -(-keys // block) * block
    query = pad(query, (0, 0, past - first, end - keys))
    key, value = (pad(x, (0, 0, 0, end - keys)) for x in (key, value))
    outputs = [
        _grouped(
            query[:, :, at - first : at - first + block],
            key[:, :, : at + block],
            value[:, :, : at + block],
            _causal(at, at + block, window, query.device),
            scaling,
        )
        for at in range(first, end, block)
    ]
    return torch.cat(outputs, dim=2)[:, :, past - first : keys - first]


def _causal(begin: int, end: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which of the keys 0..end the rows begin..end may see."""
    own = torch.arange(begin, end, device=device)[:, None]
    seen = torch.arange(end, device=device)[None, :]
    allowed = seen <= own
    return allowed if window is None else allowed & (seen > own - window)


def _memory_of(pool: torch.cuda.MemPool | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if pool is None else torch.cuda.use_mem_pool(pool, device)


def _lengths(ends: torch.Tensor) -> list[int]:
    values = ends.tolist()
    return [end - begin for begin, end in itertools.pairwise(values)]


def _batching_config(kv_tokens: int) -> Any:
    return ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=-(-kv_tokens // PAGE_TOKENS),
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_requests_per_batch=MAX_BATCH_REQUESTS,
        max_blocks_per_request=0,
        use_async_batching=False,
        use_cuda_graph=False,
        auto_switch_to_flash=False,
        max_memory_percent=_FOOTPRINT_SHARE,
        seed=0,
    )


def _check_attention(model: Any) -> None:
    """Refuse the kinds of attention that `paged_attention` does not compute, rather than compute them wrongly."""
    config = model.config.get_text_config()
    reason = None
    if getattr(config, "attn_logit_softcapping", None):
        reason = "soft-capped attention"
    elif any(hasattr(module, "sinks") for module in model.modules()):
        reason = "attention sinks"
    elif not hasattr(config, "num_attention_heads") or hasattr(config, "kv_lora_rank"):
        reason = "a cache that is not of plain keys and values"
    elif not getattr(model, "_supports_attention_backend", True):
        reason = "an attention that can't be exchanged"
    if reason is not None:
        raise EngineError(
            f"{type(model).__name__} has {reason}, which the transformers engine does not support",
            remedy="docs/models.md lists what is supported",
        )


AttentionInterface.register(ATTENTION, paged_attention)
