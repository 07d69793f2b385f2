"""The clock and shared links: nothing is lost, nothing is faster than its links, time goes forward only."""

import math
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dormouse.sim.events import Clock
from dormouse.sim.links import Link, Network

TRANSFERS = st.lists(
    st.tuples(
        st.floats(0, 100),  # when
        st.integers(0, 10**10),  # bytes
        st.sets(st.integers(0, 3), min_size=1),  # links
        st.floats(1e6, 1e10),  # cap
        st.one_of(st.none(), st.floats(0, 100)),  # cut off so much later
    ),
    min_size=1,
    max_size=25,
)


def test_what_is_planned_happens_in_order_and_never_in_the_past() -> None:
    clock, seen = Clock(), []
    clock.at(2.0, seen.append, "late")
    clock.at(1.0, seen.append, "early")
    clock.at(1.0, seen.append, "early, planned later")
    clock.at(1.5, seen.append, "never").cancel()
    clock.advance(3.0)
    assert seen == ["early", "early, planned later", "late"]
    assert clock.now == 3.0
    for bad in (2.9, math.nan):
        with pytest.raises(ValueError):
            clock.at(bad, seen.append, "past")


def test_two_transfers_share_a_link_and_one_after_the_other_on_a_fifo_one() -> None:
    for fifo, expected in ((False, {"a": 2.0, "b": 2.0}), (True, {"a": 1.0, "b": 2.0})):
        clock, ends = Clock(), {}
        network, link = Network(clock), Link("node", "disk", 1e9, fifo=fifo)
        for name in "ab":
            network.start(1e9, ((link, 1.0),), partial(_note, ends, name, clock))
        clock.advance(10)
        assert ends == pytest.approx(expected)


def _note(ends: dict[str, float], name: str, clock: Clock) -> None:
    ends[name] = clock.now


@settings(deadline=None, max_examples=150)
@given(TRANSFERS, st.booleans())
def test_bytes_are_conserved_and_no_link_is_overrun(transfers: list, fifo: bool) -> None:
    clock = Clock()
    network = Network(clock)
    links = [Link("node", str(number), rate, fifo=fifo) for number, rate in enumerate((1e9, 2e9, 5e8, 1e10))]
    ended: list[int] = []
    cut: dict[int, float] = {}

    def begin(number: int, size: int, path: set[int], cap: float, later: float | None) -> None:
        way = tuple((links[index], 1.0) for index in sorted(path))
        flow = network.start(size, way, lambda: ended.append(number), cap)
        if later is not None:
            clock.at(clock.now + later, lambda: number in ended or cut.update({number: network.stop(flow)}))
        check()

    def check() -> None:
        for link in links:
            assert sum(flow.rate * part for flow, part in link.flows.items()) <= link.rate * (1 + 1e-6)

    for number, (when, *rest) in enumerate(transfers):
        clock.at(when, begin, number, *rest)
    before = 0.0
    while (due := clock.next_time()) < math.inf:
        assert due >= before
        before = due
        clock.advance(due)
        check()
    assert sorted([*ended, *cut]) == list(range(len(transfers)))
    assert network.delivered == pytest.approx(sum(transfers[number][1] for number in ended))
    for index, link in enumerate(links):
        there = sum(cut.get(n, size) for n, (_w, size, path, *_rest) in enumerate(transfers) if index in path)
        assert link.carried == pytest.approx(there, abs=1)
        assert not link.flows
