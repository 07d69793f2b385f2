"""How a token is chosen from a model's logits, reproducibly.

Every random choice uses one number in [0, 1) that depends on nothing but the request's seed and the position of the
token in the answer (`uniform`). So a request gives the same tokens whatever else runs beside it, however often it is
preempted and recomputed, and in whichever process, and a snapshot carries no generator state that two replicas
restored from it would share.

`choose` and `alternatives` take one row of raw logits (a torch tensor, any device) and use only its methods, so this
module is imported without torch by the engines that have no model.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from dormouse.engine.messages import Sampling
from dormouse.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOGPROBS = 20
MAX_STOPS = 64


def check_sampling(sampling: Sampling) -> None:
    """Raise RequestError when a value is outside its range."""
    rules: tuple[tuple[bool, str, str], ...] = (
        (sampling.max_tokens >= 1, "max_tokens", "at least 1"),
        (0 <= sampling.temperature <= 100, "temperature", "between 0 and 100"),
        (0 < sampling.top_p <= 1, "top_p", "more than 0 and at most 1"),
        (sampling.top_k >= 0, "top_k", "0 (off) or more"),
        (all(sampling.stop) and len(sampling.stop) <= MAX_STOPS, "stop", f"at most {MAX_STOPS} non-empty strings"),
        (sampling.logprobs is None or 0 <= sampling.logprobs <= MAX_LOGPROBS, "logprobs", f"0 to {MAX_LOGPROBS}"),
    )
    for holds, name, allowed in rules:
        if not holds:
            raise RequestError(
                f"{name} is {getattr(sampling, name)!r}, but must be {allowed}", param=name, reason="invalid_value"
            )


def uniform(seed: int, position: int) -> float:
    """The random number of one position of one request: 53 bits of a hash, in [0, 1)."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def choose(logits: Tensor, sampling: Sampling, draw: float) -> int:
    """The token id that `draw` selects from the distribution which `sampling` makes of `logits`.

    Temperature first, then top-k, then top-p (both keep the most likely token), then the inverse of the cumulative
    distribution, in double precision so that small differences of the logits move as few choices as possible.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    scores = logits.double() / sampling.temperature
    ids = None
    if 0 < sampling.top_k < scores.numel():
        scores, ids = scores.topk(sampling.top_k)
    elif sampling.top_p < 1:
        scores, ids = scores.sort(descending=True, stable=True)
    probabilities = scores.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    if sampling.top_p < 1 and ids is not None:
        kept = int((cumulative - probabilities < sampling.top_p * cumulative[-1]).sum())
        cumulative = cumulative[: max(kept, 1)]  # logits that are no numbers keep none
    below = int((cumulative <= draw * cumulative[-1]).sum())
    index = min(below, cumulative.numel() - 1)
    return index if ids is None else int(ids[index])


def alternatives(logits: Tensor, chosen: int, count: int) -> list[tuple[int, float]]:
    """The chosen token and the `count` most likely ones, with natural log probabilities of the raw distribution."""
    logprobs = logits.log_softmax(-1)
    found = [(chosen, float(logprobs[chosen]))]
    if count:
        values, ids = logprobs.topk(min(count, logprobs.numel()))
        found += zip(ids.tolist(), values.tolist(), strict=True)
    return found
