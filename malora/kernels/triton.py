"""Tokens of a mixed batch on a GPU: each with its own adapter, read where it lies.

Two kernels a group of linears. `_project` computes every token's coordinates in its basis and,
where the router reads the same input, the router's logits. `_expand` turns them into gates and
expert coordinates, and adds the chosen experts' up-projections to the base product. Both find an
adapter through the address of its header, at its own sizes: no padding, no slots, no copies, and
nothing on the host that depends on the mix, so that a captured graph stays right for every mix.

Addresses from a header carry no alignment, and loads through them would be two bytes at a time;
`ResidentAdapters` aligns what it stores, and the kernels are told so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora.kernels.resident import FIELDS, Group, Sizes

NUM_FIELDS = tl.constexpr(len(FIELDS))
BASIS, ROUTER, COEFFICIENTS, UP, NUM_EXPERTS, TOP_K, RANK, BASIS_DIM, STRIDE, READS_BASIS = (
    tl.constexpr(i) for i in range(len(FIELDS))
)
PROJECT_ROWS = 4
"""Rows of basis and router that a program of `_project` takes at a time: enough loads under way to
hide the memory's latency, few enough that a small batch fills the device."""
PROJECT_SPLIT = 8
"""Programs a token and site of `_project`; those beyond an adapter's rows end at once."""
PROJECT_COLUMNS = 1024
EXPAND_COLUMNS = 512
_VECTOR = 16
"""Bytes of the widest load."""


@triton.jit
def _site(headers, token, site):
    """The address of a token's header row for a site; 0 without an adapter."""
    header = tl.load(headers + token)
    return tl.where(header == 0, header, header + site * (NUM_FIELDS * 8))


@triton.jit
def _project(
    x,
    h,
    headers,
    first_site,
    n,
    num_sites,
    h_width,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """h[token, site, row] = (basis; router)[row] · x[token]."""
    token = tl.program_id(0).to(tl.int64)
    site = tl.program_id(1)
    part = tl.program_id(2)
    address = _site(headers, token, first_site + site)
    if address == 0:
        return
    row = address.to(tl.pointer_type(tl.int64))
    basis = tl.load(row + BASIS)
    if basis == 0:
        return
    router = tl.load(row + ROUTER)
    d = tl.load(row + BASIS_DIM)
    has_logits = (router != 0) & (tl.load(row + READS_BASIS) == 0)
    total = d + tl.where(has_logits, tl.load(row + NUM_EXPERTS), 0)
    dtype: tl.constexpr = x.dtype.element_ty
    size: tl.constexpr = dtype.primitive_bitwidth // 8
    columns = tl.arange(0, COLUMNS)
    for first in range(part * ROWS, total, SPLIT * ROWS):
        for i in tl.static_range(ROWS):
            index = first + i
            if index < total:
                start = tl.where(
                    index < d, basis + index * n * size, router + (index - d) * n * size
                )
                weights = tl.multiple_of(start, ALIGNMENT).to(tl.pointer_type(dtype))
                sums = tl.zeros((COLUMNS,), tl.float32)
                for begin in range(0, n, COLUMNS):
                    inside = begin + columns < n
                    w = tl.load(weights + begin + columns, mask=inside, other=0.0)
                    v = tl.load(x + token * n + begin + columns, mask=inside, other=0.0)
                    sums += w.to(tl.float32) * v.to(tl.float32)
                tl.store(h + (token * num_sites + site) * h_width + index, tl.sum(sums, 0))


@triton.jit
def _expand(
    out,
    h,
    headers,
    tiles,
    taken,
    first_site,
    out_width,
    num_sites,
    h_width,
    taken_stride,
    EXPERTS: tl.constexpr,
    RANKS: tl.constexpr,
    DIMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    COUNT: tl.constexpr,
):
    """out[token, the tile's columns] += Σ over the chosen experts of gate · up · P · h."""
    tile = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    site = tl.load(tiles + tile * 4)
    address = _site(headers, token, first_site + site)
    if address == 0:
        return
    row = address.to(tl.pointer_type(tl.int64))
    if tl.load(row + BASIS) == 0:
        return
    start = tl.load(tiles + tile * 4 + 1)  # the tile's first column of `out`
    offset = tl.load(tiles + tile * 4 + 2)  # and within the site
    # In elements: a multiple of what one load takes, so that every row is aligned as the first.
    width = tl.multiple_of(
        tl.load(tiles + tile * 4 + 3), ALIGNMENT * 8 // out.dtype.element_ty.primitive_bitwidth
    )
    count = tl.load(row + NUM_EXPERTS)
    top_k = tl.load(row + TOP_K)
    r = tl.load(row + RANK)
    d = tl.load(row + BASIS_DIM)
    stride = tl.load(row + STRIDE)
    dtype: tl.constexpr = out.dtype.element_ty
    router = tl.load(row + ROUTER).to(tl.pointer_type(dtype))
    coefficients = tl.load(row + COEFFICIENTS)
    up = tl.multiple_of(tl.load(row + UP), ALIGNMENT).to(tl.pointer_type(dtype))
    z = h + (token * num_sites + site) * h_width

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
                v = tl.load(z + begin + dims, mask=inside, other=0.0)
                logits += tl.sum(w.to(tl.float32) * v[None, :], 1)
        else:
            logits = tl.load(z + d + experts, mask=experts < count, other=0.0)
    logits = tl.where(experts < count, logits, float("-inf"))
    before = (logits[None, :] > logits[:, None]) | (
        (logits[None, :] == logits[:, None]) & (experts[None, :] < experts[:, None])
    )
    rank = tl.sum(before.to(tl.int32), 1)
    # Renormalised top-k of a softmax is the softmax of the top-k logits.
    weights = tl.where(rank < top_k, tl.exp(logits - tl.max(logits, 0)), 0.0)
    gates = weights / tl.sum(weights, 0)
    if COUNT:  # noqa: SIM102 - a constant of the compilation
        if (offset == 0) & (count > 1):
            tl.atomic_add(taken + token * taken_stride + experts, gates, mask=experts < count)

    ranks = tl.arange(0, RANKS)
    columns = offset + tl.arange(0, COLUMNS)
    inside_site = columns < width
    total = tl.zeros((COLUMNS,), tl.float32)
    for j in range(top_k):
        expert = tl.sum(tl.where(rank == j, experts, 0), 0)
        gate = tl.sum(tl.where(rank == j, gates, 0.0), 0)
        for begin in range(0, r, RANKS):
            inside_rank = begin + ranks < r
            if coefficients != 0:
                coordinates = tl.zeros((RANKS,), tl.float32)
                p = coefficients.to(tl.pointer_type(dtype)) + (expert * r + begin) * d
                for first in range(0, d, DIMS):
                    inside = first + dims < d
                    w = tl.load(
                        p + ranks[:, None] * d + first + dims[None, :],
                        mask=inside_rank[:, None] & inside[None, :],
                        other=0.0,
                    )
                    v = tl.load(z + first + dims, mask=inside, other=0.0)
                    coordinates += tl.sum(w.to(tl.float32) * v[None, :], 1)
            else:
                coordinates = tl.load(
                    z + expert * stride + begin + ranks, mask=inside_rank, other=0.0
                )
            rows = tl.multiple_of(
                (expert * r + begin) * width, ALIGNMENT // (dtype.primitive_bitwidth // 8)
            )
            rows = rows + ranks[:, None] * tl.multiple_of(
                width, ALIGNMENT // (dtype.primitive_bitwidth // 8)
            )
            w = tl.load(
                up + rows + columns[None, :],
                mask=inside_rank[:, None] & inside_site[None, :],
                other=0.0,
            )
            total += tl.sum(w.to(tl.float32) * (coordinates * gate)[:, None], 0)
    at = out + token * out_width + start + tl.arange(0, COLUMNS)
    old = tl.load(at, mask=inside_site, other=0.0)
    tl.store(at, (old.to(tl.float32) + total).to(dtype), mask=inside_site)


class TokenPlan:
    """Each token's adapter, for kernels to read: (T,) addresses of headers, 0 for none."""

    def __init__(self, headers: Tensor, sizes: Sizes) -> None:
        """headers: (T,) int64, on the device. It may change between calls."""
        self.headers = headers
        self._sizes = sizes

    def add_to(self, out: Tensor, x: Tensor, group: Group, taken: Tensor | None = None) -> None:
        """Add every token's adapter to the base product, in place.

        x: (T, n), out: (T, m), contiguous, of the adapters' dtype. taken: (T, layers, N) float32,
        to which the gates are added.
        """
        tokens, n = x.shape
        sites = len(group.sites)
        sizes = self._sizes
        h = torch.empty((tokens, sites, sizes.coordinates), dtype=torch.float32, device=x.device)
        tiles = _tiles(group, x.device)
        widths = [n, *(site.width for site in group.sites), *(site.start for site in group.sites)]
        aligned = all(width * x.itemsize % _VECTOR == 0 for width in widths)
        alignment = _VECTOR if aligned else x.itemsize
        _project[(tokens, sites, PROJECT_SPLIT)](
            x,
            h,
            self.headers,
            group.first_site,
            n,
            sites,
            sizes.coordinates,
            ROWS=PROJECT_ROWS,
            SPLIT=PROJECT_SPLIT,
            COLUMNS=min(PROJECT_COLUMNS, triton.next_power_of_2(n)),
            ALIGNMENT=alignment,
            num_warps=4,
        )
        counted = None if taken is None else taken[:, group.layer]
        _expand[(len(tiles), tokens)](
            out,
            h,
            self.headers,
            tiles,
            h if counted is None else counted,
            group.first_site,
            out.shape[1],
            sites,
            sizes.coordinates,
            0 if counted is None else counted.stride(0),
            EXPERTS=triton.next_power_of_2(sizes.num_experts),
            RANKS=8,
            DIMS=16,
            COLUMNS=EXPAND_COLUMNS,
            ALIGNMENT=alignment,
            COUNT=counted is not None,
            num_warps=2,
        )


@cache
def _tiles(group: Group, device: torch.device) -> Tensor:
    """(tiles, 4) int32: site, first column of the output, first column of the site, its width."""
    rows: Sequence[tuple[int, int, int, int]] = [
        (number, site.start + offset, offset, site.width)
        for number, site in enumerate(group.sites)
        for offset in range(0, site.width, EXPAND_COLUMNS)
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device)
