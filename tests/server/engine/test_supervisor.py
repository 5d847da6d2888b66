"""Engines that end without being asked to: when another is started, and when no more."""

import asyncio
import contextlib
import os
import signal

import psutil
import pytest

from malora_server.engine import supervisor as module
from malora_server.engine.client import EngineClient, EngineDeadError, EngineStartError
from malora_server.engine.config import EngineConfig
from malora_server.engine.messages import EngineStats, Ready, SamplingParams, Submit
from malora_server.engine.supervisor import EngineSupervisor

READY = Ready(max_model_len=9, vocab_size=9, num_blocks=1, block_size=1, dtype="", device="")


class FakeClient:
    """An engine that ends when it is told to."""

    def __init__(self, number: int = 0) -> None:
        self.ready = READY
        self.healthy = True
        self.stats = EngineStats(steps=number)
        self.stopped: list[float] = []
        self._end = asyncio.get_running_loop().create_future()

    def end(self, how: str) -> None:
        self.healthy = False
        self._end.set_result(how)

    async def ended(self) -> str:
        return await asyncio.shield(self._end)

    async def stop(self, timeout: float) -> None:
        self.stopped.append(timeout)


class Starts:
    """Starts fake engines, or fails to, as the script says; knows the pauses in between."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clients: list[FakeClient] = []
        self.failures: list[Exception] = []
        self.pauses: list[float] = []
        sleep = asyncio.sleep

        async def record(seconds: float) -> None:
            self.pauses.append(seconds)
            await sleep(0)

        monkeypatch.setattr(module.asyncio, "sleep", record)
        self.turns = sleep

    async def start(self) -> FakeClient:
        if self.failures:
            raise self.failures.pop(0)
        self.clients.append(FakeClient(len(self.clients)))
        return self.clients[-1]

    async def supervisor(self, **options: object) -> EngineSupervisor:
        return EngineSupervisor(await self.start(), self.start, 3.2, **{"restart": True} | options)

    async def settle(self) -> None:
        for _ in range(20):
            await self.turns(0)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Starts:
    return Starts(monkeypatch)


async def test_one_that_ends_is_followed_by_another(starts: Starts) -> None:
    supervisor = await starts.supervisor()
    announced = []

    async def on_restart(client: FakeClient) -> None:
        assert not supervisor.healthy, "it gets requests before it was told what it needs"
        announced.append(client)

    supervisor.on_restart = on_restart
    starts.clients[0].end("was killed")
    assert not supervisor.healthy
    assert supervisor.retry_after == 4
    await starts.settle()
    assert supervisor.healthy
    assert supervisor.stats.steps == 1
    assert announced == starts.clients[1:]
    assert (supervisor.restarts, supervisor.failure) == (1, None)
    await supervisor.stop(5)
    assert starts.clients[1].stopped == [5]


async def test_pauses_grow_until_it_gives_up(starts: Starts) -> None:
    supervisor = await starts.supervisor()
    for _ in range(5):
        assert supervisor.failure is None
        starts.clients[-1].end("ended with status 1")
        await starts.settle()
    assert starts.pauses == [0, 1, 2, 4]
    assert supervisor.failure == "the engine ended with status 1; it failed 5 times in a row"
    assert supervisor.restarts == 4
    assert not supervisor.healthy
    await supervisor.stop(0)


async def test_a_start_that_fails_counts_too(
    starts: Starts, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor = await starts.supervisor()
    starts.failures = [
        EngineStartError("no memory"),
        OSError("no space left"),
        RuntimeError("a bug of ours"),
        EngineStartError("no memory at all"),
    ]
    starts.clients[0].end("was killed")
    await starts.settle()
    assert starts.pauses == [0, 1, 2, 4]
    assert "could not start: no memory at all; it failed 5 times" in str(supervisor.failure)
    assert caplog.text.count("Traceback") == 1
    await supervisor.stop(0)


async def test_an_engine_that_dies_while_it_is_told_what_it_needs(starts: Starts) -> None:
    supervisor = await starts.supervisor()

    async def on_restart(client: FakeClient) -> None:
        if client is starts.clients[1]:
            raise EngineDeadError("gone")

    supervisor.on_restart = on_restart
    starts.clients[0].end("was killed")
    await starts.settle()
    assert starts.clients[1].stopped == [0]
    assert supervisor.stats.steps == 2
    await supervisor.stop(0)


async def test_failures_long_after_another_are_not_in_a_row(
    starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STABLE_SECONDS", 0)
    supervisor = await starts.supervisor()
    for _ in range(12):
        starts.clients[-1].end("was killed")
        await starts.settle()
    assert starts.pauses == [0] * 12
    assert supervisor.healthy
    await supervisor.stop(0)


async def test_without_restart_the_first_end_is_the_last(starts: Starts) -> None:
    supervisor = await starts.supervisor(restart=False)
    starts.clients[0].end("was killed")
    await starts.settle()
    assert supervisor.failure == "the engine was killed"
    assert len(starts.clients) == 1
    await supervisor.stop(0)


async def test_a_real_one_is_killed_and_serves_again(tiny_base) -> None:
    config = EngineConfig(base=str(tiny_base("llama")), num_threads=1)
    supervisor = await EngineSupervisor.start(config, "warning")
    sampling = SamplingParams(max_tokens=12, seed=1, temperature=0.0, ignore_eos=True)

    async def tokens(request_id: str) -> list[int]:
        submit = Submit(request_id=request_id, prompt_token_ids=[1, 2, 3], sampling=sampling)
        return [i async for output in supervisor.generate(submit) for i in output.token_ids]

    before = await tokens("before")
    first: EngineClient = supervisor._client
    os.kill(first._process.pid, signal.SIGKILL)
    assert "SIGKILL" in await first.ended()
    with pytest.raises(EngineDeadError):
        await tokens("meanwhile")
    async with asyncio.timeout(60):
        while not supervisor.healthy:
            await asyncio.sleep(0.05)
    assert await tokens("after") == before
    await supervisor.stop(0)


async def test_stopping_while_the_next_one_starts_leaves_no_process(tiny_base) -> None:
    config = EngineConfig(base=str(tiny_base("llama")), num_threads=1)
    supervisor = await EngineSupervisor.start(config, "warning")
    os.kill(supervisor._client._process.pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        while supervisor.restarts == 0:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)
    children = _children()
    assert len(children) == 1
    await supervisor.stop(30)
    assert _children() == []


def _children() -> list[int]:
    """The engine processes that live; one that is dead and not yet waited for has no command."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "malora_server.engine.process" in child.cmdline():
                found.append(child.pid)
    return found
