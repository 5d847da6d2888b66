"""What Prometheus reads."""

import tracemalloc
from typing import Any

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from malora_server.engine.messages import (
    STEP_TOKEN_BUCKETS,
    AdapterStatus,
    AdapterStoreStats,
    AdapterTier,
    EngineStats,
    Report,
    RoutingSample,
    SequenceStart,
)
from malora_server.metrics import OTHER, Metrics

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def _read(client: httpx.AsyncClient) -> Samples:
    reply = await client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    return _parse(reply.text)


def _parse(text: str) -> Samples:
    families: list[Metric] = list(text_string_to_metric_families(text))
    assert all(family.name.startswith("malora_") for family in families)
    return {
        (sample.name.removeprefix("malora_"), frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def _labels(**labels: str) -> frozenset[tuple[str, str]]:
    return frozenset(labels.items())


async def test_metrics_of_the_engine_and_of_each_model(
    client: httpx.AsyncClient, engine: Any
) -> None:
    body = {"model": "sql", "prompt": [5, 6, 7], "max_tokens": 4}
    await client.post("/v1/completions", json={**body, "n": 2})
    await client.post("/v1/completions", json={**body, "model": "tiny", "stop": "quick"})
    await client.post("/v1/completions", json={**body, "model": "invented"})
    await client.get("/invented/path")
    metrics = await _read(client)
    base = _labels(model_name="tiny")
    assert metrics["engine_up", _labels()] == 1
    assert metrics["num_requests_running", base] == 2
    assert metrics["num_requests_waiting", base] == 3
    assert metrics["kv_cache_usage_ratio", base] == 0.25
    assert metrics["kv_cache_usage_perc", base] == 0.25
    assert metrics["prefix_cache_queries_total", base] == 100
    assert metrics["prefix_cache_hits_total", base] == 40
    assert metrics["num_preemptions_total", base] == 1
    sql, tiny = _labels(model_name="sql"), _labels(model_name="tiny")
    # As in vLLM, once a choice: that the second found it in the cache is told beside it.
    assert metrics["prompt_tokens_total", sql] == 6
    assert metrics["prompt_tokens_cached_total", sql] == 2
    assert metrics["generation_tokens_total", sql] == 8
    assert metrics["generation_tokens_total", tiny] == 2
    length = _labels(model_name="sql", finished_reason="length")
    assert metrics["request_success_total", length] == 2
    stop = _labels(model_name="tiny", finished_reason="stop")
    assert metrics["request_success_total", stop] == 1
    for name, count in (
        ("time_to_first_token_seconds", 2),
        ("inter_token_latency_seconds", 6),
        ("e2e_request_latency_seconds", 2),
        ("request_prompt_tokens", 2),
        ("request_generation_tokens", 2),
        ("request_queue_time_seconds", 2),
        ("request_prefill_time_seconds", 2),
        ("request_decode_time_seconds", 2),
        ("request_inference_time_seconds", 2),
        ("request_time_per_output_token_seconds", 2),
        ("request_params_n", 1),
        ("request_params_max_tokens", 1),
        ("request_max_num_generation_tokens", 1),
    ):
        assert metrics[f"{name}_count", sql] == count
    assert metrics["request_generation_tokens_sum", sql] == 8
    assert metrics["request_queue_time_seconds_sum", sql] == pytest.approx(0.06)
    assert metrics["request_prefill_time_seconds_sum", sql] == pytest.approx(0.6)
    assert metrics["request_inference_time_seconds_sum", sql] == pytest.approx(
        0.6 + metrics["request_decode_time_seconds_sum", sql]
    )
    assert metrics["request_params_n_sum", sql] == 2
    assert metrics["request_params_max_tokens_sum", sql] == 4
    assert metrics["request_max_num_generation_tokens_sum", sql] == 4
    posts = _labels(method="POST", path="/v1/completions", status="200")
    assert metrics["http_requests_total", posts] == 2
    unknown = _labels(method="GET", path="unknown", status="404")
    assert metrics["http_requests_total", unknown] == 1
    # Nothing that a client makes up becomes a label.
    assert not any("invented" in value for _, labels in metrics for _, value in labels)
    assert all(
        value in ("sql", "tiny")
        for _, labels in metrics
        for name, value in labels
        if name == "model_name"
    )


async def test_a_failed_sequence_counts_as_such(client: httpx.AsyncClient, engine: Any) -> None:
    engine.healthy = False
    await client.post("/v1/completions", json={"model": "sql", "prompt": "a"})
    metrics = await _read(client)
    error = _labels(model_name="sql", finished_reason="error")
    assert metrics["request_success_total", error] == 1


def _report(*routing: RoutingSample, steps: dict[int, int] | None = None) -> Report:
    counts = [(steps or {}).get(bound, 0) for bound in (*STEP_TOKEN_BUCKETS, 0)]
    return Report(counts, sum(b * n for b, n in (steps or {}).items()), list(routing))


async def test_reports_add_up(client: httpx.AsyncClient, engine: Any) -> None:
    await client.post("/v1/completions", json={"model": "sql", "prompt": "a", "max_tokens": 1})
    two = RoutingSample("sql", [[1.5, 0.5], [0.0, 2.0], [0.0, 0.0]], [0.7, 0.0, 0.0], [2, 2, 0])
    three = RoutingSample("sql", [[0.0, 0.0, 1.0]] * 3, [0.1] * 3, [1] * 3)
    unasked = RoutingSample("unasked", [[1.0, 0.0]] * 3, [0.2] * 3, [1] * 3)
    engine.on_report(_report(two, steps={1: 5, 64: 1}))
    engine.on_report(_report(three, unasked, steps={1: 1, 16384: 1}))
    metrics = await _read(client)
    base = {"model_name": "tiny"}
    assert metrics["iteration_tokens_bucket", _labels(**base, le="1.0")] == 6
    assert metrics["iteration_tokens_bucket", _labels(**base, le="64.0")] == 7
    assert metrics["iteration_tokens_count", _labels(**base)] == 8
    assert metrics["iteration_tokens_sum", _labels(**base)] == 6 + 64 + 16384

    def gates(name: str, group: str) -> list[float]:
        labels = {"model_name": name, "layer_group": group}
        key = "adapter_expert_gates_total"
        return [metrics[key, _labels(**labels, expert=str(e))] for e in range(3)]

    assert gates("sql", "early") == [1.5, 0.5, 1.0]
    assert gates("sql", "middle") == [0.0, 2.0, 1.0]
    assert gates("sql", "late") == [0.0, 0.0, 1.0]
    early = _labels(model_name="sql", layer_group="early")
    assert metrics["adapter_routing_entropy_nats_count", early] == 3
    assert metrics["adapter_routing_entropy_nats_sum", early] == pytest.approx(0.8)
    other = _labels(model_name=OTHER, layer_group="late")
    assert metrics["adapter_routing_entropy_nats_count", other] == 1


class _Engine:
    healthy = True
    restarts = 0
    stats = EngineStats(adapters=AdapterStoreStats(500, 1000, 700, 2000, 2, 3, 1))


def test_what_the_store_holds_and_what_became_of_each_adapter() -> None:
    metrics = Metrics(_Engine(), "base", 2)
    metrics.model("a")

    def tell(
        name: str, number: int, tier: AdapterTier, device: int = 0, host: int = 0, **counts: int
    ) -> None:
        status = AdapterStatus(name, number, tier, "", device, host, 0.2, **counts)
        metrics.add_adapter(status)

    tell("a", 1, "loading")
    tell("a", 1, "host", host=30, loads=1)
    tell("a", 1, "device", device=10, host=30)
    tell("a", 2, "host", host=40, loads=1)
    tell("b", 1, "device", device=5, host=6, loads=1)
    tell("c", 1, "device", device=7, host=8, loads=1)
    tell("broken", 1, "failed", load_failures=2)

    def read(name: str, **labels: str) -> float:
        return _parse(metrics.render().decode())[name, _labels(**labels)]

    assert read("adapter_memory_bytes", tier="device") == 500
    assert read("adapter_memory_capacity_bytes", tier="host") == 2000
    assert [read("adapters", tier=tier) for tier in ("device", "host", "loading")] == [2, 3, 1]
    assert read("adapter_resident_bytes", model_name="a", tier="device") == 10
    assert read("adapter_resident_bytes", model_name="a", tier="host") == 70
    assert read("adapter_resident_bytes", model_name=OTHER, tier="device") == 12
    assert read("adapter_load_seconds_count", model_name="a") == 2
    assert read("adapter_load_seconds_sum", model_name="a") == pytest.approx(0.4)
    assert read("adapter_load_failures_total", model_name=OTHER) == 2
    # One asked for by name gets it; from then on its bytes are told under it.
    metrics.model("b")
    assert read("adapter_resident_bytes", model_name="b", tier="device") == 5
    # What came and went between two statuses is in the second one's counts.
    tell("b", 1, "device", device=5, host=6, device_evictions=2, host_evictions=1, loads=1)
    tell("a", 2, "unloaded", host_evictions=1)
    assert read("adapter_evictions_total", model_name="b", tier="device") == 2
    assert read("adapter_evictions_total", model_name="b", tier="host") == 1
    assert read("adapter_evictions_total", model_name="a", tier="host") == 1
    assert read("adapter_load_seconds_count", model_name="b") == 1
    assert read("adapter_resident_bytes", model_name="a", tier="host") == 30
    metrics.engine_restarted()
    assert b"adapter_resident_bytes{" not in metrics.render()
    assert read("adapter_load_seconds_count", model_name="a") == 2


def _use(metrics: Metrics, name: str) -> None:
    model = metrics.model(name)
    model.prompt_tokens.inc(3)
    model.time_to_first_token.observe(0.1)
    model.finished("stop", 0.2, 3, 5)
    model.spent(SequenceStart(0.01, 0.1), 0.1, 5)
    model.request_finished(1, 5, 5)
    metrics.add_report(_report(RoutingSample(name, [[1.0, 0.0]] * 3, [0.0] * 3, [1] * 3)))


def test_thousands_of_adapters_have_as_many_series_as_a_hundred() -> None:
    metrics = Metrics(_Engine(), "base", 100)
    names = [f"adapter-{index}" for index in range(2000)]
    for name in names[:150]:
        _use(metrics, name)
    before = _parse(metrics.render().decode())
    tracemalloc.start()
    for name in names * 2:
        _use(metrics, name)
        _use(metrics, "base")
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 200_000  # a name's own series take some 30,000 bytes
    after = _parse(metrics.render().decode())
    named = {value for _, labels in after for name, value in labels if name == "model_name"}
    assert named == {"base", OTHER, *names[:100]}
    assert before.keys() <= after.keys()
    assert {labels for _, labels in after.keys() - before.keys()} <= {
        # The base model's own first request made these.
        labels
        for _, labels in after
        if ("model_name", "base") in labels
    }
    assert all(after[key] >= value for key, value in before.items()), "a counter never goes down"
    success = {
        dict(labels)["model_name"]: value
        for (name, labels), value in after.items()
        if name == "request_success_total"
    }
    assert sum(success.values()) == 150 + 2 * 4000
    assert success["adapter-7"] == 3
    assert success["base"] == 4000
    assert success[OTHER] == 50 + 2 * 1900
    assert metrics.model("adapter-1999") is metrics.model("adapter-1000")


def test_without_names_to_give_only_the_base_has_one() -> None:
    metrics = Metrics(_Engine(), "base", 0)
    _use(metrics, "mine")
    _use(metrics, "base")
    samples = _parse(metrics.render().decode())
    named = {value for _, labels in samples for name, value in labels if name == "model_name"}
    assert named == {"base", OTHER}


async def test_a_dead_engine_shows(client: httpx.AsyncClient, engine: Any) -> None:
    engine.healthy = False
    engine.restarts = 3
    metrics = await _read(client)
    assert metrics["engine_up", _labels()] == 0
    assert metrics["engine_restarts_total", _labels()] == 3
