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
from malora.kernels import beside, large_batch as large, product, small_batch

ALIGNED = {
    "n", "m", "out_width", "width", "width_0", "width_1", "width_2", "h_width", "c_width",
    "shared_part",
}
POINTERS = {
    "x": "*bf16", "out": "*bf16", "activated": "*bf16", "delta": "*bf16", "c": "*bf16",
    "h": "*fp32", "taken": "*fp32", "weight": "*bf16", "bias": "*bf16", "partial": "*fp32",
    "arrived": "*i32", "table": "*i64", "numbers": "*i32", "counters": "*i32",
}
CROWDED = product.Division(128, 64, 8, 64, 1)
REGISTERS = {
    "beside": small_batch.REGISTERS, "narrow": small_batch.REGISTERS, "crowded": CROWDED.registers
}
KERNELS = {
    "beside": (beside.add_beside, small_batch.constants(14336, 8, True, 16, True), 4),
    "narrow": (beside.add_beside, small_batch.constants(256, 8, True, 16, True), 4),
    "product": (product._multiply, product.constants(
        product.Division(64, 128, 4, 64, 2), 64, False, False, 0, 0, True), 4),
    "reading": (product._multiply, product.constants(
        product.Division(128, 64, 4, 64, 1), 64, True, False, 1, 8, True), 4),
    "crowded": (product._multiply, product.constants(
        CROWDED, 128, True, False, 1, 8, True), CROWDED.warps),
    "project": (large.project, dict(
        SITES=3, TOKENS=large._TOKENS, ROWS=large._READ_ROWS,
        COLUMNS=large._READ_BYTES // 2, ALIGNMENT=16), large._WARPS),
    "route": (large.route, dict(
        TOKENS=large._ROUTE_TOKENS, EXPERTS=16, ROWS=large._ROUTE_ROWS, DIMS=32), 4),
    "expand": (large.expand, dict(
        TOKENS=large._TOKENS, ROWS=large._ADD_ROWS, COLUMNS=large._ADD_BYTES // 2,
        SPAN=large._SPAN, STAGES=large._ADD_STAGES, MORE_ROWS=False, ALIGNMENT=16), large._WARPS),
    "activate": (large.activate, dict(
        TOKENS=large._TOKENS, ROWS=large._ADD_ROWS, COLUMNS=large._ADD_BYTES // 2,
        SPAN=large._SPAN, STAGES=large._ADD_STAGES, MORE_ROWS=False, ALIGNMENT=16), large._WARPS),
}
kernel, values, warps = KERNELS[sys.argv[1]]
signature = {
    a: "constexpr" if a in values else POINTERS.get(a, "i32") for a in kernel.arg_names
}
hints = {
    (i,): [["tt.divisibility", 16]]
    for i, a in enumerate(kernel.arg_names) if a in POINTERS or a in ALIGNED
}
source = ASTSource(kernel, signature, constexprs=values, attrs=hints)
target = GPUTarget("cuda", 90, 32)
options = {"num_warps": warps, "num_stages": 1, "maxnreg": REGISTERS.get(sys.argv[1])}
compiled = triton.compile(source, target=target, options=options)
print(compiled.asm[sys.argv[2]])
"""


@pytest.fixture
def compile_kernel(monkeypatch, tmp_path):
    """`compile_kernel(name, form)`: a kernel's "ptx" or "sass"."""
    # In a process of its own: in this one kernels may be set to be interpreted.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compiled(name, form):
        command = [sys.executable, "-c", COMPILE, name, form]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return compiled


@pytest.mark.parametrize(
    "kernel",
    ["beside", "product", "reading", "crowded", "project", "route", "expand", "activate"],
)
def test_kernels_compile_and_read_wide(kernel, compile_kernel):
    ptx = compile_kernel(kernel, "ptx")
    narrow = len(re.findall(r"ld\.global[\w.:]*\.b16", ptx))
    wide = len(re.findall(r"ld\.global[\w.:]*\.v4|cp\.async\.cg", ptx))
    if kernel != "route":  # which reads little, of any size
        assert wide > 0
    if kernel == "beside":  # which routes too
        assert narrow < wide
        assert "cp.async.cg" in ptx  # up-projections, ahead of their use
    elif kernel != "route":
        assert narrow == 0


def test_no_product_is_fused_with_a_sum_over_threads(compile_kernel):
    """Or threads have sums that differ, and an expert's logit is greater than itself."""
    sass = compile_kernel("narrow", "sass")
    widths = {".64": 2, ".128": 4, ".WIDE": 2, "CS2R": 2}
    received: set[int] = set()  # registers, of another thread's
    shuffles = 0
    for operation, rest in re.findall(r"\b([A-Z][A-Z0-9]+(?:\.\w+)*) ([^;/]*)", sass):
        registers = [int(number) for number in re.findall(r"\bR(\d+)", rest)]
        if not registers:
            continue
        if operation.startswith("SHFL.BFLY"):  # of a sum; others hand on what one thread has
            shuffles += 1
            received.add(registers[0])
            continue
        if operation == "FFMA":
            assert received.isdisjoint(registers[1:]), rest
        width = max((n for text, n in widths.items() if text in operation), default=1)
        received.difference_update(range(registers[0], registers[0] + width))
    assert shuffles > 100
