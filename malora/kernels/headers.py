"""What the GPU's kernels share: headers, read in device memory, and how outputs are divided.

Addresses from a header carry no alignment, and loads through them would be two bytes at a time;
`ResidentAdapters` aligns what it stores, and the kernels are told so.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from malora.kernels import packed
from malora.kernels.resident import FIELDS, Group

ROW_STEP = tl.constexpr(packed.ROW_STEP)
NUM_FIELDS = tl.constexpr(len(FIELDS))
BASIS, ROUTER, COEFFICIENTS, UP, NUM_EXPERTS, TOP_K, RANK, BASIS_DIM, STRIDE, READS_BASIS = (
    tl.constexpr(i) for i in range(len(FIELDS))
)

_VECTOR = 16
"""Bytes of the widest load."""


@triton.jit
def header_row(header, site):
    """A header's row for a site, as a pointer to its fields."""
    return (header + site * (NUM_FIELDS * 8)).to(tl.pointer_type(tl.int64))


@triton.jit
def header_size(row, FIELD: tl.constexpr):
    """One of a row's sizes, as int32: divisions by int64 take several times the instructions."""
    return tl.load(row + FIELD).to(tl.int32)


@triton.jit
def row_length(d):
    """`packed.row_length`: a compiler sees what it is a multiple of."""
    return tl.cdiv(d, ROW_STEP) * ROW_STEP


@triton.jit
def aligned(address, dtype: tl.constexpr, ALIGNMENT: tl.constexpr):
    """A pointer to elements. The compiler heeds an alignment that is said of a pointer alone."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), ALIGNMENT)


@triton.jit
def site_tile(tile, width_0, width_1, width_2, COLUMNS: tl.constexpr, VECTOR: tl.constexpr):
    """A tile's site, its first column there, the site's first column of all, and its width."""
    tiles_0 = tl.cdiv(width_0, COLUMNS)
    tiles_1 = tl.cdiv(width_1, COLUMNS)
    site = (tile >= tiles_0).to(tl.int32) + (tile >= tiles_0 + tiles_1).to(tl.int32)
    first = tl.where(site == 0, 0, tl.where(site == 1, tiles_0, tiles_0 + tiles_1))
    start = tl.where(site == 0, 0, tl.where(site == 1, width_0, width_0 + width_1))
    width = tl.where(site == 0, width_0, tl.where(site == 1, width_1, width_2))
    # Multiples of what one load takes, so that every row is aligned as the first.
    offset = tl.multiple_of((tile - first) * COLUMNS, VECTOR)
    return site, offset, tl.multiple_of(start, VECTOR), tl.multiple_of(width, VECTOR)


@triton.jit
def num_tiles(width_0, width_1, width_2, COLUMNS: tl.constexpr):
    """How many tiles a group's outputs are, no tile of two sites."""
    return tl.cdiv(width_0, COLUMNS) + tl.cdiv(width_1, COLUMNS) + tl.cdiv(width_2, COLUMNS)


@cache
def alignment(group: Group, itemsize: int) -> int:
    """Bytes that every row of the group's weights is a multiple of, as far as a load can use."""
    widths = [group.in_features]
    for site in group.sites:
        widths += [site.width, site.start]
    return _VECTOR if all(width * itemsize % _VECTOR == 0 for width in widths) else itemsize


@cache
def site_widths(group: Group) -> tuple[int, int, int]:
    """The widths of a group's sites, one after the other in its output; 0 for those it lacks."""
    first, second, third = [*(site.width for site in group.sites), 0, 0][:3]
    return first, second, third


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """What runs beside base products."""
    return torch.cuda.Stream(device)


@cache
def num_processors(device: torch.device) -> int:
    """A GPU's multiprocessors; some for Triton's interpreter, which has none."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4


@cache
def num_stages(device: torch.device, stage_bytes: int, most: int) -> int:
    """Stages of a loop, of so many bytes of shared memory each, that a multiprocessor has room for.

    One more is left free: kernels have other uses for it too.
    """
    if device.type != "cuda":
        return most
    memory = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return max(1, min(most, memory // stage_bytes - 1))
