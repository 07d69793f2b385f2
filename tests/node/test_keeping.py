"""The policy at work in a node: who stays how long, what is made ready ahead, what is foretold of starts."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dormouse.config import ModelConfig
from dormouse.errors import NotFoundError, SnapshotError
from dormouse.node import keeping, learned
from dormouse.node.node import Node
from dormouse.schedule.cluster import Cluster, Replica
from dormouse.schedule.keepalive import FixedTtl, Minimum, Provisioned, Step, Steps, Warm
from tests.node.standin import FakeModel, StandInHost, configure, on_loop, run_node, until
from tests.node.test_node import ask, state

STAYS = {"sleep_memory": 0.5, "memory": "4GiB"}


class Scripted(FixedTtl):
    """A policy whose steps and pre-warms are given, and which remembers what it was told."""

    def __init__(self, steps: dict[str, float], warm_after: float | None = None) -> None:
        super().__init__()
        self._steps, self._warm_after = steps, warm_after
        self._warm: list[Warm] = []
        self.told: list[str] = []

    def on_request(self, model: str, now: float) -> None:
        self.told.append(f"request {model}")

    def on_start(self, model: str, evicted: Sequence[Replica], now: float) -> None:
        self.told.append(" ".join((f"start {model}", *(f"for {one.model}" for one in evicted))))

    def on_gone(self, replica: Replica, view: Cluster, now: float) -> None:
        self.told.append(f"gone {replica.name}")

    def on_idle(self, replica: Replica, view: Cluster, now: float) -> Steps:
        assert replica.idle, replica
        self.told.append(f"idle {replica.name}")
        if self._warm_after is not None:
            self._warm.append(Warm(replica.model, now + self._warm_after, now + 60.0))
            self._warm_after = None
            return tuple(Step(to, now + after) for to, after in self._steps.items())  # type: ignore[arg-type]
        return () if self._warm else tuple(Step(to, now + after) for to, after in self._steps.items())  # type: ignore[arg-type]

    def next_prewarm(self) -> float | None:
        return self._warm[0].at if self._warm else None

    def prewarm(self, now: float) -> list[Warm]:
        due = [warm for warm in self._warm if warm.at <= now]
        self._warm = [warm for warm in self._warm if warm.at > now]
        return due


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Scripted], Scripted]:
    """Have the node run a scripted policy."""

    def use(policy: Scripted) -> Scripted:
        monkeypatch.setattr(keeping, "make_policy", lambda config, estimator: Provisioned(policy, {}))
        return policy

    return use


@on_loop
async def step_down(tmp_path: Path) -> None:
    host = StandInHost()
    models = {"mouse": FakeModel("mouse", checkpoint="c")}
    async with run_node(configure(tmp_path, {"mouse": ModelConfig(keep_alive=0)}, **STAYS), host, models) as node:
        await ask(node)
        host.kept_weights = {"c": 1 << 20}
        assert state(node) == "ready", "keep_alive is what fixed uses alone"
        await until(lambda: state(node) == "dozing")
        assert host.alive() == 1
        await until(lambda: state(node) == "asleep")
        assert host.alive() == 0
        await until(lambda: not host.kept_weights)
        assert (await ask(node))[1] == "snapshot"


def test_an_idle_model_steps_down_layer_by_layer(tmp_path: Path, use: Callable[[Scripted], Scripted]) -> None:
    policy = use(Scripted({"sleep": 0.15, "snapshot": 0.4, "nothing": 0.6}))
    step_down(tmp_path)
    once = ["request mouse", "start mouse", "idle mouse", "gone mouse"]
    assert policy.told == [*once, *once]


@on_loop
async def without_a_doze(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path, **STAYS), host) as node:
        await ask(node)
        await until(lambda: state(node) == "asleep")
        assert host.alive() == 0 and list(host.snapshots) == ["snap1"]
        assert "dozing" not in {told["outcome"] for told in (await node.explain("mouse"))["latest"]}


def test_a_step_to_the_snapshot_ends_the_process(tmp_path: Path, use: Callable[[Scripted], Scripted]) -> None:
    use(Scripted({"snapshot": 0.05}))
    without_a_doze(tmp_path)


@on_loop
async def made_ready(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path, **STAYS), host) as node:
        await ask(node)
        await until(lambda: state(node) == "dozing")
        await until(lambda: state(node) == "ready")
        assert node.prewarms == {"mouse": 1}
        assert (await ask(node))[1] == "hot"


def test_what_the_policy_expects_is_made_ready_ahead(tmp_path: Path, use: Callable[[Scripted], Scripted]) -> None:
    policy = use(Scripted({"sleep": 0.05}, warm_after=0.5))
    policy.prewarm(0.0)
    made_ready(tmp_path)
    assert policy.told.count("request mouse") == 2, "a start ahead is no request"


@on_loop
async def one_for_another(tmp_path: Path) -> None:
    models = {name: FakeModel(name, weight_bytes=400 << 20) for name in ("one", "two")}
    config = configure(tmp_path, {name: ModelConfig() for name in models}, memory="700MiB")
    async with run_node(config, StandInHost(), models) as node:
        await ask(node, model="one")
        await ask(node, model="two")
        assert await ask(node, model="two")


def test_the_policy_hears_who_goes_for_a_start(tmp_path: Path, use: Callable[[Scripted], Scripted]) -> None:
    policy = use(Scripted({}))
    one_for_another(tmp_path)
    assert [word for word in policy.told if word.startswith("start")] == ["start one", "start two for one"]


@on_loop
async def test_a_start_ahead_takes_nobodys_room(tmp_path: Path) -> None:
    names = ("one", "two")
    models = {name: FakeModel(name, weight_bytes=400 << 20) for name in names}
    config = configure(tmp_path, {name: ModelConfig() for name in names}, memory="700MiB")
    async with run_node(config, StandInHost(), models) as node:
        await ask(node, model="one")
        runner = node._crew("two").leader
        await node._make_ready(runner, may_evict=False)
        assert (state(node, "one"), state(node, "two"), node.prewarms) == ("ready", "asleep", {})
        await node._make_ready(runner, may_evict=True)
        assert (state(node, "one"), state(node, "two"), node.prewarms) == ("asleep", "ready", {"two": 1})


@on_loop
async def test_a_provisioned_model_is_there_before_anybody_asks_and_goes_for_nobody(tmp_path: Path) -> None:
    models = {name: FakeModel(name, weight_bytes=400 << 20) for name in ("one", "two")}
    settings = {"one": ModelConfig(keep_alive=0, provisioned=True), "two": ModelConfig()}
    async with run_node(configure(tmp_path, settings, memory="700MiB"), StandInHost(), models) as node:
        await until(lambda: state(node, "one") == "ready")
        assert (await ask(node, model="one"))[1] == "hot"
        with pytest.raises(Exception, match="kept forever"):
            await ask(node, model="two")
        assert (await node.explain("one"))["why"] == "provisioned"


@on_loop
async def test_outside_its_times_a_provisioned_model_is_like_any_other(tmp_path: Path) -> None:
    now = 1_700_000_000.0
    hour = int(now % 86_400) // 3600
    times = f"{(hour + 2) % 24:02}:00-{(hour + 3) % 24:02}:00"
    settings = {"mouse": ModelConfig(keep_alive=0.05, provisioned=(times,))}
    async with run_node(configure(tmp_path, settings), StandInHost(), wall_clock=lambda: now) as node:
        await asyncio.sleep(0.1)
        assert state(node) == "asleep"
        await ask(node)
        await until(lambda: state(node) == "asleep")


def test_a_border_of_its_times_is_not_missed(tmp_path: Path) -> None:
    provisioned = Provisioned(FixedTtl(), {"m": (Minimum(1, 0.0, 10.0),)})
    assert provisioned.least("m", 86_400.0 * 3 + 9.9) == 1 and provisioned.least("m", 86_400.0 * 3 + 10.0) == 0


@on_loop
async def test_every_start_is_foretold_and_teaches(tmp_path: Path) -> None:
    host = StandInHost(delay=0.05)
    config = configure(tmp_path, {"mouse": ModelConfig(keep_alive=math.inf)}, **STAYS)
    async with run_node(config, host) as node:
        for _ in range(3):
            await ask(node)
            await node.sleep("mouse")
        await ask(node)
        await node.sleep("mouse", keep=True)
        await ask(node)
        found = await node.explain("mouse")
        assert [told["path"] for told in found["latest"]] == ["cold", "snapshot", "snapshot", "snapshot", "sleep"]
        assert all(told["outcome"] == "ready" and told["took"] > 0 for told in found["latest"])
        first, second, third = (told["estimate"] for told in found["latest"][1:4])
        took = [told["took"] for told in found["latest"][1:4]]
        assert abs(second - took[0]) < abs(first - took[0]), "the first was a guess, the second learned"
        assert found["latest"][0]["why"] == "no snapshot, no template"
        assert found["latest"][1]["why"] == "snapshot snap1" and found["latest"][4]["why"] == "its process was there"
        errors = node.estimate_errors()
        assert (errors["snapshot"].count, errors["sleep"].count) == (3, 1) and third > 0
    saved = json.loads((tmp_path / learned.FILE).read_text())
    assert {path for _who, path, *_rest in saved["phases"]} == {"cold", "snapshot", "sleep"}
    async with run_node(config, host) as node:
        (path,) = [row for row in (await node.explain("mouse"))["paths"] if row["path"] == "snapshot"]
        assert path["estimate"] == pytest.approx(took[-1], abs=0.2), "it knows what the last node learned"


@on_loop
async def test_a_path_that_fails_is_followed_by_a_new_estimate(tmp_path: Path) -> None:
    host = StandInHost()
    async with run_node(configure(tmp_path), host) as node:
        await ask(node)
        await node.sleep("mouse")
        host.lasting_faults["restore"] = SnapshotError("criu failed")
        assert (await ask(node))[1] == "cold"
        latest = (await node.explain("mouse"))["latest"][1:]
        assert [(told["path"], told["outcome"]) for told in latest] == [
            ("snapshot", "snapshot_failed"),
            ("snapshot", "snapshot_failed"),
            ("cold", "ready"),
        ]
        assert latest[-1]["why"].endswith("after snapshot_failed")


@on_loop
async def test_the_file_may_hold_anything(tmp_path: Path) -> None:
    (tmp_path / learned.FILE).write_bytes(b'{"version": 1, "rates": 5}')
    async with run_node(configure(tmp_path), StandInHost()) as node:
        assert (await ask(node))[1] == "cold"
    assert json.loads((tmp_path / learned.FILE).read_text())["phases"]


async def outlook_of(node: Node, name: str = "mouse") -> dict[str, Any]:
    return next(row for row in await node.outlooks() if row["name"] == name)


@on_loop
async def test_the_outlook_says_how_it_starts_next_and_when_it_goes(tmp_path: Path) -> None:
    async with run_node(configure(tmp_path, {"mouse": ModelConfig(keep_alive=50.0)}, **STAYS), StandInHost()) as node:
        found = await outlook_of(node)
        assert (found["state"], found["path"], found["step"], found["why"]) == ("asleep", "cold", None, "policy fixed")
        assert found["estimate"] == pytest.approx(sum(found["parts"].values())) and found["p95"] > found["estimate"]
        await ask(node)
        found = await outlook_of(node)
        assert (found["path"], found["step"]["to"]) == ("hot", "sleep")
        assert found["step"]["at"] - node.started == pytest.approx(50.0, abs=5.0)
        await node.sleep("mouse", keep=True)
        found = await outlook_of(node)
        assert (found["path"], found["why"]) == ("sleep", "policy fixed, until its room is needed")
        await node.sleep("mouse")
        found = await node.explain("mouse")
        assert found["path"] == "snapshot" and [row["path"] for row in found["paths"]] == ["snapshot", "cold"]
        assert "start" in found["decision"]["why"] and found["decision"]["chosen"]["action"] == "start"


@on_loop
async def test_a_decision_names_who_would_go(tmp_path: Path) -> None:
    models = {name: FakeModel(name, weight_bytes=400 << 20) for name in ("one", "two")}
    config = configure(tmp_path, {name: ModelConfig() for name in models}, memory="700MiB")
    async with run_node(config, StandInHost(), models) as node:
        await ask(node, model="one")
        found = await node.explain("two")
        assert list(found["decision"]["chosen"]["evicts"]) == ["one"] and "evicts one" in found["decision"]["why"]
        await ask(node, model="two")
        assert "evicted model of one" in (await node.explain("two"))["latest"][-1]["why"]
        async with node.replica("two"):
            assert (await node.explain("one"))["decision"]["chosen"]["action"] == "wait"
        with pytest.raises(NotFoundError, match="Did you mean"):
            await node.explain("twoo")
