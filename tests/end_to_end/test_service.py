"""Completions, chat, models and tokens over HTTP, through the SDK and the openai package."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from malora_client import AsyncClient, BadRequestError, Client
from malora_server.engine.llm import LLM

MODELS = ["base", "experts", "compact", "dense", "lora"]
BROKEN = {"nan": "adapter_not_finite", "stranger": "adapter_base_mismatch"}
ROUTED = {"experts": (8, 2), "compact": (4, 1), "dense": (3, 3)}
"""Experts, and how many of them a token takes."""
PROMPTS = [
    "The capital of France is",
    "Question: What is 12 + 30?\nAnswer:",
    "SELECT name FROM",
    "Reverse the word: apple, then tell me – über naïve 🦊 words",
]
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
MESSAGES = [
    {"role": "system", "content": "You answer shortly."},
    {"role": "user", "content": "What is 2 + 2?"},
]


@pytest.fixture(scope="module")
def openai_client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def text_of(client: Client, **params: Any) -> str:
    return client.completions.create(**{**GREEDY, **params}).choices[0].text


def test_models_are_the_base_and_every_sound_adapter(
    client: Client, openai_client: openai.OpenAI
) -> None:
    for broken in BROKEN:  # as is found out when it is first used
        with pytest.raises(BadRequestError):
            client.completions.create(model=broken, prompt="x")
    models = {model.id: model for model in client.models.list()}
    assert sorted(models) == sorted(MODELS)
    assert models["base"].parent is None
    assert {models[name].parent for name in MODELS[1:]} == {"base"}
    assert {model.max_model_len for model in models.values()} == {1024}
    assert client.models.retrieve("lora").id == "lora"
    assert {model.id for model in openai_client.models.list()} == set(MODELS)


def test_adapters_are_described_and_broken_ones_say_why(client: Client) -> None:
    for name in MODELS[1:]:
        text_of(client, model=name, prompt="x", max_tokens=1)
    for broken in BROKEN:
        with pytest.raises(BadRequestError):
            client.completions.create(model=broken, prompt="x")
    adapters = {adapter.name: adapter for adapter in client.adapters.list()}
    assert sorted(adapters) == sorted([*MODELS[1:], "nan", "stranger"])
    shapes = {
        name: (a.peft_type, a.num_experts, a.top_k, a.r, a.basis_dim)
        for name, a in adapters.items()
    }
    assert shapes["experts"] == ("MALORA", 8, 2, 4, 32)
    assert shapes["compact"] == ("MALORA", 4, 1, 8, 16)
    assert shapes["dense"] == ("MALORA", 3, 3, 2, 8)
    assert shapes["lora"][1:] == (1, 1, 8, 8)
    assert adapters["compact"].target_modules == ["down_proj", "q_proj", "v_proj"]
    assert len({adapters[name].digest for name in MODELS[1:]}) == 4
    assert all(adapters[name].error is None for name in MODELS[1:])
    assert {adapters[name].state for name in MODELS[1:]} == {"device"}
    assert {adapters[name].error_code for name in BROKEN} == set(BROKEN.values())
    nan, stranger = (client.adapters.retrieve(name).error or "" for name in BROKEN)
    assert "NaN" in nan
    assert "another base model" in stranger


async def test_every_model_in_one_batch_says_what_it_says_alone_and_in_process(
    async_client: AsyncClient, greedy: Callable[..., list[Any]]
) -> None:
    asked = [(model, prompt) for prompt in PROMPTS for model in MODELS]

    async def ask(model: str, prompt: str) -> str:
        reply = await async_client.completions.create(
            model=model, prompt=prompt, max_tokens=24, **GREEDY
        )
        assert reply.model == model
        assert reply.usage is not None
        assert reply.usage.completion_tokens == 24
        return reply.choices[0].text

    together = await asyncio.gather(*(ask(*each) for each in asked))
    alone = [await ask(*each) for each in asked]
    models, prompts = (list(column) for column in zip(*asked, strict=True))
    in_process = [generation.text for generation in greedy(prompts, models, 24)]
    assert together == in_process
    assert alone == in_process
    assert len(set(together[: len(MODELS)])) == len(MODELS), "every adapter changes the words"


def test_the_openai_package_gets_the_same_reply(
    client: Client, openai_client: openai.OpenAI
) -> None:
    for model in MODELS:
        theirs = openai_client.completions.create(
            model=model,
            prompt=PROMPTS[0],
            max_tokens=8,
            temperature=0,
            logprobs=2,
            extra_body={"ignore_eos": True, "include_routing": True},
        )
        ours = client.completions.create(
            model=model,
            prompt=PROMPTS[0],
            max_tokens=8,
            logprobs=2,
            include_routing=True,
            **GREEDY,
        )
        assert theirs.choices[0].text == ours.choices[0].text
        assert theirs.choices[0].logprobs is not None
        assert ours.choices[0].logprobs is not None
        assert theirs.choices[0].logprobs.tokens == ours.choices[0].logprobs.tokens
    with pytest.raises(openai.NotFoundError) as error:
        openai_client.completions.create(model="nobody", prompt="x")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize("model", ["base", "experts"])
def test_a_prompt_may_be_text_tokens_or_several_of_either(client: Client, model: str) -> None:
    ids = [client.tokenize(prompt=prompt).tokens for prompt in PROMPTS[:2]]
    want = [text_of(client, model=model, prompt=prompt, max_tokens=8) for prompt in PROMPTS[:2]]
    assert text_of(client, model=model, prompt=ids[0], max_tokens=8) == want[0]
    forms: list[Any] = [PROMPTS[:2], ids]
    for form in forms:
        reply = client.completions.create(model=model, prompt=form, max_tokens=8, **GREEDY)
        assert [choice.text for choice in reply.choices] == want
        assert [choice.index for choice in reply.choices] == [0, 1]
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == len(ids[0]) + len(ids[1])
        assert reply.usage.completion_tokens == 16


def test_tokens_and_text_go_both_ways(client: Client) -> None:
    for prompt in PROMPTS:
        tokens = client.tokenize(prompt=prompt, model="experts", return_token_strs=True)
        assert tokens.count == len(tokens.tokens) == len(tokens.token_strs or ())
        assert tokens.max_model_len == 1024
        assert client.detokenize(tokens=tokens.tokens).prompt == prompt


def test_chat_continues_the_templates_text(
    client: Client, openai_client: openai.OpenAI, llm: LLM
) -> None:
    template: Any = llm.tokenizer.apply_chat_template
    prompt = template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert "<|user|>" in prompt
    assert client.tokenize(messages=MESSAGES).tokens == client.tokenize(prompt=prompt).tokens
    messages: Any = MESSAGES
    for model in ("base", "experts", "lora"):
        want = text_of(client, model=model, prompt=prompt, max_tokens=16)
        reply = client.chat.completions.create(
            model=model, messages=MESSAGES, max_completion_tokens=16, **GREEDY
        )
        assert reply.choices[0].message.role == "assistant"
        assert reply.choices[0].message.content == want
        assert reply.choices[0].finish_reason == "length"
        streamed = openai_client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=16,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        chunks = list(streamed)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == want
        assert chunks[-1].choices[0].finish_reason == "length"


def test_chat_logprobs_spell_the_reply(client: Client) -> None:
    reply = client.chat.completions.create(
        model="dense",
        messages=MESSAGES,
        max_tokens=12,
        logprobs=True,
        top_logprobs=3,
        skip_special_tokens=False,
        **GREEDY,
    )
    choice = reply.choices[0]
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    assert len(entries) == 12
    spelt = b"".join(bytes(entry.bytes or ()) for entry in entries)
    assert spelt.decode(errors="replace") == choice.message.content
    for entry in entries:
        best = [top.logprob for top in entry.top_logprobs or ()]
        assert len(best) == 3
        assert best == sorted(best, reverse=True)
        assert entry.logprob == best[0]  # greedy


@pytest.mark.parametrize("model", list(ROUTED))
def test_routing_tells_every_tokens_experts(client: Client, model: str) -> None:
    num_experts, top_k = ROUTED[model]
    for wanted in (True, "layers"):
        reply = client.completions.create(
            model=model, prompt=PROMPTS[0], max_tokens=9, n=2, seed=3, include_routing=wanted
        )
        assert reply.usage is not None
        entries = [entry for choice in reply.choices for entry in choice.routing or ()]
        assert len(entries) == reply.usage.completion_tokens
        for entry in entries:
            gates = {expert.expert: expert.gate for expert in entry.experts}
            assert set(gates) <= set(range(num_experts))
            assert sum(gates.values()) == pytest.approx(1, abs=1e-4)
            assert list(gates.values()) == sorted(gates.values(), reverse=True)
            assert (entry.layers is None) == (wanted is True)
            if entry.layers is None:
                continue
            assert len(entry.layers) == 6
            for layer in entry.layers:
                assert sum(expert.gate for expert in layer) == pytest.approx(1, abs=1e-4)
            for expert, gate in gates.items():
                shares = [e.gate for layer in entry.layers for e in layer if e.expert == expert]
                assert sum(shares) / 6 == pytest.approx(gate, abs=1e-4)
    routings = [[e.expert for e in entry.experts] for entry in entries]
    assert len({tuple(routing) for routing in routings}) > 1, "tokens choose for themselves"
    if top_k == num_experts:
        assert all(len(routing) == num_experts for routing in routings)


@pytest.mark.parametrize("model", ["base", "lora"])
def test_routing_is_null_where_there_is_none(client: Client, model: str) -> None:
    reply = client.completions.create(
        model=model, prompt="Hello", max_tokens=3, include_routing="layers"
    )
    assert reply.choices[0].routing is None


def test_a_repeated_prompt_comes_from_the_cache_of_its_own_model_alone(client: Client) -> None:
    prompt = "Once upon a time there were four numbers: " + "one, two, three, four, " * 12

    def cached(model: str) -> tuple[str, int, int]:
        reply = client.completions.create(model=model, prompt=prompt, max_tokens=8, **GREEDY)
        assert reply.usage is not None
        assert reply.usage.prompt_tokens_details is not None
        cached_tokens = reply.usage.prompt_tokens_details.cached_tokens
        return reply.choices[0].text, cached_tokens, reply.usage.prompt_tokens

    first = {model: cached(model) for model in MODELS}
    again = {model: cached(model) for model in MODELS}
    for model in MODELS:
        text, num_cached, num_prompt = again[model]
        assert first[model] == (text, 0, num_prompt)
        assert num_prompt - 16 <= num_cached < num_prompt


def test_the_request_id_is_the_clients_own_or_a_fresh_one(url: str) -> None:
    body = {"model": "lora", "prompt": "Hello", "max_tokens": 2}
    own = httpx.post(
        f"{url}/v1/completions", json=body, headers={"X-Request-Id": "order-66"}, timeout=60
    ).raise_for_status()
    assert own.headers["x-request-id"] == "order-66"
    assert own.json()["id"] == "cmpl-order-66"
    fresh = [httpx.get(f"{url}/v1/models", timeout=60).headers["x-request-id"] for _ in range(2)]
    assert fresh[0] != fresh[1]
    refused = httpx.get(f"{url}/nothing", headers={"X-Request-Id": "order-67"}, timeout=60)
    assert refused.headers["x-request-id"] == "order-67"
