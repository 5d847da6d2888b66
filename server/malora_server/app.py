"""The API process: builds the application, starts the engine, serves, and drains."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, cast

import uvicorn
import uvloop
from fastapi import FastAPI
from pydantic import ByteSize

from malora_server.api import adapters, chat, completions, models, system, tokenize
from malora_server.api.admission import Admission, KeyLimit
from malora_server.api.auth import Authentication
from malora_server.api.changes import AdapterChanges
from malora_server.api.errors import install_error_handlers
from malora_server.api.grammars import GrammarChecker
from malora_server.api.middleware import BodyLimit, RequestContext
from malora_server.api.registry import ModelRegistry
from malora_server.api.state import ServerState
from malora_server.api.tokenizer import Tokenizer
from malora_server.connections import Connection
from malora_server.engine.client import EngineClient, EngineStartError
from malora_server.engine.config import EngineConfig
from malora_server.engine.messages import AdapterStatus
from malora_server.engine.supervisor import EngineSupervisor
from malora_server.logs import configure_logging
from malora_server.metrics import Metrics
from malora_server.settings import Settings, StartError, parse_settings

if TYPE_CHECKING:
    from malora_server.api.tracing import Tracing

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_KEEP_ALIVE_SECONDS = 75
"""Longer than usual load balancers keep a connection, so that it is they who close it."""
_GRACE_SECONDS = 5.0
"""For the last replies to leave, after the engine has ended what was still running."""
_HURRIED_GRACE_SECONDS = 0.5
"""The same, after a second signal."""


class EngineFailedError(RuntimeError):
    """The engine failed while it served, and is not to be started again."""


def create_app(
    settings: Settings,
    engine: EngineSupervisor,
    tokenizer: Tokenizer,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The ASGI application over a started engine; StartError where names clash."""
    metrics = Metrics(engine, settings.base_name, settings.max_metric_models)
    registry = ModelRegistry(settings.base_name, settings.adapters, engine)

    def on_adapter(status: AdapterStatus) -> None:
        registry.on_status(status)
        metrics.add_adapter(status)

    async def on_restart(client: EngineClient) -> None:
        metrics.engine_restarted()
        await registry.on_restart(client)

    engine.on_adapter = on_adapter
    engine.on_restart = on_restart
    engine.on_report = metrics.add_report
    app = FastAPI(title="malora")
    app.state.server = ServerState(
        settings=settings,
        engine=engine,
        tokenizer=tokenizer,
        registry=registry,
        changes=AdapterChanges(registry),
        metrics=metrics,
        admission=Admission(engine, settings),
        grammars=GrammarChecker(
            tokenizer.backend, engine.ready.vocab_size, engine.ready.eos_token_ids
        ),
    )
    install_error_handlers(app)
    for module in (completions, chat, models, adapters, tokenize, system):
        app.include_router(module.router)
    seconds = settings.client_timeout
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_size, seconds=seconds)
    keys, admin_keys = settings.api_keys(), settings.admin_keys()
    if keys or admin_keys:
        limit = settings.max_requests_per_key
        app.add_middleware(
            Authentication,
            keys=keys,
            admin_keys=admin_keys,
            limit=None if limit is None else KeyLimit(limit),
            seconds=seconds,
        )
    # Added last, so it is the outermost: it sees every reply.
    app.add_middleware(RequestContext, metrics=metrics, tracing=tracing)
    return app


def engine_config(settings: Settings) -> EngineConfig:
    """The settings that are the engine's, in types that msgspec can send."""
    return EngineConfig(
        base=settings.base,
        adapters=None if settings.adapters is None else str(settings.adapters),
        dtype=settings.dtype,
        device=settings.device,
        quantization=settings.quantization,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        # JSON has no infinity.
        max_slowdown=settings.max_slowdown if math.isfinite(settings.max_slowdown) else None,
        block_size=settings.block_size,
        kv_cache_memory=_bytes(settings.kv_cache_memory),
        adapter_device_memory=_bytes(settings.adapter_device_memory),
        adapter_host_memory=_bytes(settings.adapter_host_memory),
        enable_prefix_caching=settings.enable_prefix_caching,
        num_threads=settings.num_threads,
    )


def _bytes(size: ByteSize | None) -> int | None:
    return None if size is None else int(size)


def http_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How the application is served over HTTP."""
    return uvicorn.Config(
        app,
        loop="uvloop",
        # uvicorn calls it as it would a class of its own.
        http=cast(
            type[asyncio.Protocol],
            partial(Connection, client_timeout=settings.client_timeout),
        ),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    )


class DrainingServer(uvicorn.Server):
    """uvicorn, which at its end gives the engine a time to finish what runs.

    What is not finished by then the engine aborts, and the client gets an error object. A second
    signal cuts that time short. It ends, too, where there will be no engine any more.
    """

    def __init__(
        self, config: uvicorn.Config, engine: EngineSupervisor, drain_seconds: float
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._grace_seconds = _GRACE_SECONDS

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `serve`, which handles them from before the engine starts."""
        yield

    def handle_exit(self, _sig: int, _frame: FrameType | None) -> None:
        """Drain; the second time, abort what still runs."""
        if self.should_exit:
            logger.info("a second signal: aborting what still runs")
            self._grace_seconds = _HURRIED_GRACE_SECONDS
            self._engine.abort()
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to end (uvicorn asks ten times a second)."""
        return await super().on_tick(counter) or self._engine.failure is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, drain, end the engine."""
        self.should_exit = True
        logger.info("draining for up to %g s", self._drain_seconds)
        stopping = asyncio.create_task(self._engine.stop(self._drain_seconds))
        closing = asyncio.create_task(super().shutdown(sockets))
        await stopping
        # Whoever still sends a request, or does not read its reply, is not waited for any longer.
        await asyncio.wait({closing}, timeout=self._grace_seconds)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await closing


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; StartError where the address can't be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise StartError(f"can't listen on {host}:{port}: {reason}") from None
    return listener


@contextlib.contextmanager
def tracing_to(endpoint: str | None) -> Iterator[Tracing | None]:
    """Sends traces to a collector, if there is one; StartError where what that takes is missing."""
    if endpoint is None:
        yield None
        return
    try:
        from malora_server.api.tracing import Tracing
    except ModuleNotFoundError as error:
        raise StartError(
            f"--otlp-endpoint needs OpenTelemetry ({error.name} is not installed): "
            "pip install 'malora[otel]'"
        ) from None
    tracing = Tracing(endpoint)
    try:
        yield tracing
    finally:
        tracing.stop()


async def serve(
    settings: Settings, tokenizer: Tokenizer, listener: socket.socket, tracing: Tracing | None
) -> None:
    """Start the engine and serve until SIGTERM or SIGINT.

    Raises EngineStartError, StartError; EngineFailedError where it ends for want of an engine.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    for number in _SIGNALS:
        loop.add_signal_handler(number, task.cancel)
    engine = await EngineSupervisor.start(
        engine_config(settings),
        settings.log_level,
        timeout=settings.engine_timeout,
        restart=settings.restart,
    )
    try:
        app = create_app(settings, engine, tokenizer, tracing)
        config = http_config(app, settings)
        server = DrainingServer(config, engine, settings.shutdown_timeout)
    except BaseException:
        await engine.stop(0)
        raise
    for number in _SIGNALS:
        loop.add_signal_handler(number, server.handle_exit, number, None)
    port = listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    listener.listen(config.backlog)  # so that what the next line says is true
    logger.info("serving %s on http://%s:%d", settings.base_name, host, port)
    watching = asyncio.create_task(app.state.server.registry.watch())
    await server.serve(sockets=[listener])
    watching.cancel()
    if engine.failure is not None:
        raise EngineFailedError(engine.failure)


def raise_file_limit() -> None:
    """Allow this process and its children as many connections and files as the system lets it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(argv: list[str]) -> None:
    """`malora serve`: its exit status is 0 after a drain.

    With one line on standard error that says why, it is 1 where the engine failed for good, 2
    where the server can't start.
    """
    try:
        settings = parse_settings(argv)
        settings.admin_keys()  # and API keys: a bad one is told before the model is loaded
        configure_logging(settings.log_level)
        raise_file_limit()
        endpoint = settings.otlp_endpoint
        with (
            tracing_to(None if endpoint is None else str(endpoint)) as tracing,
            listen(settings.host, settings.port) as listener,
            contextlib.suppress(asyncio.CancelledError),
        ):
            tokenizer = Tokenizer.load(settings.base)
            uvloop.run(serve(settings, tokenizer, listener, tracing))
    except (StartError, EngineStartError, EngineFailedError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, EngineFailedError) else 2)
