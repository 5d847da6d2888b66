"""Prometheus metrics, under the names that vLLM's dashboards use (with `malora_` before them)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from malora_server.engine.messages import EngineStats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})

EngineGauge = tuple[str, str, Callable[[EngineStats], float]]
_GAUGES: tuple[EngineGauge, ...] = (
    ("num_requests_running", "Sequences in the running batch.", lambda s: s.num_requests_running),
    ("num_requests_waiting", "Sequences waiting for a place.", lambda s: s.num_requests_waiting),
    ("kv_cache_usage_ratio", "Share of the KV cache in use.", lambda s: s.kv_cache_usage_ratio),
)
_COUNTERS: tuple[EngineGauge, ...] = (
    ("prefix_cache_queries", "Prompt tokens looked up.", lambda s: s.prefix_cache_queries),
    ("prefix_cache_hits", "Prompt tokens found.", lambda s: s.prefix_cache_hits),
    ("num_preemptions", "Sequences that had to give way.", lambda s: s.preemptions),
)


class _EngineCollector(Collector):
    """Reads the engine's own totals when somebody asks, so that a step costs nothing here."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, text, read in _GAUGES:
            yield GaugeMetricFamily(f"malora_{name}", text, value=read(stats))
        for name, text, read in _COUNTERS:
            yield CounterMetricFamily(f"malora_{name}", text, value=read(stats))

    def describe(self) -> Iterator[Metric]:
        return iter(())


@dataclass(frozen=True)
class ModelMetrics:
    """One model's share of the metrics, looked up once so that a token costs little."""

    prompt_tokens: Counter
    generation_tokens: Counter
    time_to_first_token: Histogram
    inter_token_latency: Histogram
    e2e_latency: Histogram
    request_prompt_tokens: Histogram
    request_generation_tokens: Histogram
    _success: Counter
    _name: str

    def finished(self, reason: str, prompt: int, generated: int, seconds: float) -> None:
        """Count one sequence that ended."""
        self._success.labels(self._name, reason).inc()
        self.e2e_latency.observe(seconds)
        self.request_prompt_tokens.observe(prompt)
        self.request_generation_tokens.observe(generated)


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        """`stats` gives the engine's newest state."""
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_EngineCollector(stats))
        self._models: dict[str, ModelMetrics] = {}
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens.")
        self._generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self._success = self._counter(
            "request_success", "Sequences that ended, by how.", "finished_reason"
        )
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "From the request to its first token.", _SECONDS
        )
        self._itl = self._histogram(
            "inter_token_latency_seconds",
            "Between one chunk of tokens and the next.",
            _TOKEN_SECONDS,
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "From the request to its last token.", _SECONDS
        )
        self._request_prompt = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a sequence.", _TOKENS
        )
        self._request_generation = self._histogram(
            "request_generation_tokens", "Generated tokens of a sequence.", _TOKENS
        )
        self._http = Counter(
            "malora_http_requests",
            "HTTP requests, by route and status.",
            ("method", "path", "status"),
            registry=self._registry,
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"malora_{name}", text, ("model_name", *labels), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"malora_{name}", text, ("model_name",), buckets=buckets, registry=self._registry
        )

    def model(self, name: str) -> ModelMetrics:
        """The metrics of a model; `name` must be one that is served, never a client's invention."""
        known = self._models.get(name)
        if known is None:
            known = self._models[name] = ModelMetrics(
                prompt_tokens=self._prompt_tokens.labels(name),
                generation_tokens=self._generation_tokens.labels(name),
                time_to_first_token=self._ttft.labels(name),
                inter_token_latency=self._itl.labels(name),
                e2e_latency=self._e2e.labels(name),
                request_prompt_tokens=self._request_prompt.labels(name),
                request_generation_tokens=self._request_generation.labels(name),
                _success=self._success,
                _name=name,
            )
        return known

    def http_request(self, method: str, path: str | None, status: int) -> None:
        """Count one HTTP request; `path` is the route's pattern, None where none matched."""
        known = method if method in _METHODS else "other"
        self._http.labels(known, path or "unknown", status).inc()

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
