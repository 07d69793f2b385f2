from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dormouse.checkpoint.models import ImportedModel

from .worker_client import WorkerClient


@pytest.fixture(scope="module")
def real(smollm2: ImportedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerClient]:
    """A worker that has loaded the real model."""
    with WorkerClient(tmp_path_factory.mktemp("worker") / "log") as worker:
        worker.load(smollm2.path)
        yield worker


@pytest.fixture
def null_model(tmp_path: Path) -> Path:
    return write_null_model(tmp_path / "null-model")


def write_null_model(folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "dormouse-null", "null": settings}))
    return folder
