"""The same engine in this process, for scripts and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from transformers import AutoTokenizer

from malora_server.engine.config import EngineConfig
from malora_server.engine.core import EngineCore
from malora_server.engine.messages import (
    AdapterInfo,
    EngineStats,
    FinishReason,
    SamplingParams,
    SequenceOutput,
    Submit,
    TokenLogprobs,
    TokenRouting,
)


@dataclass
class Generation:
    """What one prompt became."""

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    routing: list[TokenRouting] = field(default_factory=list)

    def add(self, output: SequenceOutput) -> None:
        """Take in one step's output."""
        self.token_ids.extend(output.token_ids)
        self.finish_reason, self.error = output.finish_reason, output.error
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self.logprobs.extend(output.logprobs or [])
        self.prompt_logprobs.extend(output.prompt_logprobs or [])
        self.routing.extend(output.routing or [])


class LLM:
    """One base model and its adapters, without a server."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises OSError or ValueError where the base model or the adapters folder is missing."""
        self.tokenizer = AutoTokenizer.from_pretrained(config.base)
        self._core = EngineCore(config)
        self._ids = count()

    @property
    def adapters(self) -> list[AdapterInfo]:
        """The adapters that were found, the broken ones with their reason."""
        return self._core.ready.adapters

    def stats(self) -> EngineStats:
        """The engine's counters."""
        return self._core.stats()

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
        adapters: str | Sequence[str | None] | None = None,
    ) -> list[Generation]:
        """Complete all prompts in one continuous batch.

        prompts: texts or token ids. sampling and adapters: one for all, or one for each prompt
        (None: the base model alone). A prompt that cannot be served has `error` set; the others
        are unharmed.
        """
        each_sampling = (
            [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        )
        each_adapter = (
            [adapters] * len(prompts) if adapters is None or isinstance(adapters, str) else adapters
        )
        generations: dict[str, Generation] = {}
        for prompt, params, adapter in zip(prompts, each_sampling, each_adapter, strict=True):
            ids = self.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
            submit = Submit(
                request_id=str(next(self._ids)),
                prompt_token_ids=ids,
                sampling=params,
                adapter=adapter,
                digest=self._digest(adapter),
            )
            generation = generations[submit.request_id] = Generation(ids)
            failure = self._core.add(submit)
            if failure is not None:
                generation.add(failure)
        while self._core.has_work:
            for output in self._core.step().outputs:
                generations[output.request_id].add(output)
        for generation in generations.values():
            generation.text = self.tokenizer.decode(generation.token_ids, skip_special_tokens=True)
        return list(generations.values())

    def _digest(self, adapter: str | None) -> str | None:
        return next((info.digest for info in self.adapters if info.name == adapter), None)
