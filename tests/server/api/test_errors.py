"""Every status the server sends comes with OpenAI's error object."""

import json
import logging
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI

from malora_server.api.errors import ApiError
from malora_server.engine.messages import EngineStats, SequenceOutput
from malora_server.logs import JsonFormatter
from malora_server.settings import Settings

MAX_BODY_BYTES = Settings(base="x").max_body_size
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = {"model": "tiny", "prompt": "hello"}
TALK = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    body = reply.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["code"]
    assert "Traceback" not in reply.text
    assert "site-packages" not in reply.text
    return error


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("temperature", 2.5, "temperature"),
        ("temperature", "hot", "temperature"),
        ("temperature", float("nan"), "temperature"),
        ("temperature", float("inf"), "temperature"),
        ("top_p", 0, "top_p"),
        ("top_p", 1.01, "top_p"),
        ("top_k", -2, "top_k"),
        ("top_k", 1.5, "top_k"),
        ("min_p", -0.1, "min_p"),
        ("repetition_penalty", 0, "repetition_penalty"),
        ("presence_penalty", 2.1, "presence_penalty"),
        ("frequency_penalty", -2.1, "frequency_penalty"),
        ("n", 0, "n"),
        ("n", 129, "n"),
        ("n", True, "n"),
        ("max_tokens", -1, "max_tokens"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", 1.5, "max_tokens"),
        ("min_tokens", 17, "min_tokens"),
        ("seed", 2**63, "seed"),
        ("stop", "", "stop"),
        ("stop", ["a"] * 17, "stop"),
        ("stop", ["a", 3], "stop"),
        ("stop_token_ids", [9999], "stop_token_ids"),
        ("stop_token_ids", [-1], "stop_token_ids[0]"),
        ("logit_bias", {"a": 1}, "logit_bias"),
        ("logit_bias", {"-1": 1}, "logit_bias"),
        ("logit_bias", {"9999": 1}, "logit_bias"),
        ("logit_bias", {"5": 100.5}, "logit_bias"),
        ("logprobs", 6, "logprobs"),
        ("logprobs", -1, "logprobs"),
        ("logprobs", True, "logprobs"),
        ("priority", "high", "priority"),
        ("include_routing", "experts", "include_routing"),
        ("response_format", {"type": "yaml"}, "response_format.type"),
        ("suffix", "end", "suffix"),
        ("best_of", 3, "best_of"),
        ("stream", "yes", "stream"),
        ("stream_options", {"include_usage": True}, None),
        ("prompt", "", "prompt"),
        ("prompt", "\ud800", "prompt"),
        ("prompt", [], "prompt"),
        ("prompt", ["a", ""], "prompt"),
        ("prompt", [[]], "prompt"),
        ("prompt", [1, "a"], "prompt"),
        ("prompt", [9999], "prompt"),
        ("prompt", {"text": "a"}, "prompt"),
        ("prompt", None, "prompt"),
        ("model", None, "model"),
        ("model", 3, "model"),
        ("model", "\ud800", "model"),
    ],
)
async def test_a_bad_value_names_its_field(
    client: httpx.AsyncClient, engine: Any, field: str, value: Any, param: str | None
) -> None:
    content = json.dumps({**HELLO, field: value})
    reply = await client.post(
        COMPLETIONS, content=content, headers={"content-type": "application/json"}
    )
    error = error_of(reply, 400)
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] is not None
        assert error["param"].split(".")[0].split("[")[0] == param.split(".")[0].split("[")[0]
    assert engine.submits == []


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 6}, "top_logprobs", "invalid_value"),
        ({"functions": []}, "functions", "unknown_parameter"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        (
            {"messages": [{"role": "developer", "content": "a"}]},
            "messages",
            "chat_template_refused",
        ),
        ({"max_completion_tokens": 500}, "max_completion_tokens", "context_length_exceeded"),
    ],
)
async def test_bad_conversations(
    client: httpx.AsyncClient, changes: dict[str, Any], param: str, code: str
) -> None:
    error = error_of(await client.post(CHAT, json={**TALK, **changes}), 400)
    assert (error["param"], error["code"]) == (param, code)


async def test_an_unknown_field_is_named(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post(COMPLETIONS, json={**HELLO, "temprature": 1}), 400)
    assert (error["param"], error["code"]) == ("temprature", "unknown_parameter")


async def test_a_missing_field_is_named(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post(COMPLETIONS, json={"prompt": "a"}), 400)
    assert (error["param"], error["code"]) == ("model", "missing_required_parameter")


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b'{"model": ', "application/json"),
        (b"", "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"[1]", "application/json"),
        (b"3", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"model": "tiny", "prompt": "a"}', "text/plain"),
    ],
)
async def test_a_body_that_is_no_json_object(
    client: httpx.AsyncClient, content: bytes, content_type: str
) -> None:
    reply = await client.post(COMPLETIONS, content=content, headers={"content-type": content_type})
    error_of(reply, 400)


async def test_a_prompt_longer_than_the_context(client: httpx.AsyncClient, engine: Any) -> None:
    for prompt, max_tokens in (([5] * 128, None), ([5] * 100, 29)):
        body = {**HELLO, "prompt": prompt, "max_tokens": max_tokens}
        error = error_of(await client.post(COMPLETIONS, json=body), 400)
        assert error["code"] == "context_length_exceeded"
    reply = await client.post(COMPLETIONS, json={**HELLO, "prompt": [5] * 100, "max_tokens": 28})
    assert reply.status_code == 200
    # Left to the default, the reply takes what room there is.
    assert (await client.post(COMPLETIONS, json={**HELLO, "prompt": [5] * 120})).is_success
    assert [submit.sampling.max_tokens for submit in engine.submits] == [28, 8]


async def test_an_unknown_model_and_a_broken_adapter(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post(COMPLETIONS, json={**HELLO, "model": "nope"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    for _ in range(2):  # told by the engine, then known
        error = error_of(await client.post(COMPLETIONS, json={**HELLO, "model": "broken"}), 400)
        assert (error["code"], error["param"]) == ("adapter_file_missing", "model")
        assert "adapter_model.safetensors is missing" in error["message"]
    error_of(await client.get("/v1/models/broken"), 400)
    assert error_of(await client.get("/v1/models/nope"), 404)["code"] == "model_not_found"
    assert error_of(await client.get("/v1/adapters/nope"), 404)["code"] == "model_not_found"


async def test_an_unknown_route_and_method(client: httpx.AsyncClient) -> None:
    assert error_of(await client.get("/v1/nope"), 404)["code"] == "not_found"
    reply = await client.get(COMPLETIONS)
    assert error_of(reply, 405)["code"] == "method_not_allowed"
    assert reply.headers["allow"] == "POST"


async def test_a_base_model_without_a_chat_template(
    client: httpx.AsyncClient, pretrained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "chat_template", None)
    error = error_of(await client.post(CHAT, json=TALK), 400)
    assert error["code"] == "chat_template_missing"


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
async def test_a_body_over_the_limit(client: httpx.AsyncClient, declared: bool) -> None:
    size = MAX_BODY_BYTES + 1

    async def chunks() -> Any:
        for _ in range(0, size, 2**16):
            yield b"x" * 2**16

    content = b"x" * size if declared else chunks()
    error = error_of(await client.post(COMPLETIONS, content=content), 413)
    assert error["code"] == "request_too_large"


def test_a_client_that_is_still_sending_sees_the_refusal(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(2):  # the second on the same connection
            reply = client.post(COMPLETIONS, content=b"x" * (MAX_BODY_BYTES + 2**20))
            assert error_of(reply, 413)["code"] == "request_too_large"
            assert "connection" not in reply.headers


def test_a_client_that_asks_before_sending_is_refused_at_once(url: str) -> None:
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        connection.sendall(
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
            f"Content-Length: {MAX_BODY_BYTES + 1}\r\n\r\n".encode()
        )
        connection.settimeout(5)
        reply = connection.recv(65536)
    assert reply.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in reply.lower()


@pytest.mark.parametrize("content", [b'{"model": "\xff"}', b'{"a":' * 100_000])
async def test_a_body_that_breaks_the_parser(client: httpx.AsyncClient, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    reply = await client.post(COMPLETIONS, content=content, headers=headers)
    assert error_of(reply, 400)["code"] == "invalid_json"


async def test_a_full_queue(client: httpx.AsyncClient, engine: Any) -> None:
    engine.stats = EngineStats(num_requests_running=4, num_requests_waiting=8)
    for path, body in ((COMPLETIONS, HELLO), (CHAT, {**TALK, "stream": True})):
        reply = await client.post(path, json=body)
        assert error_of(reply, 429)["type"] == "rate_limit_error"
        assert reply.headers["retry-after"] == "1"
    engine.stats = EngineStats(num_requests_running=4, num_requests_waiting=7)
    assert (await client.post(COMPLETIONS, json=HELLO)).is_success


async def test_places_in_the_queue_are_given_back(client: httpx.AsyncClient) -> None:
    # 4 that run and 8 that wait: 12 sequences at once, never 13.
    for _ in range(3):
        assert (await client.post(COMPLETIONS, json={**HELLO, "n": 12})).is_success
    error = error_of(await client.post(COMPLETIONS, json={**HELLO, "n": 13}), 400)
    assert error["code"] == "too_many_sequences"


async def test_a_dead_engine(client: httpx.AsyncClient, engine: Any) -> None:
    assert (await client.get("/health")).status_code == 200
    engine.healthy = False
    assert error_of(await client.get("/health"), 503)["code"] == "engine_dead"
    for stream in (False, True):
        reply = await client.post(COMPLETIONS, json={**HELLO, "stream": stream})
        assert error_of(reply, 503)["code"] == "engine_dead"


async def test_the_engine_gives_up_a_sequence(client: httpx.AsyncClient, engine: Any) -> None:
    engine.final = SequenceOutput("", [], finish_reason="error", error="no finite scores")
    error = error_of(await client.post(COMPLETIONS, json={**HELLO, "n": 2}), 500)
    assert (error["type"], error["code"]) == ("server_error", "engine_error")
    assert "no finite scores" in error["message"]


async def test_a_fault_of_ours_tells_nothing(
    client: httpx.AsyncClient, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine.failure = RuntimeError("/secret/path exploded")
    with caplog.at_level(logging.ERROR):
        reply = await client.post(COMPLETIONS, json=HELLO)
    assert error_of(reply, 500)["code"] == "internal_error"
    assert "secret" not in reply.text
    assert "/secret/path exploded" in caplog.text


@pytest.mark.parametrize("failure", ["ours", "engine's"])
async def test_a_failure_in_a_stream_is_its_last_event(
    client: httpx.AsyncClient, engine: Any, failure: str
) -> None:
    if failure == "ours":
        engine.failure = RuntimeError("/secret/path exploded")
    else:
        engine.final = SequenceOutput("", [], finish_reason="abort")
    reply = await client.post(COMPLETIONS, json={**HELLO, "stream": True})
    assert reply.status_code == 200
    events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    error = json.loads(events[-2])["error"]
    assert error["code"] == ("internal_error" if failure == "ours" else "shutdown")
    assert "secret" not in reply.text
    assert json.loads(events[0])["choices"][0]["text"] == " the"


@pytest.mark.parametrize(
    ("status", "type_"),
    [(401, "authentication_error"), (403, "permission_error"), (422, "invalid_request_error")],
)
async def test_errors_that_routes_of_others_raise(
    app: FastAPI, client: httpx.AsyncClient, status: int, type_: str
) -> None:
    @app.get("/raises")
    async def raises() -> None:
        raise ApiError(status, "No.", headers={"x-more": "1"})

    reply = await client.get("/raises")
    assert error_of(reply, status)["type"] == type_
    assert reply.headers["x-more"] == "1"


async def test_request_ids(client: httpx.AsyncClient) -> None:
    reply = await client.post(COMPLETIONS, json=HELLO, headers={"x-request-id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1"
    assert reply.json()["id"] == "cmpl-mine-1"
    for bad in ("x" * 129, "a\tb"):
        reply = await client.get("/health", headers={"x-request-id": bad})
        assert reply.headers["x-request-id"] not in ("", bad)


async def test_one_log_line_a_request(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        await client.post(
            COMPLETIONS, json={**HELLO, "max_tokens": 5}, headers={"x-request-id": "mine"}
        )
        await client.get("/health")
    (record,) = [r for r in caplog.records if r.name == "malora_server.requests"]
    fields: dict[str, Any] = record.__dict__["fields"]
    first = fields.pop("time_to_first_token_seconds")
    assert 0 <= first <= fields.pop("duration_seconds")
    assert fields.pop("prompt_tokens") > fields.pop("cached_tokens") > 0
    assert fields == {
        "request_id": "mine",
        "trace_id": None,
        "method": "POST",
        "path": COMPLETIONS,
        "status": 200,
        "model": "tiny",
        "generation": "base",
        "completion_tokens": 5,
        "finish_reasons": ["length"],
        "queue_seconds": 0.03,
    }
    line = json.loads(JsonFormatter().format(record))
    assert (line["message"], line["request_id"], line["level"]) == ("request", "mine", "info")
    assert line["finish_reasons"] == ["length"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_log_line_names_the_generation_and_how_each_choice_ended_but_no_text(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    chat = {
        "model": "sql",
        "messages": [{"role": "user", "content": "the secret fox"}],
        "max_tokens": 9,
        "n": 2,
        "stop": ["jumps"],
        "stream": stream,
    }
    with caplog.at_level(logging.DEBUG):
        reply = await client.post("/v1/chat/completions", json=chat)
    assert "quick" in reply.text
    (record,) = [r for r in caplog.records if r.name == "malora_server.requests"]
    fields: dict[str, Any] = record.__dict__["fields"]
    assert fields["model"] == "sql"
    assert fields["generation"] == "15d115d115d115d1"
    assert fields["finish_reasons"] == ["stop", "stop"]
    assert fields["queue_seconds"] == 0.03
    lines = " ".join(JsonFormatter().format(record) for record in caplog.records)
    assert not any(word in lines for word in ("secret", "quick", "jumps"))


async def test_a_refused_requests_log_line_has_no_figures(
    client: httpx.AsyncClient, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine.stats = EngineStats(num_requests_running=4, num_requests_waiting=8)
    with caplog.at_level(logging.INFO):
        reply = await client.post(COMPLETIONS, json={**HELLO, "model": "sql"})
    assert reply.status_code == 429
    (record,) = [r for r in caplog.records if r.name == "malora_server.requests"]
    fields: dict[str, Any] = record.__dict__["fields"]
    assert (fields["status"], fields["model"]) == (429, "sql")
    assert fields["finish_reasons"] is fields["time_to_first_token_seconds"] is None
