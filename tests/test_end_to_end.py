"""`dormouse serve` as a user runs it: real processes, real CRIU, HTTP over a real port."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import openai
import psutil
import pytest

from dormouse.admin_client import ask_node
from dormouse.checkpoint.models import ImportedModel
from dormouse.data_dir import DataDir
from dormouse.store.store import Store
from tests.models import lend
from tests.serving import PATIENCE, QUESTION, data_dir, serve, until

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]

__all__ = ["data_dir"]


@pytest.mark.model
def test_the_main_job_through_the_official_client(data_dir: DataDir, smollm2: ImportedModel) -> None:
    lend(smollm2, data_dir)
    with serve(data_dir, "smollm2-135m", keep_alive="1s") as server:
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", timeout=PATIENCE)
        assert [model.id for model in client.models.list()] == ["smollm2-135m"]

        def ask() -> tuple[str, str, openai.types.chat.ChatCompletion]:
            raw = client.chat.completions.with_raw_response.create(
                model="smollm2-135m",
                messages=QUESTION,  # type: ignore[arg-type]
                temperature=0,
                max_tokens=16,
            )
            answer = raw.parse()
            return raw.headers["x-dormouse-start"].split(";")[0], answer.choices[0].message.content or "", answer

        path, text, answer = ask()
        assert path == "cold" and "Paris" in text
        assert answer.usage is not None and answer.usage.completion_tokens > 0
        server.until_asleep("smollm2-135m")
        assert server.workers() == []
        with Store.open(data_dir.store) as store:
            (snapshot,) = store.manifests(kind="snapshot", name="smollm2-135m")
            assert store.verify().ok
        assert snapshot.stored_bytes < 0.35 * snapshot.raw_bytes
        assert snapshot.raw_bytes < 700e6, "the weights or the KV cache are in the snapshot"

        assert ask()[:2] == ("snapshot", text)
        assert ask()[:2] == ("hot", text)
        server.until_asleep("smollm2-135m")
        stream = client.chat.completions.create(
            model="smollm2-135m",
            messages=QUESTION,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
        assert chunks[-1].usage is not None
        assert server.metric("dormouse_fallbacks_total") == 0


@pytest.mark.model
def test_a_model_without_a_snapshot_starts_from_the_template_of_its_engine(
    data_dir: DataDir, smollm2: ImportedModel
) -> None:
    lend(smollm2, data_dir)
    name = "smollm2-135m"
    with serve(data_dir, name, keep_alive="1h") as server:

        def ask() -> tuple[str, str]:
            answer = server.ask(name)
            return answer.headers["x-dormouse-start"].split(";")[0], answer.json()["choices"][0]["message"]["content"]

        def snapshots(kind: str) -> list[str]:
            rows = ask_node(data_dir.run, "GET", "snapshots")["data"]
            return [row["id"] for row in rows if row["kind"] == kind]

        path, text = ask()
        assert path == "cold"
        first = ask_node(data_dir.run, "POST", "models", name, "snapshot")["snapshot_id"]
        # Committed is not yet offered: the node says when it is.
        until(lambda: re.search("template .* is captured as", (data_dir.root / "serve.log").read_text()) is not None)
        assert len(snapshots("template")) == 1
        ask_node(data_dir.run, "DELETE", "snapshots", first)
        assert ask() == ("template", text)
        second = ask_node(data_dir.run, "POST", "models", name, "snapshot")["snapshot_id"]
        assert snapshots("snapshot") == [second]
        assert ask() == ("snapshot", text)
        assert server.metric("dormouse_fallbacks_total") == 0
    with Store.open(data_dir.store) as store:
        (row,) = store.manifests(kind="snapshot")
        assert row.shared_bytes > row.stored_bytes / 2, "what comes from the template is stored once"


def test_fifty_requests_share_one_wake_and_all_are_answered(data_dir: DataDir) -> None:
    with serve(data_dir, "null", keep_alive="200ms") as server:
        text = server.ask().json()["choices"][0]["message"]["content"]
        server.until_asleep()

        async def ask_all() -> list[httpx.Response]:
            body = {"model": "null", "messages": QUESTION, "temperature": 0, "max_tokens": 20}
            async with httpx.AsyncClient(timeout=PATIENCE, limits=httpx.Limits(max_connections=None)) as client:
                url = f"{server.address}/v1/chat/completions"
                return await asyncio.gather(*(client.post(url, json=body) for _ in range(50)))

        answers = asyncio.run(ask_all())
        assert [answer.status_code for answer in answers] == [200] * 50
        assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {text}
        assert {answer.headers["x-dormouse-start"].split(";")[0] for answer in answers} <= {"snapshot", "hot"}
        assert len(server.workers()) <= 1
        assert server.metric("dormouse_start_seconds_count", model="null", path="snapshot") == 1


def test_twenty_cycles_leak_no_process_descriptor_memory_or_pack(data_dir: DataDir) -> None:
    with serve(data_dir, "null", keep_alive="50ms") as server:

        def cycle() -> None:
            server.ask().raise_for_status()
            server.until_asleep()

        def resources() -> tuple[int, int, int]:
            everyone = [psutil.Process(server.process.pid), *server.family()]
            packs = len(list(data_dir.store.rglob("*.pack"))) + len(list(data_dir.store.rglob("*.tmp")))
            return len(everyone), sum(process.num_fds() for process in everyone), packs

        def memory() -> int:
            everyone = [psutil.Process(server.process.pid), *server.family()]
            return sum(process.memory_info().rss for process in everyone)

        before_memory = 0  # the most: the service's heap shrinks and grows from cycle to cycle
        for _ in range(5):
            cycle()
            before_memory = max(before_memory, memory())
        until(lambda: not server.workers())
        time.sleep(1)  # a spare cell is made after the worker's has gone
        before = resources()
        for _ in range(20):
            cycle()
        until(lambda: resources() == before)
        assert memory() - before_memory < 16 << 20
        assert server.metric("dormouse_fallbacks_total") == 0


def test_a_damaged_snapshot_costs_a_cold_start_and_nothing_else(data_dir: DataDir) -> None:
    with serve(data_dir, "null", keep_alive="200ms") as server:
        text = server.ask().json()["choices"][0]["message"]["content"]
        server.until_asleep()
        pack = max(data_dir.store.rglob("*.pack"))  # the snapshot's; the first is that of the weights
        data = bytearray(pack.read_bytes())
        data[4096 : len(data) // 2] = bytes(byte ^ 0x55 for byte in data[4096 : len(data) // 2])
        pack.write_bytes(data)
        answer = server.ask()
        assert answer.headers["x-dormouse-start"].startswith("cold")
        assert answer.json()["choices"][0]["message"]["content"] == text
        assert server.metric("dormouse_fallbacks_total", model="null") == 1
        server.until_asleep()
        again = server.ask()
        assert again.headers["x-dormouse-start"].startswith("snapshot")
        assert again.json()["choices"][0]["message"]["content"] == text


def test_kill_9_of_the_node_leaves_no_worker_and_a_usable_snapshot(data_dir: DataDir) -> None:
    with serve(data_dir, "null", keep_alive="200ms", exit_status=-signal.SIGKILL) as server:
        text = server.ask().json()["choices"][0]["message"]["content"]
        server.until_asleep()
        server.ask()
        family = server.family()
        assert server.workers()
        os.kill(server.process.pid, signal.SIGKILL)
        until(lambda: not any(member.is_running() and member.status() != "zombie" for member in family))
    with serve(data_dir, "null", keep_alive="1h") as server:
        answer = server.ask()
        assert answer.headers["x-dormouse-start"].startswith("snapshot")
        assert answer.json()["choices"][0]["message"]["content"] == text


def test_kill_9_of_a_worker_is_an_error_for_its_requests_and_the_next_one_starts_anew(data_dir: DataDir) -> None:
    with serve(data_dir, "null", keep_alive="1h") as server:
        assert server.ask().status_code == 200
        (worker,) = server.workers()
        worker.kill()
        until(lambda: server.state() == "asleep")
        assert server.ask().status_code == 200


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["serve", "no-such-model"], 3, "no-such-model"),
        (["serve", "missing.yaml"], 2, "missing.yaml"),
        (["inspect", "nothing"], 3, "nothing"),
        (["rm", "nothing"], 3, "nothing"),
        (["rm", ""], 3, "no snapshot"),
        (["import", "/no/such/folder", "--name", "x"], 3, "/no/such/folder"),
        (["import", "~nosuchuser/x", "--name", "x"], 3, "~nosuchuser"),
        (["import", "smollm2-135m", "--name", "Not A Name"], 2, "Not A Name"),
        (["bench", "start", "no-such-model"], 3, "no-such-model"),
        (["frobnicate"], 2, "frobnicate"),
        (["sleep", "smollm2-135m"], 4, "no node runs"),
    ],
)
def test_bad_command_lines_give_one_sentence_and_a_status(
    data_dir: DataDir, arguments: list[str], status: int, said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dormouse.cli", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"DORMOUSE_HOME": str(data_dir.root), "COLUMNS": "400"},
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_hostile_requests_hurt_nobody_else(data_dir: DataDir) -> None:
    with serve(data_dir, "null", keep_alive="1h") as server:
        text = server.ask().json()["choices"][0]["message"]["content"]
        deep: object = "x"
        for _ in range(900):
            deep = [deep]
        hostile: list[dict[str, object]] = [
            {"messages": [{"role": "user", "content": "x", "a": 1 << 70}]},
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": deep}]},
            {"messages": [{"role": "user", "content": "x" * (1 << 20)}], "n": 32},
        ]
        for fields in hostile:
            answer = server.ask(**fields)
            assert answer.status_code in (200, 400), answer.text
        assert httpx.get(f"{server.address}/healthz/").status_code == 404
        assert server.ask().json()["choices"][0]["message"]["content"] == text


def test_ls_inspect_verify_and_rm_agree(data_dir: DataDir) -> None:
    def dormouse(*arguments: str, status: int = 0) -> dict[str, object]:
        done = subprocess.run(
            [sys.executable, "-m", "dormouse.cli", *arguments, "--json"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"DORMOUSE_HOME": str(data_dir.root)},
            check=False,
        )
        assert done.returncode == status
        return dict(json.loads(done.stdout))

    with serve(data_dir, "null", keep_alive="100ms") as server:
        server.ask()
        server.until_asleep()
        until(lambda: [model["state"] for model in dormouse("ls")["models"]] == ["asleep"])  # type: ignore[attr-defined]
        assert dormouse("rm", "--model", "null", status=2)["error"]
    (snapshot,) = dormouse("ls")["snapshots"]  # type: ignore[misc]
    details = dormouse("inspect", snapshot["id"][:6])
    assert snapshot["raw_bytes"] <= details["raw_bytes"] == sum(image["raw_bytes"] for image in details["images"])  # type: ignore[index,attr-defined]
    assert dormouse("verify")["ok"] is True
    assert dormouse("rm", snapshot["id"])["freed_bytes"] > 0  # type: ignore[operator]
    assert dormouse("ls")["snapshots"] == []
    assert len(list(data_dir.store.rglob("*.pack"))) == 1  # that of the weights
    assert dormouse("rm", "--model", "null")["removed"] == ["null"]
    assert not list(data_dir.store.rglob("*.pack"))
