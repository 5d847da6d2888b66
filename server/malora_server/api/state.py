"""What every route of one server shares."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from malora_server.api.errors import ApiError
from malora_server.api.registry import ModelRegistry
from malora_server.api.tokenizer import Tokenizer
from malora_server.engine.messages import SamplingParams
from malora_server.metrics import Metrics
from malora_server.settings import Settings

if TYPE_CHECKING:
    from malora_server.engine.supervisor import EngineSupervisor

_RETRY_AFTER_SECONDS = 1


class Admission:
    """Bounds how many sequences may wait in the engine."""

    def __init__(self, engine: EngineSupervisor, max_running: int, max_queued: int) -> None:
        self._engine = engine
        self._max_running = max_running
        self._max_queued = max_queued
        self._in_flight = 0

    @contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Hold places for `count` sequences; ApiError 429 where too many wait already."""
        if count > self._max_running + self._max_queued:
            raise ApiError(
                400,
                f"The request asks for {count} sequences; this server never holds more than "
                f"{self._max_running + self._max_queued}.",
                code="too_many_sequences",
            )
        # The engine's own figure is a step old, ours doesn't know how many find memory to run.
        ours = self._in_flight + count - self._max_running
        engines = self._engine.stats.num_requests_waiting + 1
        if max(ours, engines) > self._max_queued:
            raise ApiError(
                429,
                "Too many requests are waiting; try again shortly.",
                headers={"Retry-After": str(_RETRY_AFTER_SECONDS)},
            )
        self._in_flight += count
        try:
            yield
        finally:
            self._in_flight -= count


@dataclass
class RequestRecord:
    """What the log line of a request tells; routes fill it in as they learn it."""

    request_id: str
    """The client's own, where it sent one."""
    engine_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Ours, unique among all requests in flight."""
    trace_id: str | None = None
    """In hexadecimal, where the server sends traces."""
    received: float = 0.0
    """When the whole of it was here, in `time.perf_counter`'s seconds: latencies start there."""
    model: str | None = None
    sampling: SamplingParams | None = None
    """Of the first choice."""
    num_choices: int = 1
    stream: bool = False
    generation: str | None = None
    """The generation of the model's adapter, as the reply's `system_fingerprint` names it."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    time_to_first_token: float | None = None
    """Seconds, of the first choice that had one."""
    queue_time: float | None = None
    prefill_time: float | None = None
    """Seconds, both of the same choice."""
    finish_reasons: list[str] | None = None
    """By choice: one that failed has error, one whose client left abort."""
    disconnected: bool = False


@dataclass(frozen=True)
class ServerState:
    """One server's parts."""

    settings: Settings
    engine: EngineSupervisor
    tokenizer: Tokenizer
    registry: ModelRegistry
    metrics: Metrics
    admission: Admission


def _server_state(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


def _record(request: Request) -> RequestRecord:
    record: RequestRecord = request.state.record
    record.received = time.perf_counter()
    return record


Server = Annotated[ServerState, Depends(_server_state)]
Record = Annotated[RequestRecord, Depends(_record)]
