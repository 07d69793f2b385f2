"""The Engine protocol: what a worker asks of whatever runs the model.

States: new -> loaded -> (quiesced <-> loaded) -> closed. `submit` and `cancel` return at once and may be called from
one thread only (the worker's main loop); `emit` is called from any thread of the engine, in order for one request.
For each submitted request `emit` gets any number of `Delta` and then exactly one `Finished` or `Failed`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from dormouse.engine.messages import Delta, Failed, Finished, Generate, Load, Loaded

Emit = Callable[[Delta | Finished | Failed], None]


class Engine(Protocol):
    """One loaded model that generates."""

    def load(self, spec: Load, emit: Emit) -> Loaded:
        """Load the model and make it ready for its first token. Blocks. Raises DormouseError."""

    def submit(self, request: Generate) -> None:
        """Start a generation; errors of the request come back as `Failed`."""

    def cancel(self, request_id: str) -> None:
        """Stop a generation; unknown ids are ignored."""

    def quiesce(self) -> None:
        """Block until nothing runs, then let go of all that must not be in a snapshot (KV contents, sockets, files).
        After it returns no thread of the engine does anything until `resume`."""

    def resume(self) -> None:
        """Undo `quiesce`: the next `submit` works as if nothing had happened."""

    def close(self) -> None:
        """Stop all threads; the engine is not used again."""
