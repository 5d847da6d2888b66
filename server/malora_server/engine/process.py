"""The engine process, from its start to its end; what it does between them is `loop`'s."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import msgspec

from malora_server.adapters import loader_process
from malora_server.engine.config import EngineConfig
from malora_server.logs import configure_logging

logger = logging.getLogger(__name__)


def main(config: EngineConfig, folder: Path, log_level: str) -> int:
    """Serve until told to stop, or until the parent is gone; returns the exit status.

    folder: see `loop.run`. Standard input is a pipe from the parent, whose end means that it is
    gone.
    """
    configure_logging(log_level)
    # A terminal or a supervisor may signal every process; the API process drains, then says stop.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Where it crashed, and on SIGUSR1 where it is: to standard error.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    if config.adapters is not None:
        # What both import takes seconds: they do it side by side. Where it cannot be started now,
        # whoever needs it tries again, and says why.
        with contextlib.suppress(OSError):
            loader_process.start()
    try:
        from malora_server.engine.loop import run

        run(config, folder)
    except Exception:
        logger.exception("the engine failed")
        return 1
    finally:
        loader_process.stop()
    return 0


def _end_with_parent(folder: Path) -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    # The parent can't tidy up any more, and what this process started has no other parent. Nor
    # can it be told to stop in mid-step but by a signal.
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    _config, _folder, _level = sys.argv[1:]
    _status = main(msgspec.json.decode(_config, type=EngineConfig), Path(_folder), _level)
    # Taking apart all that was imported takes a second, and some of it complains.
    os._exit(_status)
