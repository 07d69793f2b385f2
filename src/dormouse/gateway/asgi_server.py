"""uvicorn as the gateway uses it: quiet, without signal handlers of its own, on sockets that are open already."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

_CUT_OFF = 1


class AsgiServer(uvicorn.Server):
    """Serves one app; `on_started` is called once requests are answered. Its own signal handlers would close the
    listener at once; here whoever runs it sets `should_exit`."""

    def __init__(self, app: ASGIApp, on_started: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_CUT_OFF,
            )
        )
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()
