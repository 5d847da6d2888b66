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
HEADER, ORDER, READ_START, READ_COUNT, READ_HEADER, ADD_START, ADD_COUNT, ADD_HEADER = (
    tl.constexpr(i) for i in range(8)
)
_TABLE_ROWS = 8

_VECTOR = 16
"""Bytes of the widest load."""
_SMALL_BATCH = 512
"""Up to this many tokens, adapters are likely to have few each, and the device is hard to fill."""


@triton.jit
def _row(header, site):
    """A header's row for a site, as a pointer to its fields."""
    return (header + site * (NUM_FIELDS * 8)).to(tl.pointer_type(tl.int64))


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
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """h[part, token, site, row] = (basis; router)[row] · x[token], over the part's columns."""
    item = tl.program_id(0)
    site = tl.program_id(1)
    part = tl.program_id(2)
    header = tl.load(table + READ_HEADER * num_tokens + item)
    if header == 0:
        return
    row = _row(header, first_site + site)
    basis = tl.load(row + BASIS)
    if basis == 0:
        return
    router = tl.load(row + ROUTER)
    d = tl.load(row + BASIS_DIM)
    has_logits = (router != 0) & (tl.load(row + READS_BASIS) == 0)
    total = d + tl.where(has_logits, tl.load(row + NUM_EXPERTS), 0)
    index = tl.arange(0, TOKENS)
    mine = index < tl.load(table + READ_COUNT * num_tokens + item)
    start = tl.load(table + READ_START * num_tokens + item)
    tokens = tl.load(table + ORDER * num_tokens + start + index, mask=mine, other=0)
    dtype: tl.constexpr = x.dtype.element_ty
    size: tl.constexpr = dtype.primitive_bitwidth // 8
    columns = tl.arange(0, COLUMNS)
    end = tl.minimum(n, part * PART + PART)
    for first in range(0, total, ROWS):
        rows = first + tl.arange(0, ROWS)
        addresses = tl.where(rows < d, basis + rows * n * size, router + (rows - d) * n * size)
        weights = tl.multiple_of(addresses, ALIGNMENT).to(tl.pointer_type(dtype))
        sums = tl.zeros((TOKENS, ROWS), tl.float32)
        for begin in range(part * PART, end, COLUMNS):
            inside = begin + columns < end
            w = tl.load(
                weights[:, None] + begin + columns[None, :],
                mask=(rows < total)[:, None] & inside[None, :],
                other=0.0,
            )
            v = tl.load(
                x + tokens[:, None] * n + begin + columns[None, :],
                mask=mine[:, None] & inside[None, :],
                other=0.0,
            )
            sums = tl.dot(v, tl.trans(w), sums, input_precision="ieee")
        at = ((part * num_tokens + tokens) * num_sites + site) * h_width
        tl.store(
            h + at[:, None] + rows[None, :], sums, mask=mine[:, None] & (rows < total)[None, :]
        )


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
    """c[token, site, row] = gate of the row's expert · the row's coordinate; 0 if not taken."""
    token = tl.program_id(0).to(tl.int64)
    site = tl.program_id(1)
    header = tl.load(table + HEADER * num_tokens + token)
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
    dtype: tl.constexpr = c.dtype.element_ty
    router = tl.load(row + ROUTER).to(tl.pointer_type(dtype))
    coefficients = tl.load(row + COEFFICIENTS).to(tl.pointer_type(dtype))
    has_coefficients = tl.load(row + COEFFICIENTS) != 0
    z = h + (token * num_sites + site) * h_width
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
        gate = tl.sum(tl.where(expert[:, None] == experts[None, :], gates[None, :], 0.0), 1)
        needed = (rows < count * r) & (gate != 0)
        if has_coefficients:
            coordinates = tl.zeros((ROWS,), tl.float32)
            for begin in range(0, d, DIMS):
                inside = begin + dims < d
                p = tl.load(
                    coefficients + rows[:, None] * d + begin + dims[None, :],
                    mask=needed[:, None] & inside[None, :],
                    other=0.0,
                )
                v = _products(z, part_stride, begin + dims, inside, PARTS, PARTS_POWER)
                coordinates += tl.sum(p.to(tl.float32) * v[None, :], 1)
        else:
            at = expert * stride + rows % r
            coordinates = _products(z, part_stride, at, needed, PARTS, PARTS_POWER)
        weighted = tl.where(needed, gate * coordinates, 0.0)
        at = (token * num_sites + site) * c_width + rows
        tl.store(c + at, weighted.to(dtype), mask=rows < count * r)


@triton.jit
def _expand(
    out,
    c,
    table,
    tiles,
    first_site,
    out_width,
    num_tokens,
    num_sites,
    c_width,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """out[token, the tile's columns] += c[token] · up, for the tokens of one adapter."""
    tile = tl.program_id(0)
    item = tl.program_id(1)
    header = tl.load(table + ADD_HEADER * num_tokens + item)
    if header == 0:
        return
    site = tl.load(tiles + tile * 4)
    row = _row(header, first_site + site)
    if tl.load(row + BASIS) == 0:
        return
    start = tl.load(tiles + tile * 4 + 1)  # the tile's first column of `out`
    offset = tl.load(tiles + tile * 4 + 2)  # and within the site
    dtype: tl.constexpr = out.dtype.element_ty
    vector: tl.constexpr = ALIGNMENT * 8 // dtype.primitive_bitwidth
    # Multiples of what one load takes, so that every row is aligned as the first.
    width = tl.multiple_of(tl.load(tiles + tile * 4 + 3), vector)
    total = tl.load(row + NUM_EXPERTS) * tl.load(row + RANK)
    up = tl.multiple_of(tl.load(row + UP), ALIGNMENT).to(tl.pointer_type(dtype))
    index = tl.arange(0, TOKENS)
    mine = index < tl.load(table + ADD_COUNT * num_tokens + item)
    first_token = tl.load(table + ADD_START * num_tokens + item)
    tokens = tl.load(table + ORDER * num_tokens + first_token + index, mask=mine, other=0)
    columns = tl.multiple_of(offset, vector) + tl.arange(0, COLUMNS)
    inside = columns < width
    coordinates = c + (tokens * num_sites + site) * c_width
    sums = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for first in range(0, total, ROWS):
        rows = first + tl.arange(0, ROWS)
        weights = tl.load(
            coordinates[:, None] + rows[None, :],
            mask=mine[:, None] & (rows < total)[None, :],
            other=0.0,
        )
        taken = tl.max(tl.abs(weights.to(tl.float32)), 0) > 0
        w = tl.load(
            up + rows[:, None] * width + columns[None, :],
            mask=taken[:, None] & inside[None, :],
            other=0.0,
        )
        sums = tl.dot(weights, w, sums, input_precision="ieee")
    at = (
        out
        + tokens[:, None] * out_width
        + (tl.multiple_of(start, vector) + tl.arange(0, COLUMNS))[None, :]
    )
    mask = mine[:, None] & inside[None, :]
    old = tl.load(at, mask=mask, other=0.0)
    tl.store(at, (old.to(tl.float32) + sums).to(dtype), mask=mask)


class GpuPlan:
    """A batch's adapters on the GPU: a table of which tokens are whose, and scratch memory.

    A plan may be loaded again with another mix of as many tokens, also after its kernels were
    captured in a graph.
    """

    def __init__(self, num_tokens: int, adapters: ResidentAdapters) -> None:
        self.routing: Routing | None = None
        self.num_tokens = num_tokens
        device = adapters.device
        small = num_tokens <= _SMALL_BATCH
        self._tokens = 16 if small else 64
        # What a program reads of a row. Small batches fill the device by parts of rows; in large
        # ones the parts' sums would be the most of what is read and written.
        self._part = 512 if small else None
        self._num_items = num_tokens
        self._table = torch.zeros((_TABLE_ROWS, num_tokens), dtype=torch.int64, device=device)
        self._dtype = adapters.dtype
        self._sizes = adapters.sizes
        self._scratch: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._stream = _side_stream(device) if device.type == "cuda" else None

    def load(self, runs: Sequence[Run]) -> None:
        """Set which tokens are whose."""
        host = torch.from_numpy(batch_table(runs, self.num_tokens, self._tokens))
        if self._stream is not None:
            host = host.pin_memory()
        self._table.copy_(host, non_blocking=True)

    def begin(self, x: Tensor, group: Group) -> None:
        """Coordinates of all tokens, on the side stream.

        x: (T, n), contiguous, of the adapters' dtype.
        """
        if self._stream is None:
            self._coordinates(x, group)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._coordinates(x, group)

    def add_to(self, out: Tensor, x: Tensor, group: Group) -> None:
        """Add every token's adapter to the base product, in place.

        x: (T, n), out: (T, m), contiguous, of the adapters' dtype.
        """
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        _, c = self._buffers(x, group)
        columns = 256 if self._tokens == 16 else 128
        tiles = _tiles(group, columns, x.device)
        _expand[(len(tiles), self._num_items)](
            out,
            c,
            self._table,
            tiles,
            group.first_site,
            out.shape[1],
            self.num_tokens,
            len(group.sites),
            c.shape[-1],
            TOKENS=self._tokens,
            ROWS=16 if self._tokens == 16 else 32,
            COLUMNS=columns,
            ALIGNMENT=_alignment(group, x.itemsize),
            num_warps=4,
        )

    def _coordinates(self, x: Tensor, group: Group) -> None:
        n, sites = x.shape[1], len(group.sites)
        h, c = self._buffers(x, group)
        parts = len(h)
        part = triton.next_power_of_2(n) if parts == 1 else self._part
        _project[(self._num_items, sites, parts)](
            x,
            h,
            self._table,
            group.first_site,
            n,
            self.num_tokens,
            sites,
            h.shape[-1],
            TOKENS=self._tokens,
            ROWS=32,
            COLUMNS=128,
            PART=part,
            ALIGNMENT=_alignment(group, x.itemsize),
            num_warps=4,
        )
        taken = None if self.routing is None else self.routing.gates[:, group.layer]
        _route[(self.num_tokens, sites)](
            h,
            c,
            self._table,
            h if taken is None else taken,
            group.first_site,
            self.num_tokens,
            sites,
            h.shape[-1],
            c.shape[-1],
            0 if taken is None else taken.stride(0),
            EXPERTS=triton.next_power_of_2(self._sizes.num_experts),
            ROWS=16,
            DIMS=32,
            PARTS=parts,
            PARTS_POWER=triton.next_power_of_2(parts),
            COUNT=taken is not None,
            num_warps=1,
        )

    def _buffers(self, x: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        """The products (parts, T, sites, reads), float32, and the coordinates (T, sites, rows)."""
        parts = 1 if self._part is None else triton.cdiv(x.shape[1], self._part)
        sites = len(group.sites)
        if (parts, sites) not in self._scratch:
            reads, rows = (-(-n // 32) * 32 for n in (self._sizes.reads, self._sizes.rows))
            h = torch.empty(
                (parts, self.num_tokens, sites, reads), dtype=torch.float32, device=x.device
            )
            c = torch.empty((self.num_tokens, sites, rows), dtype=self._dtype, device=x.device)
            self._scratch[parts, sites] = h, c
        return self._scratch[parts, sites]


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def batch_table(runs: Sequence[Run], num_tokens: int, tile: int) -> NDArray[np.int64]:
    """A plan's table, (8, T): every token's header, then who is computed together.

    Tokens are ordered by what they read, then by adapter; an item is up to `tile` of them that
    read the same (READ) or are of one adapter (ADD): its start in that order, its count, and the
    header of its adapter, or of one of them. A header of 0 means none.
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
            adds += _items(begin, position, tile, adapter)
        reads += _items(first, position, tile, adapter)
    table[READ_START.value : READ_HEADER.value + 1, : len(reads)] = np.array(reads).T
    table[ADD_START.value : ADD_HEADER.value + 1, : len(adds)] = np.array(adds).T
    return table


def _items(
    start: int, stop: int, tile: int, adapter: ResidentAdapter
) -> list[tuple[int, int, int]]:
    header = adapter.headers.data_ptr()
    return [(i, min(tile, stop - i), header) for i in range(start, stop, tile)]


@cache
def _alignment(group: Group, itemsize: int) -> int:
    """Bytes that every row of the group's weights is a multiple of, as far as a load can use."""
    widths = [group.in_features]
    for site in group.sites:
        widths += [site.width, site.start]
    return _VECTOR if all(width * itemsize % _VECTOR == 0 for width in widths) else itemsize


@cache
def _tiles(group: Group, columns: int, device: torch.device) -> Tensor:
    """(tiles, 4) int32: site, first column of the output, first column of the site, its width."""
    rows = [
        (number, site.start + offset, offset, site.width)
        for number, site in enumerate(group.sites)
        for offset in range(0, site.width, columns)
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device)
