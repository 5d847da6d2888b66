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

from collections.abc import Callable, Iterable, Sequence
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
    out: Tensor = torch._embedding_bag_forward_only(
        table, rows, starts, per_sample_weights=weights
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
            columns[tokens].add_(delta)
        else:
            columns.index_put_((tokens,), delta, accumulate=True)


class _Template:
    """One adapter in one group: for each span, the linears of one kind and their bags' sizes."""

    def __init__(self, group: Group, adapter: ResidentAdapter, kind: Shape | None) -> None:
        """kind: the shape of routed linears, or None for those with nothing to decide."""
        self.linears: list[list[ResidentLinear]] = []
        self.counts: list[list[int]] = []
        for span in group.spans():
            linears, counts = [], []
            for site in span:
                linear = adapter.linears.get(site.path)
                if linear is not None and _kind(linear.shape) == kind:
                    linears.append(linear)
                    counts.append(linear.shape.r if kind is None else kind.top_k * kind.r)
                else:
                    counts.append(0)
            self.linears.append(linears)
            self.counts.append(counts)
        if kind is None:
            self.in_rows = [_rows((x.basis, x.shape.r) for x in span) for span in self.linears]
            self.up_rows = [_rows((x.up, x.shape.r) for x in span) for span in self.linears]
        else:
            self.starts = [
                np.array(
                    [(x.basis, x.router, x.coefficients, x.up) for x in span], dtype=np.int64
                ).reshape(-1, 4)
                for span in self.linears
            ]


def _rows(ranges: Iterable[tuple[int, int]]) -> Ints:
    return np.concatenate([np.arange(0), *(np.arange(a, a + n) for a, n in ranges)])


class _Entries:
    """Collects, span by span, what the tokens of several runs contribute."""

    def __init__(self, group: Group, runs: list[tuple[Run, _Template]], device: torch.device):
        self.tokens = _span_or_index(
            np.concatenate([np.arange(run.start, run.stop) for run, _ in runs]), device
        )
        self.expands: list[_Expand] = []
        self._runs = runs
        first = 0
        for index, span in enumerate(group.spans()):
            counts = np.concatenate(
                [np.tile(t.counts[index], run.stop - run.start) for run, t in runs]
            )
            ends = np.cumsum(counts)
            if ends[-1]:
                width, last = span[0].width, first + int(ends[-1])
                starts = _tensor(ends - counts, device)
                self.expands.append(
                    _Expand(span[0].start, width * len(span), width, first, last, starts)
                )
                first = last

    def gather(self, values: Callable[[_Template], list[Ints]]) -> Ints:
        """Each run's per-token values, once a token, in the order span, run, token."""
        spans = range(len(self._runs[0][1].linears))
        parts = [(values(template), run.stop - run.start) for run, template in self._runs]
        return np.concatenate(
            [
                np.tile(part[span], (n, *(1,) * (part[span].ndim - 1)))
                for span in spans
                for part, n in parts
            ]
        )

    def gather_tokens(self, values: Callable[[_Template], list[Ints]]) -> Ints:
        """The token of each row that `gather` gives for the same values."""
        spans = range(len(self._runs[0][1].linears))
        parts = [(values(template), run) for run, template in self._runs]
        return np.concatenate(
            [
                np.repeat(np.arange(run.start, run.stop), len(part[span]))
                for span in spans
                for part, run in parts
            ]
        )


class _Plain:
    """Tokens of single-expert adapters without coefficients (LoRA, any rank): nothing to decide."""

    def __init__(
        self, group: Group, runs: list[tuple[Run, _Template]], device: torch.device
    ) -> None:
        entries = _Entries(group, runs, device)
        self.in_features = group.in_features
        self.tokens, self.expands = entries.tokens, entries.expands
        self.in_rows = _tensor(entries.gather(lambda t: t.in_rows), device)
        self.up_rows = _tensor(entries.gather(lambda t: t.up_rows), device)
        self.entry_tokens = _tensor(entries.gather_tokens(lambda t: t.in_rows), device)

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
        runs: list[tuple[Run, _Template]],
        device: torch.device,
    ) -> None:
        entries = _Entries(group, runs, device)
        self.shape = shape
        self.in_features = group.in_features
        self.layer = group.layer
        self.tokens, self.expands = entries.tokens, entries.expands
        self._index(
            entries.gather(lambda t: t.starts), entries.gather_tokens(lambda t: t.starts), device
        )

    def _index(self, starts: Ints, pair_tokens: Ints, device: torch.device) -> None:
        """starts: (P, 4), the first row of each pair's basis, router, coefficients and up."""
        s = self.shape
        pairs = len(starts)
        within = np.arange(s.r)
        basis, router, coefficients, up = starts.T
        # A pair's basis rows, then its router's where that reads the same input.
        in_rows = basis[:, None] + np.arange(s.basis_dim)
        router_rows = router[:, None] + np.arange(s.num_experts)
        self.router_rows: Tensor | None = None
        if s.num_experts > 1 and s.router_input == "hidden":
            in_rows = np.concatenate([in_rows, router_rows], axis=1)
        elif s.num_experts > 1:
            self.router_rows = _tensor(router_rows.ravel(), device)
            self.router_pairs = _tensor(np.repeat(np.arange(pairs), s.num_experts), device)
        self.in_rows = _tensor(in_rows.ravel(), device)
        self.in_tokens = _tensor(np.repeat(pair_tokens, in_rows.shape[1]), device)
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
        h = h.view(pairs, -1)
        z = h[:, : s.basis_dim]
        gates: Tensor | None = None
        if s.num_experts == 1:
            experts = self.no_choice
        else:
            logits = h[:, s.basis_dim :]
            if self.router_rows is not None:
                logits = row_dot(z, tables.rows(s.basis_dim), self.router_rows, self.router_pairs)
                logits = logits.view(pairs, s.num_experts)
            # Renormalised top-k of a softmax is the softmax of the top-k logits.
            top, experts = logits.topk(s.top_k, dim=-1)
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
            return z.unsqueeze(1).expand(pairs, s.top_k, s.r)
        rows = torch.add(self.value_rows, chosen, alpha=s.r)
        if s.coefficients == "block":
            return z.reshape(-1)[rows]
        flat = row_dot(z, tables.rows(s.basis_dim), rows.view(-1), self.entry_pairs)
        return flat.view(pairs, s.top_k, s.r)


def _kind(shape: Shape) -> Shape | None:
    """None for a single expert without coefficients, which has nothing to decide."""
    return None if shape.num_experts == 1 and shape.coefficients != "learned" else shape


def _tensor(values: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)


def _span_or_index(tokens: Ints, device: torch.device) -> Tensor | slice:
    if tokens[-1] - tokens[0] + 1 == len(tokens):
        return slice(int(tokens[0]), int(tokens[-1]) + 1)
    return _tensor(tokens, device)


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
            out[self.tokens, site.start : site.start + site.width].add_(delta.to(out.dtype))
            if routing is not None and gates is not None:
                tokens = torch.arange(self.tokens.start, self.tokens.stop, device=x.device)
                routing.add(tokens, self.layer, gates)


class _GroupPlan:
    """What one group does for one composition of the batch."""

    def __init__(self, group: Group, runs: Sequence[Run], tables: AdapterTables) -> None:
        self.dense: list[_Dense] = []
        gathered: dict[Shape | None, list[tuple[Run, _Template]]] = {}
        for run in runs:
            if run.stop - run.start >= DENSE_TOKENS:
                self.dense.append(_Dense(group, run, tables))
                continue
            for kind, template in _templates(group, run.adapter).items():
                gathered.setdefault(kind, []).append((run, template))
        plain = gathered.pop(None, None)
        self.plain = None if plain is None else _Plain(group, plain, tables.device)
        self.routed = [
            _Routed(group, shape, of, tables.device)
            for shape, of in gathered.items()
            if shape is not None
        ]


def _templates(group: Group, adapter: ResidentAdapter) -> dict[Shape | None, _Template]:
    """By kind; kept with the adapter, whose rows do not move while it is resident."""
    kept: dict[Shape | None, _Template] | None = adapter.templates.get(group)
    if kept is None:
        linears = (adapter.linears.get(site.path) for site in group.sites)
        kinds = {_kind(linear.shape) for linear in linears if linear is not None}
        kept = {kind: _Template(group, adapter, kind) for kind in kinds}
        adapter.templates[group] = kept
    return kept


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
