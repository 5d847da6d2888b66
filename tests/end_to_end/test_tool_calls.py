"""Tool calls that a chat must make, by the embedded base and its adapters, with both clients."""

import asyncio
import json
from typing import Any

import jsonschema
import openai

from malora_client import AsyncClient, ChatCompletionChunk, Client, ToolParam

MODELS = ["base", "experts", "compact", "dense", "lora"]
BOOK: ToolParam = {
    "type": "function",
    "function": {
        "name": "book_table",
        "description": "Books a table",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "maxLength": 10},
                "guests": {"type": "integer", "minimum": 1, "maximum": 20},
            },
            "required": ["place", "guests"],
            "additionalProperties": False,
        },
    },
}
CLOCK: ToolParam = {"type": "function", "function": {"name": "clock"}}
TALK: list[Any] = [{"role": "user", "content": "Book a table for three at Nopi."}]


def fields(model: str, seed: int, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "messages": TALK,
        "tools": [BOOK, CLOCK],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 120,
        "seed": seed,
        "temperature": 1.0,
        **more,
    }


def check(name: str, arguments: str) -> None:
    value = json.loads(arguments)
    if name == "clock":
        assert value == {}
    else:
        assert name == "book_table"
        jsonschema.validate(value, BOOK["function"]["parameters"])


async def test_required_calls_fit_their_schema_streamed_or_not_in_a_mixed_batch(
    async_client: AsyncClient,
) -> None:
    requests = [fields(model, seed) for seed, model in enumerate(MODELS * 2)]

    async def whole(request: dict[str, Any]) -> tuple[str, str]:
        [choice] = (await async_client.chat.completions.create(**request)).choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        [call] = choice.message.tool_calls or []
        return call.function.name, call.function.arguments

    async def streamed(request: dict[str, Any]) -> tuple[str, str]:
        chunks: list[ChatCompletionChunk] = [
            chunk
            async for chunk in await async_client.chat.completions.create(**request, stream=True)
        ]
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        pieces = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
        assert {piece.index for piece in pieces} == {0}
        assert pieces[0].id
        assert pieces[0].function.name
        return pieces[0].function.name, "".join(p.function.arguments or "" for p in pieces)

    calls = await asyncio.gather(*map(whole, requests))
    assert calls == await asyncio.gather(*map(streamed, requests))
    for name, arguments in calls:
        check(name, arguments)
    assert len(set(calls)) > 2


def test_a_named_function_and_its_result_through_the_openai_package(url: str) -> None:
    client: Any = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    named = {"type": "function", "function": {"name": "book_table"}}
    request = fields("experts", 3, tool_choice=named)
    message = client.chat.completions.create(**request).choices[0].message
    [call] = message.tool_calls
    assert call.function.name == "book_table"
    check(call.function.name, call.function.arguments)
    with client.chat.completions.stream(**request) as stream:
        for _ in stream:
            pass
        [final] = stream.get_final_completion().choices
    assert final.message.tool_calls[0].function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "booked"}
    again = [*TALK, message, result]
    reply = client.chat.completions.create(
        **fields("experts", 3, messages=again, tool_choice="none", max_tokens=5)
    )
    assert reply.choices[0].message.content


def test_an_answer_sent_back_by_our_own_client(client: Client) -> None:
    first = client.chat.completions.create(**fields("lora", 1)).choices[0].message
    assert first.tool_calls
    again = [
        *TALK,
        first,
        {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "ok"},
    ]
    [choice] = client.chat.completions.create(
        **fields("lora", 1, messages=again, tool_choice="auto", max_tokens=5)
    ).choices
    assert choice.finish_reason in ("length", "stop", "tool_calls")
    tokens = client.tokenize(messages=again, tools=[BOOK])
    assert tokens.count > client.tokenize(messages=again).count
