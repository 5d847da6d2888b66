"""Prompt/completion data: reading JSONL, encoding it, and batching it with little padding.

A prompt is encoded with the tokenizer's default special tokens, a completion without any and
with the end-of-sequence token after it. The server encodes a request's prompt the same way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a position that does not count in the loss."""

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_WINDOW_STEPS = 16
"""Examples are sorted by length within this many optimizer steps: wide enough that a batch's
lengths are close, narrow enough that every step still mixes the tasks."""


class DataError(ValueError):
    """Training or evaluation data that cannot be used; the message names the file and the line."""

    def __init__(self, path: Path, line: int | None, reason: str) -> None:
        super().__init__(f"{path}: {reason}" if line is None else f"{path}:{line}: {reason}")
        self.path = path
        self.line = line
        self.reason = reason


@dataclass(frozen=True)
class Record:
    """One line of a file. `line` counts from 1."""

    prompt: str
    completion: str
    line: int


@dataclass(frozen=True)
class Example:
    """One encoded record; `completion_ids` ends with the end-of-sequence token."""

    prompt_ids: list[int]
    completion_ids: list[int]
    completion: str

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def parse_task_files(values: Sequence[str]) -> dict[str, Path]:
    """Read `name=file` arguments into a mapping, in their order.

    Raises ValueError for a missing `=`, a name that is no plain word, or a name given twice.
    """
    files: dict[str, Path] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or not path:
            raise ValueError(f"{value!r} is not name=file, for example intents=train.jsonl")
        if not _TASK_NAME.fullmatch(name):
            raise ValueError(
                f"the task name {name!r} may hold letters, digits, '.', '_' and '-' alone"
            )
        if name in files:
            raise ValueError(f"the task {name!r} is given twice: put its examples in one file")
        files[name] = Path(path)
    return files


def read_records(path: Path) -> list[Record]:
    """Read a JSONL file of `{"prompt": str, "completion": str}`; other fields and blank lines
    are passed over. Raises DataError at the first line that cannot be used.
    """
    records: list[Record] = []
    try:
        with path.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                if raw.strip():
                    records.append(_parse_record(path, number, raw))
    except FileNotFoundError:
        raise DataError(path, None, "no such file") from None
    except OSError as error:
        raise DataError(path, None, f"cannot be read: {error.strerror}") from None
    if not records:
        raise DataError(path, None, "holds no examples")
    return records


def _parse_record(path: Path, number: int, raw: bytes) -> Record:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(path, number, f"not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise DataError(
            path, number, f"not JSON at character {error.pos + 1}: {error.msg}"
        ) from None
    except (ValueError, RecursionError):
        # An integer of thousands of digits, or brackets nested beyond the parser's depth.
        raise DataError(path, number, "not JSON that can be read") from None
    if not isinstance(value, dict):
        raise DataError(path, number, f"expected a JSON object, found {type(value).__name__}")
    for field in ("prompt", "completion"):
        if field not in value:
            raise DataError(path, number, f"has no {field!r}")
        if not isinstance(value[field], str):
            raise DataError(
                path, number, f"{field!r} is not a string but {type(value[field]).__name__}"
            )
        try:
            value[field].encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(
                path, number, f"{field!r} holds half of a surrogate pair, which is no character"
            ) from None
    if not value["completion"].strip():
        raise DataError(path, number, "'completion' is empty")
    return Record(value["prompt"], value["completion"], number)


def encode_records(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    path: Path,
) -> list[Example]:
    """Encode records for a model that reads at most `context` tokens.

    Raises DataError for a record that is longer than that or whose prompt gives no token, and
    ValueError for a tokenizer without an end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the base model's tokenizer has no end-of-sequence token, so completions cannot end"
        )
    prompts = tokenizer([record.prompt for record in records], verbose=False)["input_ids"]
    completions = tokenizer(
        [record.completion for record in records], add_special_tokens=False, verbose=False
    )["input_ids"]
    examples: list[Example] = []
    for record, prompt_ids, completion_ids in zip(records, prompts, completions, strict=True):
        example = Example(prompt_ids, [*completion_ids, tokenizer.eos_token_id], record.completion)
        if not prompt_ids:
            raise DataError(path, record.line, "'prompt' gives no token to start from")
        if len(example) > context:
            raise DataError(
                path,
                record.line,
                f"is {len(example)} tokens long, but the model's context is {context}",
            )
        examples.append(example)
    return examples


def load_examples(path: Path, tokenizer: PreTrainedTokenizerBase, context: int) -> list[Example]:
    """Read and encode one file; see `read_records` and `encode_records` for the errors."""
    return encode_records(read_records(path), tokenizer, context, path)


@dataclass(frozen=True)
class CompletionCollator:
    """Makes a right-padded batch whose loss and logits cover the completions alone.

    Gives `input_ids`, `attention_mask`, `labels`, each (batch, longest), and for transformers'
    causal models `logits_to_keep`, the positions (K,) from the first to the last that predict a
    completion token, with `shift_labels` (batch, K), what each of them should predict. Keeping
    those logits alone leaves out most of the product with the vocabulary.
    """

    pad_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        longest = max(len(example) for example in examples)
        input_ids = torch.full((len(examples), longest), self.pad_id)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORED)
        for row, example in enumerate(examples):
            start, end = len(example.prompt_ids), len(example)
            input_ids[row, :end] = torch.tensor(example.prompt_ids + example.completion_ids)
            attention_mask[row, :end] = 1
            labels[row, start:end] = input_ids[row, start:end]
        first = min(len(example.prompt_ids) for example in examples)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "logits_to_keep": torch.arange(first - 1, longest - 1),
            "shift_labels": labels[:, first:].contiguous(),
        }


class LengthGroupedBatches(Sampler[list[int]]):
    """Batches of indices of similar length, shuffled anew in every epoch from the seed alone.

    An optimizer step takes `accumulation` consecutive batches. What a step holds depends on
    `batch_size * accumulation` alone, so splitting a batch differently trains the same.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, accumulation: int, seed: int
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.step_size = batch_size * accumulation
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # A string seed keeps (seed, epoch) pairs apart; torch's generator reads 32 bits alone.
        random = Random(f"{self.seed} {self.epoch}")
        order = random.sample(range(len(self.lengths)), len(self.lengths))
        # The step that is not full comes last, or it would shift the boundaries of the others.
        full = len(order) - len(order) % self.step_size
        steps: list[list[int]] = []
        window = self.step_size * _WINDOW_STEPS
        for start in range(0, full, window):
            near = sorted(order[start : min(start + window, full)], key=self.lengths.__getitem__)
            steps += [near[i : i + self.step_size] for i in range(0, len(near), self.step_size)]
        random.shuffle(steps)
        if full < len(order):
            steps.append(sorted(order[full:], key=self.lengths.__getitem__))
        for step in steps:
            for start in range(0, len(step), self.batch_size):
                yield step[start : start + self.batch_size]
