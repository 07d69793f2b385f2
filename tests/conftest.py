"""What all tests share: the real model, imported once per machine into a cache folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from dormouse.checkpoint.importer import import_model
from dormouse.checkpoint.models import ImportedModel, open_model
from dormouse.errors import NotFoundError

SMOLLM2 = "smollm2-135m"


@pytest.fixture(scope="session")
def smollm2() -> ImportedModel:
    """SmolLM2-135M-Instruct as `dormouse import smollm2-135m` makes it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dormouse-tests" / "models"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once import it once
        try:
            return open_model(cache, SMOLLM2)
        except NotFoundError:
            return import_model(SMOLLM2, SMOLLM2, cache, progress=lambda step, done, total: None)
