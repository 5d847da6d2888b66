"""The engine process: the core's loop between two ZeroMQ sockets."""

from __future__ import annotations

import os
import signal
import sys
import time

import msgspec
import zmq
from transformers.utils.logging import disable_progress_bar

from malora_server.engine.config import EngineConfig
from malora_server.engine.core import EngineCore
from malora_server.engine.messages import (
    Abort,
    Failed,
    Message,
    Outputs,
    Reply,
    SequenceOutput,
    Stop,
    Submit,
)
from malora_server.logs import configure_logging


def run_engine(config: EngineConfig, inbox: str, outbox: str, log_level: str, parent: int) -> None:
    """The process's main function: serve until told to stop, or until the parent is gone.

    inbox, outbox: ZeroMQ endpoints bound by the API process. parent: that process's id.
    """
    configure_logging(log_level)
    disable_progress_bar()
    # A terminal or a supervisor may signal every process; the API process drains, then says stop.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    context = zmq.Context()
    receiver = context.socket(zmq.PULL)
    sender = context.socket(zmq.PUSH)
    for socket, endpoint in ((receiver, inbox), (sender, outbox)):
        socket.set_hwm(0)
        socket.connect(endpoint)
    link = _Link(receiver, sender)
    try:
        core = EngineCore(config)
    except (OSError, ValueError) as error:
        link.send(Failed(_one_line(error)))
    else:
        link.send(core.ready)
        _serve(core, link, parent)
    finally:
        # Nobody reads the last words when the parent is gone.
        context.destroy(linger=2000 if os.getppid() == parent else 0)


def _one_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


class _Link:
    """The two sockets and their encoding."""

    def __init__(self, receiver: zmq.Socket[bytes], sender: zmq.Socket[bytes]) -> None:
        self._receiver = receiver
        self._sender = sender
        self._decoder = msgspec.msgpack.Decoder(Message)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, reply: Reply) -> None:
        self._sender.send(self._encoder.encode(reply))

    def receive(self, wait: bool) -> list[Message]:
        """Every message that has come; with `wait`, at least one or nothing for a second."""
        messages: list[Message] = []
        if wait and not self._receiver.poll(1000):
            return messages
        while True:
            try:
                messages.append(self._decoder.decode(self._receiver.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages


def _serve(core: EngineCore, link: _Link, parent: int) -> None:
    deadline: float | None = None
    while os.getppid() == parent:
        failures: list[SequenceOutput] = []
        freed = False
        for message in link.receive(wait=not core.has_work and deadline is None):
            match message:
                case Submit():
                    failure = core.add(message)
                    if failure is not None:
                        failures.append(failure)
                case Abort(request_ids):
                    core.abort(request_ids)
                    freed = True
                case Stop(timeout):
                    deadline = time.monotonic() + timeout
        report = core.report()
        if report is not None:
            link.send(report)
        if failures or freed:
            # No step may follow to tell what the engine holds now.
            link.send(Outputs(failures, core.stats()))
        if core.has_work and (deadline is None or time.monotonic() < deadline):
            outputs = core.step()
            if outputs.outputs or not core.has_work:
                link.send(outputs)
        elif deadline is not None:
            link.send(core.abort_all())
            return


if __name__ == "__main__":
    _config, _inbox, _outbox, _level, _parent = sys.argv[1:]
    run_engine(
        msgspec.json.decode(_config, type=EngineConfig), _inbox, _outbox, _level, int(_parent)
    )
