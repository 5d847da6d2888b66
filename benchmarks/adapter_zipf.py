"""Far more adapters than memory: the cost, against the same requests with all of them resident.

    python -m benchmarks.adapter_zipf [--requests 20000] [--memory 50] [--json FILE]

Adapters are asked for in Zipf order, so many requests at a time, of the engine in this process on
the embedded base. Every reply is checked to have come; at the end nothing may be held by anyone,
and all memory must be free once the adapters are given up.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from typer import Option

from benchmarks import models
from malora.base_model import PATH
from malora.training.progress import ProgressReport
from malora_server.engine.config import EngineConfig
from malora_server.engine.core import EngineCore
from malora_server.engine.messages import AdapterVersion, RetireAdapter, SamplingParams, Submit

PROMPT_TOKENS = 32
NEW_TOKENS = 8
CONCURRENCY = 32
NOTE_EVERY = 1000
"""Requests; on a terminal, a bar moves."""
MIB = 2**20


def main(
    registered: Annotated[int, Option(help="Adapters in the folder.")] = 2000,
    used: Annotated[int, Option(help="Adapters that requests name.")] = 1000,
    memory: Annotated[int, Option(help="Adapters that each tier has memory for.")] = 50,
    requests: Annotated[int, Option(help="Requests in each row.")] = 20_000,
    exponent: Annotated[float, Option(help="Of the Zipf order: 1 is the classic one.")] = 1.0,
    json_file: Annotated[Path | None, Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measure requests a second with memory for a few adapters, and with memory for all."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        versions = _save_adapters(root, registered)
        weights = 1 / np.arange(1, used + 1) ** exponent
        order = np.random.default_rng(0).choice(used, requests, p=weights / weights.sum())
        rows = {
            name: _run(root, versions, order, count, name)
            for name, count in (("all resident", used), (f"memory for {memory}", memory))
        }
    resident = rows["all resident"]["requests_per_second"]
    table = Table(
        "row", "requests/s", "of all resident", "read from disk", "hits", "RSS grew, MiB",
        title=f"{requests} requests for {used} of {registered} adapters, {CONCURRENCY} at a time",
    )  # fmt: skip
    for row, figures in rows.items():
        figures["ratio"] = figures["requests_per_second"] / resident
        table.add_row(
            row,
            f"{figures['requests_per_second']:.0f}",
            f"{figures['ratio']:.2f}",
            str(figures["loads"]),
            f"{1 - figures['loads'] / requests:.1%}",
            f"{figures['rss_growth_mib']:.1f}",
        )
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2))


def _save_adapters(root: Path, count: int) -> list[AdapterVersion]:
    """`count` different adapters, from one that PEFT saved."""
    models.save_adapters(PATH, root, 1, models.lora(r=8), "first")
    first = root / "first-0"
    config = (first / "adapter_config.json").read_bytes()
    tensors = load_file(first / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    versions = []
    for number in range(count):
        folder = root / f"adapter-{number}"
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes(config)
        for tensor in tensors.values():
            tensor.normal_(0, 0.02, generator=generator)
        save_file(tensors, folder / "adapter_model.safetensors")
        versions.append(AdapterVersion(folder.name, 1, str(folder)))
    return versions


def _run(
    root: Path,
    versions: list[AdapterVersion],
    order: np.ndarray[Any, Any],
    memory: int,
    title: str,
) -> dict[str, Any]:
    """The requests' figures with memory for so many adapters, after one request for each of these.

    Raises RuntimeError where a request fails or anything is held when all are done.
    """
    size = _adapter_bytes(root, versions[0])
    config = EngineConfig(
        base=str(PATH),
        adapters=str(root),
        adapter_device_memory=memory * size,
        adapter_host_memory=memory * size,
        kv_cache_memory=256 * MIB,
        max_num_seqs=CONCURRENCY,
        enable_prefix_caching=False,
    )
    core = EngineCore(config)
    quarter = len(order) // 4
    with ProgressReport(title, memory + len(order)) as progress:
        _serve(core, versions, np.arange(memory), progress)
        before = core.stats().adapters
        seconds = _serve(core, versions, order[:quarter], progress)
        rss = psutil.Process().memory_info().rss
        seconds += _serve(core, versions, order[quarter:], progress)
        growth = psutil.Process().memory_info().rss - rss
    stats = core.stats()
    after = stats.adapters
    if stats.num_requests_running or stats.num_requests_waiting or stats.kv_cache_usage_ratio:
        raise RuntimeError(f"requests are held though all are done: {stats}")
    if after.load_failures:
        raise RuntimeError(f"{after.load_failures} loads failed")
    for version in versions:
        core.manage(RetireAdapter(version))
    left = core.stats().adapters
    if left.device_bytes or left.host_bytes or left.num_host:
        raise RuntimeError(f"memory is held by adapters that were given up: {left}")
    return {
        "requests_per_second": len(order) / seconds,
        "loads": after.loads - before.loads,
        "device_evictions": after.device_evictions - before.device_evictions,
        "host_evictions": after.host_evictions - before.host_evictions,
        "rss_growth_mib": growth / MIB,
    }


def _adapter_bytes(root: Path, version: AdapterVersion) -> int:
    """What one adapter takes in a tier."""
    core = EngineCore(EngineConfig(base=str(PATH), adapters=str(root), kv_cache_memory=16 * MIB))
    with ProgressReport("an adapter", 1) as progress:
        _serve(core, [version], np.zeros(1, np.int64), progress)
    return core.stats().adapters.device_bytes


def _serve(
    core: EngineCore,
    versions: list[AdapterVersion],
    order: np.ndarray[Any, Any],
    progress: ProgressReport,
) -> float:
    """Seconds that these requests take, CONCURRENCY in flight at any time."""
    rng = np.random.default_rng(1)
    sampling = SamplingParams(max_tokens=NEW_TOKENS, seed=0, temperature=0.0, ignore_eos=True)
    sent = in_flight = done = 0
    start = time.perf_counter()
    while done < len(order):
        while in_flight < CONCURRENCY and sent < len(order):
            submit = Submit(
                request_id=str(sent),
                prompt_token_ids=rng.integers(1, 1000, PROMPT_TOKENS).tolist(),
                sampling=sampling,
                adapter=versions[order[sent]],
            )
            failure = core.add(submit)
            if failure is not None:
                raise RuntimeError(failure.error)
            sent += 1
            in_flight += 1
        if not core.is_runnable:
            core.wait(1.0)
        for output in core.step().outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
            if output.finish_reason is not None:
                in_flight -= 1
                done += 1
                progress.advance(1)
                if done % NOTE_EVERY == 0:
                    progress.note("")
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
