"""Shows long work on stderr: a live bar in a terminal, a line per step in a log, nothing when silent.

Work reports through two plain callables, so nothing below the CLI knows of terminals: `step("reading tensors")` for
what begins now, and `amount("verify")(done, total)` for how far something measurable is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

Amount = Callable[[int, int], None]


class Reporter:
    """The shower. Use it as a context manager around the work."""

    def __init__(self, console: Console, *, silent: bool) -> None:
        self._console = console
        self.silent = silent
        self._live: Progress | None = None
        self._step: TaskID | None = None
        self._amounts: dict[str, Amount] = {}

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self.silent:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), DownloadColumn())
            self._live = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def step(self, text: str) -> None:
        """What begins now."""
        if self.silent:
            return
        if self._live is None:
            self._console.print(text, markup=False, highlight=False)
            return
        if self._step is not None:
            self._live.remove_task(self._step)
        self._step = self._live.add_task(text, total=None)

    def progress(self, step: str, done: int, total: int) -> None:
        """How far a named step is, in bytes."""
        if step not in self._amounts:
            self._amounts[step] = self.amount(step)
        self._amounts[step](done, total)

    def amount(self, text: str) -> Amount:
        """A bar of bytes; call the result with (bytes done, bytes in all) as often as you like."""
        live = self._live
        if live is None:
            self.step(text)
            return lambda _done, _total: None
        task = live.add_task(text, total=None)
        return lambda done, total: live.update(task, completed=done, total=total)
