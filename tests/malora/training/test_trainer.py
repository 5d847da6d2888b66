import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from malora.basis import load_basis
from malora.config import MaloraConfig
from malora.format import load_adapter
from malora.training import trainer as trainer_module
from malora.training.data import DataError
from malora.training.evaluation import evaluate
from malora.training.trainer import TrainSettings, train

ADAPTER = MaloraConfig(r=4, num_experts=4, top_k=2, basis_dim=16, lora_alpha=16)
COLOURS = {"sky": "blue", "grass": "green", "coal": "black", "snow": "white", "blood": "red"}


def write_task(path: Path, rows: list[tuple[str, str]]) -> Path:
    lines = (json.dumps({"prompt": prompt, "completion": text}) for prompt, text in rows)
    path.write_text("\n".join(lines), "utf-8")
    return path


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [(f"{thing}\ncolour:", f" {colour}") for thing, colour in COLOURS.items()]
    return write_task(tmp_path_factory.mktemp("data") / "colours.jsonl", rows)


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        (f"{a}+{b} and more" * (a % 3 + 1) + "=", f"{a + b}") for a in range(5) for b in range(4)
    ]
    return write_task(tmp_path_factory.mktemp("data") / "sums.jsonl", rows)


def settings(base: Path, out: Path, data: dict[str, Path], **changes: Any) -> TrainSettings:
    given = {"adapter": ADAPTER, "max_steps": 6, "batch_size": 4, "learning_rate": 5e-3}
    return TrainSettings(base=base, out=out, data=data, **(given | changes))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_learns_a_task_by_heart(tiny_base: Path, tmp_path: Path, colours: Path) -> None:
    result = train(
        settings(
            tiny_base,
            tmp_path / "out",
            {"colours": colours},
            eval_data={"colours": colours},
            max_steps=150,
            batch_size=5,
            learning_rate=1e-2,
        )
    )
    assert result.steps == 150
    assert result.scores["colours"].exact_match == 1.0
    assert result.scores["colours"].token_accuracy == 1.0

    again = evaluate(tiny_base, result.out, {"colours": colours}, compare_base=True)["colours"]
    assert dataclasses.replace(again, base=None) == result.scores["colours"]
    assert again.base is not None
    assert again.base.exact_match == 0.0
    alone = evaluate(tiny_base, None, {"colours": colours})["colours"]
    assert alone == again.base

    card = (result.out / "README.md").read_text("utf-8")
    assert "| colours | 5 | 5 | 100.0% | 100.0% |" in card
    metrics = json.loads((result.out / "training_metrics.json").read_text("utf-8"))
    assert metrics["tasks"]["colours"]["score"]["exact_match"] == 1.0
    assert metrics["settings"]["learning_rate"] == 1e-2
    assert {path.name for path in result.out.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "training_metrics.json",
    }
    assert str(tmp_path) not in card + json.dumps(metrics)
    trained = load_adapter(result.out)
    assert trained.num_parameters == result.trainable_parameters


def test_the_same_seed_gives_the_same_bits(
    tiny_base: Path, tmp_path: Path, colours: Path, sums: Path
) -> None:
    data = {"colours": colours, "sums": sums}
    adapter = dataclasses.replace(ADAPTER, lora_dropout=0.1)
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        train(settings(tiny_base, tmp_path / name, data, seed=seed, adapter=adapter))
    assert_same(tmp_path / "a", tmp_path / "b")
    configs = [(tmp_path / name / "adapter_config.json").read_bytes() for name in "ab"]
    assert configs[0] == configs[1]
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "a", tmp_path / "c")


class Crash(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 8:
            raise KeyboardInterrupt


def test_resumed_run_equals_an_uninterrupted_one(
    tiny_base: Path, tmp_path: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: str, **changes: Any) -> TrainSettings:
        given: dict[str, Any] = {
            "adapter": dataclasses.replace(ADAPTER, lora_dropout=0.1),
            "max_steps": 12,
            "accumulation": 2,
            "batch_size": 2,
            "checkpoint_every": 3,
            "eval_fraction": 0.2,
            "eval_every": 4,
        }
        return settings(tiny_base, tmp_path / out, {"sums": sums}, **(given | changes))

    train(run("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module._Report, "on_step_end", Crash.on_step_end)
        with pytest.raises(KeyboardInterrupt):
            train(run("cut"))
    # A checkpoint whose writing was cut short must not be taken for the last one.
    (tmp_path / "cut/checkpoints/checkpoint-7").mkdir()

    with pytest.raises(ValueError, match=r"had another seed, learning_rate: resume it with"):
        train(run("cut", resume=True, learning_rate=1e-4, seed=1))
    with pytest.raises(ValueError, match="already holds an adapter or checkpoints of one"):
        train(run("cut"))
    result = train(run("cut", resume=True))
    assert result.steps == 12
    assert_same(tmp_path / "whole", tmp_path / "cut")
    log = json.loads((tmp_path / "cut/training_metrics.json").read_text())["log"]
    assert [entry["step"] for entry in log if "eval_sums_token_accuracy" in entry] == [4, 8, 12]


def test_accumulation_equals_the_big_batch(
    tiny_base: Path, tmp_path: Path, colours: Path, sums: Path
) -> None:
    data = {"colours": colours, "sums": sums}
    plain = dataclasses.replace(ADAPTER, router_aux_loss_coef=0.0)
    for name, batch_size, accumulation in [("big", 8, 1), ("parts", 2, 4)]:
        train(
            settings(
                tiny_base,
                tmp_path / name,
                data,
                adapter=plain,
                batch_size=batch_size,
                accumulation=accumulation,
                max_steps=5,
            )
        )
    big, parts = weights(tmp_path / "big"), weights(tmp_path / "parts")
    for name in big:
        torch.testing.assert_close(parts[name], big[name], rtol=2e-3, atol=2e-4)


def test_family_shares_its_basis_bit_for_bit(
    tiny_base: Path, tmp_path: Path, colours: Path, sums: Path
) -> None:
    first = dataclasses.replace(ADAPTER, target_modules=["q_proj", "down_proj"])
    train(settings(tiny_base, tmp_path / "first", {"colours": colours}, adapter=first))
    for name, data in [("second", sums), ("third", colours)]:
        # The basis brings its own d and its own modules along.
        other = MaloraConfig(r=2, num_experts=3, top_k=1, basis_dim=5)
        train(
            settings(
                tiny_base, tmp_path / name, {"t": data}, adapter=other, basis=tmp_path / "first"
            )
        )
    bases = {name: load_basis(tmp_path / name) for name in ("first", "second", "third")}
    for path, basis in bases["first"].items():
        assert torch.equal(bases["second"][path], basis)
        assert torch.equal(bases["third"][path], basis)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in bases]
    assert configs[0]["basis_digest"] == configs[1]["basis_digest"] == configs[2]["basis_digest"]
    assert configs[1]["basis_dim"] == 16
    assert weights(tmp_path / "second").keys() == weights(tmp_path / "first").keys()


def test_base_model_is_frozen(
    tiny_base: Path, tmp_path: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []

    def look(self: Any, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        seen.append({name for name, p in model.named_parameters() if p.grad is not None})

    monkeypatch.setattr(trainer_module._Report, "on_optimizer_step", look)
    train(settings(tiny_base, tmp_path / "out", {"colours": colours}, max_steps=1))
    assert seen[0]
    assert all(".malora_" in name for name in seen[0])


def test_overwrite_starts_anew(tiny_base: Path, tmp_path: Path, colours: Path) -> None:
    data, out = {"colours": colours}, tmp_path / "out"
    train(settings(tiny_base, out, data, checkpoint_every=3))
    before = weights(out)
    bad = write_task(tmp_path / "bad.jsonl", [("a", "")])
    with pytest.raises(DataError, match=r"bad.jsonl:1: 'completion' is empty"):
        train(settings(tiny_base, out, {"colours": bad}, overwrite=True))
    assert (out / "checkpoints").exists()
    train(settings(tiny_base, out, data, overwrite=True, seed=1))
    assert not (out / "checkpoints").exists()
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(out).items())


def test_diverging_run_stops(tiny_base: Path, tmp_path: Path, colours: Path) -> None:
    with pytest.raises(ValueError, match=r"no longer finite at step \d+: lower the learning rate"):
        train(
            settings(
                tiny_base,
                tmp_path / "out",
                {"colours": colours},
                learning_rate=1e30,
                max_steps=30,
                log_every=1,
            )
        )
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_refusals(tiny_base: Path, tmp_path: Path, colours: Path) -> None:
    data = {"colours": colours}
    (tmp_path / "file").write_text("")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"base": tmp_path / "no-model"}, "there is no base model at .*no-model"),
        ({"base": tmp_path}, "the base model in .* cannot be loaded"),
        ({"out": tmp_path / "file" / "out"}, "cannot be written: Not a directory"),
        ({"resume": True}, "holds no checkpoint to resume from"),
        ({"resume": True, "overwrite": True}, "contradict each other"),
        ({"eval_data": {"other": colours}}, "evaluation data for 'other', which is no task"),
        ({"eval_fraction": 1.0}, r"eval_fraction must lie in \[0, 1\)"),
        ({"eval_fraction": 0.95}, "too few examples to hold 5 out"),
        ({"batch_size": 0}, "batch_size must be positive, not 0"),
        ({"max_steps": 0}, "max_steps must be positive, not 0"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ({"data": {}}, "nothing to train on"),
        ({"basis": tmp_path / "no-basis"}, "no-basis holds no basis"),
    ]
    for changes, reason in cases:
        given: dict[str, Any] = {"base": tiny_base, "data": data, "out": tmp_path / "out"}
        with pytest.raises(ValueError, match=reason) as error:
            train(TrainSettings(**(given | changes)))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_held_out_examples_are_not_trained_on(tiny_base: Path, tmp_path: Path, sums: Path) -> None:
    run = settings(tiny_base, tmp_path / "out", {"sums": sums}, eval_fraction=0.25)
    result = train(run)
    metrics = json.loads((result.out / "training_metrics.json").read_text())
    assert metrics["tasks"]["sums"]["train_examples"] == 15
    assert metrics["tasks"]["sums"]["held_out_examples"] == 5
    assert result.scores["sums"].examples == 5
