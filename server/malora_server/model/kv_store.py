"""New keys and values to their slots of the paged cache, on CUDA."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from malora_server.model.attention import LARGEST, LayerCache


@triton.jit
def finite(new, LIMIT: tl.constexpr):
    """What may be stored of new keys or values: others read the slots too, see `attention`."""
    wide = new.to(tl.float32)
    return tl.where(tl.abs(wide) < float("inf"), tl.clamp(wide, -LIMIT, LIMIT), 0.0).to(new.dtype)


def limit(dtype: torch.dtype) -> float:
    """The largest number that is stored."""
    return min(LARGEST, torch.finfo(dtype).max)


@triton.jit
def _store_one(pool, new, slot, token, token_stride, head_stride, heads, dim, HEADS, DIM, LIMIT):
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, DIM)[None, :]
    inside = (head < heads) & (column < dim)
    x = tl.load(new + token * token_stride + head * head_stride + column, mask=inside, other=0.0)
    tl.store(pool + (slot * heads + head) * dim + column, finite(x, LIMIT), mask=inside)


@triton.jit
def _store(
    keys,
    values,
    new_keys,
    new_values,
    slots,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    heads,
    dim,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Each token's keys and values to its slot, NaN and infinities as zeros."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    _store_one(
        keys, new_keys, slot, token, key_token_stride, key_head_stride, heads, dim,
        HEADS, DIM, LIMIT,
    )  # fmt: skip
    _store_one(
        values, new_values, slot, token, value_token_stride, value_head_stride, heads, dim,
        HEADS, DIM, LIMIT,
    )  # fmt: skip


def store(cache: LayerCache, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Write the tokens' keys and values, (T, kv_heads, D), to their slots, (T,) int64.

    What others may read as padding, or once the slot is theirs, must be finite.
    """
    heads, dim = cache.keys.shape[2:]
    _store[(len(slots),)](
        cache.keys,
        cache.values,
        key,
        value,
        slots,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        heads,
        dim,
        HEADS=triton.next_power_of_2(heads),
        DIM=triton.next_power_of_2(dim),
        LIMIT=limit(key.dtype),
        num_warps=4,
    )
