"""A server as users start it: `malora serve` on the embedded base, with six folders of adapters."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import peft
import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from malora import MaloraConfig
from malora.base_model import PATH as BASE
from malora_client import AsyncClient, Client
from malora_server.engine.config import EngineConfig
from malora_server.engine.llm import LLM, Generation
from malora_server.engine.messages import SamplingParams

START_SECONDS = 90
ALL_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "experts": lambda: MaloraConfig(
        r=4, num_experts=8, top_k=2, basis_dim=32, target_modules=ALL_MODULES
    ),
    "compact": lambda: MaloraConfig(
        r=8,
        num_experts=4,
        top_k=1,
        basis_dim=16,
        router_input="basis",
        target_modules=["q_proj", "v_proj", "down_proj"],
    ),
    "dense": lambda: MaloraConfig(
        r=2,
        num_experts=3,
        top_k=3,
        basis_dim=8,
        use_rslora=True,
        target_modules=["o_proj", "gate_proj", "up_proj"],
    ),
    "lora": lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
}
SCALE = {"experts": 0.05, "compact": 0.1, "dense": 0.1, "lora": 0.1}
"""The spread of the up-projections: their adapters change the base's words, and not to noise."""

_LOGS: list[Path] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of every server's log beside a failure."""
    report = yield
    if report.failed:
        for log in _LOGS:
            report.sections.append((f"log of {log.name}", log.read_text()[-5000:]))
    return report


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four adapters made without training, one with a NaN, one for another base model."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        model = peft.get_peft_model(base, config())
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "malora_up" in parameter_name or "lora_B" in parameter_name:
                    parameter.normal_(0, SCALE[name])
        model.save_pretrained(root / name)
    for broken in ("nan", "stranger"):
        shutil.copytree(root / "experts", root / broken)
    weights = root / "nan" / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(tensor for name, tensor in tensors.items() if name.endswith("up"))[0, 0, 0] = torch.nan
    save_file(tensors, weights)
    file = root / "stranger" / "adapter_config.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "base_model_fingerprint": "0" * 64}))
    return root


class Server:
    """One `malora serve` process, which picks a free port itself."""

    def __init__(self, log: Path, *flags: object) -> None:
        self.log = log
        _LOGS.append(log)
        command = [sys.executable, "-m", "malora.cli", "serve", "--port", 0, *flags]
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stderr=stderr,
                stdout=stderr,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(log.parent)},
            )

    @property
    def url(self) -> str:
        """Where it listens; waits until it is healthy."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(r'"serving .* on (http://[^"]+)"', self.log.read_text())
            if found is not None:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{found[1]}/health").status_code == 200:
                        return found[1]
            time.sleep(0.05)
        raise AssertionError(f"no server, exit status {self.process.poll()}: {self.log}")

    def engine(self) -> psutil.Process:
        """Its engine process; waits until there is one."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.Error):  # one that ends meanwhile
                    if "malora_server.engine.process" in child.cmdline():
                        return child
            time.sleep(0.02)
        raise AssertionError(f"no engine process, exit status {self.process.poll()}")

    def stop(self, seconds: float = 60) -> int:
        """Ask it to end; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self) -> None:
        """End it at once, whatever its state; its engine sees that and follows."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """A `Server` that is starting: `launch(*flags)`. What still runs at the end is killed."""
    root = tmp_path_factory.mktemp("servers")
    servers: list[Server] = []

    def start(*flags: object) -> Server:
        folder = root / str(len(servers))
        folder.mkdir()
        servers.append(Server(folder / f"server-{len(servers)}.log", *flags))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def serve(launch: Callable[..., Server]) -> Callable[..., AbstractContextManager[str]]:
    """A healthy server that must end well: a context manager, which takes flags and gives a URL."""

    @contextlib.contextmanager
    def running(*flags: object) -> Iterator[str]:
        server = launch(*flags)
        yield server.url
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()

    return running


@pytest.fixture(scope="session")
def url(serve: Callable[..., AbstractContextManager[str]], adapters: Path) -> Iterator[str]:
    """The server that most tests share: the embedded base and `adapters`."""
    flags = ("--base", BASE, "--served-model-name", "base", "--adapters", adapters)
    with serve(*flags, "--kv-cache-memory", "64MiB") as url:
        yield url


@pytest.fixture(scope="session")
def llm(adapters: Path) -> LLM:
    """The same engine in this process."""
    return LLM(EngineConfig(base=str(BASE), adapters=str(adapters), num_threads=1))


Metrics = dict[tuple[str, tuple[str, ...]], float]


@pytest.fixture(scope="session")
def read_metrics(url: str) -> Callable[[], Metrics]:
    """The shared server's metrics now, by name and its labels' values: `read_metrics()`."""

    def read() -> Metrics:
        text = httpx.get(f"{url}/metrics", timeout=60).raise_for_status().text
        return {
            (sample.name.removeprefix("malora_"), tuple(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    return read


@pytest.fixture(scope="session")
def greedy(llm: LLM) -> Callable[[list[Any], list[str], int], list[Generation]]:
    """What the in-process engine says: `greedy(prompts, models, max_tokens)`."""

    def generate(prompts: list[Any], models: list[str], max_tokens: int) -> list[Generation]:
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0, ignore_eos=True)
        adapters = [None if model == "base" else model for model in models]
        return llm.generate(prompts, sampling, adapters)

    return generate


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[Client]:
    with Client(base_url=url, max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(url: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(base_url=url, max_retries=0) as client:
        yield client
