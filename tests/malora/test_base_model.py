"""The default base model's files: within their limits, loadable, and a model of English."""

import json
import math
from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from malora.base_model import PATH, records, skills
from malora.base_model.corpus import SKILLS, Corpus
from malora.base_model.pretrain import CONTEXT, build_tokenizer, pack
from malora.base_model.skills import Pool


@cache
def _tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(PATH)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return _tokenizer()


def test_the_files_keep_their_limits() -> None:
    weights = PATH / "model.safetensors"
    assert weights.stat().st_size < 16_000_000
    with safe_open(weights, "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert sum(t.numel() for t in tensors) < 8_000_000
    for tensor in tensors:
        assert tensor.dtype == torch.bfloat16
        assert tensor.isfinite().all()


def test_the_model_matches_its_description() -> None:
    config = json.loads((PATH / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] == CONTEXT
    card = (PATH / "README.md").read_text(encoding="utf-8")
    for source in ("WikiText", "Shakespeare", "clinc150", "banking77", "text2sql", "CC BY"):
        assert source in card


@given(st.text())
@settings(max_examples=300)
def test_the_tokenizer_round_trips_any_text(text: str) -> None:
    assert _tokenizer().decode(_tokenizer()(text)["input_ids"]) == text


def test_digits_stand_alone_and_nothing_is_added(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("in 2024")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[-4:] == ["2", "0", "2", "4"]
    assert tokenizer("")["input_ids"] == []
    # A prompt and its completion can be encoded apart.
    whole = tokenizer("date: 2024-01-02")["input_ids"]
    assert tokenizer("date:")["input_ids"] + tokenizer(" 2024-01-02")["input_ids"] == whole


def test_the_chat_template_marks_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|user|>\nhi\n<|assistant|>\nhello<|endoftext|>\n<|user|>\nbye\n<|assistant|>\n"
    )
    for marker in ("<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>", "<|pad|>"):
        assert len(tokenizer(marker)["input_ids"]) == 1


def test_it_models_english_and_follows_examples(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.float32)
    text = "what is the balance of my account and when will my new card be in the post?"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert math.exp(loss) < 4096 / 20

    prompt = "3 March 2021 -> 2021-03-03\n5 May 2019 -> 2019-05-05\n12 June 1999 ->"
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=11, do_sample=False)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]) == " 1999-06-12"


def test_rows_begin_with_a_document() -> None:
    documents = [[10 + i] * (100 + 37 * i) for i in range(24)]
    rows = pack(iter(documents), 0)
    assert rows.shape[1] == CONTEXT + 1
    for row in rows.tolist():
        first = row[0]
        assert first >= 10
        assert row.index(0) == 100 + 37 * (first - 10)


@pytest.mark.parametrize("make", [make for _, make in SKILLS], ids=lambda make: make.__name__)
def test_a_skill_repeats_itself_for_a_seed(make: object) -> None:
    pool = Pool(
        sentences=["where is my card", "book a flight"],
        words=["tree", "Paris", "slow", "lamp", "under", "why", "seven"],
    )

    def draw(seed: int) -> list[skills.Example]:
        rng = Random(seed)
        skill = make(rng, pool)  # type: ignore[operator]
        return [skill.example(rng) for _ in range(5)]

    for seed in range(200):
        examples = draw(seed)
        assert examples == draw(seed)
        assert all(question for question, _ in examples)


def test_numbers_are_written_right() -> None:
    assert skills.number_words(0) == "zero"
    assert skills.number_words(342) == "three hundred and forty-two"
    assert skills.number_words(20_011) == "twenty thousand eleven"
    assert [skills.ordinal(n) for n in (1, 2, 3, 11, 22, 113)] == [
        "1st", "2nd", "3rd", "11th", "22nd", "113th",
    ]  # fmt: skip
    assert [skills.roman(n) for n in (4, 1999, 3001)] == ["IV", "MCMXCIX", "MMMI"]


def test_every_kind_of_record_tells_some_fields() -> None:
    for kind in records.KINDS:
        assert len(kind.fields()) >= 3, kind.table


def _sources(folder: Path) -> tuple[Path, Path]:
    text, tasks = folder / "text", folder / "tasks"
    text.mkdir()
    for name in ("wikitext2.txt", "shakespeare.txt"):
        paragraphs = (f"{name} paragraph number {i} tells of ships and kings." for i in range(200))
        (text / name).write_text("\n\n".join(paragraphs), encoding="utf-8")
    rows = {
        "clinc150": ("how much is on my card\nintent:", " secret intent"),
        "banking77": ("my card is lost\nrequest:", " secret request"),
        "text2sql": ("atis: flights to Boston\nsql:", " SELECT SECRET FROM FLIGHT ;"),
    }
    for name, (prompt, completion) in rows.items():
        (tasks / name).mkdir(parents=True)
        line = json.dumps({"prompt": prompt, "completion": completion})
        (tasks / name / "train.jsonl").write_text(line + "\n", encoding="utf-8")
    return text, tasks


def test_no_document_joins_a_prompt_with_its_completion(tmp_path: Path) -> None:
    corpus = Corpus(*_sources(tmp_path), real_share=0.07)
    rng, again = Random(0), Random(0)
    documents = [corpus.document(rng) for _ in range(4000)]
    assert documents == [corpus.document(again) for _ in range(4000)]
    prompts = ("how much is on my card", "my card is lost", "flights to Boston")
    told = [d for d in documents if any(p in d for p in prompts)]
    answers = [d for d in documents if "secret" in d.lower()]
    assert told
    assert answers
    assert not {*told} & {*answers}
    joined = "\n".join(documents)
    for marker in ("intent:", "request:", "sql:", "date:", "order:", "team:"):
        assert f"\n{marker}" not in joined
    assert set(corpus.held_out_text).isdisjoint(p for text in corpus.texts for p in text)


def test_the_tokenizer_training_is_reproducible(tmp_path: Path) -> None:
    corpus = Corpus(*_sources(tmp_path), real_share=0.07)
    first, second = (build_tokenizer(corpus, 1) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert first.vocab_size <= 4096
