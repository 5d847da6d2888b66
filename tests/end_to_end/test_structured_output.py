"""Replies that follow a grammar, in one batch with free ones, over HTTP on the embedded base."""

import asyncio
import json
import re
from typing import Any

import jsonschema
import openai
import pytest

from malora_client import AsyncClient, BadRequestError, Client

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "population": {"type": "integer", "minimum": 0, "maximum": 99_999},
        "tags": {"type": "array", "items": {"enum": ["old", "new", "port"]}, "maxItems": 3},
    },
    "required": ["city", "population", "tags"],
    "additionalProperties": False,
}
DATE = "[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]"
LABELS = ["transfer", "balance", "card arrival"]
QUERY = 'root ::= "SELECT " column " FROM cities"\ncolumn ::= "name" | "population"'
FORMS: dict[str, dict[str, Any]] = {
    "schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": SCHEMA, "strict": True},
        }
    },
    "regex": {"structured_outputs": {"regex": DATE}},
    "choice": {"structured_outputs": {"choice": LABELS}},
    "grammar": {"structured_outputs": {"grammar": QUERY}},
    "free": {},
}
MODELS = ["base", "experts", "compact", "dense", "lora"]
PROMPT = "The city of Utrecht was founded in"


def check(form: str, text: str) -> None:
    match form:
        case "schema":
            jsonschema.validate(json.loads(text), SCHEMA)
        case "regex":
            assert re.fullmatch(DATE, text)
        case "choice":
            assert text in LABELS
        case "grammar":
            assert re.fullmatch("SELECT (name|population) FROM cities", text)


def requests() -> list[tuple[str, dict[str, Any]]]:
    return [
        (
            form,
            {
                "model": MODELS[index % len(MODELS)],
                "prompt": PROMPT,
                "max_tokens": 100,
                "seed": index,
                "temperature": 0.0 if index % 2 else 1.0,
                **FORMS[form],
            },
        )
        for index, form in enumerate(form for form in FORMS for _ in range(2))
    ]


async def test_a_mixed_batch_follows_every_form_and_says_what_each_says_alone(
    async_client: AsyncClient, client: Client
) -> None:
    alone = [client.completions.create(**fields).choices[0] for _, fields in requests()]
    together = await asyncio.gather(
        *(async_client.completions.create(**fields) for _, fields in requests())
    )
    for (form, _), one, reply in zip(requests(), alone, together, strict=True):
        [choice] = reply.choices
        assert (choice.text, choice.finish_reason) == (one.text, one.finish_reason), form
        if form != "free":
            assert choice.finish_reason == "stop"
            check(form, choice.text)
    assert len({choice.text for choice in alone}) > 5, "the models and seeds make a difference"


async def test_a_stream_says_what_the_whole_reply_says(async_client: AsyncClient) -> None:
    async def stream(fields: dict[str, Any]) -> tuple[str, str | None]:
        chunks = await async_client.completions.create(**fields, stream=True)
        choices = [chunk.choices[0] async for chunk in chunks]
        return "".join(choice.text for choice in choices), choices[-1].finish_reason

    streamed = await asyncio.gather(*(stream(fields) for _, fields in requests()))
    for (_, fields), (text, reason) in zip(requests(), streamed, strict=True):
        [choice] = (await async_client.completions.create(**fields)).choices
        assert (text, reason) == (choice.text, choice.finish_reason)


def test_choices_of_one_request_have_each_their_own_grammar_state(client: Client) -> None:
    reply = client.completions.create(
        model="experts", prompt=[PROMPT, "Once"], n=4, max_tokens=100, seed=3, temperature=1.5,
        **FORMS["schema"],
    )  # fmt: skip
    assert len(reply.choices) == 8
    for choice in reply.choices:
        assert choice.finish_reason == "stop"
        check("schema", choice.text)
    assert len({choice.text for choice in reply.choices}) > 4


def test_a_reply_that_is_cut_says_so(client: Client) -> None:
    fields: dict[str, Any] = {"model": "lora", "prompt": PROMPT, "temperature": 0}
    [choice] = client.completions.create(max_tokens=5, **fields, **FORMS["schema"]).choices
    assert choice.finish_reason == "length"
    [choice] = client.completions.create(
        max_tokens=60, stop='"population"', **fields, **FORMS["schema"]
    ).choices
    assert (choice.finish_reason, choice.stop_reason) == ("stop", '"population"')
    assert choice.text.startswith("{")
    assert "population" not in choice.text


def test_chat_and_the_openai_client(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    talk: Any = [{"role": "user", "content": "Name a city."}]
    for extra in (FORMS["schema"], {"response_format": {"type": "json_object"}, "max_tokens": 200}):
        fields: Any = {"max_tokens": 100, "temperature": 0, "seed": 1, **extra}
        whole = client.chat.completions.create(model="dense", messages=talk, **fields)
        [choice] = whole.choices
        chunks = client.chat.completions.create(model="dense", messages=talk, stream=True, **fields)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(pieces) == choice.message.content
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content or ""), dict)
    labelled = client.chat.completions.create(
        model="base", messages=talk, extra_body=FORMS["choice"]
    )
    assert labelled.choices[0].message.content in LABELS


def test_a_bad_schema_is_the_clients_fault(client: Client) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(
            model="base", prompt="x", structured_outputs={"json": {"type": "strng"}}
        )
    assert refused.value.code == "invalid_grammar"
    assert "strng" in str(refused.value)


def test_a_text_that_cannot_go_on_is_an_error_and_the_server_goes_on(client: Client) -> None:
    # The "a" may stand in 2^40 trees: too much to keep track of, though it compiles.
    rules = "\n".join(f"x{i}: x{i + 1} x{i + 1}" for i in range(40))
    grammar = f'start: "ab" x0\n{rules}\nx40: "a"'
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(
            model="base", prompt="x", max_tokens=50, structured_outputs={"grammar": grammar}
        )
    assert refused.value.code == "invalid_grammar"
    [choice] = client.completions.create(
        model="base", prompt="x", structured_outputs={"choice": ["fine"]}
    ).choices
    assert choice.text == "fine"
