"""A server as users start it, watched by a real Prometheus and a small collector of traces."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from malora.base_model import PATH as BASE
from tests.end_to_end.conftest import (  # noqa: F401  the fixtures and the hook of those tests
    Server,
    adapters,
    launch,
    pytest_runtest_makereport,
    serve,
)
from tests.observability.collector import Collector

DOCKER = Path(__file__).parents[2] / "docker"


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """What the server sends its traces to."""
    collector = Collector()
    yield collector
    collector.stop()


@pytest.fixture(scope="session")
def watched(
    launch: Callable[..., Server],  # noqa: F811
    adapters: Path,  # noqa: F811
    collector: Collector,
) -> Iterator[Server]:
    """The server that is watched: the embedded base, and more adapters than memory holds."""
    flags = ("--base", BASE, "--served-model-name", "base", "--adapters", adapters)
    # The largest adapter has five megabytes, all four have seven.
    flags += ("--adapter-device-memory", "5500KiB", "--adapter-host-memory", "6MiB")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # milliseconds between batches of spans
        server = launch(*flags, "--kv-cache-memory", "64MiB", "--otlp-endpoint", collector.url)
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


@pytest.fixture(scope="session")
def url(watched: Server) -> str:
    """Where it listens."""
    return watched.url


@pytest.fixture(scope="session")
def log_line(watched: Server) -> Callable[[str], dict[str, Any]]:
    """What it has logged of a request: `log_line(request_id)`. It may have replied before."""

    def find(request_id: str) -> dict[str, Any]:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            lines = [line for line in watched.log.read_text().splitlines() if request_id in line]
            if lines:
                (line,) = lines
                found: dict[str, Any] = json.loads(line)
                return found
            time.sleep(0.02)
        raise AssertionError(f"no line of request {request_id}")

    return find


@pytest.fixture(scope="session")
def promtool() -> Callable[..., str]:
    """Prometheus' own checker: `promtool("check", "rules", file)`; its output. Fails as it does."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed: it comes with Debian's package prometheus")

    def run(*args: object, stdin: bytes = b"") -> str:
        command = ["promtool", *map(str, args)]
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=60, check=False)
        output = (done.stdout + done.stderr).decode()
        assert done.returncode == 0, output
        return output

    return run
