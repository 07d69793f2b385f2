"""The gateway as a process: listens, says so, and stops in order.

SIGTERM or SIGINT -> new work gets 503 -> running requests finish, up to `grace` -> workers end -> exit 0
the same again    -> running requests are cut off at once
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable, Collection, Iterator, Mapping

from dormouse.config import API_KEYS_VARIABLE, ServeConfig, load_api_keys
from dormouse.data_dir import DataDir
from dormouse.errors import ConfigError
from dormouse.gateway.access import Gate
from dormouse.gateway.admin import serve_admin
from dormouse.gateway.app import create_app
from dormouse.gateway.asgi_server import AsgiServer
from dormouse.node.assemble import assemble_node
from dormouse.node.node import Node

log = logging.getLogger(__name__)

_BACKLOG = 2048


def run_server(config: ServeConfig, *, environ: Mapping[str, str] = os.environ) -> int:
    """Serve until a signal says stop; the exit status. Raises DormouseError when serving can't begin."""
    keys = load_api_keys(config, environ)
    check_exposure(config, keys)
    with listen(config.host, config.port) as listener:
        asyncio.run(_serve_node(config, keys, listener))
    return 0


def check_exposure(config: ServeConfig, keys: Collection[str]) -> None:
    """Refuse to be open to others without keys. Raises ConfigError."""
    if not keys and not _is_loopback(config.host):
        raise ConfigError(
            f"host {config.host} can be reached from other machines, but there are no API keys",
            remedy=f"Set api_keys_file or {API_KEYS_VARIABLE}, or listen on 127.0.0.1",
        )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ConfigError when the address can't be had."""
    try:
        family, kind, proto, _name, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigError(f"host {host} is not an address of this machine: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}",
            remedy="Stop what uses the port, or choose another one with --port (0 takes any free one)",
        ) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve_app(gate: Gate, listener: socket.socket, *, grace: float, announce: Callable[[str], None]) -> None:
    """Serve until a signal; `announce` is called with the URL once requests are answered."""
    server = AsgiServer(gate, lambda: announce(address_of(listener)))
    with _signals() as (stop, hurry):
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        gate.draining = True
        waits = {asyncio.create_task(gate.idle.wait()), asyncio.create_task(hurry.wait())}
        await asyncio.wait(waits, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        gate.cut_off.set()
        server.should_exit = True
        for task in (stopping, *waits):
            task.cancel()
        await serving


async def _serve_node(config: ServeConfig, keys: Mapping[str, str], listener: socket.socket) -> None:
    async with await assemble_node(config) as node, serve_admin(node, DataDir(config.data_dir).run):
        await serve_app(
            create_app(node, config, keys), listener, grace=config.grace, announce=lambda url: _announce(node, url)
        )
        log.info("stopping")


def _announce(node: Node, url: str) -> None:
    node.address = url
    print(f"listening on {url}", flush=True)


@contextlib.contextmanager
def _signals() -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """Events of the first and the second signal to stop."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop, hurry
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
