"""The Engine protocol: what a worker asks of whatever runs the model.

States: new [-> prepared] -> loaded -> (quiesced <-> loaded) -> closed; a prepared engine may be snapshotted too.
`submit` and `cancel` return at once and may be called from one thread only (the worker's main loop); `emit` is called
from any thread of the engine, in order for one request. For each submitted request `emit` gets any number of `Delta`
and then exactly one `Finished` or `Failed`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from dormouse.engine.arena import Attached, SegmentArena
from dormouse.engine.messages import (
    AdapterReply,
    Delta,
    Failed,
    Finished,
    Generate,
    Load,
    LoadAdapter,
    Loaded,
    Prepare,
)
from dormouse.phases import Phases

Emit = Callable[[Delta | Finished | Failed | AdapterReply], None]


class Engine(Protocol):
    """One loaded model that generates."""

    def prepare(self, spec: Prepare) -> Phases:
        """Do all of a load that any model of this engine needs, and nothing that depends on one. Blocks; leaves no
        thread that does anything. Raises DormouseError."""

    def load(self, spec: Load, arena: SegmentArena, emit: Emit) -> Loaded:
        """Load the model, whose weights are in the arena's segment, and make it ready for its first token. The weights
        may still be on their way: `arena.wait()` comes before the first look at a value. Blocks. Raises DormouseError.
        """

    def submit(self, request: Generate) -> None:
        """Start a generation; errors of the request come back as `Failed`."""

    def cancel(self, request_id: str) -> None:
        """Stop a generation; unknown ids are ignored."""

    def load_adapter(self, spec: LoadAdapter, segment: Attached) -> None:
        """Have an adapter for the requests that come after its `AdapterLoaded`. The segment is the engine's from now
        on, whatever becomes of it. Raises DormouseError when it does not fit; then all is as it was."""

    def unload_adapter(self, name: str) -> None:
        """Let go of an adapter and its segment; emit `AdapterUnloaded`, or `AdapterFailed` while a request uses it."""

    def quiesce(self) -> None:
        """Block until nothing runs, then let go of all that must not be in a snapshot (KV contents, sockets, files,
        adapters).
        After it returns no thread of the engine does anything until `resume`, and none looks at the segments, which
        are then unmapped."""

    def resume(self) -> None:
        """Undo `quiesce`: the next `submit` works as if nothing had happened. The segments are mapped again."""

    def close(self) -> None:
        """Stop all threads; the engine is not used again."""
