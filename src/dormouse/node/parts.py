"""What a node is given: the host checkpoint service, the models, the snapshots it may use, and who wants to be told.

Each is the smallest interface the node needs; the product's own parts fit as they are (assemble.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from dormouse.errors import DormouseError
from dormouse.node.replica import Start
from dormouse.snapshot.service import CaptureResult, WorkerHandle


class Host(Protocol):
    """`dormouse.snapshot.service.HostService`: see there for what each call promises."""

    async def start_worker(self, *, log_path: Path, checkpoint: str | None = None) -> WorkerHandle: ...

    async def capture(self, worker: WorkerHandle, *, model: str, key: dict[str, str]) -> CaptureResult: ...

    async def restore(
        self, snapshot_id: str, *, key: dict[str, str], checkpoint: str | None = None
    ) -> WorkerHandle: ...

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
    """The snapshots on disk. Both calls block; the node makes them in a thread."""

    def latest(self, model: str) -> str | None:
        """The id of the newest snapshot of a model."""

    def drop_older(self, model: str, snapshot_id: str) -> None:
        """Remove the model's snapshots that are older than this one and free what only they used. Newer ones stay:
        this call may come late."""


class Observer(Protocol):
    """Is told once about every start and capture, on the event loop, with the figures that are also logged."""

    def started(self, model: str, start: Start, phases: Mapping[str, float]) -> None: ...

    def start_failed(self, model: str, error: DormouseError) -> None: ...

    def fell_back(self, model: str, error: DormouseError) -> None: ...

    def captured(self, model: str, result: CaptureResult, phases: Mapping[str, float]) -> None: ...

    def capture_failed(self, model: str, error: DormouseError) -> None: ...
