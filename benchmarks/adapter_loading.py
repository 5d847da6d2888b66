"""What loading adapters does to those who decode: inter-token latency with and without, in one run.

    python -m benchmarks.adapter_loading [--loads 100] [--rounds 3] [--json FILE]

32 requests decode, each on an adapter of its own; meanwhile other adapters are read from disk,
checked, and brought to the device. The two take turns on the same engine, a few adapters each.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from typer import Option

from benchmarks import models
from malora.base_model import PATH
from malora_server.engine.config import EngineConfig
from malora_server.engine.core import EngineCore
from malora_server.engine.messages import (
    AdapterVersion,
    LoadAdapter,
    PinAdapter,
    RetireAdapter,
    SamplingParams,
    Submit,
)

DECODING = 32
PROMPT_TOKENS = 32
NEW_TOKENS = 900
WARM_STEPS = 20
TOGETHER = 5
"""Adapters that are asked for at once; as many steps without any follow."""


def main(
    loads: Annotated[int, Option(help="Adapters that are loaded in each round.")] = 100,
    rounds: Annotated[int, Option(help="Times that each is measured.")] = 3,
    small: Annotated[bool, Option(help="The embedded base, instead of 27.8 M parameters.")] = False,
    json_file: Annotated[Path | None, Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measure the gaps between tokens of 32 requests, with and without loads beside them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, adapters = PATH if small else folder / "base", folder / "adapters"
        if not small:
            models.save_base(base, PATH)
        models.save_adapters(base, adapters, DECODING + loads, models.lora(), "lora")
        config = EngineConfig(
            base=str(base),
            adapters=str(adapters),
            max_num_seqs=DECODING,
            enable_prefix_caching=False,
            adapter_device_memory=2 << 30,
            adapter_host_memory=2 << 30,
        )
        bench = _Bench(EngineCore(config), adapters)
        gaps: dict[str, list[float]] = {"alone": [], "while adapters load": []}
        seconds = []
        for turn in range(rounds):
            seconds.append(0.0)
            for first in range(0, loads, TOGETHER):
                numbers = range(first, min(first + TOGETHER, loads))
                took, with_loads = bench.load(turn, numbers)
                seconds[-1] += took
                gaps["while adapters load"] += with_loads
                # As many steps, at sequences as long.
                gaps["alone"] += [bench.step() for _ in with_loads]
    results: dict[str, Any] = {"load_seconds": seconds}
    table = Table(
        "gap between tokens, ms", *gaps, "ratio",
        title=f"{DECODING} requests decode, {loads} adapters are loaded in "
        f"{np.median(seconds):.1f} s",
    )  # fmt: skip
    for percentile in (50, 99):
        a, b = (float(np.percentile(values, percentile)) * 1000 for values in gaps.values())
        results[f"p{percentile}"] = {"alone_ms": a, "loading_ms": b, "ratio": b / a}
        table.add_row(f"p{percentile}", f"{a:.1f}", f"{b:.1f}", f"{b / a:.3f}")
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2))


class _Bench:
    """An engine whose batch is full of requests that decode."""

    def __init__(self, core: EngineCore, root: Path) -> None:
        self._core = core
        self._root = root
        self._last = 0.0
        self._sent = 0
        self._left = 0
        self._loaded: set[AdapterVersion] = set()
        for number in range(DECODING):
            core.manage(LoadAdapter(self._version(number, 0)))
        while core.has_work:
            self._advance()
        self._begin()

    def step(self) -> float:
        """Seconds from one token of every request to the next."""
        if self._left == 0:
            self._begin()
        self._left -= 1
        if self._advance() < DECODING:
            raise RuntimeError("a request got no token in a step")
        now = time.perf_counter()
        gap, self._last = now - self._last, now
        return gap

    def _begin(self) -> None:
        """Let all requests decode, from their prompts on; what that takes is not measured."""
        self._core.abort_all()
        rng = np.random.default_rng(0)
        for number in range(DECODING):
            self._submit(number, rng)
        while self._advance() < DECODING:
            pass
        self._left = NEW_TOKENS // 2  # the first ones are ahead of the last
        for _ in range(WARM_STEPS):
            self.step()

    def load(self, turn: int, numbers: range) -> tuple[float, list[float]]:
        """Bring these adapters to the device; seconds, and the gaps between tokens meanwhile."""
        versions = [self._version(DECODING + i, turn + 1) for i in numbers]
        self._loaded.clear()
        start = time.perf_counter()
        for version in versions:
            self._core.manage(LoadAdapter(version))
            self._core.manage(PinAdapter(version, True))
        gaps = []
        while len(self._loaded) < len(versions):
            gaps.append(self.step())
        seconds = time.perf_counter() - start
        for version in versions:
            self._core.manage(RetireAdapter(version))
        return seconds, gaps

    def _version(self, number: int, of: int) -> AdapterVersion:
        name = f"lora-{number}"
        return AdapterVersion(name, of, str(self._root / name))

    def _submit(self, number: int, rng: np.random.Generator) -> None:
        self._sent += 1
        failure = self._core.add(
            Submit(
                request_id=str(self._sent),
                prompt_token_ids=rng.integers(1, 4096, PROMPT_TOKENS).tolist(),
                sampling=SamplingParams(
                    max_tokens=NEW_TOKENS, seed=0, temperature=0.0, ignore_eos=True
                ),
                adapter=self._version(number, 0),
            )
        )
        if failure is not None:
            raise RuntimeError(failure.error)

    def _advance(self) -> int:
        """One step; how many requests got a token."""
        if not self._core.is_runnable:
            self._core.wait(1.0)
        outputs = self._core.step()
        for status in outputs.adapters:
            if status.error is not None:
                raise RuntimeError(status.error)
            if status.tier == "device" and status.pinned:
                number = int(status.name.removeprefix("lora-"))
                self._loaded.add(self._version(number, status.number))
        for output in outputs.outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
        return sum(output.finish_reason is None for output in outputs.outputs)


if __name__ == "__main__":
    typer.run(main)
