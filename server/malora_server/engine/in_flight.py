"""A step that was launched, and what it will tell once the device has computed it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from malora_server.engine.messages import TokenLogprobs, TokenRouting
from malora_server.engine.monitor import RoutedChunks
from malora_server.engine.penalties import is_penalised
from malora_server.engine.sampler import Sampled
from malora_server.engine.scheduler import Chunk
from malora_server.engine.sequence import Sequence


@dataclass(frozen=True)
class Gates:
    """The gates of a step's sampled tokens, averaged: over all routed linears, and by layer.

    mean: (B, N). layers: (B, layers, N).
    """

    mean: Tensor
    layers: Tensor

    @classmethod
    def of(cls, taken: Tensor, rows: list[int]) -> Gates:
        """taken: the gates of all the step's tokens. rows: those that are asked for."""
        gates = taken[rows]
        mean = gates.sum(1)
        return cls(
            mean / mean.sum(-1, keepdim=True).clamp_min(1e-20),
            gates / gates.sum(-1, keepdim=True).clamp_min(1e-20),
        )


class InFlight:
    """A step that was launched: its results are on the way from the device to the host."""

    def __init__(
        self,
        chunks: list[Chunk],
        sequences: list[Sequence],
        sampled: Sampled | None,
        gates: Gates | None,
        routed: RoutedChunks | None,
        launched: float,
    ) -> None:
        """sequences: those that sample, a row of `sampled` each, None where there are none.

        launched: when, on the monotonic clock.
        """
        self.chunks = chunks
        self.launched = launched
        self.sequences = sequences
        self.token_ids = None if sampled is None else sampled.token_ids
        """(B,) int64, on the device."""
        self.rows = {seq.request_id: row for row, seq in enumerate(sequences)}
        self.settles_first = any(is_penalised(seq) or seq.matcher is not None for seq in sequences)
        """Whether the next step's sampling needs this one's tokens on the host."""
        self._event: torch.cuda.Event | None = None
        self._sampled = None if sampled is None else _on_host(sampled)
        self._gates = None if gates is None else _on_host(gates)
        self.routed = None if routed is None else _on_host(routed)
        """How the chunks routed, in a step that is sampled; to be read after `wait`."""
        if self.token_ids is not None and self.token_ids.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Wait until the results are here, then read them."""
        if self._event is not None:
            self._event.synchronize()
        sampled = self._sampled
        self.tokens: list[int] = [] if sampled is None else sampled.token_ids.tolist()
        self.bad: list[bool] = [] if sampled is None else sampled.bad.tolist()

    def token_logprobs(self, row: int) -> TokenLogprobs | None:
        """What a row's sequence asked to know of its token's alternatives."""
        top = self.sequences[row].sampling.logprobs
        if top is None or self._sampled is None or self._sampled.logprobs is None:
            return None
        ids, values = self._sampled.top_ids, self._sampled.top_logprobs
        return TokenLogprobs(
            self.tokens[row],
            float(self._sampled.logprobs[row]),
            [] if ids is None else ids[row, :top].tolist(),
            [] if values is None else values[row, :top].tolist(),
        )

    def token_routing(self, row: int) -> TokenRouting | None:
        """What a row's sequence asked to know of its token's gates; None without any."""
        asked = self.sequences[row].sampling.routing
        if asked is None or self._gates is None or not self._gates.mean[row].any():
            return None
        layers = self._gates.layers[row].tolist() if asked == "layers" else None
        return TokenRouting(self._gates.mean[row].tolist(), layers)


_Results = TypeVar("_Results", Sampled, Gates, RoutedChunks)


def _on_host(results: _Results) -> _Results:
    """The results, on the host once the device gets there."""
    values: dict[str, Any] = {}
    for f in fields(results):
        value = getattr(results, f.name)
        if isinstance(value, Tensor) and value.is_cuda:
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            value = host.copy_(value, non_blocking=True)
        values[f.name] = value
    return type(results)(**values)
