"""What a request's sampling fields do, seen through the whole server."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from malora_client import AsyncClient, Client
from malora_client.types import CompletionChoice
from malora_server.engine.llm import LLM
from malora_server.engine.messages import SamplingParams

MODELS = ["base", "experts", "compact", "dense", "lora"]
PROMPT = "Reverse the word: apple"
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
END = 0
"""The end of the text, as a token."""


def ask(client: Client, **params: Any) -> CompletionChoice:
    fields = {"model": "experts", "prompt": PROMPT, "max_tokens": 16, **params}
    return client.completions.create(**fields).choices[0]


@pytest.mark.parametrize("model", MODELS)
def test_logprobs_are_the_engines_own(client: Client, llm: LLM, model: str) -> None:
    ids = client.tokenize(prompt=PROMPT).tokens
    adapter = None if model == "base" else model
    sampling = SamplingParams(
        max_tokens=8, seed=0, temperature=0, ignore_eos=True, logprobs=3, prompt_logprobs=0
    )
    [want] = llm.generate([ids], sampling, adapter)
    choice = ask(client, model=model, max_tokens=8, logprobs=3, echo=True, **GREEDY)
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(
        [entry.logprob for entry in (*want.prompt_logprobs, *want.logprobs)], abs=1e-4
    )
    tops = choice.logprobs.top_logprobs or []
    for top, entry in zip(tops[-8:], want.logprobs, strict=True):
        assert sorted((top or {}).values(), reverse=True) == pytest.approx(
            entry.top_logprobs, abs=1e-4
        )


def test_echo_repeats_the_prompt_and_its_logprobs_point_into_the_text(client: Client) -> None:
    plain = ask(client, **GREEDY)
    choice = ask(client, echo=True, logprobs=1, **GREEDY)
    assert choice.text == PROMPT + plain.text
    assert choice.logprobs is not None
    offsets = [*choice.logprobs.text_offset, len(choice.text)]
    pieces = [choice.text[a:b] for a, b in itertools.pairwise(offsets)]
    assert pieces == choice.logprobs.tokens
    only = ask(client, echo=True, max_tokens=0, logprobs=1)
    assert only.text == PROMPT
    assert only.logprobs is not None
    count = len(only.logprobs.tokens)
    assert only.logprobs.token_logprobs[1:] == pytest.approx(
        choice.logprobs.token_logprobs[1:count], abs=1e-4
    )


async def test_a_seed_gives_the_same_text_in_any_company(async_client: AsyncClient) -> None:
    async def sample(model: str, seed: int, n: int = 1) -> list[str]:
        reply = await async_client.completions.create(
            model=model, prompt=PROMPT, max_tokens=12, seed=seed, n=n, ignore_eos=True
        )
        return [choice.text for choice in reply.choices]

    alone = [await sample(model, seed) for model in MODELS for seed in (1, 2)]
    crowd = [sample(model, seed) for model in MODELS for seed in (1, 2)]
    together = await asyncio.gather(*crowd, sample("experts", 9), sample("lora", 9))
    assert together[:-2] == alone
    assert len({texts[0] for texts in alone}) == len(alone)
    several = await sample("experts", 5, n=4)
    assert len(set(several)) == 4
    assert await sample("experts", 5, n=4) == several


def test_what_leaves_one_token_to_choose_from_is_greedy(client: Client) -> None:
    want = ask(client, **GREEDY).text
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert ask(client, temperature=1.5, seed=4, ignore_eos=True, **narrow).text == want
    assert ask(client, temperature=1.5, seed=4, ignore_eos=True).text != want


def test_n_choices_count_their_prompt_once(client: Client) -> None:
    reply = client.completions.create(
        model="dense", prompt=[PROMPT, "SELECT"], n=3, max_tokens=5, seed=1, ignore_eos=True
    )
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 30
    counts = [client.tokenize(prompt=prompt).count for prompt in (PROMPT, "SELECT")]
    assert reply.usage.prompt_tokens == sum(counts)


@pytest.mark.parametrize("model", ["base", "experts", "lora"])
def test_a_stop_string_ends_the_text_before_itself(client: Client, model: str) -> None:
    text = ask(client, model=model, max_tokens=24, **GREEDY).text
    stop = text[7:11]  # across tokens, most likely
    end = text.index(stop)
    choice = ask(client, model=model, max_tokens=24, stop=[stop, "never said"], **GREEDY)
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (text[:end], "stop", stop)
    kept = ask(
        client, model=model, max_tokens=24, stop=stop, include_stop_str_in_output=True, **GREEDY
    )
    assert kept.text == text[:end] + stop


def test_a_stop_token_ends_the_text(
    client: Client, greedy: Callable[[list[Any], list[str], int], list[Any]]
) -> None:
    ids = greedy([PROMPT], ["experts"], 24)[0].token_ids
    stop = next(token for i, token in enumerate(ids) if i > 2 and token not in ids[:i])
    at = ids.index(stop)
    reply = client.completions.create(
        model="experts", prompt=PROMPT, max_tokens=24, stop_token_ids=[stop], **GREEDY
    )
    choice = reply.choices[0]
    assert choice.text == client.detokenize(tokens=ids[:at]).prompt
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert reply.usage is not None
    assert reply.usage.completion_tokens == at + 1


def test_min_and_max_tokens_bound_the_reply(client: Client) -> None:
    eager = {"logit_bias": {END: 100.0}, "temperature": 0}
    choice = ask(client, **eager)
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("", "stop", None)
    reply = client.completions.create(
        model="experts", prompt=PROMPT, max_tokens=16, min_tokens=5, **eager
    )
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 6
    assert reply.choices[0].text == ask(client, max_tokens=5, **GREEDY).text
    assert ask(client, max_tokens=3, **GREEDY).finish_reason == "length"


def test_logit_bias_forces_and_forbids(client: Client) -> None:
    [word] = client.tokenize(prompt=" the").tokens
    assert ask(client, logit_bias={word: 100}, **GREEDY).text == " the" * 16
    first = ask(client, max_tokens=1, logprobs=0, **GREEDY).text
    [first_id] = client.tokenize(prompt=first).tokens
    assert ask(client, max_tokens=1, logit_bias={first_id: -100}, **GREEDY).text != first


@pytest.mark.parametrize(
    "penalty", [{"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"repetition_penalty": 1.8}]
)
def test_penalties_make_a_loop_wander(client: Client, penalty: dict[str, float]) -> None:
    def repeats(**params: float) -> int:
        choice = ask(client, model="base", max_tokens=32, logprobs=0, **GREEDY, **params)
        assert choice.logprobs is not None
        return sum(count - 1 for count in Counter(choice.logprobs.tokens).values())

    assert repeats() > 16
    assert repeats(**penalty) < repeats() - 8
