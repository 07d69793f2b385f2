"""A worker on a GPU is captured and wakes with the answers it had."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.checkpoint.conftest import save_tokenizer, tiny_llama
from tests.snapshot.attached import AttachedWorker
from tests.snapshot.test_capture_restore import Host
from tests.snapshot.test_cuda_gpu import used_by_uuid

from dormouse.checkpoint.importer import import_model
from dormouse.checkpoint.models import ImportedModel
from dormouse.data_dir import DataDir
from dormouse.engine.messages import Load, Loaded, Sampling, TokensPrompt
from dormouse.snapshot import service_messages as messages
from dormouse.snapshot.criu_setup import Criu
from dormouse.store.store import Store

pytestmark = [pytest.mark.gpu, pytest.mark.root]


QUESTION, GREEDY = TokensPrompt(ids=[5, 9, 13]), Sampling(max_tokens=8, temperature=0.0)


def tiny_model(folder: Path) -> ImportedModel:
    tiny_llama().save_pretrained(folder / "hub")
    save_tokenizer(folder / "hub")
    return import_model(str(folder / "hub"), "tiny", DataDir(folder), progress=lambda _step, _done, _total: None)


def awake(host: Host, model: ImportedModel, device: str) -> tuple[messages.Started, AttachedWorker]:
    """A fresh worker with the model."""
    request = messages.StartWorker(call=1, log_path=str(host.log), checkpoint=model.checkpoint, device=device)
    started, fds = host.service.answer(request)
    assert isinstance(started, messages.Started)
    worker = host.attach(started, fds, fresh=True)
    worker.send(Load(engine="transformers", path=str(model.path), device=device))
    print(worker.expect(Loaded).phases.seconds())
    return started, worker


@pytest.mark.timeout(120)
def test_a_gpu_worker_wakes_with_the_same_answer(criu: Criu, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    model = tiny_model(tmp_path)
    with Store.open(tmp_path / "store") as store:
        host = Host(store, criu, tmp_path / "log", tmp_path)
        try:
            started, worker = awake(host, model, "cuda:0")
            before = worker.ask(QUESTION, GREEDY).token_ids
            worker.quiesce()
            captured = host.capture(started)
            assert {"cuda lock", "cuda checkpoint"} <= captured.phases.seconds().keys()
            restored, woken = host.restore(captured.snapshot_id, checkpoint=model.checkpoint or "", device="cuda:0")
            print(captured.phases.seconds(), restored.phases.seconds(), sep="\n")
            assert woken.ask(QUESTION, GREEDY).token_ids == before
        finally:
            host.close()


@pytest.mark.timeout(180)
def test_a_gpu_worker_wakes_on_another_gpu(criu: Criu, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = tiny_model(tmp_path)
    with Store.open(tmp_path / "store") as store:
        host = Host(store, criu, tmp_path / "log", tmp_path)
        try:
            started, worker = awake(host, model, "cuda:0")
            before = worker.ask(QUESTION, GREEDY).token_ids
            for device in ("cuda:1", "cuda:0"):
                worker.quiesce()
                captured = host.capture(started)
                started, worker = host.restore(captured.snapshot_id, checkpoint=model.checkpoint or "", device=device)
                print(device, started.phases.seconds())
                assert worker.ask(QUESTION, GREEDY).token_ids == before
        finally:
            host.close()


@pytest.mark.gpu(alone=True)
@pytest.mark.timeout(300)
def test_twenty_captures_and_restores_leave_memory_as_it_was(criu: Criu, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    model = tiny_model(tmp_path)
    seen: list[dict[str, int]] = []
    idle = sum(used_by_uuid().values())
    with Store.open(tmp_path / "store") as store:
        host = Host(store, criu, tmp_path / "log", tmp_path)
        try:
            started, worker = awake(host, model, "cuda:0")
            before = worker.ask(QUESTION, GREEDY).token_ids
            for _ in range(20):
                worker.quiesce()
                captured = host.capture(started)
                started, worker = host.restore(captured.snapshot_id, checkpoint=model.checkpoint or "", device="cuda:0")
                assert worker.ask(QUESTION, GREEDY).token_ids == before
                seen.append(memory_of(host, captured.raw_bytes))
        finally:
            host.close()
    left = sum(used_by_uuid().values()) - idle
    print(*seen, f"left on the GPU: {left}", sep="\n")
    # Caches (of the driver: 2 MiB each time) fill up in the first 15 cycles; a leak would go on for ever.
    late = {name: seen[-1][name] - seen[15][name] for name in seen[-1]}
    assert late["gpu"] <= 0 and late["resident"] <= 24 << 20 and late["snapshot"] <= 4 << 20
    assert late["descriptors"] <= 4 and late["of the loader"] <= 0
    assert seen[-1]["gpu"] - seen[0]["gpu"] <= 48 << 20


def memory_of(host: Host, raw_bytes: int) -> dict[str, int]:
    return {
        "gpu": sum(used_by_uuid().values()),
        "resident": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "snapshot": raw_bytes,
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "of the loader": len(list(Path(f"/proc/{host.loader.pid}/fd").iterdir())),
    }
