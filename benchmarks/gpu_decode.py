"""Decode steps and prefill on a GPU: batches with and without adapters, against the base alone.

    python -m benchmarks.gpu_decode [--shape 8b] [--batch 64] [--rows base,lora-16x64] [--json FILE]

The base model has random weights of a published shape, in bfloat16. Every row runs the same
prompts for the same number of new tokens, greedily, through the engine as the server runs it;
a decode step's time is wall time, from one step's tokens to the next's, all sequences decoding.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from typer import Option

from benchmarks import models
from benchmarks.models import KINDS
from malora_server.engine.config import EngineConfig
from malora_server.engine.core import EngineCore
from malora_server.engine.messages import AdapterVersion, SamplingParams, Submit
from malora_server.model.quantization import Quantization, quantizer

PROMPT_TOKENS = 256
NEW_TOKENS = 256
ROWS: dict[str, tuple[str | None, int, int]] = {
    "base": (None, 0, 0),
    "64 adapters resident, none used": ("lora16", 0, 64),
    "one in the batch has a LoRA r=16": ("lora16", 1, 1),
    "one LoRA r=16": ("lora16", 1, 64),
    "64 LoRAs r=16": ("lora16", 64, 64),
    "one MALoRA, family": ("family", 1, 64),
    "64 MALoRAs, family": ("family", 64, 64),
    "one MALoRA, own basis": ("own", 1, 64),
    "64 MALoRAs, own bases": ("own", 64, 64),
    "64 LoRAs r=64": ("lora64", 64, 64),
}
"""Row -> the kind of its adapters, how many are used, and by how many of each 64 requests."""
VLLM = {
    ("8b", 1): {"base": 4.85, "one LoRA r=16": 6.65},
    ("8b", 16): {"base": 4.89, "one LoRA r=16": 6.66, "64 LoRAs r=16": 12.4},
    ("8b", 64): {
        "base": 6.19,
        "one LoRA r=16": 7.85,
        "64 LoRAs r=16": 32.7,
        "64 LoRAs r=64": 63.6,
    },
    ("8b", 128): {
        "base": 7.47,
        "one LoRA r=16": 10.6,
        "64 LoRAs r=16": 29.9,
        "64 LoRAs r=64": 38.1,
    },
    ("1b", 64): {"base": 2.36, "64 LoRAs r=16": 10.7},
}
"""Milliseconds a decode step of vLLM 0.26.0 as installed, on an H200 on 2026-11-22: torch 2.11,
CUDA graphs, asynchronous scheduling, FlashAttention 3; the same shapes, prompts and lengths."""


def main(
    shape: Annotated[str, Option(help="8b or 1b.")] = "8b",
    batch: Annotated[list[int] | None, Option(help="Requests at a time.")] = None,
    rows: Annotated[str, Option(help="Kinds of adapters, comma-separated.")] = ",".join(KINDS),
    prefill: Annotated[bool, Option(help="Measure prefill too.")] = True,
    quantization: Annotated[
        Quantization | None, Option(help="fp8 or int8; vLLM's figures are not.")
    ] = None,
    json_file: Annotated[Path | None, Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measure decode steps and prefill of our engine, with every kind of adapter."""
    batches = batch or [64]
    core = _engine(shape, max(batches), quantization)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "shape": shape}
    results["quantization"] = quantization
    for kind in ["", *rows.split(",")]:
        if kind:
            _add_adapters(core, kind)
        for size in batches:
            for row, (of, used, among) in ROWS.items():
                if (of or "") == kind:
                    _measure(core, shape, size, row, (kind, used, among), prefill, results)
        if kind:
            _remove_adapters(core, kind)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2))
    _print(results, shape, batches)


def _measure(
    core: EngineCore,
    shape: str,
    size: int,
    row: str,
    use: tuple[str, int, int],
    prefill: bool,
    results: dict[str, Any],
) -> None:
    kind, used, among = use
    # A row's adapters, repeated over a larger batch; of 64 requests `among` have one.
    names = [f"{kind}-{i % used}" if used and i % 64 < among else None for i in range(size)]
    figures: dict[str, float | None] = {"step_ms": _decode(core, names)}
    if prefill and size == 64:
        rate, base_rate = _prefill(core, names)
        figures["prefill_tokens_per_second"] = rate
        figures["prefill_of_base"] = rate / base_rate
    figures["vllm_step_ms"] = VLLM.get((shape, size), {}).get(row)
    results.setdefault(str(size), {})[row] = figures
    print(size, row, figures, flush=True)


def _engine(shape: str, max_batch: int, quantization: Quantization | None) -> EngineCore:
    model = models.random_model(shape, torch.device("cuda"))
    if quantization is not None:
        from torchao.quantization import quantize_

        scheme = quantizer(quantization, torch.bfloat16, torch.device("cuda"))
        quantize_(model.model.layers, scheme.quant_type)
        torch.cuda.empty_cache()
    return EngineCore(
        EngineConfig(
            base=shape,
            max_num_seqs=max_batch,
            max_slowdown=None,  # every request is in every step
            max_model_len=PROMPT_TOKENS + NEW_TOKENS + 1,
            max_num_batched_tokens=8192,
            enable_prefix_caching=False,
            adapter_device_memory=24 << 30,
        ),
        model,
    )


def _add_adapters(core: EngineCore, kind: str, count: int = 64) -> None:
    """Random adapters, straight to the device."""
    sites = models.sites_of(core)
    for number, linears in enumerate(models.random_adapters(KINDS[kind], sites, count)):
        core.adapters.add(f"{kind}-{number}", linears)


def _remove_adapters(core: EngineCore, kind: str, count: int = 64) -> None:
    core._runner._runs_key, core._runner._runs, core._runner._plan = (), [], None
    for number in range(count):
        core.adapters.remove(f"{kind}-{number}")
    torch.cuda.empty_cache()


def _submit(core: EngineCore, names: list[str | None], new_tokens: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for number, name in enumerate(names):
        ids = torch.randint(1000, 100_000, (PROMPT_TOKENS,), generator=generator).tolist()
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, seed=0, ignore_eos=True)
        failure = core.add(
            Submit(
                request_id=str(number),
                prompt_token_ids=ids,
                sampling=sampling,
                adapter=None if name is None else AdapterVersion(name),
            )
        )
        if failure is not None:
            raise RuntimeError(failure.error)


def _decode(core: EngineCore, names: list[str | None]) -> float:
    """Median milliseconds a step while every sequence decodes."""
    _submit(core, names, NEW_TOKENS)
    times: list[float] = []
    last = time.perf_counter()
    while core.has_work:
        outputs = core.step()
        now = time.perf_counter()
        if len(outputs.outputs) == len(names):
            times.append(now - last)
        last = now
    return statistics.median(times[5:]) * 1e3


def _prefill(core: EngineCore, names: list[str | None]) -> tuple[float, float]:
    """Prompt tokens a second, and the base's: medians of six, after one that warms up.

    In turns, for the clock is not the same all the time.
    """
    rates: tuple[list[float], list[float]] = ([], [])
    base: list[str | None] = [None] * len(names)
    for _ in range(7):
        for of, some in zip(rates, (names, base), strict=True):
            _submit(core, some, 1)
            torch.cuda.synchronize()
            start = time.perf_counter()
            while core.has_work:
                core.step()
            of.append(len(names) * PROMPT_TOKENS / (time.perf_counter() - start))
    rate, base_rate = (statistics.median(of[1:]) for of in rates)
    return rate, base_rate


def _print(results: dict[str, Any], shape: str, batches: list[int]) -> None:
    for size in batches:
        figures = results[str(size)]
        base = figures["base"]
        table = Table(
            "row", "step, ms", "of base", "vLLM", "of its base", "prefill, tok/s", "of base",
            title=f"{shape} {results['quantization'] or ''} on {results['device']}, "
            f"{size} requests, {PROMPT_TOKENS} + {NEW_TOKENS} tokens",
        )  # fmt: skip
        for row, of in figures.items():
            theirs, their_base = of["vllm_step_ms"], base["vllm_step_ms"]
            rate = of.get("prefill_tokens_per_second")
            table.add_row(
                row,
                f"{of['step_ms']:.2f}",
                f"{of['step_ms'] / base['step_ms']:.3f}",
                "" if theirs is None else f"{theirs:.2f}",
                "" if theirs is None else f"{theirs / their_base:.2f}",
                "" if rate is None else f"{rate:.0f}",
                "" if rate is None else f"{of['prefill_of_base']:.3f}",
            )
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
