"""Paged attention of steps with prompts by FlashInfer, in half precision on CUDA.

FlashInfer divides a batch's work on the host (`plan`), once a step for each kind of attention that
the model's layers have. Its launches differ from step to step, so that no graph holds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from malora_server.model.attention import LayerCache, cumulated, flat_tables
from malora_server.model.kv_store import store
from malora_server.model.pieces import PiecewiseGraph

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128, 256)
_WORKSPACE_BYTES = 256 << 20
"""For the partial results of sequences that are read in several parts."""


@dataclass(frozen=True)
class Pages:
    """Whose tokens a step has, and where their keys lie, as FlashInfer wants it; on the host."""

    tokens: NDArray[np.int32]
    """(B + 1,) each chunk's first token in the step, and the number of all."""
    blocks: NDArray[np.int32]
    """(B + 1,) each chunk's first place in `table`, and the length of that."""
    table: NDArray[np.int32]
    """The chunks' blocks, end to end."""
    last: NDArray[np.int32]
    """(B,) slots used of each chunk's last block."""

    @classmethod
    def of(
        cls,
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        block_tables: list[list[int]],
        block_size: int,
    ) -> Pages:
        """starts, counts: (B,) first position and number of tokens of each chunk."""
        ends = starts + counts
        blocks, table = flat_tables(ends, block_tables, block_size)
        last = (ends - 1) % block_size + 1
        return cls(cumulated(counts), blocks, table, last.astype(np.int32))


@dataclass(frozen=True)
class _Kind:
    """What FlashInfer's division of a batch depends on, beside the batch."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    scale: float
    window: int | None
    softcap: float | None


class FlashStep:
    """One step's tokens; loaded with the next step's, also after graphs captured what is between
    its attentions.
    """

    def __init__(self, device: torch.device) -> None:
        self._pieces: PiecewiseGraph | None = None
        self._device = device
        self._wrappers: dict[_Kind, Any] = {}
        self._pages: Pages | None = None
        self._copied = torch.cuda.Event()
        self._slots = torch.empty(0, dtype=torch.int64, device=device)

    @contextmanager
    def captured_by(self, pieces: PiecewiseGraph) -> Iterator[None]:
        """Attend between the graphs of a forward pass that is captured, not in them."""
        self._pieces = pieces
        try:
            yield
        finally:
            self._pieces = None

    def load(self, slots: Tensor, pages: Pages) -> None:
        """slots: (T,) int64, on the device: block * block_size + offset of each token."""
        self._slots, self._pages = slots, pages
        # FlashInfer's host buffers are its own: the last step's must have been read.
        self._copied.synchronize()
        for kind, wrapper in self._wrappers.items():
            self._plan(wrapper, kind)
        self._copied.record()

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
        store(cache, key, value, self._slots)
        block_size, kv_heads, head_dim = cache.keys.shape[1:]
        kind = _Kind(
            query.shape[1], kv_heads, head_dim, block_size, query.dtype, scale, window, softcap
        )
        if kind not in self._wrappers:
            self._wrappers[kind] = self._wrapper()
            self._plan(self._wrappers[kind], kind)
        # Of the shape's own strides: the query's, whose they would be, depend on what made it.
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if self._pieces is None:
            self._run(kind, cache, query, out)
        else:
            self._pieces.between(partial(self._run, kind, cache), query, out)
        return out

    def _run(self, kind: _Kind, cache: LayerCache, query: Tensor, out: Tensor) -> None:
        assert self._pages is not None
        count = int(self._pages.tokens[-1])  # of the rows; a graph may have more
        self._wrappers[kind].run(query[:count], (cache.keys, cache.values), out=out[:count])

    def _wrapper(self) -> Any:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper  # takes seconds to import

        return BatchPrefillWithPagedKVCacheWrapper(_workspace(self._device), "NHD", backend="fa2")

    def _plan(self, wrapper: Any, kind: _Kind) -> None:
        pages = self._pages
        assert pages is not None, "load before attend"
        wrapper.plan(
            torch.from_numpy(pages.tokens),
            torch.from_numpy(pages.blocks),
            torch.from_numpy(pages.table).pin_memory().to(self._device, non_blocking=True),
            torch.from_numpy(pages.last),
            kind.heads,
            kind.kv_heads,
            kind.head_dim,
            kind.block_size,
            causal=True,
            # Of use to other backends alone; FlashInfer would look for it tensor by tensor.
            max_token_per_sequence=int(pages.tokens[-1]),
            sm_scale=kind.scale,
            window_left=-1 if kind.window is None else kind.window - 1,
            logits_soft_cap=kind.softcap,
            q_data_type=kind.dtype,
            kv_data_type=kind.dtype,
        )


@cache
def _workspace(device: torch.device) -> Tensor:
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
