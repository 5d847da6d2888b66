"""What the HTTP service costs: the same requests in-process and over HTTP, in turns.

    python -m benchmarks.http_serving [--concurrency 16] [--rounds 5] [--json FILE]
    python -m benchmarks.http_serving --shape 8b --kind lora16 --concurrency 64 --new-tokens 256

Everything shares this machine: the engine, the API process and the clients that ask. On a GPU both
engines are there at once, and need memory for two models.
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import psutil
import torch
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
    shape: Annotated[str, Option(help="8b, 1b, small or tiny.")] = "small",
    kind: Annotated[str, Option(help="The adapters' kind.")] = "own",
    concurrency: Annotated[int, Option(help="Requests at a time, each on its adapter.")] = 16,
    new_tokens: Annotated[int, Option(help="Tokens generated for each request.")] = 96,
    rounds: Annotated[int, Option(help="Times that every row is measured.")] = 5,
    json_file: Annotated[Path | None, Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measure output tokens a second over HTTP against the in-process engine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, adapters = folder / "base", folder / "adapters"
        adapters.mkdir()
        models.save_base(base, PATH, shape, device)
        torch.cuda.empty_cache()
        rng = np.random.default_rng(0)
        prompts = rng.integers(1, 4096, (concurrency, PROMPT_TOKENS)).tolist()
        names = [f"{kind}-{i}" for i in range(concurrency)]
        config = EngineConfig(
            base=str(base),
            adapters=str(adapters),
            enable_prefix_caching=False,
            max_num_seqs=concurrency,
            max_model_len=PROMPT_TOKENS + new_tokens + 1,
            adapter_device_memory=(6 if device.type == "cuda" else 1) << 30,
        )
        llm = LLM(config)
        sites = models.sites_of(llm._core)
        models.save_random_adapters(models.KINDS[kind], sites, adapters, kind, concurrency)
        sampling = SamplingParams(max_tokens=new_tokens, seed=0, temperature=0.0, ignore_eos=True)
        bodies = [
            {
                "model": model,
                "prompt": prompt,
                "max_tokens": new_tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            for model, prompt in zip(names, prompts, strict=True)
        ]
        with _server(config) as (url, api), _clients(url, bodies) as ask:
            rows: dict[str, Callable[[], object]] = {
                "in process": lambda: llm.generate(prompts, sampling, names),
                "HTTP": lambda: ask(False),
                "HTTP, streamed": lambda: ask(True),
            }
            seconds: dict[str, list[float]] = {row: [] for row in rows}
            busy: dict[str, list[float]] = {row: [] for row in rows}
            for run in rows.values():
                run()
            for _ in range(rounds):
                for row, run in rows.items():
                    start, before = time.perf_counter(), _cpu_seconds(api)
                    run()
                    busy[row].append(_cpu_seconds(api) - before)
                    seconds[row].append(time.perf_counter() - start)
    table = Table(
        "row", "tokens/s", "of in process", "API process, µs of CPU a token",
        title=f"{shape}, {concurrency} requests at a time ({kind})",
    )  # fmt: skip
    results = {}
    num_tokens = concurrency * new_tokens
    for row, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["in process"], times, strict=True))
        tokens = num_tokens / statistics.median(times)
        api_us = statistics.median(busy[row]) / num_tokens * 1e6
        results[row] = {"tokens_per_second": tokens, "ratio": ratio, "api_cpu_us_a_token": api_us}
        in_process = row == "in process"
        table.add_row(row, f"{tokens:.0f}", f"{ratio:.2f}", "" if in_process else f"{api_us:.0f}")
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2))


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


@contextmanager
def _server(config: EngineConfig) -> Iterator[tuple[str, psutil.Process]]:
    """A server of this configuration: its URL, and its API process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "base": config.base,
        "adapters": config.adapters,
        "max-num-seqs": config.max_num_seqs,
        "max-model-len": config.max_model_len,
        "adapter-device-memory": config.adapter_device_memory,
        "port": port,
        "log-level": "warning",
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "-m", "malora.cli", "serve", *flags, "--no-enable-prefix-caching"]
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}")
            time.sleep(0.2)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _clients(url: str, bodies: list[dict[str, Any]]) -> Iterator[Callable[[bool], None]]:
    """A function that makes a request of each body, all at once, streamed or not.

    A client and a connection for each body, which stay: those of one client would be searched for
    a free one at each request, which takes longer than all else that clients do.
    """

    async def ask(client: httpx.AsyncClient, body: dict[str, Any], stream: bool) -> None:
        if stream:
            usage = await _stream(client, body)
        else:
            reply = await client.post("/v1/completions", json=body)
            reply.raise_for_status()
            usage = reply.json()["usage"]
        count, wanted = usage["completion_tokens"], body["max_tokens"]
        if count != wanted:
            raise RuntimeError(f"{count} tokens came instead of {wanted}")

    async def ask_all(stream: bool) -> None:
        await asyncio.gather(*(ask(*pair, stream) for pair in zip(clients, bodies, strict=True)))

    async def close() -> None:
        for client in clients:
            await client.aclose()

    limits = httpx.Limits(keepalive_expiry=None)
    clients = [httpx.AsyncClient(base_url=url, limits=limits, timeout=None) for _ in bodies]
    with asyncio.Runner() as runner:
        yield lambda stream: runner.run(ask_all(stream))
        runner.run(close())


async def _stream(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, int]:
    """The usage at the stream's end; what comes before is received, and not looked at."""
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    end = b""
    async with client.stream("POST", "/v1/completions", json=streamed) as reply:
        reply.raise_for_status()
        async for data in reply.aiter_raw():
            end = (end + data)[-4096:]
    *_, usage, done, _ = end.decode(errors="replace").split("\n\n")
    if done != "data: [DONE]":
        raise RuntimeError(f"a stream ended with {done!r}")
    return json.loads(usage.removeprefix("data: "))["usage"]


if __name__ == "__main__":
    typer.run(main)
