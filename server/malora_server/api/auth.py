"""API keys: who may use the server (ASGI)."""

from __future__ import annotations

import hmac
from collections.abc import Collection
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from malora_server.api.errors import ApiError
from malora_server.api.middleware import drop_body

_PUBLIC = frozenset({"/health"})
"""What a load balancer asks, which has no key."""


class Authentication:
    """Refuses requests without one of the keys, as `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, keys: Collection[str]) -> None:
        self._app = app
        # Hashes are of one length, which a comparison in constant time needs, and tell nothing.
        self._hashes = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI)."""
        if scope["type"] != "http" or scope["path"] in _PUBLIC or self._knows(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        complete = await drop_body(receive, Headers(scope=scope))
        headers = {"WWW-Authenticate": "Bearer"}
        if not complete:
            headers["Connection"] = "close"
        error = ApiError(
            401,
            "This server asks for an API key: send it as 'Authorization: Bearer KEY'.",
            headers=headers,
        )
        await error.response()(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        given = sha256(key.strip().encode()).digest()
        # Every key is compared, so that the time tells nothing about which one it was.
        return sum(hmac.compare_digest(given, known) for known in self._hashes) > 0
