"""Prometheus metrics, under the names that vLLM's dashboards use (with `malora_` before them)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from malora_server.engine.messages import (
    LAYER_GROUPS,
    STEP_TOKEN_BUCKETS,
    AdapterStatus,
    AdapterStoreStats,
    EngineStats,
    Report,
    RoutingSample,
    SequenceStart,
)

OTHER = "other"
"""The `model_name` of all models that came when every name of their own was given away."""

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
_LOAD_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_TOKENS = (1, 5, 10, 50, 100, 500, 1_000, 5_000, 10_000, 50_000, 100_000)
_CHOICES = (1, 2, 5, 10, 20)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})

EngineValue = tuple[str, str, Callable[[EngineStats], float]]
_GAUGES: tuple[EngineValue, ...] = (
    ("num_requests_running", "Sequences in the running batch.", lambda s: s.num_requests_running),
    ("num_requests_waiting", "Sequences waiting for a place.", lambda s: s.num_requests_waiting),
    ("kv_cache_usage_ratio", "Share of the KV cache in use.", lambda s: s.kv_cache_usage_ratio),
    ("kv_cache_usage_perc", "The same, by vLLM's name: 0 to 1.", lambda s: s.kv_cache_usage_ratio),
)
_COUNTERS: tuple[EngineValue, ...] = (
    ("prefix_cache_queries", "Prompt tokens looked up.", lambda s: s.prefix_cache_queries),
    ("prefix_cache_hits", "Prompt tokens found.", lambda s: s.prefix_cache_hits),
    ("num_preemptions", "Sequences that had to give way.", lambda s: s.preemptions),
)

StoreValue = tuple[str, Callable[[AdapterStoreStats], float]]
_STORE: tuple[tuple[str, str, tuple[StoreValue, ...]], ...] = (
    (
        "adapter_memory_bytes",
        "Bytes that adapters take, each shared basis once.",
        (("device", lambda s: s.device_bytes), ("host", lambda s: s.host_bytes)),
    ),
    (
        "adapter_memory_capacity_bytes",
        "Bytes that adapters may take.",
        (("device", lambda s: s.device_capacity), ("host", lambda s: s.host_capacity)),
    ),
    (
        "adapters",
        "Adapters on the device; in host memory, those on the device included; being read.",
        (
            ("device", lambda s: s.num_device),
            ("host", lambda s: s.num_host),
            ("loading", lambda s: s.num_loading),
        ),
    ),
)

disable_created_metrics()  # type: ignore[no-untyped-call]  # half as many series again, unused


class Engine(Protocol):
    """What is read of the engine's handle."""

    @property
    def healthy(self) -> bool:
        """Whether it lives."""

    @property
    def stats(self) -> EngineStats:
        """Its newest state."""

    @property
    def restarts(self) -> int:
        """How many engine processes were started in place of one that ended."""


@dataclass
class _Routing:
    """The sum of an adapter's routing samples: gates (groups, N), entropy and count (groups,)."""

    gates: NDArray[np.float64]
    entropy: NDArray[np.float64]
    count: NDArray[np.float64]

    @classmethod
    def of(cls, sample: RoutingSample) -> _Routing:
        return cls(
            np.array(sample.gates), np.array(sample.entropy), np.array(sample.count, dtype=float)
        )

    def add(self, other: _Routing) -> None:
        """Take in more; adapters under one name may differ in their number of experts."""
        if other.gates.shape[1] > self.gates.shape[1]:
            missing = other.gates.shape[1] - self.gates.shape[1]
            self.gates = np.pad(self.gates, ((0, 0), (0, missing)))
        self.gates[:, : other.gates.shape[1]] += other.gates
        self.entropy += other.entropy
        self.count += other.count


class _EngineCollector(Collector):
    """Reads the engine's own totals when somebody asks, so that a step costs nothing here."""

    def __init__(self, engine: Engine, base_name: str, name_of: Callable[[str], str]) -> None:
        """name_of: what an adapter is called among the metrics."""
        self._engine = engine
        self._labels = (base_name,)
        self._num_steps = [0] * (len(STEP_TOKEN_BUCKETS) + 1)
        self._num_tokens = 0
        self.routing: dict[str, _Routing] = {}
        """By the model's name among the metrics."""
        self.residents: dict[tuple[str, int], AdapterStatus] = {}
        """The adapters in memory: by name, and which of its contents."""
        self._name_of = name_of

    def add(self, report: Report) -> None:
        """Count a report's steps."""
        steps = zip(self._num_steps, report.num_steps, strict=True)
        self._num_steps = [a + b for a, b in steps]
        self._num_tokens += report.num_tokens

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("malora_engine_up", "Whether the engine lives: 1, else 0.")
        up.add_metric((), float(self._engine.healthy))
        yield up
        restarts = CounterMetricFamily(
            "malora_engine_restarts", "Engine processes started in place of one that ended."
        )
        restarts.add_metric((), self._engine.restarts)
        yield restarts
        stats = self._engine.stats
        for kind, values in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, text, read in values:
                family = kind(f"malora_{name}", text, labels=("model_name",))
                family.add_metric(self._labels, read(stats))
                yield family
        for name, text, tiers in _STORE:
            family = GaugeMetricFamily(f"malora_{name}", text, labels=("tier",))
            for tier, read_tier in tiers:
                family.add_metric((tier,), read_tier(stats.adapters))
            yield family
        yield self._iteration_tokens()
        yield self._residency()
        yield from self._routing_families()

    def _iteration_tokens(self) -> Metric:
        family = HistogramMetricFamily(
            "malora_iteration_tokens",
            "Tokens of a step, prompts' and new ones.",
            labels=("model_name",),
        )
        bounds = (*map(float, STEP_TOKEN_BUCKETS), "+Inf")
        counts = accumulate(self._num_steps)
        buckets = [(str(bound), float(n)) for bound, n in zip(bounds, counts, strict=True)]
        family.add_metric(self._labels, buckets, self._num_tokens)
        return family

    def _residency(self) -> Metric:
        family = GaugeMetricFamily(
            "malora_adapter_resident_bytes",
            "Bytes of an adapter in a tier, its basis among them, which others may share.",
            labels=("model_name", "tier"),
        )
        sums: dict[tuple[str, str], int] = {}
        for status in list(self.residents.values()):
            name = self._name_of(status.name)
            for tier, size in (("device", status.device_bytes), ("host", status.host_bytes)):
                if size:
                    sums[name, tier] = sums.get((name, tier), 0) + size
        for labels, value in sums.items():
            family.add_metric(labels, value)
        return family

    def _routing_families(self) -> Iterator[Metric]:
        gates = CounterMetricFamily(
            "malora_adapter_expert_gates",
            "Gates that sampled tokens gave to an expert in a layer (they sum to 1 over experts).",
            labels=("model_name", "layer_group", "expert"),
        )
        entropy = SummaryMetricFamily(
            "malora_adapter_routing_entropy_nats",
            "Entropy of the gates of a sampled token in a layer.",
            labels=("model_name", "layer_group"),
        )
        for name, routing in list(self.routing.items()):
            for index, group in enumerate(LAYER_GROUPS):
                if not routing.count[index]:
                    continue
                for expert, value in enumerate(routing.gates[index].tolist()):
                    gates.add_metric((name, group, str(expert)), value)
                entropy.add_metric(
                    (name, group),
                    count_value=int(routing.count[index]),
                    sum_value=float(routing.entropy[index]),
                )
        yield gates
        yield entropy

    def describe(self) -> Iterator[Metric]:
        return iter(())


@dataclass(frozen=True)
class ModelMetrics:
    """One model's share of the metrics, looked up once so that a token costs little."""

    prompt_tokens: Counter
    prompt_tokens_cached: Counter
    generation_tokens: Counter
    time_to_first_token: Histogram
    inter_token_latency: Histogram
    _e2e_latency: Histogram
    _queue_time: Histogram
    _prefill_time: Histogram
    _decode_time: Histogram
    _inference_time: Histogram
    _time_per_output_token: Histogram
    _request_prompt_tokens: Histogram
    _request_generation_tokens: Histogram
    _request_max_num_generation_tokens: Histogram
    _request_params_n: Histogram
    _request_params_max_tokens: Histogram
    _success: Counter
    _name: str

    def finished(self, reason: str, seconds: float, prompt: int, generated: int) -> None:
        """Count one sequence that ended, `seconds` after its request came."""
        self._success.labels(self._name, reason).inc()
        self._e2e_latency.observe(seconds)
        self._request_prompt_tokens.observe(prompt)
        self._request_generation_tokens.observe(generated)

    def spent(self, start: SequenceStart, decode_seconds: float, generated: int) -> None:
        """Tell where the time went of a sequence that got a token."""
        self._queue_time.observe(start.queue_seconds)
        self._prefill_time.observe(start.prefill_seconds)
        self._decode_time.observe(decode_seconds)
        self._inference_time.observe(start.prefill_seconds + decode_seconds)
        if generated > 1:
            self._time_per_output_token.observe(decode_seconds / (generated - 1))

    def request_finished(self, choices: int, max_tokens: int, most_generated: int) -> None:
        """Count one request: how many choices it asked for, of how many tokens; the longest."""
        self._request_params_n.observe(choices)
        self._request_params_max_tokens.observe(max_tokens)
        self._request_max_num_generation_tokens.observe(most_generated)


class Metrics:
    """All metrics of one server, in a registry of their own.

    `model_name` has at most `max_models` values beside the base model's name and `other`: the
    first models to be asked for get a name, and keep it. So no counter ever goes down, sums over
    names are always right, and the number of series that a Prometheus ever sees of one server is
    bounded; names that came and went with use would be bounded at any time, but not over a day.
    """

    def __init__(self, engine: Engine, base_name: str, max_models: int) -> None:
        """What the engine does as a whole bears the base model's name, as vLLM has it."""
        self._registry = CollectorRegistry(auto_describe=False)
        self._engine = _EngineCollector(engine, base_name, self._name_of)
        self._registry.register(self._engine)
        self._num_free_names = max_models
        self._models: dict[str, ModelMetrics] = {}
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of all choices.")
        self._prompt_tokens_cached = self._counter(
            "prompt_tokens_cached", "Prompt tokens that came from the prefix cache."
        )
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
        self._queue = self._histogram(
            "request_queue_time_seconds", "From the queue to the first step.", _SECONDS
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "From the first step to the first token.", _SECONDS
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "From the first token to the last.", _SECONDS
        )
        self._inference = self._histogram(
            "request_inference_time_seconds", "From the first step to the last token.", _SECONDS
        )
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds",
            "A sequence's decode time over its tokens but the first.",
            _TOKEN_SECONDS,
        )
        self._request_prompt = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a sequence.", _TOKENS
        )
        self._request_generation = self._histogram(
            "request_generation_tokens", "Generated tokens of a sequence.", _TOKENS
        )
        self._request_max_generation = self._histogram(
            "request_max_num_generation_tokens",
            "Generated tokens of a request's longest choice.",
            _TOKENS,
        )
        self._params_n = self._histogram("request_params_n", "Choices asked for.", _CHOICES)
        self._params_max_tokens = self._histogram(
            "request_params_max_tokens", "Most tokens that a request allowed a choice.", _TOKENS
        )
        self._load_seconds = self._histogram(
            "adapter_load_seconds", "From disk to host memory.", _LOAD_SECONDS
        )
        self._load_failures = self._counter("adapter_load_failures", "Loads that failed.")
        self._evictions = self._counter(
            "adapter_evictions", "Departures from a tier, to make room for others.", "tier"
        )
        self._http = Counter(
            "malora_http_requests",
            "HTTP requests, by route and status.",
            ("method", "path", "status"),
            registry=self._registry,
        )
        self._give_name(base_name)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"malora_{name}", text, ("model_name", *labels), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"malora_{name}", text, ("model_name",), buckets=buckets, registry=self._registry
        )

    def model(self, name: str) -> ModelMetrics:
        """The metrics of a model; `name` must be one that is served, never a client's invention."""
        known = self._models.get(name)
        if known is not None:
            return known
        if self._num_free_names > 0:
            self._num_free_names -= 1
            return self._give_name(name)
        return self._models.get(OTHER) or self._give_name(OTHER)

    def _give_name(self, name: str) -> ModelMetrics:
        self._models[name] = model = ModelMetrics(
            prompt_tokens=self._prompt_tokens.labels(name),
            prompt_tokens_cached=self._prompt_tokens_cached.labels(name),
            generation_tokens=self._generation_tokens.labels(name),
            time_to_first_token=self._ttft.labels(name),
            inter_token_latency=self._itl.labels(name),
            _e2e_latency=self._e2e.labels(name),
            _queue_time=self._queue.labels(name),
            _prefill_time=self._prefill.labels(name),
            _decode_time=self._decode.labels(name),
            _inference_time=self._inference.labels(name),
            _time_per_output_token=self._tpot.labels(name),
            _request_prompt_tokens=self._request_prompt.labels(name),
            _request_generation_tokens=self._request_generation.labels(name),
            _request_max_num_generation_tokens=self._request_max_generation.labels(name),
            _request_params_n=self._params_n.labels(name),
            _request_params_max_tokens=self._params_max_tokens.labels(name),
            _success=self._success,
            _name=name,
        )
        return model

    def _name_of(self, adapter: str) -> str:
        """What an adapter is called here, without giving it a name: that is for its requests."""
        return adapter if adapter in self._models else OTHER

    def add_report(self, report: Report) -> None:
        """Take in what the engine reports about once a second."""
        self._engine.add(report)
        for sample in report.routing:
            name = self._name_of(sample.adapter)
            more = _Routing.of(sample)
            known = self._engine.routing.get(name)
            if known is None:
                self._engine.routing[name] = more
            else:
                known.add(more)

    def add_adapter(self, status: AdapterStatus) -> None:
        """Take in what became of an adapter."""
        name = self._name_of(status.name)
        if status.tier in ("host", "device"):
            self._engine.residents[status.name, status.number] = status
        else:
            self._engine.residents.pop((status.name, status.number), None)
        for _ in range(status.loads):
            self._load_seconds.labels(name).observe(status.load_seconds)
        for tier, count in (("device", status.device_evictions), ("host", status.host_evictions)):
            if count:
                self._evictions.labels(name, tier).inc(count)
        if status.load_failures:
            self._load_failures.labels(name).inc(status.load_failures)

    def engine_restarted(self) -> None:
        """Forget what the last engine had in memory."""
        self._engine.residents.clear()

    def http_request(self, method: str, path: str | None, status: int) -> None:
        """Count one HTTP request; `path` is the route's pattern, None where none matched."""
        known = method if method in _METHODS else "other"
        self._http.labels(known, path or "unknown", status).inc()

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
