"""From token events to OpenAI's response objects, whole or in chunks. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dormouse.engine.messages import Delta, Finished, TextPrompt, TokenLogprob
from dormouse.gateway.requests import Job


@dataclass
class _Choice:
    offset: int
    texts: list[str] = field(default_factory=list)
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    end: Finished | None = None


class Answer:
    """Collects the events of one job's choices. A chunk tells what one event added, `whole` tells all of it."""

    def __init__(self, job: Job, *, identity: str, created: int) -> None:
        self._job = job
        self._chat = job.kind == "chat"
        self._identity = f"{'chatcmpl' if self._chat else 'cmpl'}-{identity}"
        self._created = created
        self._choices = [
            _Choice(offset=len(prompt.text) if isinstance(prompt, TextPrompt) else 0) for prompt, _seed in job.choices
        ]

    def collect(self, index: int, event: Delta | Finished) -> None:
        """Add an event of a choice to the whole."""
        choice = self._choices[index]
        if isinstance(event, Finished):
            choice.end = event
        else:
            choice.texts.append(event.text)
            choice.logprobs += event.logprobs or ()

    def whole(self) -> dict[str, Any]:
        """The response of a request without streaming."""
        body = self._envelope("chat.completion" if self._chat else "text_completion")
        body["choices"] = [self._whole_choice(index, choice) for index, choice in enumerate(self._choices)]
        return body | {"usage": self._usage()}

    def opening(self) -> list[dict[str, Any]]:
        """The chunks that come before any event: in a chat, who speaks."""
        if not self._chat:
            return []
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(len(self._choices))]

    def chunk(self, index: int, event: Delta | Finished) -> dict[str, Any] | None:
        """The chunk of an event; None when it adds nothing to be seen."""
        if isinstance(event, Finished):
            self._choices[index].end = event
            return self._chunk(index, {} if self._chat else "", finish_reason=event.reason)
        if not event.text and not event.logprobs:
            return None
        logprobs = None
        if event.logprobs is not None:
            logprobs = self._logprobs(event.logprobs, self._choices[index])
        return self._chunk(index, {"content": event.text} if self._chat else event.text, logprobs=logprobs)

    def closing(self) -> list[dict[str, Any]]:
        """The chunks after the last event: the usage, if it was asked for."""
        if not self._job.include_usage:
            return []
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return [self._envelope(kind) | {"choices": [], "usage": self._usage()}]

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self._identity, "object": kind, "created": self._created, "model": self._job.model}

    def _chunk(
        self,
        index: int,
        content: dict[str, str] | str,
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        body = self._envelope("chat.completion.chunk" if self._chat else "text_completion")
        choice = {"index": index, "logprobs": logprobs, "finish_reason": finish_reason}
        body["choices"] = [choice | ({"delta": content} if self._chat else {"text": content})]
        if self._job.include_usage:
            body["usage"] = None
        return body

    def _whole_choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        assert choice.end is not None
        text = "".join(choice.texts)
        logprobs = self._logprobs(choice.logprobs, choice) if self._job.logprobs is not None else None
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": choice.end.reason}

    def _logprobs(self, positions: list[list[TokenLogprob]], choice: _Choice) -> dict[str, Any]:
        return _chat_logprobs(positions) if self._chat else _completion_logprobs(positions, choice)

    def _usage(self) -> dict[str, int]:
        """Tokens of all choices; a prompt that was asked several times is counted once, as OpenAI does."""
        ends = [choice.end for choice in self._choices if choice.end is not None]
        prompts = {id(prompt): end.prompt_tokens for (prompt, _seed), end in zip(self._job.choices, ends, strict=True)}
        prompt_tokens = sum(prompts.values())
        completion_tokens = sum(end.completion_tokens for end in ends)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }


def _chat_logprobs(positions: list[list[TokenLogprob]]) -> dict[str, Any]:
    content = []
    for own, *alternatives in positions:
        content.append(_chat_token(own) | {"top_logprobs": [_chat_token(token) for token in alternatives]})
    return {"content": content, "refusal": None}


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    # A token that is a part of a character has no text of its own, so its bytes are not known here.
    known = "\ufffd" not in token.text
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode()) if known else None}


def _completion_logprobs(positions: list[list[TokenLogprob]], choice: _Choice) -> dict[str, Any]:
    offsets = []
    for own, *_alternatives in positions:
        offsets.append(choice.offset)
        choice.offset += len(own.text)
    return {
        "tokens": [position[0].text for position in positions],
        "token_logprobs": [position[0].logprob for position in positions],
        "top_logprobs": [{token.text: token.logprob for token in position[1:]} for position in positions],
        "text_offset": offsets,
    }
