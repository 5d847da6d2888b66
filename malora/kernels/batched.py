"""The adapters of a mixed batch: any of them, of any sizes, one token or thousands of each.

What depends on the batch's composition alone is worked out once (`BatchPlan`) and kept for as long
as the composition stays: a steady decode step does no index work on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from malora.kernels.resident import Group, ResidentAdapter, ResidentAdapters


@dataclass(frozen=True)
class Run:
    """Adjacent tokens of one adapter in the batch: [start, stop)."""

    start: int
    stop: int
    adapter: ResidentAdapter


def by_reader(runs: Sequence[Run]) -> list[dict[ResidentAdapter, NDArray[np.int64]]]:
    """The tokens of each adapter, together with those of adapters that read their inputs alike."""
    readers: dict[object, dict[ResidentAdapter, list[NDArray[np.int64]]]] = {}
    for run in runs:
        adapters = readers.setdefault(run.adapter.projection_key, {})
        adapters.setdefault(run.adapter, []).append(np.arange(run.start, run.stop))
    return [
        {adapter: np.concatenate(parts) for adapter, parts in adapters.items()}
        for adapters in readers.values()
    ]


class Routing:
    """Gates collected over one step, summed over each layer's routed linears."""

    def __init__(self, num_tokens: int, num_layers: int, num_experts: int, device: torch.device):
        self.gates = torch.zeros((num_tokens, num_layers, num_experts), device=device)

    def add(self, tokens: Tensor, layer: int, gates: Tensor) -> None:
        """tokens: (P,) int64; gates: (P, N)."""
        self.gates[:, layer, : gates.shape[1]].index_add_(0, tokens, gates.float())


Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Of input, weight and bias, as `torch.nn.functional.linear`."""
BaseProduct = Callable[[Linear], Tensor]
"""Makes a group's base product, (…, m), with the given function where it can."""


class BatchPlan(Protocol):
    """The adapters of one batch: which tokens are whose.

    Tokens in no run have no adapter and cost nothing.
    """

    routing: Routing | None
    """Set for a step that reports the gates its tokens took."""

    @property
    def separate(self) -> bool:
        """Whether `apply` leaves the sum to whoever reads it."""

    @property
    def activates(self) -> bool:
        """Whether it is an `ActivatingPlan`."""

    def start(self) -> None:
        """To be called before each forward pass."""

    def apply(self, x: Tensor, group: Group, base: BaseProduct) -> tuple[Tensor, Tensor | None]:
        """A group's outputs, (…, m): the base product with every token's adapter added.

        x: (T, n), the group's input, contiguous. Where `separate`, the base product, and what is to
        be added to it, (T, m).
        """


class ActivatingPlan(BatchPlan, Protocol):
    """One that takes an MLP's outputs through their activation where it adds to them, which is to
    read and write them once less.
    """

    def activate(self, x: Tensor, group: Group, base: BaseProduct) -> Tensor:
        """silu(gate) · up, (T, m / 2), of a group's two outputs as `apply` makes them."""


def plan_batch(runs: Sequence[Run], num_tokens: int, adapters: ResidentAdapters) -> BatchPlan:
    """The plan of a batch. Runs are in order and do not overlap; they need not cover the batch."""
    # Each device's compiler is imported where it is used: the other one may be missing.
    if adapters.device.type == "cpu":
        from malora.kernels.cpu import CpuPlan

        return CpuPlan(runs, num_tokens, adapters.dtype)
    from malora.kernels.large_batch import gpu_plan

    plan = gpu_plan(num_tokens, adapters)
    plan.load(runs)
    return plan
