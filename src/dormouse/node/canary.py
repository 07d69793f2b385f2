"""The canary: one known question, by which a restored worker is judged before anybody gets an answer from it.

Before a worker is captured it is asked, and its answer is stored with the snapshot. After a restore it is asked again:
a worker that runs but has lost its mind (memory that is not what it was) answers otherwise. The question costs one
token, and what it makes the restored process read from disk, the first request need not read any more.
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
_SAMPLING = Sampling(max_tokens=1, temperature=0.0, logprobs=0)
_TOLERANCE = 0.05


class Answer(msgspec.Struct, frozen=True):
    """The first token, and how sure the model was of it. A model that ends at once has none."""

    tokens: list[int]
    logprob: float = 0.0

    def fits(self, other: Answer) -> bool:
        """Whether two answers are the same, but for how sums are rounded."""
        return self.tokens == other.tokens and abs(self.logprob - other.logprob) <= _TOLERANCE


async def ask(link: WorkerLink) -> str | None:
    """The worker's answer as text; None when it can't take the question, or is sure of nothing (its numbers are not
    finite, which text can't say and no answer fits). Raises EngineError."""
    tokens: list[int] = []
    logprob = 0.0
    try:
        async for event in link.generate(_QUESTION, _SAMPLING):
            if isinstance(event, Delta):
                tokens += event.token_ids
                logprob += sum(position[0].logprob for position in event.logprobs or ())
            else:
                assert isinstance(event, Finished)
    except RequestError:
        return None
    if not math.isfinite(logprob):
        return None
    return msgspec.json.encode(Answer(tokens, round(logprob, 4))).decode()


async def judge(link: WorkerLink, expected: str, what: str) -> None:
    """Ask a restored worker; raises SnapshotError when it does not answer as it did before its capture."""
    found = await ask(link)
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
