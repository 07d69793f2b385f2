"""Every parser of the store against hostile bytes: hypothesis always; atheris, which watches the branches taken, where
it is installed, for DORMOUSE_FUZZ_SECONDS (1) a target."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_targets import TARGETS, corpus

SECONDS = int(os.environ.get("DORMOUSE_FUZZ_SECONDS", "1"))


@pytest.mark.parametrize("target", TARGETS)
def test_hostile_bytes_are_refused_or_harmless(target: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    good = corpus(target)
    at = st.integers(0, 10_000)
    changed = st.builds(
        lambda data, first, junk, skip: data[: first % (len(data) + 1)] + junk + data[first % (len(data) + 1) + skip :],
        st.sampled_from(good),
        at,
        st.binary(max_size=20),
        st.integers(0, 30),
    )

    @settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=40 if target == "index" else 150)
    @given(st.binary(max_size=400) | changed)
    def attack(data: bytes) -> None:
        TARGETS[target](data)

    for data in good:
        TARGETS[target](data)
    attack()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: SQLite's syncs are real."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as name:
        yield Path(name)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("target", TARGETS)
def test_a_guided_fuzzer_finds_nothing(target: str, folder: Path) -> None:
    (folder / "corpus").mkdir()
    script = str(Path(__file__).parent / "fuzz_store.py")
    command = [sys.executable, script, target, "corpus", f"-max_total_time={SECONDS}", "-max_len=8192", "-timeout=20"]
    environ = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-4000:]
