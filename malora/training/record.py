"""What a training run writes about itself: its identity, its metrics and a model card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from malora.basis import basis_digest, load_basis
from malora.training.settings import TrainResult, TrainSettings

_RUN = "run.json"

Sizes = Mapping[str, tuple[int, int]]
"""By task: how many examples it trained on, and how many were held out."""


def write_run(settings: TrainSettings, checkpoints: Path) -> None:
    """Keep, beside the checkpoints, what decides a run's course."""
    checkpoints.mkdir(exist_ok=True)
    (checkpoints / _RUN).write_text(json.dumps(_identity(settings), indent=2) + "\n", "utf-8")


def check_same_run(settings: TrainSettings, checkpoints: Path) -> None:
    """Raise ValueError where these settings would not continue the run of these checkpoints."""
    try:
        before = json.loads((checkpoints / _RUN).read_text("utf-8"))
    except (OSError, ValueError):
        raise ValueError(
            f"{checkpoints / _RUN} cannot be read, so this run cannot be resumed: start it anew "
            "with --overwrite"
        ) from None
    now = _identity(settings)
    changed = [name for name in now if now[name] != before.get(name)]
    if changed:
        raise ValueError(
            f"the run to resume had another {', '.join(changed)}: resume it with the settings and "
            "data it began with"
        )


def _identity(settings: TrainSettings) -> dict[str, Any]:
    """All that decides which steps a run takes, in JSON's own types; data by their digests."""
    steps = ("epochs", "max_steps", "batch_size", "accumulation", "seed", "eval_fraction")
    optimizer = ("learning_rate", "warmup", "scheduler", "weight_decay", "precision")
    identity: dict[str, Any] = {
        "base": str(settings.base),
        "data": {name: _digest(path) for name, path in settings.data.items()},
        "eval_data": {name: _digest(path) for name, path in settings.eval_data.items()},
        "basis": None if settings.basis is None else basis_digest(load_basis(settings.basis)),
        "adapter": settings.adapter.to_dict(),
    }
    identity |= {name: getattr(settings, name) for name in steps + optimizer}
    # A round trip, so that it compares equal to what was read back.
    return dict(json.loads(json.dumps(identity)))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _settings(settings: TrainSettings) -> dict[str, Any]:
    """The settings worth publishing: no paths, which mean nothing elsewhere."""
    left_out = ("base", "data", "eval_data", "out", "basis", "adapter", "resume", "overwrite")
    return {name: value for name, value in vars(settings).items() if name not in left_out}


def write_metrics(
    folder: Path,
    settings: TrainSettings,
    result: TrainResult,
    sizes: Sizes,
    history: list[dict[str, float]],
) -> None:
    """Write training_metrics.json: tasks with sizes and scores, totals, settings, the log."""
    metrics = {
        "tasks": {
            name: {
                "train_examples": trained,
                "held_out_examples": held_out,
                "score": asdict(result.scores[name]) if name in result.scores else None,
            }
            for name, (trained, held_out) in sizes.items()
        },
        "steps": result.steps,
        "seconds": result.seconds,
        "train_loss": result.train_loss,
        "trainable_parameters": result.trainable_parameters,
        "settings": _settings(settings),
        "log": history,
    }
    path = folder / "training_metrics.json"
    path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def write_card(folder: Path, settings: TrainSettings, result: TrainResult, sizes: Sizes) -> None:
    """Write README.md, the model card."""
    adapter = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    local = Path(settings.base).is_dir()
    base = Path(settings.base).resolve().name if local else str(settings.base)
    rows = []
    for name, (trained, held_out) in sizes.items():
        score = result.scores.get(name)
        shown = (
            "| – | – "
            if score is None
            else f"| {score.exact_match:.1%} | {score.token_accuracy:.1%} "
        )
        rows.append(f"| {name} | {trained} | {held_out} {shown}|")
    form = {
        "experts": adapter["num_experts"],
        "experts a token takes": adapter["top_k"],
        "rank of an expert": adapter["r"],
        "rows of the shared basis": adapter["basis_dim"],
        "adapted modules": ", ".join(adapter["target_modules"]),
        "trainable parameters": f"{result.trainable_parameters:,}",
        "steps": result.steps,
    }
    lines = [
        "---",
        "library_name: peft",
        # A folder's name is no model id, which is what this field would be read as.
        *([] if local else [f"base_model: {base}"]),
        "tags: [malora, mixture-of-experts]",
        "---",
        "",
        f"# MALoRA adapter for {base}",
        "",
        f"Trained on {len(sizes)} task{'s' if len(sizes) > 1 else ''} with `malora train`.",
        "",
        "| task | trained on | held out | exact match | token accuracy |",
        "| --- | ---: | ---: | ---: | ---: |",
        *rows,
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in form.items()),
        *(
            f"| {name.replace('_', ' ')} | {value} |"
            for name, value in _settings(settings).items()
            if value is not None
        ),
        "",
        "Load it with PEFT (`import malora` first, which registers the method), or serve it with",
        "`malora serve --adapters`, pointed at the folder that holds this one.",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
