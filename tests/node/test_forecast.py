"""What a start teaches, what outlives the node, what goes for whom, and which policy is at work."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dormouse.config import ModelConfig
from dormouse.errors import ConfigError
from dormouse.node import learned
from dormouse.node.forecast import HERE, Forecast, Limits, Standing
from dormouse.node.keeping import as_stay, make_policy
from dormouse.node.observed import observed, seconds_of
from dormouse.node.page_cache import Stretch, cached_bytes, joined
from dormouse.node.replica import State, Stay
from dormouse.node.room import Way, find_way
from dormouse.phases import Phase, Phases
from dormouse.schedule.cluster import DISK, MEMORY, Artifact, Cluster, Link, ModelCost, Move, Node, StartPlan, Tier
from dormouse.schedule.estimate import Estimate, Estimator, Observed, Transferred
from dormouse.schedule.keepalive import Expected, GreedyDual, Histogram, Layered, Lru, Need, Step
from tests.node.standin import StandInHost, configure

MODEL = ModelCost("mouse", Artifact("c", 270, 134), phases={}, gpus=0)
WEIGHTS = Move("weights", "c", 134, Tier.DISK, (DISK, MEMORY))
IMAGE = Move("image", "s", 60, Tier.DISK, (DISK, MEMORY))


def steps(*rows: tuple[str, float, float]) -> Phases:
    return Phases(0.0, [Phase(name, start, end - start) for name, start, end in rows])


# A start of smollm2-135m from its snapshot, as it is recorded.
SNAPSHOT = steps(
    ("room", 0.0, 1.0),
    ("host", 1.0, 1.65),
    ("resume.segment", 1.01, 1.684),
    ("host.manifest", 1.002, 1.005),
    ("host.plan", 1.006, 1.027),
    ("host.criu start", 1.03, 1.08),
    ("host.criu images", 1.08, 1.446),
    ("host.fill ahead", 1.09, 1.47),
    ("host.criu finish", 1.446, 1.455),
    ("host.fill", 1.47, 1.636),
    ("resume", 1.65, 1.69),
    ("resume.weights", 1.66, 1.684),
    ("canary", 1.69, 1.79),
)


def test_a_restore_is_cut_into_weights_image_process_and_what_follows() -> None:
    links = {DISK: Link(1.0, queued=1000, transfers=1)}
    seen = observed(
        MODEL, HERE, StartPlan("snapshot", WEIGHTS, IMAGE), SNAPSHOT, expected=Estimate(0.7, 0.9, (), 1.4), links=links
    )
    assert seen.seconds == pytest.approx(0.79) == seconds_of(SNAPSHOT), "the wait for room is not the start's"
    image, weights = seen.transfers
    assert (weights.links, weights.size, weights.ahead) == ((DISK,), 134, 134 + 60)
    assert weights.seconds == pytest.approx(0.684)
    assert (image.size, image.ahead, image.seconds) == (60, 60 + 60, pytest.approx(1.636 - 1.08))
    phases = dict(seen.phases)
    assert phases["process"] == pytest.approx(0.66 - image.seconds)
    assert phases["ready"] == pytest.approx(0.106)
    assert (seen.predicted, seen.pace, seen.sources) == (0.7, 1.4, "weights disk, image disk")


def test_a_cold_start_reads_its_libraries_while_its_weights_come() -> None:
    phases = steps(
        ("room", 0.0, 0.0),
        ("host", 0.0, 0.1),
        ("load", 0.1, 5.5),
        ("load.segment", 0.05, 1.1),
        ("load.import", 0.1, 5.0),
        ("load.weights", 5.2, 5.2),
    )
    programs = Move("libraries", "libraries of transformers", 400, Tier.DRAM, (MEMORY,))
    seen = observed(MODEL, HERE, StartPlan("cold", WEIGHTS, programs), phases)
    image, weights = seen.transfers
    assert (image.name, image.links, image.seconds) == ("libraries", (MEMORY,), pytest.approx(4.9))
    assert (weights.seconds, seen.seconds) == (pytest.approx(1.1), pytest.approx(5.5))
    assert dict(seen.phases) == {"process": pytest.approx(0.3), "ready": pytest.approx(0.3)}


def test_a_wake_moves_nothing_when_its_weights_are_there() -> None:
    phases = steps(
        ("room", 0.0, 0.5), ("segments", 0.5, 0.501), ("resume", 0.501, 0.503), ("resume.weights", 0.502, 0.502)
    )
    seen = observed(MODEL, HERE, StartPlan("sleep", None, None), phases)
    assert (seen.transfers, seen.sources, seen.seconds) == ((), "nothing", pytest.approx(0.003))
    assert sum(seconds for _name, seconds in seen.phases) == pytest.approx(0.003)


NAMES = ["room", "host", "load", "load.import", "load.weights", "load.segment", "resume", "resume.weights"]
NAMES += ["resume.segment", "host.fill", "host.criu images", "canary", "segments", "anything"]
some_steps = st.lists(
    st.builds(Phase, st.sampled_from(NAMES), st.floats(0.0, 9.0), st.floats(0.0, 9.0)), max_size=12
).map(lambda found: Phases(0.0, found))
plans = st.builds(
    StartPlan,
    st.sampled_from(["sleep", "snapshot", "template", "cold"]),
    st.sampled_from([None, WEIGHTS, replace(WEIGHTS, size=0)]),
    st.sampled_from([None, IMAGE, replace(IMAGE, size=0)]),
)


@given(plans, some_steps)
def test_no_phases_make_nonsense(plan: StartPlan, phases: Phases) -> None:
    """Whatever was recorded: no part is negative, none longer than the start, and an estimator can take it."""
    seen = observed(MODEL, HERE, plan, phases)
    parts = [seconds for _name, seconds in seen.phases] + [move.seconds for move in seen.transfers]
    assert all(-1e-9 <= one <= max(seen.seconds, 0.0) + 1e-9 for one in parts)
    view = Cluster()
    view.add_node(_here())
    Estimator().observe(seen, view)


def _here() -> Node:
    return Node(HERE, (), 10, {DISK: Link(1e9), MEMORY: Link(4e9)})


# What outlives the node


def taught() -> Estimator:
    estimator, view = Estimator(), Cluster([_here()])
    moved = (Transferred("weights", (DISK,), 100, 2.0),)
    estimator.observe(
        Observed("mouse", "e", HERE, "cold", 5.0, moved, (("process", 3.0), ("ready", 0.0)), sources="weights disk"),
        view,
    )
    return estimator


def test_what_was_learned_is_kept_privately_and_read_again(tmp_path: Path) -> None:
    assert learned.load(tmp_path).saved() == Estimator().saved(), "nothing was saved yet"
    learned.save(tmp_path, taught().saved())
    assert (tmp_path / learned.FILE).stat().st_mode & 0o777 == 0o600
    again = learned.load(tmp_path)
    assert json.loads(json.dumps(again.saved())) == json.loads(json.dumps(taught().saved()))
    assert again.rate(HERE, DISK, 1.0) == pytest.approx(50.0)


GOOD = {"version": 1, "rates": [], "phases": [], "returns": []}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no json",
        b"\xff\xfe",
        b"[" * 100_000,
        b"null",
        json.dumps(GOOD | {"version": 2}).encode(),
        json.dumps(GOOD | {"more": 1}).encode(),
        json.dumps(GOOD | {"rates": [["n", "disk", "weights", "", [0.0]]]}).encode(),
        json.dumps(GOOD | {"rates": [["n", "disk", "weights", "", []]]}).encode(),
        json.dumps(GOOD | {"rates": [["n", "disk", "secrets", "", [1.0]]]}).encode(),
        json.dumps(GOOD | {"rates": [["n", "disk", "weights"]]}).encode(),
        json.dumps(GOOD | {"phases": [["m", "cold", "ready", "", "", [-1.0]]]}).encode(),
        json.dumps(GOOD | {"returns": [["m", [float("nan")]]]}).encode(),
        json.dumps(GOOD).replace('"returns": []', '"returns": [["m", [1e999]]]').encode(),
        json.dumps(GOOD | {"returns": [["m", ["5"]]]}).encode(),
        json.dumps(GOOD | {"returns": [["m" * 999, [5.0]]]}).encode(),
        b" " * ((16 << 20) + 1),
    ],
)
def test_whatever_the_file_holds_the_node_starts(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / learned.FILE).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert learned.load(tmp_path).saved() == Estimator().saved()
    assert "begins afresh" in caplog.text and len(caplog.records) == 1


@given(st.binary(max_size=300))
def test_no_bytes_raise(content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / learned.FILE).write_bytes(content)
        learned.load(Path(folder))


# The page cache


def test_the_page_cache_is_asked_without_being_filled(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(os.urandom(1 << 20))
    parts = [Stretch(path, 0, 1 << 20)]
    if cached_bytes(parts) is None:
        pytest.skip("this kernel has no cachestat")
    assert cached_bytes(parts) == 1 << 20
    assert cached_bytes([Stretch(path, 4096, 8192), Stretch(path, 0, 0)]) == 8192
    assert cached_bytes([Stretch(tmp_path / "gone", 0, 9)]) == 0


def test_neighbours_are_joined() -> None:
    a, b = Path("a"), Path("b")
    found = joined([Stretch(b, 0, 10), Stretch(a, 9000, 10), Stretch(a, 0, 4096), Stretch(a, 4096, 100)])
    assert found == (Stretch(a, 0, 4196), Stretch(a, 9000, 10), Stretch(b, 0, 10))


# Policies


@pytest.mark.parametrize(
    ("name", "kind"),
    [("lru", Lru), ("greedy-dual", GreedyDual), ("histogram", Histogram), ("layered", Layered), ("expected", Expected)],
)
def test_the_configuration_chooses_the_policy(tmp_path: Path, name: str, kind: type) -> None:
    policy = make_policy(configure(tmp_path, keep_alive_policy=name), Estimator())
    assert isinstance(policy._policy, kind)


def test_fixed_is_the_default_and_keeps_each_model_as_long_as_it_says(tmp_path: Path) -> None:
    models = {"one": ModelConfig(keep_alive=5.0), "two": ModelConfig(keep_alive=7.0)}
    forecast, limits = forecast_of(tmp_path), Limits(100, {})
    view = forecast.view([standing("one"), standing("two")], limits)
    policy = make_policy(configure(tmp_path, models), Estimator())
    ends = {name: policy.on_idle(view.replica(name), view, 100.0) for name in models}
    assert ends == {"one": (Step("sleep", 105.0),), "two": (Step("sleep", 107.0),)}


def test_provisioned_at_times_of_the_day(tmp_path: Path) -> None:
    models = {"always": ModelConfig(provisioned=True), "day": ModelConfig(provisioned=("08:00-18:00", "22:00-02:00"))}
    policy = make_policy(configure(tmp_path, models), Estimator())
    hours = {hour for hour in range(24) if policy.least("day", hour * 3600.0 + 5 * 86_400.0)}
    assert hours == {*range(8, 18), 22, 23, 0, 1} and policy.least("always", 0.0) == 1


@pytest.mark.parametrize("times", ["8:00-18:00", "08:00", "24:30-01:00", "08:00-08:00", "25:00-26:00", "08:00-18:60"])
def test_times_that_are_none_are_refused(times: str) -> None:
    with pytest.raises(ValueError, match="time"):
        ModelConfig.model_validate({"provisioned": [times]})


def test_steps_become_times_for_the_replica() -> None:
    assert as_stay((), 5.0) == Stay(math.inf, math.inf)
    assert as_stay((Step("sleep", 10.0),), -5.0) == Stay(5.0, math.inf)
    assert as_stay((Step("sleep", 10.0), Step("snapshot", 20.0), Step("nothing", 30.0)), 0.0) == Stay(10.0, 20.0)
    assert as_stay((Step("snapshot", 10.0),), 0.0) == Stay(10.0, 10.0)


# Who goes for whom


def forecast_of(tmp_path: Path) -> Forecast:
    return Forecast(tmp_path, StandInHost(), lambda: 0.0, lambda: 0.0)


def standing(name: str, doing: State = State.READY, host: int = 10, since: float = 0.0, **more: object) -> Standing:
    fields = {"weight_bytes": 5, "process_bytes": 2, "needs_host": 10} | more
    return Standing(
        name,
        name,
        "null",
        f"c of {name}",
        gpu=None,
        slots=1,
        doing=doing,
        since=since,
        host_bytes=host,
        **fields,  # type: ignore[arg-type]
    )


def way(tmp_path: Path, others: Sequence[Standing], needed: int, host: int, kept: dict[str, int] | None = None) -> Way:
    forecast, limits = forecast_of(tmp_path), Limits(host, {})
    models = {one.name: ModelConfig() for one in others}
    policy = make_policy(configure(tmp_path, models), Estimator())

    def victims(need: Need, view: Cluster) -> tuple[str, ...] | None:
        return policy.victims(need, view, 100.0)

    own = standing("own", State.STARTING, 0)
    return find_way(own, others, needed, kept or {}, limits, lambda all_: forecast.view(all_, limits), victims)


def test_weights_go_first_then_who_has_been_idle_longest(tmp_path: Path) -> None:
    ready, dozing = standing("ready", since=90.0), standing("dozing", State.DOZING, since=50.0)
    weights = {"old": 10, "c of own": 10, "new": 10}
    found = {needed: way(tmp_path, [ready, dozing], needed, 40, weights) for needed in (0, 10, 20, 30, 40, 41)}
    assert found == {
        0: Way(fits=True),
        10: Way(fits=False, weights=("old",)),
        20: Way(fits=False, weights=("old", "new")),
        30: Way(fits=False, weights=("old", "new"), evict=("dozing",)),
        40: Way(fits=False, weights=("old", "new"), evict=("dozing", "ready")),
        41: Way(fits=False),
    }, "nobody goes when it would not be enough"


def test_what_leaves_anyway_is_waited_for(tmp_path: Path) -> None:
    others = [standing("leaving", State.STOPPING), standing("idle")]
    assert way(tmp_path, others, 10, 20) == Way(fits=False)


def test_busy_and_pinned_ones_stay(tmp_path: Path) -> None:
    others = [standing("busy", running=(0.0,)), standing("waited-for", waiting=1), standing("pinned", pinned=True)]
    assert way(tmp_path, others, 10, 30) == Way(fits=False)


def test_what_a_sleeping_process_holds_of_a_gpu_counts(tmp_path: Path) -> None:
    dozing = replace(standing("dozing", State.DOZING), gpu="cuda:1", gpu_bytes=30)
    own = replace(standing("own", State.STARTING, 0), gpu="cuda:1", needs_gpu=80)
    forecast, limits = forecast_of(tmp_path), Limits(100, {"cuda:1": 100})
    policy = make_policy(configure(tmp_path, {"dozing": ModelConfig()}), Estimator())
    found = find_way(
        own, [dozing], 10, {}, limits, lambda all_: forecast.view(all_, limits),
        lambda need, view: policy.victims(need, view, 100.0),
    )  # fmt: skip
    assert found == Way(fits=False, evict=("dozing",))


standings = st.lists(
    st.builds(
        standing,
        st.from_regex("[a-z][0-9]{0,2}", fullmatch=True),
        st.sampled_from([State.READY, State.DOZING, State.STARTING, State.STOPPING, State.CAPTURING]),
        st.integers(0, 100),
        st.floats(0, 100),
        running=st.sampled_from(((), (0.0,))),
        pinned=st.booleans(),
        weight_bytes=st.integers(0, 100),
        process_bytes=st.integers(0, 100),
    ),
    max_size=8,
    unique_by=lambda one: one.name,
)


@given(standings, st.integers(0, 100), st.integers(0, 300))
def test_a_way_is_enough_and_touches_only_the_idle(others: list[Standing], needed: int, host: int) -> None:
    found = way(Path("/nonexistent"), others, needed, host)
    by_name = {one.name: one for one in others}
    used = sum(one.host_bytes for one in others)
    assert found.fits == (used + needed <= host)
    for name in found.evict:
        one = by_name[name]
        assert one.doing in (State.READY, State.DOZING) and not (one.pinned or one.running or one.waiting)
    if found.evict:
        freed = sum(one.host_bytes for one in others if one.leaving or one.name in found.evict)
        assert used - freed + needed <= host


def test_settings_of_policies_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep_alive_policy"):
        configure(tmp_path, keep_alive_policy="newest")
    assert issubclass(ConfigError, Exception)
