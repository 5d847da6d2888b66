"""What is done to a server while it serves: each a coroutine that ends when the harm is done."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

HEALTHY_SECONDS = 90

_IDLE = """
import resource, socket, sys
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
sockets = [socket.create_connection((host, port), 30) for _ in range(count)]
print("open", flush=True)
sys.stdin.read()
"""


class Faults:
    """Knows the server that it harms."""

    def __init__(self, server: Any, num_connections: int, engine_timeout: float) -> None:
        self._server = server
        self._url = server.url
        self._num_connections = num_connections
        self._engine_timeout = engine_timeout
        self.num_engines_lost = 0

    def all(self) -> list[Callable[[], Awaitable[None]]]:
        """Every fault there is."""
        return [
            self.kill_engine,
            self.pause_engine,
            self.hang_engine,
            self.idle_connections,
        ]

    def short(self) -> list[Callable[[], Awaitable[None]]]:
        """Those that are over soon."""
        return [self.kill_engine, self.pause_engine, self.idle_connections]

    async def healthy(self) -> None:
        """Wait until the server has an engine."""
        async with httpx.AsyncClient() as http, asyncio.timeout(HEALTHY_SECONDS):
            while (await http.get(f"{self._url}/health")).status_code != 200:
                await asyncio.sleep(0.1)

    async def kill_engine(self) -> None:
        """As the system does when memory runs out."""
        await self._lose(await self._engine())

    async def hang_engine(self) -> None:
        """A step that never ends: the server has to find out."""
        engine = await self._engine()
        engine.send_signal(signal.SIGSTOP)
        await asyncio.sleep(self._engine_timeout)
        await self._lose(engine)

    async def pause_engine(self) -> None:
        """A step that is slow; nothing may come of it."""
        engine = await self._engine()
        engine.send_signal(signal.SIGSTOP)
        await asyncio.sleep(self._engine_timeout / 3)
        engine.send_signal(signal.SIGCONT)

    async def idle_connections(self) -> None:
        """Many clients that want nothing, who then leave all at once."""
        address = urlsplit(self._url)
        command = [sys.executable, "-c", _IDLE, address.hostname, address.port]
        idlers = await asyncio.create_subprocess_exec(
            *[str(part) for part in [*command, self._num_connections]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert idlers.stdout is not None
        assert await idlers.stdout.readline() == b"open\n"
        await asyncio.sleep(2)
        idlers.kill()
        await idlers.wait()

    async def _engine(self) -> psutil.Process:
        return await asyncio.to_thread(self._server.engine)

    async def _lose(self, engine: psutil.Process) -> None:
        self.num_engines_lost += 1
        with contextlib.suppress(psutil.NoSuchProcess):
            if engine.status() != psutil.STATUS_STOPPED:
                engine.kill()
        async with asyncio.timeout(HEALTHY_SECONDS):
            while engine.is_running() or (await self._engine()).pid == engine.pid:
                await asyncio.sleep(0.05)
        await self.healthy()
