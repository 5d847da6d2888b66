"""What a flood by one adapter does to nine others' latency, on the real engine, in this process.

    python -m benchmarks.fairness [--max-num-seqs 256] [--new-tokens 32] [--json FILE]
    python -m benchmarks.fairness --shape 8b

Nine adapters send one request a second each (`--rate`), at the same times alone and while a tenth
keeps the batch full and 64 requests waiting. The flood is served twice: with the server's default
`--max-slowdown`, and without any bound, which is what the bound costs the flood. Alone, with and
without take turns, round after round, so that a machine that gets slower does so for all three.
Both engines are there at once: a GPU needs memory for two models.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from typer import Option

from benchmarks import models
from malora.base_model import PATH
from malora.training.progress import ProgressReport
from malora_server.engine.config import EngineConfig
from malora_server.engine.core import EngineCore
from malora_server.engine.messages import AdapterVersion, SamplingParams, Submit

LIGHT = 9
PROMPT_TOKENS = 32
WAITING = 64
WARM_UP_SECONDS = 3


@dataclass
class Load:
    """What is sent, and how long. rate: requests a second of each of the nine."""

    adapters: Path
    backlog: int
    rate: float
    new_tokens: int
    flood_tokens: int
    seconds: int


@dataclass
class Run:
    """What became of it."""

    latencies_ms: list[float] = field(default_factory=list)
    """Of the nine's requests, from when each was due."""
    flood_tokens: int = 0
    seconds: float = 0.0


def main(
    shape: Annotated[str, Option(help="8b, 1b, small or tiny.")] = "small",
    max_num_seqs: Annotated[int, Option(help="The most sequences in a batch.")] = 256,
    rate: Annotated[float, Option(help="Requests a second of each of the nine.")] = 1.0,
    new_tokens: Annotated[int, Option(help="Tokens generated for each of their requests.")] = 32,
    flood_tokens: Annotated[int, Option(help="Tokens for each of the flood's.")] = 128,
    seconds: Annotated[int, Option(help="How long requests come, each time.")] = 10,
    rounds: Annotated[int, Option(help="How often, for each of the three.")] = 4,
    json_file: Annotated[Path | None, Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measure nine adapters' latency alone, then beside a flood by a tenth."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, adapters = folder / "base", folder / "adapters"
        adapters.mkdir()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        models.save_base(base, PATH, shape, device)
        torch.cuda.empty_cache()
        config = EngineConfig(
            base=str(base),
            adapters=str(adapters),
            max_num_seqs=max_num_seqs,
            max_model_len=PROMPT_TOKENS + max(new_tokens, flood_tokens) + 1,
            enable_prefix_caching=False,
        )
        bound = EngineCore(config)
        unbound = EngineCore(msgspec.structs.replace(config, max_slowdown=None))
        kind, sites = models.KINDS["lora16"], models.sites_of(bound)
        models.save_random_adapters(kind, sites, adapters, "lora", LIGHT + 1)
        load = Load(
            adapters, max_num_seqs + WAITING, rate, new_tokens, flood_tokens, WARM_UP_SECONDS
        )
        for core in (bound, unbound):  # loads the adapters
            _serve(core, load, Run(), flood=True)
        load.seconds = seconds
        alone, limited, unlimited = Run(), Run(), Run()
        with ProgressReport("rounds", rounds) as progress:
            for _ in range(rounds):
                _serve(bound, load, alone, flood=False)
                _serve(bound, load, limited, flood=True)
                _serve(unbound, load, unlimited, flood=True)
                progress.advance(1)
                progress.note(f"mean {np.mean(limited.latencies_ms):.0f} ms flooded")
    _report(alone, limited, unlimited, f"batches of {max_num_seqs}, {new_tokens} tokens", json_file)


def _report(alone: Run, limited: Run, unlimited: Run, title: str, json_file: Path | None) -> None:
    table = Table("", "alone", "flooded", "ratio", "without bound", "ratio", title=title)
    results = {}
    for name, figure in (
        ("p50", lambda values: np.percentile(values, 50)),
        ("mean", np.mean),
        ("p99", lambda values: np.percentile(values, 99)),
    ):
        a, b, c = (float(figure(run.latencies_ms)) for run in (alone, limited, unlimited))
        results[f"latency_{name}_ms"] = {"alone": a, "flooded": b, "without_bound": c}
        row = [f"{a:.0f}", f"{b:.0f}", f"{b / a:.2f}", f"{c:.0f}", f"{c / a:.2f}"]
        table.add_row(f"{name} latency of the nine, ms", *row)
    b, c = (run.flood_tokens / run.seconds for run in (limited, unlimited))
    results["flood_tokens_per_second"] = {"flooded": b, "without_bound": c}
    table.add_row("tokens/s of the flood", "", f"{b:.0f}", "", f"{c:.0f}", "")
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2))


def _serve(core: EngineCore, load: Load, run: Run, flood: bool) -> None:
    """Serve the nine for so many seconds, and as much of the flood as there is room for."""
    rng = np.random.default_rng(0)
    period = 1 / load.rate
    due = sorted(
        (period * (i / LIGHT + turn), i)
        for i in range(LIGHT)
        for turn in range(int(load.seconds * load.rate))
    )
    waiting: dict[str, float] = {}
    backlog: set[str] = set()
    sent = 0

    def send(adapter: str, max_tokens: int) -> str:
        nonlocal sent
        sent += 1
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0, ignore_eos=True)
        failure = core.add(
            Submit(
                request_id=str(sent),
                prompt_token_ids=rng.integers(1, 4096, PROMPT_TOKENS).tolist(),
                sampling=sampling,
                adapter=AdapterVersion(adapter, path=str(load.adapters / adapter)),
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
            waiting[send(f"lora-{i}", load.new_tokens)] = at
        while flood and len(backlog) < load.backlog:
            backlog.add(send(f"lora-{LIGHT}", load.flood_tokens))
        if not core.has_work:
            time.sleep(max(0.0, due[0][0] - now))
            continue
        if not core.is_runnable:  # adapters are being loaded
            core.wait(max(0.0, due[0][0] - now) if due else 1.0)
        for output in core.step().outputs:
            if output.request_id in backlog:
                run.flood_tokens += len(output.token_ids)
            if output.finish_reason is None:
                continue
            backlog.discard(output.request_id)
            if output.request_id in waiting:
                at = waiting.pop(output.request_id)
                run.latencies_ms.append((time.perf_counter() - start - at) * 1000)
    run.seconds += time.perf_counter() - start
    core.abort_all()


if __name__ == "__main__":
    typer.run(main)
