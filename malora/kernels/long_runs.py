"""Runs of many tokens of one adapter (prefill) in torch: every expert computed, in few products.

The dense form of `kernels.torch`, over the adapters' own memory and for several sites and runs at
once. It computes every expert but reads each row once a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from malora.format import AdaptedLinear, RouterInput
from malora.kernels.batched import Routing, Run
from malora.kernels.resident import Group, Site
from malora.router import gates


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


class LongRuns:
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


def long_runs(group: Group, runs: Sequence[Run]) -> list[LongRuns]:
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
    return [LongRuns(group, shape, sites, of) for (shape, sites), of in alike.items()]
