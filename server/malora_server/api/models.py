"""GET /v1/models: what can be asked for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from malora_server.api.registry import ServedModel
from malora_server.api.state import Server, ServerState
from malora_server.api.streaming import encode_json

router = APIRouter()


@router.get("/v1/models")
async def list_models(server: Server) -> Response:
    """The base model and every adapter that is not known to be broken."""
    models = [_model(server, model) for model in server.registry.models()]
    return _json({"object": "list", "data": models})


@router.get("/v1/models/{name:path}")
async def get_model(name: str, server: Server) -> Response:
    """One of them."""
    return _json(_model(server, server.registry.resolve(name, param=None)))


def _model(server: ServerState, model: ServedModel) -> dict[str, Any]:
    base = server.registry.base.name
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "malora",
        "root": model.name,
        "parent": base if model.generation else None,
        "max_model_len": server.engine.ready.max_model_len,
    }


def _json(value: dict[str, Any]) -> Response:
    return Response(encode_json(value), media_type="application/json")
