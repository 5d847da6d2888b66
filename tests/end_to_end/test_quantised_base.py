"""A quantised base over HTTP: every adapter in one batch, as the engine in this process says."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import openai
import pytest

from malora.base_model import PATH as BASE
from malora_client import BadRequestError, Client
from malora_server.engine.config import EngineConfig
from malora_server.engine.llm import LLM
from malora_server.engine.messages import SamplingParams

MODELS = ["base", "experts", "compact", "dense", "lora"]
PROMPT = "Question: What is 12 + 30?\nAnswer:"


@pytest.fixture(scope="module")
def quantised(serve: Callable[..., AbstractContextManager[str]], adapters: Path) -> Iterator[str]:
    flags = ("--base", BASE, "--served-model-name", "base", "--adapters", adapters)
    with serve(*flags, "--quantization", "int8", "--kv-cache-memory", "64MiB") as url:
        yield url


async def test_every_adapter_on_a_quantised_base_in_one_batch(
    quantised: str, adapters: Path, llm: LLM
) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{quantised}/v1", api_key="none", max_retries=0
    ) as client:
        replies = await asyncio.gather(
            *(
                client.completions.create(
                    model=model,
                    prompt=PROMPT,
                    max_tokens=24,
                    temperature=0,
                    logprobs=0,
                    extra_body={"ignore_eos": True},
                )
                for model in MODELS
            )
        )
    got = [reply.choices[0] for reply in replies]
    sampling = SamplingParams(max_tokens=24, seed=0, temperature=0, ignore_eos=True, logprobs=0)
    names = [None, *MODELS[1:]]
    same = LLM(EngineConfig(base=str(BASE), adapters=str(adapters), quantization="int8"))
    for choice, want in zip(got, same.generate([PROMPT] * 5, sampling, names), strict=True):
        assert choice.text == want.text
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == pytest.approx(
            [x.logprob for x in want.logprobs], abs=2e-3
        )
    # It is the quantised base that answered: the other one's numbers are near, and not the same.
    for choice, other in zip(got, llm.generate([PROMPT] * 5, sampling, names), strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        change = abs(choice.logprobs.token_logprobs[0] - other.logprobs[0].logprob)
        assert 1e-5 < change < 0.2


def test_adapters_are_told_from_another_base_s_as_ever(quantised: str) -> None:
    with Client(base_url=quantised, max_retries=0) as client:
        client.completions.create(model="experts", prompt=PROMPT, max_tokens=1)
        with pytest.raises(BadRequestError) as caught:
            client.completions.create(model="stranger", prompt=PROMPT, max_tokens=1)
    assert caught.value.code == "adapter_base_mismatch"
