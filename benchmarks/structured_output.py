"""What grammars cost: rows that follow one beside free rows, side by side.

    python -m benchmarks.structured_output [--concurrency 16] [--rounds 5] [--base FOLDER]

Every row generates the same number of tokens for the same prompts: the grammars can't end before.
The rows take turns; each ratio is the median over the rounds of (row / all free, same round). The
neighbours' figure is the time a token of the free requests alone, in a batch where every other
request follows a grammar.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from typer import Option

from benchmarks import models
from malora.base_model import PATH
from malora_server.engine import grammar
from malora_server.engine.config import EngineConfig
from malora_server.engine.core import EngineCore
from malora_server.engine.messages import SamplingParams, Submit

PROMPT_TOKENS = 64
FREE = "free"
GRAMMARS = {
    "JSON schema": grammar.from_json_schema(
        {
            "type": "array",
            "minItems": 1000,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 24},
                    "age": {"type": "integer", "minimum": 0, "maximum": 150},
                    "kind": {"enum": ["person", "place", "thing"]},
                },
                "required": ["name", "age", "kind"],
                "additionalProperties": False,
            },
        }
    ),
    "regex": grammar.from_regex("([a-z]{2,12}-[0-9]{4} ){1000}"),
}


def main(
    concurrency: Annotated[int, Option(help="Requests in the batch.")] = 16,
    new_tokens: Annotated[int, Option(help="Tokens generated for each request.")] = 96,
    rounds: Annotated[int, Option(help="Times that every row is measured.")] = 5,
    base: Annotated[Path | None, Option(help="A base model, in place of a random one.")] = None,
    json_file: Annotated[Path | None, Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measure batches without grammars, with one in every row, and with one in every other."""
    with tempfile.TemporaryDirectory() as folder:
        if base is None:
            base = Path(folder) / "base"
            models.save_base(base, PATH)
        core = EngineCore(EngineConfig(base=str(base), enable_prefix_caching=False))
        batches: dict[str, list[str | None]] = {FREE: [None] * concurrency}
        for name, text in GRAMMARS.items():
            batches[name] = [text] * concurrency
            batches[f"{name} in every other row"] = [
                text if row % 2 else None for row in range(concurrency)
            ]
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in batches}
        for round_ in range(rounds + 1):  # the first one warms up
            for name, grammars in batches.items():
                figures = _run(core, grammars, new_tokens)
                if round_ > 0:
                    runs[name].append(figures)
    title = f"{concurrency} requests, {PROMPT_TOKENS} + {new_tokens} tokens, " + (
        core.ready.device if core.ready.device != "cpu" else f"{torch.get_num_threads()} threads"
    )
    table = Table("batch", "tokens/s", "of free", "neighbours' ms a token", "of free", title=title)
    results = {}
    for name, figures_of in runs.items():
        totals = [free[0] / run[0] for run, free in zip(figures_of, runs[FREE], strict=True)]
        waits = [run[1] / free[1] for run, free in zip(figures_of, runs[FREE], strict=True)]
        seconds, wait = (statistics.median(column) for column in zip(*figures_of, strict=True))
        results[name] = result = {
            "tokens_per_second": concurrency * new_tokens / seconds,
            "ratio": statistics.median(totals),
            "neighbour_seconds_per_token": wait,
            "neighbour_ratio": statistics.median(waits),
        }
        neighbours = None in batches[name]
        table.add_row(
            name,
            f"{result['tokens_per_second']:.0f}",
            f"{result['ratio']:.2f}",
            f"{wait * 1e3:.2f}" if neighbours else "",
            f"{result['neighbour_ratio']:.2f}" if neighbours else "",
        )
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2))


_ids = count()


def _run(core: EngineCore, grammars: list[str | None], new_tokens: int) -> tuple[float, float]:
    """Seconds for the whole batch, and for a token of its free rows (of all, if none is)."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 4096, (len(grammars), PROMPT_TOKENS)).tolist()
    free: set[str] = set()
    for row, (text, prompt) in enumerate(zip(grammars, prompts, strict=True)):
        sampling = SamplingParams(
            max_tokens=new_tokens, seed=row, temperature=0.8, ignore_eos=True, grammar=text
        )
        request_id = str(next(_ids))
        if text is None or all(grammars):
            free.add(request_id)
        failure = core.add(
            Submit(request_id=request_id, prompt_token_ids=prompt, sampling=sampling)
        )
        if failure is not None:
            raise RuntimeError(failure.error)
    start = time.perf_counter()
    first: dict[str, float] = {}
    waits, num_tokens = [], 0
    while core.has_work:
        for output in core.step().outputs:
            now = time.perf_counter()
            num_tokens += len(output.token_ids)
            first.setdefault(output.request_id, now)
            if output.finish_reason is not None and output.request_id in free:
                waits.append((now - first[output.request_id]) / (new_tokens - 1))
    seconds = time.perf_counter() - start
    if num_tokens != len(grammars) * new_tokens:
        raise RuntimeError(f"{num_tokens} tokens came, not {len(grammars) * new_tokens}")
    return seconds, statistics.mean(waits)


if __name__ == "__main__":
    typer.run(main)
