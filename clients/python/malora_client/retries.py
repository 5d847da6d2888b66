"""When to send a request again, and after how long."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

import httpx

from malora_client.errors import APIError, connection_error, status_error

logger = logging.getLogger("malora_client")

FIRST_DELAY = 0.5
MAX_DELAY = 8.0
MAX_RETRY_AFTER = 60.0
"""Seconds. A server that asks for more gets no retry: the caller hears of it at once instead."""

# Every request this client sends only reads or computes, so sending it twice is safe, after a
# conflict (an adapter that was changing) too. A reply that came too late is another matter: a
# caller who set a limit of ten seconds did not ask to wait thirty.
_RETRIED_STATUSES = frozenset({408, 409, 429})
_RETRIED_FAILURES = (
    httpx.ConnectTimeout,
    httpx.NetworkError,
    httpx.ProxyError,
    httpx.RemoteProtocolError,
)


class Retries:
    """One request's retries: says how many seconds to wait before the next one, or raises."""

    def __init__(self, max_retries: int) -> None:
        self._max_retries = max_retries
        self._done = 0

    def after_failure(self, exc: httpx.RequestError) -> float:
        """Without a whole reply."""
        error = connection_error(exc)
        if not isinstance(exc, _RETRIED_FAILURES):
            raise error from exc
        return self._next(exc.request, error, None, exc)

    def after_status(self, response: httpx.Response) -> float:
        """With a reply that is no success; its body must have been read."""
        error = status_error(response)
        if response.status_code not in _RETRIED_STATUSES and response.status_code < 500:
            raise error
        asked = retry_after(response.headers, time.time())
        return self._next(response.request, error, asked, None)

    def _next(
        self,
        request: httpx.Request,
        error: APIError,
        asked: float | None,
        cause: httpx.RequestError | None,
    ) -> float:
        if self._done >= self._max_retries or (asked is not None and asked > MAX_RETRY_AFTER):
            raise error from cause
        delay = backoff(self._done) if asked is None else asked
        self._done += 1
        logger.info("Retrying %s %s in %.2f s: %s", request.method, request.url.path, delay, error)
        return delay


def backoff(retries_done: int) -> float:
    """Seconds to wait: doubling, and spread over its upper half so that clients don't return
    together.
    """
    delay: float = min(FIRST_DELAY * 2**retries_done, MAX_DELAY)
    return delay * random.uniform(0.5, 1.0)


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that the server asks to wait; None if it does not say, or not intelligibly.

    Reads `retry-after-ms`, then `retry-after` as seconds or as a date. now: Unix seconds.
    """
    millis = _number(headers.get("retry-after-ms"))
    if millis is not None:
        return max(millis / 1000, 0.0)
    value = headers.get("retry-after")
    seconds = _number(value)
    if seconds is None and value is not None:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - now
        except ValueError:
            return None
    return None if seconds is None else max(seconds, 0.0)


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
