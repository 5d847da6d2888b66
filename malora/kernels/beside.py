"""What adapters add to a small batch's base products, made beside them by one kernel a group.

The kernel's programs are of three kinds, which wait for one another in that order. Those that
project read a block of a basis' or a router's rows, for the tokens that share them; what most
tokens share is read by programs of the base product (`product.py`). Those that route turn a token's
products into gates and weighted expert coordinates, once all its blocks have come; a single
expert's are what they are. Those that expand set some outputs, of one token or of tokens of one
adapter, once these are known. A program waits for the product's, which began before, and for those
of a lower number, and a GPU starts programs in the order of their numbers: so somebody always goes
on. All need the group's input alone, and none the base product's outputs: these are made meanwhile,
and the two are added by whoever reads them.

Which program does what lies in a table in device memory (`small_batch.py`), so that a captured
graph stays right for every mix of adapters; programs beyond the mix's work end at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

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
    num_tiles,
    row_length,
    site_tile,
)

# A table's first numbers: how many blocks are read and adds made, for one token and for several
# together, and how many tokens are routed.
ALONE_BLOCKS, SHARED_BLOCKS, ROUTED, ALONE_ADDS, SHARED_ADDS = (tl.constexpr(i) for i in range(5))
# Then of the common read, which most tokens share and the base product may make: how many of the
# shared blocks are its, the last ones; its tokens in order; a header; the read of its first block.
COMMON_BLOCKS, COMMON_START, COMMON_COUNT, COMMON_HEADER, COMMON_READ = (
    tl.constexpr(i) for i in range(5, 10)
)
NUM_TOTALS = tl.constexpr(10)
# Its rows as long as the batch: of routed tokens, then of adds, then of all tokens in order.
(
    ROUTE_HEADER, ROUTE_TOKEN, ROUTE_READ, ROUTE_BLOCKS, ROUTE_SHARES, ROUTE_ADD, ROUTE_ALONE,
    ADD_HEADER, ADD_START, ADD_COUNT, ADD_TOKEN, ADD_READ, ADD_BLOCKS,
) = (tl.constexpr(i) for i in range(13))  # fmt: skip
ORDER = ROUTE_TOKEN
NUM_ROWS = tl.constexpr(13)
# Then its rows as long as the longest list of blocks.
BLOCK_HEADER, BLOCK_START, BLOCK_COUNT, BLOCK_TOKEN, BLOCK_READ, BLOCK_NUMBER = (
    tl.constexpr(i) for i in range(6)
)
NUM_BLOCK_ROWS = tl.constexpr(6)
# With whom a routed token shares what it reads: nobody, some others, those of the common read.
ALONE, TOGETHER, IN_COMMON = (tl.constexpr(i) for i in range(3))


@triton.jit
def _wait(counter, expected):
    """Until so many have arrived; what they stored before can be read then."""
    seen = tl.atomic_add(counter, 0, sem="acquire")
    while seen < expected:
        seen = tl.atomic_add(counter, 0, sem="acquire")


@triton.jit
def arrive(counter):
    """Once the program has stored all that whoever waits for it reads."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def rows_to_read(header, site, rows, n, some, dtype: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Rows of a basis, and then of a router that reads the input: an address, where each begins
    from there, in elements, and how many there are: none unless `some`, or where the adapter does
    not adapt the site. Rows beyond the last one begin where that does.
    """
    vector: tl.constexpr = ALIGNMENT * 8 // dtype.primitive_bitwidth
    row = header_row(header, site)
    basis = tl.load(row + BASIS, mask=some, other=0)
    router = tl.load(row + ROUTER, mask=some, other=0)
    d = tl.load(row + BASIS_DIM, mask=some, other=0)
    num_experts = tl.load(row + NUM_EXPERTS, mask=some, other=0)
    reads_input = (router != 0) & (tl.load(row + READS_BASIS, mask=some, other=0) == 0)
    total = tl.where(basis != 0, d + tl.where(reads_input, num_experts, 0), 0)
    # From the row after the basis' last one to the router's first, in elements.
    apart = tl.multiple_of((router - basis) // (dtype.primitive_bitwidth // 8), vector) - d * n
    rows = tl.minimum(rows, tl.maximum(total - 1, 0))
    # A product, not a choice, of which the compiler would know no alignment.
    return basis, rows * n + (rows >= d).to(tl.int64) * apart, total


@triton.jit
def _project_alone(
    x, h, header, token, block, site, part, first_site, n, num_tokens, num_sites, h_width,
    ROWS: tl.constexpr, PART: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """h[part, token, site, row] = (basis; router)[row] · x[token], over the part's columns."""
    rows = block * ROWS + tl.arange(0, ROWS)
    address, begins, total = rows_to_read(
        header, first_site + site, rows, n, True, x.dtype.element_ty, ALIGNMENT
    )
    weights = aligned(address, x.dtype.element_ty, ALIGNMENT) + begins
    if block * ROWS < total:
        columns = part * PART + tl.arange(0, PART)
        w = tl.load(
            weights[:, None] + columns[None, :],
            mask=(rows < total)[:, None] & (columns < n)[None, :],
            other=0.0,
        )
        v = tl.load(x + token * n + columns, mask=columns < n, other=0.0).to(tl.float32)
        at = ((part * num_tokens + token) * num_sites + site) * h_width
        tl.store(h + at + rows, tl.sum(w.to(tl.float32) * v[None, :], 1), mask=rows < total)


@triton.jit
def _project_shared(
    x, h, order, header, start, count, block, site, part, first_site, n, num_tokens, num_sites,
    h_width, width,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """`_project_alone` for several tokens, on the tensor cores. width: columns of a part."""
    rows = block * ROWS + tl.arange(0, ROWS)
    address, begins, total = rows_to_read(
        header, first_site + site, rows, n, True, x.dtype.element_ty, ALIGNMENT
    )
    weights = aligned(address, x.dtype.element_ty, ALIGNMENT) + begins
    if block * ROWS < total:
        index = tl.arange(0, TOKENS)
        mine = index < count
        tokens = tl.load(order + start + index, mask=mine, other=0).to(tl.int32)
        sums = tl.zeros((TOKENS, ROWS), tl.float32)
        for begin in range(part * width, tl.minimum(n, part * width + width), COLUMNS):
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
        at = ((part * num_tokens + tokens) * num_sites + site) * h_width
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
def _spread(values, N: tl.constexpr):
    """N values as they are, up to 32 of them in every warp: what is made of them takes no exchange
    between warps. To the compiler it is an order, where it would let all that follows lie as the
    sums before.
    """
    return tl.gather(values, tl.arange(0, N), 0)


@triton.jit
def _matrix(values, rows, count, length, columns):
    """Some rows and columns of a matrix of `count` rows, each `length` long; 0 beyond them."""
    return tl.load(
        values + rows[:, None] * length + columns[None, :],
        mask=(rows < count)[:, None] & (columns < length)[None, :],
        other=0.0,
    )


@triton.jit
def _terms(weights, products, inside):
    """weights · products, (ROWS, DIMS) · (DIMS,): to be summed over the dimensions.

    What is not inside may be anything. And each product must be rounded before it is added to one
    of another thread: a compiler that fuses the two makes threads' sums differ, where all of them
    should have the same, and then an expert's logit is greater than itself.
    """
    return tl.where(inside[None, :], weights.to(tl.float32) * products[None, :], 0.0)


@triton.jit
def _times_products(
    first, v, values, rows, count, z, part_stride, parts, d,
    DIMS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """(ROWS,): a matrix over the basis' dimensions times a token's products with these.

    first, v: (ROWS, DIMS) of the one and (DIMS,) of the others, of the first dimensions.
    """
    length = row_length(d)
    dims = tl.arange(0, DIMS)
    sums = tl.sum(_terms(first, v, dims < d), 1)
    for begin in range(DIMS, d, DIMS):
        more = begin + dims
        matrix = _matrix(values, rows, count, length, more)
        u = _spread(_products(z, part_stride, parts, more, more < length, PARTS), DIMS)
        sums += tl.sum(_terms(matrix, u, more < d), 1)
    return sums


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
    count = header_size(row, NUM_EXPERTS)
    top_k = header_size(row, TOP_K)
    r = header_size(row, RANK)
    d = header_size(row, BASIS_DIM)
    length = row_length(d)
    stride = header_size(row, STRIDE)
    router_address = tl.load(row + ROUTER)
    reads_basis = (tl.load(row + READS_BASIS) != 0) & (router_address != 0)
    dtype: tl.constexpr = c.dtype.element_ty
    # As all tensors lie, and rows of `length`.
    router = aligned(router_address, dtype, 16)
    coefficients = aligned(tl.load(row + COEFFICIENTS), dtype, 16)
    has_coefficients = tl.load(row + COEFFICIENTS) != 0
    total = tl.where(basis != 0, count * r, 0)
    rows = chunk * ROWS + tl.arange(0, ROWS)
    if chunk * ROWS < total:
        experts = tl.arange(0, EXPERTS)
        dims = tl.arange(0, DIMS)
        routed = tl.where(reads_basis, count, 0)
        mixed = tl.where(has_coefficients, total, 0)
        # Before the products are there, and all that most adapters have: a wait for memory costs
        # more than these few bytes.
        w = _matrix(router, experts, routed, length, dims)
        p = _matrix(coefficients, rows, mixed, length, dims)
        _wait(arrived, expected)
        at = token * num_sites + site
        z = h + at * h_width
        part_stride = num_tokens * num_sites * h_width
        v = _spread(_products(z, part_stride, parts, dims, dims < length, PARTS), DIMS)
        logits = tl.zeros((EXPERTS,), tl.float32)
        if count > 1:
            if reads_basis:
                sums = _times_products(
                    w, v, router, experts, routed, z, part_stride, parts, d, DIMS, PARTS
                )
                logits = _spread(sums, EXPERTS)
            else:
                sums = _products(z, part_stride, parts, d + experts, experts < count, PARTS)
                logits = _spread(sums, EXPERTS)
        logits = tl.where(experts < count, logits, float("-inf"))
        rank = tl.zeros((EXPERTS,), tl.int32)
        for other in tl.static_range(EXPERTS):
            its = tl.gather(logits, tl.full((EXPERTS,), other, tl.int32), 0)
            before = (its > logits) | ((its == logits) & (other < experts))
            rank += before.to(tl.int32)
        # Renormalised top-k of a softmax is the softmax of the top-k logits.
        weights = tl.where(rank < top_k, tl.exp(logits - tl.max(logits, 0)), 0.0)
        gates = weights / tl.sum(weights, 0)
        if COUNT:  # noqa: SIM102 - a constant of the compilation
            if (count > 1) & (chunk == 0):
                tl.atomic_add(taken + token * taken_stride + experts, gates, mask=experts < count)
        expert = tl.minimum(rows // r, EXPERTS - 1)
        gate = tl.gather(gates, expert, 0)
        place = tl.gather(rank, expert, 0)
        needed = (rows < total) & (place < top_k)
        if has_coefficients:
            sums = _times_products(
                p, v, coefficients, rows, mixed, z, part_stride, parts, d, DIMS, PARTS
            )
            coordinates = _spread(sums, ROWS)
        else:
            source = expert * stride + rows % r
            sums = _products(z, part_stride, parts, source, needed, PARTS)
            coordinates = _spread(sums, ROWS)
        weighted = tl.where(needed, gate * coordinates, 0.0).to(dtype)
        if alone:
            compact = at * c_width + place * r + rows % r
            tl.store(c + compact, weighted, mask=needed)
            tl.store(numbers + compact, rows.to(tl.int32), mask=needed)
        else:
            tl.store(c + at * c_width + rows, weighted, mask=rows < total)


@triton.jit
def _weights(c, h, part_stride, parts, at, read_at, rows, total, routed, PARTS: tl.constexpr):
    """A token's weights of up-projection rows: as routed, or the products of a single expert."""
    known = rows < total
    if routed:
        weights = tl.load(c + at + rows, mask=known, other=0.0).to(tl.float32)
    else:
        weights = _products(h + read_at, part_stride, parts, rows, known, PARTS)
    return weights


@triton.jit
def _expand_alone(
    delta, h, c, numbers, counter, expected, routed, row, token, site, offset, start, width, parts,
    num_tokens, num_sites, h_width, c_width, out_width,
    WEIGHTS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, COLUMNS: tl.constexpr,
    PARTS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """delta[token, the tile's columns] = Σ weight · row.

    counter, expected: when the weights are there; routed: or what they are the sums of, for an
    adapter without routes.
    """
    dtype: tl.constexpr = delta.dtype.element_ty
    basis = tl.load(row + BASIS)
    num_experts = header_size(row, NUM_EXPERTS)
    top_k = header_size(row, TOP_K)
    r = header_size(row, RANK)
    up = aligned(tl.load(row + UP), dtype, ALIGNMENT)
    total = tl.where(basis != 0, top_k * r, 0)
    at = (token * num_sites + site) * c_width
    read_at = (token * num_sites + site) * h_width
    part_stride = num_tokens * num_sites * h_width
    columns = offset + tl.arange(0, COLUMNS)
    inside = columns < width
    rows = tl.arange(0, ROWS)
    some = tl.arange(0, WEIGHTS)
    sums = tl.zeros((COLUMNS,), tl.float32)
    # Weights and numbers of rows are read once for several steps.
    for first in range(0, total, WEIGHTS):
        number = first + some
        if num_experts > 1:
            if first == 0:
                _wait(counter, expected)
            number = tl.load(numbers + at + number, mask=number < total, other=0)
        weights = tl.zeros((WEIGHTS,), tl.float32)
        for begin in tl.range(0, tl.minimum(total - first, WEIGHTS), ROWS, num_stages=STAGES):
            step = begin + rows
            w = tl.load(
                up + tl.gather(number, step, 0).to(tl.int64)[:, None] * width + columns[None, :],
                mask=(first + step < total)[:, None] & inside[None, :],
                other=0.0,
            )
            if begin == 0:
                # A single expert's rows are known: some are on their way while it is routed.
                if num_experts <= 1:
                    _wait(counter, expected)
                weights = _weights(
                    c, h, part_stride, parts, at, read_at, first + some, total, routed, PARTS
                )
            sums += tl.sum(w.to(tl.float32) * tl.gather(weights, step, 0)[:, None], 0)
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
    tokens = tl.load(order + first_token + index, mask=mine, other=0).to(tl.int32)
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


# What differs from batch to batch or from group to group, so that no kernel is compiled for it.
UNSPECIALIZED = (
    "first_site", "num_tokens", "num_sites", "max_blocks", "taken_stride", "common_parts",
    "common_tiles",
)  # fmt: skip


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
    shared_part,
    common_parts,
    common_tiles,
    TOKENS: tl.constexpr,
    READ_ROWS: tl.constexpr,
    PART: tl.constexpr,
    SHARED_STEP: tl.constexpr,
    PARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROUTE_ROWS: tl.constexpr,
    DIMS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ADD_ROWS: tl.constexpr,
    ADD_STAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    SHARED_COLUMNS: tl.constexpr,
    COUNT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BEHIND: tl.constexpr,
):
    """delta = what each token's adapter adds to the group's base product, 0 where it has none.

    shared_part: columns of a part of the input, for several tokens. common_parts, common_tiles: the
    base product makes a site's common read by as many programs, as parts of the input and for each
    of these; 0 where it is made here. BEHIND: launched when all programs of the base product have
    begun, and at its end only when these have ended too.
    """
    program = tl.program_id(0)
    rows = table + NUM_TOTALS
    blocks = rows + NUM_ROWS * num_tokens
    alone_blocks = tl.load(table + ALONE_BLOCKS).to(tl.int32)
    shared_blocks = tl.load(table + SHARED_BLOCKS).to(tl.int32)
    shared_blocks -= tl.load(table + COMMON_BLOCKS, mask=common_parts > 0, other=0).to(tl.int32)
    num_routed = tl.load(table + ROUTED).to(tl.int32)
    alone_adds = tl.load(table + ALONE_ADDS).to(tl.int32)
    shared_adds = tl.load(table + SHARED_ADDS).to(tl.int32)
    vector: tl.constexpr = ALIGNMENT * 8 // delta.dtype.element_ty.primitive_bitwidth
    parts = tl.cdiv(n, PART)
    shared_parts = tl.cdiv(n, shared_part)
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
            tl.load(alone_block + BLOCK_TOKEN * max_blocks).to(tl.int32),
            tl.load(alone_block + BLOCK_NUMBER * max_blocks), alone_site, program % parts,
            first_site, n, num_tokens, num_sites, h_width, READ_ROWS, PART, ALIGNMENT,
        )  # fmt: skip
        alone_read = tl.load(alone_block + BLOCK_READ * max_blocks)
        arrive(counters + alone_site * 2 * num_tokens + alone_read)
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
            shared_part, TOKENS, READ_ROWS, SHARED_STEP, ALIGNMENT,
        )  # fmt: skip
        shared_read = tl.load(shared_block + BLOCK_READ * max_blocks)
        arrive(counters + shared_site * 2 * num_tokens + shared_read)
    elif program < routes:
        route = (program - shared_reads) // chunks
        routed = rows + route // num_sites
        route_site = route % num_sites
        route_header = tl.load(routed + ROUTE_HEADER * num_tokens)
        route_token = tl.load(routed + ROUTE_TOKEN * num_tokens).to(tl.int32)
        route_read = tl.load(routed + ROUTE_READ * num_tokens)
        shares = tl.load(routed + ROUTE_SHARES * num_tokens)
        route_parts = tl.where(shares != ALONE, shared_parts, parts)
        num_blocks = tl.load(routed + ROUTE_BLOCKS * num_tokens).to(tl.int32)
        common = (shares == IN_COMMON) & (common_parts > 0)
        route_read = tl.where(common, tl.load(table + COMMON_READ), route_read)
        route_parts = tl.where(common, common_parts, route_parts)
        num_blocks = tl.where(common, common_tiles, num_blocks)
        route_add = tl.load(routed + ROUTE_ADD * num_tokens)
        alone = tl.load(routed + ROUTE_ALONE * num_tokens) != 0
        route_counters = counters + route_site * 2 * num_tokens
        _route(
            h, c, numbers, route_counters + route_read, num_blocks * route_parts, taken,
            route_token, route_site,
            (program - shared_reads) % chunks, header_row(route_header, first_site + route_site),
            route_parts, alone, num_tokens, num_sites, h_width, c_width, taken_stride,
            EXPERTS, ROUTE_ROWS, DIMS, PARTS, COUNT,
        )  # fmt: skip
        arrive(route_counters + num_tokens + route_add)
    elif program < expands:
        alone_add = (program - routes) // tiles
        site, offset, start, width = site_tile(
            (program - routes) % tiles, width_0, width_1, width_2, COLUMNS, vector
        )
        alone_row = rows + alone_add
        read = tl.load(alone_row + ADD_READ * num_tokens)
        is_routed = read < 0
        add_blocks = tl.load(alone_row + ADD_BLOCKS * num_tokens).to(tl.int32)
        _expand_alone(
            delta, h, c, numbers,
            counters + site * 2 * num_tokens + tl.where(is_routed, num_tokens + alone_add, read),
            tl.where(is_routed, chunks, add_blocks * parts), is_routed,
            header_row(tl.load(alone_row + ADD_HEADER * num_tokens), first_site + site),
            tl.load(alone_row + ADD_TOKEN * num_tokens).to(tl.int32), site, offset, start, width,
            parts, num_tokens, num_sites, h_width, c_width, out_width,
            WEIGHTS, ADD_ROWS, ADD_STAGES, COLUMNS, PARTS, ALIGNMENT,
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
    if BEHIND:  # noqa: SIM102 - known when it is compiled
        if program == tl.num_programs(0) - 1:
            gdc_wait()
