"""Adapters that lie on the device, ready to serve: one memory, each at its own size."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from malora.format import AdaptedLinear
from malora.kernels.arena import Arena
from malora.kernels.packed import FIELDS, PackedAdapter, PackedLinear, pack_whole

__all__ = [
    "FIELDS",
    "Group",
    "NoRoomError",
    "ResidentAdapter",
    "ResidentAdapters",
    "Site",
    "Sizes",
    "Upload",
]

_BYTES_AT_A_TIME = 4 * 2**20
"""What an upload on the CPU copies between two steps: about a millisecond's work."""
_BYTES_BESIDE_A_STEP = 256 * 2**20
"""What comes to a GPU while it computes a step of some size: 10 ms at 25 GB/s, 5 at 50."""


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


class NoRoomError(Exception):
    """The memory has no room for an adapter."""


@dataclass(eq=False)
class ResidentAdapter:
    """An adapter's place on the device. Compared by identity.

    basis, own: its two pieces, uint8. headers: (sites of the model, FIELDS) int64, at the start of
    `own`, of addresses on the device.
    """

    packed: PackedAdapter
    basis: Tensor
    own: Tensor
    headers: Tensor
    dtype: torch.dtype

    @cached_property
    def linears(self) -> dict[str, AdaptedLinear]:
        """By path, views of the adapter's memory: scaled, `up` as (N, r, m) read as (N, m, r)."""
        return self.packed.views(self.basis, self.own, self.dtype)

    @cached_property
    def experts_for_each_taken(self) -> float:
        """The most of any linear: how much more computing all of them is."""
        return max(x.num_experts / x.top_k for x in self.packed.linears)

    @cached_property
    def routes(self) -> bool:
        """Whether gates or coefficients lie between what is read and the up-projections."""
        return any(x.num_experts > 1 or x.has_coefficients for x in self.packed.linears)

    @cached_property
    def num_reads(self) -> int:
        """The most rows of a basis, and of a router that reads the input, of one linear."""
        return max(map(_num_reads, self.packed.linears))

    @cached_property
    def projection_key(self) -> str | ResidentAdapter:
        """Equal for adapters whose reads of a linear's input are one: their basis, no router."""
        if any(x.has_router and x.router_input == "hidden" for x in self.packed.linears):
            return self
        return self.packed.basis_key


@dataclass(frozen=True)
class Sizes:
    """The largest sizes of one linear among adapters: what scratch memory and tiles must hold."""

    reads: int = 24
    """Rows of a basis, and of a router that reads the input."""
    num_experts: int = 8
    rows: int = 64
    """Rows of the up-projections of all experts."""

    def including(self, linears: Iterable[PackedLinear]) -> Sizes:
        """These sizes, grown to fit more."""
        reads, num_experts, rows = self.reads, self.num_experts, self.rows
        for linear in linears:
            reads = max(reads, _num_reads(linear))
            num_experts = max(num_experts, linear.num_experts)
            rows = max(rows, linear.num_experts * linear.r)
        return Sizes(reads, num_experts, rows)


def _num_reads(linear: PackedLinear) -> int:
    routers = linear.num_experts if linear.has_router and linear.router_input == "hidden" else 0
    return linear.basis_dim + routers


class Upload:
    """Pieces of memory on their way from the host to the device, beside the steps.

    On the CPU each call of `done` copies a part; on a GPU the copies are on a stream of their own.
    """

    def __init__(
        self,
        copies: list[tuple[Tensor, Tensor]],
        stream: torch.cuda.Stream | None,
        after: torch.cuda.Event | None,
    ) -> None:
        """copies: (from, to) each, in order, uint8. On a GPU the former are pinned.

        after: before it, what lay there may still be read.
        """
        self._copies = copies
        self._at = 0
        self._event: torch.cuda.Event | None = None
        self.is_ordered = False
        """Whether the steps launched from now on come after it, by themselves."""
        if stream is None:
            return
        is_free = after is None or after.query()
        if after is not None and not is_free:
            stream.wait_event(after)
        is_alone = stream.query()
        with torch.cuda.stream(stream):
            for source, target in copies:
                target.copy_(source, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(stream)
        # A step is launched while the device computes the one before: a small upload that begins
        # now is there before that is done. So the next step need not be one without the adapter,
        # it is only told to come after.
        if (
            is_free
            and is_alone
            and sum(map(len, (source for source, _ in copies))) <= (_BYTES_BESIDE_A_STEP)
        ):
            torch.cuda.current_stream(stream.device).wait_event(self._event)
            self.is_ordered = True

    def done(self) -> bool:
        """Whether everything is there for the steps launched from now on; never waits."""
        if self._event is not None:
            return self.is_ordered or self._event.query()
        budget = _BYTES_AT_A_TIME
        while self._copies and budget > 0:
            source, target = self._copies[0]
            stop = min(self._at + budget, len(source))
            target[self._at : stop].copy_(source[self._at : stop])
            budget -= stop - self._at
            self._at = stop
            if stop == len(source):
                self._copies.pop(0)
                self._at = 0
        return not self._copies


@dataclass
class _SharedBasis:
    start: int
    users: int = 0
    is_filled: bool = False
    """Whether its content is there, or on the way."""


class ResidentAdapters:
    """All resident adapters in one memory, each at its own size: no slots of the largest.

    The basis of several adapters (found by its content) is stored once. The memory is never given
    back to an allocator, so that headers hold addresses, and kernels in flight read nothing that
    was handed to somebody else: a range is written again only behind the steps launched before.
    """

    def __init__(self, groups: Sequence[Group], dtype: torch.dtype, memory: Tensor) -> None:
        """memory: uint8, on the device; all that adapters may take."""
        self.dtype = dtype
        self.device = memory.device
        self.paths = [site.path for group in groups for site in group.sites]
        """The model's linears, in the order of the headers."""
        self.sizes = Sizes()
        """Of all adapters that have been resident."""
        self._memory = memory
        self._arena = Arena(len(memory))
        self._bases: dict[str, _SharedBasis] = {}
        self._starts: dict[ResidentAdapter, int] = {}
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._freed: torch.cuda.Event | None = None
        """After it, no step reads what was removed."""

    @property
    def capacity(self) -> int:
        """Bytes of the memory."""
        return self._arena.capacity

    def num_bytes(self) -> int:
        """Bytes that the resident adapters take."""
        return self._arena.used

    def add(self, digest: str, linears: Mapping[str, AdaptedLinear]) -> ResidentAdapter:
        """Copy an adapter that is in memory to the device, and wait until it is there.

        Raises NoRoomError.
        """
        packed, basis, own = pack_whole(digest, linears, self.paths, self.dtype)
        adapter = self.place(packed)
        if adapter is None:
            raise NoRoomError(
                f"an adapter of {packed.num_bytes:,} bytes does not fit beside the "
                f"{self.num_bytes():,} of {self.capacity:,} bytes that others take"
            )
        upload = self.upload(adapter, basis, own)
        while not upload.done():
            pass
        return adapter

    def place(self, packed: PackedAdapter) -> ResidentAdapter | None:
        """A place for an adapter, to be filled by `upload`; None where there is no room."""
        basis = self._bases.get(packed.basis_key)
        start = self._arena.allocate(packed.own_bytes)
        if start is None:
            return None
        if basis is None:
            basis_start = self._arena.allocate(packed.basis_bytes)
            if basis_start is None:
                self._arena.free(start)
                return None
            basis = self._bases[packed.basis_key] = _SharedBasis(basis_start)
        basis.users += 1
        own = self._memory[start : start + packed.own_bytes]
        table = own[: packed.num_sites * len(FIELDS) * 8].view(torch.int64)
        adapter = ResidentAdapter(
            packed,
            self._memory[basis.start : basis.start + packed.basis_bytes],
            own,
            table.view(packed.num_sites, len(FIELDS)),
            self.dtype,
        )
        self._starts[adapter] = start
        self.sizes = self.sizes.including(packed.linears)
        return adapter

    def upload(self, adapter: ResidentAdapter, basis: Tensor, own: Tensor) -> Upload:
        """Fill an adapter's place from its packed pieces on the host, which must stay until then.

        Uploads end in the order they began; an adapter is ready when its own has.
        """
        table = adapter.packed.addressed(own, adapter.basis.data_ptr(), adapter.own.data_ptr())
        headers = torch.from_numpy(table).view(-1).view(torch.uint8)
        if self._stream is not None:
            headers = headers.pin_memory()
        copies = [(own, adapter.own), (headers, adapter.headers.view(-1).view(torch.uint8))]
        shared = self._bases[adapter.packed.basis_key]
        if not shared.is_filled:
            shared.is_filled = True
            copies.append((basis, adapter.basis))
        return Upload(copies, self._stream, self._freed)

    def fits(self, packed: PackedAdapter, without: Collection[ResidentAdapter] = ()) -> bool:
        """Whether there would be room for an adapter if those in `without` were removed."""
        gone = [self._starts[adapter] for adapter in without]
        users: dict[str, int] = {}
        for adapter in without:
            users[adapter.packed.basis_key] = users.get(adapter.packed.basis_key, 0) + 1
        bases = [key for key, count in users.items() if self._bases[key].users == count]
        gone += [self._bases[key].start for key in bases]
        needs = [packed.own_bytes]
        if packed.basis_key not in self._bases or packed.basis_key in bases:
            needs.append(packed.basis_bytes)
        return self._arena.fits(needs, gone)

    def remove(self, adapter: ResidentAdapter) -> list[tuple[int, int]]:
        """Give up an adapter's place; the ranges of the memory that are free now.

        No step launched from here on may use it, and no upload to it be under way.
        """
        if self._stream is not None:
            self._freed = torch.cuda.current_stream(self.device).record_event()
        start = self._starts.pop(adapter)
        freed = [(start, self._arena.free(start))]
        basis = self._bases[adapter.packed.basis_key]
        basis.users -= 1
        if basis.users == 0:
            del self._bases[adapter.packed.basis_key]
            freed.append((basis.start, self._arena.free(basis.start)))
        return freed
