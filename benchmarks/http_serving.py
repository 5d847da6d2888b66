"""What the HTTP service costs: the same requests in-process and over HTTP, in turns.

    python -m benchmarks.http_serving [--concurrency 16] [--rounds 5] [--json FILE]

Everything shares this machine: the engine, the API process and the clients that ask.
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
from typing import Annotated

import httpx
import numpy as np
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
    concurrency: Annotated[int, Option(help="Requests at a time, each on its adapter.")] = 16,
    new_tokens: Annotated[int, Option(help="Tokens generated for each request.")] = 96,
    rounds: Annotated[int, Option(help="Times that every row is measured.")] = 5,
    json_file: Annotated[Path | None, Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measure output tokens a second over HTTP against the in-process engine."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, adapters = folder / "base", folder / "adapters"
        models.save_base(base, PATH)
        models.save_adapters(base, adapters, concurrency, models.malora(), "malora")
        rng = np.random.default_rng(0)
        prompts = rng.integers(1, 4096, (concurrency, PROMPT_TOKENS)).tolist()
        names = [f"malora-{i}" for i in range(concurrency)]
        config = EngineConfig(base=str(base), adapters=str(adapters), enable_prefix_caching=False)
        llm = LLM(config)
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
        with _server(base, adapters) as url:
            rows: dict[str, Callable[[], object]] = {
                "in process": lambda: llm.generate(prompts, sampling, names),
                "HTTP": lambda: asyncio.run(_ask(url, bodies, new_tokens, stream=False)),
                "HTTP, streamed": lambda: asyncio.run(_ask(url, bodies, new_tokens, stream=True)),
            }
            seconds: dict[str, list[float]] = {row: [] for row in rows}
            for run in rows.values():
                run()
            for _ in range(rounds):
                for row, run in rows.items():
                    start = time.perf_counter()
                    run()
                    seconds[row].append(time.perf_counter() - start)
    table = Table("row", "tokens/s", "of in process", title=f"{concurrency} requests at a time")
    results = {}
    for row, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["in process"], times, strict=True))
        tokens = concurrency * new_tokens / statistics.median(times)
        results[row] = {"tokens_per_second": tokens, "ratio": ratio}
        table.add_row(row, f"{tokens:.0f}", f"{ratio:.2f}")
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2))


@contextmanager
def _server(base: Path, adapters: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "malora.cli", "serve", "--base", base, "--adapters", adapters]
    flags = ["--port", str(port), "--no-enable-prefix-caching", "--log-level", "warning"]
    process = subprocess.Popen([sys.executable, *map(str, command), *flags])
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
        yield url
    finally:
        process.terminate()
        process.wait()


async def _ask(url: str, bodies: list[dict[str, object]], new_tokens: int, stream: bool) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=len(bodies))
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=None) as client:

        async def complete(body: dict[str, object]) -> None:
            if not stream:
                reply = await client.post("/v1/completions", json=body)
                reply.raise_for_status()
                count = reply.json()["usage"]["completion_tokens"]
            else:
                count = 0
                streamed = {"stream": True, "stream_options": {"include_usage": True}}
                async with client.stream(
                    "POST", "/v1/completions", json={**body, **streamed}
                ) as events:
                    events.raise_for_status()
                    async for line in events.aiter_lines():
                        # The one event without choices is the last, and counts the tokens.
                        if line.startswith("data: {") and '"choices":[]' in line:
                            usage = json.loads(line.removeprefix("data: "))["usage"]
                            count = usage["completion_tokens"]
            if count != new_tokens:
                raise RuntimeError(f"{count} tokens came instead of {new_tokens}")

        await asyncio.gather(*(complete(body) for body in bodies))


if __name__ == "__main__":
    typer.run(main)
