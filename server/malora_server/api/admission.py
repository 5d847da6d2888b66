"""Who may begin now, and when it makes sense for the others to come back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from malora_server.api.errors import ApiError
from malora_server.settings import Settings

if TYPE_CHECKING:
    from malora_server.engine.supervisor import EngineSupervisor

Clock = Callable[[], float]
"""Seconds, from any beginning."""

_MEMORY_SECONDS = 10.0
_MAX_RETRY_SECONDS = 60


class Departures:
    """How fast something drains, and so how long who finds it full should stay away.

    Each who asks is given the time after those who asked before, so that they do not come back
    all at once to find it full again.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._recent = 0.0
        """What left, less and less of it the longer ago."""
        self._first: float | None = None
        self._last = 0.0
        self._promised = 0.0
        """When the last who asked should be back."""

    def add(self, amount: float) -> None:
        """Note that so much has left."""
        now = self._clock()
        if self._first is None:
            self._first = now
        self._recent = self._decayed(now) + amount
        self._last = now

    def retry_after(self, amount: float) -> int:
        """Seconds, 1 to 60, until there should be room for `amount` more than there is now."""
        if self._first is None:
            return 1  # nothing is known yet
        now = self._clock()
        # A memory that is not full yet holds less than the rate times its length.
        age = max(now - self._first, 1.0)
        rate = self._decayed(now) / (_MEMORY_SECONDS * -math.expm1(-age / _MEMORY_SECONDS))
        end = now + _MAX_RETRY_SECONDS
        promised = max(self._promised, now)
        self._promised = min(promised + amount / rate, end) if rate else end
        return min(max(1, math.ceil(self._promised - now)), _MAX_RETRY_SECONDS)

    def _decayed(self, now: float) -> float:
        return self._recent * math.exp((self._last - now) / _MEMORY_SECONDS)


class Place:
    """One sequence's: held from its admission to its end."""

    def __init__(self, admission: Admission, num_tokens: int) -> None:
        self._admission = admission
        self._num_tokens = num_tokens

    def started(self) -> None:
        """Its first token is here: its prompt waits no longer."""
        self._admission.take(self._num_tokens)
        self._num_tokens = 0


class Admission:
    """Bounds how many sequences, and how many tokens of their prompts, wait for the engine."""

    def __init__(
        self, engine: EngineSupervisor, settings: Settings, clock: Clock = time.monotonic
    ) -> None:
        self._engine = engine
        self._max_running = settings.max_num_seqs
        self._max_queued = settings.max_queued_requests
        self._max_queued_tokens = settings.max_queued_tokens
        self._in_flight = 0
        self._waiting_tokens = 0
        self._sequences = Departures(clock)
        self._tokens = Departures(clock)

    def check(self, count: int) -> None:
        """ApiError 429 where `count` more sequences would wait too many; 400 where they always do.

        For before a prompt is even tokenised; `admit` asks again.
        """
        if count > self._max_running + self._max_queued:
            raise ApiError(
                400,
                f"The request asks for {count} sequences; this server never holds more than "
                f"{self._max_running + self._max_queued}.",
                code="too_many_sequences",
            )
        # The engine's own figure is a step old, ours doesn't know how many find memory to run.
        ours = self._in_flight + count - self._max_running
        engines = self._engine.stats.num_requests_waiting + 1
        excess = max(ours, engines) - self._max_queued
        if excess > 0:
            raise _queue_full("requests", self._sequences.retry_after(excess))

    @contextmanager
    def admit(self, prompt_lengths: Sequence[int]) -> Iterator[list[Place]]:
        """Hold a place for a sequence of each length; ApiError as `check`, tokens counted too.

        Where no tokens wait, any number of them may.
        """
        count, num_tokens = len(prompt_lengths), sum(prompt_lengths)
        self.check(count)
        excess = self._waiting_tokens + num_tokens - self._max_queued_tokens
        if self._waiting_tokens and excess > 0:
            raise _queue_full("tokens", self._tokens.retry_after(excess))
        self._in_flight += count
        self._waiting_tokens += num_tokens
        places = [Place(self, length) for length in prompt_lengths]
        try:
            yield places
        finally:
            self._in_flight -= count
            self._sequences.add(count)
            for place in places:
                place.started()

    def take(self, num_tokens: int) -> None:
        """Note that so many tokens of prompts wait no longer."""
        if num_tokens:
            self._waiting_tokens -= num_tokens
            self._tokens.add(num_tokens)


class KeyLimit:
    """Bounds how many requests of one API key are in flight. Keys go by their hashes."""

    def __init__(self, max_requests: int, clock: Clock = time.monotonic) -> None:
        self._max_requests = max_requests
        self._clock = clock
        self._in_flight: dict[bytes, int] = {}
        self._departures: dict[bytes, Departures] = {}

    @contextmanager
    def hold(self, key: bytes) -> Iterator[None]:
        """Count a request while it runs; ApiError 429 where its key has too many."""
        count = self._in_flight.get(key, 0)
        departures = self._departures.setdefault(key, Departures(self._clock))
        if count >= self._max_requests:
            raise ApiError(
                429,
                f"This API key has {count} requests in flight, as many as it may; wait for one "
                "to finish.",
                code="too_many_requests_per_key",
                headers={"Retry-After": str(departures.retry_after(1))},
            )
        self._in_flight[key] = count + 1
        try:
            yield
        finally:
            self._in_flight[key] -= 1
            departures.add(1)


def _queue_full(what: str, seconds: int) -> ApiError:
    return ApiError(
        429,
        f"Too many {what} are waiting; try again in about {seconds} s.",
        headers={"Retry-After": str(seconds)},
    )
