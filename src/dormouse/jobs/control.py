"""How the command line talks to keepers: one unix socket per job, one request and one answer per connection.

    DATA_DIR/run/jobs/NAME.sock (0600 in a 0700 folder)     request and answer are one line of JSON each

The keeper serves at most a few connections at once. A socket whose keeper has died refuses connections; whoever meets
it removes it. Sockets are reached through a descriptor of their folder, as their full path may be too long for one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from dormouse.data_dir import DataDir
from dormouse.errors import ConfigError, DormouseError, NotFoundError, SnapshotError

_MAX_LINE = 1 << 18
_MAX_REQUESTS = 8
_ASK_TIMEOUT = 5.0
_QUEUE_POLL = 0.05


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """What the command line may ask of a keeper."""

    verb: str
    replica: int | None = None
    leave_running: bool = False
    close_connections: bool = False
    hook_timeout: float = 30.0
    timeout: float = 600.0


Answer = dict[str, Any]
Handler = Callable[[Request, Callable[[], bool]], Answer]


class ControlSocket:
    """The keeper's side. `handler(request, still_there)` runs in a thread per connection and may raise DormouseError.
    Raises ConfigError when a job of that name runs."""

    def __init__(self, data_dir: DataDir, name: str) -> None:
        self._folder = jobs_folder(data_dir)
        self._name = name
        with _folder_lock(self._folder):
            if _reachable(self._folder, name):
                raise ConfigError(f"a job called {name} runs already", remedy="Choose another --name")
            (self._folder / f"{name}.sock").unlink(missing_ok=True)
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with _short_path(self._folder, name) as path:
                self._listener.bind(path)
                os.chmod(path, 0o600)  # noqa: PTH101 - through the folder's descriptor
            self._listener.listen(_MAX_REQUESTS)
        self._slots = threading.BoundedSemaphore(_MAX_REQUESTS)
        self._answering: set[threading.Thread] = set()

    def serve(self, handler: Handler) -> None:
        """Answer from now on."""
        threading.Thread(target=self._accept, args=(handler,), name="job-control", daemon=True).start()

    def close(self) -> None:
        """The job is over; those who have asked get their answers first."""
        (self._folder / f"{self._name}.sock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in list(self._answering):
            if thread.ident is not None:  # else it has not begun, and its asker finds the connection closed
                thread.join(_ASK_TIMEOUT)

    def _accept(self, handler: Handler) -> None:
        while True:
            self._slots.acquire()
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            thread = threading.Thread(target=self._answer, args=(connection, handler), name="job-request", daemon=True)
            self._answering.add(thread)
            thread.start()

    def _answer(self, connection: socket.socket, handler: Handler) -> None:
        try:
            with connection:
                connection.settimeout(_ASK_TIMEOUT)
                request = msgspec.json.decode(_read_line(connection), type=Request)
                try:
                    answer = msgspec.json.encode(handler(request, lambda: _still_there(connection)))
                except DormouseError as error:
                    answer = msgspec.json.encode(error_answer(error))
                except Exception as error:  # noqa: BLE001 - the asker is told, and the job runs on
                    words = ascii(f"unexpected {type(error).__name__}: {error}")
                    answer = msgspec.json.encode({"error": words, "remedy": "", "code": ""})
                connection.sendall(answer + b"\n")
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError, SnapshotError):
            return  # the asker has gone, or was none of ours
        finally:
            self._answering.discard(threading.current_thread())
            self._slots.release()


def ask(data_dir: DataDir, name: str, request: Request, *, timeout: float | None = _ASK_TIMEOUT) -> Answer:
    """A keeper's answer. Raises NotFoundError when no such job runs, or the error that the keeper answered with."""
    folder = jobs_folder(data_dir)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        _connect(connection, folder, name)
        connection.settimeout(timeout)
        try:
            connection.sendall(msgspec.json.encode(request) + b"\n")
            answer: Answer = msgspec.json.decode(_read_line(connection))
        except TimeoutError as error:
            raise SnapshotError(
                f"the keeper of job {name} has not answered within {timeout:g} s", remedy="Try again; else see its log"
            ) from error
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError, SnapshotError) as error:
            raise SnapshotError(f"the keeper of job {name} ended without an answer", remedy="See its log") from error
    if "error" in answer:
        raise error_in(answer)
    return answer


def _connect(connection: socket.socket, folder: Path, name: str) -> None:
    """Raises NotFoundError, or SnapshotError when the keeper has no ear for us."""
    deadline = time.monotonic() + _ASK_TIMEOUT
    connection.settimeout(_ASK_TIMEOUT)
    while True:
        try:
            with _short_path(folder, name) as path:
                connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NotFoundError(f"no job called {name} runs", remedy="`dormouse jobs` lists those that do") from error
        except BlockingIOError as error:  # its queue is full
            if time.monotonic() > deadline:
                raise SnapshotError(
                    f"the keeper of job {name} is busy with other requests", remedy="Try again in a while"
                ) from error
            time.sleep(_QUEUE_POLL)
        else:
            return


def running_jobs(data_dir: DataDir) -> list[Answer]:
    """The status of every job that runs; sockets of dead keepers are removed."""
    folder = jobs_folder(data_dir)
    found = []
    for path in sorted(folder.glob("*.sock")):
        try:
            found.append(ask(data_dir, path.stem, Request("status")))
        except NotFoundError:
            _remove_dead(folder, path.stem)
        except DormouseError as error:
            found.append({"name": path.stem, "error": error.message})
    return found


def free_name(data_dir: DataDir, name: str) -> str:
    """`name`, or with the first number behind it that makes it free. A hint only: the socket decides."""
    folder = jobs_folder(data_dir)
    if not _reachable(folder, name):
        return name
    return next(other for number in range(2, 10_000) if not _reachable(folder, other := f"{name[:58]}-{number}"))


def jobs_folder(data_dir: DataDir) -> Path:
    """Where the sockets are."""
    folder = data_dir.create().run / "jobs"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def error_answer(error: DormouseError) -> Answer:
    """The answer that an error is."""
    return {"error": error.message, "remedy": error.remedy, "code": error.code}


def error_in(answer: Answer) -> DormouseError:
    """The error that an answer is, of the kind it was."""
    kinds: list[type[DormouseError]] = [DormouseError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    kind = next((kind for kind in kinds if kind.code == answer["code"]), SnapshotError)
    try:
        return kind(answer["error"], remedy=answer["remedy"])
    except TypeError:  # a kind that needs more than words
        return SnapshotError(answer["error"], remedy=answer["remedy"])


def _remove_dead(folder: Path, name: str) -> None:
    with _folder_lock(folder):
        if not _reachable(folder, name):
            (folder / f"{name}.sock").unlink(missing_ok=True)


def _reachable(folder: Path, name: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, _short_path(folder, name) as path:
        try:
            probe.settimeout(_ASK_TIMEOUT)
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except (TimeoutError, BlockingIOError):
            return True  # its queue is full, so it lives
        return True


@contextlib.contextmanager
def _short_path(folder: Path, name: str) -> Iterator[str]:
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}.sock"
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read_line(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        part = connection.recv(_MAX_LINE)
        if not part or len(data) > _MAX_LINE:
            raise SnapshotError("the other side of a job's socket ended in the middle of a line")
        data += part
    return data


def _still_there(connection: socket.socket) -> bool:
    """Whether the asker still waits: at its end, a read gives nothing."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    if not poll.poll(0):
        return True
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except OSError:
        return False
