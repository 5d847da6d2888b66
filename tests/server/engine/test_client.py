"""The engine process, from the API's side: it serves, forgets, drains, dies and says why."""

import asyncio
import os
import signal
import subprocess
import time

import msgspec
import pytest

from malora_server.engine.client import (
    EngineClient,
    EngineDeadError,
    EngineStartError,
    inherit_orphans,
)
from malora_server.engine.config import EngineConfig
from malora_server.engine.llm import LLM
from malora_server.engine.messages import SamplingParams, Submit

SAMPLING = SamplingParams(max_tokens=20, seed=1, temperature=0.0, ignore_eos=True)


def submit(request_id: str, tokens: int = 20, prompt: int = 5) -> Submit:
    return Submit(
        request_id=request_id,
        prompt_token_ids=list(range(1, 1 + prompt)),
        sampling=msgspec.structs.replace(SAMPLING, max_tokens=tokens),
    )


@pytest.fixture
def config(tiny_base):
    return EngineConfig(base=str(tiny_base("llama")), num_threads=1)


@pytest.fixture
async def client(config):
    client = await EngineClient.start(config, "warning")
    yield client
    await client.stop(0)


async def idle(client: EngineClient) -> None:
    """Wait until the engine holds nothing, as its stats tell with no further request."""
    for _ in range(100):
        stats = client.stats
        if stats.num_requests_running == 0 and stats.kv_cache_usage_ratio == 0:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"the engine still holds sequences: {client.stats}")


async def collect(client: EngineClient, request: Submit) -> list[int]:
    tokens = []
    async for output in client.generate(request):
        assert output.error is None
        tokens += output.token_ids
    return tokens


async def test_concurrent_requests_get_the_in_process_tokens(client, config):
    requests = [submit(str(i), 10 + i, 3 + i) for i in range(8)]
    got = await asyncio.gather(*(collect(client, request) for request in requests))
    llm = LLM(config)
    want = llm.generate([r.prompt_token_ids for r in requests], [r.sampling for r in requests])
    assert got == [generation.token_ids for generation in want]


async def test_leaving_early_frees_the_sequence_at_once(client):
    stream = client.generate(submit("long", 240))
    await anext(stream)
    await stream.aclose()
    task = asyncio.create_task(collect(client, submit("cancelled", 240)))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle(client)
    assert client.stats.steps < 200, "the abandoned sequences ran on"


async def test_a_failing_request_ends_alone(client):
    good = asyncio.create_task(collect(client, submit("good")))
    outputs = [output async for output in client.generate(submit("long", 5, 300))]
    assert outputs[-1].finish_reason == "error"
    assert "300 tokens" in outputs[-1].error
    assert len(await good) == 20


async def test_a_killed_engine_fails_every_request_and_is_unhealthy(client):
    stream = client.generate(submit("long", 240))
    await anext(stream)
    waiting = asyncio.create_task(collect(client, submit("other", 240)))
    await asyncio.sleep(0.01)
    os.kill(client._process.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError):
        async for _ in stream:
            pass
    with pytest.raises(EngineDeadError):
        await waiting
    assert not client.healthy
    with pytest.raises(EngineDeadError):
        await anext(client.generate(submit("late")))


async def test_a_request_that_comes_as_the_engine_dies_fails_like_the_others(client):
    os.kill(client._process.pid, signal.SIGKILL)
    time.sleep(0.3)  # the connection is gone, and the loop has not heard of it
    with pytest.raises(EngineDeadError):
        await anext(client.generate(submit("late")))


async def test_stop_lets_requests_finish(config):
    client = await EngineClient.start(config, "warning")
    tasks = [asyncio.create_task(collect(client, submit(str(i), 40))) for i in range(4)]
    await asyncio.sleep(0.02)
    await client.stop(30)
    assert [len(tokens) for tokens in await asyncio.gather(*tasks)] == [40] * 4


async def test_stop_ends_what_outlasts_the_timeout(config):
    client = await EngineClient.start(config, "warning")
    stream = client.generate(submit("long", 250))
    await anext(stream)
    await client.stop(0)
    assert [output.finish_reason async for output in stream][-1] == "abort"


async def test_a_signal_to_every_process_leaves_the_end_to_the_api(client):
    stream = client.generate(submit("long", 50))
    await anext(stream)
    os.kill(client._process.pid, signal.SIGTERM)
    os.kill(client._process.pid, signal.SIGINT)
    assert [output.finish_reason async for output in stream][-1] == "length"


async def test_a_missing_base_is_one_line(config, tmp_path):
    missing = msgspec.structs.replace(config, base=str(tmp_path / "nothing"))
    with pytest.raises(EngineStartError) as error:
        await EngineClient.start(missing, "warning")
    assert "nothing" in str(error.value)
    assert "\n" not in str(error.value)


async def test_an_engine_that_hangs_is_killed(config):
    client = await EngineClient.start(config, "warning", timeout=2)
    stream = client.generate(submit("long", 240))
    await anext(stream)
    os.kill(client._process.pid, signal.SIGSTOP)
    with pytest.raises(EngineDeadError, match="said nothing for 2 s while 1 sequences waited"):
        async for _ in stream:
            pass
    assert "said nothing" in await client.ended()
    with pytest.raises(ProcessLookupError):
        os.killpg(client._process.pid, 0)


async def test_an_engine_with_nothing_to_do_may_be_silent(config):
    client = await EngineClient.start(config, "warning", timeout=2)
    os.kill(client._process.pid, signal.SIGSTOP)
    await asyncio.sleep(2.6)
    assert client.healthy
    os.kill(client._process.pid, signal.SIGCONT)
    assert len(await collect(client, submit("after"))) == 20
    await client.stop(0)


async def test_nothing_stays_in_the_temporary_folder(config, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    client = await EngineClient.start(config, "warning")
    assert list(tmp_path.iterdir()) == []
    assert len(await collect(client, submit("served"))) == 20
    await client.stop(0)


def test_what_a_child_leaves_behind_can_be_waited_for():
    inherit_orphans()
    # Its own end of the pipe would hold up whoever reads what the shell says.
    orphan = int(subprocess.check_output(["sh", "-c", "sleep 600 >&- & echo $!"]))
    os.kill(orphan, signal.SIGKILL)
    assert os.waitpid(orphan, 0) == (orphan, signal.SIGKILL)
