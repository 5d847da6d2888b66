"""Traces: what a collector is sent, and that one which is away, or the SDK, is missed by nobody."""

import json
import secrets
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest

from malora.base_model import PATH as BASE
from tests.observability.collector import Collector

SERVER = 2  # SPAN_KIND_SERVER
SECRET = "the moon is made of cheese"


def traceparent(sampled: bool = True) -> tuple[str, str, dict[str, str]]:
    """A trace's id, its caller's span, and the header that says so."""
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    return trace, span, {"traceparent": f"00-{trace}-{span}-0{int(sampled)}"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_span_of_its_callers_trace(
    url: str, collector: Collector, stream: bool
) -> None:
    trace, parent, headers = traceparent()
    body = {
        "model": "experts",
        "messages": [{"role": "user", "content": SECRET}],
        "max_tokens": 6,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "stream": stream,
        "ignore_eos": True,
    }
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert reply.status_code == 200
    (span,) = collector.spans(trace)
    assert (span.name, span.kind, span.parent_span_id) == ("chat experts", SERVER, parent)
    assert not span.is_error
    assert span.resource["service.name"] == "malora"
    got = dict(span.attributes)
    first = got.pop("gen_ai.latency.time_to_first_token")
    assert got.pop("gen_ai.response.time_to_first_chunk") == first
    queue = got.pop("gen_ai.latency.time_in_queue")
    prefill = got.pop("gen_ai.latency.time_in_model_prefill")
    assert 0 < queue + prefill <= first <= span.seconds
    prompt = got.pop("gen_ai.usage.input_tokens")
    assert prompt > 5
    assert 0 <= got.pop("gen_ai.usage.cache_read.input_tokens") < prompt
    if not stream:
        assert reply.json()["usage"]["prompt_tokens"] == prompt
        assert reply.json()["system_fingerprint"] in span.attributes.values()
    assert len(got.pop("gen_ai.openai.response.system_fingerprint")) == 16
    assert got.pop("gen_ai.request.id") == reply.headers["x-request-id"]
    assert got == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "malora",
        "gen_ai.request.model": "experts",
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.stream": stream,
        "gen_ai.response.model": "experts",
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.output_tokens": 12,
    }
    assert SECRET not in str(span)


def test_other_requests_have_spans_too_and_probes_none(url: str, collector: Collector) -> None:
    trace, _, headers = traceparent()
    for path in ("/health", "/metrics", "/v1/models", "/nothing"):
        httpx.get(f"{url}{path}", headers=headers, timeout=60)
    body = {"model": "nobody", "prompt": "x"}
    httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
    spans = collector.spans(trace, count=3)
    named = {span.name: span.attributes["http.response.status_code"] for span in spans}
    assert named == {"GET /v1/models": 200, "GET": 404, "POST /v1/completions": 404}
    assert not any(span.is_error for span in spans), "a client's mistake is no fault of the server"


def test_the_callers_word_on_sampling_holds_and_a_new_trace_begins_without_one(
    url: str, collector: Collector, log_line: Callable[[str], dict[str, Any]]
) -> None:
    unwanted, _, headers = traceparent(sampled=False)
    body = {"model": "lora", "prompt": "x", "max_tokens": 1}
    httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
    own = httpx.post(f"{url}/v1/completions", json=body, timeout=60).headers["x-request-id"]
    (span,) = collector.spans(log_line(own)["trace_id"])
    assert (span.name, span.parent_span_id) == ("text_completion lora", "")
    # The earlier one would have come before it.
    with pytest.raises(AssertionError):
        collector.spans(unwanted, seconds=0)


def test_a_collector_that_is_away_costs_requests_nothing(
    serve: Callable[..., AbstractContextManager[str]],
) -> None:
    flags = ("--otlp-endpoint", "http://127.0.0.1:9", "--kv-cache-memory", "64MiB")
    with serve(*flags) as url:  # and it ends well, in time
        for _ in range(3):
            body = {"model": "malora-base", "prompt": "x", "max_tokens": 2}
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200


def test_without_the_sdk_the_server_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "from malora_server.app import main\n"
        f"main(['--base', {str(BASE)!r}, '--otlp-endpoint', 'http://127.0.0.1:9'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "pip install 'malora[otel]'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_server_that_sends_no_traces_does_not_import_the_sdk() -> None:
    code = (
        "import sys, malora_server.app, json\n"
        "print(json.dumps([m for m in sys.modules if m.startswith('opentelemetry.sdk')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == []
