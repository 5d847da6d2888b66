"""How a client reaches its server: the address, the key, the timeouts, the retries."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TypedDict

import httpx

from malora_client._version import __version__
from malora_client.errors import MaloraError

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
"""Seconds. A long completion sends nothing until it is whole; a server that is up accepts fast."""
DEFAULT_MAX_RETRIES = 2
LIMITS = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
"""httpx's own limit of 100 connections would throttle a client that fills a server's batch."""

Timeout = float | httpx.Timeout | None


class Options(TypedDict, total=False):
    """What `with_options` can change. timeout: seconds, or None to wait for ever."""

    timeout: Timeout
    max_retries: int


@dataclass(frozen=True)
class Settings:
    """A client's settings, checked. The keys never show in the repr."""

    base_url: str
    api_key: str | None = field(repr=False)
    admin_key: str | None = field(repr=False)
    timeout: Timeout
    max_retries: int

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.base_url)
        except httpx.InvalidURL as exc:
            raise MaloraError(f"base_url is no URL: {exc}") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise MaloraError(f"base_url must be like {DEFAULT_BASE_URL}, but is {url!r}.")
        if self.max_retries < 0:
            raise MaloraError(f"max_retries must be 0 or more, but is {self.max_retries}.")
        # The HTTP layer would refuse such a header with the key in its message.
        for name, key in (("api_key", self.api_key), ("admin_key", self.admin_key)):
            if key is not None and not all("!" <= char <= "~" for char in key):
                raise MaloraError(
                    f"{name} holds a space, a line break or another character that no HTTP header "
                    "may carry; check how it was read."
                )

    @classmethod
    def resolve(
        cls,
        base_url: str | None,
        api_key: str | None,
        admin_key: str | None,
        timeout: Timeout,
        max_retries: int,
    ) -> Settings:
        """Fill in what was not given from MALORA_… variables and the defaults."""
        base_url = base_url or os.environ.get("MALORA_BASE_URL") or DEFAULT_BASE_URL
        return cls(
            # openai's base URLs end in /v1; ours names the server, since /tokenize lies beside it.
            base_url=base_url.rstrip("/").removesuffix("/v1"),
            api_key=api_key or os.environ.get("MALORA_API_KEY") or None,
            admin_key=admin_key or os.environ.get("MALORA_ADMIN_KEY") or None,
            timeout=timeout,
            max_retries=max_retries,
        )

    def headers(self, *, admin: bool) -> dict[str, str]:
        """Those of every request; `admin`: of one that takes the admin key."""
        headers = {"User-Agent": f"malora-client/{__version__}"}
        key = (self.admin_key if admin else None) or self.api_key
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        return headers
