import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from malora.training.data import (
    IGNORED,
    CompletionCollator,
    DataError,
    Example,
    LengthGroupedBatches,
    encode_records,
    load_examples,
    parse_task_files,
    read_records,
)

GOOD = b'{"prompt": "a", "completion": " b"}\n'


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{not json}\n", "not JSON at character 2: Expecting property name"),
        (b'["a", "b"]\n', "expected a JSON object, found list"),
        (b'{"completion": "b"}\n', "has no 'prompt'"),
        (b'{"prompt": 3, "completion": "b"}\n', "'prompt' is not a string but int"),
        (b'{"prompt": "a"}\n', "has no 'completion'"),
        (b'{"prompt": "a", "completion": null}\n', "'completion' is not a string but NoneType"),
        (b'{"prompt": "a", "completion": " \\n"}\n', "'completion' is empty"),
        (b'{"prompt": "a\xff", "completion": "b"}\n', "not UTF-8 at byte 14"),
        (b'{"prompt": "\\ud800", "completion": "b"}\n', "'prompt' holds half of a surrogate pair"),
        (b'{"prompt": ' + b"1" * 5000 + b"}\n", "not JSON that can be read"),
        (b"[" * 100_000 + b"\n", "not JSON that can be read"),
    ],
)
def test_bad_line_names_file_line_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_bytes(GOOD + b"\n" + line + GOOD)
    with pytest.raises(DataError) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}:3: {reason}")
    assert (error.value.path, error.value.line) == (path, 3)


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "task.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"task.jsonl: holds no examples$"):
        read_records(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.jsonl: no such file"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_records(tmp_path)


@given(st.lists(st.binary(max_size=40) | st.just(GOOD.strip()), max_size=5))
def test_any_bytes_give_records_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "task.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        records = read_records(path)
    except DataError as caught:
        records, message = [], str(caught)
    assert all(record.completion.strip() for record in records)
    assert records or message.startswith(str(path))


def test_reads_fields_and_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    # U+2028 ends a line for str.splitlines, but not in JSONL.
    rows = [{"prompt": "\u2028x", "completion": "y", "more": 1}, {"prompt": "", "completion": "z"}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    records = read_records(path)
    assert [(r.prompt, r.completion, r.line) for r in records] == [
        ("\u2028x", "y", 1),
        ("", "z", 3),
    ]


def test_encoding_ends_with_eos_and_checks_the_context(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "task.jsonl"
    path.write_bytes(GOOD)
    (example,) = load_examples(path, tokenizer, context=4)
    assert example.prompt_ids == tokenizer("a")["input_ids"]
    assert example.completion_ids == [
        *tokenizer(" b", add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
    with pytest.raises(
        DataError, match=r"task.jsonl:1: is 4 tokens long, but the model's context is 3"
    ):
        load_examples(path, tokenizer, context=3)
    path.write_bytes(b'{"prompt": "", "completion": " b"}\n')
    with pytest.raises(DataError, match=r"task.jsonl:1: 'prompt' gives no token"):
        load_examples(path, tokenizer, context=9)


def test_tokenizer_without_end_of_sequence(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        encode_records([], tokenizer, 9, Path("x"))


def test_collator_labels_completions_alone() -> None:
    batch = CompletionCollator(pad_id=0)(
        [Example([5, 6, 7], [8, 1], "x"), Example([5], [9, 9, 9, 1], "y"), Example([4], [1], "z")]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 1], [5, 9, 9, 9, 1], [4, 1, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1] * 5, [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [
        [IGNORED, IGNORED, IGNORED, 8, 1],
        [IGNORED, 9, 9, 9, 1],
        [IGNORED, 1, IGNORED, IGNORED, IGNORED],
    ]
    assert batch["logits_to_keep"].tolist() == [0, 1, 2, 3]
    assert batch["shift_labels"].tolist() == [
        [IGNORED, IGNORED, 8, 1],
        [9, 9, 9, 1],
        [1, IGNORED, IGNORED, IGNORED],
    ]


def test_loss_is_that_of_plain_labels_and_ignores_padding(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(3)

    def example(prompt: int, completion: int) -> Example:
        ids = torch.randint(2, 200, (prompt + completion,), generator=generator).tolist()
        return Example(ids[:prompt], ids[prompt:], "")

    examples = [example(9, 4), example(2, 7), example(5, 2)]
    collate = CompletionCollator(pad_id=1)
    with torch.no_grad():
        together = model(**collate(examples)).loss
        single = [model(**collate([e])).loss * len(e.completion_ids) for e in examples]
        batch = collate(examples)
        plain = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}).loss
    torch.testing.assert_close(together, sum(single) / sum(len(e.completion_ids) for e in examples))
    torch.testing.assert_close(together, plain)


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=120),
    batch_size=st.integers(1, 6),
    accumulation=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
@settings(max_examples=80)
def test_batches_cover_every_example_once(
    lengths: list[int], batch_size: int, accumulation: int, epoch: int
) -> None:
    def steps(batch: int, accumulate: int) -> list[list[int]]:
        sampler = LengthGroupedBatches(lengths, batch, accumulate, seed=5)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
        assert all(len(b) == batch for b in batches[:-1])
        flat = [i for b in batches for i in b]
        return [flat[i : i + batch * accumulate] for i in range(0, len(flat), batch * accumulate)]

    assert steps(batch_size, accumulation) == steps(batch_size * accumulation, 1)


def test_batches_waste_little_padding_and_change_with_the_epoch() -> None:
    lengths = torch.randint(5, 200, (2000,), generator=torch.Generator().manual_seed(1)).tolist()
    sampler = LengthGroupedBatches(lengths, 16, 1, seed=0)
    first = list(sampler)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in first)
    assert padded < 1.08 * sum(lengths)
    assert first == list(LengthGroupedBatches(lengths, 16, 1, seed=0))
    assert first != list(LengthGroupedBatches(lengths, 16, 1, seed=1))
    sampler.set_epoch(1)
    assert first != list(sampler)


def test_task_files() -> None:
    assert parse_task_files(["b=x/y=z.jsonl", "a=q"]) == {"b": Path("x/y=z.jsonl"), "a": Path("q")}
    for values, reason in [
        (["data.jsonl"], "is not name=file"),
        (["a="], "is not name=file"),
        (["a b=x"], "task name 'a b' may hold"),
        (["a=x", "a=y"], "the task 'a' is given twice"),
    ]:
        with pytest.raises(ValueError, match=reason):
            parse_task_files(values)
