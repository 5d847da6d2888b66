"""An adapter as bytes: the form in which every tier of memory holds it, and kernels read it.

Two pieces of memory, each tensor in them aligned: the basis, which several adapters may share, and
what is the adapter's own: its table of headers, then routers, coefficients and up-projections,
these by row and scaled. Moving an adapter from one memory to another is copying the pieces; only
the addresses in the headers change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from malora.basis import tensor_digest
from malora.config import RouterInput
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

_NUM_ADDRESSES = 4
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

    def own_shapes(self) -> Iterator[tuple[int, ...]]:
        """The shapes of router, coefficients (where there are any) and up-projections."""
        if self.has_router:
            width = self.in_features if self.router_input == "hidden" else self.basis_dim
            yield self.num_experts, width
        if self.has_coefficients:
            yield self.num_experts, self.r, self.basis_dim
        yield self.num_experts, self.r, self.out_features


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

    @cached_property
    def basis_bytes(self) -> int:
        return self._size(linear.basis_shape for linear in self.linears)

    @cached_property
    def own_bytes(self) -> int:
        return self.header_bytes + self._size(
            shape for linear in self.linears for shape in linear.own_shapes()
        )

    @property
    def header_bytes(self) -> int:
        return aligned(self.num_sites * len(FIELDS) * 8)

    @property
    def num_bytes(self) -> int:
        return self.basis_bytes + self.own_bytes

    def _size(self, shapes: Iterable[tuple[int, ...]]) -> int:
        return sum(aligned(_count(shape) * self.itemsize) for shape in shapes)

    def views(self, basis: Tensor, own: Tensor, dtype: torch.dtype) -> dict[str, AdaptedLinear]:
        """The linears as they lie in the pieces: scaled, `up` as (N, r, m) read as (N, m, r)."""
        linears = {}
        at, own_at = 0, self.header_bytes

        def view(memory: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
            nbytes = _count(shape) * self.itemsize
            return memory[start : start + nbytes].view(dtype).view(shape)

        for linear in self.linears:
            parts = []
            for shape in linear.own_shapes():
                parts.append(view(own, own_at, shape))
                own_at += aligned(_count(shape) * self.itemsize)
            linears[linear.path] = AdaptedLinear(
                basis=view(basis, at, linear.basis_shape),
                router=parts[0] if linear.has_router else None,
                coefficients=parts[-2] if linear.has_coefficients else None,
                up=parts[-1].transpose(1, 2),
                router_input=linear.router_input,
                top_k=linear.top_k,
                scaling=1.0,
            )
            at += aligned(_count(linear.basis_shape) * self.itemsize)
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


def basis_key(linears: Mapping[str, AdaptedLinear], digests: Mapping[str, str]) -> str:
    """sha256, in hex, of what decides the piece with the basis: order, places and content.

    digests: of each linear's basis, by path, as `tensor_digest` makes them.
    """
    return hashlib.sha256(repr([(path, digests[path]) for path in linears]).encode()).hexdigest()


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
    views = packed.views(basis, own, dtype)

    def write(path: str) -> None:
        linear, view = linears[path], views[path]
        view.basis.copy_(linear.basis)
        if view.router is not None and linear.router is not None:
            view.router.copy_(linear.router)
        if view.coefficients is not None and linear.coefficients is not None:
            view.coefficients.copy_(linear.coefficients)
        if linear.scaling == 1:
            view.up.copy_(linear.up)
        elif linear.up.dtype == dtype:
            torch.mul(linear.up, linear.scaling, out=view.up)
        else:  # rounded once, to the dtype it is stored in
            view.up.copy_(linear.up.float() * linear.scaling)

    for _ in map(write, [linear.path for linear in packed.linears]):
        pass
    packed.headers(own)[:] = _offsets(packed, paths)


def pack_whole(
    digest: str, linears: Mapping[str, AdaptedLinear], paths: Sequence[str], dtype: torch.dtype
) -> tuple[PackedAdapter, Tensor, Tensor]:
    """Pack linears that are in memory into memory of their own; the basis, then the rest."""
    digests = {path: tensor_digest(linear.basis) for path, linear in linears.items()}
    packed = describe(digest, basis_key(linears, digests), linears, len(paths), dtype)
    basis = torch.zeros(packed.basis_bytes, dtype=torch.uint8)
    own = torch.zeros(packed.own_bytes, dtype=torch.uint8)
    pack(packed, linears, paths, basis, own, dtype)
    return packed, basis, own


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _offsets(packed: PackedAdapter, paths: Sequence[str]) -> NDArray[np.int64]:
    """The table of headers whose addresses are offsets into the pieces."""
    row_of = {path: row for row, path in enumerate(paths)}
    table = np.zeros((len(paths), len(FIELDS)), np.int64)
    table[:, :_NUM_ADDRESSES] = _NOWHERE
    at, own_at = 0, packed.header_bytes
    for linear in packed.linears:
        starts = []
        for shape in linear.own_shapes():
            starts.append(own_at)
            own_at += aligned(_count(shape) * packed.itemsize)
        table[row_of[linear.path]] = [
            at,
            starts[0] if linear.has_router else _NOWHERE,
            starts[-2] if linear.has_coefficients else _NOWHERE,
            starts[-1],
            linear.num_experts,
            linear.top_k,
            linear.r,
            linear.basis_dim,
            0 if linear.basis_dim == linear.r else linear.r,
            int(linear.router_input == "basis"),
        ]
        at += aligned(_count(linear.basis_shape) * packed.itemsize)
    return table
