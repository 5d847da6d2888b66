"""The engine's handle on the loader process, and what the two say to each other.

Reading, checking and packing an adapter is work for a process: a thread would hold Python's lock
while a step waits for it, and a file that is cut short while it is mapped kills whoever reads it.
The loader writes packed adapters straight into the engine's host memory, into the ranges that the
engine names. One process serves all engines of this one (`loader_process`).

They speak msgspec messages over a pair of sockets for each engine. A load goes in two parts: `Open`
is answered with the sizes once the headers are read, and what follows them is read while the engine
finds room; `Pack` names it.
"""

from __future__ import annotations

import os
import socket
import subprocess

import msgspec
import torch

from malora.format import BaseModelSpec
from malora.kernels.packed import PackedAdapter
from malora_server.adapters import loader_process
from malora_server.adapters.loader_process import MAX_MESSAGE_BYTES
from malora_server.adapters.memory import HostMemory
from malora_server.engine.messages import AdapterInfo

_LAST_SECONDS = 1.0
"""From the end of a process's sockets to its own."""


class Configure(msgspec.Struct, tag="configure", frozen=True):
    """The first message: what adapters are checked against, and how they are packed.

    paths: the linears of the base model in the order of the headers. capacity: of the host memory,
    whose file comes along; is_pinned: whether all its pages are there, to stay. num_threads: to
    read an adapter's tensors with.
    """

    spec: BaseModelSpec
    paths: list[str]
    dtype: str
    capacity: int
    is_pinned: bool
    num_threads: int


class Open(msgspec.Struct, tag="open", frozen=True):
    """Read an adapter's headers, then its values, and keep it open."""

    folder: str


class Pack(msgspec.Struct, tag="pack", frozen=True):
    """Pack the adapter that is open into these ranges of the host memory, and close it."""

    basis_start: int
    own_start: int


class Close(msgspec.Struct, tag="close", frozen=True):
    """Nobody wants the adapter that is open any more."""


class Opened(msgspec.Struct, tag="opened", frozen=True):
    """The headers are sound; what the two pieces take."""

    basis_bytes: int
    own_bytes: int


class Packed(msgspec.Struct, tag="packed", frozen=True):
    """The adapter lies in the host memory."""

    packed: PackedAdapter
    info: AdapterInfo


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """The adapter cannot be used. `passing`: another try may go well."""

    code: str
    error: str
    passing: bool = False


Command = Configure | Open | Pack | Close
Answer = Opened | Packed | Refused


class LoaderDiedError(Exception):
    """The loader ended while it was needed; the message says how, for the user."""


class Loader:
    """One engine's link to the loader: one load at a time."""

    def __init__(
        self, memory: HostMemory, spec: BaseModelSpec, paths: list[str], dtype: torch.dtype
    ) -> None:
        """Starts the process where there is none yet, and does not wait for it."""
        self._memory = memory
        # On a GPU's host the other cores idle; on the CPU they compute.
        cores = (os.cpu_count() or 1) // 2 if torch.cuda.is_available() else 1
        self._configure = Configure(
            spec,
            paths,
            str(dtype).removeprefix("torch."),
            len(memory.tensor),
            memory.is_pinned,
            num_threads=max(1, min(8, cores)),
        )
        self._link: socket.socket | None = None
        self._decoder = msgspec.msgpack.Decoder(Answer)
        self._connect()

    def fileno(self) -> int:
        """What to poll for an answer; -1 where there is no link."""
        return -1 if self._link is None else self._link.fileno()

    def send(self, command: Open | Pack | Close) -> None:
        """Tell the loader. Raises LoaderDiedError."""
        try:
            if self._link is not None:
                self._send(command)
                return
        except LoaderDiedError:
            if not isinstance(command, Open):
                raise
        # It has ended since the last load, or during one that has failed by now.
        self._connect()
        self._send(command)

    def receive(self) -> Answer | None:
        """Its answer; None while there is none. Raises LoaderDiedError."""
        if self._link is None:
            return None
        try:
            message = self._link.recv(MAX_MESSAGE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            message = b""
        if not message:
            raise self._died()
        return self._decoder.decode(message)

    def close(self) -> None:
        """Give up the link; the loader forgets this engine."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _connect(self) -> None:
        try:
            self._process, self._link = loader_process.connect(self._memory.fd)
        except OSError as error:
            raise LoaderDiedError(
                f"The process that reads adapters cannot be started: {error.strerror}"
            ) from None
        self._send(self._configure)

    def _send(self, command: Command) -> None:
        assert self._link is not None
        try:
            self._link.sendall(msgspec.msgpack.encode(command))
        except OSError:
            raise self._died() from None

    def _died(self) -> LoaderDiedError:
        self.close()
        try:
            status = self._process.popen.wait(_LAST_SECONDS)
        except subprocess.TimeoutExpired:
            status = 0
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return LoaderDiedError(
            f"The process that reads adapters ended ({how}) while it read this one: its files "
            "may have been cut short meanwhile, or memory ran out; try again."
        )
