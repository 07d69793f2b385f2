"""The one builder of error bodies: whatever goes wrong, on whichever route, the client gets OpenAI's shape.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

A DormouseError is written for its reader and shown as it is. Anything else is a bug of ours: the client gets a
sentence without internals, the log gets the traceback.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from dormouse.errors import BusyError, DormouseError, NotFoundError, RequestError, StoppingError

STOPPING_RETRY_AFTER = 5.0


class HttpProblem(Exception):
    """An answer other than success that is about HTTP itself: credentials, methods, sizes."""

    def __init__(self, status: int, message: str, *, code: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = headers or {}


def status_of(error: Exception) -> int:
    """The HTTP status of an error."""
    if isinstance(error, HttpProblem):
        return error.status
    return error.http_status if isinstance(error, DormouseError) else 500


def problem_body(error: Exception) -> dict[str, Any]:
    """The error as a JSON object."""
    message, param, code = "The server failed to answer; the reason is in its log", None, "internal_error"
    if isinstance(error, HttpProblem):
        message, code = error.message, error.code
    elif isinstance(error, RequestError):
        message, param, code = str(error), error.param, error.reason
    elif isinstance(error, NotFoundError):
        message, param, code = str(error), "model", "model_not_found"
    elif isinstance(error, DormouseError):
        message, code = str(error), error.code
    return {"error": {"message": message, "type": _type(status_of(error)), "param": param, "code": code}}


def problem_response(error: Exception) -> Response:
    """The error as a response."""
    headers = dict(error.headers) if isinstance(error, HttpProblem) else {}
    retry_after = _retry_after(error)
    if retry_after is not None:
        headers["retry-after"] = str(math.ceil(retry_after))
    return json_response(problem_body(error), status=status_of(error), headers=headers)


def json_response(body: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def _retry_after(error: Exception) -> float | None:
    if isinstance(error, BusyError):
        return error.retry_after
    return STOPPING_RETRY_AFTER if isinstance(error, StoppingError) else None


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
