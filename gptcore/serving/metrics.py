"""What /metrics says, in Prometheus' format."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Counters and histograms of a server, and the engine's own numbers at the time of asking."""

    def __init__(self, stats: Any) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Stats(stats))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"gptcore_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"gptcore_{name}_seconds", text, registry=self.registry, buckets=SECONDS)

        self.requests = counter("requests", "requests, by route and status", "route", "status")
        self.prompt_tokens = counter("prompt_tokens", "tokens of prompts")
        self.cached_tokens = counter("cached_tokens", "tokens of prompts that were not computed again")
        self.generated_tokens = counter("generated_tokens", "tokens generated")
        self.finished = counter("finished", "texts, by why they ended", "reason")
        self.first_token = histogram("time_to_first_token", "from the request to its first token")
        self.between_tokens = histogram("time_between_tokens", "from one token to the next")
        self.request = histogram("request", "from the request to its end")

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Clock:
    """Measures one text."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start = self._last = time.perf_counter()
        self._tokens = 0

    def token(self) -> None:
        now = time.perf_counter()
        histogram = self._metrics.between_tokens if self._tokens else self._metrics.first_token
        histogram.observe(now - self._last)
        self._last = now
        self._tokens += 1
        self._metrics.generated_tokens.inc()

    def end(self, ticket: Any, reason: str) -> None:
        self._metrics.request.observe(time.perf_counter() - self._start)
        self._metrics.finished.labels(reason).inc()
        self._metrics.prompt_tokens.inc(ticket.prompt_tokens)
        self._metrics.cached_tokens.inc(ticket.cached_tokens)


class _Stats(Collector):
    def __init__(self, stats: Any) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        numbers: Mapping[str, float] = self._stats()
        for name, value in numbers.items():
            yield GaugeMetricFamily(f"gptcore_engine_{name}", f"the engine's {name.replace('_', ' ')}", value)
