"""The loader process as those see it who need one: started, linked to, ended.

One serves all engines of this process, and ends with it. It takes as long to start as an engine
does, for both import the same libraries, so this module imports none: an engine's process starts
its loader before it imports its own.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from dataclasses import dataclass

MAX_MESSAGE_BYTES = 2**22


@dataclass
class LoaderProcess:
    """One process; use `start` and `connect`."""

    popen: subprocess.Popen[bytes]
    control: socket.socket

    @classmethod
    def spawn(cls) -> LoaderProcess:
        """A new one; does not wait for it. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        level = logging.getLevelName(logging.getLogger().getEffectiveLevel())
        with theirs:
            popen = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "malora_server.adapters.loader",
                    str(theirs.fileno()),
                    level.lower(),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
        return cls(popen, ours)

    def connect(self, memory_fd: int) -> socket.socket:
        """A link of one engine, whose host memory the loader maps. OSError where it has ended."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self.control, [b"+"], [theirs.fileno(), memory_fd])
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_MESSAGE_BYTES)
        return ours


_current: LoaderProcess | None = None


def start() -> LoaderProcess:
    """The loader of this process, which is started where there is none. Raises OSError."""
    global _current
    if _current is None or _current.popen.poll() is not None:
        _current = LoaderProcess.spawn()
    return _current


def connect(memory_fd: int) -> tuple[LoaderProcess, socket.socket]:
    """The loader of this process, and a link to it. Raises OSError."""
    process = start()
    try:
        return process, process.connect(memory_fd)
    except OSError:
        process.popen.wait()  # it has ended since
    process = start()
    return process, process.connect(memory_fd)


def stop() -> None:
    """End the loader, if there is one; it has nothing to lose."""
    global _current
    if _current is not None:
        _current.popen.kill()
        _current.popen.wait()
        _current.control.close()
        _current = None
