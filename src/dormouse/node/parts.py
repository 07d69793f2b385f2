"""What a node is given: the host checkpoint service, the models, the snapshots it may use, and who wants to be told.

Each is the smallest interface the node needs; the product's own parts fit as they are (assemble.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from dormouse.errors import DormouseError
from dormouse.node.page_cache import OnDisk
from dormouse.node.replica import Start
from dormouse.phases import Phases
from dormouse.schedule.cluster import StartPath
from dormouse.snapshot.capture import SNAPSHOT_KIND
from dormouse.snapshot.service import CaptureResult, WorkerHandle
from dormouse.transfer.handles import SegmentHandle

Evicted = Literal["weights", "process", "model"]
"""What went to make room: kept weights, a process that dozed, an idle model that was ready."""


class Host(Protocol):
    """`dormouse.snapshot.service.HostService`: see there for what each call promises."""

    @property
    def kept_weights(self) -> Mapping[str, int]: ...

    async def start_worker(
        self, *, log_path: Path, checkpoint: str | None = None, device: str = "cpu"
    ) -> WorkerHandle: ...

    async def capture(
        self, worker: WorkerHandle, *, model: str, key: dict[str, str], kind: str = SNAPSHOT_KIND, keep: bool = False
    ) -> CaptureResult: ...

    async def restore(
        self, snapshot_id: str, *, key: dict[str, str], checkpoint: str | None = None, device: str = "cpu"
    ) -> WorkerHandle: ...

    async def take_segment(
        self, worker: WorkerHandle, checkpoint: str, *, adapter: bool = True, device: str = "cpu"
    ) -> SegmentHandle: ...

    async def drop_segment(self, worker: WorkerHandle | None, checkpoint: str, *, keep: bool = False) -> None: ...

    async def drop_segments(self, worker: WorkerHandle) -> None: ...

    async def gpu_memory(self, device: str) -> int: ...

    async def stop_worker(self, worker: WorkerHandle) -> None: ...

    async def close(self) -> None: ...


class Model(Protocol):
    """`dormouse.checkpoint.ImportedModel`, as far as the node looks."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> Path: ...

    @property
    def engine(self) -> str: ...

    @property
    def weight_bytes(self) -> int: ...

    @property
    def context(self) -> int: ...

    @property
    def checkpoint(self) -> str | None: ...


class Catalog(Protocol):
    """The snapshots and templates on disk, each of a `kind` and a name (a model's, a template's). All calls block; the
    node makes them in a thread. They raise StoreError, and NotFoundError for an id that is not there."""

    def latest(self, name: str, *, kind: str = SNAPSHOT_KIND) -> str | None:
        """The id of the newest one that is not quarantined."""

    def canary(self, snapshot_id: str) -> str | None:
        """The answer of the canary that was stored with it (canary.py)."""

    def on_disk(self, manifest_id: str) -> OnDisk:
        """Where the chunks of a snapshot, template or checkpoint are."""

    def drop_older(self, name: str, snapshot_id: str, *, kind: str = SNAPSHOT_KIND) -> None:
        """Remove those that are older than this one and free what only they used, quarantined ones too, but not those
        that are pinned. Newer ones stay: this call may come late."""

    def quarantine(self, snapshot_id: str, reason: str) -> None:
        """Remember that it must not be used, and why. One that is gone by now needs no mark."""

    def release(self, snapshot_id: str) -> tuple[str, str]:
        """Lift its quarantine; returns kind and name."""

    def pin(self, snapshot_id: str, pinned: bool) -> None:
        """Have it kept when newer ones come, or not any more."""

    def remove(self, snapshot_id: str, *, force: bool) -> None:
        """Remove it and free its space. Raises ConfigError when it is pinned, unless told to `force`."""

    def rows(self) -> list[dict[str, Any]]:
        """All of them as JSON-ready rows, oldest first."""


class Observer(Protocol):
    """Is told once about every start, capture, loading of an adapter and whatever goes to make room, on the event loop,
    with the figures that are also logged."""

    def started(self, model: str, start: Start, phases: Phases) -> None: ...

    def start_failed(self, model: str, error: DormouseError) -> None: ...

    def foretold(self, model: str, path: StartPath, expected: float, took: float) -> None:
        """What a start by this path was estimated to take once there was room for it, and what it took."""

    def fell_back(self, model: str, path: StartPath, error: DormouseError) -> None: ...

    def retried(self, model: str, error: DormouseError) -> None: ...

    def quarantined(self, model: str, error: DormouseError) -> None: ...

    def captured(self, model: str, result: CaptureResult, phases: Phases) -> None: ...

    def capture_failed(self, model: str, error: DormouseError) -> None: ...

    def unprotected(self, model: str) -> None:
        """Its worker could write to weights that others share: the GPU's driver does not keep it from that."""

    def evicted(self, model: str, what: Evicted) -> None: ...

    def adapter_loaded(self, model: str, adapter: str, seconds: float) -> None: ...

    def adapter_failed(self, model: str, adapter: str, error: DormouseError) -> None: ...
