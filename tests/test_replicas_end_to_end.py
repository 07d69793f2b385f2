"""Several replicas out of one snapshot, and tenants, as a user meets them: real processes, real CRIU, HTTP."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from dormouse.checkpoint.importer import import_model
from dormouse.data_dir import DataDir
from dormouse.store.store import Store
from tests.serving import PATIENCE, Server, data_dir, serve, until

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]

__all__ = ["data_dir"]

WEIGHTS = 24 << 20
CONFIG = """
sleep_memory: 0
api_keys_file: KEYS
metrics_open: true
tenants:
  small: {cap: 1}
models:
  slow:
    max_replicas: 3
    max_concurrent: 1
    keep_alive: 2s
    scaling: {stable_window: 1s, panic_window: 1s}
"""


@pytest.fixture
def config(data_dir: DataDir, tmp_path: Path) -> Path:
    """Of a model that takes a second for an answer."""
    settings = {"answer_tokens": 20, "delay_s": 0.05, "weights_mb": WEIGHTS >> 20}
    source = tmp_path / "slow-source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "dormouse-null", "null": settings}))
    import_model(str(source), "slow", data_dir, progress=lambda _step, _done, _total: None)
    (tmp_path / "keys").write_text("k-large\nk-small small\n")
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.replace("KEYS", str(tmp_path / "keys")))
    return file


def ask(server: Server, key: str = "k-large") -> tuple[str, str]:
    """Start path and text."""
    body = {"model": "slow", "prompt": "good morning", "temperature": 0, "max_tokens": 20}
    headers = {"authorization": f"Bearer {key}"}
    answer = httpx.post(f"{server.address}/v1/completions", json=body, headers=headers, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-dormouse-start"].split(";")[0], answer.json()["choices"][0]["text"]


def replicas(server: Server, state: str) -> float:
    return server.metric("dormouse_replicas", model="slow", state=state)


def test_a_burst_out_of_one_snapshot_and_back_to_nothing(data_dir: DataDir, config: Path) -> None:
    with serve(data_dir, str(config)) as server, ThreadPoolExecutor(8) as threads:
        path, text = ask(server)
        assert path == "cold"
        until(lambda: server.workers() == [])
        answers = list(threads.map(lambda _number: ask(server), range(6)))
        assert {answer for _path, answer in answers} == {text}
        assert [path for path, _answer in answers].count("snapshot") >= 3
        assert replicas(server, "ready") >= 2 and len(server.workers()) == 3
        shared = [weights_of(process.pid) for process in server.workers()]
        assert len({inode for inode, _size in shared}) == 1, "all map the same weights"
        with Store.open(data_dir.store) as store:
            assert len(list(store.manifests(kind="snapshot", name="slow"))) == 1
        until(lambda: server.workers() == [])
        assert replicas(server, "asleep") == 1


def weights_of(pid: int) -> tuple[str, int]:
    """Inode and bytes of the largest piece of memory that a process shares with others."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        area, _rights, _offset, _device, inode, *name = line.split(maxsplit=5)
        if name and name[0].startswith("/memfd:"):
            begin, end = (int(edge, 16) for edge in area.split("-"))
            found.append((inode, end - begin))
    inode, size = max(found, key=lambda one: one[1])
    assert size >= WEIGHTS
    return inode, size


def test_a_tenant_at_its_cap_waits_while_others_are_answered(data_dir: DataDir, config: Path) -> None:
    with serve(data_dir, str(config)) as server, ThreadPoolExecutor(8) as threads:
        ask(server)
        small = [threads.submit(ask, server, "k-small") for _ in range(4)]
        until(lambda: server.metric("dormouse_waiting", model="slow") >= 1)
        until(lambda: server.metric("dormouse_in_flight", model="slow") == 1)
        text = ask(server)[1]
        assert not all(one.done() for one in small)
        assert {one.result()[1] for one in small} == {text}
        assert server.metric("dormouse_requests_total", tenant="small", status="200") == 4
