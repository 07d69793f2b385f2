from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dormouse.schedule.eviction import Plan, Resident, plan_eviction

residents = st.lists(
    st.builds(
        Resident,
        name=st.text(min_size=1, max_size=4),
        bytes=st.integers(0, 100),
        idle_since=st.none() | st.floats(0, 100),
        leaving=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda resident: resident.name,
)


def test_least_recently_used_goes_first_and_no_more_than_needed() -> None:
    old, newer, newest = (Resident(str(age), 10, idle_since=float(age)) for age in range(3))
    assert plan_eviction([newest, old, newer], needed=15, budget=30) == Plan(fits=False, evict=("0", "1"))


def test_what_leaves_anyway_is_waited_for() -> None:
    plan = plan_eviction([Resident("a", 10, leaving=True), Resident("b", 10, idle_since=1.0)], needed=10, budget=20)
    assert plan == Plan(fits=False)


def test_nobody_is_evicted_in_vain() -> None:
    assert plan_eviction([Resident("busy", 10), Resident("idle", 5, 1.0)], needed=12, budget=20) == Plan(fits=False)


@given(residents, st.integers(0, 100), st.integers(0, 300))
def test_plan_is_enough_and_touches_only_the_idle(several: list[Resident], needed: int, budget: int) -> None:
    plan = plan_eviction(several, needed=needed, budget=budget)
    by_name = {resident.name: resident for resident in several}
    assert all(by_name[name].idle_since is not None and not by_name[name].leaving for name in plan.evict)
    used = sum(resident.bytes for resident in several)
    assert plan.fits == (used + needed <= budget)
    if plan.evict:
        leaving = sum(resident.bytes for resident in several if resident.leaving)
        freed = leaving + sum(by_name[name].bytes for name in plan.evict)
        assert used - freed + needed <= budget
