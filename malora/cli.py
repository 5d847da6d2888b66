"""The `malora` command. Torch and transformers are imported by the commands that need them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from malora.training.evaluation import Score

app = typer.Typer(
    name="malora",
    help="Train mixtures of LoRA experts, and serve many of them on one base model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FORM, HOW, HELD_OUT, RUN = "The adapter", "Optimisation", "Evaluation", "Checkpoints and reports"

Base = Annotated[
    str | None,
    typer.Option(help="Folder or hub id of the base model; left out, the small one shipped along."),
]
Precision = Annotated[
    Literal["auto", "bf16", "float32"],
    typer.Option(help="auto is bf16 on CUDA and float32 on the CPU."),
]
TargetModules = Annotated[
    str | None,
    typer.Option(
        help="Names of the linears to adapt, with commas between: q_proj,v_proj. Left out, all of "
        "attention and feed-forward, or those that --basis holds.",
        rich_help_panel=FORM,
    ),
]


@app.command()
def train(
    data: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=FILE",
            help='A task and its JSONL file of {"prompt": ..., "completion": ...}; repeat it for '
            "more tasks, which one adapter learns together.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make: the adapter, a card and metrics.")],
    base: Base = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE", help="Held-out JSONL of a task.", rich_help_panel=HELD_OUT
        ),
    ] = None,
    eval_fraction: Annotated[
        float,
        typer.Option(
            help="Share to hold out of each task without --eval-data.", rich_help_panel=HELD_OUT
        ),
    ] = 0.0,
    eval_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between evaluations; left out, only at the end.", rich_help_panel=HELD_OUT
        ),
    ] = None,
    rank: Annotated[
        int, typer.Option("--rank", "-r", help="Rank of each expert.", rich_help_panel=FORM)
    ] = 8,
    experts: Annotated[int, typer.Option(help="Number of experts.", rich_help_panel=FORM)] = 8,
    top_k: Annotated[int, typer.Option(help="Experts each token takes.", rich_help_panel=FORM)] = 2,
    basis_dim: Annotated[
        int,
        typer.Option(help="Rows of the shared basis, at least --rank.", rich_help_panel=FORM),
    ] = 64,
    basis: Annotated[
        Path | None,
        typer.Option(
            help="Adapter folder or basis file to take the basis from, and keep frozen; adapters "
            "of one basis are served together at less cost. Its rows replace --basis-dim.",
            rich_help_panel=FORM,
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Scaling: alpha / rank.", rich_help_panel=FORM)
    ] = 16.0,
    rslora: Annotated[
        bool, typer.Option("--rslora", help="Scale by alpha / √rank.", rich_help_panel=FORM)
    ] = False,
    dropout: Annotated[
        float, typer.Option(help="Dropout on the adapter's input.", rich_help_panel=FORM)
    ] = 0.0,
    router_input: Annotated[
        Literal["hidden", "basis"],
        typer.Option(
            help="Route on the linear's input, or on its coordinates in the basis.",
            rich_help_panel=FORM,
        ),
    ] = "hidden",
    aux_loss: Annotated[
        float, typer.Option(help="Weight of the load-balancing loss.", rich_help_panel=FORM)
    ] = 0.01,
    target_modules: TargetModules = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.", rich_help_panel=HOW)] = 3.0,
    max_steps: Annotated[
        int | None, typer.Option(help="Steps, in place of --epochs.", rich_help_panel=HOW)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in a batch.", rich_help_panel=HOW)] = 16,
    accumulation: Annotated[
        int, typer.Option(help="Batches in an optimizer step.", rich_help_panel=HOW)
    ] = 1,
    learning_rate: Annotated[
        float,
        typer.Option(
            help="Peak learning rate; 2e-4 suits bases of billions of parameters.",
            rich_help_panel=HOW,
        ),
    ] = 1e-3,
    warmup: Annotated[
        float,
        typer.Option(help="Steps of warm-up, or below 1 their share.", rich_help_panel=HOW),
    ] = 0.05,
    scheduler: Annotated[
        Literal["linear", "cosine", "constant"],
        typer.Option(help="Course of the learning rate after warm-up.", rich_help_panel=HOW),
    ] = "cosine",
    weight_decay: Annotated[float, typer.Option(rich_help_panel=HOW)] = 0.0,
    precision: Precision = "auto",
    seed: Annotated[
        int, typer.Option(help="The same seed gives the same adapter.", rich_help_panel=HOW)
    ] = 0,
    log_every: Annotated[
        int, typer.Option(help="Steps between reports of the loss.", rich_help_panel=RUN)
    ] = 10,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints; left out, none.", rich_help_panel=RUN),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the last checkpoint.", rich_help_panel=RUN),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the adapter in --out.", rich_help_panel=RUN),
    ] = False,
) -> None:
    """Train one adapter on one or more tasks."""
    with _one_line_errors():
        from malora.config import MaloraConfig
        from malora.training.data import parse_task_files
        from malora.training.trainer import TrainSettings
        from malora.training.trainer import train as run

        _quiet()
        settings = TrainSettings(
            base=base or _embedded_base(),
            data=parse_task_files(data),
            out=out,
            adapter=MaloraConfig(
                r=rank,
                num_experts=experts,
                top_k=top_k,
                basis_dim=basis_dim,
                lora_alpha=alpha,
                use_rslora=rslora,
                lora_dropout=dropout,
                router_input=router_input,
                router_aux_loss_coef=aux_loss,
                target_modules=_names(target_modules),
            ),
            basis=basis,
            eval_data=parse_task_files(eval_data or []),
            eval_fraction=eval_fraction,
            eval_every=eval_every,
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            accumulation=accumulation,
            learning_rate=learning_rate,
            warmup=warmup,
            scheduler=scheduler,
            weight_decay=weight_decay,
            precision=precision,
            seed=seed,
            log_every=log_every,
            checkpoint_every=checkpoint_every,
            resume=resume,
            overwrite=overwrite,
        )
        result = run(settings)
    _print_scores(result.scores)
    typer.echo(
        f"Wrote {out}: {result.trainable_parameters:,} parameters, {result.steps} steps in "
        f"{result.seconds:.1f} s, loss {result.train_loss:.4f}."
    )


@app.command()
def evaluate(
    data: Annotated[
        list[str], typer.Option(metavar="NAME=FILE", help="A task and its JSONL file; repeatable.")
    ],
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter folder; left out, the base model is scored.")
    ] = None,
    base: Base = None,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="Score the base model alone as well.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Score the first examples of each file alone.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    precision: Precision = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the scores as JSON, by task.")
    ] = False,
) -> None:
    """Score an adapter on each task: exact match of its greedy text, and token accuracy.

    Prompts are tokenised as in training and in serving, so exact match is what the server's
    replies reach at temperature 0.
    """
    with _one_line_errors():
        from malora.training.data import parse_task_files
        from malora.training.evaluation import evaluate as run

        _quiet()
        scores = run(
            base or _embedded_base(),
            adapter,
            parse_task_files(data),
            batch_size=batch_size,
            limit=limit,
            compare_base=compare_base,
            precision=precision,
        )
    if as_json:
        from dataclasses import asdict

        typer.echo(json.dumps({name: asdict(score) for name, score in scores.items()}, indent=2))
    else:
        _print_scores(scores)


@app.command()
def convert(
    adapter: Annotated[
        Path, typer.Argument(help="Folder of a LoRA (PEFT), HydraLoRA, MoLoRA or MALoRA adapter.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
) -> None:
    """Express another kind of adapter in MALoRA's form, with the same outputs."""
    with _one_line_errors():
        from malora.convert import convert as run

        _refuse_to_replace(out)
        made = run(adapter, out)
    typer.echo(f"Wrote {out}: {len(made.linears)} linears, {made.num_parameters:,} parameters.")


@app.command()
def combine(
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="FOLDER=WEIGHT",
            help="Adapters of one expert (LoRA, or MALoRA with --experts 1), each with its weight "
            "in the sum: adapters/sql=0.7 adapters/formal=0.3.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make: a LoRA.")],
) -> None:
    """Write the weighted sum of adapters as one LoRA, whose rank is the sum of theirs."""
    with _one_line_errors():
        from malora.combine import combine as run

        weighted = [_weighted(part) for part in parts]
        _refuse_to_replace(out)
        made = run(weighted, out)
    ranks = sorted({linear.r for linear in made.linears.values()})
    typer.echo(
        f"Wrote {out}: {len(made.linears)} linears of rank {', '.join(map(str, ranks))}, "
        f"{made.num_parameters:,} parameters."
    )


@app.command()
def basis(
    out: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter folder to take the basis from.")
    ] = None,
    base: Base = None,
    basis_dim: Annotated[int, typer.Option(help="Rows of a fresh basis.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of a fresh basis.")] = 0,
    target_modules: TargetModules = None,
) -> None:
    """Write a basis file for `malora train --basis`: an adapter's, or a fresh one for a base."""
    with _one_line_errors():
        from malora.basis import basis_digest, load_basis, save_basis

        _quiet()
        if adapter is not None and base is not None:
            raise ValueError("give --adapter to take its basis, or --base to draw one, not both")
        if out.exists():
            raise ValueError(f"{out} already exists: name another file")
        if adapter is not None:
            bases = load_basis(adapter)
        else:
            from malora.training.fresh_basis import fresh_basis

            bases = fresh_basis(base or _embedded_base(), basis_dim, seed, _names(target_modules))
        out.parent.mkdir(parents=True, exist_ok=True)
        save_basis(bases, out)
    typer.echo(f"Wrote {out}: {len(bases)} bases, digest {basis_digest(bases)[:12]}.")


@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def serve(context: typer.Context) -> None:
    """Serve a base model and a folder of adapters over HTTP; see malora serve --help."""
    from malora_server.app import main

    main(context.args)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the demo's data and adapters.")] = Path(
        "demo-output"
    ),
    once: Annotated[
        bool, typer.Option("--once", help="Stop the server afterwards; exit 0 only on success.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the server.")] = 8000,
) -> None:
    """Train three small adapters, serve them, and ask each of them in one batch."""
    with _one_line_errors():
        from malora.demo import main

        _quiet()
        main(out=out, once=once, port=port)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn an error that says what the user can mend into one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


def _quiet() -> None:
    """Leave the terminal to our own progress and errors."""
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _embedded_base() -> Path:
    from malora.base_model import PATH

    return PATH


def _refuse_to_replace(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} already holds an adapter: name another folder")


def _weighted(part: str) -> tuple[str, float]:
    folder, _, weight = part.rpartition("=")
    with suppress(ValueError):
        if folder:
            return folder, float(weight)
    raise ValueError(f"{part} is not FOLDER=WEIGHT, as in adapters/sql=0.7")


def _names(value: str | None) -> list[str] | None:
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def _print_scores(scores: Mapping[str, Score]) -> None:
    if not scores:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "examples", "exact match", "token accuracy", "loss")
    for name, score in scores.items():
        rows = [(name, score), *([(f"{name}, base alone", score.base)] if score.base else [])]
        for label, row in rows:
            table.add_row(
                label,
                str(row.examples),
                f"{row.exact_match:.1%}",
                f"{row.token_accuracy:.1%}",
                f"{row.loss:.4f}",
            )
    Console().print(table)


if __name__ == "__main__":
    app()
