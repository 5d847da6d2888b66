"""The adapters of a mixed batch: any of them, of any sizes, one token or thousands of each.

Runs of many tokens of one adapter (prefill) take the dense form of `kernels.torch`: every expert
computed, in a few products over the adapter's memory. Other tokens read the rows that they need
where they lie, through the address of their adapter's header, so that a decode step costs the
bytes of the experts that its tokens took, with no copy and no padding.

What depends on the batch's composition alone is worked out once (`BatchPlan`) and kept for as long
as the composition stays: a steady decode step does no index work on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from malora.format import AdaptedLinear, RouterInput
from malora.kernels.resident import Group, ResidentAdapter, ResidentAdapters, Site
from malora.router import gates

DENSE_TOKENS = 64
"""A run of this many tokens of one adapter, times the experts for each that a token takes, is
faster in the dense form, which computes every expert but reads each row once a run."""


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


@dataclass(frozen=True)
class _Shape:
    """What linears must agree on to be computed in one operation."""

    num_experts: int
    top_k: int
    r: int
    basis_dim: int
    coefficients: Literal["learned", "identity", "block"]
    router_input: RouterInput

    @classmethod
    def of(cls, linear: AdaptedLinear) -> _Shape:
        identity = linear.basis_dim == linear.r
        return cls(
            linear.num_experts,
            linear.top_k,
            linear.r,
            linear.basis_dim,
            "learned" if linear.coefficients is not None else "identity" if identity else "block",
            linear.router_input,
        )


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
        shape: _Shape,
        sites: Sequence[Site],
        runs: list[Run],
    ) -> None:
        self._layer = group.layer
        self._shape = shape
        self._num_sites = len(sites)
        self._runs = [self._dense_run(run, sites) for run in runs]
        self._num_tokens = sum(run.stop - run.start for run in runs)

    def _dense_run(self, run: Run, sites: Sequence[Site]) -> _DenseRun:
        s = self._shape
        linears = [run.adapter.linears[site.path] for site in sites]
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


class TokenPlan(Protocol):
    """The tokens of short runs, each with its own adapter."""

    def add_to(self, out: Tensor, x: Tensor, group: Group, taken: Tensor | None = None) -> None:
        """Add every token's adapter to the base product, in place.

        x: (T, n), out: (T, m), contiguous, of the adapters' dtype. taken: (T, layers, N) float32,
        to which the gates are added, or None.
        """


def _token_plan(headers: NDArray[np.int64], adapters: ResidentAdapters) -> TokenPlan:
    """headers: (T,) the addresses of the tokens' adapters' headers, 0 for none."""
    if adapters.device.type == "cpu":
        from malora.kernels import cpu

        return cpu.TokenPlan(headers)
    from malora.kernels import triton

    return triton.TokenPlan(torch.from_numpy(headers).to(adapters.device), adapters.sizes)


def _dense_plans(group: Group, runs: Sequence[Run]) -> list[_Dense]:
    """The group's part of the long runs, those with the same sites and shapes together."""
    alike: dict[tuple[_Shape, tuple[Site, ...]], list[Run]] = {}
    for run in runs:
        sites: dict[_Shape, list[Site]] = {}
        for site in group.sites:
            linear = run.adapter.linears.get(site.path)
            if linear is not None:
                sites.setdefault(_Shape.of(linear), []).append(site)
        for shape, of in sites.items():
            alike.setdefault((shape, tuple(of)), []).append(run)
    return [_Dense(group, shape, sites, of) for (shape, sites), of in alike.items()]


class BatchPlan:
    """The adapters of one batch: which tokens are whose. Kept while the composition stays.

    `runs` need not cover the batch: tokens in no run have no adapter and cost nothing. Runs must
    be in order and must not overlap.
    """

    def __init__(self, runs: Sequence[Run], num_tokens: int, adapters: ResidentAdapters) -> None:
        self.runs = runs
        self.routing: Routing | None = None
        """Set for a step that reports the gates its tokens took."""
        self._dtype = adapters.dtype
        self._long = [
            run
            for run in runs
            if run.stop - run.start >= DENSE_TOKENS * run.adapter.experts_for_each_taken
        ]
        self._dense: dict[Group, list[_Dense]] = {}
        headers = np.zeros(num_tokens, np.int64)
        for run in runs:
            if run not in self._long:
                headers[run.start : run.stop] = run.adapter.headers.data_ptr()
        self._tokens = _token_plan(headers, adapters) if headers.any() else None

    def add_to(self, out: Tensor, x: Tensor, group: Group) -> None:
        """Add every token's adapter to the base product, in place.

        x: (T, n), the group's input. out: (T, m), the group's base output. Both contiguous.
        """
        x = x.to(self._dtype)
        if self._tokens is not None:
            delta = out if out.dtype == x.dtype else torch.zeros_like(out, dtype=x.dtype)
            taken = None if self.routing is None else self.routing.gates
            self._tokens.add_to(delta, x, group, taken)
            if delta is not out:
                out += delta.to(out.dtype)
        if self._long:
            if group not in self._dense:
                self._dense[group] = _dense_plans(group, self._long)
            for dense in self._dense[group]:
                dense.add_to(out, x, self.routing)
