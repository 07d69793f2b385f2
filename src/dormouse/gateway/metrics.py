"""What /metrics shows. Counters and histograms are fed where the thing happens; gauges are read from the node when
somebody asks. Labels are names that are served (models) or configured (tenants), so their number is bounded."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from dormouse.errors import DormouseError
from dormouse.node.node import Node
from dormouse.node.parts import Evicted
from dormouse.node.replica import Start, State
from dormouse.phases import Phases
from dormouse.schedule.cluster import StartPath
from dormouse.snapshot.service import CaptureResult

_START_BUCKETS = (0.01, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 60, 120, 300)
_ERROR_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5)
_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Metrics:
    """The registry of one gateway; the node's observer."""

    def __init__(self, node: Node) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "dormouse_requests", "HTTP requests by outcome.", ("route", "model", "status", "tenant"), registry=registry
        )
        self.queued = Histogram(
            "dormouse_queue_seconds",
            "How long requests waited until they had a replica, its start included; of those that got one.",
            ("tenant",),
            buckets=_START_BUCKETS,
            registry=registry,
        )
        self.first_token = Histogram(
            "dormouse_time_to_first_token_seconds",
            "From the arrival of a request to its first token, waiting included.",
            ("model", "path"),
            buckets=_START_BUCKETS,
            registry=registry,
        )
        self.token_gap = Histogram(
            "dormouse_inter_token_seconds",
            "Between two token events of one answer.",
            ("model",),
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self._starts = Histogram(
            "dormouse_start_seconds",
            "How long replicas took to become ready, by start path.",
            ("model", "path"),
            buckets=_START_BUCKETS,
            registry=registry,
        )
        self._estimates = Histogram(
            "dormouse_start_estimate_seconds",
            "What starts that succeeded were estimated to take, once there was room for them.",
            ("model", "path"),
            buckets=_START_BUCKETS,
            registry=registry,
        )
        self._estimate_errors = Histogram(
            "dormouse_start_estimate_error_ratio",
            "By how much estimates were off, as a share of what the starts took.",
            ("model", "path"),
            buckets=_ERROR_BUCKETS,
            registry=registry,
        )
        self._phases = Counter(
            "dormouse_phase_seconds",
            "Seconds spent per phase of starts and captures.",
            ("model", "step", "phase"),
            registry=registry,
        )
        self._failures = Counter(
            "dormouse_start_failures", "Starts that no path led to.", ("model", "reason"), registry=registry
        )
        self._fallbacks = Counter(
            "dormouse_fallbacks",
            "Start paths that were not taken to their end.",
            ("model", "path", "reason"),
            registry=registry,
        )
        self._retries = Counter(
            "dormouse_restore_retries", "Snapshots that got a second try.", ("model", "reason"), registry=registry
        )
        self._quarantines = Counter(
            "dormouse_quarantines",
            "Snapshots and templates that are never used again.",
            ("model", "reason"),
            registry=registry,
        )
        self._unprotected = Counter(
            "dormouse_unprotected_weights",
            "Starts of workers that could write to shared weights, because the GPU's driver does not protect them.",
            ("model",),
            registry=registry,
        )
        self._evictions = Counter(
            "dormouse_evictions",
            "What was let go of to make room: weights, process (it dozed) or model (it was ready).",
            ("model", "what"),
            registry=registry,
        )
        self._captures = Counter("dormouse_captures", "Captures by outcome.", ("model", "outcome"), registry=registry)
        self._captured_bytes = Counter(
            "dormouse_captured_bytes", "Bytes of captured images.", ("model", "kind"), registry=registry
        )
        self._adapter_loads = Histogram(
            "dormouse_adapter_load_seconds",
            "How long workers took to get an adapter.",
            ("model", "adapter"),
            buckets=_START_BUCKETS,
            registry=registry,
        )
        self._adapter_failures = Counter(
            "dormouse_adapter_failures",
            "Adapters that could not be loaded.",
            ("model", "adapter", "reason"),
            registry=registry,
        )
        registry.register(_NodeGauges(node))
        node.observe(self)

    def page(self) -> bytes:
        """The text of /metrics."""
        return generate_latest(self._registry)

    # dormouse.node.parts.Observer

    def started(self, model: str, start: Start, phases: Phases) -> None:
        self._starts.labels(model, start.path).observe(start.seconds)
        self._add_phases(model, start.path, phases)

    def start_failed(self, model: str, error: DormouseError) -> None:
        self._failures.labels(model, error.code).inc()

    def foretold(self, model: str, path: StartPath, expected: float, took: float) -> None:
        self._estimates.labels(model, path).observe(expected)
        self._estimate_errors.labels(model, path).observe(abs(expected - took) / max(took, 1e-6))

    def fell_back(self, model: str, path: StartPath, error: DormouseError) -> None:
        self._fallbacks.labels(model, path, error.code).inc()

    def retried(self, model: str, error: DormouseError) -> None:
        self._retries.labels(model, error.code).inc()

    def quarantined(self, model: str, error: DormouseError) -> None:
        self._quarantines.labels(model, error.code).inc()

    def captured(self, model: str, result: CaptureResult, phases: Phases) -> None:
        self._captures.labels(model, "committed").inc()
        self._captured_bytes.labels(model, "raw").inc(result.raw_bytes)
        self._captured_bytes.labels(model, "stored").inc(result.stored_bytes)
        self._add_phases(model, "capture", phases)

    def capture_failed(self, model: str, error: DormouseError) -> None:
        self._captures.labels(model, error.code).inc()

    def unprotected(self, model: str) -> None:
        self._unprotected.labels(model).inc()

    def evicted(self, model: str, what: Evicted) -> None:
        self._evictions.labels(model, what).inc()

    def adapter_loaded(self, model: str, adapter: str, seconds: float) -> None:
        self._adapter_loads.labels(model, adapter).observe(seconds)

    def adapter_failed(self, model: str, adapter: str, error: DormouseError) -> None:
        self._adapter_failures.labels(model, adapter, error.code).inc()

    def _add_phases(self, model: str, step: str, phases: Phases) -> None:
        for phase, seconds in phases.seconds().items():
            self._phases.labels(model, step, phase).inc(seconds)


class _NodeGauges:
    """Reads the node when it is scraped."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        """The gauges of all models."""
        waiting = GaugeMetricFamily("dormouse_waiting", "Requests that wait for the model.", labels=["model"])
        in_flight = GaugeMetricFamily("dormouse_in_flight", "Requests that use the model.", labels=["model"])
        memory = GaugeMetricFamily("dormouse_worker_rss_bytes", "Memory the worker has now.", labels=["model"])
        state = GaugeMetricFamily("dormouse_replicas", "Replicas in each state.", labels=["model", "state"])
        for status in self._node.statuses():
            waiting.add_metric([status.name], status.waiting)
            in_flight.add_metric([status.name], status.in_flight)
            memory.add_metric([status.name], status.rss_bytes)
            for name in State:
                state.add_metric([status.name, name.value], list(status.replicas.values()).count(name.value))
        kept = GaugeMetricFamily(
            "dormouse_kept_weights_bytes",
            "Weights in memory that no worker uses.",
            value=sum(self._node.kept_weights().values()),
        )
        yield from (waiting, in_flight, memory, state, kept, *self._scheduling())

    def _scheduling(self) -> Iterator[Metric]:
        error = GaugeMetricFamily(
            "dormouse_start_estimate_error",
            "How far estimates of the last starts were off, as a share of what these took: median and 99th percentile.",
            labels=["path", "quantile"],
        )
        for path, errors in self._node.estimate_errors().items():
            error.add_metric([path, "0.5"], errors.median)
            error.add_metric([path, "0.99"], errors.p99)
        prewarms = CounterMetricFamily(
            "dormouse_prewarms", "Times that a model was made ready before anybody asked.", labels=["model"]
        )
        for model, count in self._node.prewarms.items():
            prewarms.add_metric([model], count)
        pace = GaugeMetricFamily(
            "dormouse_start_pace",
            "How many times as long as usual starts take at present; estimates are multiplied by it.",
            value=self._node.start_pace(),
        )
        yield from (error, prewarms, pace)
