"""Attention over a paged KV cache, plugged into transformers' attention interface.

Keys and values of every layer live in blocks of `block_size` token slots; a sequence's block table
says which. The model runs on the step's tokens laid end to end, (1, T); this module writes their
keys and values to their slots and lets each token attend to its own sequence alone: in torch, on
any device and in any dtype; on CUDA by FlashInfer (`model/flash.py`) or, of a token a sequence, by
a kernel of our own (`model/decode_attention.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain, count
from typing import Protocol
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

IMPLEMENTATION = "malora_paged"
"""The name under which `paged_attention` is registered with transformers."""

Ints = NDArray[np.int64]
LARGEST = 1e15
"""No model's keys or values come near it; its products with any query stay finite."""


def flat_tables(
    lengths: Ints, block_tables: list[list[int]], block_size: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The blocks of B chunks' keys, end to end.

    lengths: (B,) keys of each. Returns (B + 1,) each chunk's first place in the table, and the
    length of that; and the table.
    """
    used = -(-lengths // block_size)
    blocks = (table[:n] for table, n in zip(block_tables, used.tolist(), strict=True))
    return cumulated(used), np.fromiter(chain.from_iterable(blocks), np.int32, int(used.sum()))


def cumulated(counts: Ints) -> NDArray[np.int32]:
    """(B + 1,) the sum of those before each of the B counts, and of all."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


class QueryBlock:
    """Some adjacent chunks of the step, padded to (P, Q) queries over (P, L) keys.

    Decoding sequences (one query each) form one block and prefill chunks another, so that neither
    pays for the other's padding.
    """

    def __init__(
        self,
        tokens: slice,
        starts: Ints,
        counts: Ints,
        block_tables: list[list[int]],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """starts, counts: (P,) first position and number of tokens of each chunk."""
        self.tokens = tokens
        self.num_chunks = len(counts)
        self.num_queries = int(counts.max())
        lengths = starts + counts
        used = -(-lengths // block_size)
        tables = np.zeros((self.num_chunks, int(used.max())), dtype=np.int64)
        for i, (table, n) in enumerate(zip(block_tables, used.tolist(), strict=True)):
            tables[i, :n] = table[:n]
        self._blocks = torch.from_numpy(tables.ravel()).to(device)
        self._gathered: dict[str, Tensor] = {}
        within = np.arange(self.num_queries)
        valid = within < counts[:, None]
        self._positions = torch.from_numpy(np.where(valid, starts[:, None] + within, 0)).to(device)
        self._num_keys = tables.shape[1] * block_size
        self._dtype = dtype
        self._masks: dict[tuple[int | None, int], Tensor] = {}
        self.padded: Tensor | None = None
        self.unpadded: Tensor | None = None
        if not valid.all() or self.num_queries > 1:
            first = tokens.start + np.cumsum(counts) - counts
            rows = np.where(valid, first[:, None] + within, tokens.start)
            self.padded = torch.from_numpy(rows).to(device)
            self.unpadded = torch.from_numpy(np.flatnonzero(valid.ravel())).to(device)

    def gather(self, name: str, pool: Tensor) -> Tensor:
        """The chunks' keys or values, (P, L, kv_heads, D), valid until the next layer's.

        One buffer serves all layers: fresh memory would cost as much as the copy itself.
        """
        rows = pool.view(pool.shape[0], -1)
        kept = self._gathered.get(name)
        if kept is None or kept.shape[1] != rows.shape[1]:
            kept = self._gathered[name] = rows.index_select(0, self._blocks)
        else:
            torch.index_select(rows, 0, self._blocks, out=kept)
        return kept.view(self.num_chunks, -1, *pool.shape[2:])

    def mask(self, window: int | None, groups: int) -> Tensor:
        """What each query may see, (P, 1, groups * Q, L), added to the scores."""
        key = (window, groups)
        if key not in self._masks:
            keys = torch.arange(self._num_keys, device=self._positions.device)
            queries = self._positions[:, :, None]
            hidden = keys > queries
            if window is not None:
                hidden |= keys <= queries - window
            mask = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device)
            mask.masked_fill_(hidden, torch.finfo(self._dtype).min)
            self._masks[key] = mask.repeat(1, groups, 1)[:, None]
        return self._masks[key]


class AttentionStep(Protocol):
    """One step's tokens: where their keys go, and who attends to what."""

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
        """Store the tokens' keys and values, then attend.

        query: (T, heads, D); key, value: (T, kv_heads, D), of any strides. Returns (T, heads, D).
        """


@dataclass
class GatheredStep:
    """Attention in torch: the blocks that the step's chunks read are gathered side by side."""

    slots: Tensor
    """(T,) int64: block * block_size + offset of each token."""
    blocks: list[QueryBlock]

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
        kv_heads, head_dim = cache.keys.shape[2:]
        for pool, new in ((cache.keys, key), (cache.values, value)):
            pool.view(-1, kv_heads, head_dim).index_copy_(0, self.slots, _finite(new))
        outputs = [_attend(block, query, cache, scale, window, softcap) for block in self.blocks]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@dataclass(eq=False)
class AttentionContext:
    """What `paged_attention` reads; the runner sets `step` before each forward pass."""

    step: AttentionStep = field(init=False)


_numbers = count()
_caches: WeakValueDictionary[int, LayerCache] = WeakValueDictionary()


class LayerCache(nn.Module):
    """One layer's keys and values: (num_blocks + 1, block_size, kv_heads, head_dim) each."""

    def __init__(
        self,
        context: AttentionContext,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.context = context
        self.keys = _zeros(shape, dtype, device)
        self.values = _zeros(shape, dtype, device)
        self.number = torch.tensor(next(_numbers))
        _caches[int(self.number)] = self


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, because a masked key is still multiplied, and 0 · NaN is NaN.

    On the CPU the memory is not touched before it is used, as torch's own zeros would.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: object,  # noqa: ARG001
) -> tuple[Tensor, None]:
    """The attention interface of transformers over `module.paged_cache` (a `LayerCache`).

    query: (1, heads, T, D); key, value: (1, kv_heads, T, D). Returns ((1, T, heads, D), None).
    """
    cache: LayerCache = module.paged_cache  # type: ignore[assignment]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if torch.compiler.is_compiling():
        window, cap = sliding_window or 0, softcap or 0.0
        return torch.ops.malora.attend(query, key, value, cache.number, scale, window, cap), None
    return _attend_all(cache, query, key, value, scale, sliding_window, softcap), None


def _attend_all(
    cache: LayerCache,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return cache.context.step.attend(cache, q, k, v, scale, window, softcap)[None]


# What a compiled layer calls. The layer's cache goes by number, in a tensor: as an attribute, it
# would be a constant of the compilation, and every layer would be compiled on its own.
@torch.library.custom_op("malora::attend", mutates_args=())
def _attend_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    number: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    cache = _caches[int(number)]
    return _attend_all(cache, query, key, value, scale, window or None, softcap or None)


@_attend_op.register_fake
def _(
    query: Tensor,
    key: Tensor,  # noqa: ARG001
    value: Tensor,  # noqa: ARG001
    number: Tensor,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    window: int,  # noqa: ARG001
    softcap: float,  # noqa: ARG001
) -> Tensor:
    _, heads, tokens, head_dim = query.shape
    return query.new_empty((1, tokens, heads, head_dim))


def _finite(new: Tensor) -> Tensor:
    """What may be stored: others read these slots too, as padding or once they are theirs.

    Masked scores and values are multiplied by zero, which hides numbers but neither NaN nor what
    overflows. The sequence that made them still fails, by its own hidden state.
    """
    limit = min(LARGEST, torch.finfo(new.dtype).max)
    return new.nan_to_num(0.0, 0.0, 0.0).clamp_(-limit, limit)


def _attend(
    block: QueryBlock,
    queries: Tensor,
    cache: LayerCache,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """queries: (T, heads, D), all of the step's. Returns (tokens of the block, heads, D)."""
    chunks, wide = block.num_chunks, block.num_queries
    heads, head_dim = queries.shape[1:]
    kv_heads = cache.keys.shape[2]
    groups = heads // kv_heads
    k = block.gather("keys", cache.keys).transpose(1, 2)
    v = block.gather("values", cache.values).transpose(1, 2)
    # The query heads that share a key head are further queries of it: keys are never repeated.
    if block.padded is None:
        q = queries[block.tokens].reshape(chunks, kv_heads, groups, head_dim)
    else:
        q = queries[block.padded].view(chunks, wide, kv_heads, groups, head_dim)
        q = q.permute(0, 2, 3, 1, 4).reshape(chunks, kv_heads, groups * wide, head_dim)
    mask = block.mask(window, groups)
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        scores = torch.matmul(q, k.transpose(-1, -2)) * scale
        scores = torch.tanh(scores / softcap) * softcap + mask
        out = torch.matmul(torch.softmax(scores.float(), dim=-1).to(v.dtype), v)
    if block.padded is None:
        return out.reshape(chunks, heads, head_dim)
    out = out.view(chunks, kv_heads, groups, wide, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(chunks * wide, heads, head_dim)[block.unpadded]


AttentionInterface.register(IMPLEMENTATION, paged_attention)


def attach_cache(
    model: PreTrainedModel,
    context: AttentionContext,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give every attention layer of the model its blocks, and one more, which nobody reads.

    That one takes what is written for rows that only fill a batch up.
    """
    for layer, (kv_heads, head_dim) in attention_layers(model):
        shape = (num_blocks + 1, block_size, kv_heads, head_dim)
        layer.paged_cache = LayerCache(context, shape, dtype, device)


def attention_layers(model: PreTrainedModel) -> list[tuple[nn.Module, tuple[int, int]]]:
    """Every self-attention module and its (kv_heads, head_dim).

    Raises ValueError where the model has layers that keep another kind of state.
    """
    config = model.config.get_text_config()
    layers = [
        m
        for m in model.modules()
        if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")
    ]
    if len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"{type(model).__name__} has {len(layers)} attention modules in "
            f"{config.num_hidden_layers} layers; only decoders with attention in every layer "
            "can be served"
        )
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return [(m, (kv_heads, int(m.head_dim))) for m in layers]  # type: ignore[arg-type]


def cache_bytes_per_block(model: PreTrainedModel, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers, keys and values."""
    elements = sum(heads * dim for _, (heads, dim) in attention_layers(model))
    return 2 * elements * block_size * dtype.itemsize
