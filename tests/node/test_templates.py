"""Templates: made when it is quiet, given up when it is not, and a start path for models without a snapshot."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dormouse.config import ModelConfig
from dormouse.errors import DiskFullError, HostError, SnapshotError
from dormouse.node import templates
from tests.node.standin import FakeModel, StandInHost, configure, on_loop, run_node, until
from tests.node.test_node import ask

ENGINE = "transformers"
TEMPLATE = "template2"
"""The id of the template that is made after the first snapshot."""


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(templates, "QUIET_SECONDS", 0.02)
    yield


def is_offered(host: StandInHost) -> bool:
    """Whether the first template is there and known to the models."""
    return TEMPLATE in host.snapshots and host.calls.count("cleaned up") >= 2


def two_models(tmp_path: Path, **settings: Any) -> tuple[Any, dict[str, FakeModel]]:
    config = configure(tmp_path, {"mouse": ModelConfig(), "vole": ModelConfig()}, **settings)
    return config, {name: FakeModel(name, engine=ENGINE) for name in config.models}


@on_loop
async def test_a_template_is_made_in_a_quiet_time_and_starts_other_models_of_its_engine(tmp_path: Path) -> None:
    host = StandInHost()
    config, models = two_models(tmp_path)
    async with run_node(config, host, models) as node:
        assert await ask(node) == ("a b a", "cold")
        await node.sleep("mouse")
        await until(lambda: is_offered(host))
        await until(lambda: host.alive() == 0)
        assert await ask(node, model="vole") == ("a b a", "template")
        assert await ask(node) == ("a b a", "snapshot")
        await node.sleep("vole")
        assert await ask(node, model="vole") == ("a b a", "snapshot")
        assert host.calls.count("capture template") == 1
    async with run_node(config, host, models) as node:  # the next node finds it
        await node.remove(host.latest("vole") or "", force=False)
        assert await ask(node, model="vole") == ("a b a", "template")


@on_loop
async def test_no_template_before_a_model_has_slept_and_none_for_other_engines_or_when_off(tmp_path: Path) -> None:
    host = StandInHost()
    config, models = two_models(tmp_path / "a")
    async with run_node(config, host, models) as node:
        await ask(node)
        await asyncio.sleep(0.2)
    off, models = two_models(tmp_path / "b", templates=False)
    null = configure(tmp_path / "c")
    for chosen, with_models in ((off, models), (null, None)):
        async with run_node(chosen, host, with_models) as node:
            await ask(node)
            await node.sleep("mouse")
            await asyncio.sleep(0.2)
    assert "capture template" not in host.calls


@pytest.mark.parametrize("call", ["start_worker", "capture template"])
@on_loop
async def test_a_request_ends_the_making_of_a_template_at_once(tmp_path: Path, call: str) -> None:
    host = StandInHost()
    config, models = two_models(tmp_path)
    async with run_node(config, host, models) as node:
        await node.wake("mouse")
        host.gates[call] = asyncio.Event()
        calls = host.calls.count(call)
        await node.sleep("mouse")
        await until(lambda: host.calls.count(call) > calls)
        del host.gates[call]
        assert await ask(node) == ("a b a", "snapshot")
        assert host.alive() == 1, "the worker of the template is gone"
        await node.sleep("mouse")
        await until(lambda: bool(host.latest("transformers cpu threads=all", kind="template")))


@on_loop
async def test_a_template_that_fails_is_quarantined_and_the_model_starts_cold(tmp_path: Path) -> None:
    host = StandInHost()
    config, models = two_models(tmp_path)
    async with run_node(config, host, models) as node:
        await node.wake("mouse")
        await node.sleep("mouse")
        await until(lambda: is_offered(host))
        host.faults["restore template"] = SnapshotError("criu failed")
        assert await ask(node, model="vole") == ("a b a", "cold")
        await until(lambda: TEMPLATE in host.quarantined)
        await node.sleep("vole")
        await until(lambda: host.calls.count("capture template") == 2)
        await until(lambda: TEMPLATE not in host.snapshots)


@on_loop
async def test_a_template_of_another_version_is_replaced(tmp_path: Path) -> None:
    host = StandInHost()
    config, models = two_models(tmp_path)
    async with run_node(config, host, models) as node:
        await node.wake("mouse")
        await node.sleep("mouse")
        await until(lambda: is_offered(host))
        host.snapshots[TEMPLATE] = {"worker": "older"}
        assert await ask(node, model="vole") == ("a b a", "cold")
        await node.sleep("vole")
        await until(lambda: host.calls.count("capture template") == 2)
        await until(lambda: TEMPLATE not in host.snapshots)
        assert host.quarantined == {}


@on_loop
async def test_a_model_that_cannot_be_loaded_does_not_cost_the_template(tmp_path: Path) -> None:
    host = StandInHost()
    config, models = two_models(tmp_path)
    async with run_node(config, host, models) as node:
        await node.wake("mouse")
        await node.sleep("mouse")
        await until(lambda: is_offered(host))
        host.worker_fault = "load"
        assert await ask(node, model="vole") == ("a b a", "cold")
        assert host.quarantined == {}


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("start_worker", HostError("none")),
        ("capture template", DiskFullError("no room")),
        ("capture template", ZeroDivisionError("a bug of ours")),
    ],
)
@on_loop
async def test_templates_that_cannot_be_made_are_given_up_after_some_tries(
    tmp_path: Path, call: str, error: Any
) -> None:
    host = StandInHost()
    config, models = two_models(tmp_path)
    async with run_node(config, host, models) as node:
        await node.wake("mouse")
        host.lasting_faults[call] = error
        calls = host.calls.count(call)
        await node.sleep("mouse")
        await until(lambda: host.calls.count(call) == calls + templates.MAX_FAILURES)
        await asyncio.sleep(0.1)
        assert host.calls.count(call) == calls + templates.MAX_FAILURES
        host.lasting_faults.clear()
        assert await ask(node) == ("a b a", "snapshot")


@pytest.mark.parametrize("fault", ["hello-exit", "prepare", "prepare-exit", "quiesce"])
@on_loop
async def test_a_worker_that_fails_on_its_way_to_a_template_is_ended(tmp_path: Path, fault: str) -> None:
    host = StandInHost()
    config, models = two_models(tmp_path)
    async with run_node(config, host, models) as node:
        await node.wake("mouse")
        host.worker_fault = fault
        await node.sleep("mouse")
        await until(lambda: is_offered(host))
        await until(lambda: host.alive() == 0)


@on_loop
async def test_no_template_without_room_for_its_worker(tmp_path: Path) -> None:
    host = StandInHost()
    config, models = two_models(tmp_path, memory=(1 << 30) + (2 << 20))
    async with run_node(config, host, models) as node:
        await node.wake("mouse")
        await node.sleep("mouse")
        await node.wake("mouse")
        await asyncio.sleep(0.1)
        assert "capture template" not in host.calls
