"""Numbers of the server for Prometheus.

Names in labels are bounded: only models that exist become labels, and of those at most `MOST_LABELS`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from math import isfinite

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorakit.serving.engine import EngineStatus, Receipt
from lorakit.serving.loaded import StoreStats
from lorakit.serving.verification import Verdict

NONE, BLEND, OTHER = "(none)", "(blend)", "(other)"
"""Labels of requests without a model that exists, of blends, and of models beyond `MOST_LABELS`."""
MOST_LABELS = 1000
"""Most different adapters in labels."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


def model_label(receipt: Receipt, base: str) -> str:
    """Return the label of what computes an answer: the base, one adapter of weight 1, or `BLEND`."""
    if not receipt.adapters:
        return base
    (name, _, weight), *others = receipt.adapters
    return BLEND if others or weight != 1 else name


class Metrics:
    """All series of one server, with a registry of their own."""

    def __init__(self, status: Callable[[], EngineStatus], stats: Callable[[], StoreStats]) -> None:
        self.registry = CollectorRegistry()
        own = {"namespace": "lorakit", "registry": self.registry}
        self._requests = Counter(
            "requests", "Answered requests", ["adapter", "route", "status"], **own
        )
        self._prompt = Counter("prompt_tokens", "Tokens of prompts", ["adapter"], **own)
        self._cached = Counter(
            "cached_prompt_tokens", "Tokens of prompts taken from the cache", ["adapter"], **own
        )
        self._generated = Counter("generated_tokens", "Generated tokens", ["adapter"], **own)
        self.first_token = Histogram(
            "time_to_first_token_seconds",
            "From the request to its first token",
            buckets=_SECONDS,
            **own,
        )
        self._between = Histogram(
            "time_between_tokens_seconds",
            "Between two tokens of an answer",
            buckets=_BETWEEN,
            **own,
        )
        self._whole = Histogram(
            "request_seconds",
            "From the request to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            **own,
        )
        self._verified = Counter(
            "verified_answers", "Answers that --verify has chosen", ["adapter", "result"], **own
        )
        self._difference = Histogram(
            "verification_difference",
            "Mean absolute difference of the log-probabilities of an answer's tokens",
            buckets=(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.5, 1.0),
            **own,
        )
        self.open_requests = Gauge(
            "open_requests",
            "Requests for tokens or classes without an answer yet, also those that wait for adapters",
            **own,
        )
        self._labels: set[str] = set()
        self._lock = threading.Lock()
        self.registry.register(_State(status, stats))

    def label(self, adapter: str | None) -> str:
        """Return the label of a model that exists; None is none."""
        if adapter is None:
            return NONE
        with self._lock:
            if adapter in self._labels or len(self._labels) < MOST_LABELS:
                self._labels.add(adapter)
                return adapter
        return OTHER

    def request(self, adapter: str | None, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(self.label(adapter), route, str(status)).inc()
        self._whole.labels(route).observe(seconds)

    def tokens(
        self, adapter: str | None, *, prompt: int = 0, cached: int = 0, generated: int = 0
    ) -> None:
        """Count the tokens of a request."""
        label = self.label(adapter)
        self._prompt.labels(label).inc(prompt)
        self._cached.labels(label).inc(cached)
        self._generated.labels(label).inc(generated)

    def between_tokens(self, seconds: float, count: int) -> None:
        """Record the time from one token to the last of `count` next ones."""
        for _ in range(count):
            self._between.observe(seconds / count)

    def verified(self, adapter: str, verdict: Verdict | None) -> None:
        """Count an answer that --verify has chosen; None if it could not be compared."""
        result = "skipped" if verdict is None else "passed" if verdict.agrees else "failed"
        self._verified.labels(self.label(adapter), result).inc()
        if verdict is not None and isfinite(verdict.difference):  # NaN would stay in the sum
            self._difference.observe(verdict.difference)

    def page(self) -> bytes:
        """Return all series in Prometheus' text format."""
        return generate_latest(self.registry)


class _State(Collector):
    """What the engine and the store do at the time of a scrape."""

    def __init__(self, status: Callable[[], EngineStatus], stats: Callable[[], StoreStats]) -> None:
        self._status, self._stats = status, stats

    def collect(self) -> Iterable[Metric]:
        """Yield the series."""
        status = self._status()
        yield GaugeMetricFamily(
            "lorakit_engine_alive", "1 while the engine runs", float(status.is_alive)
        )
        yield GaugeMetricFamily("lorakit_running_requests", "Requests in the batch", status.running)
        yield GaugeMetricFamily("lorakit_waiting_requests", "Requests in the queue", status.waiting)
        yield GaugeMetricFamily(
            "lorakit_cache_used_ratio", "Share of the cache in use", status.cache_used
        )
        yield CounterMetricFamily("lorakit_engine_steps", "Forward passes", status.steps)
        yield CounterMetricFamily("lorakit_engine_tokens", "Generated tokens", status.tokens)
        stats = self._stats()
        yield GaugeMetricFamily("lorakit_adapters_loaded", "Adapters in memory", stats.loaded)
        yield GaugeMetricFamily("lorakit_adapter_bytes", "Memory of adapters", stats.bytes)
        yield GaugeMetricFamily("lorakit_adapter_bytes_limit", "Memory for adapters", stats.budget)
        yield CounterMetricFamily("lorakit_adapter_loads", "Adapters read", stats.loads)
        yield CounterMetricFamily("lorakit_adapter_evictions", "Adapters evicted", stats.evictions)
