"""A real Prometheus scrapes a loaded server; the dashboard's queries are put to it."""

import asyncio
import json
import math
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.observability.conftest import DOCKER

DASHBOARD: dict[str, Any] = json.loads((DOCKER / "grafana/dashboards/malora.json").read_text())
MODELS = ["base", "experts", "compact", "dense", "lora"]
SCRAPE_SECONDS = 1
LOAD_SECONDS = 6


async def load(url: str, seconds: float) -> None:
    """Requests of every kind for some seconds, a few at a time."""
    deadline = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def one(model: str, number: int) -> None:
            body = {"model": model, "max_tokens": 8, "prompt": "one two three four " * 10}
            body |= {"n": 1 + number % 2, "stream": number % 3 == 0, "ignore_eos": True}
            await client.post("/v1/completions", json=body)

        number = 0
        while time.monotonic() < deadline:
            await asyncio.gather(*(one(model, number) for model in MODELS))
            await client.post("/v1/completions", json={"model": "nan", "prompt": "x"})
            number += 1


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Prometheus:
    """A running Prometheus, asked over its HTTP API."""

    def __init__(self, url: str, target: str) -> None:
        self.url = url
        self.target = target

    def is_ready(self) -> bool:
        """Whether it answers queries yet."""
        try:
            return httpx.get(f"{self.url}/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def get(self, path: str, **params: str) -> Any:
        reply = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=10)
        assert reply.status_code == 200, reply.text
        return reply.json()["data"]

    def query(self, expr: str) -> list[float]:
        """The values of an instant query; fails on one that Prometheus does not understand."""
        return [float(each["value"][1]) for each in self.get("query", query=expr)["result"]]


@pytest.fixture(scope="module")
def prometheus(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """The shipped configuration, but for the target and a shorter interval, after some load."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed: apt-get install prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    target = url.removeprefix("http://")
    config = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())
    interval = f"{SCRAPE_SECONDS}s"
    config["global"] |= {"scrape_interval": interval, "evaluation_interval": interval}
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(DOCKER / "prometheus/alerts.yml", folder)
    port = free_port()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        server = Prometheus(f"http://127.0.0.1:{port}", target)
        deadline = time.monotonic() + 60
        while not (server.is_ready() and server.query("up")):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        asyncio.run(load(url, LOAD_SECONDS))
        time.sleep(2 * SCRAPE_SECONDS)
        yield server
    finally:
        process.terminate()
        process.wait(20)


def targets_of(panels: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for panel in panels:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
        yield from targets_of(panel.get("panels", []))


QUERIES = list(targets_of(DASHBOARD["panels"]))


def substituted(expr: str) -> str:
    """A query as Grafana sends it, with all models and servers chosen."""
    for name, value in (("model_name", ".*"), ("instance", ".*"), ("__rate_interval", "1m")):
        expr = re.sub(rf"\${name}\b|\${{{name}}}", value, expr)
    assert "$" not in expr
    return expr


def test_the_server_is_scraped(prometheus: Prometheus) -> None:
    (target,) = prometheus.get("targets")["activeTargets"]
    assert target["health"] == "up", target["lastError"]
    assert prometheus.query('up{job="malora"}') == [1]
    assert prometheus.query("malora_engine_up") == [1]


@pytest.mark.parametrize(
    ("title", "expr"), QUERIES, ids=[f"{i}-{title}" for i, (title, _) in enumerate(QUERIES)]
)
def test_every_query_of_the_dashboard_returns_data(
    prometheus: Prometheus, title: str, expr: str
) -> None:
    values = prometheus.query(substituted(expr))
    assert any(math.isfinite(value) for value in values), (expr, values)


def test_the_dashboards_variables_have_values(prometheus: Prometheus) -> None:
    variables = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
    for name, want in (("instance", {prometheus.target}), ("model_name", set(MODELS))):
        found = re.fullmatch(r"label_values\((.*), (\w+)\)", variables[name]["definition"])
        assert found is not None
        series = prometheus.get("series", **{"match[]": substituted(found[1])})
        assert {each[found[2]] for each in series} >= want
    sources = {p["datasource"]["uid"] for p in DASHBOARD["panels"] if "datasource" in p}
    assert sources == {"${datasource}"}


def test_every_metric_of_the_dashboard_and_the_alerts_is_one_of_ours(url: str) -> None:
    text = httpx.get(f"{url}/metrics", timeout=60).text
    ours = {sample.name for f in text_string_to_metric_families(text) for sample in f.samples}
    families = {family.name for family in text_string_to_metric_families(text)}
    rules = yaml.safe_load((DOCKER / "prometheus/alerts.yml").read_text())["groups"]
    alerts = [rule["expr"] for group in rules for rule in group["rules"]]
    for expr in [*(expr for _, expr in QUERIES), *alerts]:
        names = set(re.findall(r"malora_\w+", expr))
        known = {n for n in names if n in ours or n.removesuffix("_total") in families}
        assert names == known, expr


VLLM_NAMES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "prompt_tokens_total",
    "prompt_tokens_cached_total",
    "generation_tokens_total",
    "request_success_total",
    "e2e_request_latency_seconds_bucket",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
    "request_queue_time_seconds_sum",
    "request_prefill_time_seconds_sum",
    "request_decode_time_seconds_sum",
    "request_inference_time_seconds_sum",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "request_max_num_generation_tokens_sum",
    "request_params_n_sum",
    "request_params_max_tokens_sum",
)
"""What vLLM's dashboards query, of one `model_name`."""


@pytest.mark.parametrize("name", VLLM_NAMES)
def test_a_dashboard_of_vllms_works_with_our_prefix(prometheus: Prometheus, name: str) -> None:
    values = prometheus.query(f'malora_{name}{{model_name="base"}}')
    assert values
    if name.endswith(("_total", "_bucket", "_sum")) and name != "num_preemptions_total":
        assert max(values) > 0


def test_prometheus_evaluates_the_alerts(prometheus: Prometheus) -> None:
    (group,) = prometheus.get("rules")["groups"]
    assert len(group["rules"]) >= 10
    assert {rule["health"] for rule in group["rules"]} == {"ok"}, group
    firing = {rule["name"] for rule in group["rules"] if rule["state"] == "firing"}
    assert firing == {"MaloraAdapterLoadsFail"}, "one of the adapters is broken"


def test_promtool_finds_nothing_wrong_with_the_metrics(
    url: str, promtool: Callable[..., str]
) -> None:
    asyncio.run(load(url, 0.1))
    assert promtool("check", "metrics", stdin=httpx.get(f"{url}/metrics", timeout=60).content) == ""


def test_promtool_finds_nothing_wrong_with_the_configuration(promtool: Callable[..., str]) -> None:
    promtool("check", "config", DOCKER / "prometheus/prometheus.yml")


def test_every_alert_fires_when_it_should_and_only_then(promtool: Callable[..., str]) -> None:
    tests = Path(__file__).with_name("alerts_test.yml")
    promtool("test", "rules", tests)
    rules = yaml.safe_load((DOCKER / "prometheus/alerts.yml").read_text())["groups"]
    alerts = {rule["alert"] for group in rules for rule in group["rules"]}
    cases = [c for t in yaml.safe_load(tests.read_text())["tests"] for c in t["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == alerts
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == alerts
