"""What the blocking and the asyncio client share: all but the input and output."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Generic, Self, TypeVar, Unpack

import httpx

from malora_client.calls import Call
from malora_client.settings import Options, Settings
from malora_client.types import Reply

HttpT = TypeVar("HttpT", bound=httpx.Client | httpx.AsyncClient)


class BaseClient(Generic[HttpT]):
    """A client's settings and its connections, which copies made by `with_options` share."""

    def __init__(self, settings: Settings, http: HttpT, *, owns_http: bool) -> None:
        self._settings = settings
        self._http: HttpT = http
        self._owns_http = owns_http

    def __repr__(self) -> str:
        return f"{type(self).__name__}(base_url={httpx.URL(self._settings.base_url)!r})"

    def with_options(self, **options: Unpack[Options]) -> Self:
        """A client with another timeout or max_retries, on the same connections."""
        other = copy.copy(self)
        other._settings = replace(self._settings, **options)
        other._owns_http = False
        return other

    def _build(self, call: Call[Reply]) -> httpx.Request:
        return self._http.build_request(
            call.method,
            self._settings.base_url + call.path,
            headers={**self._settings.headers(admin=call.is_admin), **call.headers},
            content=call.content,
            timeout=self._settings.timeout,
        )
