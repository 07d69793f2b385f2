"""The start path `sleep` as a user meets it: real processes, real CRIU, HTTP over a real port."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from dormouse.checkpoint.importer import import_model
from dormouse.checkpoint.models import ImportedModel
from dormouse.data_dir import DataDir
from dormouse.store.store import Store
from tests.models import lend, quiet
from tests.serving import PATIENCE, QUESTION, Server, data_dir, serve, until

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]

__all__ = ["data_dir"]


def asked(server: Server, model: str = "null") -> tuple[str, str]:
    """Start path and text."""
    answer = server.ask(model)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-dormouse-start"].split(";")[0], answer.json()["choices"][0]["message"]["content"]


def until_dozing(server: Server, model: str = "null") -> None:
    until(lambda: server.state(model) == "dozing")


def memory_of(process: psutil.Process) -> tuple[int, int]:
    """The process's own memory, and all that is its in proportion (weights, libraries)."""
    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    fields = {name: int(kilobytes) << 10 for name, kilobytes in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return fields["Anonymous"], fields["Pss"]


@pytest.mark.model
def test_a_real_model_sleeps_without_weights_and_wakes_to_the_same_text(
    data_dir: DataDir, smollm2: ImportedModel
) -> None:
    name = smollm2.name
    lend(smollm2, data_dir)
    with serve(data_dir, name, keep_alive="1s", sleep_memory="4GiB") as server:
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", timeout=PATIENCE)

        def ask() -> tuple[str, float, str]:
            raw = client.chat.completions.with_raw_response.create(
                model=name,
                messages=QUESTION,  # type: ignore[arg-type]
                temperature=0,
                max_tokens=16,
            )
            path, seconds = raw.headers["x-dormouse-start"].split("; ")
            return path, float(seconds), raw.parse().choices[0].message.content or ""

        path, _seconds, text = ask()
        assert path == "cold" and "Paris" in text
        (worker,) = server.workers()
        own, awake = memory_of(worker)
        until_dozing(server, name)
        assert [process.pid for process in server.workers()] == [worker.pid], "the same process"
        own_asleep, asleep = memory_of(worker)
        assert awake - asleep > 0.9 * smollm2.weight_bytes, "the weights are not mapped any more"
        assert own_asleep < own, "what the KV cache held is gone"
        assert "memfd:" not in Path(f"/proc/{worker.pid}/maps").read_text()
        with Store.open(data_dir.store) as store:
            assert len(list(store.manifests(kind="snapshot", name=name))) == 1
        for _ in range(2):
            path, seconds, again = ask()
            assert (path, again) == ("sleep", text) and seconds > 0
            until_dozing(server, name)
        assert server.metric("dormouse_start_seconds_count", path="sleep") == 2
        assert server.metric("dormouse_phase_seconds_total", step="sleep", phase="resume") > 0
        assert server.metric("dormouse_kept_weights_bytes") == smollm2.weight_bytes
        assert server.metric("dormouse_start_estimate_error_ratio_count", path="sleep") == 2
        assert 0 < server.metric("dormouse_start_estimate_seconds_sum", path="sleep") < 60
        assert server.metric("dormouse_fallbacks_total") == 0
        worker.kill()
        until(lambda: server.state(name) == "asleep")
        assert ask()[::2] == ("snapshot", text), "the snapshot of the process that stayed"


def test_twenty_sleeps_and_wakes_leave_nothing_behind(data_dir: DataDir) -> None:
    with serve(data_dir, "null", keep_alive="50ms", sleep_memory="1GiB") as server:
        _path, text = asked(server)
        until_dozing(server)

        def cycle() -> None:
            assert asked(server) == ("sleep", text)
            until_dozing(server)

        def memory() -> int:
            return sum(memory_of(process)[0] for process in (psutil.Process(server.process.pid), *server.family()))

        def descriptors() -> int:
            return sum(process.num_fds() for process in (psutil.Process(server.process.pid), *server.family()))

        for _ in range(5):
            cycle()
        before, open_before = memory(), descriptors()
        for _ in range(20):
            cycle()
        assert memory() - before < 8 << 20
        until(lambda: descriptors() <= open_before)


def test_weights_of_a_process_that_dozes_are_freed_when_none_are_kept(
    data_dir: DataDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DORMOUSE_KEPT_WEIGHTS", "0")
    import_null(data_dir, tmp_path, "heavy", weights_mb=64)
    with serve(data_dir, "heavy", keep_alive="50ms", sleep_memory="1GiB") as server:
        _path, text = asked(server, "heavy")
        until_dozing(server, "heavy")
        held = [path for process in server.family() for path in open_memfds(process)]
        until(lambda: not [path for process in server.family() for path in open_memfds(process)])
        assert asked(server, "heavy") == ("sleep", text), held


def open_memfds(process: psutil.Process) -> list[str]:
    folder = Path(f"/proc/{process.pid}/fd")
    try:
        links = [str(entry.readlink()) for entry in folder.iterdir()]
    except FileNotFoundError:
        return []
    return [link for link in links if "memfd:dormouse heavy" in link]


def import_null(data_dir: DataDir, tmp_path: Path, name: str, *, weights_mb: int) -> None:
    source = tmp_path / f"{name}-source"
    source.mkdir()
    settings = {"memory_mb": 12, "answer_tokens": 20, "weights_mb": weights_mb}
    (source / "config.json").write_text(json.dumps({"model_type": "dormouse-null", "null": settings}))
    import_model(str(source), name, data_dir, progress=quiet)


def test_a_process_that_dozes_goes_when_another_model_needs_its_room(
    data_dir: DataDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_null(data_dir, tmp_path, "other", weights_mb=300)
    monkeypatch.setenv("DORMOUSE_MEMORY", "375MiB")  # the other is expected to take 364
    with serve(data_dir, "null", "other", keep_alive="100ms", sleep_memory="200MiB") as server:
        asked(server)
        until_dozing(server)
        assert asked(server, "other")[0] == "cold"
        assert server.state() in ("stopping", "asleep")
        assert server.metric("dormouse_evictions_total", model="null", what="process") == 1
        assert server.metric("dormouse_evictions_total", model="null", what="weights") == 0, "that was enough"
        until_dozing(server, "other")
        assert asked(server)[0] == "snapshot"


def test_the_death_of_the_host_service_while_a_process_dozes_costs_a_restore(data_dir: DataDir) -> None:
    with serve(data_dir, "null", keep_alive="100ms", sleep_memory="1GiB") as server:
        _path, text = asked(server)
        until_dozing(server)
        (service,) = [process for process in server.family() if "service_main" in " ".join(process.cmdline())]
        service.kill()
        until(lambda: server.state() == "asleep")
        assert asked(server) == ("snapshot", text)


def test_ls_and_sleep_show_and_end_a_process_that_dozes(data_dir: DataDir) -> None:
    def dormouse(*arguments: str) -> dict[str, object]:
        done = subprocess.run(
            [sys.executable, "-m", "dormouse.cli", *arguments, "--json"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"DORMOUSE_HOME": str(data_dir.root)},
            check=True,
        )
        return dict(json.loads(done.stdout))

    with serve(data_dir, "null", keep_alive="1h", sleep_memory="1GiB") as server:
        _path, text = asked(server)
        assert dormouse("sleep", "null", "--keep")["state"] == "dozing"
        assert len(server.workers()) == 1
        until(lambda: [model["state"] for model in dormouse("ls")["models"]] == ["dozing"])  # type: ignore[attr-defined]
        assert str(dormouse("wake", "null")["start"]).startswith("sleep; ")
        assert dormouse("sleep", "null", "--keep")["state"] == "dozing"
        assert dormouse("snapshot", "null")["state"] == "asleep", "captured a second time, while it dozed"
        assert asked(server) == ("snapshot", text)
        assert dormouse("sleep", "null")["state"] == "asleep"
        assert server.workers() == []
        assert httpx.get(f"{server.address}/readyz").status_code == 200
