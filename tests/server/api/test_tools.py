"""Tools in chat: what the model sees of them, and what the openai package makes of its calls."""

import copy
import json
from typing import Any

import httpx
import msgspec
import openai
import pytest
from fastapi import FastAPI
from transformers import PreTrainedTokenizerFast

from malora_server.api.tokenizer import Tokenizer
from malora_server.app import create_app
from malora_server.settings import Settings

TALK: Any = [{"role": "user", "content": "Is it warm in Ghent?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Today's weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ghent"}}\n</tool_call>'
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call {{ c.function.name }} {{ c.function.arguments.city }}>"
    "{% endfor %}{{ '\n' }}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
)


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def script(engine: Any, tokenizer: Tokenizer) -> Any:
    """`script(text)`: what the engine says from now on."""

    def say(text: str) -> None:
        engine.reply = [*tokenizer.backend.encode(text).ids, engine.EOS]

    return say


def prompt_of(engine: Any, tokenizer: Tokenizer) -> str:
    ids = engine.submits[-1].prompt_token_ids
    return tokenizer.backend.decode(ids, False)


def ask(client: openai.OpenAI, **fields: Any) -> tuple[Any, list[Any]]:
    """The whole reply's choice, and the stream's choices."""
    fields = {"model": "tiny", "messages": TALK, "tools": TOOLS, **fields}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True))
    return whole.choices[0], [chunk.choices[0] for chunk in chunks]


def gathered(choices: list[Any]) -> tuple[str, list[tuple[str, str]]]:
    """A stream's content and calls, put together as OpenAI's guide does."""
    content, calls = "", {}
    for choice in choices:
        content += choice.delta.content or ""
        for piece in choice.delta.tool_calls or []:
            if piece.index not in calls:
                assert piece.id
                assert piece.type == "function"
                assert piece.function.name
                calls[piece.index] = [piece.function.name, ""]
            else:
                assert piece.id is None
                assert piece.function.name is None
            calls[piece.index][1] += piece.function.arguments
    return content, [tuple(call) for call in calls.values()]


@pytest.fixture(autouse=True)
def roomy(engine: Any) -> None:
    engine.ready = msgspec.structs.replace(engine.ready, max_model_len=2000)


def test_a_call_found_in_the_text(client: openai.OpenAI, script: Any) -> None:
    script("Let me look.\n" + CALL)
    whole, stream = ask(client)
    [call] = whole.message.tool_calls
    assert whole.finish_reason == stream[-1].finish_reason == "tool_calls"
    assert whole.message.content == "Let me look."
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Ghent"}
    content, calls = gathered(stream)
    assert content == whole.message.content
    assert calls == [(call.function.name, call.function.arguments)]
    assert len([choice for choice in stream if choice.delta.tool_calls]) > 2, "it comes in pieces"
    assert stream[0].delta.role == "assistant"
    assert sum(choice.delta.role is not None for choice in stream) == 1


def test_calls_alone_and_several(client: openai.OpenAI, script: Any) -> None:
    script(CALL + "\n" + CALL.replace("Ghent", "Bruges"))
    whole, stream = ask(client, n=1)
    assert whole.message.content is None
    first, second = whole.message.tool_calls
    assert first.id != second.id
    assert [json.loads(c.function.arguments)["city"] for c in (first, second)] == [
        "Ghent",
        "Bruges",
    ]
    assert gathered(stream) == (
        "",
        [(c.function.name, c.function.arguments) for c in (first, second)],
    )
    whole, stream = ask(client, parallel_tool_calls=False)
    assert len(whole.message.tool_calls) == len(gathered(stream)[1]) == 1


@pytest.mark.parametrize("logprobs", [False, True])
def test_plain_text_stays_plain(client: openai.OpenAI, script: Any, logprobs: bool) -> None:
    text = "No <tool> is needed: it is warm.\n"
    script(text)
    whole, stream = ask(client, logprobs=logprobs)
    assert (whole.message.content, whole.message.tool_calls) == (text, None)
    assert whole.finish_reason == stream[-1].finish_reason == "stop"
    assert gathered(stream) == (text, [])
    if logprobs:
        streamed = [entry.token for choice in stream for entry in choice.logprobs.content]
        assert streamed == [entry.token for entry in whole.logprobs.content]


def test_a_call_that_is_cut_says_so(client: openai.OpenAI, script: Any) -> None:
    script(CALL)
    whole, stream = ask(client, max_tokens=40)
    assert whole.finish_reason == stream[-1].finish_reason == "length"
    [call] = whole.message.tool_calls or [None]
    if call is not None:
        assert gathered(stream)[1] == [(call.function.name, call.function.arguments)]


def test_the_stream_helper_of_the_openai_package(client: openai.OpenAI, script: Any) -> None:
    script(CALL)
    with client.chat.completions.stream(model="tiny", messages=TALK, tools=TOOLS) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    [call] = final.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {"city": "Ghent"}


@pytest.mark.parametrize(
    ("choice", "parallel", "names", "repeats"),
    [
        ("required", None, ["get_weather", "clock"], True),
        ("required", False, ["get_weather", "clock"], False),
        ({"type": "function", "function": {"name": "clock"}}, None, ["clock"], False),
    ],
)
def test_a_call_that_must_be_made_is_a_grammar(
    client: openai.OpenAI,
    engine: Any,
    script: Any,
    choice: Any,
    parallel: bool | None,
    names: list[str],
    repeats: bool,
) -> None:
    script(CALL)
    fields = {} if parallel is None else {"parallel_tool_calls": parallel}
    client.chat.completions.create(
        model="tiny", messages=TALK, tools=TOOLS, tool_choice=choice, **fields
    )
    grammar = engine.submits[-1].sampling.grammar
    for name in ("get_weather", "clock"):
        assert (name in grammar) == (name in names)
    assert ("{0,15}" in grammar) == repeats


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_a_call_that_may_be_made_is_none(
    client: openai.OpenAI, engine: Any, tokenizer: Tokenizer, script: Any, choice: Any
) -> None:
    script(CALL)
    fields = {} if choice is None else {"tool_choice": choice}
    reply = client.chat.completions.create(model="tiny", messages=TALK, tools=TOOLS, **fields)
    assert engine.submits[-1].sampling.grammar is None
    message = reply.choices[0].message
    if choice == "none":
        assert (message.content, message.tool_calls) == (CALL, None)
        assert "get_weather" not in prompt_of(engine, tokenizer)
    else:
        assert message.tool_calls
        assert "get_weather" in prompt_of(engine, tokenizer)


RESULTS: Any = [
    *TALK,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Ghent"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "21 degrees"},
]


def test_a_template_without_tools_gets_them_as_text(
    client: openai.OpenAI, engine: Any, tokenizer: Tokenizer, script: Any
) -> None:
    script("Yes.")
    client.chat.completions.create(model="tiny", messages=RESULTS, tools=TOOLS)
    prompt = prompt_of(engine, tokenizer)
    assert prompt.startswith("<|im_start|>system\nYou may call these functions")
    assert '"name": "get_weather"' in prompt
    assert f"<|im_start|>assistant\n{CALL}<|im_end|>" in prompt
    assert "<|im_start|>user\n<tool_response>\n21 degrees\n</tool_response>" in prompt
    brief: Any = [{"role": "system", "content": "Be brief."}, *RESULTS]
    client.chat.completions.create(model="tiny", messages=brief, tools=TOOLS)
    assert "<|im_start|>system\nBe brief.\n\nYou may call" in prompt_of(engine, tokenizer)
    # What came back can be sent again.
    script(CALL)
    message = (
        client.chat.completions.create(model="tiny", messages=TALK, tools=TOOLS).choices[0].message
    )
    again: Any = [*TALK, message, {**RESULTS[-1], "tool_call_id": message.tool_calls[0].id}]
    assert client.chat.completions.create(model="tiny", messages=again, tools=TOOLS).choices


async def test_a_template_with_tools_gets_them_as_they_are(
    engine: Any, settings: Settings, pretrained: PreTrainedTokenizerFast
) -> None:
    knowing = copy.deepcopy(pretrained)
    knowing.chat_template = TEMPLATE
    tokenizer = Tokenizer(knowing)
    transport = httpx.ASGITransport(create_app(settings, engine, tokenizer))
    async with httpx.AsyncClient(transport=transport, base_url="http://malora") as client:
        body = {"model": "tiny", "messages": RESULTS, "tools": TOOLS, "max_tokens": 1}
        reply = await client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        prompt = prompt_of(engine, tokenizer)
        assert "[assistant] <call get_weather Ghent>" in prompt
        assert "[tool] 21 degrees" in prompt
        assert json.loads(prompt.splitlines()[-1])[0] == WEATHER
        tokens = await client.post("/tokenize", json={"messages": RESULTS, "tools": TOOLS})
        assert tokens.json()["tokens"] == engine.submits[-1].prompt_token_ids


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {"type": "function", "function": {"name": "dance"}},
            },
            "tool_choice",
        ),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "tools"),
        ({"tools": TOOLS, "structured_outputs": {"regex": "a"}}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{**RESULTS[1], "role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
    ],
)
async def test_what_makes_no_sense_is_refused(
    app: FastAPI, engine: Any, fields: dict[str, Any], param: str
) -> None:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://malora") as client:
        body = {"model": "tiny", "messages": TALK, **fields}
        reply = await client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"].startswith(param), reply.text
    assert engine.submits == []


async def test_parameters_that_are_no_schema_are_refused(app: FastAPI, engine: Any) -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "strng"}}}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://malora") as client:
        body = {"model": "tiny", "messages": TALK, "tools": [bad], "tool_choice": "required"}
        reply = await client.post("/v1/chat/completions", json=body)
    assert reply.json()["error"]["code"] == "invalid_grammar"
    assert "strng" in reply.json()["error"]["message"]
    await app.state.server.grammars.close()
