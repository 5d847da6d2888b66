"""Where numba cannot keep what it compiles, the kernels work all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
from malora.kernels import cpu
cpu.compile_kernels()
cpu.compile_kernels()
"""
NOWHERE = """
from numba.core.caching import CacheImpl, FunctionCache
CacheImpl._locator_classes = FunctionCache._impl_class._locator_classes = []
from malora.kernels import cpu
assert not cpu._add_tokens.stats.cache_path
"""


@pytest.mark.parametrize("script", [LIMITED, NOWHERE], ids=["full disk", "no folder"])
def test_kernels_compile(script: str, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-B", "-c", script],
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
        check=True,
        timeout=120,
    )
    assert not list(tmp_path.rglob("*.nbc"))
