"""Keys: who may use the server, and who may change its adapters (ASGI)."""

from __future__ import annotations

import hmac
from collections.abc import Collection
from contextlib import ExitStack
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from malora_server.api.admission import KeyLimit
from malora_server.api.errors import ApiError
from malora_server.api.middleware import drop_body

_PUBLIC = frozenset({"/health"})
"""What a load balancer asks, which has no key."""
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_ADMIN_PATHS = ("/v1/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class Authentication:
    """Refuses requests without one of the keys, as `Authorization: Bearer KEY`.

    An API key opens all routes but those that change adapters; an admin key opens all. Where there
    are admin keys alone, everybody may use the rest; where there are API keys alone, nobody may
    change adapters.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Collection[str],
        admin_keys: Collection[str],
        limit: KeyLimit | None,
        seconds: float,
    ) -> None:
        """`limit`: of each API key's requests. `seconds`: for the body of a refused request."""
        self._app = app
        # Hashes are of one length, which a comparison in constant time needs, and tell nothing.
        self._hashes = [sha256(key.encode()).digest() for key in keys]
        self._admin_hashes = [sha256(key.encode()).digest() for key in admin_keys]
        self._limit = limit
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI)."""
        if scope["type"] != "http" or scope["path"] in _PUBLIC:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        with ExitStack() as stack:
            try:
                key = self._authenticate(headers, admin=_changes_adapters(scope))
                if key is not None and self._limit is not None:
                    stack.enter_context(self._limit.hold(key))
            except ApiError as error:
                reply = error.response()
                if not await drop_body(receive, headers, self._seconds):
                    reply.headers["Connection"] = "close"
                await reply(scope, receive, send)
                return
            await self._app(scope, receive, send)

    def _authenticate(self, headers: Headers, *, admin: bool) -> bytes | None:
        """The hash of the API key it came with, or None for another; ApiError where it may not."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = sha256(key.strip().encode()).digest() if scheme.lower() == "bearer" else b""
        known = _is_among(given, self._hashes)
        if _is_among(given, self._admin_hashes) or (not admin and (known or not self._hashes)):
            return given if known else None
        if not known:
            raise ApiError(
                401,
                "This server asks for an API key: send it as 'Authorization: Bearer KEY'.",
                headers={"WWW-Authenticate": "Bearer"},
            )
        raise ApiError(
            403,
            "Only the admin key may change adapters; this is an API key."
            if self._admin_hashes
            else "This server has no admin key, so nobody may change adapters: start it with "
            "--admin-key-file (or MALORA_ADMIN_KEY).",
            code="admin_key_required",
        )


def _changes_adapters(scope: Scope) -> bool:
    if scope["method"] in _SAFE_METHODS:
        return False
    path = scope["path"]
    return any(path == admin or path.startswith(f"{admin}/") for admin in _ADMIN_PATHS)


def _is_among(given: bytes, hashes: Collection[bytes]) -> bool:
    # Every one is compared, so that the time tells nothing about which one it was.
    return sum(hmac.compare_digest(given, known) for known in hashes) > 0
