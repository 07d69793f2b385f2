"""The engine on transformers: prompts to tokens, tokens to text, requests to batches.

    submit (main thread): limits, chat template, tokenizer --post--> loop thread: Batch.step
                          -> choose a token per request -> TextStream -> Delta, Finished --emit--> worker
    load_adapter (main thread): views or a device copy, checked --post--> loop thread: bound between two steps

One thread computes; it sleeps when nothing is in flight. Requests of a batch can't influence each other's tokens:
attention is computed per request, a choice depends on the request's seed and position only, and on the CPUs that were
tried a row of a matrix product does not depend on the other rows (on a GPU that last part does not hold exactly).

On a GPU three kinds of memory are kept apart. Weights are the node's, and mapped. The KV cache, all that graphs
compute in and cuBLAS's workspace are scratch of the arena: addresses that stay, contents that a sleep takes. The rest
is torch's own (buffers, inputs, the graphs; a few MB while nothing runs), and outlives a sleep; what prompts took of it
is given back when the engine quiesces. Capturing the graphs, and everything a first request would wait for, is part of
`load`.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import secrets
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dormouse import host_memory
from dormouse.engine.arena import Attached, SegmentArena
from dormouse.engine.detokenize import TextStream
from dormouse.engine.device_arena import DeviceArena
from dormouse.engine.loop import Loop
from dormouse.engine.messages import (
    AdapterFailed,
    AdapterLoaded,
    AdapterUnloaded,
    Cancel,
    ChatPrompt,
    Delta,
    Failed,
    Finished,
    Generate,
    Load,
    LoadAdapter,
    Loaded,
    Prepare,
    Sampling,
    TokenLogprob,
)
from dormouse.engine.prompts import check_room, context_overflow, failed
from dormouse.engine.protocol import Emit
from dormouse.engine.sampling import alternatives, check_sampling, choose, uniform
from dormouse.errors import DormouseError, EngineError, HostError
from dormouse.phases import Phases

if TYPE_CHECKING:
    import torch

    from dormouse.engine.lora import Adapter

DEFAULT_KV_TOKENS = 16384
_MAX_KV_SHARE = 0.5  # of the memory that is free
_GPU_RESERVE = 3 << 30  # beside the cache: what graphs and prompts compute in, cuBLAS, logits
_WARM_PROMPTS = (3, 16, 33, 64, 128, 256, 511)  # lengths for which cuBLAS is likely to choose different kernels

_CALL_SECONDS = 600.0

log = logging.getLogger(__name__)


@dataclass
class _Request:
    """A generation: made by the main thread, from then on the loop thread's."""

    generate: Generate
    seed: int
    prompt: list[int]
    limit: int
    text: TextStream
    adapter: _LoadedAdapter | None
    made: int = 0


@dataclass(frozen=True, eq=False)
class _LoadedAdapter:
    """An adapter and the segment that its factors lie in; a GPU has a copy, and needs none."""

    name: str
    adapter: Adapter
    segment: Attached


@dataclass(frozen=True)
class _Bind:
    loaded: _LoadedAdapter


@dataclass(frozen=True)
class _Unbind:
    name: str


@dataclass(frozen=True)
class _Call:
    """Something to be done between two steps; whoever asked waits for it."""

    what: Callable[[], None]
    done: Future[None]

    def run(self) -> None:
        try:
            self.what()
        except Exception as error:  # noqa: BLE001 (raised where it was asked for)
            self.done.set_exception(error)
        else:
            self.done.set_result(None)


_Command = _Request | Cancel | _Bind | _Unbind | _Call


class TransformersEngine:
    """See the module, and protocol.Engine."""

    def __init__(self) -> None:
        self._requests: dict[str, _Request] = {}
        self._chosen: list[tuple[_Request, int, list[TokenLogprob] | None]] = []
        self._adapters: dict[str, _LoadedAdapter] = {}

    def prepare(self, spec: Prepare) -> Phases:
        phases = Phases()
        with phases.time("import"):
            _import_parts(spec.threads)
        from dormouse.engine.rehearsal import rehearse

        with phases.time("rehearsal"):
            device = _device(spec.device)
            rehearse(device)
            if device.type == "cuda":
                _give_back(device, workspaces=True)
        return phases

    def load(self, spec: Load, arena: SegmentArena, emit: Emit) -> Loaded:
        phases = Phases()
        folder = Path(spec.path)
        with phases.time("import"):
            _import_parts(spec.threads)
        from dormouse.engine import chat_tokenizer, transformers_batch, transformers_model

        with phases.time("model"):
            device = self._device = _device(spec.device)
            model = transformers_model.load_model(folder, device, transformers_batch.ATTENTION, arena)
        with phases.time("tokenizer"):
            self._tokenizer = chat_tokenizer.ChatTokenizer(folder)
        with phases.time("cache"):
            kv_tokens = _kv_tokens(spec, model, transformers_batch.kv_bytes_per_token(model))
            pool = _scratch(arena)
            self._batch = transformers_batch.Batch(model, kv_tokens=kv_tokens, sample=self._sample, pool=pool)
        self._context = _context(spec, model, kv_tokens)
        self._ends = _end_tokens(model.generation_config.eos_token_id, self._tokenizer.eos_token_id)
        self._emit = emit
        self._loop: Loop[_Command] = Loop(self._step, self._fail)
        if device.type == "cuda":
            with phases.time("weights"):
                arena.wait()
            self._warm(model, phases)
        return Loaded(context=self._context, kv_tokens=kv_tokens, phases=phases)

    def submit(self, request: Generate) -> None:
        try:
            self._loop.post(self._prepare(request))
        except DormouseError as error:
            self._emit(failed(request.id, error))

    def cancel(self, request_id: str) -> None:
        self._loop.post(Cancel(request_id))

    def load_adapter(self, spec: LoadAdapter, segment: Attached) -> None:
        try:
            self._loop.post(_Bind(self._fitted(spec, segment)))
        except BaseException:
            segment.close()
            raise

    def unload_adapter(self, name: str) -> None:
        self._loop.post(_Unbind(name))

    def quiesce(self) -> None:
        self._loop.park()
        for name in list(self._adapters):
            self._let_go(name)
        self._chosen.clear()
        self._batch.drop_cache()
        if self._device.type == "cuda":
            log.info("steps so far: %s", dict(self._batch.steps))
            # The workspace of graphs is where they were captured with it, in scratch.
            _give_back(self._device, workspaces=not self._batch.captured)

    def resume(self) -> None:
        self._loop.unpark()

    def close(self) -> None:
        self._loop.close()

    def _warm(self, model: Any, phases: Phases) -> None:
        """Capture, and run what a first request would run first, on the thread that will: libraries keep handles and
        workspaces per thread. Nobody else uses the GPU meanwhile."""
        import torch

        device = self._device

        def sample() -> None:
            row = torch.randn(model.config.get_text_config().vocab_size, device=device)
            for sampling in (
                Sampling(max_tokens=1, top_p=0.5),
                Sampling(max_tokens=1, top_k=2),
                Sampling(max_tokens=1),
            ):
                alternatives(row, choose(row, sampling, 0.5), 2)

        with phases.time("graphs"):
            self._on_loop(functools.partial(torch.cuda.set_device, device))
            self._on_loop(self._batch.capture)
        with phases.time("warmup"):
            self._on_loop(functools.partial(self._batch.warm, _WARM_PROMPTS))
            self._on_loop(sample)

    def _on_loop(self, what: Callable[[], None]) -> None:
        """Do something on the engine's thread, and raise what it raises."""
        call = _Call(what, Future())
        self._loop.post(call)
        call.done.result(_CALL_SECONDS)

    def _prepare(self, request: Generate) -> _Request:
        check_room(len(self._requests))
        sampling = request.sampling
        check_sampling(sampling)
        prompt = self._tokenizer.encode(request.prompt)
        if len(prompt) >= self._context:
            what = "messages" if isinstance(request.prompt, ChatPrompt) else "prompt"
            raise context_overflow(self._context, len(prompt), what)
        return _Request(
            generate=request,
            # From the kernel, not from this process's memory, which other replicas of a snapshot have as well.
            seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
            prompt=prompt,
            limit=min(sampling.max_tokens, self._context - len(prompt)),
            text=TextStream(self._tokenizer.decode, sampling.stop, prompt),
            adapter=self._adapter(request.adapter),
        )

    def _adapter(self, name: str | None) -> _LoadedAdapter | None:
        if name is not None and name not in self._adapters:
            raise _not_loaded(name)
        return self._adapters[name] if name is not None else None

    def _fitted(self, spec: LoadAdapter, segment: Attached) -> _LoadedAdapter:
        """The adapter, not bound yet. Nothing of it is looked at on the CPU; a GPU gets one copy of the whole."""
        from dormouse.engine.transformers_model import adapter_tensors

        tensors = adapter_tensors(spec, segment, self._device)
        return _LoadedAdapter(spec.name, self._batch.adapters.fit(tensors, spec.scalings), segment)

    # The rest runs on the loop's thread.

    def _step(self, commands: list[_Command]) -> bool:
        for command in commands:
            self._take(command)
        self._chosen.clear()
        self._batch.step()
        for request, token, logprobs in self._chosen:
            self._advance(request, token, logprobs)
        return bool(self._requests)

    def _take(self, command: _Command) -> None:
        match command:
            case _Request():
                self._begin(command)
            case Cancel() if command.id in self._requests:
                self._end(self._requests[command.id], "cancel")
            case _Bind():
                self._bind(command.loaded)
            case _Unbind():
                self._unbind(command.name)
            case _Call():
                command.run()

    def _begin(self, request: _Request) -> None:
        loaded = request.adapter
        if loaded is not None and self._adapters.get(loaded.name) is not loaded:
            # Unloaded since it was asked for: what it would compute with is unmapped.
            self._emit(failed(request.generate.id, _not_loaded(loaded.name)))
            return
        self._requests[request.generate.id] = request
        self._batch.add(request.generate.id, request.prompt, loaded.adapter if loaded is not None else None)

    def _bind(self, loaded: _LoadedAdapter) -> None:
        if loaded.name in self._adapters:
            loaded.segment.close()
        else:
            self._batch.adapters.bind(loaded.adapter)
            self._adapters[loaded.name] = loaded
        self._emit(AdapterLoaded(name=loaded.name))

    def _unbind(self, name: str) -> None:
        if any(request.adapter is not None and request.adapter.name == name for request in self._requests.values()):
            why = f"requests that use the adapter {name} are running"
            self._emit(AdapterFailed(name=name, message=why, remedy="Try again later", kind="EngineError"))
            return
        self._let_go(name)
        self._emit(AdapterUnloaded(name=name))

    def _let_go(self, name: str) -> None:
        if (loaded := self._adapters.pop(name, None)) is not None:
            self._chosen.clear()  # the requests of the last step, which refer to it
            self._batch.adapters.unbind(loaded.adapter)
            loaded.segment.close()

    def _sample(self, ids: list[str], logits: torch.Tensor, best: list[int]) -> list[int]:
        tokens = []
        for request_id, row, likely in zip(ids, logits, best, strict=True):
            request = self._requests[request_id]
            sampling = request.generate.sampling
            greedy = sampling.temperature == 0
            token = likely if greedy else choose(row, sampling, uniform(request.seed, request.made))
            logprobs = None if sampling.logprobs is None else self._logprobs(row, token, sampling.logprobs)
            self._chosen.append((request, token, logprobs))
            tokens.append(token)
        return tokens

    def _logprobs(self, row: torch.Tensor, token: int, count: int) -> list[TokenLogprob]:
        return [
            TokenLogprob(token_id=i, text=self._tokenizer.token_text(i), logprob=logprob)
            for i, logprob in alternatives(row, token, count)
        ]

    def _advance(self, request: _Request, token: int, logprobs: list[TokenLogprob] | None) -> None:
        """Stream one token. An end token is neither streamed nor counted."""
        if token in self._ends:
            if rest := request.text.finish():
                self._emit(Delta(id=request.generate.id, token_ids=[], text=rest))
            self._end(request, "stop")
            return
        request.made += 1
        text = request.text.push([token])
        reason = "stop" if request.text.stopped else "length" if request.made == request.limit else None
        if reason == "length":
            text += request.text.finish()
        self._emit(
            Delta(
                id=request.generate.id,
                token_ids=[token],
                text=text,
                logprobs=None if logprobs is None else [logprobs],
            )
        )
        if reason:
            self._end(request, "stop" if request.text.stopped else reason)

    def _end(self, request: _Request, reason: str) -> None:
        del self._requests[request.generate.id]
        self._batch.remove(request.generate.id)
        self._emit(
            Finished(
                id=request.generate.id,
                reason=reason,
                prompt_tokens=len(request.prompt),
                completion_tokens=request.made,
            )
        )

    def _fail(self, error: Exception) -> None:
        """A step raised (out of memory, for example): its requests fail, the next ones start on a clean state."""
        requests, self._requests = self._requests, {}
        self._batch.reset()
        for request_id in requests:
            self._emit(
                Failed(id=request_id, message=f"the engine failed: {error}", reason="engine_error", bad_request=False)
            )


def _not_loaded(name: str) -> EngineError:
    return EngineError(f"the adapter {name} is not loaded in this worker", remedy="Try again")


def _import_parts(threads: int | None) -> None:
    """Import all that an engine of this kind consists of."""
    _set_threads(threads)
    try:
        from dormouse.engine import chat_tokenizer, transformers_batch, transformers_model  # noqa: F401
    except ImportError as error:
        raise EngineError(
            f"the transformers engine can't be imported: {error}",
            remedy="Install the tested versions: pip install 'dormouse[transformers]'",
        ) from error
    transformers_batch.check_internals()


def _set_threads(threads: int | None) -> None:
    """Before torch is imported: its OpenMP runtime reads these once.

    Threads that wait sleep instead of spinning. On a machine with other work (another model waking, say) a spinning
    thread holds the core that the one it waits for needs: with one busy neighbour on two cores 18 tokens a second
    became 8, and two neighbours left 1.3. Alone, sleeping costs a tenth.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads or len(os.sched_getaffinity(0)))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineError(f"there is no device {name!r}", remedy="Use cpu or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise HostError(
            f"the model is to run on {name}, but torch sees no GPU", remedy="Run `dormouse doctor`, or use cpu"
        )
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def _scratch(arena: SegmentArena) -> torch.cuda.MemPool | None:
    """Where the cache and the graphs of a GPU get their memory."""
    return arena.scratch_pool() if isinstance(arena, DeviceArena) else None


def _give_back(device: torch.device, *, workspaces: bool) -> None:
    """Let torch give back what it holds of a GPU, and of pinned memory, and nobody uses. Pools in use keep theirs."""
    import torch

    torch.cuda.synchronize(device)
    gc.collect()
    if workspaces:
        torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch._C._host_emptyCache()


def _kv_tokens(spec: Load, model: Any, bytes_per_token: int) -> int:
    """How many tokens the cache holds: what was asked for if it fits, else the default, bounded by free memory. A GPU's
    cache takes nothing while the model sleeps, so what is asked for there may take all that is free but a reserve."""
    if model.device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(model.device)
        most = max(free - _GPU_RESERVE, 0) // bytes_per_token
        default = min(DEFAULT_KV_TOKENS, int(free * _MAX_KV_SHARE) // bytes_per_token)
        wanted = spec.kv_tokens or (int(total * spec.kv_share) // bytes_per_token if spec.kv_share else default)
    else:
        free = total = host_memory.available()
        most = int(free * _MAX_KV_SHARE) // bytes_per_token
        wanted = spec.kv_tokens or min(DEFAULT_KV_TOKENS, most)
    if not 0 < wanted <= most:
        raise HostError(
            f"a cache of {wanted} tokens needs {wanted * bytes_per_token >> 20} MiB; of the free {free >> 20} MiB at "
            f"most {most * bytes_per_token >> 20} may be used",
            remedy="Set a smaller kv_tokens or kv_share for the model, or free some memory",
        )
    return wanted


def _context(spec: Load, model: Any, kv_tokens: int) -> int:
    own = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or kv_tokens)
    return min(spec.context or own, own, kv_tokens)


def _end_tokens(configured: int | list[int] | None, of_tokenizer: int | None) -> frozenset[int]:
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, of_tokenizer] if i is not None)
