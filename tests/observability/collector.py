"""A collector of OpenTelemetry traces, as small as a test needs it: OTLP over HTTP."""

from __future__ import annotations

import gzip
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue


@dataclass(frozen=True)
class CollectedSpan:
    """One span, and the attributes of the service it came from."""

    name: str
    trace_id: str
    parent_span_id: str
    kind: int
    is_error: bool
    seconds: float
    attributes: dict[str, Any]
    resource: dict[str, Any]


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind or "string_value")


def _attributes(of: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in of.attributes}


class Collector:
    """Takes spans at `url` until it is stopped."""

    def __init__(self) -> None:
        self._spans: list[CollectedSpan] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                status = 200 if self.path == "/v1/traces" else 404
                collector._take(ExportTraceServiceRequest.FromString(body))
                reply = ExportTraceServiceResponse().SerializeToString()
                self.send_response(status)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _take(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self._spans += [
                    CollectedSpan(
                        span.name,
                        span.trace_id.hex(),
                        span.parent_span_id.hex(),
                        span.kind,
                        span.status.code == span.status.STATUS_CODE_ERROR,
                        (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
                        _attributes(span),
                        _attributes(resource.resource),
                    )
                    for span in scope.spans
                ]

    def spans(self, trace_id: str, count: int = 1, seconds: float = 20) -> list[CollectedSpan]:
        """A trace's spans, once there are `count`: they come in batches, some seconds apart."""
        deadline = time.monotonic() + seconds
        while len(found := [span for span in self._spans if span.trace_id == trace_id]) < count:
            assert time.monotonic() < deadline, (trace_id, self._spans)
            time.sleep(0.05)
        return found

    def stop(self) -> None:
        """Take no more."""
        self._server.shutdown()
        self._server.server_close()
