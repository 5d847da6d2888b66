"""An adapter as bytes: the form in which every tier of memory holds it, and kernels read it.

Two pieces of memory, each tensor in them aligned: the basis, which several adapters may share, and
what is the adapter's own: its table of headers, then routers, coefficients and up-projections,
these by row and scaled. Moving an adapter from one memory to another is copying the pieces; only
the addresses in the headers change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from malora.config import RouterInput
from malora.digests import bytes_digest, content_key, values_digest
from malora.files import Map
from malora.format import AdaptedLinear
from malora.kernels.arena import aligned

FIELDS = (
    "basis",
    "router",
    "coefficients",
    "up",
    "num_experts",
    "top_k",
    "r",
    "basis_dim",
    "stride",
    "router_reads_basis",
)
"""One site's row of a header, int64: four addresses (0 for none; no basis means not adapted), the
sizes, how far apart experts read the basis where no coefficients are stored (0 for the identity, r
for block selectors), and whether the router reads the basis."""

ROW_STEP = 8
"""Rows of routers and coefficients that lie over the basis' dimensions begin a multiple of so many
values from one another, so that they can be read 16 bytes at a time. Nothing is written between."""

_NUM_ADDRESSES = 4
_SHARES = 16
"""Packing is so many calls for threads to make: threads that take Python's lock for every tensor
wait for one another longer than they copy."""
_NOWHERE = -1
"""In a packed table of headers, where addresses are offsets: none."""


class PackedLinear(NamedTuple):
    """The sizes of one adapted linear."""

    path: str
    in_features: int
    out_features: int
    num_experts: int
    top_k: int
    r: int
    basis_dim: int
    has_coefficients: bool
    has_router: bool
    router_input: RouterInput

    @classmethod
    def of(cls, path: str, linear: AdaptedLinear) -> PackedLinear:
        return cls(
            path,
            linear.in_features,
            linear.out_features,
            linear.num_experts,
            linear.top_k,
            linear.r,
            linear.basis_dim,
            linear.coefficients is not None,
            linear.router is not None,
            linear.router_input,
        )

    @property
    def basis_shape(self) -> tuple[int, int]:
        return self.basis_dim, self.in_features

    def own_shapes(self) -> Iterator[tuple[tuple[int, ...], int]]:
        """The shapes of router, coefficients (where there are any) and up-projections, and how far
        apart their rows lie.
        """
        over_basis = self.basis_dim, row_length(self.basis_dim)
        if self.has_router:
            reads_basis = self.router_input == "basis"
            width, length = over_basis if reads_basis else (self.in_features, self.in_features)
            yield (self.num_experts, width), length
        if self.has_coefficients:
            width, length = over_basis
            yield (self.num_experts, self.r, width), length
        yield (self.num_experts, self.r, self.out_features), self.out_features


def row_length(d: int) -> int:
    """How far apart rows over d dimensions of a basis begin, in values."""
    return -(-d // ROW_STEP) * ROW_STEP


@dataclass
class _Share:
    """Tensors to be written with what is given, and those of them that are scaled then; and
    up-projections of a wider dtype, which are scaled before, to be rounded once.
    """

    to: list[Tensor] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)
    scaled: list[Tensor] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    narrowed: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)

    def write(self) -> None:
        if self.to:
            torch._foreach_copy_(self.to, self.given)
        if self.scaled:
            torch._foreach_mul_(self.scaled, self.factors)
        for to, up, scaling in self.narrowed:
            to.copy_(up.float() * scaling)


class _Layout(NamedTuple):
    """Where the tensors lie in the two pieces.

    starts: of each linear's basis in the one, then of its other tensors in the other.
    """

    starts: list[list[int]]
    basis_bytes: int
    own_bytes: int


@dataclass(frozen=True)
class PackedAdapter:
    """How an adapter lies in its two pieces of memory.

    digest: the adapter's. basis_key: equal for adapters that can share the piece with the basis.
    itemsize: bytes of a value. num_sites: linears of the base model, each with a row of headers.
    """

    digest: str
    basis_key: str
    itemsize: int
    num_sites: int
    linears: tuple[PackedLinear, ...]

    @property
    def basis_bytes(self) -> int:
        return self._layout.basis_bytes

    @property
    def own_bytes(self) -> int:
        return self._layout.own_bytes

    @property
    def header_bytes(self) -> int:
        return aligned(self.num_sites * len(FIELDS) * 8)

    @property
    def num_bytes(self) -> int:
        return self.basis_bytes + self.own_bytes

    @cached_property
    def _layout(self) -> _Layout:
        starts = []
        basis_stop, own_stop = 0, self.header_bytes
        for linear in self.linears:
            of_linear = [basis_stop]
            basis_stop += aligned(math.prod(linear.basis_shape) * self.itemsize)
            for shape, length in linear.own_shapes():
                of_linear.append(own_stop)
                own_stop += aligned(math.prod(shape[:-1]) * length * self.itemsize)
            starts.append(of_linear)
        return _Layout(starts, basis_stop, own_stop)

    def tensors(self, index: int, basis: Tensor, own: Tensor) -> list[Tensor]:
        """One linear's as they lie in the pieces: its basis, then as `own_shapes`, scaled.

        basis, own: the pieces, in the dtype of the values.
        """
        linear, starts = self.linears[index], self._layout.starts[index]

        def view(memory: Tensor, start: int, shape: tuple[int, ...], length: int) -> Tensor:
            # In one call, since there are many: of the two or three dimensions that there are.
            strides = (length, 1) if len(shape) == 2 else (shape[1] * length, length, 1)
            at = int(memory.storage_offset()) + start // self.itemsize
            return memory.as_strided(shape, strides, at)

        owned = zip(starts[1:], linear.own_shapes(), strict=True)
        return [
            view(basis, starts[0], linear.basis_shape, linear.in_features),
            *(view(own, start, shape, length) for start, (shape, length) in owned),
        ]

    def views(self, basis: Tensor, own: Tensor, dtype: torch.dtype) -> dict[str, AdaptedLinear]:
        """The linears as they lie in the pieces: scaled, `up` as (N, r, m) read as (N, m, r)."""
        basis, own = basis.view(dtype), own.view(dtype)
        linears = {}
        for index, linear in enumerate(self.linears):
            tensors = self.tensors(index, basis, own)
            linears[linear.path] = AdaptedLinear(
                basis=tensors[0],
                router=tensors[1] if linear.has_router else None,
                coefficients=tensors[-2] if linear.has_coefficients else None,
                up=tensors[-1].transpose(1, 2),
                router_input=linear.router_input,
                top_k=linear.top_k,
                scaling=1.0,
            )
        return linears

    def headers(self, own: Tensor) -> NDArray[np.int64]:
        """The table of headers, (sites, FIELDS), at the start of the adapter's own piece."""
        table = own[: self.num_sites * len(FIELDS) * 8].view(torch.int64).numpy()
        return table.reshape(self.num_sites, len(FIELDS))

    def addressed(self, own: Tensor, basis_address: int, own_address: int) -> NDArray[np.int64]:
        """The packed table of headers in `own`, for pieces that lie at these addresses."""
        table = self.headers(own).copy()
        offsets = table[:, :_NUM_ADDRESSES]
        bases = np.array([basis_address, own_address, own_address, own_address])
        table[:, :_NUM_ADDRESSES] = np.where(offsets == _NOWHERE, 0, offsets + bases)
        return table


def describe(
    digest: str,
    basis_key: str,
    linears: Mapping[str, AdaptedLinear],
    num_sites: int,
    dtype: torch.dtype,
) -> PackedAdapter:
    """How these linears will be packed; needs their sizes, not their values."""
    packed = tuple(PackedLinear.of(path, linear) for path, linear in linears.items())
    return PackedAdapter(digest, basis_key, dtype.itemsize, num_sites, packed)


def basis_key(linears: Mapping[str, AdaptedLinear], keys: Mapping[str, str]) -> str:
    """BLAKE3, in hex, of what decides the piece with the basis: order, places and content.

    keys: `content_key` of each linear's basis, by path.
    """
    return bytes_digest(repr([(path, keys[path]) for path in linears]).encode())


def pack(
    packed: PackedAdapter,
    linears: Mapping[str, AdaptedLinear],
    paths: Sequence[str],
    basis: Tensor,
    own: Tensor,
    dtype: torch.dtype,
    map: Map = map,
) -> None:
    """Write an adapter's two pieces, uint8 on the CPU.

    paths: the linears of the base model in the order of the headers.
    """
    values = basis.view(dtype), own.view(dtype)
    shares = [_Share() for _ in range(_SHARES)]
    for index, of_packed in enumerate(packed.linears):
        share, linear = shares[index % _SHARES], linears[of_packed.path]
        *to, to_up = packed.tensors(index, *values)
        up = linear.up.transpose(1, 2)
        parts = (linear.basis, linear.router, linear.coefficients)
        share.to += to
        share.given += [part for part in parts if part is not None]
        if linear.scaling != 1 and torch.promote_types(up.dtype, dtype) != dtype:
            share.narrowed.append((to_up, up, linear.scaling))
            continue
        share.to.append(to_up)
        share.given.append(up)
        if linear.scaling != 1:
            share.scaled.append(to_up)
            share.factors.append(linear.scaling)
    for _ in map(_Share.write, shares):
        pass
    packed.headers(own)[:] = _offsets(packed, paths)


def pack_whole(
    digest: str, linears: Mapping[str, AdaptedLinear], paths: Sequence[str], dtype: torch.dtype
) -> tuple[PackedAdapter, Tensor, Tensor]:
    """Pack linears that are in memory into memory of their own; the basis, then the rest."""
    bases = {path: linear.basis for path, linear in linears.items()}
    keys = {path: content_key(basis, values_digest(basis)) for path, basis in bases.items()}
    packed = describe(digest, basis_key(linears, keys), linears, len(paths), dtype)
    basis = torch.empty(packed.basis_bytes, dtype=torch.uint8)
    own = torch.empty(packed.own_bytes, dtype=torch.uint8)
    pack(packed, linears, paths, basis, own, dtype)
    return packed, basis, own


def _offsets(packed: PackedAdapter, paths: Sequence[str]) -> NDArray[np.int64]:
    """The table of headers whose addresses are offsets into the pieces."""
    rows = [[_NOWHERE] * _NUM_ADDRESSES + [0] * (len(FIELDS) - _NUM_ADDRESSES)] * len(paths)
    row_of = {path: row for row, path in enumerate(paths)}
    for linear, starts in zip(packed.linears, packed._layout.starts, strict=True):
        rows[row_of[linear.path]] = [
            starts[0],
            starts[1] if linear.has_router else _NOWHERE,
            starts[-2] if linear.has_coefficients else _NOWHERE,
            starts[-1],
            linear.num_experts,
            linear.top_k,
            linear.r,
            linear.basis_dim,
            0 if linear.basis_dim == linear.r else linear.r,
            int(linear.router_input == "basis"),
        ]
    return np.array(rows, np.int64)
