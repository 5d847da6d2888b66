"""The plan of a large batch on a GPU: which tokens its kernels (`triton.py`) take together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from malora.kernels.batched import BaseProduct, Routing, Run, by_reader
from malora.kernels.headers import (
    alignment,
    num_processors,
    num_stages,
    side_stream,
    site_widths,
)
from malora.kernels.resident import Group, ResidentAdapters
from malora.kernels.small_batch import MAX_TOKENS, SmallBatchPlan
from malora.kernels.triton import (
    ADD_COUNT,
    ADD_HEADER,
    ADD_START,
    NUM_TABLE_ROWS,
    ORDER,
    READ_HEADER,
    READ_START,
    activate,
    expand,
    project,
    route,
)

_TOKENS = 64
"""Of one adapter that a program takes together."""
_ROUTE_TOKENS = 32
"""Of those, that a program routes: with more, their products fill a multiprocessor's registers."""
_ROUTE_ROWS = 64
"""Rows of an up-projection that it weighs together."""
_MIN_PART = 1024
"""Columns of a basis that a program of `project` reads at least, where there are few tokens."""
_READ_ROWS = 64
"""Rows of bases and routers that a program reads at most."""
_READ_BYTES = 256
"""Of a row, that go through the tensor cores together."""
_READ_STAGES = 4
_ADD_ROWS = 64
_ADD_BYTES = 128
"""Rows of up-projections, and of each so many bytes, that a program adds together."""
_ADD_STAGES = 3
"""How many of what is read together are under way or in use, where shared memory has room."""
_SPAN = 512
"""Columns that a program adds or activates, some after the others: what it must read before it
knows where its rows lie takes as long as a few of them."""
_WARPS = 8
_CHUNK = 64
"""Weights of up-projection rows are stored, and products with the input too, in whole chunks."""


class _Scratch(NamedTuple):
    """How reads of groups with as many inputs and sites are divided, and what kernels hand on."""

    blocks: int
    rows_together: int
    """Of bases and routers, in a block."""
    products: Tensor
    """(parts, T, S, reads) float32, with the input, for S sites; parts of the input."""
    weights: Tensor
    """(T, S, rows), of up-projections' rows, in the adapters' dtype."""


class LargeBatchPlan:
    """The adapters of many tokens: which tokens are whose, and scratch memory.

    A plan may be loaded again with another mix of as many tokens; one for a number of sequences,
    also after its kernels were captured in a graph.
    """

    separate = False
    activates = True

    def __init__(
        self, num_tokens: int, adapters: ResidentAdapters, num_sequences: int | None = None
    ) -> None:
        """num_sequences: launch as many programs as any mix of so many sequences may need."""
        self.routing: Routing | None = None
        self.num_tokens = num_tokens
        device = adapters.device
        self._num_reads = self._num_adds = self._num_items = 0
        self._is_exact = num_sequences is None
        if num_sequences is not None:
            # Each has a last item that is not full, as have the tokens without an adapter.
            items = -(-num_tokens // _TOKENS) + num_sequences + 1
            self._num_reads = self._num_adds = self._num_items = min(items, num_tokens)
        self._table = torch.zeros((NUM_TABLE_ROWS, num_tokens), dtype=torch.int64, device=device)
        self._dtype = adapters.dtype
        self._sizes = adapters.sizes
        self._scratch: dict[tuple[int, int], _Scratch] = {}
        self._stream = side_stream(device) if device.type == "cuda" else None

    def load(self, runs: Sequence[Run]) -> bool:
        """Set which tokens are whose; always possible."""
        table = batch_table(runs, self.num_tokens)
        if self._is_exact:
            self._num_reads, self._num_adds, self._num_items = np.count_nonzero(
                table[[READ_HEADER.value, ADD_HEADER.value, ADD_COUNT.value]], axis=1
            ).tolist()
        host = torch.from_numpy(table)
        if self._stream is not None:
            host = host.pin_memory()
        self._table.copy_(host, non_blocking=True)
        return True

    def start(self) -> None:
        """Nothing is kept from step to step."""

    def apply(self, x: Tensor, group: Group, base: BaseProduct) -> tuple[Tensor, Tensor | None]:
        """The base product, (…, m), with every token's adapter added; x: (T, n), contiguous."""
        out = self._product(x, group, base)
        if self._num_adds:
            self._expand(out.view(len(x), -1), group)
        return out, None

    def activate(self, x: Tensor, group: Group, base: BaseProduct) -> Tensor:
        """silu(gate) · up, (T, m / 2), of a group's two outputs as `apply` makes them."""
        out = self._product(x, group, base)
        c = self._scratch_of(group).weights
        width = group.sites[0].width
        activated = out.new_empty((len(x), width))
        activate[(-(-width // _SPAN), self._num_items)](
            out,
            activated,
            c,
            self._table,
            group.first_site,
            width,
            self.num_tokens,
            c.shape[-1],
            **self._of_adding(group, out.itemsize, 2),
        )
        return activated

    def _of_adding(self, group: Group, itemsize: int, outputs: int) -> dict[str, int | bool]:
        """outputs: how many of the group's a program reads at a time, with their up-projections."""
        stage_bytes = outputs * (_TOKENS + _ADD_ROWS) * _ADD_BYTES
        return {
            "TOKENS": _TOKENS,
            "ROWS": _ADD_ROWS,
            "COLUMNS": _ADD_BYTES // itemsize,
            "SPAN": _SPAN,
            "STAGES": num_stages(self._table.device, stage_bytes, _ADD_STAGES),
            "MORE_ROWS": self._sizes.rows > _ADD_ROWS,
            "ALIGNMENT": alignment(group, itemsize),
            "num_warps": _WARPS,
        }

    def _product(self, x: Tensor, group: Group, base: BaseProduct) -> Tensor:
        """The base product, and beside it the weights of the up-projections' rows."""
        if not self._num_adds:
            return base(F.linear)
        if self._stream is None:
            self._weigh(x, group)
            return base(F.linear)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._weigh(x, group)
        out = base(F.linear)
        torch.cuda.current_stream().wait_stream(self._stream)
        return out

    def _expand(self, out: Tensor, group: Group) -> None:
        c = self._scratch_of(group).weights
        widths = site_widths(group)
        spans = sum(-(-width // _SPAN) for width in widths)
        expand[(spans, self._num_adds)](
            out,
            c,
            self._table,
            group.first_site,
            out.shape[1],
            self.num_tokens,
            len(group.sites),
            c.shape[-1],
            *widths,
            **self._of_adding(group, out.itemsize, 1),
        )

    def _weigh(self, x: Tensor, group: Group) -> None:
        sites, (blocks, rows, h, c) = len(group.sites), self._scratch_of(group)
        parts, columns = len(h), _READ_BYTES // x.itemsize
        stage_bytes = (_TOKENS + _READ_ROWS) * _READ_BYTES
        project[(parts * blocks, self._num_reads)](
            x,
            h,
            self._table,
            group.first_site,
            x.shape[1],
            self.num_tokens,
            h.shape[-1],
            blocks,
            -(-x.shape[1] // (columns * parts)),
            SITES=sites,
            TOKENS=_TOKENS,
            ROWS=rows,
            COLUMNS=columns,
            ALIGNMENT=alignment(group, x.itemsize),
            num_warps=_WARPS,
            num_stages=num_stages(self._table.device, stage_bytes, _READ_STAGES),
        )
        taken = None if self.routing is None else self.routing.gates[:, group.layer]
        route[(self._num_adds, sites, _TOKENS // _ROUTE_TOKENS)](
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
            parts,
            TOKENS=_ROUTE_TOKENS,
            EXPERTS=max(16, _power_of_2(self._sizes.num_experts)),
            ROWS=_ROUTE_ROWS,
            DIMS=32,
            num_warps=4,
        )

    def _scratch_of(self, group: Group) -> _Scratch:
        key = n, sites = group.in_features, len(group.sites)
        if key not in self._scratch:
            rows_together = min(_READ_ROWS, _power_of_2(sites * self._sizes.reads))
            blocks = -(-sites * self._sizes.reads // rows_together)
            tokens, device = self.num_tokens, self._table.device
            # Few tokens too have a program for most multiprocessors.
            parts = num_processors(device) // (blocks * -(-tokens // _TOKENS))
            parts = max(1, min(parts, n // _MIN_PART))
            reads, rows = (-(-n // _CHUNK) * _CHUNK for n in (self._sizes.reads, self._sizes.rows))
            self._scratch[key] = _Scratch(
                blocks,
                rows_together,
                torch.empty((parts, tokens, sites, reads), dtype=torch.float32, device=device),
                torch.empty((tokens, sites, rows), dtype=self._dtype, device=device),
            )
        return self._scratch[key]


GpuPlan = SmallBatchPlan | LargeBatchPlan


def gpu_plan(num_tokens: int, adapters: ResidentAdapters) -> GpuPlan:
    """The plan of a batch of so many tokens, not loaded yet."""
    small = num_tokens <= MAX_TOKENS
    return (SmallBatchPlan if small else LargeBatchPlan)(num_tokens, adapters)


def _power_of_2(n: int) -> int:
    """The next one: `triton.next_power_of_2`, as `triton.cdiv`, takes microseconds a call."""
    return 1 << (n - 1).bit_length()


def batch_table(runs: Sequence[Run], num_tokens: int) -> NDArray[np.int64]:
    """A large plan's table, (7, T): who is computed together.

    Tokens are ordered by what they read, then by adapter; those without one come last. An item is
    some of them that read the same (READ) or are of one adapter (ADD), or without any: its start in
    that order, its count, and the header of its adapter, or of one of them. A header of 0 means
    none.
    """
    table = np.zeros((NUM_TABLE_ROWS, num_tokens), np.int64)
    position = 0
    reads: list[tuple[int, int, int]] = []
    adds: list[tuple[int, int, int]] = []
    for adapters in by_reader(runs):
        first = position
        for adapter, tokens in adapters.items():
            begin, position = position, position + len(tokens)
            table[ORDER.value, begin:position] = tokens
            header = adapter.headers.data_ptr()
            adds += _items(begin, position, header)
        reads += _items(first, position, header)
    order = table[ORDER.value]
    order[position:] = np.setdiff1d(np.arange(num_tokens), order[:position], assume_unique=True)
    adds += _items(position, num_tokens, 0)
    if reads:
        table[READ_START.value : READ_HEADER.value + 1, : len(reads)] = np.array(reads).T
    if adds:
        table[ADD_START.value : ADD_HEADER.value + 1, : len(adds)] = np.array(adds).T
    return table


def _items(start: int, stop: int, header: int) -> list[tuple[int, int, int]]:
    return [(i, min(_TOKENS, stop - i), header) for i in range(start, stop, _TOKENS)]
