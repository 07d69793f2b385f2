"""The benchmarks run, on something tiny: their figures mean nothing here, their checks do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dormouse.data_dir import default_data_dir
from dormouse.errors import HostError
from dormouse.snapshot.criu_setup import find_criu

pytestmark = pytest.mark.root

BENCH = Path(__file__).parent.parent.parent / "bench"


def run(script: str, tmp_path: Path, *words: str) -> dict[str, Any]:
    """What a script writes, run in a data folder of its own."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    try:
        find_criu(default_data_dir(os.environ))
    except HostError as error:
        pytest.skip(str(error))
    shared = default_data_dir(os.environ) / "criu"
    if shared.exists():
        (home / "criu").symlink_to(shared)
    target = tmp_path / "result.json"
    command = [sys.executable, str(BENCH / script), *words, "--json", str(target)]
    environment = {**os.environ, "DORMOUSE_HOME": str(home), "DORMOUSE_KEEP_PAGE_CACHE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [path for path in (home / "run").rglob("*") if path != home / "run" / "criu"]
    result: dict[str, Any] = json.loads(target.read_text())
    return result


def test_snapshot_cpu_compares_the_ways_and_checks_what_came_back(tmp_path: Path) -> None:
    words = ("--heap-mb", "8", "--runs", "1", "--only", "heap/lz4", "--only", "heap/ours")
    result = run("snapshot_cpu.py", tmp_path, *words)
    rows = {row["way"]: row for row in result["rows"]}
    assert set(rows) == {"plain", "lz4", "ours"}
    for way, row in rows.items():
        assert row["error"] is None
        assert all(value > 0 for value in row["restore"].values() if value is not None), way
    assert rows["ours"]["capture"]["peak_disk_bytes"] < rows["lz4"]["capture"]["peak_disk_bytes"] / 2
    assert rows["ours"]["capture"]["stored_bytes"] < rows["plain"]["capture"]["stored_bytes"] / 2
    assert rows["ours"]["capture"]["peak_memory_bytes"] > rows["plain"]["capture"]["peak_memory_bytes"]
    assert len(result["goals"]) == 8


def test_soak_counts_what_must_not_grow(tmp_path: Path) -> None:
    result = run("soak.py", tmp_path, "--cycles", "4", "--memory-mb", "2")
    assert result["failures"] == []
    assert len(result["samples"]) == 4
    assert {sample["temporary"] for sample in result["samples"]} == {0}
    assert all(sample["store_bytes"] > 1 << 20 for sample in result["samples"])


@pytest.mark.model
@pytest.mark.timeout(300)
def test_ways_of_a_gpu_snapshot_run_on_the_cpu_too(tmp_path: Path) -> None:
    """All but the driver's part: our own captures, plain CRIU, and LZ4 behind it."""
    pytest.importorskip("transformers")
    rows = "transparent,raw,raw-lz4,vllm"
    sizes = ("--size", "tiny", "--kv-gigabytes", "0.01", "--block-gigabytes", "0.01", "--limit-gigabytes", "0.125")
    result = run("snapshot_gpu.py", tmp_path, "--device", "cpu", "--rows", rows, "--folder", str(tmp_path), *sizes)
    found = result["rows"]
    assert found["vllm"]["error"] == "no --vllm-site was given"
    for name in ("transparent", "raw", "raw-lz4"):
        assert found[name].get("identical"), found[name].get("error")
        assert found[name]["restore_s"] > 0 and found[name]["restore_steps"]
    assert found["raw-lz4"]["stored_bytes"] < found["raw"]["stored_bytes"] / 2
    assert result["figures"]["plain CRIU / ours transparent, restore"] > 0
    assert not list(tmp_path.glob("bench-gpu-*"))


def test_process_memory_compares_the_ways_and_checks_what_came_back(tmp_path: Path) -> None:
    words = ("--size-mb", "32", "--kinds", "bf16,mixed", "--folder", str(tmp_path))
    rows = run("process_memory.py", tmp_path, *words)["rows"]
    assert [(row["kind"], row["way"]) for row in rows] == [(k, w) for k in ("bf16", "mixed") for w in ("ours", "plain")]
    assert all(row["capture_seconds"] > 0 and row["restore_seconds"] > 0 for row in rows)
    ours, plain = rows[2:]
    assert ours["stored_bytes"] < plain["stored_bytes"]
