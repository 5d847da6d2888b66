"""A server under mixed load while it is harmed in every way: nothing is lost, leaks, or is wrong.

`make chaos` runs it for minutes (MALORA_CHAOS_SECONDS), the suite for as long as each fault takes
once.
"""

import asyncio
import os
import random
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from malora.base_model import PATH as BASE
from malora_server.engine.config import EngineConfig
from malora_server.engine.llm import LLM
from malora_server.engine.messages import SamplingParams
from tests.end_to_end.chaos.faults import Faults
from tests.end_to_end.chaos.load import COMPLETIONS, MAX_TOKENS, Expected, Load

SECONDS = float(os.environ.get("MALORA_CHAOS_SECONDS", 0))
SEED = int(os.environ.get("MALORA_CHAOS_SEED", 1))
NUM_CONNECTIONS = 10_000 if SECONDS else 1_000
NUM_WORKERS = 12
ENGINE_TIMEOUT = 4
DEVICE_MEMORY = "10MiB"
HOST_MEMORY = "12MiB"
"""Too little for all adapters at a time, enough for the largest beside those that get pinned."""
NAMES = ["experts", "compact", "dense", "lora"]
CONTENTS = NAMES[1:]
"""What adapters are replaced with."""
PROMPTS = [
    "Count from one:",
    "The capital of France is",
    "Once upon a time",
    "SELECT name FROM",
    "date: 26th of November 1993",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of adapters, on a small disk of its own where this process may make one."""
    root = tmp_path_factory.mktemp("chaos")
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(root)]
    mounted = os.geteuid() == 0 and subprocess.run(command, check=False).returncode == 0
    yield root
    if mounted:
        subprocess.run(["umount", "-l", str(root)], check=True)


@pytest.fixture(scope="module")
def folder(root: Path, adapters: Path) -> Path:
    """The adapters that the server serves, and one that will be replaced by others of them."""
    for name in NAMES:
        shutil.copytree(adapters / name, root / name)
    shutil.copytree(root / CONTENTS[0], root / "swap")
    return root


@pytest.fixture(scope="module")
def texts(folder: Path) -> dict[tuple[str, str], str]:
    """What the in-process engine says, one request at a time: by model and prompt."""
    llm = LLM(EngineConfig(base=str(BASE), adapters=str(folder), num_threads=1))
    sampling = SamplingParams(max_tokens=MAX_TOKENS, seed=0, temperature=0, ignore_eos=True)
    return {
        (name or "base", prompt): llm.generate([prompt], sampling, [name])[0].text
        for name in [None, *NAMES]
        for prompt in PROMPTS
    }


async def expect(url: str, texts: dict[tuple[str, str], str]) -> Expected:
    """The quiet server says the same; its fingerprints name the contents."""
    expected = Expected(PROMPTS)
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        for (model, prompt), text in texts.items():
            reply = await http.post(
                COMPLETIONS,
                json={
                    "model": model,
                    "prompt": prompt,
                    "max_tokens": MAX_TOKENS,
                    "temperature": 0,
                    "ignore_eos": True,
                },
            )
            document = reply.raise_for_status().json()
            assert document["choices"][0]["text"] == text
            fingerprint = document["system_fingerprint"]
            expected.texts[fingerprint, prompt] = text
            expected.fingerprints.setdefault(model, set()).add(fingerprint)
    expected.models = [*expected.fingerprints, "swap"]
    expected.unsteady = {"swap", "storm-0", "storm-1"}
    contents = {name for names in expected.fingerprints.values() for name in names} - {"base"}
    expected.fingerprints |= dict.fromkeys(expected.unsteady, contents)
    return expected


def schedule(faults: Faults) -> Iterator[Callable[[], Awaitable[None]]]:
    """Each fault once; then, where there is time, each once again in another order, and so on.

    So an engine is never lost as often in a row as makes the server give up.
    """
    rng = random.Random(SEED)
    while True:
        each = faults.all() if SECONDS else faults.short()
        rng.shuffle(each)
        yield from each
        if not SECONDS:
            return


async def test_nothing_is_lost_leaks_or_is_wrong(
    launch: Callable[..., Any], folder: Path, texts: dict[tuple[str, str], str]
) -> None:
    flags = ("--base", BASE, "--served-model-name", "base", "--adapters", folder)
    times = ("--engine-timeout", ENGINE_TIMEOUT, "--shutdown-timeout", 10)
    sizes = ("--kv-cache-memory", "48MiB", "--max-num-seqs", 16)
    memory = ("--adapter-device-memory", DEVICE_MEMORY, "--adapter-host-memory", HOST_MEMORY)
    server = launch(*flags, *times, *sizes, *memory)
    expected = await expect(server.url, texts)
    load = Load(server.url, expected, SEED)
    faults = Faults(
        server,
        load,
        folder,
        [folder / name for name in CONTENTS],
        seed=SEED,
        num_connections=NUM_CONNECTIONS,
        engine_timeout=ENGINE_TIMEOUT,
        has_small_disk=folder.is_mount(),
    )
    rng = random.Random(SEED)
    started = time.monotonic()
    working = asyncio.create_task(load.run(NUM_WORKERS))
    await asyncio.sleep(2)
    uses = [Use.of(server)]
    for fault in schedule(faults):
        if SECONDS and time.monotonic() - started > SECONDS:
            break
        print(f"{time.monotonic() - started:6.1f} s: {fault.__name__}", flush=True)
        await fault()
        uses.append(Use.of(server))
        await asyncio.sleep(rng.uniform(0.2, 6 if SECONDS else 0.5))
    load.stop()
    await working
    report(load, time.monotonic() - started, uses)
    assert load.problems == []
    await check_at_rest(server.url, faults.num_engines_lost)
    await check_use(server, uses, len(faults.all()))
    assert await expect(server.url, texts)
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()
    assert list(server.log.parent.glob("malora-*")) == []


class Use:
    """What the API process holds."""

    def __init__(self, fds: int, rss: int) -> None:
        self.fds = fds
        self.rss = rss

    @classmethod
    def of(cls, server: Any) -> "Use":
        process = psutil.Process(server.process.pid)
        return cls(process.num_fds(), process.memory_info().rss)


def report(load: Load, seconds: float, uses: list[Use]) -> None:
    print(f"{sum(load.outcomes.values())} requests in {seconds:.0f} s, by outcome:")
    for outcome, count in sorted(load.outcomes.items()):
        print(f"  {count:6} {outcome}")
    print(f"slowest answer: {load.slowest:.1f} s")
    print("API process, MiB after each fault:", *(use.rss // 2**20 for use in uses))
    for problem in load.problems:
        print(f"PROBLEM {problem}")


async def check_at_rest(url: str, num_engines_lost: int) -> None:
    want = {
        "malora_num_requests_running": 0.0,
        "malora_num_requests_waiting": 0.0,
        "malora_kv_cache_usage_ratio": 0.0,
        "malora_engine_up": 1.0,
        "malora_engine_restarts_total": float(num_engines_lost),
    }
    deadline = time.monotonic() + 20
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        while True:
            found = {}
            for line in (await http.get("/metrics")).text.splitlines():
                name, _, value = (
                    line.partition(" ")
                    if "{" not in line
                    else (line.partition("{")[0], "", line.rpartition(" ")[2])
                )
                if name in want:
                    found[name] = float(value)
            if found == want or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.2)
        assert found == want
        adapters = (await http.get("/v1/adapters")).json()["data"]
    assert {adapter["name"] for adapter in adapters} == {*NAMES, "swap"}
    assert {adapter["in_flight"] for adapter in adapters} == {0}


async def check_use(server: Any, uses: list[Use], num_faults: int) -> None:
    """What each fault takes for the first time may be kept; nothing may grow from then on."""
    deadline = time.monotonic() + 20
    while (now := Use.of(server)).fds > uses[0].fds and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
    assert now.fds <= uses[0].fds
    assert now.rss < max(use.rss for use in uses[: num_faults + 1]) + 32 * 2**20
