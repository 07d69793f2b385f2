"""What every engine says about a request it can't take: in OpenAI's words where it has some."""

from __future__ import annotations

from dormouse.engine.messages import Failed
from dormouse.errors import BusyError, DormouseError, RequestError

MAX_IN_FLIGHT = 1024


def check_room(in_flight: int) -> None:
    """Raise BusyError when an engine has as many requests as it may hold."""
    if in_flight >= MAX_IN_FLIGHT:
        raise BusyError(f"the engine has {in_flight} requests in flight already", retry_after=1)


def context_overflow(context: int, tokens: int, what: str) -> RequestError:
    """The error of a prompt (`what` is "prompt" or "messages") that leaves no room for an answer."""
    return RequestError(
        f"This model's maximum context length is {context} tokens. However, your {what} resulted in {tokens} tokens",
        param=what,
        reason="context_length_exceeded",
        remedy=f"Please reduce the length of the {what}",
    )


def failed(request_id: str, error: DormouseError) -> Failed:
    """An error as the message that ends a request."""
    bad = isinstance(error, RequestError)
    return Failed(
        id=request_id,
        message=str(error),
        reason=error.reason if isinstance(error, RequestError) else error.code,
        bad_request=bad,
        param=error.param if isinstance(error, RequestError) else None,
    )
