"""Keeps an engine running: a new process where the last one ended without being asked to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from malora_server.engine.client import EngineClient, EngineDeadError, EngineStartError
from malora_server.engine.config import EngineConfig
from malora_server.engine.messages import (
    AdapterStatus,
    EngineStats,
    LoadAdapter,
    PinAdapter,
    Ready,
    Report,
    RetireAdapter,
    SequenceOutput,
    Submit,
)

logger = logging.getLogger(__name__)

_STABLE_SECONDS = 10.0
"""An engine that served as long is not one that fails again and again."""
_MAX_FAILURES = 5
"""Failures in a row after which there is no point in another start."""


class EngineSupervisor:
    """The engine as the API sees it: one process after another, with pauses in between.

    While there is none, requests fail at once. An engine that ended is started again at once;
    one that fails soon after, or cannot start, after 1, 2, 4 … seconds; after five such failures
    in a row nothing more is tried, and `failure` says so.
    """

    def __init__(
        self,
        client: EngineClient,
        start: Callable[[], Awaitable[EngineClient]],
        start_seconds: float,
        restart: bool,
    ) -> None:
        """Use `start`."""
        self.ready: Ready = client.ready
        self.restarts = 0
        """How often a process was started in place of one that ended."""
        self.failure: str | None = None
        """Why there will be no engine any more, once that is so."""
        self.on_restart: Callable[[EngineClient], Awaitable[None]] | None = None
        """Called with every further engine before it gets requests; EngineDeadError: it failed."""
        self.on_report: Callable[[Report], None] | None = None
        """Called with every report of every engine."""
        self.on_adapter: Callable[[AdapterStatus], None] | None = None
        """Called with whatever happens to an adapter, in every engine."""
        self._client = client
        client.on_report = self._report
        client.on_adapter = self._adapter
        self._start = start
        self._start_seconds = start_seconds
        self._restart = restart
        self._back_at = 0.0
        self._supervising = asyncio.create_task(self._supervise())

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        log_level: str = "info",
        *,
        timeout: float | None = None,
        restart: bool = True,
    ) -> EngineSupervisor:
        """Start the first engine; EngineStartError where it cannot start.

        timeout: see `EngineClient.start`. restart: whether there is a second one.
        """

        def start() -> Awaitable[EngineClient]:
            return EngineClient.start(config, log_level, timeout)

        started = time.monotonic()
        client = await start()
        return cls(client, start, time.monotonic() - started, restart)

    @property
    def healthy(self) -> bool:
        """Whether an engine takes requests."""
        return self._client.healthy

    @property
    def stats(self) -> EngineStats:
        """The engine's state; of none, all zeros."""
        return self._client.stats

    @property
    def retry_after(self) -> int:
        """Seconds in which an engine should be back, judged by the last start."""
        left = self._back_at - time.monotonic()
        return max(1, math.ceil(left if left > 0 else self._start_seconds))

    def generate(self, submit: Submit) -> AsyncIterator[SequenceOutput]:
        """See `EngineClient.generate`."""
        return self._client.generate(submit)

    def tell(self, message: LoadAdapter | PinAdapter | RetireAdapter) -> None:
        """See `EngineClient.tell`; without an engine nobody hears it."""
        self._client.tell(message)

    async def stop(self, timeout: float) -> None:
        """Let requests in flight finish within `timeout` seconds, then end the engine for good."""
        self._supervising.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._supervising
        await self._client.stop(timeout)

    def abort(self) -> None:
        """Abort what is in flight; what waits in `stop` has little left to wait for."""
        self._client.abort()

    def _report(self, report: Report) -> None:
        if self.on_report is not None:
            self.on_report(report)

    def _adapter(self, status: AdapterStatus) -> None:
        if self.on_adapter is not None:
            self.on_adapter(status)

    async def _supervise(self) -> None:
        failures = 0
        while True:
            since = time.monotonic()
            how = await self._client.ended()
            failures = failures if time.monotonic() - since < _STABLE_SECONDS else 0
            client = None
            while client is None:
                failures += 1
                if not self._restart or failures >= _MAX_FAILURES:
                    self._give_up(how, failures)
                    return
                try:
                    client = await self._start_again(how, failures)
                except Exception as error:
                    if not isinstance(error, EngineStartError | EngineDeadError | OSError):
                        logger.exception("starting the engine failed")
                    how = f"could not start: {error}"
            self._client, self.ready = client, client.ready

    def _give_up(self, how: str, failures: int) -> None:
        self.failure = f"the engine {how}"
        if failures > 1:
            self.failure += f"; it failed {failures} times in a row"
        logger.error("%s; the server ends", self.failure)

    async def _start_again(self, how: str, failures: int) -> EngineClient:
        pause = 0 if failures == 1 else 2 ** (failures - 2)
        self.restarts += 1
        self._back_at = time.monotonic() + pause + self._start_seconds
        logger.error("the engine %s; it is started again in %d s", how, pause)
        await asyncio.sleep(pause)
        started = time.monotonic()
        client = await self._start()
        client.on_report = self._report
        client.on_adapter = self._adapter
        try:
            if self.on_restart is not None:
                await self.on_restart(client)
        except BaseException:
            await client.stop(0)
            raise
        self._start_seconds = time.monotonic() - started
        logger.info("the engine serves again, after %.1f s", self._start_seconds)
        return client
