"""Streams over HTTP: the same reply in pieces, clients that leave, and what the metrics count."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest

from malora_client import AsyncClient, Client
from malora_client.types import CompletionChunk

MODELS = ["base", "experts", "compact", "dense", "lora"]
PROMPTS = ["The capital of France is", "SELECT name FROM", "1, 2, 3, über 🦊", "Dear Sir,"]
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
RUNNING = ("num_requests_running", ("base",))
WAITING = ("num_requests_waiting", ("base",))
USAGE = ("kv_cache_usage_ratio", ("base",))

ReadMetrics = Callable[[], dict[tuple[str, tuple[str, ...]], float]]


def text_of(chunks: list[CompletionChunk], index: int = 0) -> str:
    return "".join(c.text for chunk in chunks for c in chunk.choices if c.index == index)


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_is_the_reply_in_pieces(client: Client, model: str) -> None:
    fields: dict[str, Any] = {
        "model": model,
        "prompt": PROMPTS[2],
        "max_tokens": 20,
        "seed": 8,
        "n": 2,
        "echo": True,
        "logprobs": 2,
        "include_routing": True,
    }
    whole = client.completions.create(**fields)
    options: Any = {"include_usage": True}
    with client.completions.create(**fields, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    assert len(chunks) > 20
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    for usage in (chunks[-1].usage, whole.usage):
        assert usage is not None
        usage.prompt_tokens_details = None  # the second comes from the cache of the first
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        pieces = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert text_of(chunks, choice.index) == choice.text
        assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == (
            choice.finish_reason,
            choice.stop_reason,
        )
        assert all(piece.finish_reason is None for piece in pieces[:-1])
        logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
        assert choice.logprobs is not None
        tokens = [token for piece in logprobs for token in piece.tokens]
        offsets = [offset for piece in logprobs for offset in piece.text_offset]
        assert tokens == choice.logprobs.tokens
        assert offsets == choice.logprobs.text_offset
        routing = [entry for piece in pieces for entry in piece.routing or ()]
        assert [r.token for r in routing] == [r.token for r in choice.routing or ()]
        assert [[e.expert for e in r.experts] for r in routing] == [
            [e.expert for e in r.experts] for r in choice.routing or ()
        ]


def test_a_stop_string_never_shows_in_a_stream(client: Client) -> None:
    fields: dict[str, Any] = {"model": "dense", "prompt": PROMPTS[0], "max_tokens": 24, **GREEDY}
    text = client.completions.create(**fields).choices[0].text
    stop = text[9:15]
    chunks = list(client.completions.create(**fields, stop=stop, stream=True))
    assert text_of(chunks) == text[: text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].choices[0].stop_reason == stop


async def test_sixteen_streams_of_mixed_adapters_each_say_their_own(
    async_client: AsyncClient, greedy: Callable[..., list[Any]]
) -> None:
    models = [MODELS[i % len(MODELS)] for i in range(16)]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(16)]

    async def stream(model: str, prompt: str) -> str:
        chunks = await async_client.completions.create(
            model=model, prompt=prompt, max_tokens=40, stream=True, **GREEDY
        )
        return text_of([chunk async for chunk in chunks])

    texts = await asyncio.gather(*map(stream, models, prompts))
    assert texts == [generation.text for generation in greedy(prompts, models, 40)]


async def test_a_client_that_leaves_frees_its_sequences(
    async_client: AsyncClient, read_metrics: ReadMetrics
) -> None:
    before = read_metrics()
    assert (before[RUNNING], before[WAITING], before[USAGE]) == (0, 0, 0)
    fields: dict[str, Any] = {"prompt": PROMPTS[0], "max_tokens": 1000, "seed": 1, **GREEDY}
    streams = [
        await async_client.completions.create(model=model, stream=True, **fields)
        for model in MODELS
    ]
    replies = [
        asyncio.create_task(async_client.completions.create(model=model, n=2, **fields))
        for model in ("experts", "lora")
    ]
    started = time.perf_counter()
    for _ in range(20):
        for stream in streams:
            await anext(stream)
    seconds = time.perf_counter() - started
    async with asyncio.timeout(10):
        while (during := read_metrics())[RUNNING] != len(streams) + 2 * len(replies):
            await asyncio.sleep(0.02)
    assert during[USAGE] > 0
    for stream in streams:
        await stream.close()
    for reply in replies:
        reply.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reply
    # All of it would have taken some fifty times as long as the first twenty tokens.
    deadline = time.perf_counter() + 5 * seconds + 0.5
    while (now := read_metrics())[RUNNING] or now[USAGE]:
        assert time.perf_counter() < deadline, (now[RUNNING], now[USAGE])
        await asyncio.sleep(0.02)
    for model in MODELS:
        key = ("request_success_total", ("abort", model))
        aborted = now[key] - before.get(key, 0)
        assert aborted == (3 if model in ("experts", "lora") else 1)
        assert ("request_success_total", ("error", model)) not in now


def test_metrics_count_exactly_what_was_asked(client: Client, read_metrics: ReadMetrics) -> None:
    prompt = "Count these tokens exactly, please: " + "a b c d e f g h i j " * 4
    num_prompt = client.tokenize(prompt=prompt).count
    before = read_metrics()
    for _ in range(2):
        client.completions.create(model="compact", prompt=prompt, max_tokens=7, **GREEDY)
    list(
        client.completions.create(
            model="compact", prompt=prompt, max_tokens=9, stream=True, **GREEDY
        )
    )
    client.completions.create(
        model="base", prompt="x", max_tokens=5, temperature=0, logit_bias={0: 100.0}
    )
    after = read_metrics()
    moved = {key: value - before.get(key, 0) for key, value in after.items()}
    assert moved["prompt_tokens_total", ("compact",)] == 3 * num_prompt
    assert moved["generation_tokens_total", ("compact",)] == 7 + 7 + 9
    assert moved["generation_tokens_total", ("base",)] == 1
    assert moved["request_success_total", ("length", "compact")] == 3
    assert moved["request_success_total", ("stop", "base")] == 1
    assert moved["time_to_first_token_seconds_count", ("compact",)] == 3
    assert moved["e2e_request_latency_seconds_count", ("compact",)] == 3
    assert moved["inter_token_latency_seconds_count", ("compact",)] == 6 + 6 + 8
    assert moved["request_generation_tokens_sum", ("compact",)] == 23
    assert moved["http_requests_total", ("POST", "/v1/completions", "200")] == 4
    assert moved["prefix_cache_queries_total", ("base",)] == 3 * num_prompt + 1
    hits = moved["prefix_cache_hits_total", ("base",)]
    assert hits == 2 * ((num_prompt - 1) // 16 * 16)
    assert moved["prompt_tokens_cached_total", ("compact",)] == hits
    # Where the time went: the engine's own clock for the first two, and all of it is in the whole.
    parts = {
        name: moved[f"request_{name}_time_seconds_sum", ("compact",)]
        for name in ("queue", "prefill", "decode", "inference")
    }
    assert moved["request_queue_time_seconds_count", ("compact",)] == 3
    assert parts["inference"] == pytest.approx(parts["prefill"] + parts["decode"])
    whole = moved["e2e_request_latency_seconds_sum", ("compact",)]
    assert 0 < parts["queue"] + parts["inference"] <= whole
    untouched = ("experts", "dense", "lora")
    assert not any(moved.get(("prompt_tokens_total", (model,)), 0) for model in untouched)
    assert after[RUNNING] == 0
