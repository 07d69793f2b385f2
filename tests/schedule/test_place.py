"""Placement: the quickest place within memory, and it can say why."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dormouse.errors import ConfigError
from dormouse.schedule.cluster import Claim, Cluster, Request, Running, State, Tier
from dormouse.schedule.estimate import Estimator
from dormouse.schedule.place import Decision, Weights, default_worth, place, slot_waits
from dormouse.schedule.room import Eviction, ends, find_room
from tests.schedule.clusters import GB, Keeper, busy, check_memory, clusters, hot, lay, model, node


def decide(view: Cluster, name: str, now: float = 0.0) -> Decision:
    return place(Request("q", name, now), view, Estimator(), now)


def two_nodes() -> Cluster:
    view = Cluster([node("a"), node("b")], [model("m"), model("other", 60)])
    lay(view, view.model("m"), "a")
    return view


def test_a_ready_replica_is_taken_and_nothing_else_looked_at() -> None:
    view = two_nodes()
    view.put(hot("r", "m", "b"))
    decision = decide(view, "m")
    assert decision.chosen and (decision.chosen.action, decision.chosen.replica) == ("queue", "r")
    assert decision.chosen.seconds == 0.0 and not decision.alternatives


def test_the_node_that_has_the_model_nearest_starts_it() -> None:
    view = two_nodes()
    assert (chosen := decide(view, "m").chosen) and (chosen.node, chosen.path) == ("a", "snapshot")
    lay(view, view.model("m"), "b", Tier.DRAM)
    assert (chosen := decide(view, "m").chosen) and chosen.node == "b"


def test_a_long_queue_on_the_disk_sends_the_request_elsewhere() -> None:
    view = two_nodes()
    lay(view, view.model("m"), "b")
    view.set_link("a", "disk", 100 * GB, 9)
    assert (chosen := decide(view, "m").chosen) and chosen.node == "b"


def test_a_model_without_a_snapshot_starts_cold() -> None:
    view = Cluster([node("a")], [model("m", snapshot=False)])
    lay(view, view.model("m"), "a")
    assert (chosen := decide(view, "m").chosen) and chosen.path == "cold" and chosen.seconds == pytest.approx(18.0)


def test_a_snapshot_is_used_only_where_it_fits() -> None:
    view = Cluster([replace(node("a"), kind="other")], [model("m")])
    lay(view, view.model("m"), "a")
    assert (chosen := decide(view, "m").chosen) and chosen.path == "cold"


def test_a_sleeping_process_is_woken() -> None:
    view = two_nodes()
    view.put(replace(hot("r", "m", "a"), state=State.SLEEPING))
    assert (chosen := decide(view, "m").chosen) and (chosen.path, chosen.replica) == ("sleep", "r")


def test_a_short_queue_beats_a_start_and_a_long_one_does_not() -> None:
    view = two_nodes()
    view.put(busy("r", "m", "b", until=0.5))
    assert (chosen := decide(view, "m").chosen) and chosen.action == "queue"
    view.put(busy("r", "m", "b", until=50.0))
    assert (chosen := decide(view, "m").chosen) and chosen.action == "start"


def test_the_idle_replica_that_is_worth_least_goes() -> None:
    view = Cluster([node("a", 2)], [model("m", 60), model("old", 60), model("new", 60)])
    lay(view, view.model("m"), "a")
    view.put(hot("r-new", "new", "a", (0,), since=990.0))
    view.put(hot("r-old", "old", "a", (1,), since=0.0))
    chosen = decide(view, "m", 1000.0).chosen
    assert chosen and chosen.gpus == (1,) and [(one.replica, one.to) for one in chosen.evict] == [("r-old", "sleep")]


def test_processes_end_when_the_hosts_memory_is_short() -> None:
    view = Cluster([node("a", 2, host_gb=2)], [model("m"), model("s")])
    lay(view, view.model("m"), "a")
    view.put(replace(hot("r1", "s", "a"), state=State.SLEEPING))
    view.put(hot("r2", "s", "a"))
    chosen = decide(view, "m").chosen
    assert chosen and chosen.action == "start" and [one.to for one in chosen.evict] == ["end"]


def test_a_place_worth_waiting_for() -> None:
    view = two_nodes()
    view.put(busy("r", "other", "a", until=3.0))
    view.put(busy("r2", "other", "b", until=900.0))
    view.put(replace(busy("r3", "m", "b", until=900.0)))
    chosen = decide(view, "m").chosen
    assert chosen is not None
    view.drop("r3")
    full = Cluster([node("a")], [model("m", 60), model("other", 60)])
    lay(full, full.model("m"), "a")
    full.put(replace(busy("r", "other", "a", until=3.0), requests=(Running("x", 0.0, movable=False),)))
    chosen = decide(full, "m").chosen
    assert chosen and (chosen.action, chosen.blockers) == ("wait", ("r",)) and chosen.seconds > 3.0


def test_a_running_request_migrates_away_when_that_is_sooner() -> None:
    view = Cluster([node("a"), node("b")], [model("m", 60), model("other", 60)])
    lay(view, view.model("m"), "a", Tier.DRAM)
    lay(view, view.model("other"), "b", Tier.DRAM)
    view.put(busy("r", "other", "a", until=100.0))
    decision = decide(view, "m")
    assert decision.chosen and decision.chosen.action == "wait"
    (migration,) = decision.chosen.migrate
    assert (migration.replica, migration.node) == ("r", "b")
    assert "migrates on r to b" in decision.why()


def test_kept_places_are_not_taken() -> None:
    view = two_nodes()
    view.claim(Claim("somebody", "a", frozenset({0})))
    assert decide(view, "m").chosen is None
    view.release("somebody")
    assert decide(view, "m").chosen is not None


def test_what_can_never_be_is_said() -> None:
    view = Cluster([node("a")], [model("huge", 900), model("lost")])
    assert "no node can hold huge" in decide(view, "huge").why()
    assert "no node has the weights of lost" in decide(view, "lost").why()


def test_why_tells_the_numbers_of_all_options() -> None:
    view = two_nodes()
    lay(view, view.model("m"), "b", Tier.DRAM)
    view.put(busy("r", "m", "a", until=7.0))
    told = decide(view, "m").why()
    assert "taken start snapshot b GPU 0" in told and "process 0.700" in told
    assert "or    queue hot" in told and "7.000 s" in told


def test_a_replica_that_does_not_fit_is_refused() -> None:
    view = two_nodes()
    view.put(hot("r1", "other", "a"))
    with pytest.raises(ConfigError, match="does not fit on node a"):
        view.put(hot("r2", "other", "a"))
    check_memory(view)


@settings(max_examples=60, deadline=None)
@given(view=clusters(), wanted=st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_no_decision_ever_exceeds_memory(view: Cluster, wanted: list[int]) -> None:
    keeper = Keeper(view)
    names = sorted(view.models)
    for number, which in enumerate(wanted):
        decision = place(Request(f"q{number}", names[which % len(names)], 0.0), view, Estimator(), 0.0)
        chosen = decision.chosen
        if chosen and chosen.action != "wait":
            keeper.commit(decision)  # the view refuses what does not fit
        check_memory(view)
        assert decision.why()


@settings(max_examples=60, deadline=None)
@given(view=clusters())
def test_no_start_is_better_than_what_was_chosen(view: Cluster) -> None:
    """The search by bounds finds what looking at every node and path finds."""
    estimator = Estimator()
    worth = default_worth(view, estimator, 0.0)
    for name in sorted(view.models):
        one = view.model(name)
        if view.has_all(name):
            continue
        best = float("inf")
        for where in view.nodes:
            room = find_room(one, where, view, worth, 0.0)
            for path in ("snapshot", "template", "cold"):
                plan = view.plan(one, where, path, room.gpus) if room else None
                if room and plan:
                    seconds = estimator.estimate(one, where, plan, view).mean
                    best = min(best, room.wait + room.loss + seconds * (1.0 + Weights().start))
        chosen = decide(view, name).chosen
        assert chosen is not None or best == float("inf")
        assert chosen is None or chosen.score <= best * 1.03 + 1e-9


@settings(max_examples=30, deadline=None)
@given(view=clusters())
def test_removing_a_node_leaves_nothing_of_it(view: Cluster) -> None:
    for name in sorted(view.nodes)[:-1]:
        there = {replica.name for replica in view.replicas_on(name)}
        assert {replica.name for replica in view.remove_node(name)} == there
        check_memory(view)
        assert not any(replica in view for replica in there)
        for one in sorted(view.models):
            decision = decide(view, one)
            assert all(option.node != name for option in (decision.chosen, *decision.alternatives) if option)


def test_a_replica_with_many_slots_takes_the_next_when_its_first_one_ends() -> None:
    one = model("m", slots=2)
    running = (Running("long", 0.0, 0, 100), Running("short", 0.0, 0, 10))
    replica = replace(busy("r", "m", "a", until=99.0), requests=running)
    assert replica.takes_next_at(one) == 10 * one.token_seconds
    assert replace(replica, waiting=1).takes_next_at(one) == 100 * one.token_seconds
    assert slot_waits(replica, one, 0.0, 5) == [10 * one.token_seconds, 100 * one.token_seconds]


def test_the_longer_something_is_late_the_longer_it_still_takes() -> None:
    one = busy("r", "m", "a", until=10.0)
    assert ends(one, 4.0) == 6.0
    assert 0.0 < ends(one, 11.0) < ends(one, 20.0)


def test_a_model_keeps_to_its_own_gpus() -> None:
    view = Cluster([node("a", 2)], [replace(model("m", 60), only_on=(1,)), model("other", 60)])
    lay(view, view.model("m"), "a")
    assert decide(view, "m").chosen.gpus == (1,)  # type: ignore[union-attr]
    view.put(hot("r", "other", "a", gpus=(1,)))
    chosen = decide(view, "m").chosen
    assert chosen is not None and chosen.gpus == (1,) and [one.replica for one in chosen.evict] == ["r"]
    view.put(busy("r", "other", "a", gpus=(1,)))
    waits = decide(view, "m").chosen
    assert waits is not None and waits.action == "wait" and waits.gpus == (1,)


def test_processes_that_sleep_end_where_what_they_keep_of_a_gpu_is_needed() -> None:
    other = replace(model("other", 60), asleep_bytes=10 * GB)
    view = Cluster([node("a")], [model("small", 60), model("m", 75), other])
    for name in ("small", "m"):
        lay(view, view.model(name), "a")
    view.put(hot("r", "other", "a"))
    evicted = {name: decide(view, name).chosen.evict for name in ("small", "m")}  # type: ignore[union-attr]
    assert evicted == {"small": (Eviction("r", "sleep"),), "m": (Eviction("r", "end"),)}
    view.put(replace(view.replica("r"), state=State.SLEEPING))
    evicted = {name: decide(view, name).chosen.evict for name in ("small", "m")}  # type: ignore[union-attr]
    assert evicted == {"small": (), "m": (Eviction("r", "end"),)}


def test_what_was_measured_counts_for_what_is_usual() -> None:
    view = Cluster([node("a")], [model("m", 40), model("other", 60)])
    lay(view, view.model("m"), "a")
    view.put(replace(hot("r", "other", "a"), measured=(30 * GB, GB)))
    assert view.free("a") == [50 * GB] and view.free_host("a") == 99 * GB
    assert decide(view, "m").chosen.evict == ()  # type: ignore[union-attr]
    view.put(replace(view.replica("r"), measured=(70 * GB, 2 * GB)))
    assert decide(view, "m").chosen.evict == (Eviction("r", "sleep"),)  # type: ignore[union-attr]
    view.drop("r")
    assert view.free("a") == [80 * GB] and view.free_host("a") == 100 * GB


def test_nobody_goes_who_would_free_nothing() -> None:
    """One was measured to take no more than what its process keeps asleep."""
    none = replace(model("none", 20), asleep_bytes=10 * GB)
    view = Cluster([node("a")], [model("m", 40), none, model("other", 60)])
    lay(view, view.model("m"), "a")
    view.put(replace(hot("n", "none", "a"), measured=(5 * GB, GB)))
    view.put(hot("r", "other", "a"))
    assert decide(view, "m").chosen.evict == (Eviction("r", "sleep"),)  # type: ignore[union-attr]
