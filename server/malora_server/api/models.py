"""GET /v1/models and /v1/adapters: what can be asked for."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Response

from malora_server.api.registry import ServedModel
from malora_server.api.state import Server, ServerState
from malora_server.api.streaming import encode_json
from malora_server.engine.messages import AdapterInfo

router = APIRouter()


@router.get("/v1/models")
async def list_models(server: Server) -> Response:
    """The base model and every adapter that can be served."""
    return _json(
        {
            "object": "list",
            "data": [_model(server, model) for model in server.registry.models.values()],
        }
    )


@router.get("/v1/models/{name:path}")
async def get_model(name: str, server: Server) -> Response:
    """One of them."""
    return _json(_model(server, server.registry.resolve(name, param=None)))


@router.get("/v1/adapters")
async def list_adapters(server: Server) -> Response:
    """Every adapter that was found; `error` says why one can't be served."""
    adapters = server.registry.adapters.values()
    return _json({"object": "list", "data": [_adapter(adapter) for adapter in adapters]})


@router.get("/v1/adapters/{name:path}")
async def get_adapter(name: str, server: Server) -> Response:
    """One of them."""
    return _json(_adapter(server.registry.adapter(name)))


def _model(server: ServerState, model: ServedModel) -> dict[str, Any]:
    base = server.registry.base.name
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "malora",
        "root": model.name,
        "parent": base if model.adapter else None,
        "max_model_len": server.engine.ready.max_model_len,
    }


def _adapter(adapter: AdapterInfo) -> dict[str, Any]:
    return {"id": adapter.name, "object": "adapter", **msgspec.structs.asdict(adapter)}


def _json(value: dict[str, Any]) -> Response:
    return Response(encode_json(value), media_type="application/json")
