"""The benchmark of the codec runs on little; its ratios, unlike its speeds, mean something even so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent.parent / "bench" / "codec_cpu.py"


def test_numbers_gain_what_lz4_does_not(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--mb", "1", "--runs", "1", "--json", str(target)]
    done = subprocess.run(
        command, env={**os.environ, "DORMOUSE_HOME": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "without weights" in done.stderr
    ratios = {(row["subject"], row["way"]): row["ratio"] for row in json.loads(target.read_text())["rows"]}
    assert 1.49 < ratios["bf16 N(0, 0.02)", "floats"] < 1.52
    assert all(ratio > 1.16 for (_subject, way), ratio in ratios.items() if way == "floats")
    assert all(ratio <= 1.001 for (_subject, way), ratio in ratios.items() if way != "floats")
