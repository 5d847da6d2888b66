"""The loader process: reads, checks and packs adapters for the engine (see `loading`)."""

from __future__ import annotations

import gc
import logging
import mmap
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import msgspec
import torch

from malora.files import Map, threaded_map
from malora.format import Adapter, OpenAdapter, open_adapter
from malora.kernels.packed import basis_key, describe, pack
from malora.limits import CONFIG_NAME, WEIGHTS_NAME, AdapterFormatError
from malora_server.adapters.loader_process import MAX_MESSAGE_BYTES
from malora_server.adapters.loading import (
    Answer,
    Close,
    Command,
    Configure,
    Open,
    Opened,
    Pack,
    Packed,
    Refused,
)
from malora_server.engine.messages import AdapterInfo
from malora_server.logs import configure_logging

logger = logging.getLogger(__name__)

_NICENESS = 15
"""Steps come first; but where they leave no core idle, it still gets a thirtieth of one."""
_MAX_CHECK_SECONDS = 10.0
"""Of the processor's time, for an adapter's headers: others wait for it."""
_KEPT_BYTES = 512 * 2**20
"""Of the memory that an adapter was read to: for the next one, which then takes no new pages."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Load:
    """An adapter that is being read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = self._signatures()
        self._stack = ExitStack()
        self.adapter: OpenAdapter | None = None
        self.values: Adapter | None = None
        self.answer: Packed | None = None
        """What to say once the values are packed."""
        self.refusal: Answer | None = None
        """Why there are no values."""

    def open(self, configuration: Configure, last: OpenAdapter | None = None) -> Opened:
        """Read the headers. last: see `open_adapter`."""
        opened = open_adapter(self._folder, configuration.spec, last=last)
        with _time_limit(_MAX_CHECK_SECONDS):
            self.adapter = adapter = self._stack.enter_context(opened)
        dtype = _DTYPES[configuration.dtype]
        self._packed = describe("", "", adapter.linears, len(configuration.paths), dtype)
        return Opened(self._packed.basis_bytes, self._packed.own_bytes)

    def read(self, map: Map) -> None:
        """Read the values, in advance: while the engine finds room for them."""

        def work() -> None:
            assert self.adapter is not None
            self.values = values = self.adapter.read(map)
            key = basis_key(values.linears, values.basis_keys)
            packed = replace(self._packed, digest=values.digest, basis_key=key)
            self.answer = Packed(packed, _describe(values))

        self.refusal = self.attempt(work)

    def attempt(self, work: Callable[[], Answer | None]) -> Answer | None:
        """What `work` answers, or why it fails, or that the files changed meanwhile."""
        try:
            answer = work()
        except AdapterFormatError as error:
            answer = Refused(error.code, str(error))
        except (OSError, MemoryError) as error:
            answer = Refused("adapter_load_failed", f"It cannot be read: {error}.", passing=True)
        except Exception:
            logger.exception("an adapter could not be loaded")
            error_text = "The server failed to load it; its log says why."
            answer = Refused("adapter_load_failed", error_text, passing=True)
        if self._signatures() != self._files:
            answer = Refused(
                "adapter_changed", "Its files were changed while they were read.", passing=True
            )
        return answer

    def close(self) -> None:
        self._stack.close()

    def _signatures(self) -> list[tuple[int, int, int] | None]:
        signatures: list[tuple[int, int, int] | None] = []
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            try:
                found = (self._folder / name).stat()
            except OSError:
                signatures.append(None)
            else:
                signatures.append((found.st_mtime_ns, found.st_size, found.st_ino))
        return signatures


class _Session:
    """One engine's adapters."""

    def __init__(self, link: socket.socket, memory_fd: int) -> None:
        self._link = link
        self._memory_fd = memory_fd
        self._decoder = msgspec.msgpack.Decoder(Command)
        self._load: _Load | None = None
        self._last: OpenAdapter | None = None

    def serve(self) -> bool:
        """Take one message; False where the engine is gone."""
        try:
            message = self._link.recv(MAX_MESSAGE_BYTES)
            if not message:
                return False
            answer = self._handle(self._decoder.decode(message))
            if answer is not None:
                self._link.sendall(msgspec.msgpack.encode(answer))
            if isinstance(answer, Opened) and self._load is not None:
                self._load.read(self._map)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Forget the engine."""
        self._close_load()
        self._link.close()
        if self._memory_fd >= 0:
            os.close(self._memory_fd)

    def _handle(self, command: Command) -> Answer | None:
        match command:
            case Configure():
                self._configure(command)
            case Close():
                self._close_load()
            case Open(folder):
                self._close_load()
                self._load = load = _Load(Path(folder))
                return load.attempt(lambda: load.open(self._configuration, self._last))
            case Pack() if self._load is not None:
                load = self._load
                # Every command has one answer, so what went wrong in advance is told now.
                answer = load.refusal or load.attempt(lambda: self._pack(load, command))
                self._close_load()
                return answer
        return None

    def _configure(self, configuration: Configure) -> None:
        self._configuration = configuration
        self._dtype = _DTYPES[configuration.dtype]
        size = max(configuration.capacity, mmap.PAGESIZE)
        # Pages that are there anyway are mapped all at once: one by one, as adapters come to lie in
        # them, costs as much as packing does.
        flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if configuration.is_pinned else 0)
        memory = mmap.mmap(self._memory_fd, size, flags=flags)
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        os.close(self._memory_fd)
        self._memory_fd = -1
        self._map = threaded_map(configuration.num_threads)

    def _pack(self, load: _Load, command: Pack) -> Packed:
        assert load.values is not None
        assert load.answer is not None
        packed = load.answer.packed
        basis = self._memory[command.basis_start :][: packed.basis_bytes]
        own = self._memory[command.own_start :][: packed.own_bytes]
        paths, linears = self._configuration.paths, load.values.linears
        pack(packed, linears, paths, basis, own, self._dtype, self._map)
        return load.answer

    def _close_load(self) -> None:
        if self._load is not None:
            self._load.close()
            self._last = self._load.adapter or self._last
            self._load = None
        if self._last is not None and len(self._last.weights.memory) > _KEPT_BYTES:
            self._last = None


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """AdapterFormatError where the block computes for longer.

    A configuration's expressions are regular ones, of which some match in exponential time; Python
    looks for signals while they do.
    """

    def give_up(_number: int, _frame: FrameType | None) -> None:
        raise AdapterFormatError(
            "adapter_too_complex",
            f"It takes over {seconds:g} s to check: are the expressions in {CONFIG_NAME} simple?",
        )

    before = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _describe(adapter: Adapter) -> AdapterInfo:
    config = adapter.config
    linears = adapter.linears.values()
    return AdapterInfo(
        peft_type=str(getattr(config.peft_type, "value", config.peft_type)),
        num_experts=max(linear.num_experts for linear in linears),
        top_k=max(linear.top_k for linear in linears),
        r=max(linear.r for linear in linears),
        basis_dim=max(linear.basis_dim for linear in linears),
        target_modules=sorted({path.rsplit(".", 1)[-1] for path in adapter.linears}),
        num_parameters=adapter.num_parameters,
        num_bytes=adapter.num_bytes,
    )


def main(control_fd: int, log_level: str) -> None:
    """Serve until the process that started this one is gone."""
    configure_logging(log_level)
    # What was imported stays; to look through it for garbage would hold up a load.
    gc.freeze()
    # A terminal or a supervisor may signal every process; the engine still needs this one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICENESS)
    torch.set_num_threads(1)
    with socket.socket(fileno=control_fd) as control, selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                session: _Session | None = key.data
                if session is not None:
                    if not session.serve():
                        selector.unregister(key.fileobj)
                        session.close()
                    continue
                data, fds, _, _ = socket.recv_fds(control, 1, 2)
                if not data:
                    return
                link = socket.socket(fileno=fds[0])
                link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_MESSAGE_BYTES)
                selector.register(link, selectors.EVENT_READ, _Session(link, fds[1]))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
