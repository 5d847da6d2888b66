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
from malora.router import gates

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


Runs = list[tuple[Run, _Template]]


def _each_token(runs: Runs, values: Callable[[_Template], list[Ints]]) -> list[Ints]:
    """For each span, the runs' values, once a token."""
    parts = [(values(template), run.stop - run.start) for run, template in runs]
    return [
        np.concatenate(
            [np.tile(part[span], (n, *(1,) * (part[span].ndim - 1))) for part, n in parts]
        )
        for span in range(len(parts[0][0]))
    ]


def _tokens_of(runs: Runs, values: Callable[[_Template], list[Ints]]) -> list[Ints]:
    """The token of each row that `_each_token` gives for the same values."""
    parts = [(values(template), run) for run, template in runs]
    return [
        np.concatenate(
            [np.repeat(np.arange(run.start, run.stop), len(part[span])) for part, run in parts]
        )
        for span in range(len(parts[0][0]))
    ]


class _Plain:
    """Single-expert adapters without coefficients (LoRA, any rank): nothing to decide.

    `in_rows` and `in_tokens` are what the group's `row_dot` is to read for these tokens.
    """

    def __init__(self, runs: Runs, device: torch.device) -> None:
        up_rows = _each_token(runs, lambda t: t.up_rows)
        self.sizes = [len(span) for span in up_rows]
        self.in_rows = np.concatenate(_each_token(runs, lambda t: t.in_rows))
        self.in_tokens = np.concatenate(_tokens_of(runs, lambda t: t.in_rows))
        self._up_rows = _tensor(np.concatenate(up_rows), device)

    def choose(
        self,
        h: Tensor,
        tables: AdapterTables,  # noqa: ARG002
        routing: Routing | None,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """The rows to sum and their weights, (E,) each; h: (E,), what `row_dot` gave."""
        return self._up_rows, h


class _Routed:
    """Adapters of one `Shape`: P (token, linear) pairs, decided in one go."""

    def __init__(self, group: Group, shape: Shape, runs: Runs, device: torch.device) -> None:
        starts = _each_token(runs, lambda t: t.starts)
        self.sizes = [len(span) * shape.top_k * shape.r for span in starts]
        self._shape = shape
        self._layer = group.layer
        self._index(
            np.concatenate(starts), np.concatenate(_tokens_of(runs, lambda t: t.starts)), device
        )

    def _index(self, starts: Ints, pair_tokens: Ints, device: torch.device) -> None:
        """starts: (P, 4), the first row of each pair's basis, router, coefficients and up."""
        s = self._shape
        pairs = len(starts)
        within = np.arange(s.r)
        basis, router, coefficients, up = starts.T
        # A pair's basis rows, then its router's where that reads the same input.
        in_rows = basis[:, None] + np.arange(s.basis_dim)
        router_rows = router[:, None] + np.arange(s.num_experts)
        self._router_rows: Tensor | None = None
        if s.num_experts > 1 and s.router_input == "hidden":
            in_rows = np.concatenate([in_rows, router_rows], axis=1)
        elif s.num_experts > 1:
            self._router_rows = _tensor(router_rows.ravel(), device)
            self._router_pairs = _tensor(np.repeat(np.arange(pairs), s.num_experts), device)
        self.in_rows = in_rows.ravel()
        self.in_tokens = np.repeat(pair_tokens, in_rows.shape[1])
        self._pair_tokens = _tensor(pair_tokens, device)
        # The first rows of each pair's up-projections, and of its coefficients (or of the values
        # that block selectors pick); the chosen expert's come r rows an expert later.
        first = coefficients if s.coefficients == "learned" else np.arange(pairs) * s.basis_dim
        starts = np.stack([up] if s.coefficients == "identity" else [up, first])
        self._first_rows = _tensor((starts[..., None] + within)[:, :, None], device)
        self._entry_pairs = _tensor(np.repeat(np.arange(pairs), s.top_k * s.r), device)
        self._no_choice = torch.zeros((pairs, 1), dtype=torch.int64, device=device)

    def choose(
        self, h: Tensor, tables: AdapterTables, routing: Routing | None
    ) -> tuple[Tensor, Tensor]:
        """The rows to sum and their weights, (E,) each; h: what `row_dot` gave."""
        s = self._shape
        pairs = self._no_choice.shape[0]
        h = h.view(pairs, -1)
        z = h[:, : s.basis_dim]
        gates: Tensor | None = None
        if s.num_experts == 1:
            experts = self._no_choice
        else:
            logits = h[:, s.basis_dim :]
            if self._router_rows is not None:
                logits = row_dot(z, tables.rows(s.basis_dim), self._router_rows, self._router_pairs)
                logits = logits.view(pairs, s.num_experts)
            # Renormalised top-k of a softmax is the softmax of the top-k logits.
            top, experts = logits.topk(s.top_k, dim=-1)
            gates = torch.softmax(top, dim=-1, dtype=torch.float32)
            if routing is not None:
                routing.add_selected(self._pair_tokens, self._layer, experts, gates)
        rows = torch.add(self._first_rows, experts.unsqueeze(-1), alpha=s.r).flatten(1).unbind()
        weights = self._coordinates(z, rows, tables)
        if gates is not None:
            weights = weights.view(pairs, s.top_k, s.r) * gates.to(z.dtype).unsqueeze(-1)
        return rows[0], weights.view(-1)

    def _coordinates(self, z: Tensor, rows: Sequence[Tensor], tables: AdapterTables) -> Tensor:
        """P_t z of the chosen experts, (P · k · r,), from the rows of `_first_rows` they take."""
        s = self._shape
        if s.coefficients == "identity":
            return z.unsqueeze(1).expand(-1, s.top_k, -1).flatten()
        if s.coefficients == "block":
            return z.reshape(-1)[rows[1]]
        return row_dot(z, tables.rows(s.basis_dim), rows[1], self._entry_pairs)


@dataclass(frozen=True)
class _Span:
    """Adjacent sites of one width, and their bags: a bag a (kind, token, site), in that order."""

    columns: slice
    site_width: int
    starts: Tensor
    size: int


class _Gathered:
    """The tokens of short runs: one `row_dot` and one `row_sum` a span, whatever adapters."""

    def __init__(self, group: Group, kinds: dict[Shape | None, Runs], device: torch.device) -> None:
        self._in_features = group.in_features
        self._kinds = [
            _Plain(runs, device) if kind is None else _Routed(group, kind, runs, device)
            for kind, runs in kinds.items()
        ]
        self._tokens = _span_or_index(
            np.concatenate(
                [np.arange(run.start, run.stop) for runs in kinds.values() for run, _ in runs]
            ),
            device,
        )
        self._in_rows = _tensor(np.concatenate([k.in_rows for k in self._kinds]), device)
        self._in_tokens = _tensor(np.concatenate([k.in_tokens for k in self._kinds]), device)
        self._in_sizes = [len(k.in_rows) for k in self._kinds]
        self._spans = []
        for index, sites in enumerate(group.spans()):
            counts = np.concatenate(
                [
                    np.tile(template.counts[index], run.stop - run.start)
                    for runs in kinds.values()
                    for run, template in runs
                ]
            )
            ends = np.cumsum(counts)
            first, width = sites[0].start, sites[0].width
            columns = slice(first, first + width * len(sites))
            starts = _tensor(ends - counts, device)
            self._spans.append(_Span(columns, width, starts, int(ends[-1])))

    def add_to(
        self, out: Tensor, x: Tensor, tables: AdapterTables, routing: Routing | None
    ) -> None:
        """out: (T, m), changed in place."""
        h = row_dot(x, tables.rows(self._in_features), self._in_rows, self._in_tokens)
        for span, (rows, weights) in zip(
            self._spans, self._choose(h, tables, routing), strict=True
        ):
            if span.size:
                bags = row_sum(tables.rows(span.site_width), rows, span.starts, weights)
                width = span.columns.stop - span.columns.start
                delta = bags.view(-1, width).to(out.dtype)
                columns = out[:, span.columns]
                if isinstance(self._tokens, slice):
                    columns[self._tokens].add_(delta)
                else:
                    columns.index_put_((self._tokens,), delta, accumulate=True)

    def _choose(
        self, h: Tensor, tables: AdapterTables, routing: Routing | None
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """For each span, the rows to sum and their weights, in the order of its bags."""
        values = (h,) if len(self._kinds) == 1 else h.split(self._in_sizes)
        parts = [
            kind.choose(part, tables, routing)
            for kind, part in zip(self._kinds, values, strict=True)
        ]
        if len(self._spans) == 1:
            return [_joined(parts)]
        cut = [
            zip(*(tensor.split(kind.sizes) for tensor in part), strict=True)
            for kind, part in zip(self._kinds, parts, strict=True)
        ]
        return map(_joined, zip(*cut, strict=True))


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    rows, weights = zip(*parts, strict=True)
    return (rows[0], weights[0]) if len(parts) == 1 else (torch.cat(rows), torch.cat(weights))


def _kind(shape: Shape) -> Shape | None:
    """None for a single expert without coefficients, which has nothing to decide."""
    return None if shape.num_experts == 1 and shape.coefficients != "learned" else shape


def _tensor(values: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)


def _span_or_index(tokens: Ints, device: torch.device) -> Tensor | slice:
    if np.array_equal(tokens, np.arange(tokens[0], tokens[0] + len(tokens))):
        return slice(int(tokens[0]), int(tokens[-1]) + 1)
    return _tensor(tokens, device)


@dataclass(frozen=True)
class _DenseRun:
    """One run's weights for S linears of one shape, as products want them."""

    tokens: slice
    inputs: Tensor
    """(S · (d + N), n): each linear's basis, then its router where that reads the same input."""
    routers: Tensor | None
    """(S, d, N), where routers read the basis."""
    coefficients: Tensor | None
    """(S, d, N·r)."""
    ups: list[tuple[slice, Tensor]]
    """The linear's columns of the output and its stacked up-projections, (N·r, m)."""


class _Dense:
    """Runs of many tokens whose adapters share a `Shape` at the same sites.

    Every expert is computed, with masked gates, in a few products a run.
    """

    def __init__(
        self,
        group: Group,
        shape: Shape,
        sites: Sequence[Site],
        runs: list[Run],
        tables: AdapterTables,
    ) -> None:
        self._layer = group.layer
        self._shape = shape
        self._num_sites = len(sites)
        self._runs = [self._dense_run(run, sites, tables) for run in runs]
        self._num_tokens = sum(run.stop - run.start for run in runs)

    def _dense_run(self, run: Run, sites: Sequence[Site], tables: AdapterTables) -> _DenseRun:
        s = self._shape
        linears = [tables.view(run.adapter.linears[site.path]) for site in sites]
        routed = [linear.router for linear in linears if linear.router is not None]
        reads_basis = s.router_input == "basis"
        inputs = [
            part
            for linear in linears
            for part in (linear.basis, None if reads_basis else linear.router)
            if part is not None
        ]
        coefficients = [x.coefficients.flatten(0, 1) for x in linears if x.coefficients is not None]
        return _DenseRun(
            slice(run.start, run.stop),
            torch.cat(inputs),
            torch.stack(routed).transpose(1, 2) if routed and reads_basis else None,
            torch.stack(coefficients).transpose(1, 2) if coefficients else None,
            [
                (slice(site.start, site.start + site.width), x.up.transpose(1, 2).flatten(0, 1))
                for site, x in zip(sites, linears, strict=True)
            ],
        )

    def add_to(self, out: Tensor, x: Tensor, routing: Routing | None) -> None:
        """out: (T, m), changed in place."""
        s = self._shape
        h = x.new_empty((self._num_tokens, self._runs[0].inputs.shape[0]))
        parts = h.split([run.tokens.stop - run.tokens.start for run in self._runs])
        for run, part in zip(self._runs, parts, strict=True):
            torch.mm(x[run.tokens], run.inputs.t(), out=part)
        weights = [None] * len(parts) if s.num_experts == 1 else self._gates(h, parts)
        for run, part, gate in zip(self._runs, parts, weights, strict=True):
            z = part.view(len(part), self._num_sites, -1)[..., : s.basis_dim].transpose(0, 1)
            if routing is not None and gate is not None:
                tokens = torch.arange(run.tokens.start, run.tokens.stop, device=x.device)
                routing.add(tokens, self._layer, gate.sum(0))
            self._expand(out[run.tokens], run, self._coordinates(z, run, gate))

    def _gates(self, h: Tensor, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Each run's gates, (S, tokens, N)."""
        s = self._shape
        split = h.view(self._num_tokens, self._num_sites, -1).transpose(0, 1)
        if s.router_input == "hidden":
            logits = split[..., s.basis_dim :]
        else:
            lengths = [len(part) for part in parts]
            logits = torch.cat(
                [
                    torch.bmm(z, run.routers)
                    for run, z in zip(self._runs, split.split(lengths, dim=1), strict=True)
                    if run.routers is not None
                ],
                dim=1,
            )
        return gates(logits, s.top_k)[0].split([len(part) for part in parts], dim=1)

    def _coordinates(self, z: Tensor, run: _DenseRun, gate: Tensor | None) -> Tensor:
        """The gates times P_t z of every expert, (S, tokens, N·r), from z, (S, tokens, d)."""
        s = self._shape
        if run.coefficients is not None:
            z = torch.bmm(z, run.coefficients)
        if gate is None:
            return z
        experts = 1 if s.coefficients == "identity" else s.num_experts
        weighted = z.unflatten(-1, (experts, s.r)) * gate.to(z.dtype).unsqueeze(-1)
        return weighted.flatten(-2)

    def _expand(self, out: Tensor, run: _DenseRun, weighted: Tensor) -> None:
        for (columns, up), part in zip(run.ups, weighted, strict=True):
            if out.dtype == up.dtype:
                out[:, columns].addmm_(part, up)
            else:
                out[:, columns] += (part @ up).to(out.dtype)


class _GroupPlan:
    """What one group does for one composition of the batch."""

    def __init__(self, group: Group, runs: Sequence[Run], tables: AdapterTables) -> None:
        dense: dict[tuple[Shape, tuple[Site, ...]], list[Run]] = {}
        gathered: dict[Shape | None, Runs] = {}
        for run in runs:
            if run.stop - run.start >= DENSE_TOKENS:
                for shape, sites in _sites_by_shape(group, run.adapter).items():
                    dense.setdefault((shape, tuple(sites)), []).append(run)
            else:
                for kind, template in _templates(group, run.adapter).items():
                    gathered.setdefault(kind, []).append((run, template))
        self.gathered = _Gathered(group, gathered, tables.device) if gathered else None
        self.dense = [
            _Dense(group, shape, sites, of, tables) for (shape, sites), of in dense.items()
        ]


def _sites_by_shape(group: Group, adapter: ResidentAdapter) -> dict[Shape, list[Site]]:
    sites: dict[Shape, list[Site]] = {}
    for site in group.sites:
        linear = adapter.linears.get(site.path)
        if linear is not None:
            sites.setdefault(linear.shape, []).append(site)
    return sites


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
        if plan.gathered is not None:
            plan.gathered.add_to(out, x, self._tables, self.routing)
        for dense in plan.dense:
            dense.add_to(out, x, self.routing)
