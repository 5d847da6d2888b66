"""The plan of a small batch on a GPU: which program of its kernel (`beside.py`) does what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from malora.kernels import product
from malora.kernels.batched import BaseProduct, Routing, Run, by_reader
from malora.kernels.beside import (
    ADD_HEADER,
    NUM_BLOCK_ROWS,
    NUM_ROWS,
    NUM_TOTALS,
    ORDER,
    ROUTE_ADD,
    ROUTE_ALONE,
    ROUTE_BLOCKS,
    ROUTE_HEADER,
    ROUTE_READ,
    ROUTE_SHARES,
    add_beside,
)
from malora.kernels.headers import alignment, side_stream, site_widths
from malora.kernels.resident import Group, ResidentAdapter, ResidentAdapters

MAX_TOKENS = 512
"""Beyond that, adapters have many tokens each, and their bytes no longer count."""
_TOKENS = 16
"""Of those that share what is read: what a program takes together."""
_TOGETHER = 4
"""From this many on, they are cheaper together than each alone."""
_READ_ROWS = 16
_PART = 1024
"""Rows and columns of a basis that a program reads for one token."""
_SHARED_PART = 256
"""Columns for several; twice as many where there would be more parts than this."""
_MOST_PARTS = 32
_ROUTE_ROWS = 32
"""Rows of up-projections that a program weighs."""
_COLUMNS = 1024
_SHARED_COLUMNS = 128
"""Columns of up-projections that a program adds for one token, and for several."""
_FEW_PROMPTS = 16
"""How many a step has at most, for a captured plan: each may leave a piece that is not whole."""
_CHUNK = 64
"""Products and weights lie in whole chunks, of several times _ROUTE_ROWS."""


@cache
def constants(
    n: int, num_experts: int, count: bool, alignment: int, behind: bool
) -> dict[str, int | bool]:
    """What the kernel is compiled for."""
    return {
        "TOKENS": _TOKENS,
        "READ_ROWS": _READ_ROWS,
        "PART": _PART,
        "SHARED_PART": _shared_part(n),
        "SHARED_STEP": _SHARED_PART,
        "PARTS": triton.next_power_of_2(_max_parts(n)),
        "EXPERTS": triton.next_power_of_2(num_experts),
        "ROUTE_ROWS": _ROUTE_ROWS,
        "DIMS": 32,
        "ADD_ROWS": 16,
        "COLUMNS": _COLUMNS,
        "SHARED_ROWS": 32,
        "SHARED_COLUMNS": _SHARED_COLUMNS,
        "COUNT": count,
        "ALIGNMENT": alignment,
        "BEHIND": behind,
    }


def _shared_part(n: int) -> int:
    return _SHARED_PART if n <= _MOST_PARTS * _SHARED_PART else 2 * _SHARED_PART


@cache
def _divisions(group: Group) -> tuple[int, int, int, int]:
    """Of the group's inputs into parts, for one token and for several, and of its outputs into
    tiles, likewise.
    """
    n = group.in_features
    tiles, shared_tiles = (
        sum(triton.cdiv(width, columns) for width in site_widths(group))
        for columns in (_COLUMNS, _SHARED_COLUMNS)
    )
    return triton.cdiv(n, _PART), triton.cdiv(n, _shared_part(n)), tiles, shared_tiles


@cache
def _max_parts(n: int) -> int:
    return max(triton.cdiv(n, _PART), triton.cdiv(n, _shared_part(n)))


@dataclass(frozen=True)
class Capacity:
    """Which mixes a plan's launches are for: how many tokens at most read or add something alone,
    and how many pieces, of tokens that share it, are taken together.
    """

    alone: int
    shared: int

    @classmethod
    def of_any(cls, num_tokens: int) -> Capacity:
        """Every mix."""
        return cls(num_tokens, num_tokens)

    @classmethod
    def of_prompts(cls, num_tokens: int, num_sequences: int) -> Capacity:
        """Some prompts among so many sequences, the others of a token each."""
        return cls(num_sequences, num_tokens // _TOKENS + _FEW_PROMPTS)


class SmallBatchPlan:
    """The adapters of up to MAX_TOKENS tokens, made beside the base products.

    A plan may be loaded again with another mix of as many tokens; one with a capacity, also after
    its kernels were captured in a graph.
    """

    separate = True
    activates = False

    def __init__(
        self, num_tokens: int, adapters: ResidentAdapters, capacity: Capacity | None = None
    ) -> None:
        """capacity: launch as many programs as its mixes may need, not just the one loaded."""
        self.routing: Routing | None = None
        self.num_tokens = num_tokens
        self._capacity = capacity
        self._totals: list[int] = []
        device = adapters.device
        self._sizes = adapters.sizes
        self._blocks_of_a_read = triton.cdiv(self._sizes.basis_dim, _READ_ROWS) + triton.cdiv(
            self._sizes.num_experts, _READ_ROWS
        )
        self._max_blocks = num_tokens * self._blocks_of_a_read
        self._other_pieces = triton.cdiv(num_tokens, _TOKENS)
        length = (
            NUM_TOTALS.value + NUM_ROWS.value * num_tokens + NUM_BLOCK_ROWS.value * self._max_blocks
        )
        self._table = torch.zeros(length, dtype=torch.int64, device=device)
        self._counters = torch.zeros(
            (len(adapters.paths), 2, num_tokens), dtype=torch.int32, device=device
        )
        self._dtype = adapters.dtype
        self._scratch: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._stream = side_stream(device) if device.type == "cuda" else None

    def load(self, runs: Sequence[Run]) -> bool:
        """Set which tokens are whose; False where the mix is beyond the plan's capacity."""
        table = plan_table(runs, self.num_tokens, self._max_blocks)
        totals = table[: NUM_TOTALS.value - 1].tolist()
        if not self._fits(*totals):
            return False
        self._totals = totals
        host = torch.from_numpy(table)
        if self._stream is not None:
            host = host.pin_memory()
        self._table.copy_(host, non_blocking=True)
        return True

    def start(self) -> None:
        """Forget what arrived in the last step."""
        self._counters.zero_()

    def apply(self, x: Tensor, group: Group, base: BaseProduct) -> tuple[Tensor, Tensor]:
        """The base product, and what adapters add to it, zeros for tokens without any.

        x: (T, n), contiguous, of the adapters' dtype. Both (T, m).
        """
        delta = torch.empty((len(x), sum(site_widths(group))), dtype=x.dtype, device=x.device)
        if self._stream is None:
            self._add(x, delta, group)
            return base(product.linear), delta
        stream = torch.cuda.current_stream()
        before = stream.record_event()
        leaves_room = False

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            nonlocal leaves_room
            leaves_room = product.leaves_room(x, weight)
            return product.linear(x, weight, bias)

        # The product first: programs of a launch wait until all of the one before have begun, and
        # its are few.
        out = base(linear)
        if leaves_room:
            self._add(x, delta, group, behind=True)
            return out, delta
        self._stream.wait_event(before)
        with torch.cuda.stream(self._stream):
            self._add(x, delta, group)
        stream.wait_stream(self._stream)
        return out, delta

    def _add(self, x: Tensor, delta: Tensor, group: Group, behind: bool = False) -> None:
        n, sites, tokens = x.shape[1], len(group.sites), self.num_tokens
        h, c, numbers = self._buffers(x, _max_parts(n), sites)
        widths = site_widths(group)
        taken = None if self.routing is None else self.routing.gates[:, group.layer]
        add_beside[(self._num_programs(group, c.shape[-1] // _ROUTE_ROWS),)](
            x,
            delta,
            h,
            c,
            numbers,
            self._table,
            self._counters,
            h if taken is None else taken,
            group.first_site,
            n,
            tokens,
            sites,
            self._max_blocks,
            h.shape[-1],
            c.shape[-1],
            0 if taken is None else taken.stride(0),
            delta.shape[1],
            *widths,
            **constants(
                n, self._sizes.num_experts, taken is not None, alignment(group, x.itemsize), behind
            ),
            num_warps=4,
            num_stages=1,
            launch_pdl=behind,
        )

    def _num_programs(self, group: Group, chunks: int) -> int:
        sites = len(group.sites)
        parts, shared_parts, tiles, shared_tiles = _divisions(group)
        if self._capacity is None:
            blocks, shared_blocks, routed, adds, shared_adds = self._totals
            reads = (blocks * parts + shared_blocks * shared_parts) * sites
            return reads + routed * sites * chunks + adds * tiles + shared_adds * shared_tiles
        return (
            self._most(parts, shared_parts) * self._blocks_of_a_read * sites
            + self.num_tokens * sites * chunks
            + self._most(tiles, shared_tiles, self._other_pieces)
            + shared_tiles
        )

    def _most(self, alone: int, shared: int, others: int = 0) -> int:
        """The programs of the mix that takes most, where what is alone takes `alone` and a piece
        `shared`; others: pieces of tokens without adapter. A piece has _TOGETHER tokens or more,
        but for one of those.
        """
        capacity = self._capacity
        assert capacity is not None
        return min(
            self.num_tokens * max(alone, -(-shared // _TOGETHER)),
            capacity.alone * alone + (capacity.shared + others) * shared,
        )

    def _fits(
        self, blocks: int, shared_blocks: int, _routed: int, adds: int, shared_adds: int
    ) -> bool:
        capacity = self._capacity
        return capacity is None or (
            blocks <= capacity.alone * self._blocks_of_a_read
            and shared_blocks <= capacity.shared * self._blocks_of_a_read
            and adds <= capacity.alone
            and shared_adds <= capacity.shared + self._other_pieces
        )

    def _buffers(self, x: Tensor, parts: int, sites: int) -> tuple[Tensor, Tensor, Tensor]:
        """What programs hand on, for S sites.

        (parts, T, S, reads) float32, products with the input; (T, S, rows), weights of the
        up-projections' rows, in the adapters' dtype; the same int32, which rows those are, where
        the token is alone.
        """
        if (parts, sites) not in self._scratch:
            reads, rows = (
                -(-n // _CHUNK) * _CHUNK
                for n in (self._sizes.basis_dim + self._sizes.num_experts, self._sizes.rows)
            )
            tokens, device = self.num_tokens, x.device
            self._scratch[parts, sites] = (
                torch.empty((parts, tokens, sites, reads), dtype=torch.float32, device=device),
                torch.empty((tokens, sites, rows), dtype=self._dtype, device=device),
                torch.empty((tokens, sites, rows), dtype=torch.int32, device=device),
            )
        return self._scratch[parts, sites]


def _num_blocks(adapter: ResidentAdapter) -> int:
    """Blocks of rows to read of the largest of its linears."""
    return max(-(-d // _READ_ROWS) - (-routed // _READ_ROWS) for d, routed in adapter.reads)


def plan_table(runs: Sequence[Run], num_tokens: int, max_blocks: int) -> NDArray[np.int64]:
    """A plan's table: its totals, its rows of `num_tokens`, and those of `max_blocks`.

    Tokens are ordered by what they read, then by adapter; those that need no routes come last, but
    for those without adapter. A read is some of them that read the same, an add some of one
    adapter, or without any: its start in that order, its count, its first token, and the header of
    its adapter, or of one of them.
    """
    table = np.zeros(
        NUM_TOTALS.value + NUM_ROWS.value * num_tokens + NUM_BLOCK_ROWS.value * max_blocks, np.int64
    )
    rows = table[NUM_TOTALS.value :][: NUM_ROWS.value * num_tokens].reshape(-1, num_tokens)
    order = rows[ORDER.value]
    # Of one token each, and of several.
    blocks: tuple[list[tuple[int, ...]], ...] = ([], [])
    adds: tuple[list[tuple[int, ...]], ...] = ([], [])
    num_reads = num_routed = position = 0
    shared_adds: list[tuple[int, int]] = []
    for adapters in sorted(by_reader(runs), key=_needs_no_routes):
        first = position
        routed = not _needs_no_routes(adapters)
        num_blocks = _num_blocks(next(iter(adapters)))
        for adapter, tokens in adapters.items():
            begin, position = position, position + len(tokens)
            order[begin:position] = tokens
            header = adapter.headers.data_ptr()
            rows[ROUTE_HEADER.value, begin:position] = header
            for start, count in _pieces(begin, position):
                shares = count > 1
                if shares:
                    shared_adds.append((start, count))
                rows[ROUTE_ALONE.value, start : start + count] = not shares
                rows[ROUTE_ADD.value, start : start + count] = len(adds[shares])
                read = -1 if routed else num_reads + start - first
                adds[shares].append((header, start, count, order[start], read, num_blocks))
        num_routed = position if routed else num_routed
        rows[ROUTE_BLOCKS.value, first:position] = num_blocks
        for start, count in _pieces(first, position):
            shares = count > 1
            rows[ROUTE_SHARES.value, start : start + count] = shares
            rows[ROUTE_READ.value, start : start + count] = num_reads
            blocks[shares].extend(
                (header, start, count, order[start], num_reads, block)
                for block in range(num_blocks)
            )
            num_reads += 1
    for start, count in shared_adds:  # which come after all that are alone
        rows[ROUTE_ADD.value, start : start + count] += len(adds[0])
    order[position:] = np.setdiff1d(np.arange(num_tokens), order[:position], assume_unique=True)
    for start in range(position, num_tokens, _TOKENS):
        adds[1].append((0, start, min(_TOKENS, num_tokens - start), order[start], -1, 0))
    table[: NUM_TOTALS.value - 1] = *map(len, blocks), num_routed, *map(len, adds)
    _fill(rows[ADD_HEADER.value :], [*adds[0], *adds[1]])
    _fill(
        table[-NUM_BLOCK_ROWS.value * max_blocks :].reshape(-1, max_blocks),
        [*blocks[0], *blocks[1]],
    )
    return table


def _needs_no_routes(adapters: Mapping[ResidentAdapter, NDArray[np.int64]]) -> bool:
    """Whether some tokens' products with what they read are their up-projections' weights, and few
    enough that whoever adds sums their parts: single experts without coefficients.
    """
    count = sum(map(len, adapters.values()))
    return count < _TOGETHER and not any(adapter.routes for adapter in adapters)


def _fill(rows: NDArray[np.int64], records: list[tuple[int, ...]]) -> None:
    if records:
        rows[:, : len(records)] = np.array(records, np.int64).T


def _pieces(start: int, stop: int) -> list[tuple[int, int]]:
    """The starts and counts of what is computed at once of [start, stop)."""
    size = _TOKENS if stop - start >= _TOGETHER else 1
    return [(i, min(size, stop - i)) for i in range(start, stop, size)]
