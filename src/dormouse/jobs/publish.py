"""Published ports: connections to a port here go to the job's own network, to its replicas in turn.

    client --TCP--> keeper's listener --accept--> a socket made inside the replica's cell --connect--> its port

One thread with an event loop; each connection holds at most two small buffers, and there are at most so many at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import threading
from collections.abc import Callable, Sequence

from dormouse.errors import ConfigError, SnapshotError
from dormouse.jobs.record import Publish

log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 512
_BUFFER = 1 << 16
_CONNECT_TIMEOUT = 10.0

MakeSocket = Callable[[int, int, int], socket.socket]


class Publisher:
    """Listens from its creation on; forwards once `start` has been told where to. Raises ConfigError for a port that
    is in use."""

    def __init__(self, ports: Sequence[Publish]) -> None:
        self._ports: list[tuple[Publish, socket.socket]] = []
        self._targets: Callable[[], Sequence[MakeSocket]] = tuple
        self._turn = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="publish", daemon=True)
        try:
            for port in ports:
                self._ports.append((port, _listen(port)))
        except BaseException:
            self._close_listeners()
            self._loop.close()
            raise

    @property
    def addresses(self) -> list[str]:
        """HOST:PORT of every listener."""
        found = []
        for port, listener in self._ports:
            host = f"[{port.host}]" if ":" in port.host else port.host
            found.append(f"{host}:{listener.getsockname()[1]}")
        return found

    def start(self, targets: Callable[[], Sequence[MakeSocket]]) -> None:
        """Forward to `targets`, asked anew for each connection."""
        self._targets = targets
        if self._ports:
            self._thread.start()

    def close(self) -> None:
        """End every connection."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        else:
            self._loop.close()
        self._close_listeners()

    def _close_listeners(self) -> None:
        for _port, listener in self._ports:
            listener.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        limit = asyncio.Semaphore(_MAX_CONNECTIONS)
        for port, listener in self._ports:
            self._loop.create_task(self._accept(port, listener, limit))
        self._loop.run_forever()
        pending = asyncio.all_tasks(self._loop)
        for task in pending:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    async def _accept(self, port: Publish, listener: socket.socket, limit: asyncio.Semaphore) -> None:
        tasks: set[asyncio.Task[None]] = set()
        while True:
            await limit.acquire()
            try:
                client, _ = await self._loop.sock_accept(listener)
            except OSError as error:
                log.warning("a connection to port %d was not accepted: %s", port.port, error)
                limit.release()
                await asyncio.sleep(0.1)
                continue
            task = self._loop.create_task(self._forward(client, port))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            task.add_done_callback(lambda _task: limit.release())

    async def _forward(self, client: socket.socket, port: Publish) -> None:
        with client:
            _keep_alive(client)
            try:
                inner = await self._connect(port)
            except OSError as error:
                log.debug("port %d: nobody listens inside: %s", port.inner, error)
                return
            with inner:
                await asyncio.gather(self._copy(client, inner), self._copy(inner, client))

    async def _connect(self, port: Publish) -> socket.socket:
        targets = self._targets()
        if not targets:
            raise ConnectionRefusedError("no replica runs")
        make = targets[next(self._turn) % len(targets)]
        try:
            return await self._connect_to(make, socket.AF_INET, ("127.0.0.1", port.inner))
        except ConnectionRefusedError:
            return await self._connect_to(make, socket.AF_INET6, ("::1", port.inner))

    async def _connect_to(self, make: MakeSocket, family: int, address: tuple[str, int]) -> socket.socket:
        try:
            inner = await self._loop.run_in_executor(None, make, family, socket.SOCK_STREAM, 0)
        except SnapshotError as error:
            raise ConnectionRefusedError(str(error)) from error
        inner.setblocking(False)
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT):
                await self._loop.sock_connect(inner, address)
        except BaseException:
            inner.close()
            raise
        return inner

    async def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # a reset ends this direction; the end below is passed on either way
            while data := await self._loop.sock_recv(source, _BUFFER):
                await self._loop.sock_sendall(sink, data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def _keep_alive(client: socket.socket) -> None:
    """A client that has gone without a word is noticed within minutes, and its place is free again."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 30), (socket.TCP_KEEPCNT, 4)):
        client.setsockopt(socket.IPPROTO_TCP, option, value)


def _listen(port: Publish) -> socket.socket:
    try:
        family, _type, _protocol, _name, address = socket.getaddrinfo(
            port.host, port.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"{port.host}:{port.port} can't be published: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{port.host}:{port.port} can't be published: {error.strerror}", remedy="Choose another with --publish"
        ) from error
    return listener
