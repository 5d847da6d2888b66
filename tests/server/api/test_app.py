"""Starting and stopping the API process."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer as Backend

from malora_server import app as app_module
from malora_server.api.tokenizer import Tokenizer
from malora_server.app import DrainingServer, create_app, listen, main
from malora_server.engine.client import EngineStartError
from malora_server.settings import Settings, StartError


@pytest.fixture(autouse=True)
def _pytests_own_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "configure_logging", lambda level: None)


@pytest.fixture
def base(pretrained: Any, tmp_path: Path) -> str:
    pretrained.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def _error(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_torch_is_not_imported(base: str) -> None:
    script = (
        "import sys; import malora_server.app as a\n"
        "assert 'torch' not in sys.modules\n"
        # Up to 5.17 the tokenizers of transformers bring torch along themselves.
        "from transformers import PreTrainedTokenizerFast\n"
        "before = 'torch' in sys.modules\n"
        f"a.Tokenizer.load({base!r})\n"
        "assert ('torch' in sys.modules) == before"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_bad_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--nope" in _error(capsys, ["--base", "x", "--nope"])


def test_a_missing_base_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    assert missing in _error(capsys, ["--base", missing])
    (tmp_path / "empty").mkdir()
    assert "empty" in _error(capsys, ["--base", str(tmp_path / "empty")])


def test_a_port_in_use(capsys: pytest.CaptureFixture[str], base: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = _error(capsys, ["--base", base, "--port", str(port)])
    assert f"127.0.0.1:{port}" in line
    assert "in use" in line


def test_an_address_that_is_none() -> None:
    with pytest.raises(StartError, match=r"no\.such\.host\.invalid:80"):
        listen("no.such.host.invalid", 80)


def test_an_engine_that_does_not_start(
    capsys: pytest.CaptureFixture[str], base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start(config: Any, log_level: str, **options: Any) -> Any:
        raise EngineStartError("config.json is missing")

    monkeypatch.setattr(app_module.EngineSupervisor, "start", start)
    line = _error(capsys, ["--base", base, "--port", "0"])
    assert line == "error: config.json is missing"


def test_an_adapter_with_the_base_models_name(
    settings: Settings, engine: Any, tokenizer: Tokenizer
) -> None:
    (settings.adapters / "tiny").mkdir()
    with pytest.raises(StartError, match="'tiny'"):
        create_app(settings, engine, tokenizer)


def test_what_runs_is_finished_or_told_when_the_server_drains(
    app: FastAPI, engine: Any, run_server: Callable[[uvicorn.Server], Any]
) -> None:
    engine.step_seconds = 0.02
    config = uvicorn.Config(app, lifespan="off", log_config=None, ws="none")
    server = DrainingServer(config, engine, drain_seconds=0.5)
    replies: dict[str, httpx.Response] = {}

    def ask(name: str, **changes: Any) -> None:
        body = {"model": "tiny", "prompt": "a fox", "max_tokens": 10, **changes}
        replies[name] = httpx.post(f"{url}/v1/completions", json=body, timeout=60)

    with run_server(server) as url:
        threads = [
            threading.Thread(target=ask, args=("short",)),
            threading.Thread(target=ask, args=("long",), kwargs={"max_tokens": 90}),
            threading.Thread(
                target=ask, args=("stream",), kwargs={"max_tokens": 90, "stream": True}
            ),
        ]
        for thread in threads:
            thread.start()
        while len(engine.submits) < 3:
            time.sleep(0.01)
        engine.num_until_blocked = 12
        server.should_exit = True
        for thread in threads:
            thread.join(10)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health", timeout=60)
    assert replies["short"].status_code == 200
    assert replies["short"].json()["usage"]["completion_tokens"] == 10
    assert replies["long"].status_code == 503
    assert replies["long"].json()["error"]["code"] == "shutdown"
    events = [line.removeprefix("data: ") for line in replies["stream"].text.split("\n\n") if line]
    assert json.loads(events[-2])["error"]["code"] == "shutdown"
    assert events[-1] == "[DONE]"


@pytest.mark.parametrize("phase", ["starting", "serving"])
def test_a_signal_ends_it_well(base: str, tmp_path: Path, phase: str) -> None:
    """The process with an engine that is only a script, stopped by SIGTERM."""
    script = tmp_path / "serve.py"
    script.write_text(
        f"""
import asyncio, types
from malora_server import app
from malora_server.engine.messages import EngineStats, Ready

class Engine:
    healthy, stats, failure = True, EngineStats(), None
    ready = Ready(max_model_len=9, vocab_size=9, num_blocks=1, block_size=1, dtype="", device="")
    async def stop(self, timeout): print("stopped", flush=True)

async def start(config, log_level, **options):
    print("starting", flush=True)
    if {phase == "starting"}: await asyncio.sleep(60)
    return Engine()

app.EngineSupervisor.start = start
app.main(["--base", {base!r}, "--port", "0"])
"""
    )
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert process.stdout.readline() == "starting\n"
        if phase == "serving":
            line = next(line for line in process.stderr if '"serving ' in line)
            url = json.loads(line)["message"].split()[-1]
            assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        process.terminate()
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert out == ("stopped\n" if phase == "serving" else "")
    assert "Traceback" not in err


async def test_long_texts_leave_the_loop_to_others(
    tokenizer: Tokenizer,
) -> None:
    text = "the quick fox " * 40_000
    ids = tokenizer.backend.encode(text).ids
    encoding = tokenizer.encode([text], add_special_tokens=True)
    decoding = tokenizer.decode(ids * 5, skip_special_tokens=False)
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # a thread that wants the interpreter's lock gets it at once
    try:
        for work, result in ((encoding, [ids]), (decoding, text * 5)):
            task = asyncio.create_task(work)
            turns = 0
            while not task.done():
                turns += 1
                await asyncio.sleep(0)
            # Tens where the library keeps the lock, tens of thousands where it lets it go.
            assert turns > 500
            assert await task == result
    finally:
        sys.setswitchinterval(usual)


class WaitingBackend:
    """A tokenizer whose work, once started, lasts until it is let go."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.started, self.go = threading.Semaphore(0), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode_batch_fast(self, *args: Any, **kwargs: Any) -> Any:
        self._wait()
        return self._backend.encode_batch_fast(*args, **kwargs)

    def decode_batch(self, *args: Any) -> Any:
        self._wait()
        return self._backend.decode_batch(*args)

    def _wait(self) -> None:
        self.started.release()
        if not self.go.wait(10):
            self.go.set()  # nobody else has to wait as long
            raise AssertionError("the loop waited for it")


LONG_TEXT = "the quick fox " * 400
MANY_TOKENS = [5] * 5000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": LONG_TEXT}),
        ("/tokenize", {"messages": [{"role": "user", "content": LONG_TEXT}]}),
        ("/detokenize", {"tokens": MANY_TOKENS}),
        ("/v1/completions", {"model": "tiny", "prompt": [LONG_TEXT[:2000]] * 3}),
        ("/v1/completions", {"model": "tiny", "prompt": MANY_TOKENS, "echo": True}),
    ],
)
async def test_others_are_answered_while_long_texts_are_worked_on(
    client: httpx.AsyncClient, tokenizer: Tokenizer, path: str, body: dict[str, Any]
) -> None:
    tokenizer.backend = backend = WaitingBackend(tokenizer.backend)
    many = [asyncio.create_task(client.post(path, json=body)) for _ in range(40)]
    try:
        assert await asyncio.to_thread(backend.started.acquire, timeout=10)
        # /metrics is made in a thread, of which there are enough however much is tokenised.
        for other in ("/health", "/metrics"):
            assert (await asyncio.wait_for(client.get(other), 10)).status_code == 200
        assert not any(task.done() for task in many)
    finally:
        backend.go.set()
    first, *others = await asyncio.gather(*many)
    if path.startswith("/v1"):
        assert first.json()["error"]["code"] == "context_length_exceeded"
    else:
        assert first.status_code == 200
    assert {reply.content for reply in others} == {first.content}


async def test_what_long_texts_become(client: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    text = LONG_TEXT * 4
    ids = tokenizer.backend.encode(text).ids
    assert len(ids) > 4096
    reply = await client.post("/tokenize", json={"prompt": text, "return_token_strs": True})
    assert reply.json()["tokens"] == ids
    assert "".join(reply.json()["token_strs"]) == text
    reply = await client.post("/detokenize", json={"tokens": ids})
    assert reply.json() == {"prompt": text}
