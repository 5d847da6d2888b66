"""CUDA graphs of steps: one of few tokens is a launch or some, not thousands.

A graph has a fixed number of rows; a batch takes the smallest that it fits, and rows beyond it read
and write the cache's spare block. What differs between steps lies in device memory that is written
before a replay: tokens, positions, slots, attention's division of its work, the table of adapters.
So one graph is right for every mix of adapters. Batches without any take graphs of their own, which
launch nothing for them.

A step of one token a sequence is one graph. With prompts among them it is several, one between two
layers' attentions (`pieces.py`).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from malora.kernels.batched import Routing, Run
from malora.kernels.large_batch import GpuPlan, LargeBatchPlan
from malora.kernels.resident import ResidentAdapters, Sizes
from malora.kernels.small_batch import MAX_TOKENS, Capacity, SmallBatchPlan
from malora_server.model.attention import AttentionContext, attention_layers
from malora_server.model.decode_attention import DecodeStep
from malora_server.model.flash import FlashStep, Pages
from malora_server.model.loader import LoadedModel
from malora_server.model.pieces import PiecewiseGraph, unowned

logger = logging.getLogger(__name__)

_MIXED_ROWS = (*range(64, 512, 64), *range(512, 1024, 128), *range(1024, 2049, 256))
"""Of graphs of steps with prompts, whatever the model."""
_FULL = 0.9
"""How much of a larger graph a step must fill to take it."""
_MOST_OPERATIONS = 2.5e12
"""Of a layer's products in one step. With more, some 4 ms of an H100, the device takes longer than
the host takes to launch a layer's kernels, and a graph's spare programs only cost: one in a hundred
for an 8B model."""


def mixed_rows(max_tokens: int, layer_weights: float) -> list[int]:
    """Rows of the graphs of steps with prompts, ascending.

    max_tokens: a step has at most. layer_weights: of a layer's linears. Beyond 2,048 rows there is
    one graph at most, of full steps: those that a busy server makes.
    """
    rows = [n for n in _MIXED_ROWS if n < max_tokens]
    if len(rows) < len(_MIXED_ROWS):
        return [*rows, _MIXED_ROWS[len(rows)]]
    if max_tokens > rows[-1] and 2 * max_tokens * layer_weights <= _MOST_OPERATIONS:
        rows.append(-(-max_tokens // 64) * 64)
    return rows


def fitting_rows(rows: Sequence[int], num_tokens: int) -> int | None:
    """Those of the smallest graph that a step with prompts fits.

    None where it is launched kernel by kernel, which takes the host less time than many spare rows
    would take the device.
    """
    fits = next((n for n in rows if n >= num_tokens), None)
    if fits is not None and fits > _MIXED_ROWS[-1] and num_tokens < _FULL * fits:
        return None
    return fits


@dataclass(frozen=True)
class StepInput:
    """What a step reads, on the host, of T tokens in C chunks.

    tokens: (3, T), token ids, positions and slots. starts, counts: (C,), first position and number
    of tokens of each chunk. pending: for the first tokens, whether their ids are unknown here, and
    those to take instead, on the device. plan_key: equal where the runs are.
    """

    tokens: NDArray[np.int64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]
    block_tables: list[list[int]]
    pending: tuple[Tensor, Tensor] | None
    runs: Sequence[Run]
    plan_key: object

    def pages(self, block_size: int) -> Pages:
        """Where the chunks' keys lie."""
        return Pages.of(self.starts, self.counts, self.block_tables, block_size)


@dataclass
class _Shared:
    """What all graphs are of."""

    loaded: LoadedModel
    adapters: ResidentAdapters
    attention: AttentionContext
    block_size: int
    spare_block: int
    num_layers: int
    pool: Any


class _Graph(ABC):
    """A captured step of `rows` tokens and what it reads."""

    _graph: torch.cuda.CUDAGraph | PiecewiseGraph
    _logits: Tensor

    def __init__(self, shared: _Shared, rows: int, plan: GpuPlan | None) -> None:
        """plan: of any mix of adapters; None without."""
        self._shared = shared
        self._plan = plan
        self._plan_key: object = None
        self._inputs = torch.zeros((3, rows), dtype=torch.int64, device=shared.loaded.device)

    def load(self, step: StepInput) -> bool:
        """Set what the next replay computes; False where it cannot."""
        if self._plan is not None and self._plan_key != step.plan_key:
            self._plan_key = None
            if not self._plan.load(step.runs):
                return False
            self._plan_key = step.plan_key
        self._load_inputs(step)
        if step.pending is not None:
            known = self._inputs[0, : len(step.pending[0])]
            torch.where(*step.pending, known, out=known)
        return True

    def replay(self) -> Tensor:
        """Launch the step. Returns logits, valid until the next."""
        self._graph.replay()
        return self._logits

    @abstractmethod
    def _load_inputs(self, step: StepInput) -> None:
        """Tokens, and how they attend."""

    def _copy_tokens(self, tokens: NDArray[np.int64]) -> None:
        spare = self._inputs.shape[1] - tokens.shape[1]
        if spare:
            filler = np.array([[0], [0], [self._shared.spare_block * self._shared.block_size]])
            tokens = np.concatenate([tokens, np.repeat(filler, spare, axis=1)], axis=1)
        self._inputs.copy_(torch.from_numpy(tokens).pin_memory(), non_blocking=True)

    def _forward(self, wanted: Tensor | int) -> Tensor:
        self._shared.loaded.adapters.start(self._plan)
        logits: Tensor = self._shared.loaded.model(
            input_ids=self._inputs[:1],
            position_ids=self._inputs[1:2],
            use_cache=False,
            logits_to_keep=wanted,
        ).logits
        return logits[0]

    def _warm_up(self, wanted: Tensor | int) -> None:
        """Compile and plan what a capture may not."""
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            self._forward(wanted)
        side.synchronize()


class _DecodeGraph(_Graph):
    """One token a sequence; the logits of all."""

    def __init__(self, shared: _Shared, rows: int, plan: GpuPlan | None, step: DecodeStep) -> None:
        super().__init__(shared, rows, plan)
        self._step = step
        nothing = np.zeros(0, np.int64)
        self._load_inputs(
            StepInput(np.zeros((3, 0), np.int64), nothing, nothing, [], None, [], None)
        )
        shared.attention.step = step
        self._warm_up(0)
        self._graph = graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=shared.pool):
            logits = self._forward(0)
        # Of one step at a time: kept, those of 70 graphs would take gigabytes.
        self._logits = unowned(logits)

    def _load_inputs(self, step: StepInput) -> None:
        self._copy_tokens(step.tokens)
        rows = self._inputs.shape[1]
        spare = rows - step.tokens.shape[1]
        lengths = np.concatenate([step.starts + 1, np.ones(spare, np.int64)])
        self._step.load(lengths, step.block_tables + [[self._shared.spare_block]] * spare)


class _MixedGraph(_Graph):
    """Tokens of any chunks; the logits of some of them, and the gates of all."""

    def __init__(
        self,
        shared: _Shared,
        rows: int,
        plan: GpuPlan | None,
        step: FlashStep,
        num_wanted: int,
    ) -> None:
        super().__init__(shared, rows, plan)
        self._step = step
        device = shared.loaded.device
        self.wanted = torch.zeros(num_wanted, dtype=torch.int64, device=device)
        self.gates: Tensor | None = None
        if plan is not None:
            experts = shared.adapters.sizes.num_experts
            plan.routing = Routing(rows, shared.num_layers, experts, device)
            self.gates = plan.routing.gates
        starts, counts = np.zeros(1, np.int64), np.full(1, rows)
        table = [shared.spare_block] * -(-rows // shared.block_size)
        tokens = np.zeros((3, rows), np.int64)
        tokens[2] = shared.spare_block * shared.block_size
        self._load_inputs(StepInput(tokens, starts, counts, [table], None, [], None))
        shared.attention.step = step
        self._warm_up(self.wanted)
        self._graph = pieces = PiecewiseGraph(shared.pool)
        with step.captured_by(pieces), pieces.capture():
            if self.gates is not None:
                self.gates.zero_()
            logits = self._forward(self.wanted)
        self._logits = unowned(logits)

    def _load_inputs(self, step: StepInput) -> None:
        self._copy_tokens(step.tokens)
        self._step.load(self._inputs[2], step.pages(self._shared.block_size))


class StepGraphs:
    """Graphs for steps of up to `max_tokens` tokens of `max_seqs` sequences.

    A sequence has `max_blocks` blocks at most.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        adapters: ResidentAdapters,
        attention: AttentionContext,
        flash: FlashStep,
        max_seqs: int,
        max_tokens: int,
        max_blocks: int,
        spare_block: int,
        block_size: int,
    ) -> None:
        """flash: attention that is launched between graphs."""
        self._max_seqs, self._max_blocks = max_seqs, max_blocks
        self._flash = flash
        num_layers = 1 + max(group.layer for group in loaded.groups)
        self._shared = _Shared(
            loaded,
            adapters,
            attention,
            block_size,
            spare_block,
            num_layers,
            torch.cuda.graph_pool_handle(),
        )
        most = min(max_seqs, MAX_TOKENS)
        sizes = (1, 2, 4, *range(8, most + 8, 8))
        self._decode_rows = [n for n in sizes if n < most + 8]
        weights = sum(
            group.in_features * site.width for group in loaded.groups for site in group.sites
        )
        self._mixed_rows = mixed_rows(max_tokens, weights / num_layers)
        self._decode_steps: dict[int, DecodeStep] = {}
        self._graphs: dict[tuple[type[_Graph], int, bool], tuple[Sizes, _Graph]] = {}

    def capture(self, adapted: bool) -> None:
        """Capture every size, the largest first; `adapted` with adapters too."""
        kinds: list[tuple[type[_Graph], int]] = [
            *((_MixedGraph, rows) for rows in reversed(self._mixed_rows)),
            *((_DecodeGraph, rows) for rows in reversed(self._decode_rows)),
        ]
        for number, (kind, rows) in enumerate(kinds):
            self._graph(kind, rows, False)
            if adapted:
                self._graph(kind, rows, True)
            logger.info("captured graphs of %d rows (%d/%d)", rows, number + 1, len(kinds))

    def run(
        self, step: StepInput, wanted: Sequence[int], routing: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """One step, where there is a graph for it; else None.

        Returns logits, (len(wanted), vocab), and, where `routing` and there are adapters, the gates
        that tokens took, (T, layers, N); both valid until the next step.
        """
        num_tokens = step.tokens.shape[1]
        adapted = bool(step.runs)
        if len(step.counts) == num_tokens <= self._decode_rows[-1] and not (routing and adapted):
            rows = next(n for n in self._decode_rows if n >= num_tokens)
            graph = self._graph(_DecodeGraph, rows, adapted)
            graph.load(step)
            logits = graph.replay()[:num_tokens]
            # In the usual step every sequence wants its logits: nothing to select.
            return logits if len(wanted) == num_tokens else logits[self._on_device(wanted)], None
        fits = fitting_rows(self._mixed_rows, num_tokens)
        if fits is None or len(wanted) > self._max_seqs:
            return None
        mixed = self._graph(_MixedGraph, fits, adapted)
        assert isinstance(mixed, _MixedGraph)
        if not mixed.load(step):
            return None
        mixed.wanted[: len(wanted)].copy_(self._on_device(wanted))
        logits = mixed.replay()[: len(wanted)]
        return logits, mixed.gates[:num_tokens] if routing and mixed.gates is not None else None

    def _on_device(self, values: Sequence[int]) -> Tensor:
        host = torch.tensor(values, dtype=torch.int64).pin_memory()
        return host.to(self._shared.loaded.device, non_blocking=True)

    @torch.inference_mode()
    def _graph(self, kind: type[_Graph], rows: int, adapted: bool) -> _Graph:
        # The scratch memory that a graph knows is as large as the adapters were.
        sizes = self._shared.adapters.sizes
        key = kind, rows, adapted
        found = self._graphs.get(key)
        if found is None or (adapted and found[0] != sizes):
            # The old one stays until then: without any graph, their memory pool would be gone.
            self._graphs[key] = found = sizes, self._captured(kind, rows, adapted)
        return found[1]

    def _captured(self, kind: type[_Graph], rows: int, adapted: bool) -> _Graph:
        shared = self._shared
        plan: GpuPlan | None = None
        if kind is _MixedGraph:
            if adapted and rows > MAX_TOKENS:
                plan = LargeBatchPlan(rows, shared.adapters, self._max_seqs)
            elif adapted:
                capacity = Capacity.of_prompts(rows, self._max_seqs)
                plan = SmallBatchPlan(rows, shared.adapters, capacity)
            return _MixedGraph(shared, rows, plan, self._flash, self._max_seqs)
        if adapted:
            plan = SmallBatchPlan(rows, shared.adapters, Capacity.of_any(rows))
        if rows not in self._decode_steps:
            self._decode_steps[rows] = DecodeStep(
                shared.loaded.device,
                rows,
                rows * self._max_blocks,
                shared.block_size,
                min(kv_heads for _, (kv_heads, _) in attention_layers(shared.loaded.model)),
            )
        return _DecodeGraph(shared, rows, plan, self._decode_steps[rows])
