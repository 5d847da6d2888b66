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
from torch.nn import functional as F

from malora.kernels import product
from malora.kernels.batched import BaseProduct, Routing, Run, by_reader
from malora.kernels.beside import (
    ADD_HEADER,
    ALONE,
    COMMON_BLOCKS,
    IN_COMMON,
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
    TOGETHER,
    add_beside,
)
from malora.kernels.headers import alignment, side_stream, site_widths
from malora.kernels.product import CommonRead
from malora.kernels.resident import Group, ResidentAdapter, ResidentAdapters

MAX_TOKENS = 512
"""Beyond that, adapters have many tokens each, and their bytes no longer count."""
REGISTERS = 96
"""Of a thread: four programs fit beside one of the product's, and two beside two."""
_TOKENS = 16
"""Of those that share what is read: what a program takes together."""
_TOGETHER = 4
"""From this many on, they are cheaper together than each alone."""
_COMMON = 16
"""From this many on, the base product makes their read."""
_READ_ROWS = 16
_PART = 1024
"""Rows and columns of a basis that a program reads for one token."""
_SHARED_STEP = 256
"""Columns of a step for several, and of a part where there are no more parts than this, all of
which whoever reads their products adds; of a greater input, parts of several steps."""
_MOST_PARTS = 16
_ROUTE_ROWS = 32
"""Rows of up-projections that a program weighs."""
_COLUMNS = 1024
_SHARED_COLUMNS = 128
"""Columns of up-projections that a program adds for one token, and for several."""
_NUM_COUNTS = COMMON_BLOCKS.value
"""A table's first numbers, which its launches follow from."""
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
        "SHARED_STEP": _SHARED_STEP,
        "PARTS": triton.next_power_of_2(_max_parts(n)),
        "EXPERTS": triton.next_power_of_2(num_experts),
        "ROUTE_ROWS": _ROUTE_ROWS,
        "DIMS": 64,
        "WEIGHTS": 32,
        # Of up-projections, which come through shared memory while those before are added: of rows
        # read into registers, none would be under way meanwhile.
        "ADD_ROWS": 2,
        "ADD_STAGES": 4,
        "COLUMNS": _COLUMNS,
        "SHARED_ROWS": 32,
        "SHARED_COLUMNS": _SHARED_COLUMNS,
        "COUNT": count,
        "ALIGNMENT": alignment,
        "BEHIND": behind,
    }


def _shared_part(n: int) -> int:
    return _SHARED_STEP * triton.next_power_of_2(triton.cdiv(n, _SHARED_STEP * _MOST_PARTS))


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
        self._blocks_of_a_read = triton.cdiv(self._sizes.reads, _READ_ROWS)
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
        totals = table[:_NUM_COUNTS].tolist()
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
        side = self._stream
        before = torch.cuda.current_stream().record_event() if side is not None else None
        leaves_room = False
        common: CommonRead | None = None

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            nonlocal leaves_room, common
            leaves_room = product.leaves_room(x, weight)
            if not leaves_room:
                return F.linear(x, weight, bias)
            if self.num_tokens >= _COMMON:
                common = self._common_read(x, weight, group)
            out = product.multiply(x.view(-1, x.shape[-1]), weight, bias, common)
            return out.view(*x.shape[:-1], len(weight))

        # The product first: programs of a launch wait until all of the one before have begun, and
        # its are few.
        out = base(linear)
        if side is None or leaves_room:
            self._add(x, delta, group, common, behind=side is not None)
            return out, delta
        assert before is not None
        side.wait_event(before)
        with torch.cuda.stream(side):
            self._add(x, delta, group, None, behind=False)
        torch.cuda.current_stream().wait_stream(side)
        return out, delta

    def _common_read(self, x: Tensor, weight: Tensor, group: Group) -> CommonRead:
        h, _, _ = self._buffers(x, _max_parts(x.shape[-1]), len(group.sites))
        return CommonRead.beside(
            weight, self._table, self._counters, h, group.first_site, self._sizes.reads
        )

    def _add(
        self, x: Tensor, delta: Tensor, group: Group, common: CommonRead | None, behind: bool
    ) -> None:
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
            _shared_part(n),
            0 if common is None else common.parts,
            0 if common is None else common.tiles,
            **constants(
                n, self._sizes.num_experts, taken is not None, alignment(group, x.itemsize), behind
            ),
            num_warps=4,
            num_stages=1,
            maxnreg=REGISTERS,
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
            reads, rows = (-(-n // _CHUNK) * _CHUNK for n in (self._sizes.reads, self._sizes.rows))
            tokens, device = self.num_tokens, x.device
            self._scratch[parts, sites] = (
                torch.empty((parts, tokens, sites, reads), dtype=torch.float32, device=device),
                torch.empty((tokens, sites, rows), dtype=self._dtype, device=device),
                torch.empty((tokens, sites, rows), dtype=torch.int32, device=device),
            )
        return self._scratch[parts, sites]


def plan_table(runs: Sequence[Run], num_tokens: int, max_blocks: int) -> NDArray[np.int64]:
    """A plan's table: its totals, its rows of `num_tokens`, and those of `max_blocks`.

    Tokens are ordered by what they read, then by adapter; those that need no routes come last, but
    for those without adapter. A read is some of them that read the same, an add some of one
    adapter, or without any: its start in that order, its count, its first token, and the header of
    its adapter, or of one of them. The common read's pieces come last of those that share.
    """
    table = np.zeros(
        NUM_TOTALS.value + NUM_ROWS.value * num_tokens + NUM_BLOCK_ROWS.value * max_blocks, np.int64
    )
    rows = table[NUM_TOTALS.value :][: NUM_ROWS.value * num_tokens].reshape(-1, num_tokens)
    order = rows[ORDER.value]
    # Of one token each, of several, and of the common read.
    blocks: tuple[list[tuple[int, ...]], ...] = ([], [], [])
    adds: tuple[list[tuple[int, ...]], ...] = ([], [])
    num_reads = num_routed = position = 0
    shared_adds: list[tuple[int, int]] = []
    readers = sorted(by_reader(runs), key=_needs_no_routes)
    common = max(readers, key=_count, default={})
    if _count(common) < _COMMON:
        common = {}
    for adapters in readers:
        first = position
        routed = not _needs_no_routes(adapters)
        num_blocks = triton.cdiv(next(iter(adapters)).num_reads, _READ_ROWS)
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
        if adapters is common:
            some = (first, position - first, header, num_reads)
            table[COMMON_BLOCKS.value + 1 : NUM_TOTALS.value] = some
        for start, count in _pieces(first, position):
            shares = IN_COMMON if adapters is common else ALONE if count == 1 else TOGETHER
            rows[ROUTE_SHARES.value, start : start + count] = shares.value
            rows[ROUTE_READ.value, start : start + count] = num_reads
            blocks[shares.value].extend(
                (header, start, count, order[start], num_reads, block)
                for block in range(num_blocks)
            )
            num_reads += 1
    for start, count in shared_adds:  # which come after all that are alone
        rows[ROUTE_ADD.value, start : start + count] += len(adds[0])
    order[position:] = np.setdiff1d(np.arange(num_tokens), order[:position], assume_unique=True)
    for start in range(position, num_tokens, _TOKENS):
        adds[1].append((0, start, min(_TOKENS, num_tokens - start), order[start], -1, 0))
    alone, shared = blocks[0], [*blocks[1], *blocks[2]]
    table[:_NUM_COUNTS] = len(alone), len(shared), num_routed, *map(len, adds)
    table[COMMON_BLOCKS.value] = len(blocks[2])
    _fill(rows[ADD_HEADER.value :], [*adds[0], *adds[1]])
    _fill(
        table[-NUM_BLOCK_ROWS.value * max_blocks :].reshape(-1, max_blocks),
        [*alone, *shared],
    )
    return table


def _count(adapters: Mapping[ResidentAdapter, NDArray[np.int64]]) -> int:
    return sum(map(len, adapters.values()))


def _needs_no_routes(adapters: Mapping[ResidentAdapter, NDArray[np.int64]]) -> bool:
    """Whether some tokens' products with what they read are their up-projections' weights, and few
    enough that whoever adds sums their parts: single experts without coefficients.
    """
    return _count(adapters) < _TOGETHER and not any(adapter.routes for adapter in adapters)


def _fill(rows: NDArray[np.int64], records: list[tuple[int, ...]]) -> None:
    if records:
        rows[:, : len(records)] = np.array(records, np.int64).T


def _pieces(start: int, stop: int) -> list[tuple[int, int]]:
    """The starts and counts of what is computed at once of [start, stop)."""
    size = _TOKENS if stop - start >= _TOGETHER else 1
    return [(i, min(size, stop - i)) for i in range(start, stop, size)]
