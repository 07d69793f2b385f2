"""A worker that holds GPU memory can't be captured yet: that must be a clear error and cost nothing."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from tests.checkpoint.conftest import save_tokenizer, tiny_llama
from tests.snapshot.attached import AttachedWorker
from tests.snapshot.test_capture_restore import Host

from dormouse.checkpoint.importer import import_model
from dormouse.config import DataDir
from dormouse.engine.messages import Sampling, TokensPrompt
from dormouse.errors import SnapshotError
from dormouse.snapshot import service_messages as messages
from dormouse.snapshot.criu_setup import Criu
from dormouse.store.store import Store

pytestmark = [pytest.mark.gpu, pytest.mark.root]


def test_a_capture_of_a_gpu_worker_fails_clearly_and_the_worker_goes_on(criu: Criu, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    tiny_llama().save_pretrained(tmp_path / "hub")
    save_tokenizer(tmp_path / "hub")
    model = import_model(str(tmp_path / "hub"), "tiny", DataDir(tmp_path), progress=lambda _step, _done, _total: None)
    question, greedy = TokensPrompt(ids=[5, 9, 13]), Sampling(max_tokens=8, temperature=0.0)
    with Store.open(tmp_path / "store") as store:
        host = Host(store, criu, tmp_path / "log")
        started, (control,) = host.service.answer(messages.StartWorker(call=1, log_path=str(host.log)))
        assert isinstance(started, messages.Started)
        host.cells.append(started.cell_id)
        worker = AttachedWorker(socket.socket(fileno=control), host.log, fresh=True)
        host.workers.append(worker)
        worker.load(model.path, device="cuda:0")
        before = worker.ask(question, greedy).token_ids
        worker.quiesce()
        with pytest.raises(SnapshotError, match="criu could not dump the process"):
            host.capture(started)
        worker.resume()
        assert worker.ask(question, greedy).token_ids == before
        assert store.manifests(kind="snapshot") == []
        host.close()
