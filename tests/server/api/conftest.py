"""An application over an engine that speaks from a script, alone and behind a real server."""

import asyncio
import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from malora_server.api.tokenizer import Tokenizer
from malora_server.app import create_app
from malora_server.engine.client import EngineDeadError
from malora_server.engine.messages import (
    AdapterStatus,
    AdapterVersion,
    EngineStats,
    LoadAdapter,
    PinAdapter,
    Ready,
    SequenceOutput,
    SequenceStart,
    Submit,
    TokenLogprobs,
    TokenRouting,
)
from malora_server.settings import Settings

TEXT = "the quick brown fox jumps over the lazy dog, the dog sleeps and the fox runs off. "
BROKEN = "adapter_model.safetensors is missing"
LAYERS = [[0.0, 0.0, 1.0], [0.5, 0.0, 0.5]]
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'developer' %}{{ raise_exception('no developers here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_backend() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [TEXT] * 4,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return backend


@pytest.fixture(scope="session")
def pretrained() -> PreTrainedTokenizerFast:
    pretrained = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend(), eos_token="<|endoftext|>"
    )
    pretrained.chat_template = CHAT_TEMPLATE
    return pretrained


@pytest.fixture
def tokenizer(pretrained: PreTrainedTokenizerFast) -> Tokenizer:
    return Tokenizer(pretrained)


class FakeEngine:
    """Says `reply`, token after token, to every request; each token's log-probability is -1/8."""

    EOS = 0

    def __init__(self, reply: list[int], vocab_size: int) -> None:
        self.reply = reply
        self.submits: list[Submit] = []
        self.aborted: list[str] = []
        self.step_seconds = 0.0
        self.num_until_blocked: int | None = None
        self.failure: Exception | None = None
        self.final: SequenceOutput | None = None
        self.stopping = asyncio.Event()
        self.healthy = True
        self.on_report = None
        self.restarts = 0
        self.retry_after = 7
        self.failure: str | None = None
        self.stats = EngineStats(2, 3, 0.25, 100, 40, 1, 9)
        self.ready = Ready(
            max_model_len=128,
            vocab_size=vocab_size,
            num_blocks=64,
            block_size=16,
            dtype="float32",
            device="cpu",
            eos_token_ids=[self.EOS],
        )
        self.told: list[object] = []
        self.on_adapter: Callable[[AdapterStatus], None] | None = None

    def tell(self, message: object) -> None:
        """Loads, pins and retires at once."""
        self.told.append(message)
        version = message.adapter
        if isinstance(message, LoadAdapter):
            self.read(version)
        elif isinstance(message, PinAdapter):
            self.on_adapter(self.status(version, pinned=message.pinned))

    def status(self, version: AdapterVersion, **fields: object) -> AdapterStatus:
        broken = Path(version.path, "broken").exists()
        return AdapterStatus(
            version.name,
            version.number,
            "failed" if broken else "device",
            digest="" if broken else f"{version.number}5d1" * 16,
            error=BROKEN if broken else None,
            error_code="adapter_file_missing" if broken else None,
            **fields,
        )

    def read(self, version: AdapterVersion) -> AdapterStatus:
        status = self.status(version)
        if self.on_adapter is not None:
            self.on_adapter(status)
        return status

    async def generate(self, submit: Submit) -> AsyncIterator[SequenceOutput]:
        if not self.healthy:
            raise EngineDeadError("dead")
        self.submits.append(submit)
        finished = False
        if submit.adapter is not None:
            error = self.read(submit.adapter).error
            if error is not None:
                code = "adapter_file_missing"
                yield SequenceOutput(
                    submit.request_id, [], finish_reason="error", error=error, error_code=code
                )
                return
        try:
            for position in range(submit.sampling.max_tokens):
                await asyncio.sleep(self.step_seconds)
                if self.num_until_blocked is not None and position >= self.num_until_blocked:
                    # The real engine aborts what is left when its time to drain is over.
                    await self.stopping.wait()
                    yield SequenceOutput(submit.request_id, [], finish_reason="abort")
                    finished = True
                    return
                if self.failure is not None and position == 1:
                    raise self.failure
                if self.final is not None and position == 1:
                    yield self.final
                    finished = True
                    return
                output = self._output(submit, position)
                finished = output.finish_reason is not None
                yield output
                if finished:
                    return
        finally:
            if not finished:
                self.aborted.append(submit.request_id)

    def _output(self, submit: Submit, position: int) -> SequenceOutput:
        sampling = submit.sampling
        token = self.reply[position % len(self.reply)]
        stops = token in sampling.stop_token_ids or (token == self.EOS and not sampling.ignore_eos)
        return SequenceOutput(
            submit.request_id,
            [token],
            finish_reason=(
                "stop" if stops else "length" if position + 1 == sampling.max_tokens else None
            ),
            stop_reason=token if token in sampling.stop_token_ids else None,
            num_cached_tokens=len(submit.prompt_token_ids) // 2,
            logprobs=(
                None if sampling.logprobs is None else [self._logprobs(token, sampling.logprobs)]
            ),
            prompt_logprobs=(
                None
                if sampling.prompt_logprobs is None or position
                else [
                    self._logprobs(token, sampling.prompt_logprobs)
                    for token in submit.prompt_token_ids[1:]
                ]
            ),
            routing=(
                None
                if sampling.routing is None or submit.adapter is None
                else [
                    TokenRouting(
                        [0.25, 0.0, 0.75], LAYERS if sampling.routing == "layers" else None
                    )
                ]
            ),
            start=None if position else SequenceStart(0.03, 0.3),
        )

    @staticmethod
    def _logprobs(token: int, count: int) -> TokenLogprobs:
        others = [token + 1 + index for index in range(count)]
        values = [-2.0 - index for index in range(count - 1)] + [float("-inf")] * (count > 0)
        return TokenLogprobs(token, -0.125, others, values)

    async def stop(self, timeout: float) -> None:
        await asyncio.sleep(timeout)
        self.stopping.set()


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    reply = tokenizer.backend.encode(" the quick brown fox jumps över the lazy dog 🦊!").ids
    return FakeEngine(reply, tokenizer.backend.get_vocab_size())


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """The adapters folder: one that is sound, and one that is not."""
    root = tmp_path / "adapters"
    for name in ("sql", "broken"):
        (root / name).mkdir(parents=True)
        config = {"peft_type": "MALORA", "num_experts": 4, "target_modules": ["q_proj"]}
        (root / name / "adapter_config.json").write_text(json.dumps(config))
    (root / "broken" / "broken").touch()
    os.utime(root / "sql", (77, 77))
    return root


@pytest.fixture
def settings(adapters: Path) -> Settings:
    return Settings(
        base="models/tiny",
        adapters=adapters,
        max_num_seqs=4,
        max_queued_requests=8,
        max_logprobs=5,
    )


@pytest.fixture
def app(settings: Settings, engine: FakeEngine, tokenizer: Tokenizer) -> FastAPI:
    return create_app(settings, engine, tokenizer)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://malora") as client:
        yield client


@contextmanager
def running(server: uvicorn.Server, send_buffer: int | None = None) -> Iterator[str]:
    """`send_buffer`: bytes that the system holds of what a client has not read."""
    listener = socket.create_server(("127.0.0.1", 0))
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def url(app: FastAPI) -> Iterator[str]:
    """Where the application answers, behind a server in a thread of its own."""
    config = uvicorn.Config(app, lifespan="off", log_config=None, ws="none")
    with running(uvicorn.Server(config)) as url:
        yield url


@pytest.fixture
def run_server() -> Callable[..., object]:
    return running
