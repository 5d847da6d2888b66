import inspect
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from malora import MaloraConfig, cli
from malora.basis import load_basis
from malora.training.trainer import TrainSettings

FORM = ("--rank", "2", "--experts", "3", "--top-k", "1", "--basis-dim", "8")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "task.jsonl"
    rows = [{"prompt": f"{i}=", "completion": f"{i + 1}"} for i in range(8)]
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    return path


def test_train_evaluate_and_share_a_basis(tiny_base: Path, tmp_path: Path, data: Path) -> None:
    out = tmp_path / "adapter"
    common = ("--base", tiny_base, "--max-steps", 3, "--batch-size", 4)
    result = invoke(
        "train", *common, *FORM, "--data", f"next={data}", "--eval-data", f"next={data}",
        "--out", out, "--router-input", "basis", "--target-modules", "q_proj, up_proj", "--rslora",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "Wrote" in result.stdout
    assert "3 steps" in result.stdout
    assert "exact match" in result.stdout
    assert "training 3/3" in result.stderr
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["num_experts"] == 3
    assert config["top_k"] == 1
    assert config["basis_dim"] == 8
    assert config["router_input"] == "basis"
    assert config["use_rslora"] is True
    assert config["target_modules"] == ["q_proj", "up_proj"]

    again = invoke("train", *common, "--data", f"next={data}", "--out", out)
    assert again.exit_code == 2
    assert again.stderr.startswith("error: ")
    assert "give --overwrite" in again.stderr

    result = invoke(
        "evaluate", "--base", tiny_base, "--adapter", out, "--data", f"next={data}",
        "--compare-base", "--json", "--limit", 5,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    score = json.loads(result.stdout)["next"]
    assert score["examples"] == score["base"]["examples"] == 5
    assert score["loss"] != score["base"]["loss"]
    shown = invoke("evaluate", "--base", tiny_base, "--data", f"next={data}")
    assert shown.exit_code == 0
    assert "token accuracy" in shown.stdout

    file = tmp_path / "taken.safetensors"
    assert invoke("basis", "--adapter", out, "--out", file).exit_code == 0
    taken, of_adapter = load_basis(file), load_basis(out)
    assert all(taken[path].equal(of_adapter[path]) for path in of_adapter)
    second = tmp_path / "second"
    result = invoke(
        "train", *common, "--data", f"next={data}", "--out", second, "--basis", file,
        "--rank", 4,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    other = json.loads((second / "adapter_config.json").read_text())
    assert other["basis_digest"] == config["basis_digest"]


def test_fresh_basis(tiny_base: Path, tmp_path: Path) -> None:
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        result = invoke(
            "basis", "--base", tiny_base, "--basis-dim", 6, "--seed", seed,
            "--out", tmp_path / "new" / name, "--target-modules", "q_proj,down_proj",
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
    a, b, c = (load_basis(tmp_path / "new" / name) for name in "abc")
    assert len(a) == 4
    assert a["model.layers.1.mlp.down_proj"].shape == (6, 96)
    assert all(a[path].equal(b[path]) for path in a)
    assert not a["model.layers.0.self_attn.q_proj"].equal(c["model.layers.0.self_attn.q_proj"])


def test_convert(tiny_base: Path, tmp_path: Path, data: Path) -> None:
    out = tmp_path / "adapter"
    arguments = ("--base", tiny_base, "--max-steps", 1, *FORM, "--data", f"a={data}", "--out", out)
    assert invoke("train", *arguments).exit_code == 0
    result = invoke("convert", out, tmp_path / "converted")
    assert result.exit_code == 0, result.stderr
    assert "14 linears" in result.stdout
    assert (tmp_path / "converted" / "adapter_config.json").exists()
    again = invoke("convert", out, tmp_path / "converted")
    assert again.exit_code == 2
    assert "already holds an adapter" in again.stderr


def test_combine(tiny_base: Path, tmp_path: Path, data: Path) -> None:
    one = ("--base", tiny_base, "--max-steps", 1, "--experts", 1, "--top-k", 1, "--basis-dim", 8)
    for name, rank in [("a", 2), ("b=b", 3)]:
        out = tmp_path / name
        assert invoke("train", *one, "-r", rank, "--data", f"t={data}", "--out", out).exit_code == 0
    parts = (f"{tmp_path}/a=0.5", f"{tmp_path}/b=b=-1e-1")
    result = invoke("combine", *parts, "--out", tmp_path / "both")
    assert result.exit_code == 0, result.stderr
    assert "14 linears of rank 5," in result.stdout
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["rank_pattern"]) == ("LORA", 5, {})
    scores = invoke(
        "evaluate", "--base", tiny_base, "--adapter", tmp_path / "both", "--data", f"t={data}"
    )
    assert scores.exit_code == 0, scores.stderr
    again = invoke("combine", *parts, "--out", tmp_path / "both")
    assert again.exit_code == 2
    assert "already holds an adapter" in again.stderr


def test_errors_are_one_line_and_exit_2(tiny_base: Path, tmp_path: Path, data: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    out = ("--out", tmp_path / "out")
    good = ("--data", f"t={data}")
    base = ("--base", tiny_base)
    cases: list[tuple[tuple[object, ...], str]] = [
        (("train", *base, *out, "--data", f"t={bad}"), "bad.jsonl:2: has no 'completion'"),
        (("train", *base, *out, "--data", "t=none.jsonl"), "none.jsonl: no such file"),
        (("train", *base, *out, "--data", "none.jsonl"), "is not name=file"),
        (("train", *out, *good, "--base", tmp_path / "gone"), "there is no base model at"),
        (("train", *base, *good, "--out", data), "cannot be written"),
        (("train", *base, *good, *out, "--top-k", 9), "top_k must lie in"),
        (("train", *base, *good, *out, "--resume"), "no checkpoint to resume"),
        (("train", *base, *good, *out, "--basis", tmp_path / "gone"), "holds no basis"),
        (("evaluate", *base, *good, "--adapter", tmp_path / "gone"), "no adapter folder"),
        (("evaluate", *base, "--data", f"t={bad}"), "bad.jsonl:2"),
        (("convert", tmp_path / "gone", tmp_path / "out"), "no adapter folder"),
        (("combine", *out, tmp_path / "gone"), "is not FOLDER=WEIGHT"),
        (("combine", *out, "=0.5"), "is not FOLDER=WEIGHT"),
        (("combine", *out, f"{tmp_path}/gone=half"), "is not FOLDER=WEIGHT"),
        (("combine", *out, f"{tmp_path}/gone=0.5"), "no adapter folder"),
        (("combine", *out, f"{tmp_path}/gone=inf"), "must be a finite number"),
        (("basis", *base, *out, "--adapter", tmp_path), "not both"),
        (("basis", *base, "--out", data), "already exists"),
        (("basis", *base, *out, "--basis-dim", 49), "1 to 48 rows, not 49"),
        (("basis", *base, *out, "--target-modules", "nothing"), "no linear named nothing"),
    ]
    for arguments, reason in cases:
        result = invoke(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert reason in line
        assert result.stdout == ""


def test_usage_errors_and_help() -> None:
    assert invoke("train", "--data", "a=b").exit_code == 2  # no --out
    assert invoke("train", "--scheduler", "wild").exit_code == 2
    for command in ("train", "evaluate", "convert", "basis", "demo"):
        result = invoke(command, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.stdout


def test_defaults_are_those_of_the_library() -> None:
    options = inspect.signature(cli.train).parameters
    settings = {
        field: default.default
        for field, default in inspect.signature(TrainSettings).parameters.items()
        if field in options and field not in ("base", "data", "out", "eval_data")
    }
    assert {name: options[name].default for name in settings} == settings
    adapter = MaloraConfig()
    names = {
        "rank": "r",
        "experts": "num_experts",
        "alpha": "lora_alpha",
        "rslora": "use_rslora",
        "dropout": "lora_dropout",
        "aux_loss": "router_aux_loss_coef",
    }
    for option in ("rank", "experts", "alpha", "rslora", "dropout", "aux_loss", "top_k",
                   "basis_dim", "router_input", "target_modules"):  # fmt: skip
        assert options[option].default == getattr(adapter, names.get(option, option))


def test_serve_and_demo_pass_their_arguments_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    app = types.ModuleType("malora_server.app")
    app.main = seen.append  # type: ignore[attr-defined]
    demo = types.ModuleType("malora.demo")
    demo.main = lambda **given: seen.append(given)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "malora_server.app", app)
    monkeypatch.setitem(sys.modules, "malora.demo", demo)
    assert invoke("serve", "--base", "x", "--port=1", "--help", "-q").exit_code == 0
    assert invoke("demo", "--out", tmp_path, "--once", "--port", 5).exit_code == 0
    assert seen == [
        ["--base", "x", "--port=1", "--help", "-q"],
        {"out": tmp_path, "once": True, "port": 5},
    ]


def test_the_module_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "malora.cli", "nothing"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "No such command 'nothing'" in run.stderr


def test_module_itself_imports_nothing_heavy() -> None:
    # The file alone, since importing the package registers the method with PEFT.
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('cli', {cli.__file__!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'malora_server') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
