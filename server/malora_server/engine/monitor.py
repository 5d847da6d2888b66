"""What the engine tells of its steps about once a second: their sizes, and how adapters route."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, starmap

import torch
from torch import Tensor

from malora.kernels.resident import ResidentAdapter
from malora_server.engine.messages import (
    LAYER_GROUPS,
    STEP_TOKEN_BUCKETS,
    Report,
    RoutingSample,
)

INTERVAL_SECONDS = 1.0
"""Between two reports, and between two samples of the routing."""


@dataclass(frozen=True)
class RoutedChunks:
    """How each of a step's chunks routed, summed over its tokens; on the device, then on the host.

    adapters: by chunk, its adapter's name and number of experts, None for the base model. gates:
    (C, layers, N), every token's gates averaged over the linears of a layer, so that they sum to 1.
    entropies: (C, layers), nats. counts: (C, layers), the tokens that were routed there at all.
    """

    adapters: list[tuple[str, int] | None]
    gates: Tensor
    entropies: Tensor
    counts: Tensor

    @classmethod
    def of(
        cls,
        taken: Tensor,
        names: Sequence[str | None],
        adapters: Sequence[ResidentAdapter | None],
        num_tokens: Sequence[int],
    ) -> RoutedChunks:
        """By chunk, in the order of the step's tokens. Waits for no device.

        taken: (T, layers, N), every token's gates, summed over the linears of a layer.
        """
        totals = taken.sum(-1, keepdim=True)
        gates = taken / totals.clamp_min(1e-20)
        device = gates.device
        chunks = torch.repeat_interleave(torch.arange(len(names)), torch.tensor(num_tokens))
        if device.type == "cuda":
            chunks = chunks.pin_memory().to(device, non_blocking=True)

        def sums(values: Tensor) -> Tensor:
            total = values.new_zeros((len(names), *values.shape[1:]))
            return total.index_add_(0, chunks, values)

        return cls(
            [
                None
                if name is None or adapter is None
                else (name, max(linear.num_experts for linear in adapter.packed.linears))
                for name, adapter in zip(names, adapters, strict=True)
            ],
            sums(gates),
            sums(torch.special.entr(gates).sum(-1)),
            sums((totals[..., 0] > 0).float()),
        )


class Monitor:
    """Gathers what a report says, from one to the next."""

    def __init__(self, samples_decodes: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """samples_decodes: whether a step of decodes alone may be asked for its gates.

        It may not where such a step replays a CUDA graph, which knows of none.
        """
        self._samples_decodes = samples_decodes
        self._clock = clock
        self._next_sample = self._next_report = clock()
        self._clear()

    def _clear(self) -> None:
        self._num_steps = [0] * (len(STEP_TOKEN_BUCKETS) + 1)
        self._num_tokens = 0
        self._samples: dict[str, RoutingSample] = {}

    def count_step(self, num_tokens: int) -> None:
        """Note that a step of so many tokens is launched."""
        self._num_steps[bisect_left(STEP_TOKEN_BUCKETS, num_tokens)] += 1
        self._num_tokens += num_tokens

    def wants_routing(
        self, adapters: Iterable[ResidentAdapter | None], decodes_alone: bool
    ) -> bool:
        """Whether the next step is one whose routing is sampled. adapters: its chunks'."""
        now = self._clock()
        if now < self._next_sample or (decodes_alone and not self._samples_decodes):
            return False
        if all(adapter is None for adapter in adapters):
            return False
        self._next_sample = now + INTERVAL_SECONDS
        return True

    def add_routing(self, routed: RoutedChunks) -> None:
        """Take in a sampled step, once it is on the host."""
        num_layers = routed.counts.shape[1]
        bounds = [round(i * num_layers / len(LAYER_GROUPS)) for i in range(len(LAYER_GROUPS) + 1)]
        groups = list(starmap(slice, pairwise(bounds)))
        gates, entropies, counts = (
            x.numpy() for x in (routed.gates, routed.entropies, routed.counts)
        )
        for row, adapter in enumerate(routed.adapters):
            if adapter is None or not counts[row].any():
                continue  # the base model, or a single expert: nothing was routed
            name, num_experts = adapter
            sample = RoutingSample(
                name,
                [gates[row, group, :num_experts].sum(0).tolist() for group in groups],
                [float(entropies[row, group].sum()) for group in groups],
                [int(counts[row, group].sum()) for group in groups],
            )
            earlier = self._samples.get(name)
            self._samples[name] = sample if earlier is None else earlier.plus(sample)

    def report(self) -> Report | None:
        """What happened since the last one; None where that is recent, or there is nothing."""
        now = self._clock()
        if now < self._next_report or not any(self._num_steps):
            return None
        self._next_report = now + INTERVAL_SECONDS
        report = Report(self._num_steps, self._num_tokens, list(self._samples.values()))
        self._clear()
        return report
