"""The adapters of a mixed batch on a GPU: each read where it lies, through its header's address.

Three kernels a group of linears. `_project` reads bases and routers: the products with the input
of rows that several tokens share are made together, on the tensor cores. `_route` turns each
token's products into gates and weighted expert coordinates. These two need the input alone, and
run on a stream of their own beside the base product. `_expand` then adds the taken experts'
up-projections to it, again for all the tokens of one adapter together.

An adapter costs its own bytes at its own sizes: no padding, no slots, no copies. Nothing on the
host depends on the mix but one table, `GpuPlan.table`, so that a captured graph stays right for
every mix of adapters.

Addresses from a header carry no alignment, and loads through them would be two bytes at a time;
`ResidentAdapters` aligns what it stores, and the kernels are told so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from malora.kernels.batched import Routing, Run
from malora.kernels.resident import FIELDS, Group, ResidentAdapter, ResidentAdapters

NUM_FIELDS = tl.constexpr(len(FIELDS))
BASIS, ROUTER, COEFFICIENTS, UP, NUM_EXPERTS, TOP_K, RANK, BASIS_DIM, STRIDE, READS_BASIS = (
    tl.constexpr(i) for i in range(len(FIELDS))
)
# The rows of a plan's table, each as long as the batch.
HEADER, ALONE, ORDER, READ_START, READ_COUNT, READ_HEADER, ADD_START, ADD_COUNT, ADD_HEADER = (
    tl.constexpr(i) for i in range(9)
)
_TABLE_ROWS = 9

_VECTOR = 16
"""Bytes of the widest load."""
_SMALL_BATCH = 512
"""Up to this many tokens, adapters are likely to have few each, and the device is hard to fill."""


@triton.jit
def _row(header, site):
    """A header's row for a site, as a pointer to its fields."""
    return (header + site * (NUM_FIELDS * 8)).to(tl.pointer_type(tl.int64))


@triton.jit
def _aligned(address, dtype: tl.constexpr, ALIGNMENT: tl.constexpr):
    """A pointer to elements. The compiler heeds an alignment that is said of a pointer alone."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), ALIGNMENT)


@triton.jit
def _project(
    x,
    h,
    table,
    first_site,
    n,
    num_tokens,
    num_sites,
    h_width,
    blocks,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    ALONE_TOKENS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """h[part, token, site, row] = (basis; router)[row] · x[token], over the part's columns."""
    item = tl.program_id(0)
    site = tl.program_id(1)
    part = tl.program_id(2) // blocks
    block = tl.program_id(2) % blocks
    header = tl.load(table + READ_HEADER * num_tokens + item)
    if header == 0:
        return
    row = _row(header, first_site + site)
    source = tl.load(row + BASIS)
    if source == 0:
        return
    total = tl.load(row + BASIS_DIM)
    # Blocks of the basis' rows come first, then the router's, where that reads the input.
    to = h
    first = block.to(tl.int64) * ROWS
    if first >= total:
        first = (block - tl.cdiv(total, ROWS)) * ROWS
        to += total
        source = tl.load(row + ROUTER)
        reads_input = (source != 0) & (tl.load(row + READS_BASIS) == 0)
        total = tl.where(reads_input, tl.load(row + NUM_EXPERTS), 0)
        if first >= total:
            return
    rows = first + tl.arange(0, ROWS)
    count = tl.load(table + READ_COUNT * num_tokens + item)
    start = tl.load(table + READ_START * num_tokens + item)
    dtype: tl.constexpr = x.dtype.element_ty
    weights = _aligned(source, dtype, ALIGNMENT) + rows * n
    end = tl.minimum(n, part * PART + PART)
    if ALONE_TOKENS and count == 1:
        token = tl.load(table + ORDER * num_tokens + start)
        columns = part * PART + tl.arange(0, PART)
        v = tl.load(x + token * n + columns, mask=columns < n, other=0.0).to(tl.float32)
        w = tl.load(
            weights[:, None] + columns[None, :],
            mask=(rows < total)[:, None] & (columns < n)[None, :],
            other=0.0,
        )
        at = ((part * num_tokens + token) * num_sites + site) * h_width
        tl.store(to + at + rows, tl.sum(w.to(tl.float32) * v[None, :], 1), mask=rows < total)
        return
    index = tl.arange(0, TOKENS)
    mine = index < count
    tokens = tl.load(table + ORDER * num_tokens + start + index, mask=mine, other=0)
    sums = tl.zeros((TOKENS, ROWS), tl.float32)
    for begin in range(part * PART, end, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        w = tl.load(
            weights[:, None] + columns[None, :],
            mask=(rows < total)[:, None] & (columns < end)[None, :],
            other=0.0,
        )
        v = tl.load(
            x + tokens[:, None] * n + columns[None, :],
            mask=mine[:, None] & (columns < end)[None, :],
            other=0.0,
        )
        sums = tl.dot(v, tl.trans(w), sums, input_precision="ieee")
    at = ((part * num_tokens + tokens) * num_sites + site) * h_width
    tl.store(to + at[:, None] + rows[None, :], sums, mask=mine[:, None] & (rows < total)[None, :])


@triton.jit
def _products(h, part_stride, index, mask, PARTS: tl.constexpr, PARTS_POWER: tl.constexpr):
    """The products at `index`, their parts summed."""
    parts = tl.arange(0, PARTS_POWER)
    values = tl.load(
        h + parts[:, None] * part_stride + index[None, :],
        mask=(parts < PARTS)[:, None] & mask[None, :],
        other=0.0,
    )
    return tl.sum(values, 0)


@triton.jit
def _route(
    h,
    c,
    ups,
    numbers,
    counts,
    table,
    taken,
    first_site,
    num_tokens,
    num_sites,
    h_width,
    c_width,
    taken_stride,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_POWER: tl.constexpr,
    COUNT: tl.constexpr,
):
    """The weights of a token's up-projection rows: gate of the row's expert · the coordinate.

    For a token alone, those of the taken rows with the rows' numbers, how many there are, and the
    address of the first; for one together with others, those of all rows, 0 for rows not taken.
    """
    token = tl.program_id(0).to(tl.int64)
    site = tl.program_id(1)
    header = tl.load(table + HEADER * num_tokens + token)
    alone = tl.load(table + ALONE * num_tokens + token) != 0
    at = token * num_sites + site
    tl.store(counts + at, 0)
    if header == 0:
        return
    row = _row(header, first_site + site)
    if tl.load(row + BASIS) == 0:
        return
    count = tl.load(row + NUM_EXPERTS)
    top_k = tl.load(row + TOP_K)
    r = tl.load(row + RANK)
    d = tl.load(row + BASIS_DIM)
    stride = tl.load(row + STRIDE)
    up = tl.load(row + UP)
    dtype: tl.constexpr = c.dtype.element_ty
    router = tl.load(row + ROUTER).to(tl.pointer_type(dtype))
    coefficients = tl.load(row + COEFFICIENTS).to(tl.pointer_type(dtype))
    has_coefficients = tl.load(row + COEFFICIENTS) != 0
    z = h + at * h_width
    part_stride = num_tokens * num_sites * h_width
    experts = tl.arange(0, EXPERTS)
    dims = tl.arange(0, DIMS)
    logits = tl.zeros((EXPERTS,), tl.float32)
    if count > 1:
        if tl.load(row + READS_BASIS) != 0:
            for begin in range(0, d, DIMS):
                inside = begin + dims < d
                w = tl.load(
                    router + experts[:, None] * d + begin + dims[None, :],
                    mask=(experts[:, None] < count) & inside[None, :],
                    other=0.0,
                )
                v = _products(z, part_stride, begin + dims, inside, PARTS, PARTS_POWER)
                logits += tl.sum(w.to(tl.float32) * v[None, :], 1)
        else:
            logits = _products(z, part_stride, d + experts, experts < count, PARTS, PARTS_POWER)
    logits = tl.where(experts < count, logits, float("-inf"))
    before = (logits[None, :] > logits[:, None]) | (
        (logits[None, :] == logits[:, None]) & (experts[None, :] < experts[:, None])
    )
    rank = tl.sum(before.to(tl.int32), 1)
    # Renormalised top-k of a softmax is the softmax of the top-k logits.
    weights = tl.where(rank < top_k, tl.exp(logits - tl.max(logits, 0)), 0.0)
    gates = weights / tl.sum(weights, 0)
    if COUNT:  # noqa: SIM102 - a constant of the compilation
        if count > 1:
            tl.atomic_add(taken + token * taken_stride + experts, gates, mask=experts < count)

    for first in range(0, count * r, ROWS):
        rows = first + tl.arange(0, ROWS)
        expert = rows // r
        same = expert[:, None] == experts[None, :]
        gate = tl.sum(tl.where(same, gates[None, :], 0.0), 1)
        place = tl.sum(tl.where(same, rank[None, :], 0), 1)
        needed = (rows < count * r) & (place < top_k)
        if has_coefficients:
            coordinates = tl.zeros((ROWS,), tl.float32)
            for begin in range(0, d, DIMS):
                inside = begin + dims < d
                # All experts': to wait for the gates would cost more than their few bytes.
                p = tl.load(
                    coefficients + rows[:, None] * d + begin + dims[None, :],
                    mask=(rows < count * r)[:, None] & inside[None, :],
                    other=0.0,
                )
                v = _products(z, part_stride, begin + dims, inside, PARTS, PARTS_POWER)
                coordinates += tl.sum(p.to(tl.float32) * v[None, :], 1)
        else:
            source = expert * stride + rows % r
            coordinates = _products(z, part_stride, source, needed, PARTS, PARTS_POWER)
        weighted = tl.where(needed, gate * coordinates, 0.0).to(dtype)
        if alone:
            compact = at * c_width + place * r + rows % r
            tl.store(c + compact, weighted, mask=needed)
            tl.store(numbers + compact, rows.to(tl.int32), mask=needed)
        else:  # with zeros up to a whole chunk, so that nobody need ask
            tl.store(c + at * c_width + rows, weighted, mask=rows < c_width)
    if alone:
        tl.store(counts + at, (top_k * r).to(tl.int32))
        tl.store(ups + at, up)


@triton.jit
def _route_together(
    h,
    c,
    table,
    taken,
    first_site,
    num_tokens,
    num_sites,
    h_width,
    c_width,
    taken_stride,
    parts,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """What `_route` does, for the tokens of one adapter on the tensor cores."""
    item = tl.program_id(0)
    site = tl.program_id(1)
    row = _row(tl.load(table + ADD_HEADER * num_tokens + item), first_site + site)
    if tl.load(row + BASIS) == 0:
        return
    count = tl.load(row + NUM_EXPERTS)
    top_k = tl.load(row + TOP_K)
    r = tl.load(row + RANK)
    d = tl.load(row + BASIS_DIM)
    stride = tl.load(row + STRIDE)
    dtype: tl.constexpr = c.dtype.element_ty
    router = tl.load(row + ROUTER).to(tl.pointer_type(dtype))
    coefficients = tl.load(row + COEFFICIENTS).to(tl.pointer_type(dtype))
    has_coefficients = tl.load(row + COEFFICIENTS) != 0
    index = tl.arange(0, TOKENS)
    mine = index < tl.load(table + ADD_COUNT * num_tokens + item)
    start = tl.load(table + ADD_START * num_tokens + item)
    tokens = tl.load(table + ORDER * num_tokens + start + index, mask=mine, other=0)
    at = (tokens * num_sites + site)[:, None]
    part_stride = num_tokens.to(tl.int64) * num_sites * h_width
    # Its parts are summed once, where the first one lies.
    width = d + tl.where(
        (count > 1) & (tl.load(row + READS_BASIS) == 0), count, tl.zeros_like(count)
    )
    for begin in range(0, width, DIMS):
        column = begin + tl.arange(0, DIMS)
        mask = mine[:, None] & (column < width)[None, :]
        total = tl.zeros((TOKENS, DIMS), tl.float32)
        for part in range(parts):
            total += tl.load(
                h + part * part_stride + at * h_width + column[None, :], mask=mask, other=0.0
            )
        tl.store(h + at * h_width + column[None, :], total, mask=mask)
    tl.debug_barrier()
    experts = tl.arange(0, EXPERTS)
    dims = tl.arange(0, DIMS)
    logits = tl.zeros((TOKENS, EXPERTS), tl.float32)
    if count > 1:
        known = mine[:, None] & (experts < count)[None, :]
        if tl.load(row + READS_BASIS) != 0:
            for begin in range(0, d, DIMS):
                inside = begin + dims < d
                w = tl.load(
                    router + experts[None, :] * d + begin + dims[:, None],
                    mask=(experts < count)[None, :] & inside[:, None],
                    other=0.0,
                )
                v = tl.load(
                    h + at * h_width + begin + dims[None, :],
                    mask=mine[:, None] & inside[None, :],
                    other=0.0,
                )
                logits = tl.dot(v, w.to(tl.float32), logits, input_precision="ieee")
        else:
            logits = tl.load(h + at * h_width + d + experts[None, :], mask=known, other=0.0)
    logits = tl.where((experts < count)[None, :], logits, float("-inf"))
    before = (logits[:, None, :] > logits[:, :, None]) | (
        (logits[:, None, :] == logits[:, :, None])
        & (experts[None, None, :] < experts[None, :, None])
    )
    rank = tl.sum(before.to(tl.int32), 2)
    weights = tl.where(rank < top_k, tl.exp(logits - tl.max(logits, 1)[:, None]), 0.0)
    gates = weights / tl.sum(weights, 1)[:, None]
    if COUNT:  # noqa: SIM102 - a constant of the compilation
        if count > 1:
            to = taken + tokens[:, None] * taken_stride + experts[None, :]
            tl.atomic_add(to, gates, mask=mine[:, None] & (experts < count)[None, :])

    for first in range(0, count * r, ROWS):
        rows = first + tl.arange(0, ROWS)
        expert = rows // r
        same = (expert[None, :] == experts[:, None]).to(tl.float32)
        gate = tl.dot(gates, same, input_precision="ieee")
        known = (rows < count * r)[None, :] & mine[:, None]
        if has_coefficients:
            coordinates = tl.zeros((TOKENS, ROWS), tl.float32)
            for begin in range(0, d, DIMS):
                inside = begin + dims < d
                p = tl.load(
                    coefficients + rows[None, :] * d + begin + dims[:, None],
                    mask=(rows < count * r)[None, :] & inside[:, None],
                    other=0.0,
                )
                v = tl.load(
                    h + at * h_width + begin + dims[None, :],
                    mask=mine[:, None] & inside[None, :],
                    other=0.0,
                )
                coordinates = tl.dot(v, p.to(tl.float32), coordinates, input_precision="tf32x3")
        else:
            source = (expert * stride + rows % r)[None, :]
            coordinates = tl.load(h + at * h_width + source, mask=known, other=0.0)
        weighted = tl.where(known, gate * coordinates, 0.0).to(dtype)
        to = c + at * c_width + rows[None, :]
        tl.store(to, weighted, mask=mine[:, None] & (rows < c_width)[None, :])


@triton.jit
def _expand(
    out,
    c,
    ups,
    numbers,
    counts,
    table,
    first_site,
    out_width,
    num_tokens,
    num_sites,
    c_width,
    width_0,
    width_1,
    width_2,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT_ROWS: tl.constexpr,
    DOT_COLUMNS: tl.constexpr,
    ALONE_TOKENS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """out[token, the tile's columns] += Σ weight · row, for one token, or those of one adapter."""
    tile = tl.program_id(0)
    item = tl.program_id(1)
    dtype: tl.constexpr = out.dtype.element_ty
    vector: tl.constexpr = ALIGNMENT * 8 // dtype.primitive_bitwidth
    tiles_0 = tl.cdiv(width_0, COLUMNS)
    tiles_1 = tl.cdiv(width_1, COLUMNS)
    site = (tile >= tiles_0).to(tl.int32) + (tile >= tiles_0 + tiles_1).to(tl.int32)
    # The site's first tile, first column of `out`, and width.
    tile_0 = tl.where(site == 0, 0, tl.where(site == 1, tiles_0, tiles_0 + tiles_1))
    start = tl.where(site == 0, 0, tl.where(site == 1, width_0, width_0 + width_1))
    width = tl.where(site == 0, width_0, tl.where(site == 1, width_1, width_2))
    # Multiples of what one load takes, so that every row is aligned as the first.
    start = tl.multiple_of(start, vector)
    width = tl.multiple_of(width, vector)
    offset = tl.multiple_of((tile - tile_0) * COLUMNS, vector)
    header = tl.load(table + ADD_HEADER * num_tokens + item)
    if ALONE_TOKENS:
        at = item.to(tl.int64) * num_sites + site
        count = tl.load(counts + at)
        columns = offset + tl.arange(0, COLUMNS)
        inside = columns < width
        rows = tl.arange(0, ROWS)
        # Before it is known how many there are: each wait for memory costs as much as the sum.
        up = _aligned(tl.load(ups + at), dtype, ALIGNMENT)
        number = tl.load(numbers + at * c_width + rows)
        weights = tl.load(c + at * c_width + rows)
        to = out + item.to(tl.int64) * out_width + start + columns
        old = tl.load(to, mask=inside, other=0.0).to(tl.float32)
        if count > 0:
            for begin in range(0, count, ROWS):
                if begin > 0:
                    number = tl.load(numbers + at * c_width + begin + rows)
                    weights = tl.load(c + at * c_width + begin + rows)
                known = begin + rows < count
                w = tl.load(
                    up + number.to(tl.int64)[:, None] * width + columns[None, :],
                    mask=known[:, None] & inside[None, :],
                    other=0.0,
                )
                weight = tl.where(known, weights.to(tl.float32), 0.0)
                old += tl.sum(w.to(tl.float32) * weight[:, None], 0)
            tl.store(to, old.to(dtype), mask=inside)
    if header == 0:
        return
    row = _row(header, first_site + site)
    if tl.load(row + BASIS) == 0:
        return
    total = tl.load(row + NUM_EXPERTS) * tl.load(row + RANK)
    experts = _aligned(tl.load(row + UP), dtype, ALIGNMENT)
    index = tl.arange(0, TOKENS)
    mine = index < tl.load(table + ADD_COUNT * num_tokens + item)
    first_token = tl.load(table + ADD_START * num_tokens + item)
    tokens = tl.load(table + ORDER * num_tokens + first_token + index, mask=mine, other=0)
    coordinates = c + (tokens * num_sites + site) * c_width
    for shift in range(0, COLUMNS, DOT_COLUMNS):
        some = offset + shift + tl.arange(0, DOT_COLUMNS)
        within = some < width
        places = out + tokens[:, None] * out_width + start + some[None, :]
        mask = mine[:, None] & within[None, :]
        sums = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        for first in range(0, total, DOT_ROWS):
            every = first + tl.arange(0, DOT_ROWS)
            some_weights = tl.load(
                coordinates[:, None] + every[None, :],
                mask=mine[:, None],
                other=0.0,
            )
            up_rows = tl.load(
                experts + every.to(tl.int64)[:, None] * width + some[None, :],
                mask=(every < total)[:, None] & within[None, :],
                other=0.0,
            )
            sums = tl.dot(some_weights, up_rows, sums, input_precision="ieee")
        tl.store(places, sums.to(dtype), mask=mask)


@dataclass(frozen=True)
class _Form:
    """How kernels divide a batch."""

    tokens: int
    """Of one adapter that a program takes together."""
    part: int
    """Columns of a basis that a program of `_project` reads."""
    read_rows: int
    """Rows of a basis and router that a program reads."""
    read_columns: int
    """Columns that go through the tensor cores together."""
    read_warps: int
    add_rows: int
    add_columns: int
    dot_rows: int
    dot_columns: int
    """Of an up-projection, that a program adds for one token, or for several at a time."""
    add_warps: int
    alone: bool
    """Whether adapters with few tokens are read for each token on its own."""


_DECODE = _Form(
    tokens=16,
    part=512,
    read_rows=16,
    read_columns=256,
    read_warps=4,
    add_rows=16,
    add_columns=512,
    dot_rows=32,
    dot_columns=256,
    add_warps=2,
    alone=True,
)
"""Bound by bytes and latency: many small programs, each with all its loads under way at once."""
_PREFILL = _Form(
    tokens=64,
    part=2048,
    read_rows=64,
    read_columns=128,
    read_warps=4,
    add_rows=16,
    add_columns=128,
    dot_rows=64,
    dot_columns=128,
    add_warps=4,
    alone=False,
)
"""Bound by the tensor cores and by the outputs' bytes: what is read serves many tokens."""
_CHUNK = 64
"""Weights of up-projection rows are stored, and products with the input too, in whole chunks."""
_TOGETHER = 4
"""From this many tokens on, an adapter's tokens are cheaper together than each alone."""


@dataclass(frozen=True)
class _Scratch:
    """What the kernels of a group hand on. T tokens, S sites.

    h: (parts, T, S, reads) float32, products with the input. c: (T, S, rows), weights of the
    up-projections' rows, in the adapters' dtype; numbers: the same shape, int32, which rows those
    are, where the token is alone; counts: (T, S) int32, how many; ups: (T, S) int64, the address
    of the first.
    """

    h: Tensor
    c: Tensor
    numbers: Tensor
    counts: Tensor
    ups: Tensor


class GpuPlan:
    """A batch's adapters on the GPU: a table of which tokens are whose, and scratch memory.

    A plan may be loaded again with another mix of as many tokens, also after its kernels were
    captured in a graph.
    """

    def __init__(self, num_tokens: int, adapters: ResidentAdapters) -> None:
        self.routing: Routing | None = None
        self.num_tokens = num_tokens
        device = adapters.device
        self._form = _DECODE if num_tokens <= _SMALL_BATCH else _PREFILL
        self._num_reads = self._num_adds = num_tokens
        self._table = torch.zeros((_TABLE_ROWS, num_tokens), dtype=torch.int64, device=device)
        self._dtype = adapters.dtype
        self._sizes = adapters.sizes
        self._scratch: dict[tuple[int, int], _Scratch] = {}
        self._stream = _side_stream(device) if device.type == "cuda" else None

    def load(self, runs: Sequence[Run]) -> None:
        """Set which tokens are whose."""
        table = batch_table(runs, self.num_tokens, self._form)
        if not self._form.alone:  # never captured: its grids may follow the mix
            self._num_reads, self._num_adds = np.count_nonzero(
                table[[READ_HEADER.value, ADD_HEADER.value]], axis=1
            ).tolist()
        host = torch.from_numpy(table)
        if self._stream is not None:
            host = host.pin_memory()
        self._table.copy_(host, non_blocking=True)

    def begin(self, x: Tensor, group: Group) -> None:
        """Coordinates of all tokens, on the side stream.

        x: (T, n), contiguous, of the adapters' dtype.
        """
        if self._stream is None:
            self._weigh(x, group)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._weigh(x, group)

    def add_to(self, out: Tensor, x: Tensor, group: Group) -> None:
        """Add every token's adapter to the base product, in place.

        x: (T, n), out: (T, m), contiguous, of the adapters' dtype.
        """
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        form, scratch = self._form, self._buffers(x, group)
        widths = _widths(group)
        tiles = sum(triton.cdiv(width, form.add_columns) for width in widths)
        _expand[(tiles, self._num_adds)](
            out,
            scratch.c,
            scratch.ups,
            scratch.numbers,
            scratch.counts,
            self._table,
            group.first_site,
            out.shape[1],
            self.num_tokens,
            len(group.sites),
            scratch.c.shape[-1],
            *widths,
            TOKENS=form.tokens,
            ROWS=form.add_rows,
            COLUMNS=form.add_columns,
            DOT_ROWS=form.dot_rows,
            DOT_COLUMNS=form.dot_columns,
            ALONE_TOKENS=form.alone,
            ALIGNMENT=_alignment(group, x.itemsize),
            num_warps=form.add_warps,
            num_stages=1,
        )

    def _weigh(self, x: Tensor, group: Group) -> None:
        n, sites = x.shape[1], len(group.sites)
        form, scratch = self._form, self._buffers(x, group)
        parts = len(scratch.h)
        sizes = (self._sizes.basis_dim, self._sizes.num_experts)
        blocks = sum(triton.cdiv(size, form.read_rows) for size in sizes)
        _project[(self._num_reads, sites, parts * blocks)](
            x,
            scratch.h,
            self._table,
            group.first_site,
            n,
            self.num_tokens,
            sites,
            scratch.h.shape[-1],
            blocks,
            TOKENS=form.tokens,
            ROWS=form.read_rows,
            COLUMNS=form.read_columns,
            PART=form.part,
            ALONE_TOKENS=form.alone,
            ALIGNMENT=_alignment(group, x.itemsize),
            num_warps=form.read_warps,
        )
        taken = None if self.routing is None else self.routing.gates[:, group.layer]
        shapes = (
            group.first_site,
            self.num_tokens,
            sites,
            scratch.h.shape[-1],
            scratch.c.shape[-1],
            0 if taken is None else taken.stride(0),
        )
        if not form.alone:
            _route_together[(self._num_adds, sites)](
                scratch.h,
                scratch.c,
                self._table,
                scratch.h if taken is None else taken,
                *shapes,
                parts,
                TOKENS=form.tokens,
                EXPERTS=max(16, triton.next_power_of_2(self._sizes.num_experts)),
                ROWS=_CHUNK,
                DIMS=32,
                COUNT=taken is not None,
                num_warps=8,
            )
            return
        _route[(self.num_tokens, sites)](
            scratch.h,
            scratch.c,
            scratch.ups,
            scratch.numbers,
            scratch.counts,
            self._table,
            scratch.h if taken is None else taken,
            *shapes,
            EXPERTS=triton.next_power_of_2(self._sizes.num_experts),
            ROWS=_CHUNK,
            DIMS=64,
            PARTS=parts,
            PARTS_POWER=triton.next_power_of_2(parts),
            COUNT=taken is not None,
            num_warps=4,
        )

    def _buffers(self, x: Tensor, group: Group) -> _Scratch:
        parts, sites = triton.cdiv(x.shape[1], self._form.part), len(group.sites)
        if (parts, sites) not in self._scratch:
            reads, rows = (
                -(-n // _CHUNK) * _CHUNK
                for n in (self._sizes.basis_dim + self._sizes.num_experts, self._sizes.rows)
            )
            tokens, device = self.num_tokens, x.device
            numbers = (tokens, sites, rows) if self._form.alone else (0,)
            self._scratch[parts, sites] = _Scratch(
                torch.empty((parts, tokens, sites, reads), dtype=torch.float32, device=device),
                torch.empty((tokens, sites, rows), dtype=self._dtype, device=device),
                torch.empty(numbers, dtype=torch.int32, device=device),
                torch.empty((tokens, sites), dtype=torch.int32, device=device),
                torch.empty((tokens, sites), dtype=torch.int64, device=device),
            )
        return self._scratch[parts, sites]


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def batch_table(runs: Sequence[Run], num_tokens: int, form: _Form) -> NDArray[np.int64]:
    """A plan's table, (9, T): every token's header, and who is computed together.

    Tokens are ordered by what they read, then by adapter. An item is some of them that read the
    same (READ) or are of one adapter (ADD): its start in that order, its count, and the header of
    its adapter, or of one of them. A header of 0 means none. ALONE: the token is in no ADD item.
    """
    readers: dict[object, dict[ResidentAdapter, list[NDArray[np.int64]]]] = {}
    table = np.zeros((_TABLE_ROWS, num_tokens), np.int64)
    for run in runs:
        table[HEADER.value, run.start : run.stop] = run.adapter.headers.data_ptr()
        adapters = readers.setdefault(run.adapter.projection_key, {})
        adapters.setdefault(run.adapter, []).append(np.arange(run.start, run.stop))
    position = 0
    reads: list[tuple[int, int, int]] = []
    adds: list[tuple[int, int, int]] = []
    for adapters in readers.values():
        first = position
        for adapter, parts in adapters.items():
            begin = position
            for tokens in parts:
                table[ORDER.value, position : position + len(tokens)] = tokens
                position += len(tokens)
            header = adapter.headers.data_ptr()
            if form.alone and position - begin < _TOGETHER:
                table[ALONE.value, table[ORDER.value, begin:position]] = 1
            else:
                adds += _items(begin, position, form.tokens, header)
        few = form.alone and position - first < _TOGETHER
        reads += _items(first, position, 1 if few else form.tokens, header)
    if reads:
        table[READ_START.value : READ_HEADER.value + 1, : len(reads)] = np.array(reads).T
    if adds:
        table[ADD_START.value : ADD_HEADER.value + 1, : len(adds)] = np.array(adds).T
    return table


def _items(start: int, stop: int, size: int, header: int) -> list[tuple[int, int, int]]:
    return [(i, min(size, stop - i), header) for i in range(start, stop, size)]


@cache
def _widths(group: Group) -> tuple[int, int, int]:
    """The widths of a group's sites, one after the other in its output; 0 for those it lacks."""
    first, second, third = [*(site.width for site in group.sites), 0, 0][:3]
    return first, second, third


@cache
def _alignment(group: Group, itemsize: int) -> int:
    """Bytes that every row of the group's weights is a multiple of, as far as a load can use."""
    widths = [group.in_features]
    for site in group.sites:
        widths += [site.width, site.start]
    return _VECTOR if all(width * itemsize % _VECTOR == 0 for width in widths) else itemsize
