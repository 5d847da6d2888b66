"""Where resident adapters' weights live on the device: one growing table for each row width."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from malora.format import AdaptedLinear


class RowTable:
    """A growing (rows, width) tensor from which ranges of rows are taken and given back."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.width = width
        self.data = torch.zeros((0, width), dtype=dtype, device=device)
        self._free: list[tuple[int, int]] = []  # (start, length), sorted, never adjacent

    def put(self, values: Tensor) -> int:
        """Copy `values` (rows, width) into a free range; returns its first row."""
        count = values.shape[0]
        start = self._take(count)
        self.data[start : start + count].copy_(values)
        return start

    def _take(self, count: int) -> int:
        for i, (start, length) in enumerate(self._free):
            if length >= count:
                if length == count:
                    del self._free[i]
                else:
                    self._free[i] = (start + count, length - count)
                return start
        self._grow(count)
        return self._take(count)

    def _grow(self, count: int) -> None:
        used = self.data.shape[0]
        more = max(count, used // 2)
        grown = torch.empty(
            (used + more, self.width), dtype=self.data.dtype, device=self.data.device
        )
        grown[:used] = self.data
        grown[used:] = 0
        self.data = grown
        self._give_back(used, more)

    def free(self, start: int, count: int) -> None:
        """Return rows taken by `put`."""
        self._give_back(start, count)

    def _give_back(self, start: int, count: int) -> None:
        merged: list[tuple[int, int]] = []
        for a, n in sorted([*self._free, (start, count)]):
            if merged and merged[-1][0] + merged[-1][1] == a:
                merged[-1] = (merged[-1][0], merged[-1][1] + n)
            else:
                merged.append((a, n))
        self._free = merged

    @property
    def num_free(self) -> int:
        return sum(n for _, n in self._free)


@dataclass(frozen=True)
class Shape:
    """What tokens must agree on to be routed in one operation."""

    num_experts: int
    top_k: int
    r: int
    basis_dim: int
    coefficients: Literal["learned", "identity", "block"]
    router_input: Literal["hidden", "basis"]


@dataclass(frozen=True)
class ResidentLinear:
    """Where one adapted linear's rows lie in the tables. Up rows carry the scaling."""

    shape: Shape
    in_features: int
    out_features: int
    basis: int
    router: int
    coefficients: int
    up: int


@dataclass(eq=False)
class ResidentAdapter:
    """An adapter in the tables, ready to serve. Compared by identity."""

    digest: str
    linears: dict[str, ResidentLinear]
    templates: dict[Any, Any] = field(default_factory=dict)
    """What `kernels.batched` worked out about it, by group of linears."""


class AdapterTables:
    """All resident adapters' weights, one table for each row width.

    A basis that several adapters share (found by its content) is stored once.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._tables: dict[int, RowTable] = {}
        self._bases: dict[bytes, tuple[int, int]] = {}  # content -> (first row, users)
        self._basis_keys: dict[tuple[int, int], bytes] = {}  # (width, first row) -> content

    def rows(self, width: int) -> Tensor:
        """The table of `width`, (rows, width)."""
        return self._tables[width].data

    def _table(self, width: int) -> RowTable:
        if width not in self._tables:
            self._tables[width] = RowTable(width, self.dtype, self.device)
        return self._tables[width]

    def num_bytes(self) -> int:
        """Bytes in use by resident adapters, without the tables' free rows."""
        return sum(
            (t.data.shape[0] - t.num_free) * t.width * t.data.element_size()
            for t in self._tables.values()
        )

    def add(self, digest: str, linears: dict[str, AdaptedLinear]) -> ResidentAdapter:
        """Copy an adapter's weights into the tables.

        What a token reads together lies together: first every linear's basis and router, in the
        order of `linears`, then the rest. Memory gives long stretches faster than short ones.
        """
        inputs = [(self._add_basis(x.basis), self._add_router(x)) for x in linears.values()]
        return ResidentAdapter(
            digest,
            {
                path: self._add_outputs(linear, basis, router)
                for (path, linear), (basis, router) in zip(linears.items(), inputs, strict=True)
            },
        )

    def _add_router(self, linear: AdaptedLinear) -> int:
        if linear.router is None:
            return -1
        return self._table(linear.router.shape[1]).put(linear.router)

    def _add_outputs(self, linear: AdaptedLinear, basis: int, router: int) -> ResidentLinear:
        experts, out_features, r = linear.up.shape
        d, in_features = linear.basis.shape
        kind: Literal["learned", "identity", "block"] = (
            "learned" if linear.coefficients is not None else "identity" if d == r else "block"
        )
        coefficients = -1
        if linear.coefficients is not None:
            coefficients = self._table(d).put(linear.coefficients.reshape(experts * r, d))
        up = (linear.up.float() * linear.scaling).transpose(1, 2).reshape(experts * r, out_features)
        return ResidentLinear(
            shape=Shape(experts, linear.top_k, r, d, kind, linear.router_input),
            in_features=in_features,
            out_features=out_features,
            basis=basis,
            router=router,
            coefficients=coefficients,
            up=self._table(out_features).put(up),
        )

    def _add_basis(self, basis: Tensor) -> int:
        stored = basis.to(self.dtype).contiguous().cpu()
        content = hashlib.sha256(stored.view(torch.uint8).numpy().data).digest()
        width = basis.shape[1]
        if content in self._bases:
            start, users = self._bases[content]
        else:
            start, users = self._table(width).put(stored), 0
            self._basis_keys[width, start] = content
        self._bases[content] = (start, users + 1)
        return start

    def remove(self, adapter: ResidentAdapter) -> None:
        """Give an adapter's rows back. It must not be in use."""
        for linear in adapter.linears.values():
            s = linear.shape
            self._table(linear.out_features).free(linear.up, s.num_experts * s.r)
            if linear.coefficients >= 0:
                self._table(s.basis_dim).free(linear.coefficients, s.num_experts * s.r)
            if linear.router >= 0:
                width = linear.in_features if s.router_input == "hidden" else s.basis_dim
                self._table(width).free(linear.router, s.num_experts)
            content = self._basis_keys[linear.in_features, linear.basis]
            start, users = self._bases[content]
            if users > 1:
                self._bases[content] = (start, users - 1)
            else:
                del self._bases[content], self._basis_keys[linear.in_features, linear.basis]
                self._table(linear.in_features).free(start, s.basis_dim)

    def view(self, linear: ResidentLinear) -> AdaptedLinear:
        """The same weights as an `AdaptedLinear` of views into the tables (scaling folded in)."""
        s = linear.shape
        stacked = s.num_experts * s.r
        up = self.rows(linear.out_features)[linear.up : linear.up + stacked]
        coefficients = router = None
        if s.coefficients == "learned":
            flat = self.rows(s.basis_dim)[linear.coefficients : linear.coefficients + stacked]
            coefficients = flat.view(s.num_experts, s.r, s.basis_dim)
        if linear.router >= 0:
            width = linear.in_features if s.router_input == "hidden" else s.basis_dim
            router = self.rows(width)[linear.router : linear.router + s.num_experts]
        return AdaptedLinear(
            basis=self.rows(linear.in_features)[linear.basis : linear.basis + s.basis_dim],
            up=up.view(s.num_experts, s.r, linear.out_features).transpose(1, 2),
            coefficients=coefficients,
            router=router,
            router_input=s.router_input,
            top_k=s.top_k,
            scaling=1.0,
        )
