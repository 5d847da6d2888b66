"""What an adapter that was never seen costs: its request's first token, and the others' steps.

    python -m benchmarks.gpu_cold_adapter [--shape 8b] [--kinds lora16,own] [--json FILE]

63 requests decode, each on a LoRA (r = 16) of its own; another one comes, with a prompt of 256
tokens and an adapter that lies on the local disk, its files in the system's page cache. Then the
same request comes again, now that its adapter is on the device. What the first takes beyond the
second is the adapter's. `--shape tiny` tries it out on a CPU.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from typer import Option

from benchmarks import models
from malora.files import threaded_map
from malora.format import open_adapter
from malora.kernels.packed import basis_key, describe, pack
from malora.limits import WEIGHTS_NAME
from malora_server.engine.config import EngineConfig
from malora_server.engine.core import EngineCore
from malora_server.engine.messages import (
    AdapterVersion,
    LoadAdapter,
    RetireAdapter,
    SamplingParams,
    SequenceOutput,
    Submit,
)

OTHERS = 63
PROMPT_TOKENS = 256
NEW_TOKENS = 8
OTHERS_TOKENS = 480
PAUSE_STEPS = 10
"""Between two requests; the steps that the others' are measured against."""


def main(
    shape: Annotated[str, Option(help="8b, 1b or tiny.")] = "8b",
    kinds: Annotated[str, Option(help="Kinds of new adapters, comma-separated.")] = "lora16,own",
    count: Annotated[int, Option(help="New adapters of each kind.")] = 20,
    folder: Annotated[
        Path | None, Option(help="Where to write adapters; a temporary folder.")
    ] = None,
    json_file: Annotated[Path | None, Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Measure first tokens and steps while adapters come that were never seen."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {"device": str(device), "shape": shape}
    if device.type == "cuda":
        results["device"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory(dir=folder) as name:
        bench = _Bench(shape, device, Path(name))
        for kind in kinds.split(","):
            results[kind] = bench.measure(kind, count)
            _print(kind, results)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2))


@dataclass
class _Arrival:
    """One request that joins the others."""

    first_token_ms: float = 0.0
    queue_ms: float = 0.0
    """Until the step that computes its prompt is scheduled."""
    load_ms: float = 0.0
    """From disk to host memory, as the engine tells."""
    waiting_gaps: list[float] = field(default_factory=list)
    """Between the others' tokens, ms, until that step is scheduled."""
    prompt_gaps: list[float] = field(default_factory=list)
    """The same from there to its first token."""


class _Bench:
    """An engine in whose batch 63 requests decode."""

    def __init__(self, shape: str, device: torch.device, root: Path) -> None:
        self._root = root
        model = models.random_model(shape, device)
        self._vocab = min(model.config.vocab_size, 4096)
        gib = 2**30
        self._core = core = EngineCore(
            EngineConfig(
                base=shape,
                adapters=str(root),
                max_num_seqs=OTHERS + 1,
                max_model_len=PROMPT_TOKENS + OTHERS_TOKENS + 1,
                max_num_batched_tokens=8192,
                enable_prefix_caching=False,
                adapter_device_memory=12 * gib if device.type == "cuda" else gib,
                adapter_host_memory=12 * gib if device.type == "cuda" else gib,
            ),
            model,
        )
        self._sites = models.sites_of(core)
        adapters = models.random_adapters(models.KINDS["lora16"], self._sites, OTHERS)
        for number, linears in enumerate(adapters):
            core.adapters.add(f"other-{number}", linears)
        self._sent = 0
        self._last = 0.0
        self._others: set[str] = set()
        self._left = 0
        self._load_seconds: dict[str, float] = {}

    def measure(self, kind: str, count: int) -> dict[str, Any]:
        """All figures of one kind of adapter."""
        models.save_random_adapters(models.KINDS[kind], self._sites, self._root, kind, count + 2)
        parts = self._parts(self._root / f"{kind}-0")
        cold: list[_Arrival] = []
        seen: list[_Arrival] = []
        pauses: list[float] = []
        self._await_loader(AdapterVersion(f"{kind}-0", 1, str(self._root / f"{kind}-0")))
        # The first two have kernels compiled for these sizes.
        for number in range(count + 2):
            if self._left < OTHERS_TOKENS // 2:
                self._begin()
            version = AdapterVersion(f"{kind}-{number}", 0, str(self._root / f"{kind}-{number}"))
            for arrivals in (cold, seen):
                before = self._pause()
                arrival = self._join(version)
                if number >= 2:
                    arrivals.append(arrival)
                    pauses += before
            self._core.manage(RetireAdapter(version))
        return _figures(cold, seen, pauses) | {"parts": parts}

    def _await_loader(self, version: AdapterVersion) -> None:
        """Load an adapter while nothing else is done, and forget it."""
        self._core.abort_all()
        self._core.manage(LoadAdapter(version))
        self._finish()
        self._core.manage(RetireAdapter(version))
        self._left = 0

    def _finish(self) -> None:
        while self._core.has_work:
            if not self._core.is_runnable:
                self._core.wait(1.0)
            self._core.step()

    def _begin(self) -> None:
        """Let the others start anew, and all of them decode."""
        self._others.clear()
        self._core.abort_all()
        self._finish()  # of the last step, under way
        rng = np.random.default_rng(0)
        requests = [
            self._submit(AdapterVersion(f"other-{number}"), OTHERS_TOKENS, rng)
            for number in range(OTHERS)
        ]
        while len(self._step()) < OTHERS:
            pass
        self._others.update(requests)
        self._left = OTHERS_TOKENS - 10  # the first of them are ahead of the last
        for _ in range(PAUSE_STEPS):
            self._step()

    def _pause(self) -> list[float]:
        """A few gaps between the others' tokens alone, ms."""
        gaps = []
        for _ in range(PAUSE_STEPS):
            before = self._last
            self._step()
            gaps.append((self._last - before) * 1e3)
        return gaps[2:]  # the last one that joined may have part in the first

    def _join(self, version: AdapterVersion) -> _Arrival:
        """One request more, from its submission to its end."""
        arrival = _Arrival()
        start = time.monotonic()
        request_id = self._submit(version, NEW_TOKENS, np.random.default_rng(1))
        gaps: list[tuple[float, float]] = []
        while True:
            before = self._last
            outputs = self._step()
            if arrival.first_token_ms == 0:
                gaps.append((self._last, (self._last - before) * 1e3))
            mine = outputs.get(request_id)
            if mine is None:
                continue
            if arrival.first_token_ms == 0:
                assert mine.start is not None
                arrival.first_token_ms = (self._last - start) * 1e3
                arrival.queue_ms = mine.start.queue_seconds * 1e3
                arrival.load_ms = self._load_seconds[version.name] * 1e3
                scheduled = start + mine.start.queue_seconds
                arrival.waiting_gaps = [gap for end, gap in gaps if end <= scheduled]
                arrival.prompt_gaps = [gap for end, gap in gaps if end > scheduled]
            if mine.finish_reason is not None:
                return arrival

    def _step(self) -> dict[str, SequenceOutput]:
        """One step; its outputs by request. Every other has to get a token, once they decode."""
        self._left -= 1
        outputs = self._core.step()
        self._last = time.monotonic()
        for status in outputs.adapters:
            if status.error is not None:
                raise RuntimeError(status.error)
            self._load_seconds[status.name] = status.load_seconds
        for output in outputs.outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
        by_request = {output.request_id: output for output in outputs.outputs}
        if not by_request.keys() >= self._others:
            raise RuntimeError("a step brought no token to some request")
        return by_request

    def _submit(self, version: AdapterVersion, tokens: int, rng: np.random.Generator) -> str:
        self._sent += 1
        failure = self._core.add(
            Submit(
                request_id=str(self._sent),
                prompt_token_ids=rng.integers(1, self._vocab, PROMPT_TOKENS).tolist(),
                sampling=SamplingParams(
                    max_tokens=tokens, seed=0, temperature=0.0, ignore_eos=True
                ),
                adapter=version,
            )
        )
        if failure is not None:
            raise RuntimeError(failure.error)
        return str(self._sent)

    def _parts(self, folder: Path) -> dict[str, float]:
        """What each part of a load takes by itself, ms, as the loader does it: the median of 5.

        Of the headers one part or the other.
        """
        loader = self._core.adapters._loader
        assert loader is not None
        configuration = loader._configure
        work_in_threads = threaded_map(configuration.num_threads)
        dtype = getattr(torch, configuration.dtype)
        is_cuda = self._core.ready.device.startswith("cuda")
        size = (folder / WEIGHTS_NAME).stat().st_size
        # The CPU keeps single precision.
        host = torch.zeros(3 * size, dtype=torch.uint8, pin_memory=is_cuda)
        times: dict[str, list[float]] = {}

        def timed(part: str, work: Callable[..., Any], *args: Any) -> Any:
            start = time.perf_counter()
            result = work(*args)
            times.setdefault(part, []).append((time.perf_counter() - start) * 1e3)
            return result

        last = None
        for _ in range(5):
            with ExitStack() as stack:
                opened = open_adapter(folder, configuration.spec)
                found = timed("headers, unlike the last one's", stack.enter_context, opened)
                opened = open_adapter(folder, configuration.spec, last=last or found)
                last = found = timed("headers, like the last one's", stack.enter_context, opened)
                adapter = timed("values, read, checked and digested", found.read, work_in_threads)
                linears, paths = adapter.linears, configuration.paths
                key = basis_key(linears, adapter.basis_keys)
                packed = describe(adapter.digest, key, linears, len(paths), dtype)
                basis, own, _ = host.split(
                    [packed.basis_bytes, packed.own_bytes, len(host) - packed.num_bytes]
                )
                timed("packed", pack, packed, linears, paths, basis, own, dtype, work_in_threads)
                if is_cuda:
                    timed("to the device", _upload, host, packed.num_bytes)
        parts = {part: float(np.median(each)) for part, each in times.items()}
        return {"threads": configuration.num_threads, "megabytes": size / 1e6, **parts}


def _upload(host: torch.Tensor, nbytes: int) -> None:
    device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    device.copy_(host[:nbytes], non_blocking=True)
    torch.cuda.synchronize()


def _figures(
    cold: list[_Arrival], seen: list[_Arrival], pauses: list[float]
) -> dict[str, dict[str, float]]:
    step = float(np.median(pauses))
    beyond = [a.first_token_ms - b.first_token_ms for a, b in zip(cold, seen, strict=True)]
    waiting = [gap for each in cold for gap in each.waiting_gaps]
    rows = {
        "first token, new adapter": [each.first_token_ms for each in cold],
        "first token, seen before": [each.first_token_ms for each in seen],
        "first token, new beyond seen": beyond,
        "from disk to host memory": [each.load_ms for each in cold],
        "step of the others, alone": pauses,
        "… while an adapter comes": waiting or [step],
        "… with its prompt, new": [max(each.prompt_gaps) for each in cold],
        "… with its prompt, seen before": [max(each.prompt_gaps) for each in seen],
    }
    figures = {
        row: {"median": float(np.median(times)), "max": max(times)} for row, times in rows.items()
    }
    for row, of in figures.items():
        if row.startswith(("step", "…")):
            of["max_of_median_step"] = of["max"] / step
    return figures


def _print(kind: str, results: dict[str, Any]) -> None:
    figures = results[kind]
    table = Table(
        "ms", "median", "max", "max, of the others' median step",
        title=f"{results['shape']} on {results['device']}: a new adapter ({kind}) beside "
        f"{OTHERS} requests",
    )  # fmt: skip
    for row, of in figures.items():
        if row != "parts":
            ratio = of.get("max_of_median_step")
            table.add_row(
                row,
                f"{of['median']:.1f}",
                f"{of['max']:.1f}",
                "" if ratio is None else f"{ratio:.2f}",
            )
    Console().print(table)
    parts = figures["parts"]
    megabytes, threads = parts["megabytes"], parts["threads"]
    table = Table(
        "part of a load, by itself", "ms",
        title=f"{megabytes:.0f} MB, {threads} threads",
    )  # fmt: skip
    for part, ms in parts.items():
        if part not in ("megabytes", "threads"):
            table.add_row(part, f"{ms:.1f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
