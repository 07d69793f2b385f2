"""The autoscaler: windows, panic, zero, and bursts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dormouse.errors import ConfigError
from dormouse.schedule.autoscale import Autoscaler, Scaling

STEADY = Scaling(utilization=1.0, burst=False)


def test_the_stable_window_decides() -> None:
    one = Autoscaler(STEADY)
    one.record(0.0, 3.0)
    assert one.wanted(30.0, 2).replicas == 2  # half of the window had none
    wanted = one.wanted(60.0, 2)
    assert (wanted.replicas, wanted.panic, wanted.stable) == (3, False, 3.0)


def test_a_sudden_load_panics_and_nothing_goes_down_until_it_is_over() -> None:
    one = Autoscaler(STEADY)
    one.record(0.0, 1.0)
    one.record(100.0, 10.0)
    wanted = one.wanted(106.0, 1)
    assert wanted.panic and wanted.replicas == 10
    one.record(107.0, 0.0)
    assert one.wanted(160.0, 10).replicas == 10
    assert not one.wanted(166.5, 10).panic
    assert one.wanted(166.5, 10).replicas == 5  # no faster than max_down_rate


def test_to_zero_only_after_the_window_and_the_grace() -> None:
    one = Autoscaler(STEADY)
    one.record(0.0, 1.0)
    one.record(50.0, 0.0)
    assert one.wanted(139.0, 1).replicas == 1
    assert one.wanted(140.0, 1).replicas == 0


def test_a_burst_from_zero_gets_all_its_replicas_at_once() -> None:
    one = Autoscaler(Scaling(utilization=1.0))
    one.record(1000.0, 12.0)
    assert one.wanted(1000.0, 0).replicas == 12


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_replicas"):
        Scaling(min_replicas=3, max_replicas=2)
    with pytest.raises(ConfigError, match="windows"):
        Scaling(panic_window=90.0)


@given(
    loads=st.lists(st.tuples(st.floats(0.01, 50.0), st.integers(0, 40)), min_size=1, max_size=40),
    least=st.integers(0, 3),
    room=st.integers(0, 10),
    burst=st.booleans(),
)
def test_limits_and_rates_hold_whatever_comes(
    loads: list[tuple[float, int]], least: int, room: int, burst: bool
) -> None:
    scaling = Scaling(min_replicas=least, max_replicas=least + room if room else 0, burst=burst)
    one, now, ready = Autoscaler(scaling), 0.0, 0
    for wait, load in loads:
        now += wait
        one.record(now, float(load))
        wanted = one.wanted(now, ready)
        assert least <= wanted.replicas <= (scaling.max_replicas or math.inf)
        assert min(wanted.stable, wanted.recent) >= 0.0
        assert wanted.replicas >= min(ready // 2, scaling.max_replicas or math.inf)
        if load and ready:
            assert wanted.replicas >= 1  # nobody is left without
        ready = wanted.replicas


@given(changes=st.lists(st.tuples(st.floats(0.1, 30.0), st.integers(0, 9)), min_size=1, max_size=20))
def test_the_mean_is_over_time(changes: list[tuple[float, int]]) -> None:
    one, now, spans = Autoscaler(STEADY), 0.0, []
    for wait, load in changes:
        spans.append((now, now + wait, float(load)))
        one.record(now, float(load))
        now += wait
    area = sum(max(0.0, min(end, now) - max(begin, now - 60.0)) * load for begin, end, load in spans)
    assert one.wanted(now, 1).stable == pytest.approx(area / 60.0)
