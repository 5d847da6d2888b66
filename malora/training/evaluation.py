"""Scoring an adapter, task by task: exact match of what it writes, and accuracy token by token.

The exact-match score is what a server gives at temperature 0: the prompt is encoded with the
tokenizer's default special tokens (as in training), the model writes greedily until an
end-of-sequence token or `max_new_tokens`, special tokens are left out of the text, and the text
counts as right if it equals the reference after both are stripped of outer white space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from malora.format import BaseModelSpec, load_adapter
from malora.training.base import (
    Precision,
    context_length,
    load_model,
    load_tokenizer,
    padding_id,
)
from malora.training.data import IGNORED, CompletionCollator, Example, load_examples
from malora.training.progress import ProgressReport

Model: TypeAlias = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class TokenScore:
    """How well a model predicts the reference completions, each token given those before it.

    `loss` is the mean negative log-likelihood in nats and `accuracy` the share of tokens that
    were the likeliest, both over all completion tokens with the end of sequence.
    """

    loss: float
    accuracy: float
    tokens: int


@dataclass(frozen=True)
class Score:
    """One task's score. `base` is the base model's own on the same examples, where asked for."""

    examples: int
    exact_match: float
    token_accuracy: float
    loss: float
    max_new_tokens: int
    base: Score | None = None


def evaluate(
    base: str | Path,
    adapter: str | Path | None,
    files: Mapping[str, Path],
    *,
    batch_size: int = 32,
    limit: int | None = None,
    compare_base: bool = False,
    precision: Precision = "auto",
) -> dict[str, Score]:
    """Score an adapter folder (None: the base model alone) on each task's JSONL file.

    `limit` takes the first examples of each file alone. Raises DataError for a file that cannot
    be used, ValueError for a base model that cannot be loaded, and AdapterFormatError for an
    adapter that is malformed or made for another base model.
    """
    tokenizer, config = load_tokenizer(base)
    context = context_length(config)
    tasks = {name: load_examples(path, tokenizer, context)[:limit] for name, path in files.items()}
    model: Model = load_model(base, precision)
    if adapter is not None:
        load_adapter(adapter, BaseModelSpec.from_model(model))  # says what is wrong, PEFT may not
        model = PeftModel.from_pretrained(model, adapter).eval()
    scores = score_tasks(model, tokenizer, tasks, batch_size)
    if adapter is None or not compare_base:
        return scores
    with model.disable_adapter():
        alone = score_tasks(model, tokenizer, tasks, batch_size, "base ")
    return {name: replace(score, base=alone[name]) for name, score in scores.items()}


def score_tasks(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[Example]],
    batch_size: int,
    title: str = "",
) -> dict[str, Score]:
    """Score a model in memory on encoded examples, a progress bar for each task."""
    scores: dict[str, Score] = {}
    for name, examples in tasks.items():
        max_new_tokens = max(len(example.completion_ids) for example in examples)
        with ProgressReport(f"scoring {title}{name}", 2 * len(examples)) as progress:
            tokens = score_tokens(
                model, examples, batch_size, padding_id(tokenizer), progress.advance
            )
            texts = generate_texts(
                model,
                tokenizer,
                [example.prompt_ids for example in examples],
                batch_size,
                max_new_tokens,
                progress.advance,
            )
            right = sum(
                text.strip() == example.completion.strip()
                for text, example in zip(texts, examples, strict=True)
            )
            scores[name] = Score(
                len(examples),
                right / len(examples),
                tokens.accuracy,
                tokens.loss,
                max_new_tokens,
            )
            progress.note(f"exact match {scores[name].exact_match:.1%}")
    return scores


@torch.no_grad()
def score_tokens(
    model: Model,
    examples: Sequence[Example],
    batch_size: int,
    pad_id: int,
    on_batch: Callable[[int], None],
) -> TokenScore:
    """Predict every completion token from the reference before it; leaves the mode as it was.

    `on_batch` is told how many examples each batch held.
    """
    collate = CompletionCollator(pad_id)
    loss = correct = tokens = 0.0
    training = model.training
    model.eval()
    for batch in _by_length([len(example) for example in examples], batch_size):
        inputs = collate([examples[i] for i in batch])
        targets = inputs.pop("shift_labels").to(model.device)
        del inputs["labels"]
        logits = model(**{name: value.to(model.device) for name, value in inputs.items()}).logits
        counted = targets != IGNORED
        losses = functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction="sum"
        )
        loss += losses.item()
        correct += (logits.argmax(-1) == targets)[counted].sum().item()
        tokens += counted.sum().item()
        on_batch(len(batch))
    model.train(training)
    return TokenScore(loss / tokens, correct / tokens, int(tokens))


@torch.no_grad()
def generate_texts(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    batch_size: int,
    max_new_tokens: int,
    on_batch: Callable[[int], None],
) -> list[str]:
    """Continue token ids greedily, in left-padded batches; the texts in the prompts' order.

    A text ends before the first end-of-sequence token (any that the model's generation settings
    name, else the tokenizer's), at `max_new_tokens`, or where the model's
    context is full. `on_batch` is told how many prompts each batch held.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    context = context_length(inner.config)
    generation = inner.generation_config
    named = generation.eos_token_id
    if named is None:
        named = tokenizer.eos_token_id
    ends = set(named if isinstance(named, list) else [named])
    texts = [""] * len(prompts)
    training = model.training
    model.eval()
    # A base model's own sampling defaults (penalties, forced tokens) are no part of the score.
    inner.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=padding_id(tokenizer),
    )
    try:
        for batch in _by_length([len(prompt) for prompt in prompts], batch_size):
            rows = [prompts[i] for i in batch]
            input_ids, attention_mask = _pad_left(rows, padding_id(tokenizer))
            output = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
            )
            for i, written in zip(batch, output[:, input_ids.shape[1] :].tolist(), strict=True):
                room = context - len(prompts[i])
                end = next((j for j, token in enumerate(written) if token in ends), len(written))
                texts[i] = tokenizer.decode(written[: min(end, room)], skip_special_tokens=True)
            on_batch(len(batch))
    finally:
        inner.generation_config = generation
        model.train(training)
    return texts


def _pad_left(rows: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, longest - len(row) :] = torch.tensor(row)
        attention_mask[i, longest - len(row) :] = 1
    return input_ids, attention_mask


def _by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, the longest first: memory runs out at once or never."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
