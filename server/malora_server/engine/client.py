"""The API process's handle on the engine process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from malora_server.engine.config import EngineConfig
from malora_server.engine.messages import (
    Abort,
    EngineStats,
    Failed,
    Outputs,
    Ready,
    Reply,
    Report,
    SequenceOutput,
    Stop,
    Submit,
)

Item = SequenceOutput | Exception

_LAST_WORDS_SECONDS = 0.05


class EngineStartError(RuntimeError):
    """The engine could not start; the message says why, in one line."""


class EngineDeadError(RuntimeError):
    """The engine process ended while requests were in flight."""


class EngineClient:
    """Starts the engine process and speaks with it; every method belongs to one event loop."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        sender: zmq.asyncio.Socket,
        receiver: zmq.asyncio.Socket,
        folder: Path,
        ready: Ready,
    ) -> None:
        """Use `start`."""
        self.ready = ready
        self.stats = EngineStats()
        self.healthy = True
        self.on_report: Callable[[Report], None] | None = None
        """Called with every report of the engine."""
        self._process = process
        self._sender = sender
        self._receiver = receiver
        self._folder = folder
        self._queues: dict[str, asyncio.Queue[Item]] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Reply)
        self._reading = asyncio.create_task(self._read())
        self._watching = asyncio.create_task(self._watch())

    @classmethod
    async def start(cls, config: EngineConfig, log_level: str = "info") -> EngineClient:
        """Start the engine process and wait until it has loaded everything.

        Raises EngineStartError where it cannot start.
        """
        folder = Path(tempfile.mkdtemp(prefix="malora-"))
        context = zmq.asyncio.Context.instance()
        sender = context.socket(zmq.PUSH)
        receiver = context.socket(zmq.PULL)
        inbox, outbox = (f"ipc://{folder / name}" for name in ("inbox", "outbox"))
        for socket, endpoint in ((sender, inbox), (receiver, outbox)):
            socket.set_hwm(0)
            socket.bind(endpoint)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "malora_server.engine.process",
                msgspec.json.encode(config).decode(),
                inbox,
                outbox,
                log_level,
                str(os.getpid()),
                # Its own process group: the terminal's Ctrl-C is for the API process to act on.
                start_new_session=True,
            )
            ready = await _ready(process, receiver)
        except BaseException:
            _close(sender, receiver, folder)
            raise
        return cls(process, sender, receiver, folder, ready)

    async def generate(self, submit: Submit) -> AsyncIterator[SequenceOutput]:
        """The sequence's outputs, step by step. Leaving early frees it in the engine.

        Raises EngineDeadError where the engine ends before the sequence does.
        """
        if not self.healthy:
            raise EngineDeadError("the engine has stopped")
        queue: asyncio.Queue[Item] = asyncio.Queue()
        self._queues[submit.request_id] = queue
        finished = False
        try:
            await self._sender.send(self._encoder.encode(submit))
            while not finished:
                item = await queue.get()
                if isinstance(item, Exception):
                    finished = True
                    raise item
                finished = item.finish_reason is not None
                yield item
        finally:
            del self._queues[submit.request_id]
            if not finished and self.healthy:
                # The socket has no high-water mark, so this never waits (and a generator that is
                # being closed must not).
                self._sender.send(self._encoder.encode(Abort([submit.request_id])))

    async def stop(self, timeout: float) -> None:
        """Let requests in flight finish within `timeout` seconds, then end the process."""
        if self.healthy:
            await self._sender.send(self._encoder.encode(Stop(timeout)))
            try:
                await asyncio.wait_for(self._process.wait(), timeout + 5)
            except TimeoutError:
                self._process.kill()
        await self._watching
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading
        _close(self._sender, self._receiver, self._folder)

    async def _read(self) -> None:
        while True:
            reply = self._decoder.decode(await self._receiver.recv())
            if isinstance(reply, Outputs):
                self.stats = reply.stats
                for output in reply.outputs:
                    queue = self._queues.get(output.request_id)
                    if queue is not None:
                        queue.put_nowait(output)
            elif isinstance(reply, Report) and self.on_report is not None:
                self.on_report(reply)

    async def _watch(self) -> None:
        status = await self._process.wait()
        # What it said last may still be on its way.
        await asyncio.sleep(_LAST_WORDS_SECONDS)
        self.healthy = False
        for queue in self._queues.values():
            queue.put_nowait(EngineDeadError(f"the engine ended with status {status}"))


async def _ready(process: asyncio.subprocess.Process, receiver: zmq.asyncio.Socket) -> Ready:
    """What the engine says once it has started; EngineStartError where it ends instead."""
    first = asyncio.ensure_future(receiver.recv())
    ended = asyncio.create_task(process.wait())
    try:
        await asyncio.wait({first, ended}, return_when=asyncio.FIRST_COMPLETED)
        # What it said last may still be on its way.
        await asyncio.wait({first}, timeout=_LAST_WORDS_SECONDS)
        reply = msgspec.msgpack.decode(first.result(), type=Reply) if first.done() else None
        if isinstance(reply, Ready):
            return reply
        status = await process.wait()
    except asyncio.CancelledError:
        process.kill()
        raise
    finally:
        first.cancel()
        ended.cancel()
    raise EngineStartError(
        reply.error
        if isinstance(reply, Failed)
        else f"the engine process ended with status {status}"
    )


def _close(sender: zmq.asyncio.Socket, receiver: zmq.asyncio.Socket, folder: Path) -> None:
    sender.close(linger=0)
    receiver.close(linger=0)
    shutil.rmtree(folder, ignore_errors=True)
