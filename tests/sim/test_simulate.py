"""Whole simulations: every request comes out once, runs repeat by their seed, and bad scenarios say what is wrong."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dormouse.cli import cli
from dormouse.errors import ConfigError
from dormouse.schedule.cluster import State
from dormouse.sim.report import distances, row_of
from dormouse.sim.run import Outcome, simulate
from dormouse.sim.scenario import Scenario, load_scenario, scenario_schema
from dormouse.sim.world import World

SCENARIOS = Path(__file__).parents[2] / "scenarios"

PLACEMENTS = ("any", "random", "locality-preempt", "locality-migrate", "dormouse")
KEEP_ALIVES = ("fixed", "load", "lru", "greedy-dual", "histogram", "layered", "expected", "oracle")


def tree(**changes: Any) -> dict[str, Any]:
    """A small scenario in which room is short."""
    return {
        "name": "small",
        "duration": 300,
        "timeout": 60,
        "nodes": [
            {"count": 2, "gpus": 2, "gpu_memory": "30GB", "host_memory": "8GB", "dram_tier": "30GB",
             "disk_tier": "1TB", "network": "10Gbps", "disk": "5GB/s", "pcie": "20GB/s"}
        ],
        "models": [
            {"name": "one", "copies": 5, "weights": "13GB", "coded": 0.7, "kv": "4GB", "slots": 2},
            {"name": "wide", "weights": "40GB", "gpus": 2, "slots": 4},
        ],
        "requests": {"rate": 0.6, "cv": 3, "popularity": 0.8, "lengths": {"mean_in": 300, "mean_out": 60}},
        "systems": {"it": {}},
    } | changes  # fmt: skip


def system(placement: str, keep_alive: str = "fixed", **rest: Any) -> dict[str, Any]:
    paths = {"cold": {"process": 4, "ready": 1}}
    if placement == "dormouse":
        paths |= {"snapshot": {"process": 0.5, "ready": 0.1}, "sleep": {"ready": 0.1}}
    return {"placement": placement, "keep_alive": {"policy": keep_alive, "seconds": 30}, "paths": paths} | rest


def run(values: dict[str, Any]) -> list[Outcome]:
    return list(simulate(Scenario.model_validate(values), traces=Path()))


def balanced(outcome: Outcome) -> None:
    """Requests and what they met add up."""
    assert len(outcome.records) == len(outcome.load.trace)
    start, total = np.array(outcome.records.start), np.array(outcome.records.total)
    assert (start >= 0).all() and (start <= total + 1e-6).all()
    given_up = np.array(outcome.records.given_up, dtype=bool)
    assert (start[given_up] >= 60 - 1e-6).all()  # more: it had begun, and stood still for so long later
    row = row_of(outcome, 5)
    assert row.hot + row.sleep + row.snapshot + row.template + row.cold == pytest.approx(1, abs=1e-3)
    assert outcome.counts.gpu_busy_seconds <= outcome.counts.gpu_seconds + 1e-6 <= 4 * outcome.seconds + 1e-5


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_request_comes_out_once_under_every_placement(placement: str) -> None:
    for sequential in (False, True):
        made = system(placement, loading={"sequential": sequential, "coded": True})
        for outcome in run(tree(systems={"it": made})):
            balanced(outcome)


@pytest.mark.parametrize("keep_alive", KEEP_ALIVES)
def test_every_request_comes_out_once_under_every_keep_alive(keep_alive: str) -> None:
    for placement in ("any", "dormouse"):
        for outcome in run(tree(systems={"it": system(placement, keep_alive)})):
            balanced(outcome)


def test_a_run_repeats_by_its_seed() -> None:
    values = tree(systems={"it": system("dormouse", noise=0.1)})
    first, second = (run(values)[0] for _ in range(2))
    other = run(values | {"seed": 5})[0]
    assert first.records.start == second.records.start
    assert first.records.start != other.records.start


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10_000),
    placement=st.sampled_from(PLACEMENTS),
    keep_alive=st.sampled_from(KEEP_ALIVES),
    rate=st.sampled_from([0.05, 0.5, 2.0]),
    evict=st.booleans(),
)
def test_memory_is_never_exceeded_and_nothing_is_left_over(
    seed: int, placement: str, keep_alive: str, rate: float, evict: bool
) -> None:
    show = World._show

    def checked(world: World, worker: Any) -> None:
        show(world, worker)
        for node in world.view.nodes:
            assert min(world.view.free(node)) >= 0 and world.view.free_host(node) >= 0
        used = [0, 0]
        for other in world.workers.values():
            if other.node == worker.node and other.state is not State.SLEEPING and other.name in world.view:
                for gpu in other.gpus:
                    used[gpu] += other.model.device_bytes
        assert max(used) <= 30e9

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "_show", checked)
        requests = {"rate": rate, "cv": 4, "popularity": 0.5, "lengths": {"mean_in": 100, "mean_out": 40}}
        made = system(placement, keep_alive, evict_idle=evict)
        for outcome in run(tree(seed=seed, duration=120, requests=requests, systems={"it": made})):
            balanced(outcome)


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10_000), rate=st.sampled_from([0.05, 0.3]), cv=st.sampled_from([1, 4]))
def test_nobody_has_fewer_starts_and_less_waste_than_the_oracle(seed: int, rate: float, cv: int) -> None:
    systems = {name: system("dormouse", name) for name in KEEP_ALIVES if name != "load"}
    requests = {"rate": rate, "cv": cv, "popularity": 0.8, "lengths": {"mean_in": 100, "mean_out": 40}}
    models = [{"name": "one", "copies": 5, "weights": "13GB", "coded": 0.7, "kv": "4GB", "slots": 8}]
    values = tree(seed=seed, duration=900, requests=requests, models=models, systems=systems)
    scenario = Scenario.model_validate(values)
    rows = [row_of(outcome, 5) for outcome in run(values)]
    found = {one.system: one for one in distances(scenario, rows)}
    assert found["oracle"].waited_more == 0.0 and found["oracle"].waste_times == 1.0
    slack = 2 / max(rows[0].requests, 1)  # two starts on one link may come in the worse order
    assert not [one for one in found.values() if one.waited_more < -slack and one.waste_times < 1.0]


def test_idle_memory_is_counted_for_what_holds_it() -> None:
    """One model, asked for twice: ready in between, asleep, or gone."""
    values = tree(
        nodes=[{"gpus": 1, "gpu_memory": "30GB", "host_memory": "8GB", "dram_tier": "30GB", "disk_tier": "1TB",
                "network": "10Gbps", "disk": "5GB/s", "pcie": "20GB/s"}],
        models=[{"name": "one", "weights": "10GB", "kv": "4GB", "process": "1GB", "prefill_rate": 1e6}],
        requests={"rate": 0.01, "lengths": {"mean_in": 1, "mean_out": 1, "cv": 0}},
        systems={"stays": system("dormouse", "lru"), "goes": system("dormouse", "fixed")},
        duration=200,
    )  # fmt: skip
    rows = {outcome.system: (row_of(outcome, 5), outcome) for outcome in run(values)}
    stays, outcome = rows["stays"]
    gap = float(np.diff(np.array(outcome.load.trace.time))[0]) - stays.start_p99
    assert stays.waste_gpu == pytest.approx(14 * gap, rel=0.05) and stays.waste_asleep == 0.0
    assert stays.waste_host == pytest.approx(gap, rel=0.05)
    assert stays.waste == pytest.approx(
        stays.waste_gpu + stays.waste_host + stays.waste_asleep + stays.waste_tier, rel=1e-4
    )
    assert rows["goes"][0].waste_gpu == pytest.approx(14 * 30, rel=0.05)  # for 30 seconds
    assert rows["goes"][0].waited == 1.0 and stays.waited == 0.5


def test_a_case_can_have_nodes_of_its_own() -> None:
    small = tree()["nodes"][0] | {"gpus": 1, "gpu_memory": "20GB"}
    with pytest.raises(ValueError, match="no node can hold wide"):
        Scenario.model_validate(tree(cases={"one": {"nodes": [small]}}))
    only = tree(models=tree()["models"][:1], cases={"one": {"nodes": [small | {"count": 1}]}, "two": {}})
    outcomes = run(only | {"systems": {"it": system("dormouse", "lru")}})
    assert [len(outcome.load.nodes) for outcome in outcomes] == [1, 1]
    assert outcomes[0].counts.gpu_seconds <= outcomes[0].seconds + 1e-6 < outcomes[1].counts.gpu_seconds


def test_a_download_takes_what_its_link_takes_and_a_second_start_is_near() -> None:
    values = tree(
        duration=10,
        requests={"rate": 0.1, "lengths": {"mean_in": 1, "mean_out": 1, "cv": 0}},
        models=[{"name": "one", "weights": "10GB", "prefill_rate": 1e6}],
        systems={
            "remote": {"placement": "any", "loading": {"preloaded": 0}},
            "disk": {"placement": "any", "loading": {"preloaded": 9}},
            "slow loader": {"placement": "any", "loading": {"preloaded": 9, "rate": "1GB/s"}},
            "two steps": {"placement": "any", "loading": {"preloaded": 0, "download_first": True}},
        },
    )
    seconds = {outcome.system: outcome.records.start[0] for outcome in run(values)}
    assert seconds == pytest.approx({"remote": 8.0, "disk": 2.0, "slow loader": 10.0, "two steps": 10.0}, rel=1e-6)


def test_ours_starts_sooner_than_a_scheduler_that_downloads() -> None:
    values = tree(systems={
        "theirs": system("any", loading={"preloaded": 0, "keep_on_disk": False, "keep_in_dram": False}),
        "ours": system("dormouse", "lru"),
    })  # fmt: skip
    rows = {outcome.system: row_of(outcome, 5) for outcome in run(values)}
    assert rows["ours"].start_mean < rows["theirs"].start_mean / 4
    assert rows["ours"].estimate_error_median < 0.05


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_scenarios_that_we_ship_are_valid(path: Path) -> None:
    assert load_scenario(path).name == path.stem


def test_every_setting_is_in_the_schema() -> None:
    assert {"nodes", "models", "requests", "systems", "cases", "published"} <= set(scenario_schema()["properties"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"models": [{"name": "huge", "weights": "900GB"}]}, "no node can hold huge: it needs 1 GPUs with 900.0 GB"),
        ({"models": []}, "has no models"),
        ({"systems": {"it": {"paths": {"sleep": {}}}}}, "has no path `cold`"),
        ({"systems": {"it": {"placement": "best"}}}, "line"),
        ({"tiemout": 3}, "line 1: tiemout: no such setting"),
        ({"duration": "forever"}, "must end some day"),
        ({"published": [{"system": "x", "case": "", "value": 1, "source": "y"}]}, "there is no system 'x'"),
    ],
)
def test_an_impossible_scenario_is_refused_in_one_sentence(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text(yaml.safe_dump(dict(reversed(list(tree(**change).items()))), sort_keys=False))
    with pytest.raises(ConfigError) as caught:
        load_scenario(path)
    assert caught.value.message.startswith(str(path))
    assert words in caught.value.message
    assert "\n" not in caught.value.message


def test_the_command_prints_json_csv_and_a_table_with_published_figures(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    published = [{"system": "it", "case": "", "value": 2.0, "source": "a paper"}]
    path.write_text(yaml.safe_dump(tree(published=published, duration=60)))
    done = CliRunner().invoke(cli, ["simulate", str(path), "--json"], catch_exceptions=False)
    result = json.loads(done.stdout)
    assert result["rows"][0]["requests"] == 36
    found = result["published"][0]
    assert found["error"] == pytest.approx(found["simulated"] / 2.0 - 1, abs=1e-3)
    rows = CliRunner().invoke(cli, ["simulate", str(path), "--csv"], catch_exceptions=False).stdout.splitlines()
    assert next(csv.DictReader(rows))["requests"] == "36"
    with pytest.raises(ConfigError, match="no system 'other'"):
        CliRunner().invoke(cli, ["simulate", str(path), "--system", "other"], catch_exceptions=False)


@pytest.mark.parametrize(("kind", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("html", b"<!doctype html>")])
def test_a_plot_is_drawn_of_each_kind(tmp_path: Path, kind: str, begins: bytes) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree(duration=60)))
    picture = tmp_path / f"plot.{kind}"
    done = CliRunner().invoke(cli, ["simulate", str(tmp_path / "small.yaml"), "--plot", str(picture)])
    assert done.exit_code == 0
    drawn = picture.read_bytes()
    assert drawn.startswith(begins) and len(drawn) > 10_000
    if kind != "png":
        assert b"<svg" in drawn and b"n0-1 GPU 1" in drawn.replace(b"<!-- ", b"")
