"""What a training run is asked to do, and what it reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from malora.config import MaloraConfig
from malora.training.base import Precision
from malora.training.evaluation import Score

Scheduler = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What to train, on what, and how.

    Attributes:
        base: folder or hub id of the base model.
        data: each task's JSONL file; the adapter learns all of them at once.
        out: the folder to make, which becomes the adapter.
        adapter: the adapter's form.
        basis: an adapter folder or a basis file whose basis is taken and kept as it is; its d
            takes the place of `adapter.basis_dim`, and without `adapter.target_modules` its
            modules are the ones adapted.
        eval_data: held-out JSONL files of some or all tasks.
        eval_fraction: share of the examples to hold out of each task without such a file.
        eval_every: optimizer steps between evaluations (loss, token accuracy) in training; the
            end of training is always scored.
        epochs, max_steps: how long; max_steps wins where it is given.
        batch_size, accumulation: an optimizer step takes batch_size · accumulation examples.
        warmup: optimizer steps of rising learning rate, or below 1 their share of all steps.
        precision: "auto" is bf16 on CUDA and float32 on the CPU.
        log_every: optimizer steps between reports of the loss.
        checkpoint_every: optimizer steps between checkpoints; None writes none.
        resume: go on from the last checkpoint in `out`.
        overwrite: replace the adapter in `out`.
    """

    base: str | Path
    data: Mapping[str, Path]
    out: Path
    adapter: MaloraConfig = field(default_factory=MaloraConfig)
    basis: Path | None = None
    eval_data: Mapping[str, Path] = field(default_factory=dict)
    eval_fraction: float = 0.0
    eval_every: int | None = None
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 1e-3
    warmup: float = 0.05
    scheduler: Scheduler = "cosine"
    weight_decay: float = 0.0
    precision: Precision = "auto"
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int | None = None
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("there is nothing to train on: give at least one task")
        unknown = sorted(set(self.eval_data) - set(self.data))
        if unknown:
            raise ValueError(f"evaluation data for {unknown[0]!r}, which is no task of the data")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite contradict each other: give one of them")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must lie in [0, 1), not {self.eval_fraction}")
        for name in ("epochs", "batch_size", "accumulation", "learning_rate", "log_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("max_steps", "eval_every", "checkpoint_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but it is {getattr(self, name)}")


@dataclass(frozen=True)
class TrainResult:
    """What training made. `train_loss` is the mean over this run's steps, the balance loss
    included; `scores` holds the tasks with held-out examples.
    """

    out: Path
    steps: int
    seconds: float
    train_loss: float
    trainable_parameters: int
    scores: dict[str, Score]
