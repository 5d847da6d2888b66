"""The base product of few tokens on a GPU, small enough to share the device.

A decode step's product waits for the bytes of its weights, whoever makes it; but cuBLAS' kernels
for it take every multiprocessor's registers and shared memory whole, and what adapters do beside
them waits for their end. This one leaves half of the former, in as much time for up to 64 tokens,
in a tenth more for twice as many.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from malora.kernels.headers import num_processors

MAX_TOKENS = 128
"""A tile has all tokens; more of them would not fit in its registers."""
_MAX_TILES = 4096


class _Tile(NamedTuple):
    columns: int
    """Outputs of a tile."""
    depth: int
    """Inputs of its step."""
    warps: int

    @classmethod
    def of(cls, num_tokens: int) -> _Tile:
        # Every tile reads the input: of many tokens that would be more than the weights.
        return cls(64, 128, 4) if num_tokens <= 64 else cls(128, 64, 8)


@triton.jit(do_not_specialize=("num_tokens",))
def _multiply(
    x,
    weight,
    bias,
    out,
    partial,
    arrived,
    n,
    m,
    num_tokens,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BEFORE_ITS_INPUT: tl.constexpr,
):
    """A tile of x weightᵀ + bias: all tokens by some outputs, over a part of the inputs.

    BEFORE_ITS_INPUT: launched when the kernel that makes x has not ended yet. What is launched
    likewise behind this one begins when all its programs have, and x is there.
    """
    tile = tl.program_id(0) // SPLITS
    part = tl.program_id(0) % SPLITS
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    tokens = tl.arange(0, TOKENS)
    live = tokens < num_tokens
    depth = tl.cdiv(n // DEPTH, SPLITS) * DEPTH
    begin = part * depth
    if BEFORE_ITS_INPUT:
        gdc_wait()
        gdc_launch_dependents()
    inputs = begin + tl.arange(0, DEPTH)
    w_at = weight + columns[:, None].to(tl.int64) * n + inputs[None, :]
    x_at = x + tokens[:, None] * n + inputs[None, :]
    sums = tl.zeros((COLUMNS, TOKENS), tl.float32)
    for k in tl.range(0, tl.minimum(depth, n - begin), DEPTH, num_stages=STAGES):
        w = tl.load(w_at + k, eviction_policy="evict_first")
        v = tl.load(x_at + k, mask=live[:, None], other=0.0)
        sums = tl.dot(w, tl.trans(v), sums, input_precision="ieee")
    before = part * 0 + SPLITS - 1
    if SPLITS > 1:
        # Whoever comes last sums the parts, in their order, and leaves the counter as it was.
        place = tl.arange(0, COLUMNS)[:, None] * TOKENS + tokens[None, :]
        parts = partial + tile.to(tl.int64) * (SPLITS * COLUMNS * TOKENS)
        tl.store(parts + part * (COLUMNS * TOKENS) + place, sums)
        tl.debug_barrier()
        before = tl.atomic_add(arrived + tile, 1, sem="acq_rel")
        if before == SPLITS - 1:
            tl.store(arrived + tile, 0)
            sums = tl.zeros((COLUMNS, TOKENS), tl.float32)
            for other in range(SPLITS):
                sums += tl.load(parts + other * (COLUMNS * TOKENS) + place)
    if before == SPLITS - 1:
        if HAS_BIAS:
            sums += tl.load(bias + columns).to(tl.float32)[:, None]
        tl.store(
            out + tokens[None, :] * m + columns[:, None],
            sums.to(out.dtype.element_ty),
            mask=live[None, :],
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; of few tokens, so that it leaves room on the device for others.

    x: (…, n), contiguous. weight: (m, n). bias: (m,). Launches on one stream at a time.
    """
    if not leaves_room(x, weight):
        return F.linear(x, weight, bias)
    return multiply(x.view(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


def leaves_room(x: Tensor, weight: Tensor) -> bool:
    """Whether this kernel makes their product: others can be launched behind it."""
    num_tokens = x.numel() // x.shape[-1]
    return _has_room(x.device, weight.itemsize) and fits(num_tokens, weight)


def fits(num_tokens: int, weight: Tensor) -> bool:
    """Whether the kernel's tiles divide the product: of up to MAX_TOKENS, by (m, n) weights."""
    m, n = weight.shape
    tile = _Tile.of(num_tokens)
    return (
        num_tokens <= MAX_TOKENS
        and type(weight.data) is Tensor
        and weight.is_floating_point()
        and weight.is_contiguous()
        and m % tile.columns == 0
        and m // tile.columns <= _MAX_TILES
        and n % tile.depth == 0
    )


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(T, m) = x weightᵀ + bias, of x (T, n), weight (m, n), that `fits`, and bias (m,) or None.

    Contiguous, of one dtype; sums are float32.
    """
    (tokens, n), m = x.shape, weight.shape[0]
    tile_tokens = max(16, triton.next_power_of_2(tokens))
    tile = _Tile.of(tokens)
    tiles, processors = m // tile.columns, num_processors(x.device)
    splits = _splits(n // tile.depth, tiles, processors)
    programs = tiles * splits
    out = torch.empty((tokens, m), dtype=x.dtype, device=x.device)
    size = tile_tokens * m * splits if splits > 1 else 1
    _multiply[(programs,)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        torch.empty(size, dtype=torch.float32, device=x.device),
        _counters(x.device),
        n,
        m,
        tokens,
        **constants(tile_tokens, splits, programs > processors, bias is not None, x.is_cuda),
        num_warps=tile.warps,
        launch_pdl=x.is_cuda,
    )
    return out


def constants(
    tile_tokens: int, splits: int, crowded: bool, has_bias: bool, on_gpu: bool
) -> dict[str, int | bool]:
    """What the kernel is compiled for. crowded: two programs share a multiprocessor."""
    tile = _Tile.of(tile_tokens)
    return {
        "TOKENS": tile_tokens,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "SPLITS": splits,
        # Enough under way to use the memory's whole bandwidth, and no more: others wait behind it.
        "STAGES": 3 if crowded else 4,
        "HAS_BIAS": has_bias,
        "BEFORE_ITS_INPUT": on_gpu,
    }


@cache
def _splits(steps: int, tiles: int, processors: int) -> int:
    """Into how many parts the inputs are divided, so that most multiprocessors have a program.

    Not for a few more of them: to sum the parts takes a seventh as long as the product.
    """
    splits = 1
    while tiles * splits * 3 < processors * 2 and steps >= 8 * splits:
        splits *= 2
    return splits


@cache
def _has_room(device: torch.device, itemsize: int) -> bool:
    """Whether a multiprocessor has the shared memory for a program, up to 192 KiB of 16-bit values:
    an H100 and what came after it for data centres.
    """
    if device.type != "cuda":
        return True
    return itemsize == 2 and torch.cuda.get_device_capability(device)[0] in (9, 10)


@cache
def _counters(device: torch.device) -> Tensor:
    """Of each tile, how many of its parts have come; zeros between launches."""
    return torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)
