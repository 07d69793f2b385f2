"""An engine without a model: words derived from the prompt and the seed, in microseconds.

It is part of the product so that everything around an engine (worker, node, gateway, snapshots) can be tried and
tested without torch and without weights. What it answers is a pure function of the prompt's words, the seed and the
position; timing and memory come from the model folder's config.json:

    {"model_type": "dormouse-null",
     "null": {"delay_s": 0.0,          seconds before each token
              "context": 8192,         longest prompt + answer, in words
              "answer_tokens": null,   length of every answer; null: 16 to 63, from the prompt
              "memory_mb": 0,          heap that is touched at load: zero pages, random pages and text, a third each
              "weights_mb": 0}}        weights made up at import; answers then depend on them, read anew for each
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dormouse.checkpoint.null_source import read_settings, weights_sum
from dormouse.engine.arena import Attached, SegmentArena
from dormouse.engine.detokenize import TextStream
from dormouse.engine.loop import Loop
from dormouse.engine.messages import (
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
    Prompt,
    TextPrompt,
    TokenLogprob,
)
from dormouse.engine.prompts import check_room, context_overflow, failed
from dormouse.engine.protocol import Emit
from dormouse.engine.sampling import check_sampling
from dormouse.errors import DormouseError, EngineError, RequestError
from dormouse.phases import Phases

_TEXT = "a mouse that sleeps under the winter leaves and wakes when somebody asks for tea near old warm stones"
_WORDS = _TEXT.split()


@dataclass
class _Answer:
    request: Generate
    seed: bytes
    prompt_tokens: int
    limit: int
    reason: str
    text: TextStream
    made: int = 0


class NullEngine:
    """See the module. All answers in flight get one token per step."""

    def __init__(self) -> None:
        self._answers: dict[str, _Answer] = {}
        self._heap: list[bytearray] = []

    def prepare(self, spec: Prepare) -> Phases:
        return Phases()

    def load(self, spec: Load, arena: SegmentArena, emit: Emit) -> Loaded:
        phases = Phases()
        with phases.time("model"):
            self._open(spec, arena)
        self._emit = emit
        self._loop: Loop[Generate | Cancel] = Loop(self._step, self._fail)
        return Loaded(context=self._context, kv_tokens=spec.kv_tokens or self._context, phases=phases)

    def _open(self, spec: Load, arena: SegmentArena) -> None:
        self._settings = read_settings(Path(spec.path))
        self._context = min(spec.context or self._settings.context, self._settings.context)
        self._heap = [_megabyte(i) for i in range(self._settings.memory_mb)]
        self._weights = arena.weights
        if self._settings.weights_mb:
            self._weights_view()

    def submit(self, request: Generate) -> None:
        try:
            check_room(len(self._answers))
            check_sampling(request.sampling)
            words = _words_of(request.prompt)
            if len(words) >= self._context:
                raise context_overflow(self._context, len(words), "prompt")
            self._loop.post(request)
        except DormouseError as error:
            self._emit(failed(request.id, error))

    def cancel(self, request_id: str) -> None:
        self._loop.post(Cancel(request_id))

    def load_adapter(self, spec: LoadAdapter, segment: Attached) -> None:
        segment.close()
        raise EngineError("the null engine has no adapters", remedy="Load it into a model of the transformers engine")

    def unload_adapter(self, name: str) -> None:
        self._emit(AdapterUnloaded(name=name))

    def quiesce(self) -> None:
        self._loop.park()

    def resume(self) -> None:
        self._loop.unpark()

    def close(self) -> None:
        self._loop.close()

    def _step(self, commands: list[Generate | Cancel]) -> bool:
        for command in commands:
            if isinstance(command, Generate):
                self._answers[command.id] = self._begin(command)
            elif (answer := self._answers.pop(command.id, None)) is not None:
                self._end(answer, "cancel")
        if self._answers and self._settings.delay_s:
            time.sleep(self._settings.delay_s)
        for answer in list(self._answers.values()):
            self._advance(answer)
        return bool(self._answers)

    def _begin(self, request: Generate) -> _Answer:
        words = _words_of(request.prompt)
        text = f"{request.sampling.seed or 0}:{' '.join(words)}"
        if self._settings.weights_mb:
            text += f":{weights_sum(self._weights_view())}"
        seed = hashlib.blake2b(text.encode()).digest()
        own_length = self._settings.answer_tokens or 16 + seed[0] % 48
        limit = min(request.sampling.max_tokens, self._context - len(words))
        return _Answer(
            request=request,
            seed=seed,
            prompt_tokens=len(words),
            limit=min(own_length, limit),
            reason="stop" if own_length <= limit else "length",
            text=TextStream(decode_words, request.sampling.stop),
        )

    def _weights_view(self) -> memoryview:
        expected = self._settings.weights_mb << 20
        if self._weights is None or self._weights.size != expected:
            raise EngineError(f"the model has {expected} bytes of weights, the worker has {self._weights}")
        return memoryview(self._weights.array()).cast("B")

    def _advance(self, answer: _Answer) -> None:
        token = _token(answer.seed, answer.made)
        answer.made += 1
        text = answer.text.push([token])
        ends = answer.text.stopped or answer.made == answer.limit
        if ends and not answer.text.stopped:
            text += answer.text.finish()
        wanted = answer.request.sampling.logprobs
        logprobs = None if wanted is None else [_logprobs(token, wanted)]
        self._emit(Delta(id=answer.request.id, token_ids=[token], text=text, logprobs=logprobs))
        if ends:
            del self._answers[answer.request.id]
            self._end(answer, "stop" if answer.text.stopped else answer.reason)

    def _end(self, answer: _Answer, reason: str) -> None:
        self._emit(
            Finished(
                id=answer.request.id,
                reason=reason,
                prompt_tokens=answer.prompt_tokens,
                completion_tokens=answer.made,
            )
        )

    def _fail(self, error: Exception) -> None:
        for request_id in list(self._answers):
            del self._answers[request_id]
            self._emit(Failed(id=request_id, message=f"{error}", reason="engine_error", bad_request=False))


def decode_words(token_ids: Sequence[int]) -> str:
    """The text of token ids: words with a space before each."""
    return "".join(f" {_WORDS[token % len(_WORDS)]}" for token in token_ids)


def _token(seed: bytes, position: int) -> int:
    digest = hashlib.blake2b(position.to_bytes(8, "little"), key=seed, digest_size=2).digest()
    return int.from_bytes(digest, "little") % len(_WORDS)


def _logprobs(token: int, count: int) -> list[TokenLogprob]:
    """The chosen word with probability 1/2, the words after it with 1/4, 1/8 and so on."""
    listed = [token, *((token + i) % len(_WORDS) for i in range(count))]
    weights = itertools.chain([1], range(1, count + 1))
    return [
        TokenLogprob(token_id=i, text=decode_words([i]), logprob=-0.6931471805599453 * weight)
        for i, weight in zip(listed, weights, strict=True)
    ]


def _words_of(prompt: Prompt) -> list[str]:
    if isinstance(prompt, ChatPrompt):
        texts = [message.get("content") for message in prompt.messages]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise RequestError("every message must have a text content", param="messages", reason="invalid_value")
        return [word for text in texts if isinstance(text, str) for word in text.split()]
    if isinstance(prompt, TextPrompt):
        return prompt.text.split()
    return [str(token) for token in prompt.ids]


def _megabyte(index: int) -> bytearray:
    """One MiB of touched heap: zeros, noise or text in turn, as a real process holds a mix of them."""
    size = 1 << 20
    kinds = (bytes(size), os.urandom(size), (f"{index}: {' '.join(_WORDS)}\n".encode() * (size // 100))[:size])
    return bytearray(kinds[index % 3])
