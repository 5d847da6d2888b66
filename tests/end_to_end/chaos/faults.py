"""What is done to a server while it serves: each a coroutine that ends when the harm is done."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from tests.end_to_end.chaos.load import Load

CHANGES = {
    404: {"model_not_found", "adapter_not_found"},
    409: {"adapter_busy"},
    503: {"engine_dead", "adapter_changed", "adapter_load_failed"},
}
"""What calls that change an adapter may answer in a storm of such calls."""
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
    """Knows the server that it harms, and its folder of adapters.

    In that, `swap` has the content of one of `contents` at any time, or is broken, or gone.
    """

    def __init__(
        self,
        server: Any,
        load: Load,
        root: Path,
        contents: list[Path],
        *,
        seed: int,
        num_connections: int,
        engine_timeout: float,
        has_small_disk: bool,
    ) -> None:
        """has_small_disk: whether the folder lies on a disk of its own, which may be filled."""
        self._server = server
        self._url = server.url
        self._load = load
        self._root = root
        self._contents = contents
        self._rng = random.Random(seed)
        self._num_connections = num_connections
        self._engine_timeout = engine_timeout
        self._has_small_disk = has_small_disk
        self.num_engines_lost = 0

    def all(self) -> list[Callable[[], Awaitable[None]]]:
        """Every fault there is."""
        return [
            self.kill_engine,
            self.pause_engine,
            self.hang_engine,
            self.kill_loader,
            self.idle_connections,
            self.replace_adapter,
            self.remove_adapter,
            self.truncate_adapter,
            self.corrupt_header,
            self.storm,
            *([self.fill_disk] if self._has_small_disk else []),
        ]

    def short(self) -> list[Callable[[], Awaitable[None]]]:
        """Those that are over soon."""
        long = (
            self.hang_engine,
            self.pause_engine,
            self.replace_adapter,
            self.remove_adapter,
            self.corrupt_header,
        )
        return [fault for fault in self.all() if fault not in long]

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

    async def kill_loader(self) -> None:
        """While adapters are being read, as they do not all fit."""
        engine = await self._engine()
        for _ in range(3):
            with contextlib.suppress(psutil.Error):
                for child in engine.children():
                    if "malora_server.adapters.loader" in child.cmdline():
                        child.kill()
            await asyncio.sleep(0.7)

    async def replace_adapter(self) -> None:
        """Put another content in place of one that is in use, several times."""
        for _ in range(4):
            self._put(self._rng.choice(self._contents))
            await asyncio.sleep(self._rng.uniform(0.2, 2.5))

    async def remove_adapter(self) -> None:
        """Then put it back."""
        shutil.rmtree(self._root / "swap")
        await asyncio.sleep(2.5)
        self._put(self._rng.choice(self._contents))

    async def truncate_adapter(self) -> None:
        """Cut the weights off under whoever reads them."""
        weights = self._root / "swap" / "adapter_model.safetensors"
        size = weights.stat().st_size
        for part in (0.9, 0.5, 0.001, 0):
            with weights.open("r+b") as file:
                file.truncate(int(size * part))
            await asyncio.sleep(0.7)
        self._put(self._rng.choice(self._contents))

    async def corrupt_header(self) -> None:
        """Write over the beginning of the weights."""
        with (self._root / "swap" / "adapter_model.safetensors").open("r+b") as file:
            file.write(self._rng.randbytes(300))
        await asyncio.sleep(2.5)
        self._put(self._rng.choice(self._contents))

    async def storm(self) -> None:
        """Load, pin, unpin and unload a few names over and over, and ask each in between."""
        async with httpx.AsyncClient(base_url=self._url, timeout=60) as http:
            await asyncio.gather(*(self._change(http, number) for number in range(6)))
            for name in ("storm-0", "storm-1"):
                await self._allowed(await http.delete(f"/v1/adapters/{name}"))

    async def _change(self, http: httpx.AsyncClient, number: int) -> None:
        rng = random.Random(self._rng.random())
        path = f"/v1/adapters/storm-{number % 2}"
        for _ in range(8):
            source = rng.choice(self._contents).name
            match rng.randrange(5):
                case 0 | 1:
                    reply = await http.put(path, json={"source": source})
                case 2:
                    reply = await http.post(f"{path}/pin")
                case 3:
                    reply = await http.post(f"{path}/unpin")
                case _:
                    reply = await http.delete(path)
            await self._allowed(reply)
            await self._load.ask(http, f"storm-{number % 2}", rng)

    async def _allowed(self, reply: httpx.Response) -> None:
        if reply.status_code != 200:
            code = reply.json()["error"]["code"]
            assert code in CHANGES.get(reply.status_code, ()), f"{reply.status_code}: {reply.text}"

    async def fill_disk(self) -> None:
        """Changes cannot be recorded then, and are not made; everything else goes on."""
        filler = self._root / ".filler"
        with filler.open("wb", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
        async with httpx.AsyncClient(base_url=self._url, timeout=60) as http:
            reply = await http.put("/v1/adapters/full", json={"source": self._contents[0].name})
            if reply.status_code != 503:
                assert (reply.status_code, reply.json()["error"]["code"]) == (
                    507,
                    "manifest_unwritable",
                ), reply.text
            filler.unlink()
            assert (await http.get("/v1/adapters/full")).status_code == 404

    def _put(self, content: Path) -> None:
        """Replace the adapter's folder at once, or as nearly so as a file system can."""
        incoming, old = self._root / ".incoming", self._root / ".old"
        shutil.copytree(content, incoming)
        swap = self._root / "swap"
        if swap.exists():
            swap.rename(old)
        incoming.rename(swap)
        shutil.rmtree(old, ignore_errors=True)

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
