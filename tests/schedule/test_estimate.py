"""Estimates: right arithmetic, and learned from noisy starts."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dormouse.schedule.cluster import Cluster, Link, Move, StartPlan, Tier, pcie
from dormouse.schedule.estimate import Estimator, Median, Observed, Pace, Transferred, shared
from tests.schedule.clusters import GB, lay, links, model, node


def view_with(tier: Tier = Tier.DISK, **rates: float) -> Cluster:
    view = Cluster([replace(node("a", 2), links=links(**rates))], [model("m"), model("wide", 20, 2)])
    for name in ("m", "wide"):
        lay(view, view.model(name), "a", tier)
    return view


def plan_of(view: Cluster, path: str = "snapshot", name: str = "m", gpus: tuple[int, ...] = (0,)) -> StartPlan:
    plan = view.plan(view.model(name), "a", path, gpus)  # type: ignore[arg-type]
    assert plan is not None
    return plan


def test_parts_are_the_critical_path() -> None:
    view = view_with()
    estimate = Estimator().estimate(view.model("m"), "a", plan_of(view), view)
    assert estimate.parts == (("weights from disk", 2.05), ("ready", 0.4)), "the image goes over the disk, too"
    assert estimate.mean == pytest.approx(2.45) and estimate.p95 > estimate.mean
    cold = Estimator().estimate(view.model("m"), "a", plan_of(view, "cold"), view)
    assert cold.parts == (("process", 12.0), ("ready", 6.0))


def test_gpus_share_the_bytes_and_each_has_a_link() -> None:
    view = view_with(Tier.DRAM, pcie=1.0 * GB)
    estimator = Estimator()
    assert estimator.estimate(view.model("wide"), "a", plan_of(view, name="wide", gpus=(0, 1)), view).mean == (
        pytest.approx(10.4)
    )
    view.set_link("a", pcie(1), 10 * GB, 1)
    assert estimator.estimate(view.model("wide"), "a", plan_of(view, name="wide", gpus=(0, 1)), view).mean == (
        pytest.approx(20.4)
    )


def test_what_is_queued_ahead_counts() -> None:
    shared, fifo = Link(GB, queued=30 * GB, transfers=2), Link(GB, queued=30 * GB, transfers=2, fifo=True)
    assert (shared.ahead(10 * GB), fifo.ahead(10 * GB), shared.ahead(100 * GB)) == (20 * GB, 30 * GB, 30 * GB)
    view = view_with()
    view.set_link("a", "disk", 30 * GB, 2)
    estimate = Estimator().estimate(view.model("m"), "a", plan_of(view), view)
    assert estimate.parts[0] == ("weights from disk", 6.05)


def test_a_model_that_has_never_started_takes_its_engines_phases() -> None:
    view = view_with(Tier.DRAM)
    estimator = Estimator()
    started = Observed("wide", "transformers", "a", "snapshot", 3.0, (), (("process", 2.0), ("ready", 1.0)))
    estimator.observe(started, view)
    assert estimator.estimate(view.model("m"), "a", plan_of(view), view).mean == pytest.approx(3.025)


def test_what_no_part_explains_is_learned_too() -> None:
    view = view_with(Tier.DRAM)
    estimator = Estimator()
    phases = (("process", 0.7), ("ready", 0.4))
    for _ in range(3):
        estimator.observe(Observed("m", "transformers", "a", "snapshot", 1.5, (), phases), view)
    assert dict(estimator.estimate(view.model("m"), "a", plan_of(view), view).parts)["rest"] == pytest.approx(0.4)


@settings(max_examples=40, deadline=None)
@given(
    rate=st.floats(0.05, 60.0),
    declared=st.floats(0.05, 60.0),
    noise=st.floats(0.0, 0.05),
    outliers=st.floats(0.0, 0.1),
    seed=st.integers(0, 2**32 - 1),
)
def test_known_rates_are_recovered(rate: float, declared: float, noise: float, outliers: float, seed: int) -> None:
    """Of starts with noise, queues and outliers (up to ten times as slow), after a few to learn from: the median error
    of the estimates is at most 5 %, and the 99th percentile 20 %, outliers themselves not counted."""
    rng = random.Random(seed)
    view = view_with(disk=declared * GB, pcie=1000 * GB)
    estimator, errors, in_a_row = Estimator(), [], 0
    for number in range(250):
        queued = rng.choice([0, 0, 4 * GB, 40 * GB])
        view.set_link("a", "disk", queued, 1 if queued else 0)
        plan = plan_of(view)
        estimate = estimator.estimate(view.model("m"), "a", plan, view)
        ahead, image = view.link("a", "disk").ahead(10 * GB), GB // 4
        disk = (10 * GB + image + ahead) / (rate * GB) * rng.lognormvariate(0.0, noise)
        process = 0.5 * rng.lognormvariate(0.0, noise)
        in_a_row = in_a_row + 1 if rng.random() < outliers and in_a_row < 5 else 0  # six would count as a change
        slow = in_a_row > 0
        if slow:
            disk *= rng.uniform(2.0, 10.0)
        image_ahead = view.link("a", "disk").ahead(image)
        took = (image + image + image_ahead) / (rate * GB)
        seconds = max(disk, took + process) + 0.3
        transfers = (
            Transferred("weights", ("disk",), 10 * GB, disk, ahead + image),
            Transferred("image", ("disk",), image, took, image_ahead + image),
        )
        phases = (("process", process), ("ready", 0.3))
        estimator.observe(
            Observed(
                "m", "transformers", "a", "snapshot", seconds, transfers, phases, estimate.mean, pace=estimate.pace
            ),
            view,
        )
        if number >= 50 and not slow:
            errors.append(abs(estimate.mean - seconds) / seconds)
    errors.sort()
    assert errors[len(errors) // 2] <= 0.05
    assert errors[int(len(errors) * 0.99)] <= 0.20
    assert abs(estimator.rate("a", "disk", declared * GB) / (rate * GB) - 1.0) <= 0.05


def test_a_lasting_change_is_followed_and_an_outlier_is_not() -> None:
    one = Median()
    for sample in [1.0, 1.02, 0.98, 1.01, 0.99, 1.0, 1.03, 0.97]:
        one.add(sample)
    one.add(30.0)
    assert one.value == pytest.approx(1.0, rel=0.05)
    for _ in range(8):
        one.add(3.0)
    assert one.value == pytest.approx(3.0)


def test_a_node_that_is_slow_for_a_while_is_slow_for_all_its_models() -> None:
    view, estimator = view_with(Tier.DRAM), Estimator()

    def start(name: str, seconds: float) -> float:
        """How far off the estimate of this start was, as a share of what it took."""
        expected = estimator.estimate(view.model(name), "a", plan_of(view, name=name), view)
        phases = (("process", 0.8 * seconds), ("ready", 0.2 * seconds))
        estimator.observe(
            Observed(name, "e", "a", "snapshot", seconds, (), phases, expected.mean, pace=expected.pace), view
        )
        return abs(expected.mean / seconds - 1.0)

    names = {"m": 1.0, "wide": 3.0}
    plain, followed = [], []
    for number in range(120):
        for name, usual in names.items():
            pace = 1.4 if number // 10 % 2 else 1.0
            followed.append(start(name, pace * usual))
            plain.append(abs(1.0 / pace - 1.0))
    assert sum(followed[40:]) < 0.6 * sum(plain[40:])
    assert estimator.pace("b") == 1.0, "other nodes are not concerned"


def test_a_disturbed_start_and_one_of_milliseconds_say_nothing_of_the_pace() -> None:
    pace = Pace()
    pace.add(1.0, 2.5)
    pace.add(0.002, 0.003)
    assert pace.value == 1.0
    pace.add(1.0, 1.4)
    assert 1.05 < pace.value < 1.4


def test_a_pace_that_foretells_nothing_is_not_trusted() -> None:
    pace, rng = Pace(), random.Random(1)
    for _ in range(300):
        pace.add(1.0, rng.lognormvariate(0.0, 0.1))
    assert pace.value == pytest.approx(1.0, abs=0.03)


def test_the_upper_quantile_and_the_errors_come_from_what_happened() -> None:
    view = view_with()
    estimator = Estimator()
    for number in range(100):
        seconds = 2.4 if number % 10 else 3.6
        estimator.observe(Observed("x", "other", "b", "snapshot", seconds, predicted=2.4), view)
    errors = estimator.errors("snapshot")
    assert (errors.count, errors.median) == (100, 0.0) and errors.p99 == pytest.approx(1 / 3)
    estimate = estimator.estimate(view.model("m"), "a", plan_of(view), view)
    assert estimate.p95 == pytest.approx(1.5 * estimate.mean)


def test_what_was_learned_outlives_the_process() -> None:
    view = view_with()
    estimator = Estimator()
    transfers = (Transferred("weights", ("disk",), 10 * GB, 5.0, ahead=GB // 4),)
    for _ in range(3):
        estimator.observe(
            Observed("m", "transformers", "a", "snapshot", 6.0, transfers, (("process", 0.5), ("ready", 0.2))), view
        )
    again = Estimator.restored(json.loads(json.dumps(estimator.saved())))
    plan = plan_of(view)
    one, other = (each.estimate(view.model("m"), "a", plan, view) for each in (estimator, again))
    assert one == other and one.mean == pytest.approx(6.0)
    assert again.return_seconds(view.model("m")) == 6.0


def test_a_link_of_which_nothing_is_known_has_its_declared_rate() -> None:
    view, estimator = view_with(disk=2.0 * GB, pcie=100.0 * GB), Estimator()
    observed = Observed("m", "e", "a", "cold", 5.0, (Transferred("weights", ("disk", pcie(0)), 10 * GB, 5.0),))
    estimator.observe(observed, view)
    assert estimator.rate("a", "disk", 1.0) == pytest.approx(2 * GB), "the slowest is the disk, not the unknown one"
    estimator.observe(observed, view)
    assert estimator.rate("a", pcie(0), 7.0) == 7.0


def test_weights_and_images_have_rates_of_their_own() -> None:
    view, estimator = view_with(disk=2.0 * GB), Estimator()
    estimator.observe(Observed("m", "e", "a", "snapshot", 5.0, (Transferred("image", ("disk",), GB, 2.0),)), view)
    assert estimator.rate("a", "disk", 9.0) == 9.0
    estimator.observe(Observed("m", "e", "a", "snapshot", 5.0, (Transferred("weights", ("disk",), GB, 1.0),)), view)
    assert estimator.rate("a", "disk", 9.0, "weights") == pytest.approx(GB)
    assert estimator.rate("a", "disk", 9.0, "image") == pytest.approx(GB / 2)


def test_moves_of_one_start_share_where_they_come_from() -> None:
    weights, image = (
        Move("weights", "w", 100, Tier.DISK, ("disk", "memory")),
        Move("image", "i", 30, Tier.DISK, ("disk", "memory")),
    )
    assert (shared(image, "disk", 100), shared(weights, "disk", 30), shared(image, "memory", 100)) == (30, 30, 0)
    assert shared(Move("image", "i", 30, Tier.DRAM, ("memory",)), "disk", 100) == 0 == shared(None, "disk", 100)
