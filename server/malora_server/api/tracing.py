"""OpenTelemetry traces: one span a request, sent to a collector over OTLP (HTTP, protobuf).

Imported only with --otlp-endpoint. The SDK's own variables (OTEL_SERVICE_NAME,
OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, …) work as usual.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers

from malora_server.api.state import RequestRecord

_OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}
_PROVIDER = "malora"


class Tracing:
    """Starts and ends the spans of requests; a thread of its own sends them, in batches.

    A collector that is slow or gone costs spans, and no request anything.
    """

    def __init__(self, endpoint: str) -> None:
        """endpoint: the collector's base URL, such as http://collector:4318."""
        name = os.environ.get("OTEL_SERVICE_NAME", _PROVIDER)
        self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("malora_server")
        self._propagator = TraceContextTextMapPropagator()
        # A collector that is away would fill the log, a line each time.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)

    def start(self, headers: Headers) -> Span:
        """The span of a request that has just come, a child of the one its `traceparent` names."""
        parent = self._propagator.extract(headers)
        return self._tracer.start_span("request", parent, kind=SpanKind.SERVER)

    def end(
        self, span: Span, method: str, route: str | None, status: int, record: RequestRecord
    ) -> None:
        """End a request's span with all that is known of it, but never a text or a key."""
        operation = _OPERATIONS.get(route or "")
        if span.is_recording():
            attributes = {
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "error.type": str(status) if status >= 500 else None,
            }
            if operation is not None and record.model is not None:
                span.update_name(f"{operation} {record.model}")
                attributes |= _of_generation(operation, record)
            else:
                span.update_name(f"{method} {route}" if route else method)
            span.set_attributes({k: v for k, v in attributes.items() if v is not None})
            if status >= 500 or "error" in (record.finish_reasons or ()):
                span.set_status(Status(StatusCode.ERROR))
        span.end()

    def stop(self) -> None:
        """Send what is left, for some seconds at most."""
        self._provider.shutdown()


def _of_generation(operation: str, record: RequestRecord) -> dict[str, Any]:
    """The attributes of OpenTelemetry's GenAI conventions, and of vLLM's where those have none."""
    sampling = record.sampling
    asked = (
        {}
        if sampling is None
        else {
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k or None,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
            "gen_ai.request.presence_penalty": sampling.presence_penalty,
        }
    )
    return asked | {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": _PROVIDER,
        "gen_ai.request.model": record.model,
        "gen_ai.request.choice.count": record.num_choices,
        "gen_ai.request.stream": record.stream,
        "gen_ai.request.id": record.request_id,
        "gen_ai.response.model": record.model,
        "gen_ai.response.finish_reasons": record.finish_reasons,
        "gen_ai.openai.response.system_fingerprint": record.generation,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.response.time_to_first_chunk": record.time_to_first_token,
        "gen_ai.latency.time_to_first_token": record.time_to_first_token,
        "gen_ai.latency.time_in_queue": record.queue_time,
        "gen_ai.latency.time_in_model_prefill": record.prefill_time,
    }
