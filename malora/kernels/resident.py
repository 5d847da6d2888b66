"""Where resident adapters' weights lie on the device, and the header that tells a kernel so."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from malora.format import AdaptedLinear

ALIGNMENT = 64
"""Bytes. Every tensor of an adapter starts at a multiple of it, as torch's own memory does, so that
kernels may read 16 bytes at a time."""

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


@dataclass(frozen=True)
class Site:
    """One linear of a group: its path in the model and its columns of the group's output."""

    path: str
    start: int
    width: int


@dataclass(frozen=True)
class Group:
    """Linears that read the same input, their outputs side by side (q/k/v, gate/up, o, down).

    first_site: how many sites the model's groups before this one have.
    """

    layer: int
    in_features: int
    sites: tuple[Site, ...]
    first_site: int = 0


@dataclass(eq=False)
class ResidentAdapter:
    """An adapter on the device, ready to serve. Compared by identity.

    linears: by path, views of the adapter's memory, the scaling folded into `up`, which lies as
    (N, r, m). headers: (sites of the model, FIELDS) int64, on the device too.
    """

    digest: str
    linears: dict[str, AdaptedLinear]
    headers: Tensor
    num_bytes: int
    basis_key: bytes

    @cached_property
    def experts_for_each_taken(self) -> float:
        """The most of any linear: how much more computing all of them is."""
        return max(x.num_experts / x.top_k for x in self.linears.values())

    @cached_property
    def projection_key(self) -> bytes | ResidentAdapter:
        """Equal for adapters whose reads of a linear's input are one: their basis, no router."""
        if any(x.router is not None and x.router_input == "hidden" for x in self.linears.values()):
            return self
        return self.basis_key


@dataclass(frozen=True)
class Sizes:
    """The largest sizes of one linear among adapters: what scratch memory and tiles must hold."""

    basis_dim: int = 16
    num_experts: int = 8
    rows: int = 64
    """Rows of the up-projections of all experts."""

    def including(self, linears: Iterable[AdaptedLinear]) -> Sizes:
        """These sizes, grown to fit more."""
        basis_dim, num_experts, rows = self.basis_dim, self.num_experts, self.rows
        for linear in linears:
            basis_dim = max(basis_dim, linear.basis_dim)
            num_experts = max(num_experts, linear.num_experts)
            rows = max(rows, linear.num_experts * linear.r)
        return Sizes(basis_dim, num_experts, rows)


@dataclass
class _SharedBasis:
    memory: Tensor
    users: int = 0


class ResidentAdapters:
    """All resident adapters, each at its own size: no slots, no padding to a largest rank.

    The basis of several adapters (found by its content) is stored once.
    """

    def __init__(self, groups: Sequence[Group], dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._paths = [site.path for group in groups for site in group.sites]
        self.sizes = Sizes()
        """Of all adapters that have been resident."""
        self._bases: dict[bytes, _SharedBasis] = {}
        self._adapters: set[ResidentAdapter] = set()

    def num_bytes(self) -> int:
        """Bytes of the resident adapters' memory."""
        bases = sum(basis.memory.nbytes for basis in self._bases.values())
        return bases + sum(adapter.num_bytes for adapter in self._adapters)

    def add(self, digest: str, linears: dict[str, AdaptedLinear]) -> ResidentAdapter:
        """Copy an adapter's weights to the device."""
        packed = _pack((x.basis for x in linears.values()), self.dtype)
        names = repr([(path, x.basis.shape) for path, x in linears.items()]).encode()
        key = hashlib.sha256(names + packed.numpy().tobytes()).digest()
        if key not in self._bases:
            self._bases[key] = _SharedBasis(packed.to(self.device))
        self._bases[key].users += 1
        bases = _unpack(self._bases[key].memory, [x.basis for x in linears.values()], self.dtype)
        parts = [part for x in linears.values() for part in _own_parts(x)]
        memory = _pack(parts, self.dtype).to(self.device)
        views = iter(_unpack(memory, parts, self.dtype))
        resident = {
            path: replace(
                linear,
                basis=basis,
                router=None if linear.router is None else next(views),
                coefficients=None if linear.coefficients is None else next(views),
                up=next(views).transpose(1, 2),
                scaling=1.0,
            )
            for (path, linear), basis in zip(linears.items(), bases, strict=True)
        }
        headers = torch.tensor([_header(resident.get(path)) for path in self._paths])
        adapter = ResidentAdapter(
            digest, resident, headers.to(self.device), memory.nbytes + headers.nbytes, key
        )
        self._adapters.add(adapter)
        self.sizes = self.sizes.including(resident.values())
        return adapter

    def remove(self, adapter: ResidentAdapter) -> None:
        """Give an adapter's memory back. It must not be in use."""
        self._adapters.remove(adapter)
        basis = self._bases[adapter.basis_key]
        basis.users -= 1
        if basis.users == 0:
            del self._bases[adapter.basis_key]


def _own_parts(linear: AdaptedLinear) -> list[Tensor]:
    """What is the adapter's own, as it is stored: up-projections by row, scaled."""
    up = (linear.up.float() * linear.scaling).transpose(1, 2)
    return [part for part in (linear.router, linear.coefficients, up) if part is not None]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _pack(tensors: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """The tensors one after the other, aligned, as bytes on the host."""
    tensors = list(tensors)
    memory = torch.zeros(
        sum(_aligned(x.numel() * dtype.itemsize) for x in tensors), dtype=torch.uint8
    )
    for view, tensor in zip(_unpack(memory, tensors, dtype), tensors, strict=True):
        view.copy_(tensor)
    return memory


def _unpack(memory: Tensor, like: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Views of packed memory, in the shapes of `like`."""
    start = 0
    views = []
    for tensor in like:
        nbytes = tensor.numel() * dtype.itemsize
        views.append(memory[start : start + nbytes].view(dtype).view(tensor.shape))
        start += _aligned(nbytes)
    return views


def _header(linear: AdaptedLinear | None) -> list[int]:
    """One site's row, in the order of FIELDS."""
    if linear is None:
        return [0] * len(FIELDS)
    return [
        linear.basis.data_ptr(),
        0 if linear.router is None else linear.router.data_ptr(),
        0 if linear.coefficients is None else linear.coefficients.data_ptr(),
        linear.up.data_ptr(),
        linear.num_experts,
        linear.top_k,
        linear.r,
        linear.basis_dim,
        0 if linear.basis_dim == linear.r else linear.r,
        int(linear.router_input == "basis"),
    ]
