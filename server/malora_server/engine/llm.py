"""The same engine in this process, for scripts and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from transformers import AutoTokenizer

from malora_server.adapters.catalog import Catalog
from malora_server.engine.config import EngineConfig
from malora_server.engine.core import EngineCore
from malora_server.engine.messages import (
    AdapterVersion,
    EngineStats,
    FinishReason,
    RetireAdapter,
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
    error_code: str | None = None
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    routing: list[TokenRouting] = field(default_factory=list)

    def add(self, output: SequenceOutput) -> None:
        """Take in one step's output."""
        self.token_ids.extend(output.token_ids)
        self.finish_reason = output.finish_reason
        self.error, self.error_code = output.error, output.error_code
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self.logprobs.extend(output.logprobs or [])
        self.prompt_logprobs.extend(output.prompt_logprobs or [])
        self.routing.extend(output.routing or [])


class LLM:
    """One base model and its adapters, without a server."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises OSError or ValueError where the base model or the adapters folder is missing."""
        self.tokenizer = AutoTokenizer.from_pretrained(config.base)
        root = None if config.adapters is None else Path(config.adapters)
        if root is not None and not root.is_dir():
            raise FileNotFoundError(f"the adapters folder {str(root)!r} does not exist")
        self._catalog = Catalog(root)
        self._versions: dict[str, AdapterVersion] = {}
        self._core = EngineCore(config)
        self._ids = count()

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that are in the folder now."""
        return self._catalog.names()

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
                adapter=None if adapter is None else self._version(adapter),
            )
            generation = generations[submit.request_id] = Generation(ids)
            failure = self._core.add(submit)
            if failure is not None:
                generation.add(failure)
        while self._core.has_work:
            if not self._core.is_runnable:
                self._core.wait(1.0)
            for output in self._core.step().outputs:
                generations[output.request_id].add(output)
        for generation in generations.values():
            generation.text = self.tokenizer.decode(generation.token_ids, skip_special_tokens=True)
        return list(generations.values())

    def _version(self, name: str) -> AdapterVersion:
        """What lies under the adapter's name now; what lay there before is given up."""
        version = self._catalog.version(name)
        known = self._versions.get(name)
        if known is not None and known != version:
            self._core.manage(RetireAdapter(known))
        self._versions[name] = version
        return version
