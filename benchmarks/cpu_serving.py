"""Output tokens a second on the CPU: ours and PEFT's mixed batch, side by side.

    python -m benchmarks.cpu_serving [--concurrency 16] [--rounds 5] [--json FILE]

Every row serves the same prompts for the same number of new tokens; the rows take turns, and each
ratio is the median over the rounds of (row / its base row, same round).
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import peft
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from typer import Option

from benchmarks import models
from malora.base_model import PATH
from malora_server.engine.config import EngineConfig
from malora_server.engine.llm import LLM
from malora_server.engine.messages import SamplingParams

PROMPT_TOKENS = 64


def main(
    concurrency: Annotated[int, Option(help="Requests in the batch, each on its adapter.")] = 16,
    new_tokens: Annotated[int, Option(help="Tokens generated for each request.")] = 96,
    rounds: Annotated[int, Option(help="Times that every row is measured.")] = 5,
    json_file: Annotated[Path | None, Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measure our engine and PEFT's adapter_names batch on a random 27.8 M parameter Llama."""
    with tempfile.TemporaryDirectory() as folder:
        rows = _rows(Path(folder), concurrency, new_tokens)
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        for run, _ in rows.values():
            run()
        for _ in range(rounds):
            for name, (run, _) in rows.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    results = {}
    for name, (_, base) in rows.items():
        ratios = [b / a for a, b in zip(seconds[name], seconds[base], strict=True)]
        tokens = concurrency * new_tokens / statistics.median(seconds[name])
        results[name] = {"tokens_per_second": tokens, "ratio": statistics.median(ratios)}
    table = Table("row", "tokens/s", "of its base", title=_title(concurrency, new_tokens))
    for name, result in results.items():
        table.add_row(name, f"{result['tokens_per_second']:.0f}", f"{result['ratio']:.2f}")
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2))


def _title(concurrency: int, new_tokens: int) -> str:
    return (
        f"{concurrency} requests, {PROMPT_TOKENS} + {new_tokens} tokens, "
        f"{torch.get_num_threads()} threads, float32"
    )


def _rows(
    folder: Path, concurrency: int, new_tokens: int
) -> dict[str, tuple[Callable[[], object], str]]:
    """Name -> (one run, the name of its base row)."""
    base, ours = folder / "base", folder / "adapters"
    models.save_base(base, PATH)
    kinds = {
        "LoRA r=16": ("lora", models.lora()),
        "MALoRA N=8 k=2 r=8 d=16": ("malora", models.malora()),
        "the same, one basis family": ("family", models.malora("basis")),
    }
    for name, config in kinds.values():
        models.save_adapters(base, ours, concurrency, config, name, family=name == "family")
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 4096, (concurrency, PROMPT_TOKENS)).tolist()
    sampling = SamplingParams(max_tokens=new_tokens, seed=0, temperature=0.0, ignore_eos=True)
    # Without the prefix cache: every round computes its prompts, as PEFT does.
    llm = LLM(EngineConfig(base=str(base), adapters=str(ours), enable_prefix_caching=False))

    def serve(names: list[str] | None) -> Callable[[], object]:
        return lambda: llm.generate(prompts, sampling, names)

    rows: dict[str, tuple[Callable[[], object], str]] = {"base": (serve(None), "base")}
    for title, (name, _) in kinds.items():
        names = [f"{name}-{i}" for i in range(concurrency)]
        rows[f"{concurrency} × {title}"] = (serve(names), "base")
    mixed = [f"{kind}-{i}" for i in range(concurrency) for kind in ("lora", "malora")]
    rows["half LoRA, half MALoRA"] = (serve(mixed[:concurrency]), "base")

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.generation_config.eos_token_id = None
    model = peft.PeftModel.from_pretrained(model, ours / "lora-0", adapter_name="lora-0")
    for i in range(1, concurrency):
        model.load_adapter(ours / f"lora-{i}", adapter_name=f"lora-{i}")
    model.eval()
    inputs = torch.tensor(prompts)

    def by_peft(names: list[str]) -> Callable[[], object]:
        return lambda: model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            adapter_names=names,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )

    rows["PEFT: base"] = (by_peft(["__base__"] * concurrency), "PEFT: base")
    for count in (4, concurrency):
        names = [f"lora-{i % count}" for i in range(concurrency)]
        rows[f"PEFT: {count} × LoRA r=16"] = (by_peft(names), "PEFT: base")
    return rows


if __name__ == "__main__":
    typer.run(main)
