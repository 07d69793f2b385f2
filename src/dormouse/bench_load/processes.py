"""The child of one row, seen from the benchmark: started, told what to do, watched, ended.

A child that dies, hangs or breaks the protocol is a ChildError with the end of what it wrote; never the end of the
benchmark.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

_WATCH_INTERVAL = 0.01
_TOLD = 300


class ChildError(Exception):
    """What happened to a child. `missing`: its package is not there, which is no failure."""

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


class Child:
    """`python -m MODULE WORDS...` in a process group of its own. `close` ends it, whatever state it is in."""

    def __init__(self, module: str, *words: str, environment: Mapping[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the child)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **(environment or {})},
            process_group=0,
        )
        self._rest = b""
        self.peak_growth = 0

    def tell(self, line: bytes) -> None:
        """Send one line. Raises ChildError when nobody is there to read it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise ChildError(f"it ended: {self._last_words()}") from error

    def hear(self, key: str, seconds: float, *, watch: bool = False) -> Any:
        """The value of the next message, which must be of that key. `watch` samples the child's memory until then.
        Raises ChildError: it took longer than `seconds`, it ended, or it told of an error."""
        message = msgspec.json.decode(self._line(time.monotonic() + seconds, seconds, watch), type=dict[str, Any])
        if "missing" in message:
            raise ChildError(message["missing"], missing=True)
        if key not in message:
            raise ChildError(str(message.get("error", message))[:_TOLD])
        return message[key]

    def _line(self, deadline: float, allowed: float, watch: bool) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        base = self._private_memory()
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ChildError(f"it was not done after {allowed:.0f} s")
            readable, _, _ = select.select([descriptor], [], [], _WATCH_INTERVAL if watch else left)
            if watch:
                self.peak_growth = max(self.peak_growth, self._private_memory() - base)
            if readable:
                data = os.read(descriptor, 1 << 16)
                if not data:
                    raise ChildError(f"it ended: {self._last_words()}")
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _private_memory(self) -> int:
        """Memory of its own: anonymous and shared, pinned included; no pages of files."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return 0
        return sum(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(_PRIVATE))

    def _last_words(self) -> str:
        """How it ended, and the last line it wrote to stderr."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        code = self._process.returncode
        ended = "it closed its output" if code is None else f"signal {-code}" if code < 0 else f"status {code}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return f"{ended}; {next((line for line in reversed(lines) if line.strip()), 'it wrote nothing')}"[:_TOLD]

    def close(self) -> None:
        """End it and wait until it is gone, with the memory it had."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            with contextlib.suppress(OSError):  # a line nobody read
                stream.close()


_PRIVATE = ("RssAnon:", "RssShmem:")
