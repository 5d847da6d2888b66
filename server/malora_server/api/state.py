"""What every route of one server shares."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from malora_server.api.admission import Admission
from malora_server.api.changes import AdapterChanges
from malora_server.api.grammars import GrammarChecker
from malora_server.api.registry import ModelRegistry
from malora_server.api.tokenizer import Tokenizer
from malora_server.engine.messages import SamplingParams
from malora_server.metrics import Metrics
from malora_server.settings import Settings

if TYPE_CHECKING:
    from malora_server.engine.supervisor import EngineSupervisor


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
    changes: AdapterChanges
    metrics: Metrics
    admission: Admission
    grammars: GrammarChecker


# Coroutines, as FastAPI runs what is none in a thread.
async def _server_state(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


async def _record(request: Request) -> RequestRecord:
    record: RequestRecord = request.state.record
    record.received = time.perf_counter()
    return record


Server = Annotated[ServerState, Depends(_server_state)]
Record = Annotated[RequestRecord, Depends(_record)]
