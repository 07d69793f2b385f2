"""What all tests share: the real model, imported once per machine into a cache folder, how kernels run, and turns at
the GPU."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels then run on the CPU, slowly
    if importlib.util.find_spec("triton") is not None:
        from tests.interpreter import hasten

        hasten()

from dormouse.checkpoint.importer import import_model
from dormouse.checkpoint.models import ImportedModel, open_model
from dormouse.data_dir import DataDir
from dormouse.errors import DormouseError
from dormouse.store.store import Store
from tests.gpu_turns import turn
from tests.models import quiet

SMOLLM2 = "smollm2-135m"
LONG = (
    "snapshot/test_memory_paths.py",
    "engine/test_transformers.py",
    "jobs/test_jobs.py",
    "test_end_to_end.py",
    "bench_smoke/test_bench_scripts.py",
    "snapshot/test_capture_restore.py",
    "jobs/test_job_edges.py",
    "test_bench_load.py",
    "fuzz/test_fuzz_snapshot.py",
    "jobs/test_programs.py",
    "test_sleep_end_to_end.py",
    "test_adapters_end_to_end.py",
    "test_chaos.py",
    "snapshot/test_segments.py",
    "node/test_node.py",
    "fuzz/test_fuzz_store.py",
    "checkpoint/test_loader.py",
)
"""What takes longest comes first: `make test` gives its workers whole files, and they shall end together."""


_NO_TURN = pytest.StashKey[str]()


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of what times the test
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Tests on a GPU take turns, see gpu_turns.py."""
    markers = list(item.iter_markers("gpu"))
    if not markers or not torch.cuda.is_available():
        return (yield)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(turn(alone=any(marker.kwargs.get("alone", False) for marker in markers)))
        except TimeoutError as error:  # here it would end the whole run
            item.stash[_NO_TURN] = str(error)
        return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The failure of a test that got no turn."""
    if _NO_TURN in item.stash:
        pytest.fail(item.stash[_NO_TURN])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the rest as they come."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(scope="session")
def smollm2() -> ImportedModel:
    """SmolLM2-135M-Instruct as `dormouse import smollm2-135m` makes it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dormouse-tests"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once import it once
        folder = DataDir(cache / "home").create()
        try:
            return _imported(folder)
        except DormouseError:  # not there yet, or made by another version
            shutil.rmtree(folder.root)
            return import_model(SMOLLM2, SMOLLM2, folder.create(), progress=quiet)


def _imported(folder: DataDir) -> ImportedModel:
    model = open_model(folder.models, SMOLLM2)
    assert model.checkpoint is not None
    with Store.open(folder.store) as store:
        store.manifest(model.checkpoint)
    return model
