"""Replicas of one model on two GPUs, out of one snapshot, through `dormouse serve`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from dormouse.data_dir import DataDir
from dormouse.store.store import Store
from tests.serving import PATIENCE, Server, data_dir, serve, until
from tests.snapshot.test_capture_gpu import tiny_model
from tests.snapshot.test_cuda_gpu import used_by_uuid

pytestmark = [pytest.mark.gpu(alone=True), pytest.mark.root, pytest.mark.timeout(240)]

__all__ = ["data_dir"]

CONFIG = """
sleep_memory: 0
gpu_memory: 3500MiB
models:
  tiny:
    device: cuda:0,1
    max_replicas: 2
    max_concurrent: 1
    kv_tokens: 1024
    keep_alive: 5s
    scaling: {stable_window: 60s, target: 0.4, utilization: 1}
"""
"""Each GPU has room for one; two replicas are wanted as soon as there is a request."""


def ask(server: Server) -> tuple[str, str]:
    """Start path and text."""
    body = {"model": "tiny", "prompt": [5, 9, 13], "temperature": 0, "max_tokens": 48}
    answer = httpx.post(f"{server.address}/v1/completions", json=body, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-dormouse-start"].split(";")[0], answer.json()["choices"][0]["text"]


def test_replicas_on_two_gpus_out_of_one_snapshot(data_dir: DataDir, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tiny_model(data_dir.root)
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    idle = used_by_uuid()
    with serve(data_dir, str(file)) as server, ThreadPoolExecutor(8) as threads:

        def both_ready() -> bool:
            return server.metric("dormouse_replicas", model="tiny", state="ready") == 2

        _path, text = ask(server)
        until(both_ready)
        used = used_by_uuid()
        print({gpu: size - idle.get(gpu, 0) for gpu, size in used.items()})
        assert sum(size - idle.get(gpu, 0) > 200 << 20 for gpu, size in used.items()) == 2, "one on each GPU"
        assert {text} == {answer for _path, answer in threads.map(lambda _number: ask(server), range(6))}
        until(lambda: server.workers() == [])
        with Store.open(data_dir.store) as store:
            assert len(list(store.manifests(kind="snapshot", name="tiny"))) == 1
        answers = list(threads.map(lambda _number: ask(server), range(6)))
        print((data_dir.root / "serve.log").read_text())
        assert {text} == {answer for _path, answer in answers} and "snapshot" in {path for path, _answer in answers}
        until(both_ready)
        assert {text} == {answer for _path, answer in threads.map(lambda _number: ask(server), range(6))}
        log = (data_dir.root / "serve.log").read_text()
        assert [
            log.count(f"{name} is ready: {path}") for name in ("tiny", "tiny#2") for path in ("cold", "snapshot")
        ] == [1] * 4, "nobody goes for a replica of its own model"
