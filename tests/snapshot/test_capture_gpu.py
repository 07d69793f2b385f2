"""A worker on a GPU is captured and wakes with the answers it had."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.checkpoint.conftest import save_tokenizer, tiny_llama
from tests.snapshot.test_capture_restore import Host

from dormouse.checkpoint.importer import import_model
from dormouse.config import DataDir
from dormouse.engine.messages import Load, Loaded, Sampling, TokensPrompt
from dormouse.snapshot import service_messages as messages
from dormouse.snapshot.criu_setup import Criu
from dormouse.store.store import Store

pytestmark = [pytest.mark.gpu, pytest.mark.root]


@pytest.mark.timeout(120)
def test_a_gpu_worker_wakes_with_the_same_answer(criu: Criu, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    tiny_llama().save_pretrained(tmp_path / "hub")
    save_tokenizer(tmp_path / "hub")
    model = import_model(str(tmp_path / "hub"), "tiny", DataDir(tmp_path), progress=lambda _step, _done, _total: None)
    question, greedy = TokensPrompt(ids=[5, 9, 13]), Sampling(max_tokens=8, temperature=0.0)
    with Store.open(tmp_path / "store") as store:
        host = Host(store, criu, tmp_path / "log", tmp_path)
        try:
            weights = {"checkpoint": model.checkpoint or "", "device": "cuda:0"}
            started, fds = host.service.answer(messages.StartWorker(call=1, log_path=str(host.log), **weights))
            assert isinstance(started, messages.Started)
            worker = host.attach(started, fds, fresh=True)
            worker.send(Load(engine="transformers", path=str(model.path), device="cuda:0"))
            print(worker.expect(Loaded).phases.seconds())
            before = worker.ask(question, greedy).token_ids
            worker.quiesce()
            captured = host.capture(started)
            assert {"cuda lock", "cuda checkpoint"} <= captured.phases.seconds().keys()
            restored, woken = host.restore(captured.snapshot_id, **weights)
            print(captured.phases.seconds(), restored.phases.seconds(), sep="\n")
            assert woken.ask(question, greedy).token_ids == before
        finally:
            host.close()
