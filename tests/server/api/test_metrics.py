"""What Prometheus reads."""

from typing import Any

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families


async def _read(client: httpx.AsyncClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    reply = await client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families: list[Metric] = list(text_string_to_metric_families(reply.text))
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
    none = _labels()
    assert metrics["num_requests_running", none] == 2
    assert metrics["num_requests_waiting", none] == 3
    assert metrics["kv_cache_usage_ratio", none] == 0.25
    assert metrics["prefix_cache_queries_total", none] == 100
    assert metrics["prefix_cache_hits_total", none] == 40
    assert metrics["num_preemptions_total", none] == 1
    sql, tiny = _labels(model_name="sql"), _labels(model_name="tiny")
    assert metrics["prompt_tokens_total", sql] == 6
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
    ):
        assert metrics[f"{name}_count", sql] == count
    assert metrics["request_generation_tokens_sum", sql] == 8
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
