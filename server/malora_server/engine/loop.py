"""The engine process's work: the core's loop between two ZeroMQ sockets."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import zmq
from torch import OutOfMemoryError
from transformers.utils.logging import disable_progress_bar

from malora_server.engine.config import EngineConfig
from malora_server.engine.core import EngineCore
from malora_server.engine.messages import (
    Abort,
    Failed,
    LoadAdapter,
    Message,
    PinAdapter,
    Reply,
    RetireAdapter,
    SequenceOutput,
    Stop,
    Submit,
)

_HEARTBEAT_SECONDS = 0.5
"""An engine is never silent for twice that, but for the time that one step takes."""


def run(config: EngineConfig, folder: Path) -> None:
    """Load everything, then serve until told to stop.

    folder: the API process's, where it has bound two sockets, `inbox` and `outbox`.
    """
    disable_progress_bar()
    context = zmq.Context()
    receiver = context.socket(zmq.PULL)
    sender = context.socket(zmq.PUSH)
    for socket, name in ((receiver, "inbox"), (sender, "outbox")):
        socket.set_hwm(0)
        socket.connect(f"ipc://{folder / name}")
    link = _Link(receiver, sender)
    try:
        core = EngineCore(config)
    except (OSError, ValueError, OutOfMemoryError) as error:
        link.send(Failed(_one_line(error)))
    else:
        link.send(core.ready)
        _serve(core, link)
    finally:
        context.destroy(linger=2000)


def _one_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


class _Link:
    """The two sockets and their encoding."""

    def __init__(self, receiver: zmq.Socket[bytes], sender: zmq.Socket[bytes]) -> None:
        self._receiver = receiver
        self._sender = sender
        self._decoder = msgspec.msgpack.Decoder(Message)
        self._encoder = msgspec.msgpack.Encoder()
        self._last_sent = time.monotonic()

    @property
    def is_silent(self) -> bool:
        """Whether it is time for a word, so that the API process knows that this one lives."""
        return time.monotonic() - self._last_sent >= _HEARTBEAT_SECONDS

    def send(self, reply: Reply) -> None:
        self._last_sent = time.monotonic()
        self._sender.send(self._encoder.encode(reply))

    def receive(self, seconds: float, also: int) -> list[Message]:
        """Every message that has come; where none has, waits so long for one.

        also: a file descriptor that ends the wait when it is readable; -1 for none.
        """
        if seconds > 0:
            poller = zmq.Poller()
            poller.register(self._receiver, zmq.POLLIN)
            if also >= 0:
                poller.register(also, zmq.POLLIN)
            poller.poll(int(seconds * 1000))
        messages: list[Message] = []
        while True:
            try:
                messages.append(self._decoder.decode(self._receiver.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages


def _serve(core: EngineCore, link: _Link) -> None:
    deadline: float | None = None
    while True:
        failures: list[SequenceOutput] = []
        freed = False
        for message in link.receive(_patience(core, deadline), core.loader_fd):
            match message:
                case Submit():
                    failure = core.add(message)
                    if failure is not None:
                        failures.append(failure)
                case Abort(request_ids):
                    core.abort(request_ids)
                    freed = True
                case LoadAdapter() | PinAdapter() | RetireAdapter():
                    core.manage(message)
                case Stop(timeout):
                    deadline = time.monotonic() + timeout
        report = core.report()
        if report is not None:
            link.send(report)
        if failures or freed or core.has_changes or link.is_silent:
            # No step may follow to tell what the engine holds now.
            link.send(core.outputs(failures))
        if core.has_work and (deadline is None or time.monotonic() < deadline):
            outputs = core.step()
            if outputs.outputs or outputs.adapters or not core.has_work:
                link.send(outputs)
        elif deadline is not None:
            link.send(core.abort_all())
            return


def _patience(core: EngineCore, deadline: float | None) -> float:
    """Seconds for which there may be nothing to do but wait for messages and for the loader."""
    if core.is_runnable or (deadline is not None and not core.has_work):
        return 0.0
    if deadline is None:
        return _HEARTBEAT_SECONDS
    return min(_HEARTBEAT_SECONDS, max(0.0, deadline - time.monotonic()))
