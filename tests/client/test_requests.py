"""What the clients send, and how they read what comes back."""

from __future__ import annotations

import json
import pickle
from typing import Any

import httpx
import pytest

from malora_client import (
    APIError,
    AsyncClient,
    ChatMessage,
    Client,
    ExpertGate,
    MaloraError,
    NotFoundError,
    RateLimitError,
)

COMPLETION = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1700000000,
    "model": "sql",
    "choices": [
        {
            "index": 0,
            "text": "SELECT 1",
            "logprobs": {
                "tokens": ["SELECT", " 1"],
                "token_logprobs": [None, -0.25],
                "top_logprobs": [None, {" 1": -0.25, " 2": -1.5}],
                "text_offset": [0, 6],
            },
            "finish_reason": "stop",
            "stop_reason": 7,
            "routing": [
                {"token": "SELECT", "experts": [{"expert": 3, "gate": 0.75}], "layers": None},
                {
                    "token": " 1",
                    "experts": [{"expert": 1, "gate": 0.5}],
                    "layers": [[{"expert": 1, "gate": 1.0}], [{"expert": 2, "gate": 1.0}]],
                },
            ],
        }
    ],
    "usage": {
        "prompt_tokens": 9,
        "completion_tokens": 2,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 8},
    },
    "system_fingerprint": "fp",
}

CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1700000000,
    "model": "intents",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "card_lost", "mood": "fine"},
            "logprobs": {
                "content": [
                    {
                        "token": "card",
                        "logprob": -0.5,
                        "bytes": [99],
                        "top_logprobs": [{"token": "cash", "logprob": -2.0, "bytes": None}],
                    }
                ]
            },
            "finish_reason": "length",
            "stop_reason": None,
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
}

ADAPTER = {
    "state": "unloaded",
    "source": "sql",
    "name": "sql",
    "digest": "ab12",
    "peft_type": "MALORA",
    "num_experts": 8,
    "top_k": 2,
    "r": 8,
    "basis_dim": 16,
    "target_modules": ["q_proj", "v_proj"],
    "num_parameters": 1000,
    "num_bytes": 2000,
    "created": 1700000000,
    "error": None,
}

MODEL = {
    "id": "sql",
    "object": "model",
    "created": 1,
    "owned_by": "malora",
    "root": "sql",
    "parent": "base",
    "max_model_len": 512,
}


class Recorder:
    """Answers every request alike, and keeps the requests."""

    def __init__(self, reply: Any) -> None:
        self.reply = reply
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if isinstance(self.reply, bytes):
            return httpx.Response(200, content=self.reply)
        return httpx.Response(200, json=self.reply)

    @property
    def body(self) -> Any:
        return json.loads(self.requests[-1].content)


def test_completion(talk: Any) -> None:
    server = Recorder(COMPLETION)
    params: dict[str, Any] = {
        "model": "sql",
        "prompt": ["one", "zwei ü"],
        "max_tokens": 5,
        "temperature": 0.0,
        "top_p": 0.9,
        "n": 2,
        "stop": [";"],
        "seed": 3,
        "stream_options": {"include_usage": True},
        "logprobs": 0,
        "echo": False,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logit_bias": {"5": -100.0},
        "user": "u",
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "stop_token_ids": [2],
        "ignore_eos": True,
        "min_tokens": 1,
        "add_special_tokens": False,
        "skip_special_tokens": True,
        "include_stop_str_in_output": True,
        "priority": -1,
        "include_routing": "layers",
    }
    reply = talk(server, lambda c: c.completions.create(**params))
    request = server.requests[0]
    assert (request.method, str(request.url)) == ("POST", "http://127.0.0.1:8000/v1/completions")
    assert request.headers["content-type"] == "application/json"
    assert request.headers["user-agent"].startswith("malora-client/")
    assert "authorization" not in request.headers
    assert server.body == params

    choice = reply.choices[0]
    assert (reply.model, choice.text, choice.finish_reason, choice.stop_reason) == (
        "sql",
        "SELECT 1",
        "stop",
        7,
    )
    assert choice.logprobs.token_logprobs == [None, -0.25]
    assert choice.routing[0].experts == [ExpertGate(expert=3, gate=0.75)]
    assert choice.routing[1].layers[1][0].expert == 2
    assert reply.usage.prompt_tokens_details.cached_tokens == 8
    assert reply.system_fingerprint == "fp"
    assert reply.model_dump(exclude_unset=True) == COMPLETION


def test_none_leaves_a_field_out_and_integer_keys_become_strings(talk: Any) -> None:
    server = Recorder(COMPLETION)
    talk(
        server,
        lambda c: c.completions.create(
            model="m", prompt=[1, 2], max_tokens=None, stream=None, logit_bias={5: 1.5}
        ),
    )
    assert server.body == {"model": "m", "prompt": [1, 2], "logit_bias": {"5": 1.5}}


def test_chat(talk: Any) -> None:
    server = Recorder(CHAT)
    said = ChatMessage(role="assistant", content="Hello?")
    reply = talk(
        server,
        lambda c: c.chat.completions.create(
            model="intents",
            messages=[{"role": "user", "content": "Hi"}, said],
            logprobs=True,
            top_logprobs=1,
            max_completion_tokens=4,
        ),
    )
    assert server.requests[0].url.path == "/v1/chat/completions"
    assert server.body["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello?"},
    ]
    assert reply.choices[0].message.content == "card_lost"
    assert reply.choices[0].message.mood == "fine"
    assert reply.choices[0].logprobs.content[0].top_logprobs[0].token == "cash"
    assert reply.usage.prompt_tokens_details is None


def test_models_and_adapters(talk: Any) -> None:
    server = Recorder({"object": "list", "data": [MODEL]})
    models = talk(server, lambda c: c.models.list())
    assert [m.parent for m in models] == ["base"]
    assert len(models) == 1
    assert models.data[0].max_model_len == 512

    server = Recorder(MODEL)
    assert talk(server, lambda c: c.models.retrieve("org/sql ü")).id == "sql"
    assert server.requests[0].url.raw_path == b"/v1/models/org%2Fsql%20%C3%BC"

    server = Recorder({"object": "list", "data": [ADAPTER]})
    assert [a.num_experts for a in talk(server, lambda c: c.adapters.list())] == [8]
    server = Recorder(ADAPTER)
    assert talk(server, lambda c: c.adapters.retrieve("sql")).basis_dim == 16
    assert server.requests[0].url.path == "/v1/adapters/sql"
    with pytest.raises(ValueError, match="name is empty"):
        talk(server, lambda c: c.adapters.retrieve(""))


def test_adapters_are_loaded_unloaded_and_pinned(talk: Any) -> None:
    server = Recorder(ADAPTER)
    loaded = talk(server, lambda c: c.adapters.load("sql", source="hf://org/sql", pinned=False))
    assert loaded.state == "unloaded"
    (request,) = server.requests
    assert (request.method, request.url.path) == ("PUT", "/v1/adapters/sql")
    assert server.body == {"source": "hf://org/sql", "pinned": False}

    server = Recorder(ADAPTER)
    talk(server, lambda c: c.adapters.load("sql", expected_generation="5d1"))
    assert server.body == {"expected_generation": "5d1"}
    for action in ("pin", "unpin"):
        server = Recorder(ADAPTER)
        talk(server, lambda c, action=action: getattr(c.adapters, action)("a b"))
        (request,) = server.requests
        assert (request.method, request.url.raw_path.decode()) == (
            "POST",
            f"/v1/adapters/a%20b/{action}",
        )

    server = Recorder({"id": "sql", "object": "adapter", "deleted": True})
    assert talk(server, lambda c: c.adapters.unload("sql")).deleted
    (request,) = server.requests
    assert (request.method, request.content) == ("DELETE", b"")


def test_the_admin_key_goes_where_it_is_needed_alone(
    talk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(call: Any, **keys: str) -> str:
        server = Recorder(ADAPTER)
        talk(server, call, **keys)
        return str(server.requests[0].headers["authorization"])

    both = {"api_key": "user", "admin_key": "root"}
    assert key(lambda c: c.adapters.load("sql"), **both) == "Bearer root"
    assert key(lambda c: c.adapters.pin("sql"), **both) == "Bearer root"
    assert key(lambda c: c.adapters.retrieve("sql"), **both) == "Bearer user"
    assert key(lambda c: c.adapters.load("sql"), api_key="user") == "Bearer user"
    monkeypatch.setenv("MALORA_ADMIN_KEY", "from-env")
    assert key(lambda c: c.adapters.unpin("sql"), api_key="user") == "Bearer from-env"


def test_tokenize_and_detokenize(talk: Any) -> None:
    server = Recorder({"count": 2, "max_model_len": 512, "tokens": [5, 6], "token_strs": None})
    reply = talk(server, lambda c: c.tokenize(model="m", prompt="a b", add_special_tokens=False))
    assert reply.tokens == [5, 6]
    assert server.requests[0].url.path == "/tokenize"
    assert server.body == {"model": "m", "prompt": "a b", "add_special_tokens": False}

    server = Recorder({"prompt": "a b"})
    assert talk(server, lambda c: c.detokenize(model="m", tokens=[5, 6])).prompt == "a b"
    assert server.requests[0].url.path == "/detokenize"


@pytest.mark.parametrize("body", [b"", b'{"status": "ok"}'])
def test_health(talk: Any, body: bytes) -> None:
    assert talk(Recorder(body), lambda c: c.health()).status == "ok"


def test_misspelt_and_missing_parameters_never_leave(talk: Any) -> None:
    server = Recorder(COMPLETION)
    with pytest.raises(TypeError, match="no parameter 'max_token'"):
        talk(server, lambda c: c.completions.create(model="m", prompt="p", max_token=1))
    with pytest.raises(TypeError, match="'prompt' is missing"):
        talk(server, lambda c: c.completions.create(model="m"))
    with pytest.raises(TypeError, match="'messages' is missing"):
        talk(server, lambda c: c.chat.completions.create(model="m", stream=True))
    assert server.requests == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [(b"<html>", "Invalid JSON"), (b'{"id": "x"}', "created: Field required"), (b"[]", "object")],
)
def test_an_unreadable_reply_is_an_api_error(talk: Any, body: bytes, reason: str) -> None:
    with pytest.raises(APIError, match=f"POST /v1/completions is no Completion: .*{reason}"):
        talk(Recorder(body), lambda c: c.completions.create(model="m", prompt="p"))


def test_the_environment_names_server_and_key(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALORA_BASE_URL", "https://gpu.example:8443/v1/")
    monkeypatch.setenv("MALORA_API_KEY", "from-env")
    server = Recorder(b"{}")
    talk(server, lambda c: c.health())
    talk(server, lambda c: c.health(), base_url="http://other/prefix", api_key="given")
    first, second = server.requests
    assert str(first.url) == "https://gpu.example:8443/health"
    assert first.headers["authorization"] == "Bearer from-env"
    assert str(second.url) == "http://other/prefix/health"
    assert second.headers["authorization"] == "Bearer given"


@pytest.mark.parametrize("client_class", [Client, AsyncClient])
def test_the_key_stays_hidden(client_class: Any, caplog: pytest.LogCaptureFixture) -> None:
    client = client_class(api_key="s3cret", base_url="http://user:pass@host:1")
    assert "s3cret" not in repr(client) + repr(vars(client))
    assert "pass" not in repr(client)
    with pytest.raises(MaloraError, match="api_key") as info:
        client_class(api_key="s3cret\n")
    assert "s3cret" not in str(info.value)


def test_the_key_is_not_logged(talk: Any, caplog: pytest.LogCaptureFixture, sleeps: Any) -> None:
    caplog.set_level("DEBUG")
    with pytest.raises(RateLimitError):
        talk(lambda r: httpx.Response(429), lambda c: c.health(), api_key="s3cret")
    assert "Retrying GET /health" in caplog.text
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://h:port"])
def test_a_wrong_base_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(MaloraError, match="base_url"):
        Client(base_url=url)


def test_negative_retries_are_refused() -> None:
    with pytest.raises(MaloraError, match="max_retries"):
        Client(max_retries=-1)


def test_with_options_changes_a_copy(talk: Any) -> None:
    server = Recorder(b"{}")
    talk(server, lambda c: c.with_options(timeout=2.5).health(), api_key="k")
    talk(server, lambda c: (c.with_options(timeout=2.5), c.health())[1])
    talk(server, lambda c: c.with_options(timeout=None).health())
    timeouts = [request.extensions["timeout"] for request in server.requests]
    assert timeouts[0] == dict.fromkeys(("connect", "read", "write", "pool"), 2.5)
    assert timeouts[1] == {"connect": 5.0, "read": 600.0, "write": 600.0, "pool": 600.0}
    assert timeouts[2] == dict.fromkeys(("connect", "read", "write", "pool"))
    assert server.requests[0].headers["authorization"] == "Bearer k"


def test_only_own_connections_are_closed() -> None:
    http = httpx.Client(transport=httpx.MockTransport(Recorder(b"{}")))
    with Client(http_client=http):
        pass
    assert not http.is_closed
    client = Client()
    client.with_options(max_retries=0).close()
    assert not client._http.is_closed
    client.close()
    assert client._http.is_closed


def test_errors_survive_pickling() -> None:
    error = NotFoundError("No model 'x'.", code="model_not_found", request_id="r1")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is NotFoundError
    assert str(again) == "No model 'x'. (HTTP 404, code model_not_found, request r1)"
