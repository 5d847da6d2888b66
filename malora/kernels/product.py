"""The base product of few tokens on a GPU, small enough to share the device.

A decode step's product waits for the bytes of its weights, whoever makes it; but cuBLAS' kernels
for it take every multiprocessor's registers and shared memory whole, and what adapters do beside
them waits for their end. This one leaves a third to half of the former, in as much time for up to
64 tokens, in a tenth more for twice as many.

Its first programs may make a read of adapters too (`CommonRead`): rows of a basis are to them what
the weight's are to the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from malora.kernels.beside import (
    COMMON_COUNT,
    COMMON_HEADER,
    COMMON_READ,
    COMMON_START,
    NUM_TOTALS,
    ORDER,
    arrive,
    rows_to_read,
)
from malora.kernels.headers import aligned, num_processors

MAX_TOKENS = 128
"""A tile has all tokens; more of them would not fit in its registers."""
_MAX_TILES = 4096
_COMMON_PARTS = 8
"""Of the input, for the common read, which must be short: others wait for it."""
_ALIGNMENT = tl.constexpr(16)
"""Bytes that rows of what `fits` are multiples of."""


class Division(NamedTuple):
    """How a product is divided among programs."""

    columns: int
    """Outputs of a tile."""
    depth: int
    """Inputs of its step."""
    warps: int
    tiles: int
    splits: int
    """Parts of the inputs."""

    @classmethod
    def of(cls, num_tokens: int, weight: Tensor) -> Division:
        (m, n), processors = weight.shape, num_processors(weight.device)
        if num_tokens > 64:
            # Every tile reads the input: of many tokens that would be more than the weights.
            columns, depth, warps = 128, 64, 8
        elif m > 2 * 64 * processors:
            # More than two narrow ones for each multiprocessor: not all would begin at once, and
            # what is launched behind them waits for that.
            columns, depth, warps = 128, 64, 4
        else:
            columns, depth, warps = 64, 128, 4
        tiles, splits = m // columns, 1
        # So that most multiprocessors have a program. Not for a few more of them: to sum the parts
        # takes a seventh as long as the product.
        while tiles * splits * 3 < processors * 2 and n // depth >= 8 * splits:
            splits *= 2
        return cls(columns, depth, warps, tiles, splits)

    @property
    def num_programs(self) -> int:
        return self.tiles * self.splits

    @property
    def registers(self) -> int | None:
        """Of a thread at most, so that a multiprocessor has room for two programs: what is launched
        behind them waits until all have begun. None where they need no limit for that.
        """
        return 128 if self.warps == 8 else None


@dataclass(frozen=True)
class CommonRead:
    """What most of a batch's tokens read of an input for their adapters: one basis, or one router.

    table, counters: `add_beside`'s. h: (parts or more, T, S, its rows or more) float32, where the
    products go, for S sites of which `first_site` is the first. tiles: of a site's rows. parts: of
    the input.
    """

    table: Tensor
    counters: Tensor
    h: Tensor
    first_site: int
    tiles: int
    parts: int

    @classmethod
    def beside(
        cls, weight: Tensor, table: Tensor, counters: Tensor, h: Tensor, first_site: int, rows: int
    ) -> CommonRead:
        """The read beside the product with a weight; rows: the most of a site."""
        most_parts, tokens, sites, _ = h.shape
        division, processors = Division.of(tokens, weight), num_processors(weight.device)
        tiles = triton.cdiv(rows, division.columns)
        # Beside a product of a program for each multiprocessor, a second one on some of them makes
        # all the others wait for these.
        fitting = (processors - division.num_programs) // (sites * tiles)
        few = _COMMON_PARTS // 2 <= fitting < _COMMON_PARTS
        parts = min(fitting if few else _COMMON_PARTS, most_parts)
        return cls(table, counters, h, first_site, tiles, parts)


@triton.jit
def _store_outputs(
    sums, bias, out, partial, arrived, tile, part, columns, num_tokens, m,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    tokens = tl.arange(0, TOKENS)
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
            mask=(tokens < num_tokens)[None, :],
        )


@triton.jit(do_not_specialize=("num_tokens", "first_site", "num_sites"))
def _multiply(
    x,
    weight,
    bias,
    out,
    partial,
    arrived,
    table,
    counters,
    h,
    n,
    m,
    num_tokens,
    first_site,
    num_sites,
    h_width,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COMMON_TILES: tl.constexpr,
    COMMON_PARTS: tl.constexpr,
    BEFORE_ITS_INPUT: tl.constexpr,
):
    """A tile of x weightᵀ + bias: all tokens by some outputs, over a part of the inputs.

    COMMON_TILES, COMMON_PARTS: first those of each site's common read, likewise; none where 0.
    BEFORE_ITS_INPUT: launched when the kernel that makes x has not ended yet. What is launched
    likewise behind this one begins when all its programs have, and x is there.
    """
    number = tl.program_id(0)
    index = tl.arange(0, TOKENS)
    if COMMON_TILES > 0:
        num_common = num_sites * (COMMON_TILES * COMMON_PARTS)
        common = number < num_common
        site = number // (COMMON_TILES * COMMON_PARTS)
        number = tl.where(common, number % (COMMON_TILES * COMMON_PARTS), number - num_common)
        splits = tl.where(common, COMMON_PARTS, SPLITS)
    else:
        splits = SPLITS
    tile = number // splits
    part = number % splits
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.cdiv(n // DEPTH, splits) * DEPTH
    begin = part * depth
    stop = tl.minimum(begin + depth, n)
    begins = columns.to(tl.int64) * n
    if COMMON_TILES > 0:
        count = tl.load(table + COMMON_COUNT, mask=common, other=0).to(tl.int32)
        start = tl.load(table + COMMON_START, mask=common, other=0)
        header = tl.load(table + COMMON_HEADER, mask=common, other=0)
        address, read_begins, total = rows_to_read(
            header, first_site + site, columns, n, count > 0, x.dtype.element_ty, _ALIGNMENT
        )
        address = tl.where(common, address, weight.to(tl.int64))
        weight = aligned(address, x.dtype.element_ty, _ALIGNMENT)
        begins += common.to(tl.int64) * (read_begins - begins)
        stop = tl.where(common & (tile * COLUMNS >= total), begin, stop)
        live = index < tl.where(common, count, num_tokens)
        order = table + NUM_TOTALS + ORDER * num_tokens + start
        tokens = tl.load(order + index, mask=index < count, other=0).to(tl.int32)
        tokens = tl.where(common, tokens, index)
    else:
        live = index < num_tokens
        tokens = index
    if BEFORE_ITS_INPUT:
        gdc_wait()
        gdc_launch_dependents()
    inputs = tl.arange(0, DEPTH)
    row = weight + begins
    sums = tl.zeros((COLUMNS, TOKENS), tl.float32)
    for k in tl.range(begin, stop, DEPTH, num_stages=STAGES):
        w = tl.load(row[:, None] + k + inputs[None, :], eviction_policy="evict_first")
        v = tl.load(x + tokens[:, None] * n + k + inputs[None, :], mask=live[:, None], other=0.0)
        sums = tl.dot(w, tl.trans(v), sums, input_precision="ieee")
    if COMMON_TILES > 0:
        if common:
            at = ((part * num_tokens + tokens) * num_sites + site) * h_width
            tl.store(
                h + at[None, :] + columns[:, None],
                sums,
                mask=live[None, :] & (columns < total)[:, None],
            )
            if count > 0:
                read = tl.load(table + COMMON_READ)
                arrive(counters + (first_site + site) * (2 * num_tokens) + read)
        else:
            _store_outputs(
                sums, bias, out, partial, arrived, tile, part, columns, num_tokens, m,
                TOKENS, COLUMNS, SPLITS, HAS_BIAS,
            )  # fmt: skip
    else:
        _store_outputs(
            sums, bias, out, partial, arrived, tile, part, columns, num_tokens, m,
            TOKENS, COLUMNS, SPLITS, HAS_BIAS,
        )  # fmt: skip


def leaves_room(x: Tensor, weight: Tensor) -> bool:
    """Whether this kernel makes their product: others can be launched behind it."""
    num_tokens = x.numel() // x.shape[-1]
    return _has_room(x.device, weight.itemsize) and fits(num_tokens, weight)


def fits(num_tokens: int, weight: Tensor) -> bool:
    """Whether the kernel's tiles divide the product: of up to MAX_TOKENS, by (m, n) weights."""
    m, n = weight.shape
    division = Division.of(num_tokens, weight)
    return (
        num_tokens <= MAX_TOKENS
        and type(weight.data) is Tensor
        and weight.is_floating_point()
        and weight.is_contiguous()
        and m % division.columns == 0
        and division.tiles <= _MAX_TILES
        and n % division.depth == 0
    )


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, common: CommonRead | None = None
) -> Tensor:
    """(T, m) = x weightᵀ + bias, of x (T, n), weight (m, n), that `fits`, and bias (m,) or None.

    Contiguous, of one dtype; sums are float32. common: make this read of x too. Launches on one
    stream at a time.
    """
    (tokens, n), m = x.shape, weight.shape[0]
    tile_tokens = max(16, triton.next_power_of_2(tokens))
    division, programs = Division.of(tokens, weight), 0
    sites, common_tiles, common_parts = 0, 0, 0
    if common is not None:
        sites, common_tiles, common_parts = common.h.shape[2], common.tiles, common.parts
        programs = sites * common_tiles * common_parts
    programs += division.num_programs
    out = torch.empty((tokens, m), dtype=x.dtype, device=x.device)
    size = tile_tokens * m * division.splits if division.splits > 1 else 1
    _multiply[(programs,)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        torch.empty(size, dtype=torch.float32, device=x.device),
        _counters(x.device),
        x if common is None else common.table,
        x if common is None else common.counters,
        x if common is None else common.h,
        n,
        m,
        tokens,
        0 if common is None else common.first_site,
        sites,
        0 if common is None else common.h.shape[3],
        **constants(
            division,
            tile_tokens,
            programs > num_processors(x.device),
            bias is not None,
            common_tiles,
            common_parts,
            x.is_cuda,
        ),
        num_warps=division.warps,
        maxnreg=division.registers,
        launch_pdl=x.is_cuda,
    )
    return out


def constants(
    division: Division,
    tile_tokens: int,
    crowded: bool,
    has_bias: bool,
    common_tiles: int,
    common_parts: int,
    on_gpu: bool,
) -> dict[str, int | bool]:
    """What the kernel is compiled for. crowded: two programs share a multiprocessor."""
    return {
        "TOKENS": tile_tokens,
        "COLUMNS": division.columns,
        "DEPTH": division.depth,
        "SPLITS": division.splits,
        # Enough under way to use the memory's whole bandwidth, and no more: others wait behind it.
        "STAGES": 3 if crowded else 4,
        "HAS_BIAS": has_bias,
        "COMMON_TILES": common_tiles,
        "COMMON_PARTS": common_parts,
        "BEFORE_ITS_INPUT": on_gpu,
    }


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
