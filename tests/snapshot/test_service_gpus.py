"""On which GPU a worker is started, captured and restored: that of its weights, by the UUID, whatever its number."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dormouse.checkpoint.loader import Loader
from dormouse.config import ModelConfig
from dormouse.data_dir import DataDir
from dormouse.node.assemble import _key
from dormouse.phases import Phases
from dormouse.snapshot import service_main
from dormouse.snapshot import service_messages as messages
from dormouse.snapshot.criu_setup import Criu
from dormouse.snapshot.hands import NO_HANDS
from dormouse.snapshot.mapped_files import DigestCache
from dormouse.snapshot.restore import Restored
from dormouse.snapshot.service_main import Service
from dormouse.snapshot.tree import ProcessTree
from dormouse.store.store import Store
from dormouse.transfer.handles import CUDA, SegmentHandle

pytestmark = pytest.mark.root


class TwoGpus:
    """What a loader says of a machine with two GPUs."""

    def take(self, checkpoint: str, user: str, device: str) -> SegmentHandle:
        return SegmentHandle(CUDA, 1, os.open(os.devnull, os.O_RDONLY), None, self.uuid_of(device))

    def release(self, user: str, checkpoint: str | None = None) -> None:
        pass

    def uuid_of(self, device: str) -> str:
        return f"GPU-{device.partition(':')[2] or 0}"


@pytest.mark.parametrize(
    ("device", "checkpoint", "gpus"),
    [
        ("cuda:1", "weights", ("GPU-1",)),
        ("cuda", "weights", ("GPU-0",)),
        ("cuda:1", None, ("GPU-1",)),
        ("cpu", None, ()),
    ],
)
def test_a_snapshot_wakes_on_the_gpu_that_is_configured_now(
    store: Store,
    criu: Criu,
    data_dir: DataDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    checkpoint: str | None,
    gpus: tuple[str, ...],
) -> None:
    asked: list[tuple[str, ...]] = []
    captured: list[str | None] = []
    own, inner = socket.socketpair()

    def restore(*_what: Any, **options: Any) -> Restored:
        asked.append(options["gpus"])
        home = options["take_home"]()
        spawned = home.spawn(["/bin/sleep", "60"], env={})
        return Restored(ProcessTree(home, spawned.pid), own, Phases())

    def capture(tree: ProcessTree, *_more: Any, **_options: Any) -> Any:
        captured.append(tree.gpu)
        return SimpleNamespace(snapshot_id="s", raw_bytes=1, stored_bytes=1, phases=Phases())

    monkeypatch.setattr(service_main, "restore", restore)
    monkeypatch.setattr(service_main, "capture", capture)
    service = Service(
        *(store, criu, DigestCache(tmp_path / "digests"), tmp_path / "criu"),
        keep_bytes=0,
        loader=cast(Loader, TwoGpus()),
        hands=NO_HANDS,
    )
    try:
        request = messages.RestoreSnapshot(call=1, snapshot_id="s", key={}, checkpoint=checkpoint, device=device)
        started, descriptors = service.answer(request)
        for descriptor in descriptors:
            os.close(descriptor)
        assert isinstance(started, messages.Started)
        service.answer(messages.CaptureWorker(call=2, cell_id=started.cell_id, kind="snapshot", model="m", key={}))
        assert asked == [gpus] and captured == [gpus[0] if gpus else None]
    finally:
        inner.close()
        service.close()


def test_the_number_of_a_gpu_is_no_part_of_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dormouse.checkpoint.models import ImportedModel

    model = object.__new__(ImportedModel)
    for name, value in {"digest": "d", "path": tmp_path, "engine": "null"}.items():
        monkeypatch.setattr(ImportedModel, name, value, raising=False)
    keys = [_key(model, ModelConfig(device=device)) for device in ("cuda", "cuda:0", "cuda:1", "cpu")]
    assert keys[0] == keys[1] == keys[2] != keys[3]
