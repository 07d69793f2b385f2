"""Captured steps on an NVIDIA GPU: as eager ones, and the same bits after all scratch was taken away. Skipped, visibly,
where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from . import decode_on_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def outcome() -> tuple[dict[str, str], str]:
    """What went wrong by scenario, and what was logged."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.decode_on_gpu"],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found, done.stderr


@pytest.mark.parametrize("name", list(decode_on_gpu.SCENARIOS))
def test_of_captured_steps(name: str, outcome: tuple[dict[str, str], str]) -> None:
    found, log = outcome
    assert not found[name], f"{found[name]}\n{log}"
