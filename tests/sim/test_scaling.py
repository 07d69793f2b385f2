"""Replicas that nobody's request started, nodes that go and come, tenants: alone, and all of it at once by chance."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dormouse.schedule.cluster import State
from dormouse.sim import run as runs
from dormouse.sim.report import row_of, tenant_rows
from dormouse.sim.run import Outcome, simulate
from dormouse.sim.scenario import Scenario
from dormouse.sim.world import Job, World
from tests.sim.test_simulate import KEEP_ALIVES, PLACEMENTS, system, tree

TWICE = ((0, "lost"), (1, "back"))


def run(values: dict[str, Any]) -> Outcome:
    return next(simulate(Scenario.model_validate(values), traces=Path()))


def idle_cluster(**changes: Any) -> dict[str, Any]:
    """One small model on two nodes of two GPUs, and a request now and then."""
    return (
        tree(
            models=[
                {"name": "one", "weights": "5GB", "kv": "1GB", "slots": 2, "token_time": 0.01}
                | changes.pop("model", {})
            ],
            requests={"rate": 0.01, "lengths": {"mean_in": 1, "mean_out": 1, "cv": 0}},
            systems={"it": system("dormouse", **changes.pop("system", {}))},
        )
        | changes
    )


class Watch:
    """How many replicas of each model were ready or starting, whenever that changed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[float, str, int]] = []
        hold = World._hold

        def watched(world: World, more: int) -> None:
            hold(world, more)
            self.seen.append((world.now, "", world._holding))

        monkeypatch.setattr(World, "_hold", watched)

    def at(self, moment: float) -> int:
        return next((count for time, _model, count in reversed(self.seen) if time <= moment), 0)


# --- minima, schedules, pins


def test_a_minimum_is_ready_before_anybody_asks_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    outcome = run(idle_cluster(model={"min_replicas": 2}, duration=2000, requests={"rate": 0.005}))
    assert watch.at(1) == 2 and watch.at(1500) == 2
    assert outcome.counts.scaled == 2 and row_of(outcome, 1).hot == 1.0


def test_a_schedule_holds_at_its_times_of_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    schedule = [{"from": "08:00", "to": "08:30", "replicas": 3}]
    asks = {"rate": 0.001, "lengths": {"mean_in": 1, "mean_out": 1}}
    run(idle_cluster(model={"schedule": schedule}, begins="07:50", duration=7200, requests=asks))
    assert watch.at(599) <= 1 and watch.at(601) == 3 and watch.at(2399) >= 3 and watch.at(2460) <= 1


def test_a_minimum_is_nobodys_victim_and_a_pinned_model_stays() -> None:
    models = [
        {"name": "kept", "weights": "25GB", "min_replicas": 1},
        {"name": "pin", "weights": "25GB", "pinned": True},
        {"name": "other", "copies": 6, "weights": "25GB"},
    ]
    gone: list[str] = []
    remove = World._remove
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "_remove", lambda world, worker: (gone.append(worker.model.name), remove(world, worker)))
        outcome = run(tree(models=models, systems={"it": system("dormouse", "lru")}, requests={"rate": 0.5, "cv": 1}))
    assert outcome.counts.evictions and not {"kept", "pin"} & set(gone)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_never_more_than_max_replicas(placement: str) -> None:
    models = [{"name": "one", "weights": "5GB", "max_replicas": 2, "token_time": 0.05}]
    outcome = run(tree(models=models, systems={"it": system(placement)}, requests={"rate": 2, "cv": 2}))
    assert outcome.counts.most_replicas == 2


# --- the autoscaler


def burst(**changes: Any) -> dict[str, Any]:
    return idle_cluster(
        duration=1, requests={"rate": 12, "lengths": {"mean_in": 1, "mean_out": 100, "cv": 0}}, **changes
    )


def test_starts_of_a_model_on_a_node_share_one_read() -> None:
    """Four GPUs want 10 GB that come from the disk in two seconds: one read for all, or one each."""
    models = [{"name": "one", "weights": "10GB", "slots": 1, "token_time": 1, "process": "1GB"}]
    seconds, read = {}, {}
    for shared in (True, False):
        values = burst(system={"loading": {"shared": shared}, "scaling": {"utilization": 1}}) | {"models": models}
        values["nodes"] = [values["nodes"][0] | {"count": 1, "gpus": 4, "gpu_memory": "15GB"}]
        values["systems"]["it"]["paths"] = {"cold": {}}
        values["requests"]["rate"] = 4
        outcome = run(values)
        seconds[shared] = max(outcome.records.start)
        read[shared] = outcome.counts.moved["disk"]
    assert read == {True: 10e9, False: 40e9}
    assert seconds[True] <= 2.6 and seconds[False] > 5


def test_a_burst_from_zero_has_all_its_replicas_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    run(burst(system={"scaling": {"utilization": 1}}))
    assert watch.at(1.0) == 6  # 12 requests, 2 for each


def test_scaled_replicas_go_down_to_zero_by_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    late = {"requests": {"rate": 12, "lengths": {"mean_in": 1, "mean_out": 100, "cv": 0}}}
    values = burst(system={"scaling": {"utilization": 1, "stable_window": 20, "scale_to_zero_grace": 10}}) | late
    values["events"] = [{"at": 200, "node": "n0-1", "what": "lost"}]
    values["models"].append({"name": "long", "weights": "5GB", "token_time": 3, "max_replicas": 1, "slots": 9})
    run(values)  # requests of the second one last 300 s, so that the first is seen going
    assert watch.at(1.0) >= 4
    assert watch.at(100) == 1  # that of the second


def test_max_replicas_bounds_the_autoscaler_and_min_replicas_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    outcome = run(burst(system={"scaling": {"utilization": 1, "max_replicas": 3, "min_replicas": 1}}))
    assert watch.at(0.0) == 1 and outcome.counts.most_replicas == 3


# --- tenants


def test_priorities_and_caps_show_per_tenant() -> None:
    tenants = [
        {"name": "first", "share": 1, "priority": 20},
        {"name": "usual", "share": 4},
        {"name": "few", "copies": 2, "share": 4, "cap": 1},
    ]
    outcome = run(tree(tenants=tenants, requests={"rate": 1.5, "cv": 2}, systems={"it": system("dormouse", "lru")}))
    rows = {row.tenant: row for row in tenant_rows(outcome, 5)}
    assert set(rows) == {"first", "usual", "few"} and sum(row.requests for row in rows.values()) == len(outcome.records)
    assert rows["first"].start_mean < rows["usual"].start_mean < rows["few"].start_mean


def test_a_tenant_never_runs_more_than_its_cap() -> None:
    running: dict[str, int] = {}
    begin, leave = World._run, World._leave

    def begins(world: World, job: Job, worker: Any) -> None:
        running[job.request.tenant] = running.get(job.request.tenant, 0) + 1
        assert running["capped"] <= 2
        begin(world, job, worker)

    def leaves(world: World, job: Job, worker: Any) -> None:
        running[job.request.tenant] -= 1
        leave(world, job, worker)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "_run", begins)
        patch.setattr(World, "_leave", leaves)
        events = [{"at": 60, "node": "n0-0", "what": "lost"}, {"at": 90, "node": "n0-0", "what": "back"}]
        run(tree(tenants=[{"name": "capped", "cap": 2}], events=events, systems={"it": system("dormouse")}))


# --- nodes


def test_a_lost_nodes_requests_begin_again_elsewhere() -> None:
    values = idle_cluster(duration=10, timeout=60, requests={"rate": 0.4, "lengths": {"mean_out": 2000, "cv": 0}})
    before = run(values)
    values["events"] = [{"at": 20, "node": "n0-0", "what": "lost"}, {"at": 20, "node": "n0-1", "what": "lost"},
                        {"at": 40, "node": "n0-1", "what": "back"}]  # fmt: skip
    after = run(values)
    assert after.counts.placed_again == len(after.records) == len(before.records) == 4
    assert not any(after.records.given_up)
    lost = np.array(after.records.start) - np.array(before.records.start)
    assert (lost >= 20).all()  # nobody ran before the node was back
    assert after.seconds >= 60  # 20 s of tokens each, all over again


def test_a_cluster_without_nodes_gives_all_requests_up() -> None:
    events = [{"at": 10, "node": name, "what": "lost"} for name in ("n0-0", "n0-1")]
    for placement in PLACEMENTS:
        outcome = run(tree(events=events, systems={"it": system(placement)}))
        late = np.array(outcome.records.arrived) > 10
        assert late.any() and np.array(outcome.records.given_up, dtype=bool)[late].all()


def test_the_disk_survives_and_memory_does_not() -> None:
    """The second request finds its weights in DRAM; after a loss, the third finds them on the disk."""
    moved = []
    for lost in (False, True):
        values = idle_cluster(system={"loading": {"preloaded": 0}}, duration=400, timeout=300, seed=4)
        values["nodes"][0]["count"] = 1
        values["systems"]["it"]["paths"] = {"cold": {}}
        if lost:
            values["events"] = [
                {"at": 200, "node": "n0-0", "what": "lost"},
                {"at": 201, "node": "n0-0", "what": "back"},
            ]
        outcome = run(values)
        moved.append(outcome.counts.moved)
        assert moved[-1]["remote"] == 5e9
    assert moved[1].get("disk", 0) == 5e9 and moved[0].get("disk", 0) == 0


# --- all of it at once


@st.composite
def scenarios(draw: st.DrawFn) -> dict[str, Any]:
    """Small clusters with everything that a scenario knows."""
    counts = draw(st.lists(st.integers(1, 2), min_size=1, max_size=2))
    group = {"gpus": 2, "gpu_memory": "30GB", "host_memory": "8GB", "dram_tier": "30GB", "disk_tier": "100GB",
             "network": "10Gbps", "disk": "5GB/s", "pcie": "20GB/s"}  # fmt: skip
    names = [f"n{number}-{index}" for number, count in enumerate(counts) for index in range(count)]
    events = []
    for name in draw(st.lists(st.sampled_from(names), unique=True)):
        times = sorted(draw(st.lists(st.integers(1, 200), min_size=1, max_size=4, unique=True)))
        events += [{"at": at, "node": name, "what": what} for at, what in zip(times, itertools.cycle(("lost", "back")))]
    placement = draw(st.sampled_from((*PLACEMENTS, "dormouse", "dormouse")))
    rules = st.fixed_dictionaries(
        {"utilization": st.sampled_from([0.5, 1.0]), "burst": st.booleans(), "stable_window": st.just(20)},
        optional={"max_replicas": st.integers(2, 4), "min_replicas": st.integers(0, 1)},
    )
    loadings = st.fixed_dictionaries(
        {"sequential": st.booleans(), "shared": st.booleans(), "preloaded": st.sampled_from([0, 1, 9])}
    )
    made = system(
        placement,
        draw(st.sampled_from(KEEP_ALIVES)),
        evict_idle=draw(st.booleans()),
        noise=draw(st.sampled_from([0.0, 0.1])),
        loading={"coded": True} | draw(loadings),
        scaling=draw(st.none() | rules),
    )
    small = {"name": "one", "copies": 3, "weights": "9GB", "coded": 0.7, "slots": draw(st.integers(1, 3))}
    small |= draw(
        st.sampled_from([{}, {"min_replicas": 1}, {"max_replicas": 2}, {"min_replicas": 1, "max_replicas": 2}])
    )
    wide = {"name": "wide", "weights": "40GB", "gpus": 2, "slots": 2, "pinned": draw(st.booleans())}
    timed = {"name": "timed", "weights": "9GB", "schedule": [{"from": "12:01", "to": "12:02", "replicas": 1}]}
    tenants = [{"name": "gold", "priority": 3}, {"name": "free", "copies": 2, "share": 3, "cap": 1}]
    return tree(
        seed=draw(st.integers(0, 1000)),
        duration=150,
        begins="12:00",
        nodes=[group | {"count": count} for count in counts],
        models=[small, wide, timed],
        requests={"rate": draw(st.sampled_from([0.1, 1.0])), "cv": 3, "lengths": {"mean_in": 100, "mean_out": 100}},
        tenants=draw(st.sampled_from([[], tenants])),
        events=events,
        systems={"it": made},
    )


class Checks:
    """Looks at the world at every step: memory, time, limits, and bytes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.worlds: list[World] = []
        self.jobs: list[Job] = []
        self._time = 0.0
        init, show = World.__init__, World._show

        def made(world: World, *arguments: Any, **named: Any) -> None:
            init(world, *arguments, **named)
            self.worlds.append(world)
            self._time = 0.0

        def shown(world: World, worker: Any) -> None:
            show(world, worker)
            self.memory(world)
            assert world.now >= self._time
            self._time = world.now

        patch.setattr(World, "__init__", made)
        patch.setattr(World, "_show", shown)
        patch.setattr(runs, "Job", lambda *arguments: self.jobs.append(Job(*arguments)) or self.jobs[-1])

    def memory(self, world: World) -> None:
        for node in world.view.nodes:
            assert min(world.view.free(node)) >= 0 and world.view.free_host(node) >= 0
        used: dict[tuple[str, int], int] = {}
        host: dict[str, int] = {}
        for worker in world.workers.values():
            assert worker.node in world.view.nodes
            host[worker.node] = host.get(worker.node, 0) + worker.model.process_bytes
            for gpu in worker.gpus if worker.state is not State.SLEEPING else ():
                used[worker.node, gpu] = used.get((worker.node, gpu), 0) + worker.model.device_bytes
        assert max(used.values(), default=0) <= 30e9 and max(host.values(), default=0) <= 8e9
        for model in world.view.models:
            assert world.view.ready_count(model) <= (world.view.model(model).max_replicas or math.inf)

    def end(self, outcome: Outcome) -> None:
        """Every request came out once, and every byte that set out arrived or was cut off."""
        (world,), jobs = self.worlds, self.jobs
        assert len(jobs) == len(outcome.load.trace) == len(outcome.records)
        assert all(not math.isnan(job.ended) and job.ended >= job.request.arrived for job in jobs)
        assert all(job.given_up or job.ended - job.request.arrived >= job.lost - 1e-6 for job in jobs)
        assert sum(job.given_up for job in jobs) == sum(outcome.records.given_up)
        for job in jobs:  # nobody was sent away early
            since = job.request.arrived if math.isnan(job.began) else job.stopped
            assert not job.given_up or job.ended - since >= 60 - 1e-6
        network = world.wires.network
        on_the_way = sum(flow.size for worker in world.workers.values() for flow in worker.flows)
        assert network.delivered == pytest.approx(sum(world.counts.moved.values()))
        assert -1 <= network.dropped <= network.begun - network.delivered - on_the_way + 1
        for link in world.wires.links:
            assert link.carried <= link.rate * world.now * (1 + 1e-6) + 1
        assert world.counts.gpu_busy_seconds <= world.counts.gpu_seconds + 1e-6


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(values=scenarios())
def test_whatever_happens_memory_suffices_and_every_request_ends(values: dict[str, Any]) -> None:
    try:
        Scenario.model_validate(values)
    except ValidationError as error:  # its minima can't all be ready at once
        assert "always ready need" in str(error)
        reject()
    with pytest.MonkeyPatch.context() as patch:
        checks = Checks(patch)
        outcome = run(values)
        checks.end(outcome)
    again = run(values)
    assert again.records.start == outcome.records.start and again.records.path == outcome.records.path
    assert again.events == outcome.events
