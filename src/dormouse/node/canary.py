"""The canary: one known question, by which a restored worker is judged before anybody gets an answer from it.

Before a worker is captured it is asked, and its answer is stored with the snapshot. After a restore it is asked again:
a worker that runs but has lost its mind (memory that is not what it was) answers otherwise. The question costs one
token, and what it makes the restored process read from disk, the first request need not read any more. On a GPU it
costs three: the first is computed as prompts are, those after it by captured CUDA graphs.
"""

from __future__ import annotations

import math

import msgspec

from dormouse.engine.messages import Delta, Finished, Sampling, TextPrompt
from dormouse.errors import RequestError, SnapshotError
from dormouse.node.link import WorkerLink

FIELD = "canary"
"""Where the answer is kept in the snapshot's compatibility key."""

_QUESTION = TextPrompt("The capital of France is")
_TOLERANCE = 0.05  # for each token


def tokens_on(device: str) -> int:
    """How many tokens are asked for."""
    return 1 if device == "cpu" else 3


class Answer(msgspec.Struct, frozen=True):
    """The first tokens, and how sure the model was of them all. A model that ends at once has none."""

    tokens: list[int]
    logprob: float = 0.0

    def fits(self, other: Answer) -> bool:
        """Whether two answers are the same, but for how sums are rounded."""
        room = _TOLERANCE * max(len(self.tokens), 1)
        return self.tokens == other.tokens and abs(self.logprob - other.logprob) <= room


async def ask(link: WorkerLink, *, tokens: int = 1) -> str | None:
    """The worker's answer as text; None when it can't take the question, or is sure of nothing (its numbers are not
    finite, which text can't say and no answer fits). Raises EngineError."""
    made: list[int] = []
    logprob = 0.0
    try:
        async for event in link.generate(_QUESTION, Sampling(max_tokens=tokens, temperature=0.0, logprobs=0)):
            if isinstance(event, Delta):
                made += event.token_ids
                logprob += sum(position[0].logprob for position in event.logprobs or ())
            else:
                assert isinstance(event, Finished)
    except RequestError:
        return None
    if not math.isfinite(logprob):
        return None
    return msgspec.json.encode(Answer(made, round(logprob, 4))).decode()


async def judge(link: WorkerLink, expected: str, what: str, *, tokens: int = 1) -> None:
    """Ask a restored worker; raises SnapshotError when it does not answer as it did before its capture."""
    found = await ask(link, tokens=tokens)
    if found is None or not _parse(expected).fits(_parse(found)):
        raise SnapshotError(
            f"the worker restored from {what} answers a known question with {found}, once it was {expected}",
            remedy="The model starts anew; if it happens again, run `dormouse verify` and test this machine's memory",
        )


def _parse(text: str) -> Answer:
    try:
        return msgspec.json.decode(text, type=Answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SnapshotError(f"the canary's answer {text!r} is malformed: {error}") from error
