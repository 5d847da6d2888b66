"""/v1/adapters: what adapters there are, and changes of them; vLLM's routes for the same."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Response

from malora_server.api.errors import ApiError
from malora_server.api.protocol import Strict, Text
from malora_server.api.registry import ServedAdapter, summary
from malora_server.api.state import Server
from malora_server.api.streaming import encode_json

router = APIRouter()


class PutAdapterRequest(Strict):
    """PUT /v1/adapters/{name}."""

    source: Text | None = None
    pinned: bool | None = None
    expected_generation: Text | None = None


class LoadLoraRequest(Strict):
    """POST /v1/load_lora_adapter, as vLLM has it."""

    lora_name: Text
    lora_path: Text
    load_inplace: bool | None = None


class UnloadLoraRequest(Strict):
    """POST /v1/unload_lora_adapter, as vLLM has it."""

    lora_name: Text
    lora_int_id: int | None = None


@router.get("/v1/adapters")
async def list_adapters(server: Server) -> Response:
    """Every adapter there is; `error` says why one can't be served."""
    adapters = sorted(server.registry.adapters.values(), key=lambda adapter: adapter.name)
    described = await asyncio.to_thread(lambda: [_adapter(adapter) for adapter in adapters])
    return _json({"object": "list", "data": described})


@router.get("/v1/adapters/{name}")
async def get_adapter(name: str, server: Server) -> Response:
    """One of them."""
    return _json(_adapter(server.registry.adapter(name)))


@router.put("/v1/adapters/{name}")
async def put_adapter(name: str, body: PutAdapterRequest, server: Server) -> Response:
    """Load an adapter, or replace it at once and wholly, or not at all."""
    adapter = await server.changes.put(
        name, body.source, pinned=body.pinned, expected_generation=body.expected_generation
    )
    return _json(_adapter(adapter))


@router.delete("/v1/adapters/{name}")
async def delete_adapter(name: str, server: Server) -> Response:
    """Serve an adapter no more."""
    await server.changes.delete(name)
    return _json({"id": name, "object": "adapter", "deleted": True})


@router.post("/v1/adapters/{name}/pin")
async def pin_adapter(name: str, server: Server) -> Response:
    """Keep an adapter on the device."""
    return _json(_adapter(await server.changes.pin(name, True)))


@router.post("/v1/adapters/{name}/unpin")
async def unpin_adapter(name: str, server: Server) -> Response:
    """Let an adapter leave the device when others need the room."""
    return _json(_adapter(await server.changes.pin(name, False)))


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(body: LoadLoraRequest, server: Server) -> Response:
    """PUT by vLLM's name; a name that was loaded before needs `load_inplace`."""
    if server.changes.was_loaded(body.lora_name) and not body.load_inplace:
        raise ApiError(
            400,
            f"The adapter {body.lora_name!r} has been loaded already; set load_inplace to replace "
            "it.",
            code="adapter_exists",
            param="lora_name",
        )
    adapter = await server.changes.put(
        body.lora_name, body.lora_path, pinned=None, expected_generation=None
    )
    return _json(_adapter(adapter))


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadLoraRequest, server: Server) -> Response:
    """DELETE by vLLM's name."""
    return await delete_adapter(body.lora_name, server)


def _adapter(adapter: ServedAdapter) -> dict[str, Any]:
    generation = adapter.current
    status = generation.status
    return {
        "id": adapter.name,
        "object": "adapter",
        "name": adapter.name,
        "created": generation.created,
        "source": adapter.source,
        "state": status.tier,
        "generation": generation.id or None,
        "digest": status.digest or None,
        "pinned": adapter.pinned,
        "device_bytes": status.device_bytes,
        "host_bytes": status.host_bytes,
        "load_seconds": status.load_seconds or None,
        "in_flight": generation.num_in_flight,
        "last_used": generation.last_used,
        **msgspec.structs.asdict(summary(generation)),
        "error": status.error,
        "error_code": status.error_code,
    }


def _json(value: dict[str, Any]) -> Response:
    return Response(encode_json(value), media_type="application/json")
