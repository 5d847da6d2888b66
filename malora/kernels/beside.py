"""What adapters add to a small batch's base products, made beside them by one kernel a group.

The kernel's programs come in three kinds, and wait for one another in that order. `_project_…`s read
a block of a basis' or a router's rows, for the tokens that share them. `_route`s turn one token's
products into gates and weighted expert coordinates, once all its blocks have come. `_expand_…`s set
some outputs, of one token or of the tokens of one adapter, once those are routed. A program waits
for programs of a lower number alone, and a GPU starts programs in the order of their numbers: so
somebody always goes on. All need the group's input alone, and none the base product: it is made
meanwhile, and the two are added by whoever reads them.

Which program does what lies in a table in device memory, so that a captured graph stays right for
every mix of adapters; programs beyond the mix's work end at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from malora.kernels import product
from malora.kernels.batched import BaseProduct, Routing, Run, by_reader
from malora.kernels.headers import (
    BASIS,
    BASIS_DIM,
    COEFFICIENTS,
    NUM_EXPERTS,
    RANK,
    READS_BASIS,
    ROUTER,
    STRIDE,
    TOP_K,
    UP,
    aligned,
    alignment,
    header_row,
    num_tiles,
    side_stream,
    site_tile,
    site_widths,
)
from malora.kernels.resident import Group, ResidentAdapter, ResidentAdapters

# A table's first numbers: how many blocks are read and adds made, for one token and for several
# together, and how many tokens are routed.
ALONE_BLOCKS, SHARED_BLOCKS, ROUTED, ALONE_ADDS, SHARED_ADDS = (tl.constexpr(i) for i in range(5))
NUM_TOTALS = tl.constexpr(6)
# Its rows as long as the batch: of routed tokens, then of adds, then of all tokens in order.
(
    ROUTE_HEADER, ROUTE_TOKEN, ROUTE_READ, ROUTE_BLOCKS, ROUTE_SHARES, ROUTE_ADD, ROUTE_ALONE,
    ADD_HEADER, ADD_START, ADD_COUNT, ADD_TOKEN,
) = (tl.constexpr(i) for i in range(11))  # fmt: skip
ORDER = ROUTE_TOKEN
NUM_ROWS = tl.constexpr(11)
# Then its rows as long as the longest list of blocks.
BLOCK_HEADER, BLOCK_START, BLOCK_COUNT, BLOCK_TOKEN, BLOCK_READ, BLOCK_NUMBER = (
    tl.constexpr(i) for i in range(6)
)
NUM_BLOCK_ROWS = tl.constexpr(6)


@triton.jit
def _wait(counter, expected):
    """Until so many have arrived; what they stored before can be read then."""
    seen = tl.atomic_add(counter, 0, sem="acquire")
    while seen < expected:
        seen = tl.atomic_add(counter, 0, sem="acquire")


@triton.jit
def _arrive(counter):
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def _rows_to_read(header, block, site, first_site, ROWS: tl.constexpr):
    """A block of rows: the address of all, its first, how many there are, and where they go.

    Blocks of the basis' rows come first, then the router's, where that reads the input.
    """
    row = header_row(header, first_site + site)
    basis = tl.load(row + BASIS)
    router = tl.load(row + ROUTER)
    d = tl.load(row + BASIS_DIM)
    num_experts = tl.load(row + NUM_EXPERTS)
    reads_input = (router != 0) & (tl.load(row + READS_BASIS) == 0)
    basis_blocks = tl.cdiv(d, ROWS)
    of_router = block >= basis_blocks
    total = tl.where(of_router, tl.where(reads_input, num_experts, 0), d)
    total = tl.where(basis != 0, total, 0)
    first = tl.where(of_router, block - basis_blocks, block) * ROWS
    return tl.where(of_router, router, basis), first, total, tl.where(of_router, d, 0)


@triton.jit
def _project_alone(
    x, h, header, token, block, site, part, first_site, n, num_tokens, num_sites, h_width,
    ROWS: tl.constexpr, PART: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """h[part, token, site, row] = (basis; router)[row] · x[token], over the part's columns."""
    source, first, total, to = _rows_to_read(header, block, site, first_site, ROWS)
    if first < total:
        rows = first + tl.arange(0, ROWS)
        columns = part * PART + tl.arange(0, PART)
        weights = aligned(source, x.dtype.element_ty, ALIGNMENT) + rows * n
        w = tl.load(
            weights[:, None] + columns[None, :],
            mask=(rows < total)[:, None] & (columns < n)[None, :],
            other=0.0,
        )
        v = tl.load(x + token * n + columns, mask=columns < n, other=0.0).to(tl.float32)
        at = ((part * num_tokens + token) * num_sites + site) * h_width + to
        tl.store(h + at + rows, tl.sum(w.to(tl.float32) * v[None, :], 1), mask=rows < total)


@triton.jit
def _project_shared(
    x, h, order, header, start, count, block, site, part, first_site, n, num_tokens, num_sites,
    h_width,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """`_project_alone` for several tokens, on the tensor cores."""
    source, first, total, to = _rows_to_read(header, block, site, first_site, ROWS)
    if first < total:
        rows = first + tl.arange(0, ROWS)
        weights = aligned(source, x.dtype.element_ty, ALIGNMENT) + rows * n
        index = tl.arange(0, TOKENS)
        mine = index < count
        tokens = tl.load(order + start + index, mask=mine, other=0)
        sums = tl.zeros((TOKENS, ROWS), tl.float32)
        for begin in range(part * PART, tl.minimum(n, part * PART + PART), COLUMNS):
            columns = begin + tl.arange(0, COLUMNS)
            w = tl.load(
                weights[:, None] + columns[None, :],
                mask=(rows < total)[:, None] & (columns < n)[None, :],
                other=0.0,
            )
            v = tl.load(
                x + tokens[:, None] * n + columns[None, :],
                mask=mine[:, None] & (columns < n)[None, :],
                other=0.0,
            )
            sums = tl.dot(v, tl.trans(w), sums, input_precision="ieee")
        at = ((part * num_tokens + tokens) * num_sites + site) * h_width + to
        tl.store(
            h + at[:, None] + rows[None, :], sums, mask=mine[:, None] & (rows < total)[None, :]
        )


@triton.jit
def _products(h, part_stride, parts, index, mask, PARTS: tl.constexpr):
    """The products at `index`, their parts summed."""
    some = tl.arange(0, PARTS)
    values = tl.load(
        h + some[:, None] * part_stride + index[None, :],
        mask=(some < parts)[:, None] & mask[None, :],
        other=0.0,
    )
    return tl.sum(values, 0)


@triton.jit
def _route(
    h, c, numbers, arrived, expected, taken, token, site, chunk, row, parts, alone,
    num_tokens, num_sites, h_width, c_width, taken_stride,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr, PARTS: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """The weights of some up-projection rows of a token: gate of the row's expert · the coordinate.

    For a token alone, those of the taken rows, with the rows' numbers; for one together with
    others, those of all rows, 0 for rows not taken.
    """
    basis = tl.load(row + BASIS)
    count = tl.load(row + NUM_EXPERTS)
    top_k = tl.load(row + TOP_K)
    r = tl.load(row + RANK)
    d = tl.load(row + BASIS_DIM)
    stride = tl.load(row + STRIDE)
    router_address = tl.load(row + ROUTER)
    reads_basis = (tl.load(row + READS_BASIS) != 0) & (router_address != 0)
    dtype: tl.constexpr = c.dtype.element_ty
    router = router_address.to(tl.pointer_type(dtype))
    coefficients = tl.load(row + COEFFICIENTS).to(tl.pointer_type(dtype))
    has_coefficients = tl.load(row + COEFFICIENTS) != 0
    total = tl.where(basis != 0, count * r, 0)
    rows = chunk * ROWS + tl.arange(0, ROWS)
    if chunk * ROWS < total:
        experts = tl.arange(0, EXPERTS)
        dims = tl.arange(0, DIMS)
        # Before the products are there: a wait for memory costs more than these few bytes.
        w = tl.load(
            router + experts[:, None] * d + dims[None, :],
            mask=(experts < tl.where(reads_basis, count, 0))[:, None] & (dims < d)[None, :],
            other=0.0,
        )
        p = tl.load(
            coefficients + rows[:, None] * d + dims[None, :],
            mask=(rows < tl.where(has_coefficients, total, 0))[:, None] & (dims < d)[None, :],
            other=0.0,
        )
        _wait(arrived, expected)
        at = token * num_sites + site
        z = h + at * h_width
        part_stride = num_tokens.to(tl.int64) * num_sites * h_width
        v = _products(z, part_stride, parts, dims, dims < d, PARTS)
        logits = tl.zeros((EXPERTS,), tl.float32)
        if count > 1:
            if reads_basis:
                logits = tl.sum(w.to(tl.float32) * v[None, :], 1)
                for begin in range(DIMS, d, DIMS):
                    w = tl.load(
                        router + experts[:, None] * d + begin + dims[None, :],
                        mask=(experts[:, None] < count) & (begin + dims < d)[None, :],
                        other=0.0,
                    )
                    u = _products(z, part_stride, parts, begin + dims, begin + dims < d, PARTS)
                    logits += tl.sum(w.to(tl.float32) * u[None, :], 1)
            else:
                logits = _products(z, part_stride, parts, d + experts, experts < count, PARTS)
        logits = tl.where(experts < count, logits, float("-inf"))
        before = (logits[None, :] > logits[:, None]) | (
            (logits[None, :] == logits[:, None]) & (experts[None, :] < experts[:, None])
        )
        rank = tl.sum(before.to(tl.int32), 1)
        # Renormalised top-k of a softmax is the softmax of the top-k logits.
        weights = tl.where(rank < top_k, tl.exp(logits - tl.max(logits, 0)), 0.0)
        gates = weights / tl.sum(weights, 0)
        if COUNT:  # noqa: SIM102 - a constant of the compilation
            if (count > 1) & (chunk == 0):
                tl.atomic_add(taken + token * taken_stride + experts, gates, mask=experts < count)
        expert = rows // r
        same = expert[:, None] == experts[None, :]
        gate = tl.sum(tl.where(same, gates[None, :], 0.0), 1)
        place = tl.sum(tl.where(same, rank[None, :], 0), 1)
        needed = (rows < total) & (place < top_k)
        if has_coefficients:
            coordinates = tl.sum(p.to(tl.float32) * v[None, :], 1)
            for begin in range(DIMS, d, DIMS):
                p = tl.load(
                    coefficients + rows[:, None] * d + begin + dims[None, :],
                    mask=(rows < total)[:, None] & (begin + dims < d)[None, :],
                    other=0.0,
                )
                u = _products(z, part_stride, parts, begin + dims, begin + dims < d, PARTS)
                coordinates += tl.sum(p.to(tl.float32) * u[None, :], 1)
        else:
            source = expert * stride + rows % r
            coordinates = _products(z, part_stride, parts, source, needed, PARTS)
        weighted = tl.where(needed, gate * coordinates, 0.0).to(dtype)
        if alone:
            compact = at * c_width + place * r + rows % r
            tl.store(c + compact, weighted, mask=needed)
            tl.store(numbers + compact, rows.to(tl.int32), mask=needed)
        else:
            tl.store(c + at * c_width + rows, weighted, mask=rows < total)


@triton.jit
def _expand_alone(
    delta, c, numbers, ready, row, token, site, offset, start, width, num_sites, chunks, c_width,
    out_width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """delta[token, the tile's columns] = Σ weight · row."""
    dtype: tl.constexpr = delta.dtype.element_ty
    basis = tl.load(row + BASIS)
    num_experts = tl.load(row + NUM_EXPERTS)
    top_k = tl.load(row + TOP_K)
    r = tl.load(row + RANK)
    up = aligned(tl.load(row + UP), dtype, ALIGNMENT)
    total = tl.where(basis != 0, top_k * r, 0)
    at = (token * num_sites + site) * c_width
    columns = offset + tl.arange(0, COLUMNS)
    inside = columns < width
    rows = tl.arange(0, ROWS)
    number = rows
    if num_experts > 1:
        _wait(ready, chunks)
        number = tl.load(numbers + at + rows)
    w = tl.load(
        up + number.to(tl.int64)[:, None] * width + columns[None, :],
        mask=(rows < total)[:, None] & inside[None, :],
        other=0.0,
    )
    # A single expert's rows are known: they are on their way while its token is routed.
    if num_experts <= 1:
        _wait(ready, chunks)
    weight = tl.load(c + at + rows, mask=rows < total, other=0.0)
    sums = tl.sum(w.to(tl.float32) * weight.to(tl.float32)[:, None], 0)
    for begin in range(ROWS, total, ROWS):
        known = begin + rows < total
        if num_experts > 1:
            number = tl.load(numbers + at + begin + rows, mask=known, other=0)
        else:
            number = (begin + rows).to(tl.int32)
        w = tl.load(
            up + number.to(tl.int64)[:, None] * width + columns[None, :],
            mask=known[:, None] & inside[None, :],
            other=0.0,
        )
        weight = tl.load(c + at + begin + rows, mask=known, other=0.0)
        sums += tl.sum(w.to(tl.float32) * weight.to(tl.float32)[:, None], 0)
    tl.store(delta + token * out_width + start + columns, sums.to(dtype), mask=inside)


@triton.jit
def _expand_shared(
    delta, c, order, ready, row, header, first_token, count, site, offset, start, width, num_sites,
    chunks, c_width, out_width,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """`_expand_alone` for several tokens of one adapter, or of none, on the tensor cores."""
    dtype: tl.constexpr = delta.dtype.element_ty
    some = header != 0
    basis = tl.load(row + BASIS, mask=some, other=0)
    num_experts = tl.load(row + NUM_EXPERTS, mask=some, other=0)
    r = tl.load(row + RANK, mask=some, other=0)
    up = aligned(tl.load(row + UP, mask=some, other=0), dtype, ALIGNMENT)
    total = tl.where(basis != 0, num_experts * r, 0)
    index = tl.arange(0, TOKENS)
    mine = index < count
    tokens = tl.load(order + first_token + index, mask=mine, other=0)
    coordinates = c + (tokens * num_sites + site) * c_width
    columns = offset + tl.arange(0, COLUMNS)
    inside = columns < width
    rows = tl.arange(0, ROWS)
    w = tl.load(
        up + rows.to(tl.int64)[:, None] * width + columns[None, :],
        mask=(rows < total)[:, None] & inside[None, :],
        other=0.0,
    )
    if some:
        _wait(ready, count.to(tl.int32) * chunks)
    weights = tl.load(
        coordinates[:, None] + rows[None, :],
        mask=mine[:, None] & (rows < total)[None, :],
        other=0.0,
    )
    sums = tl.zeros((TOKENS, COLUMNS), tl.float32)
    sums = tl.dot(weights, w, sums, input_precision="ieee")
    for begin in range(ROWS, total, ROWS):
        known = begin + rows < total
        weights = tl.load(
            coordinates[:, None] + begin + rows[None, :],
            mask=mine[:, None] & known[None, :],
            other=0.0,
        )
        w = tl.load(
            up + (begin + rows).to(tl.int64)[:, None] * width + columns[None, :],
            mask=known[:, None] & inside[None, :],
            other=0.0,
        )
        sums = tl.dot(weights, w, sums, input_precision="ieee")
    tl.store(
        delta + tokens[:, None] * out_width + start + columns[None, :],
        sums.to(dtype),
        mask=mine[:, None] & inside[None, :],
    )


UNSPECIALIZED = ("first_site", "num_tokens", "num_sites", "max_blocks", "taken_stride")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def add_beside(
    x,
    delta,
    h,
    c,
    numbers,
    table,
    counters,
    taken,
    first_site,
    n,
    num_tokens,
    num_sites,
    max_blocks,
    h_width,
    c_width,
    taken_stride,
    out_width,
    width_0,
    width_1,
    width_2,
    TOKENS: tl.constexpr,
    READ_ROWS: tl.constexpr,
    PART: tl.constexpr,
    SHARED_PART: tl.constexpr,
    SHARED_STEP: tl.constexpr,
    PARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROUTE_ROWS: tl.constexpr,
    DIMS: tl.constexpr,
    ADD_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    SHARED_COLUMNS: tl.constexpr,
    COUNT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """delta = what each token's adapter adds to the group's base product, 0 where it has none."""
    program = tl.program_id(0)
    rows = table + NUM_TOTALS
    blocks = rows + NUM_ROWS * num_tokens
    alone_blocks = tl.load(table + ALONE_BLOCKS).to(tl.int32)
    shared_blocks = tl.load(table + SHARED_BLOCKS).to(tl.int32)
    num_routed = tl.load(table + ROUTED).to(tl.int32)
    alone_adds = tl.load(table + ALONE_ADDS).to(tl.int32)
    shared_adds = tl.load(table + SHARED_ADDS).to(tl.int32)
    vector: tl.constexpr = ALIGNMENT * 8 // delta.dtype.element_ty.primitive_bitwidth
    parts = tl.cdiv(n, PART)
    shared_parts = tl.cdiv(n, SHARED_PART)
    tiles = num_tiles(width_0, width_1, width_2, COLUMNS)
    shared_tiles = num_tiles(width_0, width_1, width_2, SHARED_COLUMNS)
    # Where each kind of program ends.
    reads = alone_blocks * num_sites * parts
    shared_reads = reads + shared_blocks * num_sites * shared_parts
    chunks = tl.cdiv(c_width, ROUTE_ROWS)
    routes = shared_reads + num_routed * num_sites * chunks
    expands = routes + alone_adds * tiles
    shared_expands = expands + shared_adds * shared_tiles
    order = rows + ORDER * num_tokens
    # Of each site: how many blocks of a read have arrived, how many tokens of an add are ready.
    counters += first_site.to(tl.int64) * (2 * num_tokens)
    if program < reads:
        alone_block = blocks + program // (num_sites * parts)
        alone_site = program // parts % num_sites
        _project_alone(
            x, h, tl.load(alone_block + BLOCK_HEADER * max_blocks),
            tl.load(alone_block + BLOCK_TOKEN * max_blocks),
            tl.load(alone_block + BLOCK_NUMBER * max_blocks), alone_site, program % parts,
            first_site, n, num_tokens, num_sites, h_width, READ_ROWS, PART, ALIGNMENT,
        )  # fmt: skip
        alone_read = tl.load(alone_block + BLOCK_READ * max_blocks)
        _arrive(counters + alone_site * 2 * num_tokens + alone_read)
    elif program < shared_reads:
        place = (program - reads) // shared_parts
        shared_block = blocks + alone_blocks + place // num_sites
        shared_site = place % num_sites
        _project_shared(
            x, h, order, tl.load(shared_block + BLOCK_HEADER * max_blocks),
            tl.load(shared_block + BLOCK_START * max_blocks),
            tl.load(shared_block + BLOCK_COUNT * max_blocks),
            tl.load(shared_block + BLOCK_NUMBER * max_blocks), shared_site,
            (program - reads) % shared_parts, first_site, n, num_tokens, num_sites, h_width,
            TOKENS, READ_ROWS, SHARED_STEP, SHARED_PART, ALIGNMENT,
        )  # fmt: skip
        shared_read = tl.load(shared_block + BLOCK_READ * max_blocks)
        _arrive(counters + shared_site * 2 * num_tokens + shared_read)
    elif program < routes:
        route = (program - shared_reads) // chunks
        routed = rows + route // num_sites
        route_site = route % num_sites
        route_header = tl.load(routed + ROUTE_HEADER * num_tokens)
        route_token = tl.load(routed + ROUTE_TOKEN * num_tokens)
        route_read = tl.load(routed + ROUTE_READ * num_tokens)
        shares = tl.load(routed + ROUTE_SHARES * num_tokens) != 0
        route_parts = tl.where(shares, shared_parts, parts)
        expected = tl.load(routed + ROUTE_BLOCKS * num_tokens).to(tl.int32) * route_parts
        route_add = tl.load(routed + ROUTE_ADD * num_tokens)
        alone = tl.load(routed + ROUTE_ALONE * num_tokens) != 0
        route_counters = counters + route_site * 2 * num_tokens
        _route(
            h, c, numbers, route_counters + route_read, expected, taken, route_token, route_site,
            (program - shared_reads) % chunks, header_row(route_header, first_site + route_site),
            route_parts, alone, num_tokens, num_sites, h_width, c_width, taken_stride,
            EXPERTS, ROUTE_ROWS, DIMS, PARTS, COUNT,
        )  # fmt: skip
        _arrive(route_counters + num_tokens + route_add)
    elif program < expands:
        alone_add = (program - routes) // tiles
        alone_header = tl.load(rows + ADD_HEADER * num_tokens + alone_add)
        site, offset, start, width = site_tile(
            (program - routes) % tiles, width_0, width_1, width_2, COLUMNS, vector
        )
        _expand_alone(
            delta, c, numbers, counters + (site * 2 + 1) * num_tokens + alone_add,
            header_row(alone_header, first_site + site),
            tl.load(rows + ADD_TOKEN * num_tokens + alone_add),
            site, offset, start, width, num_sites, chunks, c_width, out_width,
            ADD_ROWS, COLUMNS, ALIGNMENT,
        )  # fmt: skip
    elif program < shared_expands:
        add = alone_adds + (program - expands) // shared_tiles
        header = tl.load(rows + ADD_HEADER * num_tokens + add)
        to_site, to_offset, to_start, to_width = site_tile(
            (program - expands) % shared_tiles, width_0, width_1, width_2, SHARED_COLUMNS, vector
        )
        _expand_shared(
            delta, c, order, counters + (to_site * 2 + 1) * num_tokens + add,
            header_row(header, first_site + to_site), header,
            tl.load(rows + ADD_START * num_tokens + add),
            tl.load(rows + ADD_COUNT * num_tokens + add), to_site, to_offset, to_start, to_width,
            num_sites, chunks, c_width, out_width, TOKENS, SHARED_ROWS, SHARED_COLUMNS, ALIGNMENT,
        )  # fmt: skip


MAX_TOKENS = 512
"""Beyond that, adapters have many tokens each, and their bytes no longer count."""
_TOKENS = 16
"""Of those that share what is read: what a program takes together."""
_TOGETHER = 4
"""From this many on, they are cheaper together than each alone."""
_READ_ROWS = 16
_PART = 1024
"""Rows and columns of a basis that a program reads for one token."""
_SHARED_PART = 256
"""Columns for several; twice as many where there would be more parts than this."""
_MOST_PARTS = 32
_ROUTE_ROWS = 16
"""Rows of up-projections that a program weighs."""
_COLUMNS = 1024
_SHARED_COLUMNS = 128
"""Columns of up-projections that a program adds for one token, and for several."""
_CHUNK = 64
"""Products and weights lie in whole chunks, of several times _ROUTE_ROWS."""


@cache
def constants(n: int, num_experts: int, count: bool, alignment: int) -> dict[str, int | bool]:
    """What the kernel is compiled for."""
    return {
        "TOKENS": _TOKENS,
        "READ_ROWS": _READ_ROWS,
        "PART": _PART,
        "SHARED_PART": _shared_part(n),
        "SHARED_STEP": _SHARED_PART,
        "PARTS": triton.next_power_of_2(_max_parts(n)),
        "EXPERTS": triton.next_power_of_2(num_experts),
        "ROUTE_ROWS": _ROUTE_ROWS,
        "DIMS": 64,
        "ADD_ROWS": 16,
        "COLUMNS": _COLUMNS,
        "SHARED_ROWS": 32,
        "SHARED_COLUMNS": _SHARED_COLUMNS,
        "COUNT": count,
        "ALIGNMENT": alignment,
    }


def _shared_part(n: int) -> int:
    return _SHARED_PART if n <= _MOST_PARTS * _SHARED_PART else 2 * _SHARED_PART


@cache
def _divisions(group: Group) -> tuple[int, int, int, int]:
    """Of the group's inputs into parts, for one token and for several, and of its outputs into
    tiles, likewise.
    """
    n = group.in_features
    tiles, shared_tiles = (
        sum(triton.cdiv(width, columns) for width in site_widths(group))
        for columns in (_COLUMNS, _SHARED_COLUMNS)
    )
    return triton.cdiv(n, _PART), triton.cdiv(n, _shared_part(n)), tiles, shared_tiles


@cache
def _max_parts(n: int) -> int:
    return max(triton.cdiv(n, _PART), triton.cdiv(n, _shared_part(n)))


class SmallBatchPlan:
    """The adapters of up to MAX_TOKENS tokens, made beside the base products.

    A plan may be loaded again with another mix of as many tokens; one for any mix, also after its
    kernels were captured in a graph.
    """

    separate = True

    def __init__(self, num_tokens: int, adapters: ResidentAdapters, any_mix: bool = False) -> None:
        """any_mix: launch as many programs as any mix may need, not just the one loaded."""
        self.routing: Routing | None = None
        self.num_tokens = num_tokens
        self._any_mix = any_mix
        self._totals: list[int] = []
        device = adapters.device
        self._sizes = adapters.sizes
        self._max_blocks = num_tokens * (
            triton.cdiv(self._sizes.basis_dim, _READ_ROWS)
            + triton.cdiv(self._sizes.num_experts, _READ_ROWS)
        )
        length = (
            NUM_TOTALS.value + NUM_ROWS.value * num_tokens + NUM_BLOCK_ROWS.value * self._max_blocks
        )
        self._table = torch.zeros(length, dtype=torch.int64, device=device)
        self._counters = torch.zeros(
            (len(adapters.paths), 2, num_tokens), dtype=torch.int32, device=device
        )
        self._dtype = adapters.dtype
        self._scratch: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._stream = side_stream(device) if device.type == "cuda" else None

    def load(self, runs: Sequence[Run]) -> None:
        """Set which tokens are whose."""
        table = plan_table(runs, self.num_tokens, self._max_blocks)
        self._totals = table[: NUM_TOTALS.value - 1].tolist()
        host = torch.from_numpy(table)
        if self._stream is not None:
            host = host.pin_memory()
        self._table.copy_(host, non_blocking=True)

    def start(self) -> None:
        """Forget what arrived in the last step."""
        self._counters.zero_()

    def apply(self, x: Tensor, group: Group, base: BaseProduct) -> tuple[Tensor, Tensor]:
        """The base product, and what adapters add to it, zeros for tokens without any.

        x: (T, n), contiguous, of the adapters' dtype. Both (T, m).
        """
        delta = torch.empty((len(x), sum(site_widths(group))), dtype=x.dtype, device=x.device)
        if self._stream is None:
            self._add(x, delta, group)
            return base(product.linear), delta
        self._stream.wait_stream(torch.cuda.current_stream())
        # The product first: programs of a launch wait until all of the one before have begun, and
        # its are few, and leave room.
        out = base(product.linear)
        with torch.cuda.stream(self._stream):
            self._add(x, delta, group)
        torch.cuda.current_stream().wait_stream(self._stream)
        return out, delta

    def _add(self, x: Tensor, delta: Tensor, group: Group) -> None:
        n, sites, tokens = x.shape[1], len(group.sites), self.num_tokens
        h, c, numbers = self._buffers(x, _max_parts(n), sites)
        widths = site_widths(group)
        taken = None if self.routing is None else self.routing.gates[:, group.layer]
        add_beside[(self._num_programs(group, c.shape[-1] // _ROUTE_ROWS),)](
            x,
            delta,
            h,
            c,
            numbers,
            self._table,
            self._counters,
            h if taken is None else taken,
            group.first_site,
            n,
            tokens,
            sites,
            self._max_blocks,
            h.shape[-1],
            c.shape[-1],
            0 if taken is None else taken.stride(0),
            delta.shape[1],
            *widths,
            **constants(
                n, self._sizes.num_experts, taken is not None, alignment(group, x.itemsize)
            ),
            num_warps=4,
            num_stages=1,
        )

    def _num_programs(self, group: Group, chunks: int) -> int:
        sites = len(group.sites)
        parts, shared_parts, tiles, shared_tiles = _divisions(group)
        if not self._any_mix:
            blocks, shared_blocks, routed, adds, shared_adds = self._totals
            reads = (blocks * parts + shared_blocks * shared_parts) * sites
            return reads + routed * sites * chunks + adds * tiles + shared_adds * shared_tiles
        # What is shared has _TOGETHER tokens or more, but for one item of tokens without adapter.
        return (
            self._max_blocks * sites * max(parts, -(-shared_parts // _TOGETHER))
            + self.num_tokens * sites * chunks
            + self.num_tokens * max(tiles, -(-shared_tiles // _TOGETHER))
            + shared_tiles
        )

    def _buffers(self, x: Tensor, parts: int, sites: int) -> tuple[Tensor, Tensor, Tensor]:
        """What programs hand on, for S sites.

        (parts, T, S, reads) float32, products with the input; (T, S, rows), weights of the
        up-projections' rows, in the adapters' dtype; the same int32, which rows those are, where
        the token is alone.
        """
        if (parts, sites) not in self._scratch:
            reads, rows = (
                -(-n // _CHUNK) * _CHUNK
                for n in (self._sizes.basis_dim + self._sizes.num_experts, self._sizes.rows)
            )
            tokens, device = self.num_tokens, x.device
            self._scratch[parts, sites] = (
                torch.empty((parts, tokens, sites, reads), dtype=torch.float32, device=device),
                torch.empty((tokens, sites, rows), dtype=self._dtype, device=device),
                torch.empty((tokens, sites, rows), dtype=torch.int32, device=device),
            )
        return self._scratch[parts, sites]


def _num_blocks(adapter: ResidentAdapter) -> int:
    """Blocks of rows to read of the largest of its linears."""
    return max(-(-d // _READ_ROWS) - (-routed // _READ_ROWS) for d, routed in adapter.reads)


def plan_table(runs: Sequence[Run], num_tokens: int, max_blocks: int) -> NDArray[np.int64]:
    """A plan's table: its totals, its rows of `num_tokens`, and those of `max_blocks`.

    Tokens are ordered by what they read, then by adapter; those without one come last. A read is
    some of them that read the same, an add some of one adapter, or without any: its start in that
    order, its count, its first token, and the header of its adapter, or of one of them.
    """
    table = np.zeros(
        NUM_TOTALS.value + NUM_ROWS.value * num_tokens + NUM_BLOCK_ROWS.value * max_blocks, np.int64
    )
    rows = table[NUM_TOTALS.value :][: NUM_ROWS.value * num_tokens].reshape(-1, num_tokens)
    order = rows[ORDER.value]
    # Of one token each, and of several.
    blocks: tuple[list[tuple[int, ...]], ...] = ([], [])
    adds: tuple[list[tuple[int, ...]], ...] = ([], [])
    num_reads = position = 0
    shared_adds: list[tuple[int, int]] = []
    for adapters in by_reader(runs):
        first = position
        for adapter, tokens in adapters.items():
            begin, position = position, position + len(tokens)
            order[begin:position] = tokens
            header = adapter.headers.data_ptr()
            rows[ROUTE_HEADER.value, begin:position] = header
            for start, count in _pieces(begin, position):
                shares = count > 1
                if shares:
                    shared_adds.append((start, count))
                rows[ROUTE_ALONE.value, start : start + count] = not shares
                rows[ROUTE_ADD.value, start : start + count] = len(adds[shares])
                adds[shares].append((header, start, count, order[start]))
        num_blocks = _num_blocks(adapter)
        rows[ROUTE_BLOCKS.value, first:position] = num_blocks
        for start, count in _pieces(first, position):
            shares = count > 1
            rows[ROUTE_SHARES.value, start : start + count] = shares
            rows[ROUTE_READ.value, start : start + count] = num_reads
            blocks[shares].extend(
                (header, start, count, order[start], num_reads, block)
                for block in range(num_blocks)
            )
            num_reads += 1
    for start, count in shared_adds:  # which come after all that are alone
        rows[ROUTE_ADD.value, start : start + count] += len(adds[0])
    order[position:] = np.setdiff1d(np.arange(num_tokens), order[:position], assume_unique=True)
    for start in range(position, num_tokens, _TOKENS):
        adds[1].append((0, start, min(_TOKENS, num_tokens - start), order[start]))
    table[: NUM_TOTALS.value - 1] = *map(len, blocks), position, *map(len, adds)
    _fill(rows[ADD_HEADER.value : ADD_TOKEN.value + 1], [*adds[0], *adds[1]])
    _fill(
        table[-NUM_BLOCK_ROWS.value * max_blocks :].reshape(-1, max_blocks),
        [*blocks[0], *blocks[1]],
    )
    return table


def _fill(rows: NDArray[np.int64], records: list[tuple[int, ...]]) -> None:
    if records:
        rows[:, : len(records)] = np.array(records, np.int64).T


def _pieces(start: int, stop: int) -> list[tuple[int, int]]:
    """The starts and counts of what is computed at once of [start, stop)."""
    size = _TOKENS if stop - start >= _TOGETHER else 1
    return [(i, min(size, stop - i)) for i in range(start, stop, size)]
