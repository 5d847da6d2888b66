"""What a request says of its reply's form reaches the engine as a grammar, or is refused first."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pydantic
import pytest
from fastapi import FastAPI

from malora_server.api import grammars
from malora_server.api.grammar_worker import check_schema
from malora_server.engine.grammar import GrammarError

COMPLETIONS = "/v1/completions"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED = {"type": "json_schema", "json_schema": {"name": "reply", "schema": SCHEMA, "strict": True}}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hello", "max_tokens": 2, **fields}


@pytest.fixture(autouse=True)
async def closed_worker(app: FastAPI, request: pytest.FixtureRequest) -> Any:
    yield
    if "client" in request.fixturenames:  # else it belongs to the loop of a server in a thread
        await app.state.server.grammars.close()


@pytest.mark.parametrize(
    ("fields", "holds"),
    [
        ({"response_format": {"type": "json_object"}}, '"object"'),
        ({"response_format": NAMED}, '"required": ["a"]'),
        ({"structured_outputs": {"json": SCHEMA}}, '"required": ["a"]'),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, '"required": ["a"]'),
        ({"structured_outputs": {"regex": "[0-9]{3}/x"}}, "[0-9]{3}"),
        ({"structured_outputs": {"choice": ["yes", "nö"]}}, "yes"),
        ({"structured_outputs": {"grammar": 'root ::= "left" | "right"'}}, "right"),
        ({"structured_outputs": {"grammar": 'start: "left" | "right"'}}, "right"),
        ({"structured_outputs": {"json_object": True}}, '"object"'),
    ],
)
async def test_every_form_reaches_the_engine(
    client: httpx.AsyncClient, engine: Any, fields: dict[str, Any], holds: str
) -> None:
    for _ in range(2):  # the second answer is remembered
        assert (await client.post(COMPLETIONS, json=body(n=2, **fields))).status_code == 200
    talk = {"model": "sql", "messages": [{"role": "user", "content": "hello"}], **fields}
    reply = await client.post("/v1/chat/completions", json={**talk, "max_tokens": 2})
    assert reply.status_code == 200
    sent = {submit.sampling.grammar for submit in engine.submits}
    assert len(engine.submits) == 5
    [grammar] = sent
    assert holds in grammar.replace('\\"', '"').replace('":', '": ').replace(":  ", ": ")


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}])
async def test_free_text_has_no_grammar(
    client: httpx.AsyncClient, engine: Any, app: FastAPI, fields: dict[str, Any]
) -> None:
    assert (await client.post(COMPLETIONS, json=body(**fields))).status_code == 200
    assert engine.submits[0].sampling.grammar is None
    assert app.state.server.grammars._worker is None


TWO = {"regex": "a", "choice": ["b"]}
MANY = {"allOf": [{"type": "string", "pattern": f"^(a|b)*a(a|b){{{i}}}$"} for i in range(30)]}

VAST = {"type": "integer", "multipleOf": 9_999_991}
"""Takes as many states."""


@pytest.mark.parametrize(
    ("field", "value", "param", "reason"),
    [
        ("structured_outputs", {"regex": "a("}, "structured_outputs.regex", "unclosed"),
        ("structured_outputs", {"json": {"type": "x"}}, "structured_outputs.json", "Invalid type"),
        ("structured_outputs", {"json": "{"}, "structured_outputs.json", "can't be read"),
        ("structured_outputs", {"json": "[]"}, "structured_outputs.json", "object"),
        ("structured_outputs", {"json": {"uniqueItems": True}}, None, "uniqueItems"),
        ("structured_outputs", {"json": {"enum": ["\ud800"]}}, None, "hex escape"),
        ("structured_outputs", {"grammar": "start: x"}, "structured_outputs.grammar", "x"),
        ("structured_outputs", {"grammar": "::= ::="}, "structured_outputs.grammar", "GBNF"),
        ("structured_outputs", {"grammar": 'start: %json {"type": "null"}'}, None, "%json"),
        ("structured_outputs", {"json": MANY}, None, "30 patterns"),
        ("structured_outputs", {"regex": "a" * 200_000}, None, "200000 characters"),
        (
            "structured_outputs",
            {"json": {"type": "integer", "multipleOf": 9_999_991}},
            None,
            "memory",
        ),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}},
            "response_format.json_schema.schema",
            "type",
        ),
    ],
)
async def test_what_cannot_be_followed_is_refused_before_anything_is_queued(
    client: httpx.AsyncClient,
    engine: Any,
    field: str,
    value: Any,
    param: str | None,
    reason: str,
) -> None:
    # httpx would not write half a surrogate pair.
    content = json.dumps(body(**{field: value}))
    headers = {"Content-Type": "application/json"}
    reply = await client.post(COMPLETIONS, content=content, headers=headers)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["code"] == "invalid_grammar"
    assert reason in error["message"]
    assert error["param"] == param or param is None
    assert engine.submits == []
    # And the next one is served.
    good = await client.post(COMPLETIONS, json=body(structured_outputs={"choice": ["a"]}))
    assert good.status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": TWO}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [3]}}, "structured_outputs.choice[0]"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {**NAMED, "type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, None),
    ],
)
async def test_a_malformed_form_is_refused(
    client: httpx.AsyncClient, engine: Any, fields: dict[str, Any], param: str | None
) -> None:
    reply = await client.post(COMPLETIONS, json=body(**fields))
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param or param is None, reply.text
    assert engine.submits == []


async def test_a_grammar_that_takes_long_stalls_nobody(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = body(structured_outputs={"choice": ["a"]})
    assert (await client.post(COMPLETIONS, json=good)).status_code == 200
    monkeypatch.setattr(grammars, "_CHECK_SECONDS", 0.02)
    slow = body(structured_outputs={"json": {"type": "integer", "multipleOf": 99_991}})
    waiting = asyncio.create_task(client.post(COMPLETIONS, json=slow))
    others = 0
    while not waiting.done():
        assert (await client.post(COMPLETIONS, json=good)).status_code == 200
        others += 1
    reply = await waiting
    assert reply.status_code == 400
    assert "0.02 seconds" in reply.json()["error"]["message"]
    assert others
    monkeypatch.undo()
    good = body(structured_outputs={"choice": ["b"]})
    assert (await client.post(COMPLETIONS, json=good)).status_code == 200


async def test_a_client_that_leaves_during_the_check_spoils_nothing(
    client: httpx.AsyncClient, app: FastAPI
) -> None:
    checker = app.state.server.grammars
    slow = json.dumps({"type": "integer", "multipleOf": 99_991})
    checking = asyncio.create_task(checker.check("json", slow, "x"))
    while checker._worker is None:
        await asyncio.sleep(0.01)
    checking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await checking
    assert "yes" in await checker.check("choice", '["yes"]', "x")


def test_schemas_that_combine_may_have_few_patterns() -> None:
    patterns = [{"pattern": f"^{i}"} for i in range(20)]
    check_schema({"properties": {f"p{i}": p for i, p in enumerate(patterns)}})
    check_schema({"anyOf": patterns})
    check_schema({"allOf": patterns[:8]})
    check_schema({"allOf": patterns[:1] * 20})
    for combined in (
        {"allOf": patterns},
        {"anyOf": patterns, "pattern": "x"},
        {"$ref": "#/$defs/a", "minLength": 1, "$defs": {"a": {"anyOf": patterns}}},
        {"allOf": [{"patternProperties": {f"^{i}": {} for i in range(20)}}]},
    ):
        with pytest.raises(GrammarError, match="combines"):
            check_schema(combined)


async def test_a_base_model_whose_tokenizer_fits_no_grammar(
    client: httpx.AsyncClient, app: FastAPI
) -> None:
    app.state.server.grammars._eos_token_ids = []
    reply = await client.post(COMPLETIONS, json=body(response_format={"type": "json_object"}))
    assert reply.status_code == 400
    assert "ends a text" in reply.json()["error"]["message"]


def test_the_openai_client_sends_a_schema_from_a_class(url: str, engine: Any) -> None:
    class Person(pydantic.BaseModel):
        name: str
        age: int

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    talk: Any = [{"role": "user", "content": "hello"}]
    with pytest.raises(openai.LengthFinishReasonError):  # the scripted engine follows no grammar
        client.chat.completions.parse(
            model="tiny", messages=talk, response_format=Person, max_tokens=3
        )
    [submit] = engine.submits
    assert '"required":["name","age"]' in submit.sampling.grammar.replace(" ", "")
