"""GET /health, /metrics and /version."""

from __future__ import annotations

import asyncio
from importlib.metadata import version

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from malora_server.api.errors import engine_dead
from malora_server.api.state import Server
from malora_server.api.streaming import encode_json

router = APIRouter()


@router.get("/health")
async def health(server: Server) -> Response:
    """200 while the engine lives, else 503."""
    if not server.engine.healthy:
        raise engine_dead("The engine has stopped.", server.engine.retry_after)
    return Response(encode_json({"status": "ok"}), media_type="application/json")


@router.get("/metrics")
async def metrics(server: Server) -> Response:
    """Prometheus' text format."""
    # In a thread, as it takes a while with many models, and tokens must not wait for it.
    body = await asyncio.to_thread(server.metrics.render)
    return Response(body, media_type=CONTENT_TYPE_PLAIN_0_0_4)


@router.get("/version")
async def get_version() -> Response:
    """The server's version."""
    return Response(encode_json({"version": version("malora")}), media_type="application/json")
