"""For programs that want to know when they are captured and restored: functions to run before and after.

    from dormouse import hooks
    hooks.on_capture(close_database)      # may raise: the capture is refused then
    hooks.on_restore(open_database)       # also when the capture failed or left the program running

Standard library only, and nothing else of the package is needed: this file may be copied into a program. It listens on
the abstract unix socket `dormouse-hooks-PID`; `dormouse checkpoint` and `dormouse restore` connect, send one line,
`before-capture` or `after-restore`, and wait for `ok` or `error: why`, then for the end of the connection. The
functions run in a thread of their own, in the order they were given. A forked child starts without hooks.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable

Hook = Callable[[], object]

_MAX_LINE = 100
_PATIENCE = 10.0

_before_capture: list[Hook] = []
_after_restore: list[Hook] = []
_lock = threading.Lock()
_listener: socket.socket | None = None


def on_capture(function: Hook) -> Hook:
    """Run `function` before each capture; what it raises refuses the capture. Usable as a decorator."""
    return _add(_before_capture, function)


def on_restore(function: Hook) -> Hook:
    """Run `function` after each restore, and after a capture that failed or left this process running. Usable as a
    decorator."""
    return _add(_after_restore, function)


def _add(functions: list[Hook], function: Hook) -> Hook:
    global _listener  # noqa: PLW0603 - one process has one listener
    with _lock:
        functions.append(function)
        if _listener is None:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(f"\0dormouse-hooks-{os.getpid()}")
            listener.listen(1)
            threading.Thread(target=_serve, args=(listener,), name="dormouse-hooks", daemon=True).start()
            _listener = listener
    return function


def _serve(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(_PATIENCE)
            try:
                connection.sendall(_answer(_read_line(connection)).encode() + b"\n")
            except OSError:
                continue  # the caller has gone; the next one is served all the same


def _read_line(connection: socket.socket) -> str:
    data = b""
    while not data.endswith(b"\n") and len(data) < _MAX_LINE:
        part = connection.recv(_MAX_LINE)
        if not part:
            break
        data += part
    return data.decode("ascii", "replace").strip()


def _answer(line: str) -> str:
    functions = {"before-capture": _before_capture, "after-restore": _after_restore}.get(line)
    if functions is None:
        return f"error: unknown request {line!r}"
    try:
        for function in list(functions):
            function()
    except Exception as error:  # noqa: BLE001 - whatever it is, the caller is to hear of it
        return "error: " + " ".join(f"{type(error).__name__}: {error}".split())[:1000]
    return "ok"


def _forget() -> None:
    """In a forked child: the parent's listener is not ours, and its thread is not here."""
    global _listener, _lock  # noqa: PLW0603
    _lock = threading.Lock()
    _before_capture.clear()
    _after_restore.clear()
    if _listener is not None:
        _listener.close()
        _listener = None


os.register_at_fork(after_in_child=_forget)
