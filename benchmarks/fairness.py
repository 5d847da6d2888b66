"""What a flood by one adapter does to nine others' latency, on the real engine, in this process.

    python -m benchmarks.fairness [--max-num-seqs 4] [--new-tokens 4] [--seconds 15] [--json FILE]

Nine adapters send one request a second each (`--rate`), at the same times alone and while a tenth
keeps a backlog. Latency is the steps that a request takes, times what a step takes: the scheduler
keeps the first as it is alone, but for a step or two until a newcomer has its place; the second
grows with the batch, which `max_num_seqs` bounds.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from typer import Option

from benchmarks import models
from malora.base_model import PATH
from malora_server.engine.config import EngineConfig
from malora_server.engine.core import EngineCore
from malora_server.engine.messages import AdapterVersion, SamplingParams, Submit

LIGHT = 9
PROMPT_TOKENS = 32


def main(
    max_num_seqs: Annotated[int, Option(help="The most sequences in a batch.")] = 4,
    rate: Annotated[float, Option(help="Requests a second of each of the nine.")] = 1.0,
    new_tokens: Annotated[int, Option(help="Tokens generated for each of their requests.")] = 4,
    flood_tokens: Annotated[int, Option(help="Tokens for each of the flood's.")] = 128,
    seconds: Annotated[int, Option(help="How long requests come, alone and flooded.")] = 15,
    json_file: Annotated[Path | None, Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measure nine adapters' latency alone, then beside a flood by a tenth."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, adapters = folder / "base", folder / "adapters"
        models.save_base(base, PATH)
        models.save_adapters(base, adapters, LIGHT + 1, models.lora(), "lora")
        config = EngineConfig(base=str(base), adapters=str(adapters), max_num_seqs=max_num_seqs)
        core = EngineCore(config)
        _serve(core, adapters, rate, new_tokens, flood_tokens, 3, flood=True)  # loads them
        alone = _serve(core, adapters, rate, new_tokens, flood_tokens, seconds, flood=False)
        flooded = _serve(core, adapters, rate, new_tokens, flood_tokens, seconds, flood=True)
    table = Table("of the nine", "alone", "flooded", "ratio", title=f"batches of {max_num_seqs}")
    results = {}
    for percentile in (50, 99):
        for name, a, b in (
            (f"p{percentile} latency, ms", alone.latencies_ms, flooded.latencies_ms),
            (f"p{percentile} steps", alone.steps, flooded.steps),
        ):
            before, after = (float(np.percentile(figures, percentile)) for figures in (a, b))
            results[name] = {"alone": before, "flooded": after, "ratio": after / before}
            table.add_row(name, f"{before:.0f}", f"{after:.0f}", f"{after / before:.2f}")
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2))


@dataclass
class Run:
    """What became of the nine's requests."""

    latencies_ms: list[float] = field(default_factory=list)
    """From when each was due."""
    steps: list[int] = field(default_factory=list)
    """Of the engine, from the first after each was sent."""


def _serve(
    core: EngineCore,
    adapters: Path,
    rate: float,
    new_tokens: int,
    flood_tokens: int,
    seconds: int,
    flood: bool,
) -> Run:
    """Serve the nine for so many seconds, and as much of the flood as there is room for."""
    rng = np.random.default_rng(0)
    period = 1 / rate
    due = sorted(
        (period * (i / LIGHT + turn), i)
        for i in range(LIGHT)
        for turn in range(int(seconds * rate))
    )
    waiting: dict[str, tuple[float, int]] = {}
    backlog: set[str] = set()
    run = Run()
    sent = num_steps = 0

    def send(adapter: str, max_tokens: int) -> str:
        nonlocal sent
        sent += 1
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0, ignore_eos=True)
        failure = core.add(
            Submit(
                request_id=str(sent),
                prompt_token_ids=rng.integers(1, 4096, PROMPT_TOKENS).tolist(),
                sampling=sampling,
                adapter=AdapterVersion(adapter, path=str(adapters / adapter)),
            )
        )
        if failure is not None:
            raise RuntimeError(failure.error)
        return str(sent)

    start = time.perf_counter()
    while due or waiting:
        now = time.perf_counter() - start
        while due and due[0][0] <= now:
            at, i = due.pop(0)
            waiting[send(f"lora-{i}", new_tokens)] = (at, num_steps)
        while flood and len(backlog) < 64:
            backlog.add(send(f"lora-{LIGHT}", flood_tokens))
        if not core.has_work:
            time.sleep(max(0.0, due[0][0] - now))
            continue
        if core.is_runnable:
            num_steps += 1
        else:  # adapters are being loaded
            core.wait(max(0.0, due[0][0] - now) if due else 1.0)
        for output in core.step().outputs:
            if output.finish_reason is None:
                continue
            backlog.discard(output.request_id)
            if output.request_id in waiting:
                at, before = waiting.pop(output.request_id)
                run.latencies_ms.append((time.perf_counter() - start - at) * 1000)
                run.steps.append(num_steps - before)
    core.abort_all()
    return run


if __name__ == "__main__":
    typer.run(main)
