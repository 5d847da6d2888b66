"""The adapters of a mixed batch, on any device that torch runs on.

Two primitives do the work, both aten's own, both reading each needed row of a table exactly once
with no copy and no padding, whatever mix of adapters, ranks and experts the batch holds:

- `row_dot`: chosen rows of a table, each dotted with the token that chose it (the "shrink": basis,
  router logits, coefficients);
- `row_sum`: for each token, the weighted sum of the rows it chose (the "expand": up-projections).

So a decode step costs the bytes of the experts that its tokens took. Runs of many tokens of one
adapter (prefill) take the dense form of `kernels.torch` instead, over views of the same tables.

The rows that depend on the batch's composition alone are worked out once (`BatchPlan`) and kept
for as long as the composition stays: a steady decode step does no index work on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from malora.kernels.tables import AdapterTables, ResidentAdapter, ResidentLinear, Shape
from malora.kernels.torch import dense_delta

DENSE_TOKENS = 32
"""A run of this many tokens of one adapter takes the dense form: three products over its tables
beat gathering the same rows for each token."""

Ints = NDArray[np.int64]


def row_dot(x: Tensor, table: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """out[i] = x[tokens[i]] · table[rows[i]].

    x: (T, w); table: (R, w), the same dtype; rows, tokens: (E,) int64. Returns (E,).
    This is the gradient of `embedding_bag` with respect to its per-sample weights.
    """
    out: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x, table, rows, tokens, tokens, 0, -1
    )
    return out


def row_sum(table: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """out[b] = Σ weights[i] · table[rows[i]] for i from starts[b] to starts[b + 1].

    table: (R, w); rows, weights: (E,); starts: (B,) int64. Returns (B, w).
    """
    out: Tensor = torch.ops.aten._embedding_bag_forward_only(
        table, rows, starts, False, 0, False, weights, False, -1
    )[0]
    return out


@dataclass(frozen=True)
class Site:
    """One linear of a group: its path in the model and its columns of the group's output."""

    path: str
    start: int
    width: int


@dataclass(frozen=True, eq=False)
class Group:
    """Linears that read the same input, their outputs side by side (q/k/v, gate/up, o, down)."""

    layer: int
    in_features: int
    sites: tuple[Site, ...]

    def spans(self) -> list[list[Site]]:
        """Adjacent sites of equal width: one expand writes them all."""
        return [list(sites) for _, sites in groupby(self.sites, key=lambda s: s.width)]


@dataclass(frozen=True)
class Run:
    """Adjacent tokens of one adapter in the batch: [start, stop)."""

    start: int
    stop: int
    adapter: ResidentAdapter


class Routing:
    """Gates collected over one step, summed over each layer's routed linears."""

    def __init__(self, num_tokens: int, num_layers: int, num_experts: int, device: torch.device):
        self.gates = torch.zeros((num_tokens, num_layers, num_experts), device=device)

    def add(self, tokens: Tensor, layer: int, gates: Tensor) -> None:
        """tokens: (P,) int64; gates: (P, N)."""
        self.gates[:, layer, : gates.shape[1]].index_add_(0, tokens, gates.float())

    def add_selected(self, tokens: Tensor, layer: int, experts: Tensor, gates: Tensor) -> None:
        """tokens: (P,) int64; experts, gates: (P, k)."""
        self.gates[:, layer].index_put_((tokens[:, None], experts), gates.float(), accumulate=True)


@dataclass(frozen=True)
class _Expand:
    """Entries [first, last) summed into `width` adjacent columns from `column`, a bag a site."""

    column: int
    width: int
    site_width: int
    first: int
    last: int
    starts: Tensor

    def add_to(
        self, out: Tensor, tokens: Tensor | slice, table: Tensor, rows: Tensor, weights: Tensor
    ) -> None:
        """out: (T, m), changed in place."""
        bags = row_sum(
            table, rows[self.first : self.last], self.starts, weights[self.first : self.last]
        )
        columns = out[:, self.column : self.column + self.width]
        delta = bags.view(-1, self.width).to(out.dtype)
        if isinstance(tokens, slice):
            columns[tokens] += delta
        else:
            columns.index_add_(0, tokens, delta)


class _Plain:
    """Tokens of single-expert adapters without coefficients (LoRA, any rank): nothing to decide."""

    def __init__(
        self,
        group: Group,
        tokens: list[int],
        adapters: list[ResidentAdapter],
        device: torch.device,
    ) -> None:
        in_rows: list[Ints] = []
        up_rows: list[Ints] = []
        counts: list[int] = []
        entry_tokens: list[int] = []
        self.expands: list[_Expand] = []
        first = 0
        for span in group.spans():
            span_counts = []
            for token, adapter in zip(tokens, adapters, strict=True):
                for site in span:
                    linear = adapter.linears.get(site.path)
                    r = linear.shape.r if linear is not None and _is_plain(linear.shape) else 0
                    span_counts.append(r)
                    if linear is not None and r:
                        in_rows.append(np.arange(linear.basis, linear.basis + r))
                        up_rows.append(np.arange(linear.up, linear.up + r))
                        counts.append(r)
                        entry_tokens.append(token)
            if any(span_counts):
                self.expands.append(_expand(span, first, span_counts, device))
                first = self.expands[-1].last
        self.in_features = group.in_features
        self.tokens = _span_or_index(tokens, device)
        self.in_rows = _tensor(np.concatenate(in_rows), device)
        self.up_rows = _tensor(np.concatenate(up_rows), device)
        self.entry_tokens = _tensor(np.repeat(np.array(entry_tokens), counts), device)

    def add_to(self, out: Tensor, x: Tensor, tables: AdapterTables) -> None:
        weights = row_dot(x, tables.rows(self.in_features), self.in_rows, self.entry_tokens)
        for expand in self.expands:
            table = tables.rows(expand.site_width)
            expand.add_to(out, self.tokens, table, self.up_rows, weights)


class _Routed:
    """Tokens whose adapters share one `Shape` in this group: P (token, site) pairs, in one go."""

    def __init__(
        self,
        group: Group,
        shape: Shape,
        tokens: list[int],
        adapters: list[ResidentAdapter],
        device: torch.device,
    ) -> None:
        self.shape = shape
        self.in_features = group.in_features
        self.layer = group.layer
        self.tokens = _span_or_index(tokens, device)
        self.expands: list[_Expand] = []
        linears: list[ResidentLinear] = []
        pair_tokens: list[int] = []
        entries = shape.top_k * shape.r
        first = 0
        for span in group.spans():
            counts = []
            for token, adapter in zip(tokens, adapters, strict=True):
                for site in span:
                    linear = adapter.linears.get(site.path)
                    if linear is not None and linear.shape == shape:
                        linears.append(linear)
                        pair_tokens.append(token)
                        counts.append(entries)
                    else:
                        counts.append(0)
            if any(counts):
                self.expands.append(_expand(span, first, counts, device))
                first = self.expands[-1].last
        self._index(linears, np.array(pair_tokens), device)

    def _index(
        self, linears: list[ResidentLinear], pair_tokens: Ints, device: torch.device
    ) -> None:
        s = self.shape
        pairs = len(linears)
        within = np.arange(s.r)
        starts = np.array([(x.basis, x.router, x.coefficients, x.up) for x in linears])
        basis, router, coefficients, up = starts.T
        in_rows = [(basis[:, None] + np.arange(s.basis_dim)).ravel()]
        in_tokens = [np.repeat(pair_tokens, s.basis_dim)]
        router_rows = (router[:, None] + np.arange(s.num_experts)).ravel()
        self.router_rows: Tensor | None = None
        if s.num_experts > 1 and s.router_input == "hidden":
            in_rows.append(router_rows)
            in_tokens.append(np.repeat(pair_tokens, s.num_experts))
        elif s.num_experts > 1:
            self.router_rows = _tensor(router_rows, device)
            self.router_pairs = _tensor(np.repeat(np.arange(pairs), s.num_experts), device)
        self.in_rows = _tensor(np.concatenate(in_rows), device)
        self.in_tokens = _tensor(np.concatenate(in_tokens), device)
        self.pair_tokens = _tensor(pair_tokens, device)
        # The first row of each pair's tables; the chosen expert's comes r rows an expert later.
        self.up_rows = _tensor((up[:, None] + within)[:, None], device)
        first = coefficients if s.coefficients == "learned" else np.arange(pairs) * s.basis_dim
        self.value_rows = _tensor((first[:, None] + within)[:, None], device)
        self.entry_pairs = _tensor(np.repeat(np.arange(pairs), s.top_k * s.r), device)
        self.no_choice = torch.zeros((pairs, 1), dtype=torch.int64, device=device)

    def add_to(
        self, out: Tensor, x: Tensor, tables: AdapterTables, routing: Routing | None
    ) -> None:
        s = self.shape
        pairs = self.no_choice.shape[0]
        h = row_dot(x, tables.rows(self.in_features), self.in_rows, self.in_tokens)
        z = h[: pairs * s.basis_dim].view(pairs, s.basis_dim)
        gates: Tensor | None = None
        if s.num_experts == 1:
            experts = self.no_choice
        else:
            logits = h[pairs * s.basis_dim :]
            if self.router_rows is not None:
                logits = row_dot(z, tables.rows(s.basis_dim), self.router_rows, self.router_pairs)
            # Renormalised top-k of a softmax is the softmax of the top-k logits.
            top, experts = logits.view(pairs, s.num_experts).topk(s.top_k, dim=-1)
            gates = torch.softmax(top.float(), dim=-1)
            if routing is not None:
                routing.add_selected(self.pair_tokens, self.layer, experts, gates)
        chosen = experts.unsqueeze(-1)
        values = self._coordinates(z, chosen, tables)
        weights = values if gates is None else values * gates.to(values.dtype).unsqueeze(-1)
        rows = torch.add(self.up_rows, chosen, alpha=s.r).view(-1)
        for expand in self.expands:
            table = tables.rows(expand.site_width)
            expand.add_to(out, self.tokens, table, rows, weights.view(-1))

    def _coordinates(self, z: Tensor, chosen: Tensor, tables: AdapterTables) -> Tensor:
        """P_t z of the chosen experts: (P, k, r)."""
        s = self.shape
        pairs = z.shape[0]
        if s.coefficients == "identity":
            return z.view(pairs, 1, s.r).expand(pairs, s.top_k, s.r)
        rows = torch.add(self.value_rows, chosen, alpha=s.r)
        if s.coefficients == "block":
            return z.reshape(-1)[rows]
        flat = row_dot(z, tables.rows(s.basis_dim), rows.view(-1), self.entry_pairs)
        return flat.view(pairs, s.top_k, s.r)


def _is_plain(shape: Shape) -> bool:
    return shape.num_experts == 1 and shape.coefficients != "learned"


def _tensor(values: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)


def _span_or_index(tokens: list[int], device: torch.device) -> Tensor | slice:
    if tokens[-1] - tokens[0] + 1 == len(tokens):
        return slice(tokens[0], tokens[-1] + 1)
    return _tensor(np.array(tokens), device)


def _expand(span: list[Site], first: int, counts: list[int], device: torch.device) -> _Expand:
    ends = np.cumsum(np.array(counts, dtype=np.int64))
    width = span[0].width
    starts = _tensor(ends - counts, device)
    last = first + int(ends[-1])
    return _Expand(span[0].start, width * len(span), width, first, last, starts)


class _Dense:
    """A run of many tokens of one adapter: three products over views of its tables."""

    def __init__(self, group: Group, run: Run, tables: AdapterTables) -> None:
        self.layer = group.layer
        self.tokens = slice(run.start, run.stop)
        self.sites = [
            (site, tables.view(run.adapter.linears[site.path]))
            for site in group.sites
            if site.path in run.adapter.linears
        ]

    def add_to(self, out: Tensor, x: Tensor, routing: Routing | None) -> None:
        for site, linear in self.sites:
            delta, gates = dense_delta(x[self.tokens], linear)
            out[self.tokens, site.start : site.start + site.width] += delta.to(out.dtype)
            if routing is not None and gates is not None:
                tokens = torch.arange(self.tokens.start, self.tokens.stop, device=x.device)
                routing.add(tokens, self.layer, gates)


class _GroupPlan:
    """What one group does for one composition of the batch."""

    def __init__(self, group: Group, runs: Sequence[Run], tables: AdapterTables) -> None:
        self.dense: list[_Dense] = []
        plain: tuple[list[int], list[ResidentAdapter]] = ([], [])
        routed: dict[Shape, tuple[list[int], list[ResidentAdapter]]] = {}
        for run in runs:
            if run.stop - run.start >= DENSE_TOKENS:
                self.dense.append(_Dense(group, run, tables))
                continue
            linears = [run.adapter.linears.get(site.path) for site in group.sites]
            shapes = {linear.shape for linear in linears if linear is not None}
            kinds = [routed.setdefault(s, ([], [])) for s in shapes if not _is_plain(s)]
            if any(_is_plain(s) for s in shapes):
                kinds.append(plain)
            for tokens, adapters in kinds:
                tokens.extend(range(run.start, run.stop))
                adapters.extend([run.adapter] * (run.stop - run.start))
        device = tables.device
        self.plain = _Plain(group, *plain, device) if plain[0] else None
        self.routed = [_Routed(group, shape, *of, device) for shape, of in routed.items()]


class BatchPlan:
    """The adapters of one batch: which tokens are whose. Kept while the composition stays.

    `runs` need not cover the batch: tokens in no run have no adapter and cost nothing. Runs must
    be in order and must not overlap.
    """

    def __init__(self, runs: Sequence[Run], tables: AdapterTables) -> None:
        self.runs = runs
        self.routing: Routing | None = None
        """Set for a step that reports the gates its tokens took."""
        self._tables = tables
        self._groups: dict[Group, _GroupPlan] = {}

    def add_to(self, out: Tensor, x: Tensor, group: Group) -> None:
        """Add every token's adapter to the base product, in place.

        x: (T, n), the group's input. out: (T, m), the group's base output.
        """
        plan = self._groups.get(group)
        if plan is None:
            plan = self._groups[group] = _GroupPlan(group, self.runs, self._tables)
        x = x.to(self._tables.dtype)
        if plan.plain is not None:
            plan.plain.add_to(out, x, self._tables)
        for routed in plan.routed:
            routed.add_to(out, x, self._tables, self.routing)
        for dense in plan.dense:
            dense.add_to(out, x, self.routing)
