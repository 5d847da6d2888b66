"""What a type checker sees: each form of a call has one exact type, and wrong calls are found."""

from __future__ import annotations

from pathlib import Path

from mypy import api

PROGRAM = """
from typing import assert_type
from malora_client import *

def sync(client: Client, flag: bool) -> None:
    c = client.completions
    assert_type(c.create(model="m", prompt="p"), Completion)
    assert_type(c.create(model="m", prompt=[1], stream=False, include_routing="layers"), Completion)
    assert_type(c.create(model="m", prompt="p", stream=True), Stream[CompletionChunk])
    assert_type(c.create(model="m", prompt="p", stream=flag), Completion | Stream[CompletionChunk])
    for chunk in c.create(model="m", prompt="p", stream=True):
        assert_type(chunk, CompletionChunk)
    messages: list[ChatMessageParam] = [{"role": "user", "content": "hi"}]
    assert_type(client.chat.completions.create(model="m", messages=messages), ChatCompletion)
    assert_type(
        client.chat.completions.create(model="m", messages=messages, stream=True),
        Stream[ChatCompletionChunk],
    )
    assert_type(client.models.list().data, list[Model])
    for adapter in client.adapters.list():
        assert_type(adapter, Adapter)
    assert_type(client.with_options(timeout=1, max_retries=0), Client)

async def asynchronous(client: AsyncClient) -> None:
    c = client.completions
    assert_type(await c.create(model="m", prompt="p"), Completion)
    async with await c.create(model="m", prompt="p", stream=True) as stream:
        assert_type(stream, AsyncStream[CompletionChunk])
        assert_type(await anext(stream), CompletionChunk)
        async for chunk in stream:
            assert_type(chunk, CompletionChunk)
    assert_type(await client.models.retrieve("m"), Model)

def wrong(client: Client) -> None:
    client.tokenize(model="m", promt="p")
    client.detokenize(model="m", tokens=None)
    client.completions.create(model="m", prompt="p", include_routing="all")
    client.with_options(api_key="k")
"""


def test_types_are_exact(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = Path(__file__).parents[2]
    out, err, _ = api.run(["--config-file", str(root / "pyproject.toml"), str(program)])
    first_wrong = PROGRAM[: PROGRAM.index("def wrong")].count("\n") + 2
    errors = [line for line in out.splitlines() if ": error:" in line]
    lines = sorted({int(line.split(":")[1]) for line in errors})
    assert lines == list(range(first_wrong, first_wrong + 4)), out + err
