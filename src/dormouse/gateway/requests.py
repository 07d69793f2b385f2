"""From the JSON of a request to a `Job`: what is asked of the model, checked, in the node's words. Pure.

Every field is honoured, or listed as harmless (IGNORED), or refused by name unless it has the value that means
"nothing special" (NEUTRAL): a client never gets an answer to another question than it asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from dormouse.engine.messages import ChatPrompt, Prompt, Sampling, TextPrompt, TokensPrompt
from dormouse.errors import RequestError

MAX_CHOICES = 32
_LEAST_TOP_P = 1e-9  # 0 means the likeliest token alone, and so does this
MAX_COPIED_BYTES = 16 << 20  # each answer takes the worker's own copy of the prompt
"""Most answers one request may ask for: prompts times n."""

MAX_STOPS = 4
_ROLES = ("system", "developer", "user", "assistant", "tool")

IGNORED = frozenset({"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "store", "user"})
"""Accepted and without effect: they say something about the caller, not about the answer."""

_NEUTRAL_BOTH: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}
NEUTRAL_CHAT: Mapping[str, tuple[object, ...]] = {
    **_NEUTRAL_BOTH,
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
NEUTRAL_COMPLETION: Mapping[str, tuple[object, ...]] = {
    **_NEUTRAL_BOTH,
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}

_Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_AdapterName = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"\A[^\s\x00-\x1f\x7f-\x9f]+\Z")]
"""It is shown in logs and in the comment lines of streams, so it is one word."""

_Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class _StreamOptions(Struct, forbid_unknown_fields=True, frozen=True):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Common(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    model: Annotated[str, Meta(min_length=1, max_length=256)]
    max_tokens: _Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: _Seed | None = None


class _ChatRequest(_Common, forbid_unknown_fields=True, frozen=True, kw_only=True):
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class _CompletionRequest(_Common, forbid_unknown_fields=True, frozen=True, kw_only=True):
    prompt: str | list[Any]
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None


class LoadAdapterRequest(Struct, forbid_unknown_fields=True, frozen=True):
    """The body of /v1/load_lora_adapter: `lora_path` is the name of an imported adapter."""

    lora_name: _AdapterName
    lora_path: Annotated[str, Meta(min_length=1, max_length=4096)]
    load_inplace: Literal[False] = False


class UnloadAdapterRequest(Struct, forbid_unknown_fields=True, frozen=True):
    """The body of /v1/unload_lora_adapter; the number that others give an adapter means nothing here."""

    lora_name: Annotated[str, Meta(min_length=1, max_length=256)]
    lora_int_id: int | None = None


@dataclass(frozen=True)
class Job:
    """One request. `choices` pairs each wanted answer's prompt with its seed; `max_tokens` of None means as many as
    the model's context allows."""

    kind: Literal["chat", "completion"]
    model: str
    choices: tuple[tuple[Prompt, int | None], ...]
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    stop: tuple[str, ...]
    logprobs: int | None
    stream: bool
    include_usage: bool

    def sampling(self, seed: int | None, context: int) -> Sampling:
        """How one choice is sampled by a model with room for `context` tokens."""
        return Sampling(
            max_tokens=min(self.max_tokens or context, context),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=seed,
            stop=self.stop,
            logprobs=self.logprobs,
        )


def parse_chat(body: bytes) -> Job:
    """The job of a /v1/chat/completions body. Raises RequestError."""
    request = _decode(body, _ChatRequest, NEUTRAL_CHAT)
    if request.top_logprobs is not None and not request.logprobs:
        raise _invalid("top_logprobs", "top_logprobs needs logprobs to be true")
    if request.max_tokens and request.max_completion_tokens:
        raise _invalid("max_tokens", "give max_tokens or max_completion_tokens, not both")
    prompt = ChatPrompt(messages=[_message(message, index) for index, message in enumerate(request.messages)])
    return _job(
        "chat",
        request,
        size=len(body),
        prompts=[prompt],
        max_tokens=request.max_completion_tokens or request.max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )


def parse_completion(body: bytes) -> Job:
    """The job of a /v1/completions body. Raises RequestError."""
    request = _decode(body, _CompletionRequest, NEUTRAL_COMPLETION)
    return _job(
        "completion",
        request,
        size=len(body),
        prompts=_prompts(request.prompt),
        max_tokens=request.max_tokens or 16,  # OpenAI's default on this route
        logprobs=request.logprobs,
    )


def parse_load_adapter(body: bytes) -> LoadAdapterRequest:
    """What is asked of /v1/load_lora_adapter. Raises RequestError."""
    return _decode(body, LoadAdapterRequest, {})


def parse_unload_adapter(body: bytes) -> UnloadAdapterRequest:
    """What is asked of /v1/unload_lora_adapter. Raises RequestError."""
    return _decode(body, UnloadAdapterRequest, {})


_Request = TypeVar("_Request", bound=Struct)


def _decode(body: bytes, request_type: type[_Request], neutral: Mapping[str, tuple[object, ...]]) -> _Request:
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"The body is not valid JSON: {error}", reason="invalid_json") from error
    if not isinstance(fields, dict):
        raise RequestError("The body must be a JSON object", reason="invalid_type")
    for name in IGNORED:
        fields.pop(name, None)
    for name, allowed in neutral.items():
        value = fields.pop(name, None)
        if value is not None and value not in allowed:
            choices = " or ".join(msgspec.json.encode(choice).decode() for choice in allowed)
            raise RequestError(
                f"{name} is not supported by this server",
                param=name,
                reason="unsupported_parameter",
                remedy=f"Leave it out, or give it as {choices}" if choices else "Leave it out",
            )
    try:
        return msgspec.convert(fields, request_type)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from error


def _job(
    kind: Literal["chat", "completion"],
    request: _Common,
    *,
    size: int,
    prompts: list[Prompt],
    max_tokens: int | None,
    logprobs: int | None,
) -> Job:
    if request.stream_options is not None and not request.stream:
        raise _invalid("stream_options", "stream_options needs stream to be true")
    copies = request.n or 1
    if len(prompts) * copies > MAX_CHOICES:
        raise _invalid("n", f"{len(prompts)} prompts times n={copies} is more than {MAX_CHOICES} answers")
    if size * copies > MAX_COPIED_BYTES:
        raise _invalid("n", f"n={copies} copies of a body of {size} bytes are more than {MAX_COPIED_BYTES} bytes")
    return Job(
        kind=kind,
        model=request.model,
        choices=tuple((prompt, _seed(request.seed, copy)) for prompt in prompts for copy in range(copies)),
        max_tokens=max_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else max(request.top_p, _LEAST_TOP_P),
        top_k=max(request.top_k or 0, 0),
        stop=_stop(request.stop),
        logprobs=logprobs,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
    )


def _seed(seed: int | None, copy: int) -> int | None:
    """The copies of one prompt must differ, and differ in the same way each time."""
    return None if seed is None else (seed + copy + 2**63) % 2**64 - 2**63


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS or not all(stops):
        raise _invalid("stop", f"stop must be at most {MAX_STOPS} strings, none of them empty")
    return stops


def _message(message: dict[str, Any], index: int) -> dict[str, Any]:
    """A message as a chat template takes it: text parts joined, `developer` under its older name."""
    at = f"messages[{index}]"
    role = message.get("role")
    if role not in _ROLES:
        raise _invalid(f"{at}.role", f"role must be one of {', '.join(_ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{at}.content[{number}]") for number, part in enumerate(content))
    if not (isinstance(content, str) or (content is None and role == "assistant" and message.get("tool_calls"))):
        raise _invalid(f"{at}.content", "content must be a string or a list of text parts")
    return message | {"role": "system" if role == "developer" else role, "content": content}


def _part(part: object, at: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise _invalid(at, 'only parts like {"type": "text", "text": "..."} are supported')
    return text


def _prompts(prompt: str | list[Any]) -> list[Prompt]:
    if isinstance(prompt, str):
        return [TextPrompt(prompt)]
    if _is_tokens(prompt):
        return [TokensPrompt(prompt)]
    prompts: list[Prompt] = []
    for item in prompt:
        if isinstance(item, str):
            prompts.append(TextPrompt(item))
        elif isinstance(item, list) and _is_tokens(item):
            prompts.append(TokensPrompt(item))
    if len(prompts) != len(prompt) or not prompts:
        raise _invalid("prompt", "prompt must be a string, token ids, or a non-empty list of either")
    return prompts


def _is_tokens(items: list[Any]) -> bool:
    return bool(items) and all(type(item) is int and 0 <= item < 2**31 for item in items)


_UNKNOWN_FIELD = re.compile(r"unknown field `([^`]*)`")
_MISSING_FIELD = re.compile(r"missing required field `([^`]*)`")
_PATH = re.compile(r" - at `\$\.?([^`]*)`$")


def _explain(message: str) -> RequestError:
    """A decoder's finding in OpenAI's words."""
    path = match[1] if (match := _PATH.search(message)) else ""
    if unknown := _UNKNOWN_FIELD.search(message):
        name = f"{path}.{unknown[1]}" if path else unknown[1]
        return RequestError(f"Unrecognized parameter: {name}", param=name, reason="unknown_parameter")
    if missing := _MISSING_FIELD.search(message):
        name = missing[1]
        return RequestError(f"Missing required parameter: {name}", param=name, reason="missing_required_parameter")
    finding = _PATH.sub("", message).replace("`", "")
    return RequestError(f"Invalid value for {path}: {finding}", param=path or None, reason="invalid_value")


def _invalid(param: str, message: str) -> RequestError:
    return RequestError(message, param=param, reason="invalid_value")
