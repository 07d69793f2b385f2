"""A data folder with CRIU and small null-engine models, for tests that make real snapshots."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dormouse.data_dir import DataDir, default_data_dir
from dormouse.errors import HostError
from dormouse.snapshot.criu_setup import Criu, find_criu
from dormouse.store.store import Store


@pytest.fixture(scope="session")
def criu() -> Criu:
    """The CRIU that `dormouse setup criu` has set up for this user."""
    try:
        return find_criu(default_data_dir(os.environ))
    except HostError as error:
        pytest.skip(str(error))


@pytest.fixture
def data_dir(tmp_path: Path, criu: Criu) -> DataDir:
    """An empty data folder that shares the user's CRIU."""
    folder = DataDir(tmp_path / "data").create()
    shared = default_data_dir(os.environ) / "criu"
    if shared.exists():
        folder.criu.symlink_to(shared)
    return folder


@pytest.fixture
def store(data_dir: DataDir) -> Iterator[Store]:
    """The store of that data folder."""
    with Store.open(data_dir.store) as opened:
        yield opened


@pytest.fixture
def null_model(tmp_path: Path) -> Path:
    """A null-engine model folder with 24 MB of heap: zeros, noise and text."""
    return make_null_model(tmp_path / "null-model", memory_mb=24)


def make_null_model(folder: Path, **settings: object) -> Path:
    """A null-engine model folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "dormouse-null", "null": settings}))
    return folder
