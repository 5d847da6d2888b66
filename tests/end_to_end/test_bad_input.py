"""What cannot be served is refused clearly, and nobody else notices."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from malora.base_model import PATH as BASE
from malora_client import AsyncClient, BadRequestError, Client, NotFoundError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "experts", "prompt": "Hello there", "max_tokens": 4}
MESSAGES = [{"role": "user", "content": "Hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
WORDS = "one two three four five six seven eight nine ten " * 150


@dataclass(frozen=True)
class Bad:
    """A request that must be refused with `status`, `code` and `param`."""

    label: str
    param: str | None
    code: str = "invalid_value"
    status: int = 400
    path: str = COMPLETIONS
    method: str = "POST"
    content: bytes | None = None
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)


def body(label: str, param: str | None, /, *args: Any, drop: str = "", **fields: Any) -> Bad:
    """A completion request that is good but for `fields`, or for what it lacks."""
    wanted = {key: value for key, value in {**BODY, **fields}.items() if key != drop}
    return Bad(label, param, *args, content=json.dumps(wanted).encode())


def chat(label: str, param: str, *args: Any, **fields: Any) -> Bad:
    """As `body`, of a chat."""
    wanted = {"model": "experts", "messages": MESSAGES, "max_tokens": 4, **fields}
    return Bad(label, param, *args, path=CHAT, content=json.dumps(wanted).encode())


OUT_OF_RANGE: dict[str, list[Any]] = {
    "max_tokens": [-1, "many", 1.5, True],
    "temperature": [-0.1, 2.1, "hot"],
    "top_p": [0, 1.1],
    "top_k": [-2, 1.5],
    "min_p": [-0.1, 1.5],
    "n": [0],
    "seed": [2**64, "lucky"],
    "min_tokens": [-1, 5],
    "logprobs": [-1, 21],
    "presence_penalty": [-2.5, 3],
    "frequency_penalty": [-2.5, 3],
    "repetition_penalty": [0, -1],
    "stop": ["", ["a", ""], 7],
    "stop_token_ids": [[4096], "eos"],
    "ignore_eos": ["yes"],
    "echo": [1],
    "stream": ["true"],
    "include_routing": ["experts"],
    "priority": [2**40],
    "logit_bias": [{"4096": 1}, [5]],
    "best_of": [3],
    "suffix": ["!"],
    "response_format": ["text"],
}

BAD = [
    body("a prompt longer than the context", None, "context_length_exceeded", prompt=WORDS),
    body("max_tokens beyond the context", "max_tokens", "context_length_exceeded", max_tokens=1024),
    body("no such model", "model", "model_not_found", 404, model="nobody"),
    body("a model like a path", "model", "model_not_found", 404, model="../experts"),
    body("an adapter with a NaN", "model", "adapter_not_finite", model="nan"),
    body("an adapter for another base", "model", "adapter_base_mismatch", model="stranger"),
    body("a field nobody knows", "temprature", "unknown_parameter", temprature=1),
    body("no prompt", "prompt", "missing_required_parameter", drop="prompt"),
    body("no model", "model", "missing_required_parameter", drop="model"),
    *(body(f"prompt {p!r}", "prompt", prompt=p) for p in ("", [], [""], ["a", ""], [[]])),
    body("null as prompt", "prompt", prompt=None),
    body("a token outside the vocabulary", "prompt", prompt=[5, 4096]),
    body("a negative token", "prompt", prompt=[5, -1]),
    body("a negative stop token", "stop_token_ids[1]", stop_token_ids=[5, -1]),
    body("too strong a bias", "logit_bias[5]", logit_bias={"5": 101}),
    body("a bias on a word", "logit_bias.word", logit_bias={"word": 1}),
    body("many choices", "n", "too_many_choices", n=1000),
    body("many stop strings", "stop", "too_many_stops", stop=[str(i) for i in range(40)]),
    body("a format", "response_format.type", response_format={"type": "yaml"}),
    *(
        body(f"{field} {str(value)[:20]}", field, **{field: value})
        for field, values in OUT_OF_RANGE.items()
        for value in values
    ),
    chat("no messages", "messages", messages=[]),
    chat("a message without content", "messages[0].content", "missing_required_parameter",
         messages=[{"role": "user"}]),
    chat("a role nobody plays", "messages[0].role", messages=[{"role": "robot", "content": "x"}]),
    chat("top_logprobs alone", "top_logprobs", top_logprobs=3),
    chat("a chat longer than the context", "max_tokens", "context_length_exceeded",
         max_tokens=2000),
    Bad("malformed JSON", None, "invalid_json", content=b'{"model": "experts", "prompt": '),
    Bad("JSON that is no object", None, "invalid_json", content=b'["experts"]'),
    Bad("no body", None, "invalid_json", content=b""),
    Bad("bytes that are no text", None, "invalid_json", content=b'{"model": "\xff\xfe"}'),
    Bad("another content type", None, "invalid_json", content=json.dumps(BODY).encode(),
        headers=(("Content-Type", "text/plain"),)),
    Bad("a body too large", None, "request_too_large", 413, content=b" " * (8 * 2**20 + 1)),
    Bad("a method that is not answered", None, "method_not_allowed", 405, method="GET"),
    Bad("a method on another route", None, "method_not_allowed", 405, "/v1/models", "DELETE"),
    Bad("a route that is not there", None, "not_found", 404, "/v1/engines", "GET"),
    Bad("a model that is not there", None, "model_not_found", 404, "/v1/models/nobody", "GET"),
    Bad("an adapter that is not there", None, "model_not_found", 404, "/v1/adapters/x", "GET"),
    Bad("tokens outside the vocabulary", "tokens", path="/detokenize",
        content=b'{"tokens": [4096]}'),
    Bad("nothing to tokenize", "prompt", path="/tokenize", content=b"{}"),
]  # fmt: skip


def check(case: Bad, reply: httpx.Response, adapters: Path) -> None:
    assert reply.status_code == case.status, reply.text
    assert reply.headers["content-type"] == "application/json"
    error = reply.json()["error"]
    assert sorted(reply.json()) == ["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert (error["code"], error["param"]) == (case.code, case.param), error["message"]
    assert error["type"] == "invalid_request_error"
    assert 10 < len(error["message"]) < 400
    assert "\n" not in error["message"]
    for secret in (str(adapters), str(BASE), "Traceback", "site-packages", "pydantic", ".py"):
        assert secret not in reply.text


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        yield http


async def send(http: httpx.AsyncClient, case: Bad) -> httpx.Response:
    return await http.request(
        case.method, case.path, content=case.content, headers=dict(case.headers)
    )


@pytest.fixture(scope="module")
def good(greedy: Callable[..., list[Any]]) -> str:
    """What the good request is answered."""
    return greedy([BODY["prompt"]], [BODY["model"]], BODY["max_tokens"])[0].text


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.label)
async def test_a_bad_request_is_refused_and_the_next_is_served(
    http: httpx.AsyncClient, case: Bad, good: str, adapters: Path
) -> None:
    check(case, await send(http, case), adapters)
    reply = await http.post(COMPLETIONS, json={**BODY, **GREEDY})
    assert reply.json()["choices"][0]["text"] == good


async def test_neighbours_of_bad_requests_are_unharmed(
    http: httpx.AsyncClient,
    async_client: AsyncClient,
    adapters: Path,
    greedy: Callable[..., list[Any]],
) -> None:
    models = ["base", "experts", "compact", "dense", "lora"]
    prompt, count = "A long story begins:", 200
    streams = [
        await async_client.completions.create(
            model=model, prompt=prompt, max_tokens=count, stream=True, **GREEDY
        )
        for model in models
    ]
    firsts = [await anext(stream) for stream in streams]

    async def read(stream: Any) -> str:
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def disturb(case: Bad) -> bool:
        check(case, await send(http, case), adapters)
        return not any(task.done() for task in reading)

    reading = [asyncio.create_task(read(stream)) for stream in streams]
    meanwhile = await asyncio.gather(*map(disturb, BAD))
    assert sum(meanwhile) > len(BAD) / 2
    rests = await asyncio.gather(*reading)
    want = greedy([prompt] * len(models), models, count)
    for first, rest, generation in zip(firsts, rests, want, strict=True):
        assert first.choices[0].text + rest == generation.text


def test_the_sdk_raises_the_servers_words_as_classes(client: Client) -> None:
    with pytest.raises(NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(BadRequestError) as broken:
        client.completions.create(model="nan", prompt="x")
    assert broken.value.code == "adapter_not_finite"
    assert "NaN" in broken.value.message
    with pytest.raises(BadRequestError) as long:
        client.completions.create(model="base", prompt=WORDS, stream=True)
    assert long.value.code == "context_length_exceeded"
    assert "1024" in long.value.message
