"""Paged attention of a decode step, one token a sequence, in one kernel of our own.

A row's keys are divided in parts, so that a long row does not keep the others waiting; a program
takes one part for one key head and the query heads that share it. The division is made on the host
and read from device memory, so that a captured graph stays right when the next step's is loaded.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from malora.kernels.headers import num_processors
from malora_server.model.attention import Ints, LayerCache, flat_tables
from malora_server.model.kv_store import finite, limit

_TILES = {64: 64, 128: 64, 256: 32}
"""Keys that a program takes at a time, by their dimension."""
_STAGES = 2
_WARPS = 4
_PROGRAMS = 2
"""For a multiprocessor, where there are keys enough for so many parts."""
_LEAST_PART = 128
"""Keys. Of fewer, a part would not be worth the merging."""
_PART_STEP = 64
"""A part is a multiple of it, so that of a row's tiles only the last is in part empty."""
_LOWEST = tl.constexpr(-3.4e38)
"""The largest score of no keys. Finite: of two of them the difference is no NaN."""

# An item of a step's work, a part of a row's keys: what the table has in its columns.
ROW = tl.constexpr(0)
FIRST_PAGE = tl.constexpr(1)  # place of the row's first block in the page table
LENGTH = tl.constexpr(2)  # of the row
BEGIN = tl.constexpr(3)
END = tl.constexpr(4)
PART = tl.constexpr(5)
NUM_PARTS = tl.constexpr(6)  # of the row; 0: no item
SLOT = tl.constexpr(7)  # of the partial results, the row's first
NUM_COLUMNS = tl.constexpr(8)


@triton.jit
def attend(
    keys,
    values,
    query,
    new_keys,
    new_values,
    out,
    items,
    pages,
    partial,
    largests,
    totals,
    arrived,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LIMIT: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One item's attention for one key head.

    The program of a row's last part first stores the row's new key and value; the row's last to
    end merges its parts, in their order. WINDOW, SOFTCAP: 0 for none.
    """
    head = tl.program_id(0) % KV_HEADS
    item = items + tl.program_id(0) // KV_HEADS * NUM_COLUMNS
    num_parts = tl.load(item + NUM_PARTS)
    if num_parts == 0:
        return
    row = tl.load(item + ROW).to(tl.int64)
    length = tl.load(item + LENGTH)
    first = tl.load(item + BEGIN)
    end = tl.load(item + END)
    table = pages + tl.load(item + FIRST_PAGE)
    if WINDOW > 0:
        first = tl.maximum(first, length - WINDOW)

    lane = tl.arange(0, TILE)
    column = tl.arange(0, DIM)
    page = tl.load(table + (first + lane) // BLOCK_SIZE, mask=first + lane < end, other=0)
    member = tl.arange(0, ROWS)
    inside = (member < GROUP)[:, None]
    heads = head * GROUP + member
    q = tl.load(
        query + row * query_token_stride + heads[:, None] * query_head_stride + column[None, :],
        mask=inside,
        other=0.0,
    )
    if end == length:
        block = tl.load(table + (length - 1) // BLOCK_SIZE).to(tl.int64)
        slot = block * BLOCK_SIZE + (length - 1) % BLOCK_SIZE
        k = tl.load(new_keys + row * key_token_stride + head * key_head_stride + column)
        v = tl.load(new_values + row * value_token_stride + head * value_head_stride + column)
        place = (slot * KV_HEADS + head) * DIM + column
        tl.store(keys + place, finite(k, LIMIT))
        tl.store(values + place, finite(v, LIMIT))
        tl.debug_barrier()  # the loop reads them

    LOG2_E: tl.constexpr = 1.4426950408889634
    largest = tl.full((ROWS,), _LOWEST, tl.float32)
    # Summed over a tile's keys in the end alone.
    weights = tl.zeros((ROWS, TILE), tl.float32)
    sums = tl.zeros((ROWS, DIM), tl.float32)
    for start in tl.range(first, end, TILE, num_stages=STAGES):
        key = start + lane
        slot = page * BLOCK_SIZE + key % BLOCK_SIZE
        place = (slot.to(tl.int64) * KV_HEADS + head)[:, None] * DIM + column[None, :]
        # Of the next tile, or this one's keys could not be under way before it.
        page = tl.load(table + (key + TILE) // BLOCK_SIZE, mask=key + TILE < end, other=0)
        live = key < end
        k = tl.load(keys + place, mask=live[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFTCAP > 0:
            # tanh(x) = 2 sigmoid(2x) - 1
            scores = 2 * tl.sigmoid(scores * (2 * scale / SOFTCAP)) - 1
            scores *= SOFTCAP * LOG2_E
        else:
            scores *= scale * LOG2_E
        scores = tl.where(live[None, :], scores, float("-inf"))
        before = largest
        largest = tl.maximum(largest, tl.max(scores, 1))
        scores = tl.exp2(scores - largest[:, None])
        decay = tl.exp2(before - largest)[:, None]
        weights = weights * decay + scores
        v = tl.load(values + place, mask=live[:, None], other=0.0)
        sums = tl.dot(scores.to(v.dtype), v, sums * decay, input_precision="ieee")
    total = tl.sum(weights, 1)

    complete = num_parts == 1
    if num_parts > 1:
        slot = tl.load(item + SLOT)
        place = (slot + tl.load(item + PART)) * (KV_HEADS * GROUP) + heads
        tl.store(partial + place[:, None] * DIM + column[None, :], sums, mask=inside)
        tl.store(largests + place, largest, mask=member < GROUP)
        tl.store(totals + place, total, mask=member < GROUP)
        tl.debug_barrier()
        counter = arrived + slot * KV_HEADS + head
        complete = tl.atomic_add(counter, 1, sem="acq_rel") == num_parts - 1
        if complete:
            tl.store(counter, 0)
            largest = tl.full((ROWS,), _LOWEST, tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            sums = tl.zeros((ROWS, DIM), tl.float32)
            for part in range(num_parts):
                place = (slot + part) * (KV_HEADS * GROUP) + heads
                before = largest
                its = tl.load(largests + place, mask=member < GROUP, other=_LOWEST)
                largest = tl.maximum(largest, its)
                decay, share = tl.exp2(before - largest), tl.exp2(its - largest)
                weight = tl.load(totals + place, mask=member < GROUP, other=1.0)
                total = total * decay + weight * share
                at = partial + place[:, None] * DIM + column[None, :]
                addend = tl.load(at, mask=inside, other=0.0)
                sums = sums * decay[:, None] + addend * share[:, None]
    if complete:
        tl.store(
            out + (row * (KV_HEADS * GROUP) + heads[:, None]) * DIM + column[None, :],
            (sums / total[:, None]).to(out.dtype.element_ty),
            mask=inside,
        )


class DecodeStep:
    """One step's rows; loaded with the next step's, also after a graph captured its kernels."""

    def __init__(
        self, device: torch.device, rows: int, max_blocks: int, block_size: int, kv_heads: int
    ) -> None:
        """max_blocks: of all rows. kv_heads: the fewest that a layer has."""
        self._block_size = block_size
        self._num_parts = -(-_PROGRAMS * num_processors(device) // kv_heads)
        self._max_items = rows + self._num_parts
        size = self._max_items * NUM_COLUMNS.value
        self._table = torch.zeros(size + max_blocks, dtype=torch.int32, device=device)
        self._items, self._pages = self._table[:size], self._table[size:]

    def load(self, lengths: Ints, block_tables: list[list[int]]) -> None:
        """lengths: (rows,), of each row's keys, its new token's among them."""
        firsts, pages = flat_tables(lengths, block_tables, self._block_size)
        items = np.zeros((self._max_items, NUM_COLUMNS.value), np.int32)
        divided = divide(lengths, firsts[:-1], self._num_parts)
        items[: len(divided)] = divided
        host = torch.from_numpy(np.concatenate([items.ravel(), pages]))
        if self._table.is_cuda:
            host = host.pin_memory()
        self._table[: len(host)].copy_(host, non_blocking=True)

    def attend(
        self,
        cache: LayerCache,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """See `AttentionStep`."""
        block_size, kv_heads, head_dim = cache.keys.shape[1:]
        heads = query.shape[1]
        # Of the shape's own strides: the query's, whose they would be, depend on what made it.
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        # Rows of several parts have, together, fewer than twice as many as are aimed at.
        scratch = _scratch(query.device, 2 * self._num_parts, heads, head_dim)
        attend[(self._max_items * kv_heads,)](
            cache.keys,
            cache.values,
            query,
            key,
            value,
            out,
            self._items,
            self._pages,
            *scratch,
            query.stride(0),
            query.stride(1),
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            scale,
            **constants(heads, kv_heads, head_dim, block_size, query.dtype, window, softcap),
            num_warps=_WARPS,
        )
        return out


def divide(lengths: Ints, firsts: NDArray[np.int32], num_parts: int) -> NDArray[np.int32]:
    """The items of a step's rows, (items, NUM_COLUMNS), those of most keys first.

    lengths: (rows,) keys. firsts: (rows,) places in the page table. num_parts: about how many items
    all rows would be, were they one; there are rows + num_parts at most.
    """
    size = max(_LEAST_PART, -(-int(lengths.sum()) // num_parts))
    # To the nearest number of parts, and those of a row alike.
    step = -(-lengths // np.maximum(1, (lengths + size // 2) // size))
    step = -(-step // _PART_STEP) * _PART_STEP
    counts = -(-lengths // step)
    slots = np.where(counts > 1, counts, 0)
    row = np.repeat(np.arange(len(lengths)), counts)
    part = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
    begin = part * step[row]
    end = np.minimum(begin + step[row], lengths[row])
    items = np.empty((len(row), NUM_COLUMNS.value), np.int32)
    items[:, ROW.value] = row
    items[:, FIRST_PAGE.value] = firsts[row]
    items[:, LENGTH.value] = lengths[row]
    items[:, BEGIN.value] = begin
    items[:, END.value] = end
    items[:, PART.value] = part
    items[:, NUM_PARTS.value] = counts[row]
    items[:, SLOT.value] = (np.cumsum(slots) - slots)[row]
    return items[np.argsort(begin - end, kind="stable")]


def constants(
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
) -> dict[str, int | float]:
    """What the kernel is compiled for."""
    group = heads // kv_heads
    return {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "ROWS": max(16, triton.next_power_of_2(group)),
        "DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "WINDOW": window or 0,
        "SOFTCAP": softcap or 0.0,
        "LIMIT": limit(dtype),
        "TILE": _TILES[head_dim],
        "STAGES": _STAGES,
    }


@cache
def _scratch(
    device: torch.device, slots: int, heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What parts leave for the last to merge; launches of all layers and steps follow one another.

    Sums of values, largest scores and sums of weights, float32; how many have come, zeros between
    launches.
    """
    shape = slots, heads
    return (
        torch.empty((*shape, head_dim), dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.zeros(shape, dtype=torch.int32, device=device),
    )
