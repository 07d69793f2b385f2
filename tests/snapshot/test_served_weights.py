"""A node that serves a model with weights: asleep they take no memory, awake they are right or the model says why."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.models import quiet
from tests.snapshot.conftest import make_null_model
from tests.snapshot.test_segments import damage

from dormouse.checkpoint.importer import import_model
from dormouse.checkpoint.models import ImportedModel
from dormouse.config import ModelConfig, ServeConfig
from dormouse.data_dir import DataDir
from dormouse.engine.messages import Delta, Sampling, TextPrompt
from dormouse.errors import DamagedError
from dormouse.node.assemble import assemble_node
from dormouse.node.node import Node

pytestmark = pytest.mark.root

NAME = "heavy"


@pytest.fixture
def model(data_dir: DataDir, tmp_path: Path) -> ImportedModel:
    source = make_null_model(tmp_path / "source", weights_mb=20)
    return import_model(str(source), NAME, data_dir, progress=quiet)


async def ask(node: Node) -> tuple[str, str]:
    """How the model started, and what it says."""
    async with node.replica(NAME) as lease:
        events = lease.generate(TextPrompt("what does a dormouse do"), Sampling(max_tokens=12, temperature=0.0))
        return lease.start.path, "".join([event.text async for event in events if isinstance(event, Delta)])


def segments() -> int:
    """The segments that processes below this one hold."""
    found = set()
    for process in subprocess.run(
        ["pgrep", "-P", str(os.getpid())], capture_output=True, text=True, check=False
    ).stdout.split():
        for link in Path(f"/proc/{process}/fd").glob("*"):
            if link.is_symlink() and str(link.readlink()).startswith(f"/memfd:dormouse {NAME}"):
                found.add(link.stat().st_ino)
    return len(found)


def serving(data: DataDir, kept_weights: float = 0) -> ServeConfig:
    models = {NAME: ModelConfig(keep_alive=float("inf"))}
    return ServeConfig(data_dir=data.root, kept_weights=kept_weights, models=models)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_model_sleeps_without_its_weights_and_wakes_with_them(
    data_dir: DataDir, model: ImportedModel, kept: int
) -> None:
    """`kept`: they stay in memory meanwhile, until somebody has them freed."""

    async def body() -> None:
        async with await assemble_node(serving(data_dir, kept_weights=float(kept))) as node:
            first = await ask(node)
            assert await asyncio.to_thread(segments) == 1
            for _ in range(2):
                assert (await node.sleep(NAME)).snapshot_id
                assert await asyncio.to_thread(segments) == kept == len(node.kept_weights())
                await node.free_weights()
                assert await asyncio.to_thread(segments) == 0 == len(node.kept_weights())
                assert await ask(node) == ("snapshot", first[1])
            assert first[0] != "snapshot"

    asyncio.run(body())


def test_damaged_weights_reach_whoever_asks_and_a_new_import_mends_them(
    data_dir: DataDir, model: ImportedModel, tmp_path: Path
) -> None:
    async def body() -> str:
        async with await assemble_node(serving(data_dir)) as node:
            _start, text = await ask(node)
            await node.sleep(NAME)
            await asyncio.to_thread(damage, data_dir, model, 1)
            with pytest.raises(DamagedError, match="the weights of heavy can't be read") as caught:
                await ask(node)
            assert "--replace" in caught.value.remedy
            (status,) = node.statuses()
            assert status.last_error and "the weights of heavy" in status.last_error
            assert await asyncio.to_thread(segments) == 0
            return text

    async def mended() -> str:
        async with await assemble_node(serving(data_dir)) as node:
            return (await ask(node))[1]

    text = asyncio.run(body())
    verify = dormouse("verify", data_dir, status=5)
    assert verify["weights_hit"] == [NAME]
    import_model(str(tmp_path / "source"), NAME, data_dir, progress=quiet, replace=True)
    assert dormouse("verify", data_dir)["ok"]
    assert asyncio.run(mended()) == text


def dormouse(verb: str, data: DataDir, *arguments: str, status: int = 0) -> dict[str, object]:
    command = [sys.executable, "-m", "dormouse.cli", verb, *arguments, "--json", "--data-dir", str(data.root)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == status, done.stdout
    return dict(json.loads(done.stdout))


def test_removing_a_model_frees_its_weights(data_dir: DataDir, model: ImportedModel) -> None:
    assert dormouse("ls", data_dir)["snapshots"] == []
    removed = dormouse("rm", data_dir, "--model", NAME)
    assert removed["removed"] == [NAME]
    assert isinstance(removed["freed_bytes"], int) and removed["freed_bytes"] > 13 << 20  # a third are zeros
    assert list((data_dir.store / "packs").iterdir()) == list((data_dir.store / "manifests").iterdir()) == []
