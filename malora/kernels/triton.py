"""The adapters of a large batch on a GPU: each read where it lies, through its header's address.

Three kernels a group of linears. `project` reads bases and routers: the products with the input
of rows that several tokens share are made together, on the tensor cores. `route` turns products
into gates and weighted expert coordinates. These two need the input alone, and run on a stream of
their own beside the base product. `expand` then adds the experts' up-projections to it, for
tokens of one adapter together; of an MLP's gate and up, the largest of outputs, `activate` does so
where it reads them for the activation. Which tokens a program takes lies in a table in device
memory.

An adapter costs its own bytes at its own sizes: no padding, no slots, no copies.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
    header_row,
    header_size,
    row_length,
    site_tile,
)

# The rows of a plan's table (`large_batch.py`), each as long as the batch.
ORDER, READ_START, READ_COUNT, READ_HEADER, ADD_START, ADD_COUNT, ADD_HEADER = (
    tl.constexpr(i) for i in range(7)
)
NUM_TABLE_ROWS = 7


# What differs from batch to batch or from layer to layer: a kernel for each kind of number would
# be compiled when it is first met, while everybody waits.
_UNSPECIALIZED = (
    "first_site", "num_tokens", "num_sites", "taken_stride", "blocks", "parts", "part_steps",
)  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def project(
    x,
    h,
    table,
    first_site,
    n,
    num_tokens,
    h_width,
    blocks,
    part_steps,
    SITES: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """h[part, token, site, row] = (basis; router)[row] · x[token], over a part of the columns.

    A block has rows of several sites, so that they read the input once.
    """
    # Blocks first: those of the same tokens run together, and find the input in the cache.
    part = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    item = tl.program_id(1)
    header = tl.load(table + READ_HEADER * num_tokens + item)
    if header == 0:
        return
    dtype: tl.constexpr = x.dtype.element_ty
    row_bytes = n.to(tl.int64) * (dtype.primitive_bitwidth // 8)
    # Of each site its basis' rows, then its router's, where that reads the input.
    number = block * ROWS + tl.arange(0, ROWS)
    addresses = tl.zeros((ROWS,), tl.int64)
    to = tl.zeros((ROWS,), tl.int32)
    first = tl.zeros((), tl.int64)
    for site in tl.static_range(SITES):
        row = header_row(header, first_site + site)
        basis = tl.load(row + BASIS)
        router = tl.load(row + ROUTER)
        reads_input = (basis != 0) & (router != 0) & (tl.load(row + READS_BASIS) == 0)
        d = tl.where(basis != 0, tl.load(row + BASIS_DIM), 0)
        end = first + d + tl.where(reads_input, tl.load(row + NUM_EXPERTS), 0)
        local = number - first
        address = tl.where(local < d, basis + local * row_bytes, router + (local - d) * row_bytes)
        mine = (number >= first) & (number < end)
        addresses = tl.where(mine, address, addresses)
        to = tl.where(mine, site * h_width + local.to(tl.int32), to)
        first = end
    if block * ROWS >= first:
        return
    known = number < first
    weights = tl.multiple_of(addresses.to(tl.pointer_type(dtype)), [ALIGNMENT])
    count = tl.load(table + READ_COUNT * num_tokens + item)
    start = tl.load(table + READ_START * num_tokens + item)
    index = tl.arange(0, TOKENS)
    mine = index < count
    tokens = tl.load(table + ORDER * num_tokens + start + index, mask=mine, other=0)
    sums = tl.zeros((TOKENS, ROWS), tl.float32)
    stop = tl.minimum(tl.cdiv(n, COLUMNS), part * part_steps + part_steps)
    for step in range(part * part_steps, stop):
        columns = step * COLUMNS + tl.arange(0, COLUMNS)
        w = tl.load(
            weights[:, None] + columns[None, :],
            mask=known[:, None] & (columns < n)[None, :],
            other=0.0,
        )
        v = tl.load(
            x + tokens[:, None] * n + columns[None, :],
            mask=mine[:, None] & (columns < n)[None, :],
            other=0.0,
        )
        sums = tl.dot(v, tl.trans(w), sums, input_precision="ieee")
    at = (part * num_tokens + tokens) * SITES * h_width
    tl.store(h + at[:, None] + to[None, :], sums, mask=mine[:, None] & known[None, :])


@triton.jit
def _added_tokens(table, num_tokens, item, first, TOKENS: tl.constexpr):
    """The tokens of an item, from one on, and which of them there are."""
    index = first + tl.arange(0, TOKENS)
    mine = index < tl.load(table + ADD_COUNT * num_tokens + item)
    start = tl.load(table + ADD_START * num_tokens + item)
    return tl.load(table + ORDER * num_tokens + start + index, mask=mine, other=0), mine


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def route(
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
):
    """The weights of tokens' up-projection rows: gate of the row's expert · the coordinate."""
    item = tl.program_id(0)
    site = tl.program_id(1)
    first_index = tl.program_id(2) * TOKENS
    header = tl.load(table + ADD_HEADER * num_tokens + item)
    if (header == 0) | (first_index >= tl.load(table + ADD_COUNT * num_tokens + item)):
        return
    row = header_row(header, first_site + site)
    if tl.load(row + BASIS) == 0:
        return
    count = header_size(row, NUM_EXPERTS)
    top_k = header_size(row, TOP_K)
    r = header_size(row, RANK)
    d = header_size(row, BASIS_DIM)
    length = row_length(d)
    stride = header_size(row, STRIDE)
    dtype: tl.constexpr = c.dtype.element_ty
    router = tl.load(row + ROUTER).to(tl.pointer_type(dtype))
    coefficients = tl.load(row + COEFFICIENTS).to(tl.pointer_type(dtype))
    has_coefficients = tl.load(row + COEFFICIENTS) != 0
    tokens, mine = _added_tokens(table, num_tokens, item, first_index, TOKENS)
    at = (tokens * num_sites + site)[:, None]
    part_stride = num_tokens.to(tl.int64) * num_sites * h_width
    # Parts are summed once, where the first one lies.
    width = d + tl.where(
        (count > 1) & (tl.load(row + READS_BASIS) == 0), count, tl.zeros_like(count)
    )
    width = tl.where(parts > 1, width, 0)
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
                    router + experts[None, :] * length + begin + dims[:, None],
                    mask=(experts < count)[None, :] & inside[:, None],
                    other=0.0,
                )
                v = tl.load(
                    h + at * h_width + begin + dims[None, :],
                    mask=mine[:, None] & inside[None, :],
                    other=0.0,
                )
                logits = tl.dot(v, w.to(tl.float32), logits, input_precision="tf32x3")
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
    if (taken_stride != 0) & (count > 1):
        to = taken + tokens[:, None] * taken_stride + experts[None, :]
        tl.atomic_add(to, gates, mask=mine[:, None] & (experts < count)[None, :])

    for first in range(0, count * r, ROWS):
        rows = first + tl.arange(0, ROWS)
        expert = rows // r
        same = (expert[None, :] == experts[:, None]).to(tl.float32)
        gate = tl.dot(gates, same, input_precision="tf32x3")
        known = (rows < count * r)[None, :] & mine[:, None]
        if has_coefficients:
            coordinates = tl.zeros((TOKENS, ROWS), tl.float32)
            for begin in range(0, d, DIMS):
                inside = begin + dims < d
                p = tl.load(
                    coefficients + rows[None, :] * length + begin + dims[:, None],
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
def _up_projections(header, site, dtype: tl.constexpr, ALIGNMENT: tl.constexpr):
    """A site's up-projections and how many rows they have: none without an adapter, or where it
    does not adapt the site.
    """
    row = header_row(header, site)
    has = header != 0
    up = tl.load(row + UP, mask=has, other=0)
    total = tl.load(row + NUM_EXPERTS, mask=has, other=0) * tl.load(row + RANK, mask=has, other=0)
    known = tl.load(row + BASIS, mask=has, other=0) != 0
    return aligned(up, dtype, ALIGNMENT), tl.where(known, total, 0)


@triton.jit
def _weights(c, at, c_width, mine, first, total, ROWS: tl.constexpr):
    """(tokens, ROWS) that `route` left, from a row on; beyond the last one it left zeros."""
    places = c + at[:, None] * c_width + first + tl.arange(0, ROWS)[None, :]
    return tl.load(places, mask=(tl.where(mine, total, 0) > first)[:, None], other=0.0)


@triton.jit
def _up_rows(up, columns, width, first, total, ROWS: tl.constexpr):
    """(ROWS, columns) of up-projections, from a row on."""
    rows = first + tl.arange(0, ROWS)
    places = up + rows.to(tl.int64)[:, None] * width + columns[None, :]
    mask = (rows < total)[:, None] & (columns < width)[None, :]
    return tl.load(places, mask=mask, other=0.0)


@triton.jit
def _add_rows(
    sums, weights, up, c, at, c_width, mine, columns, width, total,
    ROWS: tl.constexpr, MORE_ROWS: tl.constexpr,
):  # fmt: skip
    """sums[token, column] + Σ weight · row; weights: those of the first ROWS rows."""
    sums = tl.dot(
        weights, _up_rows(up, columns, width, 0, total, ROWS), sums, input_precision="ieee"
    )
    if MORE_ROWS:
        for first in range(ROWS, total, ROWS):
            more = _weights(c, at, c_width, mine, first, total, ROWS)
            rows = _up_rows(up, columns, width, first, total, ROWS)
            sums = tl.dot(more, rows, sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def expand(
    out,
    c,
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
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
    MORE_ROWS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """out[token, the span's columns] += Σ weight · row, for tokens of one adapter."""
    span = tl.program_id(0)
    item = tl.program_id(1)
    dtype: tl.constexpr = out.dtype.element_ty
    vector: tl.constexpr = ALIGNMENT * 8 // dtype.primitive_bitwidth
    site, offset, start, width = site_tile(span, width_0, width_1, width_2, SPAN, vector)
    header = tl.load(table + ADD_HEADER * num_tokens + item)
    up, total = _up_projections(header, first_site + site, dtype, ALIGNMENT)
    if total == 0:
        return
    tokens, mine = _added_tokens(table, num_tokens, item, 0, TOKENS)
    at = tokens * num_sites + site
    weights = _weights(c, at, c_width, mine, 0, total, ROWS)
    end = tl.minimum(offset + SPAN, width)
    for begin in tl.range(offset, end, COLUMNS, num_stages=STAGES):
        columns = begin + tl.arange(0, COLUMNS)
        places = out + tokens[:, None] * out_width + start + columns[None, :]
        mask = mine[:, None] & (columns < width)[None, :]
        sums = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        sums = _add_rows(
            sums, weights, up, c, at, c_width, mine, columns, width, total, ROWS, MORE_ROWS
        )
        tl.store(places, sums.to(dtype), mask=mask)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def activate(
    out,
    activated,
    c,
    table,
    first_site,
    width,
    num_tokens,
    c_width,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
    MORE_ROWS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """activated = silu(gate) · up, of out = (gate, up) with what adapters add to either."""
    span = tl.program_id(0)
    item = tl.program_id(1)
    dtype: tl.constexpr = out.dtype.element_ty
    if tl.load(table + ADD_COUNT * num_tokens + item) == 0:
        return
    header = tl.load(table + ADD_HEADER * num_tokens + item)
    of_gate, gate_total = _up_projections(header, first_site, dtype, ALIGNMENT)
    of_up, up_total = _up_projections(header, first_site + 1, dtype, ALIGNMENT)
    tokens, mine = _added_tokens(table, num_tokens, item, 0, TOKENS)
    at = tokens * 2
    gate_weights = _weights(c, at, c_width, mine, 0, gate_total, ROWS)
    up_weights = _weights(c, at + 1, c_width, mine, 0, up_total, ROWS)
    end = tl.minimum(span * SPAN + SPAN, width)
    for begin in tl.range(span * SPAN, end, COLUMNS, num_stages=STAGES):
        columns = begin + tl.arange(0, COLUMNS)
        mask = mine[:, None] & (columns < width)[None, :]
        places = out + tokens[:, None] * (2 * width) + columns[None, :]
        gate = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(places + width, mask=mask, other=0.0).to(tl.float32)
        gate = _add_rows(
            gate, gate_weights, of_gate, c, at, c_width, mine, columns, width, gate_total,
            ROWS, MORE_ROWS,
        )  # fmt: skip
        up = _add_rows(
            up, up_weights, of_up, c, at + 1, c_width, mine, columns, width, up_total,
            ROWS, MORE_ROWS,
        )  # fmt: skip
        values = gate * tl.sigmoid(gate) * up
        to = activated + tokens[:, None] * width + columns[None, :]
        tl.store(to, values.to(dtype), mask=mask)
