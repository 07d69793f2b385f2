"""Idle times: the index is the best that can be had from any time on, and rare models learn from the others."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dormouse.schedule.idle_times import IdleTimes, Outlook, log_edges

EDGES = log_edges(1.0, 64.0, 1)


def slowly(counts: list[float], begin: int) -> float:
    """The same by trying every end."""
    total, best = sum(counts), 0.0
    reached = [1.0 - sum(counts[:number]) / total for number in range(len(EDGES))]
    for end in range(begin + 1, len(EDGES)):
        kept = sum(
            (EDGES[number + 1] - EDGES[number]) * (reached[number] + reached[number + 1]) / 2
            for number in range(begin, end)
        )
        if kept > 1e-9:
            best = max(best, (reached[begin] - reached[end]) / kept)
    return best


@given(st.lists(st.integers(0, 20), min_size=len(EDGES), max_size=len(EDGES)).filter(any))
def test_the_index_is_the_best_of_all_times_to_stop(counts: list[int]) -> None:
    numbers = [float(count) for count in counts]
    found = Outlook(EDGES, numbers)
    for number in range(len(EDGES) - 1):
        assert found.index(EDGES[number]) == pytest.approx(slowly(numbers, number), abs=1e-6)


def test_it_is_kept_through_a_quiet_stretch_before_a_likely_return() -> None:
    counts = [0.0] * len(EDGES)
    counts[4] = 1.0  # always from 8 to 16 seconds
    ahead = Outlook(EDGES, counts)
    assert ahead.until(1 / 13, 0.0) == EDGES[5]
    assert ahead.until(1 / 11, 0.0) == 0.0  # the 12 seconds until then are too long
    assert ahead.index(EDGES[5]) == 0.0


def test_a_rare_model_is_judged_by_the_shape_of_all() -> None:
    times, rng, now = IdleTimes(), random.Random(5), 0.0
    for _burst in range(300):
        for number in range(5):  # bursts: soon again, or not for long
            idle = rng.expovariate(1.0 if number else 1 / 100.0)
            now += idle
            times.request("often", now)
            times.ended("often", idle, now)
    times.request("once", now)
    ahead = times.outlook("once", now)
    assert ahead.index(0.0) > 5 * ahead.index(30_000.0)
    assert times.rate("often", now) > 100 * times.rate("once", now)


def test_before_anything_is_known_requests_come_by_chance() -> None:
    times = IdleTimes()
    times.request("m", 0.0)
    rate = times.rate("m", 0.0)
    assert times.outlook("m", 0.0).index(0.0) == pytest.approx(rate, rel=0.05)
    assert not math.isnan(times.outlook("never asked", 0.0).index(5.0))
