"""A step that fails: only the sequence that breaks it ends, and nothing stays behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from malora_server.engine.config import EngineConfig
from malora_server.engine.llm import LLM, Generation
from malora_server.engine.messages import SamplingParams

POISON = [9, 9, 9]
GREEDY = SamplingParams(max_tokens=14, seed=0, temperature=0.0, ignore_eos=True)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 0.8, "repetition_penalty": 1.3},
    {"prompt_logprobs": 1, "logprobs": 2},
    {"stop_token_ids": list(range(0, 256, 5))},
]


@pytest.fixture(scope="module")
def config(
    tiny_base: Callable[[str], Path],
    make_adapter: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> EngineConfig:
    root = tmp_path_factory.mktemp("adapters")
    make_adapter(tiny_base("llama"), root / "mine", 1, num_experts=4, top_k=2, r=3, basis_dim=8)
    return EngineConfig(
        base=str(tiny_base("llama")),
        adapters=str(root),
        max_num_batched_tokens=24,  # prompts come in chunks
    )


class Fault:
    """Stands before a method of the engine, and raises where the chunks are as described."""

    def __init__(self, owner: Any, method: str, breaks: Callable[[Any], bool], error: Exception):
        self.raised = 0
        original = getattr(owner, method)

        def faulty(first: Any, *rest: Any) -> Any:
            if breaks(rest[-1] if method == "sample" else first):
                self.raised += 1
                raise error
            return original(first, *rest)

        setattr(owner, method, faulty)


def generate(llm: LLM, poison: bool) -> list[Generation]:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(10, 256, rng.integers(5, 40)).tolist() for _ in range(9)]
    sampling = [
        msgspec.structs.replace(GREEDY, seed=i, **OPTIONS[i % len(OPTIONS)]) for i in range(9)
    ]
    names = ["mine" if i % 2 else None for i in range(9)]
    if poison:
        prompts.insert(4, POISON + prompts[0])
        sampling.insert(4, GREEDY)
        names.insert(4, "mine")
    return llm.generate(prompts, sampling, names)


def check_same(got: list[Generation], want: list[Generation]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.error is None
        assert a.token_ids == b.token_ids
        assert a.finish_reason == b.finish_reason
        assert len(a.prompt_logprobs) == len(b.prompt_logprobs)
        assert len(a.logprobs) == len(b.logprobs)


def check_empty(llm: LLM) -> None:
    stats = llm.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting) == (0, 0)
    assert stats.kv_cache_usage_ratio == 0
    assert not llm._core.has_work


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("where", ["first chunk", "while it generates", "its sampling"])
def test_the_one_that_breaks_a_step_fails_alone(
    config: EngineConfig, where: str, pipelined: bool
) -> None:
    want = generate(LLM(config), poison=False)
    llm = LLM(config)
    llm.generate([[1, 2]], GREEDY, ["mine"])  # the adapter is there: all run from the first step on
    core = llm._core
    core._pipelined = pipelined

    def is_poisoned(chunk: Any) -> bool:
        poisoned = [s for s in core._scheduler._sequences.values() if s.token_ids[:3] == POISON]
        here = any(seq.block_table is chunk.block_table for seq in poisoned)
        return here and (chunk.start == 0 if where == "first chunk" else chunk.start > 30)

    if where == "its sampling":
        fault = Fault(
            core._sampler,
            "sample",
            lambda sequences: any(s.token_ids[:3] == POISON for s in sequences),
            RuntimeError("no"),
        )
    else:
        error = MemoryError() if pipelined else torch.OutOfMemoryError("CUDA out of memory")
        fault = Fault(
            core._runner, "run", lambda chunks: any(is_poisoned(c) for c in chunks), error
        )
    got = generate(llm, poison=True)
    assert fault.raised >= 2, "once with others, once alone"
    failed = got.pop(4)
    assert failed.finish_reason == "error"
    assert "its log" in str(failed.error)
    check_same(got, want)
    check_empty(llm)
    check_same(generate(llm, poison=False), want)


@pytest.mark.parametrize("pipelined", [False, True])
def test_steps_that_are_too_large_for_the_memory_harm_nobody(
    config: EngineConfig, pipelined: bool
) -> None:
    want = generate(LLM(config), poison=False)
    llm = LLM(config)
    llm._core._pipelined = pipelined
    fault = Fault(
        llm._core._runner,
        "run",
        lambda chunks: len(chunks) > 3,
        torch.OutOfMemoryError("CUDA out of memory"),
    )
    check_same(generate(llm, poison=False), want)
    assert fault.raised > 3
    check_empty(llm)


def test_a_device_that_is_lost_ends_the_engine(config: EngineConfig) -> None:
    llm = LLM(config)
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    Fault(llm._core._runner, "run", lambda chunks: True, error)

    def lost() -> None:
        raise error

    llm._core._check_device = lost
    with pytest.raises(RuntimeError, match="illegal memory access"):
        generate(llm, poison=False)
