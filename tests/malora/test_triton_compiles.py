"""The GPU's kernels compiled for the GPU, where there is none: what the interpreter lets pass.

The interpreter is lax about types, and blind to how memory is read. An adapter's rows must be read
16 bytes at a time; two at a time, which is what a lost hint of alignment leads to, is several times
slower and breaks nothing else.
"""

import re
import subprocess
import sys

import pytest

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from malora.kernels import triton as kernels

ALIGNED = {"n", "num_tokens", "out_width", "width_0", "width_1", "width_2", "h_width", "c_width"}
POINTERS = {
    "x": "*bf16", "out": "*bf16", "c": "*bf16", "h": "*fp32", "taken": "*fp32",
    "table": "*i64", "ups": "*i64", "numbers": "*i32", "counts": "*i32",
}
forms = {"decode": kernels._DECODE, "prefill": kernels._PREFILL}
FORMS = {
    "project": ("_project", lambda f: dict(
        TOKENS=f.tokens, ROWS=f.read_rows, COLUMNS=f.read_columns, PART=f.part,
        ALONE_TOKENS=f.alone, ALIGNMENT=16)),
    "route": ("_route", lambda f: dict(
        EXPERTS=8, ROWS=64, DIMS=64, PARTS=8, PARTS_POWER=8, COUNT=True)),
    "route_together": ("_route_together", lambda f: dict(
        TOKENS=f.tokens, EXPERTS=16, ROWS=64, DIMS=32, COUNT=True)),
    "expand": ("_expand", lambda f: dict(
        TOKENS=f.tokens, ROWS=f.add_rows, COLUMNS=f.add_columns, DOT_ROWS=f.dot_rows,
        DOT_COLUMNS=f.dot_columns, ALONE_TOKENS=f.alone, ALIGNMENT=16)),
}
name, constants = FORMS[sys.argv[1]]
form = forms[sys.argv[2]]
kernel, values = getattr(kernels, name), constants(form)
warps = {"project": form.read_warps, "expand": form.add_warps}.get(sys.argv[1], 4)
signature = {
    a: "constexpr" if a in values else POINTERS.get(a, "i32") for a in kernel.arg_names
}
hints = {
    (i,): [["tt.divisibility", 16]]
    for i, a in enumerate(kernel.arg_names) if a in POINTERS or a in ALIGNED
}
source = ASTSource(kernel, signature, constexprs=values, attrs=hints)
target = GPUTarget("cuda", 90, 32)
print(triton.compile(source, target=target, options={"num_warps": warps}).asm["ptx"])
"""


@pytest.mark.parametrize(
    ("kernel", "form"),
    [
        ("project", "decode"),
        ("project", "prefill"),
        ("route", "decode"),
        ("route_together", "prefill"),
        ("expand", "decode"),
        ("expand", "prefill"),
    ],
)
def test_kernels_compile_and_read_wide(kernel, form, monkeypatch, tmp_path):
    # In a process of its own: in this one kernels may be set to be interpreted.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, kernel, form], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    narrow = len(re.findall(r"ld\.global\.b16", done.stdout))
    wide = len(re.findall(r"ld\.global\.v4|cp\.async\.cg", done.stdout))
    if not kernel.startswith("route"):  # which reads little, of any size
        assert wide > 0
        assert narrow == 0
