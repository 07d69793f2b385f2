"""The parsers of CRIU images, bodies and frames, and what is planned by them, against hostile bytes: hypothesis always;
atheris, which watches the branches taken, where it is installed, for DORMOUSE_FUZZ_SECONDS (1) a target."""

from __future__ import annotations

import contextlib
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
from snapshot_targets import TARGETS, corpus

from dormouse.errors import DamagedError
from dormouse.snapshot.criu_images import Mapping
from dormouse.snapshot.images import BODY_VERSION, ImageFile, SnapshotBody, decode_body, encode_body
from dormouse.snapshot.memory_map import AddressSpace, Piece, Window, mask_bytes, plain_windows

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

    @settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=150)
    @given(st.binary(max_size=400) | changed)
    def attack(data: bytes) -> None:
        TARGETS[target](data)

    for data in good:
        TARGETS[target](data)
    attack()


masks = st.one_of(
    st.binary(min_size=32, max_size=32),
    st.integers(0, 255).map(lambda bit: mask_bytes(1 << bit)),
    st.binary(max_size=33),
)
pieces = st.builds(Piece, st.integers(-1, 4), masks, st.just(b"") | masks)
windows = st.builds(Window, st.integers(-1, 10) | st.integers(0, 1 << 63), st.lists(pieces, max_size=5))
spaces = st.builds(
    AddressSpace,
    pid=st.integers(-1, 3),
    pages_id=st.integers(-1, 3),
    pages=st.integers(-1, 1 << 62),
    windows=st.lists(windows, max_size=5)
    | st.lists(windows, max_size=5).map(lambda w: sorted(w, key=lambda x: x.number)),
    digests=st.integers(0, 5).map(lambda count: bytes(range(32 * count))) | st.binary(max_size=70),
)
images = st.builds(
    ImageFile,
    name=st.sampled_from(["a.img", "../a", "/etc/passwd", "pages-1.img", "", ".", "a\n"]) | st.text(max_size=5),
    size=st.integers(-1, 3) | st.integers(0, 1 << 63),
    inline=st.none() | st.binary(max_size=3),
    digests=st.just(b"") | st.just(bytes(32)),
)


@settings(deadline=None, max_examples=500)
@given(st.lists(spaces, max_size=3), st.lists(images, max_size=3))
def test_any_body_of_the_right_types_is_refused_or_harmless(memory: list[AddressSpace], found: list[ImageFile]) -> None:
    body = SnapshotBody(BODY_VERSION, "m", {}, 1, [], found, memory, [], {})
    TARGETS["body"](encode_body(body))
    with contextlib.suppress(DamagedError):
        decode_body(encode_body(body), "x")
        assert all("/" not in image.name and image.name not in ("", ".", "..") for image in found)


ranges = st.tuples(st.integers(0, 6 << 20), st.integers(0, 6 << 20))


@given(st.lists(ranges, max_size=8), st.lists(st.integers(0, 6), unique=True).map(sorted))
def test_mappings_in_any_order_and_of_any_size_are_harmless(given: list[tuple[int, int]], numbers: list[int]) -> None:
    mappings = [Mapping(start, end, plain=True) for start, end in given]
    found = [Window(number, [Piece(0, mask_bytes(1))]) for number in numbers]
    assert plain_windows(found, mappings) <= set(numbers)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as name:
        yield Path(name)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("target", TARGETS)
def test_a_guided_fuzzer_finds_nothing(target: str, folder: Path) -> None:
    (folder / "corpus").mkdir()
    script = str(Path(__file__).parent / "fuzz_snapshot.py")
    command = [sys.executable, script, target, "corpus", f"-max_total_time={SECONDS}", "-max_len=8192", "-timeout=20"]
    environ = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-4000:]
