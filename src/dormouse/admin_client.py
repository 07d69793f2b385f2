"""The command line's way to the node that runs on a data folder: requests to its admin socket (gateway/admin.py)."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dormouse import errors
from dormouse.errors import BusyError, DormouseError, HostError, StoppingError
from dormouse.node.presence import ADMIN_SOCKET, short_path


def ask_node(run_dir: Path, method: str, *parts: str, query: str = "") -> Any:
    """The JSON that the running node answers to `/admin/PARTS`; takes as long as the node takes.

    Raises HostError when no node runs, StoppingError when it ends before it has answered, and what it refused with.
    """
    target = "/".join(("/admin", *(quote(part, safe="") for part in parts)))
    connection = _Connection(run_dir)
    try:
        connection.request(method, f"{target}?{query}" if query else target)
        response = connection.getresponse()
        body = json.loads(response.read())
    except (http.client.HTTPException, ConnectionError, ValueError) as error:
        raise StoppingError("the node ended before it had answered", remedy="Look into its log") from error
    finally:
        connection.close()
    if response.status >= 400:
        raise _as_error(body["error"], response.headers.get("retry-after"))
    return body


class _Connection(http.client.HTTPConnection):
    """HTTP over the admin socket of a run folder."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__("localhost")
        self._run_dir = run_dir

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with short_path(self._run_dir) as folder:
                self.sock.connect(f"{folder}/{ADMIN_SOCKET}")
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise HostError(
                f"no node runs on the data folder {self._run_dir.parent}",
                remedy="Start one with `dormouse serve`, or name another folder with --data-dir",
            ) from error
        except PermissionError as error:
            raise HostError(
                f"the node of {self._run_dir.parent} belongs to another user", remedy="Run as that user"
            ) from error


def _as_error(body: dict[str, Any], retry_after: str | None) -> DormouseError:
    """The error of the class it was raised with."""
    if body["code"] == BusyError.code:
        return BusyError(body["message"], retry_after=float(retry_after or 1))
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DormouseError)]
    kinds = {kind.code: kind.__name__ for kind in classes}
    return errors.of_kind(kinds.get(body["code"], "DormouseError"), body["message"], "")
