"""The synthetic tasks: the same for a seed, right, disjoint, and unknown to the base model."""

import json
import re
from datetime import date, datetime
from pathlib import Path

import pytest

from malora.base_model import PATH
from malora.training.evaluation import evaluate
from malora.training.synthetic import TASKS, generate, write


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_same_distinct_examples(task: str) -> None:
    pairs = generate(task, 400, seed=3)
    assert pairs == generate(task, 400, seed=3)
    assert len({pair["prompt"] for pair in pairs}) == 400
    shared = {p["prompt"] for p in pairs} & {p["prompt"] for p in generate(task, 400, seed=4)}
    assert len(shared) < 200


@pytest.mark.parametrize("task", TASKS)
def test_validation_shares_no_prompt_with_training(task: str, tmp_path: Path) -> None:
    train, validation = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in write(task, tmp_path / task, 300, 60)
    )
    assert (len(train), len(validation)) == (300, 60)
    assert not {p["prompt"] for p in train} & {p["prompt"] for p in validation}
    for pair in train + validation:
        assert set(pair) == {"prompt", "completion"}
        assert pair["completion"].startswith(" ")
        assert pair["completion"].strip()


def _parse(told: str) -> date:
    """A date in any of the task's spoken forms, read with the standard library."""
    found = re.search(r"([A-Z][a-z]{2,8}) (\d+)(?:st|nd|rd|th)?,? (\d{4})", told)
    if found:
        month, day, year = found.groups()
    else:
        found = re.search(r"(\d+)(?:st|nd|rd|th)?(?: of)? ([A-Z][a-z]{2,8}),? (\d{4})", told)
        assert found, told
        day, month, year = found.groups()
    return datetime.strptime(f"{day} {month[:3]} {year}", "%d %b %Y").date()


def test_dates_are_the_ones_told() -> None:
    for pair in generate("dates", 500, seed=1):
        day = date.fromisoformat(pair["completion"].strip())
        assert _parse(pair["prompt"]) == day
        weekday = re.search(r"\b([A-Z][a-z]+day)\b", pair["prompt"])
        assert weekday is None or weekday[1] == day.strftime("%A")


def test_orders_hold_what_the_sentence_says() -> None:
    words = dict(
        zip(
            "two three four five six seven eight nine ten eleven twelve".split(),  # noqa: SIM905
            range(2, 13),
            strict=True,
        )
    )
    for pair in generate("orders", 500, seed=1):
        order = json.loads(pair["completion"])
        assert list(order) == ["item", "count", "city"]
        assert order["city"] in pair["prompt"]
        assert re.search(rf"\b{order['item']}(e?s)\b", pair["prompt"])
        counts = [words.get(w, int(w) if w.isdigit() else 0) for w in pair["prompt"].split()]
        assert order["count"] in counts


def test_every_team_is_asked_for() -> None:
    teams = {pair["completion"].strip() for pair in generate("routing", 300, seed=1)}
    assert teams == {"account", "billing", "returns", "sales", "shipping", "technical"}


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match=r"'weather'.*dates, orders, routing"):
        generate("weather", 1, seed=0)


@pytest.mark.parametrize("task", TASKS)
def test_the_base_model_alone_cannot_answer(task: str, tmp_path: Path) -> None:
    _, validation = write(task, tmp_path, 1, 60, seed=5)
    score = evaluate(PATH, None, {task: validation}, batch_size=30)[task]
    assert score.exact_match < 0.1
