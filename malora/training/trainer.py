"""Training one multi-task adapter on transformers' Trainer."""

from __future__ import annotations

import math
import os
import random
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import SchedulerType

from malora.basis import load_basis
from malora.config import MaloraConfig
from malora.training.base import (
    context_length,
    load_model,
    load_tokenizer,
    padding_id,
    resolve_precision,
)
from malora.training.data import (
    CompletionCollator,
    DataError,
    Example,
    LengthGroupedBatches,
    load_examples,
)
from malora.training.evaluation import score_tasks, score_tokens
from malora.training.progress import ProgressReport
from malora.training.record import check_same_run, write_card, write_metrics, write_run
from malora.training.settings import TrainResult, TrainSettings

__all__ = ["TrainResult", "TrainSettings", "train"]

CHECKPOINTS = "checkpoints"


def train(settings: TrainSettings) -> TrainResult:
    """Train an adapter and write it to `settings.out`, with a model card and the metrics.

    The same settings and data give the same adapter, bit for bit on the CPU. Raises ValueError,
    in one sentence, for what cannot be trained, and DataError for data that cannot be used;
    an adapter that was there before is then still there.
    """
    checkpoint = _checkpoint_to_resume(settings)
    tokenizer, config = load_tokenizer(settings.base)
    examples, held_out = _load_data(settings, tokenizer, context_length(config))
    adapter = _adapter_config(settings)
    _make_folder(settings.out)
    model = load_model(settings.base, settings.precision)
    set_seed(settings.seed)
    model = get_peft_model(model, adapter)
    if checkpoint is None:
        shutil.rmtree(settings.out / CHECKPOINTS, ignore_errors=True)
    else:
        check_same_run(settings, settings.out / CHECKPOINTS)
    if settings.checkpoint_every is not None:
        write_run(settings, settings.out / CHECKPOINTS)

    with ProgressReport("training") as progress:
        trainer = _AdapterTrainer(
            model=model,
            args=_arguments(settings),
            train_dataset=[example for task in examples.values() for example in task],
            eval_dataset=held_out,
            data_collator=CompletionCollator(padding_id(tokenizer)),
            callbacks=[_Report(progress)],
        )
        trainer.remove_callback(PrinterCallback)
        output = trainer.train(resume_from_checkpoint=checkpoint)
    if not math.isfinite(output.training_loss):
        raise ValueError("the loss is no longer finite: lower the learning rate")

    # Scored without autocast's wrapper, as `evaluate` would score the saved adapter.
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    scores = score_tasks(model, tokenizer, held_out, 2 * settings.batch_size)
    result = TrainResult(
        out=settings.out,
        steps=output.global_step,
        seconds=output.metrics["train_runtime"],
        train_loss=output.training_loss,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        scores=scores,
    )
    sizes = {name: (len(task), len(held_out.get(name, []))) for name, task in examples.items()}
    _save(model, settings, result, sizes, trainer.state.log_history)
    return result


class _AdapterTrainer(Trainer):
    """Trainer, batching by length, evaluating by task, and counting no operations.

    Counting them walks over all parameters in every step.
    """

    def get_train_dataloader(self) -> DataLoader[Example]:
        args: TrainingArguments = self.args
        batches = LengthGroupedBatches(
            [len(example) for example in self.train_dataset],
            args.train_batch_size,
            args.gradient_accumulation_steps,
            args.seed,
        )
        loader: DataLoader[Example] = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            pin_memory=args.dataloader_pin_memory,
        )
        prepared: DataLoader[Example] = self.accelerator.prepare(loader)
        return prepared

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, examples in self.eval_dataset.items():
            score = score_tokens(
                self.model,
                examples,
                self.args.eval_batch_size,
                self.data_collator.pad_id,
                lambda _: None,
            )
            metrics[f"eval_{name}_loss"] = score.loss
            metrics[f"eval_{name}_token_accuracy"] = score.accuracy
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, _inputs: dict[str, Any]) -> int:
        return 0


class _Report(TrainerCallback):
    """Shows the steps as they go, and stops a run whose loss is no number any more."""

    def __init__(self, progress: ProgressReport) -> None:
        self.progress = progress

    def on_train_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any
    ) -> None:
        self.progress.start(state.max_steps, state.global_step)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.progress.advance(1)

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: dict[str, float],
        **_: Any,
    ) -> None:
        if "train_loss" in logs:
            self.progress.note(f"mean loss {logs['train_loss']:.4f}")
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise ValueError(
                f"the loss is no longer finite at step {state.global_step}: lower the learning rate"
            )
        self.progress.note(f"loss {logs['loss']:.4f} lr {logs['learning_rate']:.2e}")

    def on_evaluate(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        scores = {k: v for k, v in metrics.items() if k.startswith("eval_")}
        shown = (f"{name.removeprefix('eval_')} {value:.4f}" for name, value in scores.items())
        self.progress.print(f"step {state.global_step}: {', '.join(shown)}")


def _arguments(settings: TrainSettings) -> TrainingArguments:
    scheduler = {
        "linear": SchedulerType.LINEAR,
        "cosine": SchedulerType.COSINE,
        "constant": SchedulerType.CONSTANT_WITH_WARMUP,
    }[settings.scheduler]
    cuda = torch.cuda.is_available()
    evaluates = settings.eval_every is not None and (settings.eval_data or settings.eval_fraction)
    arguments = TrainingArguments(
        # Trainer makes this folder whether it puts checkpoints there or not.
        output_dir=str(settings.out / CHECKPOINTS if settings.checkpoint_every else settings.out),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=2 * settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=scheduler,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        bf16=resolve_precision(settings.precision) == "bf16",
        seed=settings.seed,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.eval_every if evaluates else None,
        save_strategy="no" if settings.checkpoint_every is None else "steps",
        save_steps=settings.checkpoint_every or 500,
        save_total_limit=2,
        disable_tqdm=True,
        report_to="none",
    )
    # One process trains on one device: Trainer would spread over all of them with DataParallel.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _adapter_config(settings: TrainSettings) -> MaloraConfig:
    fields: dict[str, Any] = vars(settings.adapter) | {
        "task_type": "CAUSAL_LM",
        "inference_mode": False,
    }
    if settings.basis is not None:
        bases = load_basis(settings.basis)
        rows = {basis.shape[0] for basis in bases.values()}
        if len(rows) != 1:
            raise ValueError(
                f"the bases in {settings.basis} have {sorted(rows)} rows: a shared basis needs the "
                "same number on every linear"
            )
        fields |= {"basis_path": str(settings.basis), "basis_dim": rows.pop()}
        fields["target_modules"] = settings.adapter.target_modules or {
            name.rpartition(".")[2] for name in bases
        }
    return MaloraConfig(**fields)


def _load_data(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[dict[str, list[Example]], dict[str, list[Example]]]:
    """Each task's training examples, and the held-out ones of the tasks that have any."""
    training: dict[str, list[Example]] = {}
    held_out: dict[str, list[Example]] = {}
    for name, path in settings.data.items():
        training[name] = load_examples(path, tokenizer, context)
        if name in settings.eval_data:
            held_out[name] = load_examples(settings.eval_data[name], tokenizer, context)
        elif settings.eval_fraction:
            examples = training[name]
            count = max(1, round(len(examples) * settings.eval_fraction))
            if count >= len(examples):
                raise DataError(path, None, f"too few examples to hold {count} out")
            chosen = set(
                random.Random(f"{settings.seed} {name}").sample(range(len(examples)), count)
            )
            held_out[name] = [e for i, e in enumerate(examples) if i in chosen]
            training[name] = [e for i, e in enumerate(examples) if i not in chosen]
    return training, held_out


def _checkpoint_to_resume(settings: TrainSettings) -> str | None:
    """Check that `out` may be replaced; the checkpoint to resume from, if that is asked for."""
    out = settings.out
    held = [name for name in ("adapter_config.json", CHECKPOINTS) if (out / name).exists()]
    if held and not (settings.overwrite or settings.resume):
        raise ValueError(
            f"{out} already holds an adapter or checkpoints of one: give --overwrite to start "
            "anew, or --resume to go on from the last checkpoint"
        )
    if not settings.resume:
        return None
    # The state is written last, so a checkpoint without it was cut short.
    whole = [state.parent for state in (out / CHECKPOINTS).glob("checkpoint-*/trainer_state.json")]
    if not whole:
        raise ValueError(f"{out} holds no checkpoint to resume from: start without --resume")
    return str(max(whole, key=lambda folder: int(folder.name.rpartition("-")[2])))


def _make_folder(out: Path) -> None:
    """Find out before training, not after it, that the adapter cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror}") from None


def _save(
    model: PeftModel,
    settings: TrainSettings,
    result: TrainResult,
    sizes: Mapping[str, tuple[int, int]],
    history: list[dict[str, float]],
) -> None:
    """Write the adapter's files beside the old ones, then put each in its place."""
    with tempfile.TemporaryDirectory(dir=settings.out, prefix=".saving-") as folder:
        written = Path(folder)
        model.save_pretrained(written, save_embedding_layers=False)
        write_card(written, settings, result, sizes)
        write_metrics(written, settings, result, sizes, history)
        # The configuration last: a folder without one is no adapter yet.
        for path in sorted(written.iterdir(), key=lambda path: path.name == "adapter_config.json"):
            os.replace(path, settings.out / path.name)
