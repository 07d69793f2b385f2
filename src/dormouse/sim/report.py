"""What a simulation tells: one row for each case, rate and system; and the published figures beside ours.

    Outcome -> Row -> JSON, CSV, table;   rows + Published -> Comparison;   rows -> Distance to the oracle

A request's start-up latency is the time until it began, plus what it stood still later (preempted or migrated); one
that was given up counts with the time it waited. Shares say how the replica of each request had become ready.
"""

from __future__ import annotations

import csv
import io
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from dormouse.sim.records import PATHS
from dormouse.sim.run import Outcome
from dormouse.sim.scenario import Published, Scenario

_GB = 1e9
_QUANTILES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))


@dataclass(frozen=True)
class Met:
    """What requests met: seconds, and shares from 0 to 1. `waited` is the share of those that waited for a start of any
    kind, `stored` of those for which one came from a snapshot, a template or nothing."""

    case: str
    rate: float
    system: str
    requests: int
    given_up: int
    start_mean: float
    start_p50: float
    start_p95: float
    start_p99: float
    start_max: float
    ttft_mean: float
    ttft_p50: float
    ttft_p95: float
    ttft_p99: float
    slo: float
    hot: float
    sleep: float
    snapshot: float
    template: float
    cold: float
    waited: float
    stored: float


@dataclass(frozen=True)
class TenantRow(Met):
    """The requests of one group of tenants."""

    tenant: str


@dataclass(frozen=True)
class Row(Met):
    """All requests, and what the run cost in seconds and bytes. `gpu_idle` is the part of `gpu_seconds` in which no
    request ran. `waste` is memory held for nobody, in GB-seconds: the sum of the four after it."""

    waste: float
    waste_gpu: float
    waste_host: float
    waste_asleep: float
    waste_tier: float
    gpu_seconds: float
    gpu_idle: float
    dram_gb_seconds: float
    from_dram: float
    from_disk: float
    from_remote: float
    starts: int
    evictions: int
    preemptions: int
    migrations: int
    prewarms: int
    scaled: int
    most_replicas: int
    nodes_lost: int
    placed_again: int
    estimates: int
    estimate_error_median: float
    estimate_error_p99: float
    simulated_seconds: float
    events: int
    wall_seconds: float


def row_of(outcome: Outcome, slo: float) -> Row:
    """The sums of one run."""
    counts = outcome.counts
    wasted = [
        counts.idle_gpu_byte_seconds,
        counts.idle_host_byte_seconds,
        counts.asleep_byte_seconds,
        counts.tier_byte_seconds,
    ]
    count, median, p99 = outcome.errors
    return Row(
        **_met(outcome, slo, None),
        waste=_round(sum(wasted) / _GB),
        waste_gpu=_round(wasted[0] / _GB),
        waste_host=_round(wasted[1] / _GB),
        waste_asleep=_round(wasted[2] / _GB),
        waste_tier=_round(wasted[3] / _GB),
        gpu_seconds=_round(counts.gpu_seconds),
        gpu_idle=_round(1 - counts.gpu_busy_seconds / counts.gpu_seconds if counts.gpu_seconds else 0.0),
        dram_gb_seconds=_round(outcome.dram_byte_seconds / _GB),
        from_dram=_round(counts.moved.get("dram", 0.0)),
        from_disk=_round(counts.moved.get("disk", 0.0)),
        from_remote=_round(counts.moved.get("remote", 0.0)),
        starts=sum(counts.starts.values()),
        evictions=counts.evictions,
        preemptions=counts.preemptions,
        migrations=counts.migrations,
        prewarms=counts.prewarms,
        scaled=counts.scaled,
        most_replicas=counts.most_replicas,
        nodes_lost=counts.nodes_lost,
        placed_again=counts.placed_again,
        estimates=count,
        estimate_error_median=_round(median),
        estimate_error_p99=_round(p99),
        simulated_seconds=_round(outcome.seconds),
        events=outcome.events,
        wall_seconds=_round(outcome.wall),
    )


def tenant_rows(outcome: Outcome, slo: float) -> list[TenantRow]:
    """One for each group of tenants; none when the scenario names no tenants."""
    groups = dict.fromkeys((tenant.group, tenant.of) for tenant in outcome.load.tenants if tenant.name)
    return [TenantRow(**_met(outcome, slo, number), tenant=name) for number, name in groups]


def _met(outcome: Outcome, slo: float, tenant: int | None) -> dict[str, Any]:
    """The fields of `Met`: of all requests, or of those of one group of tenants."""
    records = outcome.records
    of = np.frombuffer(records.tenant, dtype=np.int32) if len(records) else np.zeros(0, dtype=np.int32)
    chosen = np.ones(len(of), dtype=bool) if tenant is None else of == tenant
    start, first = (_column(column, chosen, np.float64) for column in (records.start, records.first))
    given_up, path = (_column(column, chosen, np.int8) for column in (records.given_up, records.path))
    total = int(chosen.sum())
    shares = (np.bincount(path, minlength=len(PATHS)) / len(path)).tolist() if total else [0.0] * len(PATHS)
    return {
        "case": outcome.load.case,
        "rate": round(outcome.load.rate, 4),
        "system": outcome.system,
        "requests": total,
        "given_up": int(given_up.sum()),
        "start_mean": _round(start.mean()),
        **{f"start_{name}": _round(np.quantile(start, at)) for name, at in _QUANTILES},
        "start_max": _round(start.max()),
        "ttft_mean": _round(first.mean()),
        **{f"ttft_{name}": _round(np.quantile(first, at)) for name, at in _QUANTILES},
        "slo": _round(float(((start <= slo) & (given_up == 0)).mean())) if total else 1.0,
        **{name: round(share, 5) for name, share in zip(PATHS, shares, strict=True)},
        "waited": _round(1 - shares[0]) if total else 0.0,
        "stored": _round(sum(shares[2:])),
    }


def _column(column: array[Any], chosen: NDArray[np.bool_], kind: type[np.generic]) -> NDArray[Any]:
    """One zero when there is nothing."""
    found = np.frombuffer(column, dtype=kind)[chosen] if len(column) else np.zeros(0, dtype=kind)
    return found if len(found) else np.zeros(1, dtype=kind)


def _round(value: Any) -> float:
    return float(f"{float(value):.6g}")


@dataclass(frozen=True)
class Distance:
    """How far a system is from the oracle of its case: by the share of requests that waited for a start, and by the
    memory held for nobody. `waited_more` is a difference of shares, `waste_times` a ratio."""

    case: str
    rate: float
    system: str
    waited: float
    waited_more: float
    waste: float
    waste_times: float


def distances(scenario: Scenario, rows: Sequence[Row]) -> list[Distance]:
    """All systems' of every case in which an oracle ran."""
    oracles = {(row.case, row.rate): row for row in rows if scenario.systems[row.system].keep_alive.policy == "oracle"}
    return [_distance(row, best) for row in rows if (best := oracles.get((row.case, row.rate)))]


def _distance(row: Row, best: Row) -> Distance:
    return Distance(
        row.case, row.rate, row.system, row.waited, _round(row.waited - best.waited), row.waste,
        _round(row.waste / best.waste if best.waste else 1.0),
    )  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """A published figure and what the simulation has for it; `error` is relative, positive when ours is more. `rates`
    are those that were averaged."""

    system: str
    case: str
    metric: str
    published: float
    simulated: float
    error: float
    rates: tuple[float, ...]
    source: str


def compare(scenario: Scenario, rows: Sequence[Row]) -> list[Comparison]:
    """Every published figure for which something was simulated."""
    return [found for one in scenario.published if (found := _compared(one, rows))]


def _compared(one: Published, rows: Sequence[Row]) -> Comparison | None:
    fit = [row for row in rows if row.system == one.system and row.case == one.case]
    fit = [row for row in fit if one.rate is None or abs(row.rate - one.rate) < 1e-9]
    if not fit:
        return None
    simulated = _round(np.mean([getattr(row, one.metric) for row in fit]))
    error = _round(simulated / one.value - 1)
    rates = tuple(row.rate for row in fit)
    return Comparison(one.system, one.case, one.metric, one.value, simulated, error, rates, one.source)


def as_json(scenario: Scenario, rows: Sequence[Row], tenants: Sequence[TenantRow]) -> dict[str, Any]:
    """All of it."""
    return {
        "scenario": scenario.name,
        "seed": scenario.seed,
        "rows": [asdict(row) for row in rows],
        "tenants": [asdict(row) for row in tenants],
        "published": [asdict(one) for one in compare(scenario, rows)],
        "oracle": [asdict(one) for one in distances(scenario, rows)],
    }


def as_csv(rows: Iterable[Row], tenants: Iterable[TenantRow]) -> str:
    """All runs, then their tenants, which have no figures of GPUs and bytes."""
    names = [field.name for field in fields(Row)]
    names.insert(names.index("system") + 1, "tenant")
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    writer.writerows(asdict(row) for row in tenants)
    return text.getvalue()


def table(rows: Iterable[Row | TenantRow], slo: float, title: str = "start-up latency") -> Table:
    """What requests met, of each run or of its tenants."""
    made = Table("case", "req/s", "system", title=f"{title} in seconds; good: up to {slo:g} s", box=None)
    for name in ("requests", "given up", "mean", "P50", "P95", "P99", "TTFT", "TTFT P99", "good", "hot", "sleep",
                 "snapshot", "cold"):  # fmt: skip
        made.add_column(name, justify="right")
    for row in rows:
        shares = (f"{share:.0%}" for share in (row.slo, row.hot, row.sleep, row.snapshot, row.cold))
        met = (row.start_mean, row.start_p50, row.start_p95, row.start_p99, row.ttft_mean, row.ttft_p99)
        who = f"{row.system}: {row.tenant}" if isinstance(row, TenantRow) else row.system
        made.add_row(row.case, f"{row.rate:g}", who, str(row.requests), str(row.given_up),
                     *(f"{value:.2f}" for value in met), *shares)  # fmt: skip
    return made


def cost_table(rows: Iterable[Row]) -> Table:
    """What each run spent."""
    made = Table("case", "req/s", "system", title="what it took", box=None)
    for name in ("GPU h", "idle", "DRAM GB h", "GB of DRAM", "of disk", "of remote", "starts", "evicted", "preempted",
                 "migrated", "prewarmed", "scaled", "replicas"):  # fmt: skip
        made.add_column(name, justify="right")
    for row in rows:
        moved = (f"{size / _GB:.0f}" for size in (row.from_dram, row.from_disk, row.from_remote))
        counts = (row.starts, row.evictions, row.preemptions, row.migrations, row.prewarms, row.scaled,
                  row.most_replicas)  # fmt: skip
        made.add_row(row.case, f"{row.rate:g}", row.system, f"{row.gpu_seconds / 3600:.1f}", f"{row.gpu_idle:.0%}",
                     f"{row.dram_gb_seconds / 3600:.0f}", *moved, *map(str, counts))  # fmt: skip
    return made


def distance_table(found: Iterable[Distance]) -> Table:
    made = Table("case", "system", title="starts and memory held for nobody, and how far from the oracle", box=None)
    for name in ("waited for a start", "more", "GB-seconds", "times"):
        made.add_column(name, justify="right")
    for one in found:
        made.add_row(one.case, one.system, f"{one.waited:.1%}", f"{one.waited_more:+.1%}", f"{one.waste:,.0f}",
                     f"{one.waste_times:.2f}")  # fmt: skip
    return made


def comparison_table(found: Iterable[Comparison]) -> Table:
    made = Table("case", "system", "figure", title="published and simulated", box=None)
    for name in ("published", "simulated", "error", "at req/s"):
        made.add_column(name, justify="right")
    made.add_column("source")
    for one in found:
        rates = ", ".join(f"{rate:g}" for rate in one.rates)
        made.add_row(one.case, one.system, one.metric, f"{one.published:g}", f"{one.simulated:.2f}",
                     f"{one.error:+.0%}", rates, one.source)  # fmt: skip
    return made
