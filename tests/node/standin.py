"""A host service for tests: real worker processes over real sockets, but snapshots are only remembered, not made.

It needs neither root nor criu. `HostService` itself is covered by tests/snapshot and the end-to-end tests.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

from dormouse.checkpoint.adapters import ImportedAdapter
from dormouse.checkpoint.tensors import NewTensor, lay_out
from dormouse.config import ModelConfig, ServeConfig
from dormouse.errors import ConfigError, DormouseError, IncompatibleError, NotFoundError
from dormouse.node.node import Node
from dormouse.node.page_cache import OnDisk
from dormouse.node.parts import Model
from dormouse.phases import Phase, Phases, host_clock
from dormouse.snapshot.capture import SNAPSHOT_KIND, TEMPLATE_KIND
from dormouse.snapshot.compatibility import first_mismatch
from dormouse.snapshot.service import CaptureResult, WorkerHandle
from dormouse.transfer.handles import SegmentHandle
from dormouse.transfer.segment import Segment

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")


def took(name: str, seconds: float) -> Phases:
    """One step."""
    return Phases(host_clock(), [Phase(name, 0.0, seconds)])


@dataclass(frozen=True)
class FakeModel:
    """What the node looks at in an imported model."""

    name: str
    path: Path = Path("/nonexistent")
    engine: str = "null"
    weight_bytes: int = 1 << 20
    context: int = 64
    digest: str = "d1"
    checkpoint: str | None = None


@dataclass
class StandInHost:
    """`faults[call]` is raised by the next such call and then forgotten, `lasting_faults` are not; `worker_fault` goes
    to the next worker; `gates[call]` holds a call back until the event is set. `real_worker` runs the product's own
    worker."""

    delay: float = 0.0
    real_worker: bool = False
    faults: dict[str, DormouseError] = field(default_factory=dict)
    lasting_faults: dict[str, DormouseError] = field(default_factory=dict)
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    worker_fault: str = ""
    snapshots: dict[str, dict[str, str]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    quarantined: dict[str, str] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)
    kept_weights: dict[str, int] = field(default_factory=dict)
    gpu_bytes: int = 80 << 30
    clean_up_gates: list[threading.Event] = field(default_factory=list)

    async def _enter(self, call: str) -> None:
        self.calls.append(call)
        if gate := self.gates.get(call):
            await gate.wait()
        if error := self.faults.pop(call, None) or self.lasting_faults.get(call):
            raise error

    def _spawn(self, *options: str) -> WorkerHandle:
        own, child = socket.socketpair()
        fault, self.worker_fault = self.worker_fault, ""
        program = ["-m", "dormouse.engine.worker"] if self.real_worker else [str(FAKE_WORKER)]
        if not self.real_worker:
            options = ("--fault", fault, "--delay", str(self.delay), *options)
        process = subprocess.Popen(
            [sys.executable, *program, "--control-fd", str(child.fileno()), *options],
            pass_fds=(child.fileno(),),
            stdin=subprocess.DEVNULL,
        )
        child.close()
        cell_id = f"cell{process.pid}"
        self.processes[cell_id] = process
        return WorkerHandle(cell_id=cell_id, pid=process.pid, control=own, phases=took("cell", 0.002))

    def alive(self) -> int:
        """Worker processes that have not been ended and reaped."""
        return sum(process.returncode is None for process in self.processes.values())

    async def start_worker(self, *, log_path: Path, checkpoint: str | None = None, device: str = "cpu") -> WorkerHandle:
        await self._enter("start_worker")
        return self._spawn()

    async def capture(
        self, worker: WorkerHandle, *, model: str, key: dict[str, str], kind: str = SNAPSHOT_KIND, keep: bool = False
    ) -> CaptureResult:
        await self._enter("capture" if kind == SNAPSHOT_KIND else f"capture {kind}")
        prefix = "snap" if kind == SNAPSHOT_KIND else kind
        snapshot_id = f"{prefix}{len(self.models) + 1}"
        self.kinds[snapshot_id] = kind
        self.snapshots[snapshot_id] = key
        self.models[snapshot_id] = model
        if not keep:
            await self._kill(worker)
        return CaptureResult(snapshot_id, raw_bytes=1000, stored_bytes=300, phases=took("dump", 0.003))

    async def restore(
        self, snapshot_id: str, *, key: dict[str, str], checkpoint: str | None = None, device: str = "cpu"
    ) -> WorkerHandle:
        assert snapshot_id not in self.quarantined, "a quarantined snapshot was used"
        template = self.kinds.get(snapshot_id) == TEMPLATE_KIND
        await self._enter("restore template" if template else "restore")
        if snapshot_id not in self.snapshots:
            raise NotFoundError(f"there is no snapshot {snapshot_id}")
        if first_mismatch(self.snapshots[snapshot_id], key) is not None:
            raise IncompatibleError(f"snapshot {snapshot_id} does not fit this host")
        return self._spawn("--restored")

    async def take_segment(
        self, worker: WorkerHandle, checkpoint: str, *, adapter: bool = True, device: str = "cpu"
    ) -> SegmentHandle:
        await self._enter("take_segment" if adapter else "take_segment of the model")
        segment = Segment.create("stand-in", 384)
        try:
            return segment.handle(None)
        finally:
            segment.close()

    async def drop_segment(self, worker: WorkerHandle | None, checkpoint: str, *, keep: bool = False) -> None:
        await self._enter(f"drop_segment {checkpoint}{', keep' if keep else ''}")
        if not keep:
            self.kept_weights.pop(checkpoint, None)

    async def drop_segments(self, worker: WorkerHandle) -> None:
        await self._enter("drop_segments")

    async def gpu_memory(self, device: str) -> int:
        await self._enter(f"gpu_memory {device}")
        return self.gpu_bytes

    async def stop_worker(self, worker: WorkerHandle) -> None:
        await self._enter("stop_worker")
        await self._kill(worker)

    async def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            await asyncio.to_thread(process.wait)

    async def _kill(self, worker: WorkerHandle) -> None:
        process = self.processes[worker.cell_id]
        process.kill()
        await asyncio.to_thread(process.wait)

    # The node's Catalog

    def latest(self, name: str, *, kind: str = SNAPSHOT_KIND) -> str | None:
        usable = [found for found in self._own(name, kind) if found not in self.quarantined]
        return usable[-1] if usable else None

    def canary(self, snapshot_id: str) -> str | None:
        return self.snapshots[snapshot_id].get("canary")

    def on_disk(self, manifest_id: str) -> OnDisk:
        return OnDisk(1000, 300, ())

    def drop_older(self, name: str, snapshot_id: str, *, kind: str = SNAPSHOT_KIND) -> None:
        if self.clean_up_gates:
            self.clean_up_gates.pop().wait()
        own = self._own(name, kind)
        for found in own[: own.index(snapshot_id)] if snapshot_id in own else []:
            if found not in self.pinned:
                del self.snapshots[found]
        self.calls.append("cleaned up")

    def quarantine(self, snapshot_id: str, reason: str) -> None:
        self.quarantined[snapshot_id] = reason

    def release(self, snapshot_id: str) -> tuple[str, str]:
        self._find(snapshot_id)
        self.quarantined.pop(snapshot_id, None)
        return self.kinds[snapshot_id], self.models[snapshot_id]

    def pin(self, snapshot_id: str, pinned: bool) -> None:
        self._find(snapshot_id)
        (self.pinned.add if pinned else self.pinned.discard)(snapshot_id)

    def remove(self, snapshot_id: str, *, force: bool) -> None:
        self._find(snapshot_id)
        if snapshot_id in self.pinned and not force:
            raise ConfigError(f"snapshot {snapshot_id} is pinned")
        del self.snapshots[snapshot_id]

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "id": found,
                "kind": self.kinds[found],
                "model": self.models[found],
                "pinned": found in self.pinned,
                "quarantine": self.quarantined.get(found),
            }
            for found in self.snapshots
        ]

    def _own(self, name: str, kind: str) -> list[str]:
        return [found for found in self.snapshots if (self.models[found], self.kinds[found]) == (name, kind)]

    def _find(self, snapshot_id: str) -> None:
        if snapshot_id not in self.snapshots:
            raise NotFoundError(f"there is no snapshot {snapshot_id}")


def configure(data_dir: Path, models: dict[str, ModelConfig] | None = None, **settings: object) -> ServeConfig:
    """A configuration for tests; one model named "mouse" unless told otherwise, and no process stays."""
    chosen = models if models is not None else {"mouse": ModelConfig()}
    return ServeConfig.model_validate({"data_dir": data_dir, "models": chosen, "sleep_memory": 0, **settings})


def fake_adapter(name: str) -> ImportedAdapter:
    """The adapter `BASE-anything`, such as mouse-tail."""
    base, dash, rest = name.partition("-")
    if not dash:
        raise NotFoundError(f"there is no model named {name!r}", remedy="Import one first")
    if rest == "model":
        raise ConfigError(f"{name} is a model, not an adapter", remedy="Give the name of an imported adapter")
    body = lay_out([NewTensor(f"m.lora_{part}", "BF16", (8, 8), lambda: iter([bytes(128)])) for part in "AB"])
    return ImportedAdapter(name, base, f"checkpoint of {name}", "d", body, {"m": 2.0})


@asynccontextmanager
async def run_node(
    config: ServeConfig,
    host: StandInHost,
    models: dict[str, FakeModel] | None = None,
    key: Callable[[Model, ModelConfig], dict[str, str]] = lambda model, settings: {"kernel": "6"},
    wall_clock: Callable[[], float] = time.time,
) -> AsyncIterator[Node]:
    """A node over the stand-in; at its end no worker may be left."""

    async def start_host() -> StandInHost:
        return host

    chosen = models or {name: FakeModel(name) for name in config.models}
    async with Node(
        config,
        start_host,
        chosen,
        host,
        key,
        lambda spec: {"template of": spec.engine},
        open_adapter=fake_adapter,
        wall_clock=wall_clock,
    ) as node:
        yield node
    assert host.alive() == 0


def on_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on an event loop of its own."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that is bound to happen."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for is in another process, too
            await asyncio.sleep(0.005)
