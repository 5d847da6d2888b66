"""Attention of decode steps compiled for the GPU, where there is none: what the interpreter lets
pass, as `tests/malora/test_triton_compiles.py` does for the adapters' kernels.

Keys and values must be read 16 bytes at a time, while others are on their way.
"""

import re
import subprocess
import sys

import pytest

COMPILE = """
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from malora_server.model import decode_attention as decode

dtype, head_dim = sys.argv[1], int(sys.argv[2])
window, softcap = (4096, 50.0) if head_dim == 256 else (None, None)
halves = ("keys", "values", "query", "new_keys", "new_values", "out")
pointers = {
    **dict.fromkeys(halves, "*" + {"bfloat16": "bf16", "float16": "fp16"}[dtype]),
    **dict.fromkeys(("items", "pages", "arrived"), "*i32"),
    **dict.fromkeys(("partial", "largests", "totals"), "*fp32"),
}
values = decode.constants(28, 4, head_dim, 16, getattr(torch, dtype), window, softcap)
kernel = decode.attend
signature = {
    a: "constexpr" if a in values else "fp32" if a == "scale" else pointers.get(a, "i32")
    for a in kernel.arg_names
}
hints = {
    (i,): [["tt.divisibility", 16]]
    for i, a in enumerate(kernel.arg_names) if a in pointers or a.endswith("stride")
}
source = ASTSource(kernel, signature, constexprs=values, attrs=hints)
target = GPUTarget("cuda", 90, 32)
compiled = triton.compile(source, target=target, options={"num_warps": decode._WARPS})
print(compiled.asm["ptx"])
"""


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [("bfloat16", 64), ("bfloat16", 128), ("float16", 128), ("bfloat16", 256)],
)
def test_it_compiles_and_reads_wide_and_ahead(dtype, head_dim, monkeypatch, tmp_path):
    # In a process of its own: in this one kernels may be set to be interpreted.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, dtype, str(head_dim)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"cp\.async\.cg", done.stdout)
    assert not re.search(r"cp\.async\.ca", done.stdout)
    # The new key and value alone, of which a thread has one number each.
    assert len(re.findall(r"ld\.global\.b16", done.stdout)) <= 2
