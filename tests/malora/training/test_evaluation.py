import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from malora.config import MaloraConfig
from malora.format import AdapterFormatError
from malora.training.data import Example
from malora.training.evaluation import evaluate, generate_texts, score_tasks, score_tokens


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture
def model(tiny_base: Path) -> Any:
    """An adapted model whose adapter does something, in float64 so that batching cannot matter."""
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64)
    config = MaloraConfig(r=2, num_experts=3, top_k=1, basis_dim=8, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config).double()
    generator = torch.Generator().manual_seed(11)
    for name, parameter in adapted.named_parameters():
        if ".malora_up." in name:
            parameter.data = 0.3 * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
    return adapted


def prompts_of(lengths: list[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 258, (n,), generator=generator).tolist() for n in lengths]


def greedy(model: Any, prompt: list[int], limit: int, ends: set[int]) -> list[int]:
    written: list[int] = []
    with torch.no_grad():
        while len(written) < limit:
            token = int(model(input_ids=torch.tensor([prompt + written])).logits[0, -1].argmax())
            if token in ends:
                break
            written.append(token)
    return written


def test_generation_is_plain_greedy(model: Any, tokenizer: Any) -> None:
    model.eval()
    prompts = prompts_of([3, 17, 1, 9, 5, 30, 2], seed=1)
    free = [greedy(model, prompt, 12, set()) for prompt in prompts]
    # Tokens that some of the texts reach, at different places, end them.
    ends = {tokenizer.eos_token_id, free[0][4], free[3][0], free[5][7]}
    base = model.get_base_model()
    # A base's own sampling defaults are not what a request at temperature 0 gets.
    base.generation_config.update(
        eos_token_id=sorted(ends), repetition_penalty=9.0, do_sample=True, temperature=5.0
    )
    settings = base.generation_config
    model.train()
    done: list[int] = []
    texts = generate_texts(model, tokenizer, prompts, 3, 12, done.append)
    assert done == [3, 3, 1]
    assert model.training
    assert base.generation_config is settings
    model.eval()
    expected = [greedy(model, prompt, 12, ends) for prompt in prompts]
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert len({len(ids) for ids in expected}) > 2


def test_generation_stops_where_the_context_is_full(model: Any, tokenizer: Any) -> None:
    prompts = prompts_of([93, 4], seed=2)
    model.eval()
    model.get_base_model().generation_config.eos_token_id = 1
    texts = generate_texts(model, tokenizer, prompts, 2, 10, lambda _: None)
    for prompt, text, room in zip(prompts, texts, (3, 10), strict=True):
        assert text == tokenizer.decode(greedy(model, prompt, room, {1}), skip_special_tokens=True)


def test_token_score_by_hand(model: Any) -> None:
    model.eval()
    rows = prompts_of([12, 7, 20, 5], seed=3)
    examples = [Example(row[: 2 + i], row[2 + i :], "") for i, row in enumerate(rows)]
    loss, right, count = 0.0, 0, 0
    for example in examples:
        ids = example.prompt_ids + example.completion_ids
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        for i in range(len(example.prompt_ids), len(ids)):
            loss -= float(torch.log_softmax(logits[i - 1], -1)[ids[i]])
            right += int(logits[i - 1].argmax()) == ids[i]
            count += 1
    # One position that is certainly right, so that the accuracy is not 0.
    first = examples[0]
    with torch.no_grad():
        likeliest = int(model(input_ids=torch.tensor([first.prompt_ids])).logits[0, -1].argmax())
    sure = Example(first.prompt_ids, [likeliest], "")
    for batch_size in (1, 3):
        score = score_tokens(model, examples, batch_size, 1, lambda _: None)
        assert score.tokens == count
        assert score.loss == pytest.approx(loss / count, rel=1e-5)
        assert score.accuracy == right / count
        both = score_tokens(model, [*examples, sure], batch_size, 0, lambda _: None)
        assert both.accuracy == (right + 1) / (count + 1)


def test_exact_match_ignores_outer_space_alone(model: Any, tokenizer: Any) -> None:
    model.eval()
    (prompt,) = prompts_of([6], seed=4)
    text = tokenizer.decode(greedy(model, prompt, 5, {1}), skip_special_tokens=True)
    assert text.strip()
    ids = [0] * 5
    tasks = {
        "same": [Example(prompt, ids, f"  {text}\n")],
        "half": [Example(prompt, ids, text), Example(prompt, ids, text + "x")],
        "case": [Example(prompt, ids, text.swapcase() + "!")],
    }
    scores = score_tasks(model, tokenizer, tasks, 4)
    assert {name: score.exact_match for name, score in scores.items()} == {
        "same": 1.0,
        "half": 0.5,
        "case": 0.0,
    }
    assert scores["half"].examples == 2
    assert scores["half"].max_new_tokens == 5


def write_data(path: Path, count: int) -> Path:
    rows = [{"prompt": f"{i}+{i}=", "completion": f" {2 * i}"} for i in range(count)]
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    return path


def test_limit_and_the_base_alone(tiny_base: Path, tmp_path: Path) -> None:
    data = {"sums": write_data(tmp_path / "sums.jsonl", 9)}
    all_of_them = evaluate(tiny_base, None, data)["sums"]
    assert all_of_them.examples == 9
    assert all_of_them.base is None
    three = {"sums": write_data(tmp_path / "three.jsonl", 3)}
    limited = evaluate(tiny_base, None, data, limit=3)
    assert limited == evaluate(tiny_base, None, three)


def test_refusals(tiny_base: Path, tmp_path: Path, model: Any) -> None:
    data = {"sums": write_data(tmp_path / "sums.jsonl", 2)}
    with pytest.raises(ValueError, match=r"there is no base model at .*nowhere"):
        evaluate(tmp_path / "nowhere", None, data)
    with pytest.raises(AdapterFormatError, match="no adapter folder"):
        evaluate(tiny_base, tmp_path / "none", data)
    model.float().save_pretrained(tmp_path / "adapter")
    assert evaluate(tiny_base, tmp_path / "adapter", data)["sums"].examples == 2
    other = AutoModelForCausalLM.from_pretrained(tiny_base)
    other.get_input_embeddings().weight.data += 0.5
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterFormatError, match="names another base model"):
        evaluate(tmp_path / "other", tmp_path / "adapter", data)
