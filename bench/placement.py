"""How long one placement takes in a large cluster.

    python bench/placement.py [--nodes 1000] [--models 10000] [--decisions 2000] [--json FILE]

Nodes have 8 GPUs; models of 1 to 140 GB (half of them below 8 GB, on 1 to 8 GPUs) lie on the disks of some nodes, in
the memory of a few, and can be fetched from a store; popularity is heavy-tailed. Three clusters: `empty` (nothing
runs), `busy` (half of the GPUs run something), `full` (every GPU is taken, a third by idle replicas). Requests are
drawn by popularity, as they come (`mixed`), and for models that have no replica (`start`), where everything must be
looked at. Each decision is timed by itself (CPU time of its thread), with the refresh of the indexes that the one
before made necessary; it is then applied to the view (`apply`, timed apart): evictions, the new replica, the queue of
the link.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dormouse.bench_start import host_facts
from dormouse.schedule.cluster import DISK, Artifact, Cluster, ModelCost, Node, Replica, Request, Running, State, Tier
from dormouse.schedule.estimate import Estimator
from dormouse.schedule.place import Decision, place

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.schedule.clusters import GB, PHASES, Keeper, links

_GPUS = 8
_NOW = 1000.0


def build(nodes: int, models: int, fill: str, rng: random.Random) -> Cluster:
    """A cluster with what lies and runs on it."""
    view = Cluster()
    for number in range(nodes):
        view.add_node(Node(f"node-{number:04}", (141 * GB,) * _GPUS, 2000 * GB, links()))
    for number in range(models):
        model = _model(number, rng)
        view.add_model(model)
        _lay(view, model, number, models, nodes, rng)
    if fill != "empty":
        _fill(view, models, fill, rng)
    return view


def _model(number: int, rng: random.Random) -> ModelCost:
    size = int(min(max(rng.lognormvariate(2.0, 1.1), 1.0), 140.0) * GB)
    gpus = 8 if size > 100 * GB else 4 if size > 60 * GB else 2 if size > 30 * GB else 1
    return ModelCost(
        f"model-{number:05}",
        Artifact(f"weights-{number:05}", size, int(size / 1.4)),
        kv_bytes=size // 3,
        gpus=gpus,
        process_bytes=2 * GB,
        image=Artifact(f"image-{number:05}", GB, GB // 4) if rng.random() < 0.8 else None,
        template=Artifact("template", GB, GB // 5),
        phases=PHASES,
    )


def _lay(view: Cluster, model: ModelCost, number: int, models: int, nodes: int, rng: random.Random) -> None:
    """Popular models lie on many nodes, the rest on a few."""
    copies = max(1, min(nodes // 2, int(nodes / 2 / (number + 1) ** 0.6)))
    for place_number in rng.sample(range(nodes), copies):
        node = f"node-{place_number:04}"
        tiers = (Tier.DISK, Tier.DRAM) if rng.random() < 0.2 else (Tier.DISK,)
        for tier in tiers:
            view.hold(model.weights.key, node, tier)
            if model.image:
                view.hold(model.image.key, node, tier)
    view.hold_remote(model.weights.key)
    view.hold_remote("template")
    if model.image:
        view.hold_remote(model.image.key)


def _fill(view: Cluster, models: int, fill: str, rng: random.Random) -> None:
    names = list(view.models)
    weights = list(accumulate(_popularity(models)))
    for node in list(view.nodes):
        for gpu in range(_GPUS):
            if fill == "busy" and rng.random() < 0.5:
                continue
            model = view.model(rng.choices(names, cum_weights=weights)[0])
            while model.gpus != 1:
                model = view.model(rng.choice(names))
            since = _NOW - rng.expovariate(1 / 60.0)
            for copy in range(
                rng.randint(1, 3) if fill == "busy" else max(1, view.free(node)[gpu] // model.device_bytes)
            ):
                idle = rng.random() < 1 / 3
                state = State.HOT if idle else State.BUSY
                running = () if idle else (Running(f"r-{node}-{gpu}-{copy}", since, 100, 300, 500),)
                expected = 0.0 if idle else _NOW + rng.expovariate(1 / 10.0)
                view.put(
                    Replica(f"{node}/{gpu}/{copy}", model.name, node, (gpu,), state, since, running, expected=expected)
                )


def _popularity(models: int) -> list[float]:
    return [1.0 / (rank + 1) ** 0.9 for rank in range(models)]


def measure(view: Cluster, what: str, decisions: int, rng: random.Random) -> dict[str, Any]:
    """Decide for `decisions` requests, one after the other, each applied before the next."""
    names = list(view.models)
    weights = list(accumulate(_popularity(len(names))))
    estimator = Estimator()
    keeper = Keeper(view, service=10.0, checks=False)
    times: list[float] = []
    applied: list[float] = []
    kinds: dict[str, int] = {}
    next(view.most_free(1))  # the indexes are there
    gc.collect()
    gc.disable()
    for number in range(decisions):
        name = rng.choices(names, cum_weights=weights)[0]
        while what == "start" and any(True for _ in view.replicas_of(name)):
            name = rng.choice(names)
        now = _NOW + number * 0.001
        began = time.thread_time()
        decision = place(Request(f"q{number}", name, now), view, estimator, now)
        decided = time.thread_time()
        keeper.now = now
        apply(keeper, decision)
        times.append(decided - began)
        applied.append(time.thread_time() - decided)
        kind = f"{decision.chosen.action} {decision.chosen.path}" if decision.chosen else "none"
        kinds[kind] = kinds.get(kind, 0) + 1
    gc.enable()
    return {"requests": what, **_summary(times), "apply_ms": 1e3 * sum(applied) / len(applied), "decisions": kinds}


def _summary(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    at = {"median_ms": 0.5, "p99_ms": 0.99, "max_ms": 1.0}
    found = {name: 1e3 * ordered[min(int(share * len(ordered)), len(ordered) - 1)] for name, share in at.items()}
    return {"mean_ms": 1e3 * sum(ordered) / len(ordered), **found}


def apply(keeper: Keeper, decision: Decision) -> None:
    """Bring the view up to date."""
    option = decision.chosen
    if option is None:
        return
    keeper.commit(decision)
    if option.action == "start":
        link = keeper.view.link(option.node, DISK)
        keeper.view.set_link(option.node, DISK, link.queued + GB, link.transfers + 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--decisions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for fill in ("empty", "busy", "full"):
        for what in ("mixed", "start"):
            view = build(options.nodes, options.models, fill, random.Random(options.seed))
            rows.append({"cluster": fill, **measure(view, what, options.decisions, random.Random(options.seed))})
    _print(rows, options.nodes, options.models)
    if options.json:
        found = {"host": host_facts(), "nodes": options.nodes, "models": options.models, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _print(rows: list[dict[str, Any]], nodes: int, models: int) -> None:
    table = Table("cluster", "requests", box=box.SIMPLE, title=f"One placement, {nodes} nodes, {models} models")
    columns = ("mean_ms", "median_ms", "p99_ms", "max_ms", "apply_ms")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("decisions")
    for row in rows:
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(row["decisions"].items()))
        table.add_row(row["cluster"], row["requests"], *(f"{row[name]:.3f}" for name in columns), kinds)
    Console(width=140).print(table)


if __name__ == "__main__":
    sys.exit(main())
