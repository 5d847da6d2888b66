"""A server as users start it, watched by a real Prometheus and a small collector of traces."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from malora.base_model import PATH as BASE
from tests.end_to_end.conftest import (  # noqa: F401  the fixtures and the hook of those tests
    adapters,
    launch,
    pytest_runtest_makereport,
    serve,
)

DOCKER = Path(__file__).parents[2] / "docker"


@pytest.fixture(scope="session")
def url(
    serve: Callable[..., AbstractContextManager[str]],  # noqa: F811
    adapters: Path,  # noqa: F811
) -> Iterator[str]:
    """The server that is watched: the embedded base and a few adapters."""
    flags = ("--base", BASE, "--served-model-name", "base", "--adapters", adapters)
    with serve(*flags, "--kv-cache-memory", "64MiB") as url:
        yield url


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
