"""The API process's handle on one engine process, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import shutil
import signal
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
    AdapterStatus,
    EngineStats,
    Failed,
    LoadAdapter,
    Message,
    Outputs,
    PinAdapter,
    Ready,
    Reply,
    Report,
    RetireAdapter,
    SequenceOutput,
    Stop,
    Submit,
)

logger = logging.getLogger(__name__)

Item = SequenceOutput | Exception

_LAST_WORDS_SECONDS = 0.05
_STOP_GRACE_SECONDS = 2
"""What an engine may take beyond the time to drain, for its last step and its end."""
_GONE_SECONDS = 10
_PR_SET_CHILD_SUBREAPER = 36
_WATCHES = 10
"""How often an engine is looked at within the time it may be silent."""


class EngineStartError(RuntimeError):
    """The engine could not start; the message says why, in one line."""


class EngineDeadError(RuntimeError):
    """There is no engine, or it ended while requests were in flight."""


class EngineClient:
    """Starts an engine process and speaks with it; every method belongs to one event loop."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        sender: zmq.asyncio.Socket,
        receiver: zmq.asyncio.Socket,
        ready: Ready,
        timeout: float | None,
    ) -> None:
        """Use `start`."""
        self.ready = ready
        self.stats = EngineStats()
        self.healthy = True
        self.on_report: Callable[[Report], None] | None = None
        """Called with every report of the engine."""
        self.on_adapter: Callable[[AdapterStatus], None] | None = None
        """Called with whatever happens to an adapter."""
        self._process = process
        self._sender = sender
        self._receiver = receiver
        self._stopping = False
        self._hung: str | None = None
        self._heard = False
        self._queues: dict[str, asyncio.Queue[Item]] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Reply)
        self._reading = asyncio.create_task(self._read())
        self._watching = asyncio.create_task(self._watch())
        self._timing = asyncio.create_task(self._watch_for_silence(timeout)) if timeout else None

    @classmethod
    async def start(
        cls, config: EngineConfig, log_level: str = "info", timeout: float | None = None
    ) -> EngineClient:
        """Start the engine process and wait until it has loaded everything.

        timeout: seconds that it may be silent, from then on, while requests are in flight; after
        these it is killed. None: as long as it likes.

        Raises EngineStartError where it cannot start.
        """
        inherit_orphans()
        folder = Path(tempfile.mkdtemp(prefix="malora-"))
        context = zmq.asyncio.Context.instance()
        sender = context.socket(zmq.PUSH)
        receiver = context.socket(zmq.PULL)
        process: asyncio.subprocess.Process | None = None
        try:
            for socket, name in ((sender, "inbox"), (receiver, "outbox")):
                socket.set_hwm(0)
                socket.bind(f"ipc://{folder / name}")
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "malora_server.engine.process",
                msgspec.json.encode(config).decode(),
                str(folder),
                log_level,
                # Never written to: its end tells the engine that this process is gone.
                stdin=asyncio.subprocess.PIPE,
                # Its own process group: the terminal's Ctrl-C is for the API process to act on,
                # and all that it starts can be ended with it.
                start_new_session=True,
            )
            ready = await _ready(process, receiver)
        except BaseException:
            if process is not None:
                await _end_group(process)
            sender.close(linger=0)
            receiver.close(linger=0)
            raise
        finally:
            # Both ends are connected by now, or nobody is there to connect.
            shutil.rmtree(folder, ignore_errors=True)
        return cls(process, sender, receiver, ready, timeout)

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
            self._send(submit)
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
                self._send(Abort([submit.request_id]))

    def tell(self, message: LoadAdapter | PinAdapter | RetireAdapter) -> None:
        """Ask something of an adapter; `on_adapter` tells what became of it."""
        if self.healthy:
            self._send(message)

    async def stop(self, timeout: float) -> None:
        """Let requests in flight finish within `timeout` seconds, then end the process.

        What does not finish is aborted; an engine that does not even do that is killed.
        """
        self._stopping = True
        if self.healthy:
            self._send(Stop(timeout))
            limit = timeout + _STOP_GRACE_SECONDS
            _, running = await asyncio.wait({self._watching}, timeout=limit)
            if running:
                self._kill()
        await self.ended()

    def abort(self) -> None:
        """Abort what is in flight and end the engine, without waiting for either."""
        self._stopping = True
        if self.healthy:
            self._kill()

    async def ended(self) -> str:
        """Wait until the engine and all its children are gone; how it ended, in words."""
        return await asyncio.shield(self._watching)

    def _send(self, message: Message) -> None:
        # The socket has no high-water mark, so there is nothing to wait for, unless the engine is
        # gone: whoever waited for that would be cancelled when the socket is closed.
        self._sender.send(self._encoder.encode(message))

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _read(self) -> None:
        while True:
            reply = self._decoder.decode(await self._receiver.recv())
            self._heard = True
            if isinstance(reply, Outputs):
                self.stats = reply.stats
                if self.on_adapter is not None:
                    for status in reply.adapters:
                        self.on_adapter(status)
                for output in reply.outputs:
                    queue = self._queues.get(output.request_id)
                    if queue is not None:
                        queue.put_nowait(output)
            elif isinstance(reply, Report) and self.on_report is not None:
                self.on_report(reply)

    async def _watch(self) -> str:
        status = await self._process.wait()
        # What it said last may still be on its way.
        await asyncio.sleep(_LAST_WORDS_SECONDS)
        self.healthy = False
        self.stats = EngineStats()
        how = self._hung or _how_it_ended(status)
        for request_id, queue in self._queues.items():
            queue.put_nowait(
                SequenceOutput(request_id, [], finish_reason="abort")
                if self._stopping
                else EngineDeadError(f"the engine {how}")
            )
        if self._timing is not None:
            self._timing.cancel()
        self._reading.cancel()
        await asyncio.wait({self._reading})
        self._sender.close(linger=0)
        self._receiver.close(linger=0)
        await _end_group(self._process)
        return how

    async def _watch_for_silence(self, timeout: float) -> None:
        # Counted in looks at it, not by the clock: where this process too was held up, it is given
        # the time to read what has come meanwhile.
        silent = 0
        while silent < _WATCHES:
            self._heard = False
            await asyncio.sleep(timeout / _WATCHES)
            silent = silent + 1 if self._queues and not self._heard else 0
        self._hung = f"said nothing for {timeout:g} s while {len(self._queues)} sequences waited"
        logger.error("the engine %s; it is killed", self._hung)
        # It writes where it hangs to standard error, unless it is stopped altogether.
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)
        await asyncio.sleep(_LAST_WORDS_SECONDS)
        self._kill()


def inherit_orphans() -> None:
    """Be the parent of what an engine that is lost leaves behind, which can be waited for then.

    The system's first process would be, and a container's may wait late or never.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _how_it_ended(status: int) -> str:
    if status == -signal.SIGKILL:
        return "was killed by SIGKILL (as the system does when memory runs out)"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


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
    finally:
        first.cancel()
        ended.cancel()
    raise EngineStartError(
        reply.error if isinstance(reply, Failed) else f"the engine {_how_it_ended(status)}"
    )


async def _end_group(process: asyncio.subprocess.Process) -> None:
    """Kill what is left of an engine and its children, and wait until it is gone."""
    deadline = asyncio.get_running_loop().time() + _GONE_SECONDS
    group = process.pid
    while asyncio.get_running_loop().time() < deadline:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            break
        if process.returncode is not None:
            # Its children are ours now: see `inherit_orphans`.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-group, os.WNOHANG)
        await asyncio.sleep(0.01)
    await process.wait()
