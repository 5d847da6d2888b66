"""CUDA graphs of decode steps: a step of one token a sequence is one launch.

A graph has a fixed number of rows; a batch takes the smallest that it fits, and rows beyond it read
and write the cache's spare block. What differs between steps lies in device memory that is written
before a replay: tokens, positions, slots, FlashInfer's division of the work, the table of adapters.
So one graph is right for every mix of adapters. Batches without any take graphs of their own, which
launch nothing for them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from malora.kernels.batched import Run
from malora.kernels.resident import ResidentAdapters, Sizes
from malora.kernels.small_batch import MAX_TOKENS, SmallBatchPlan
from malora_server.model.attention import AttentionContext
from malora_server.model.flash import FlashStep, Pages
from malora_server.model.loader import LoadedModel

logger = logging.getLogger(__name__)


@dataclass
class _Graph:
    """A captured step of `rows` tokens and what it reads."""

    inputs: Tensor
    """(3, rows) int64: token ids, positions, slots."""
    step: FlashStep
    plan: SmallBatchPlan | None
    plan_key: object = None
    graph: torch.cuda.CUDAGraph | None = None
    logits: Tensor | None = None


class DecodeGraphs:
    """Graphs for batches of up to `max_rows` sequences, of at most `max_blocks` blocks each.

    `max_rows` is what was asked for, but not beyond what a plan in a graph can be for.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        adapters: ResidentAdapters,
        attention: AttentionContext,
        max_rows: int,
        max_blocks: int,
        spare_block: int,
        block_size: int,
    ) -> None:
        self._loaded = loaded
        self._adapters = adapters
        self._attention = attention
        self._max_blocks = max_blocks
        self._spare_block = spare_block
        self._block_size = block_size
        self.max_rows = min(max_rows, MAX_TOKENS)
        sizes = (1, 2, 4, *range(8, self.max_rows + 8, 8))
        self._sizes = [n for n in sizes if n < self.max_rows + 8]
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, Sizes | None], _Graph] = {}

    def capture(self, adapted: bool) -> None:
        """Capture every size, the largest first; `adapted` with adapters too."""
        for number, rows in enumerate(reversed(self._sizes)):
            self._graph(rows, False)
            if adapted:
                self._graph(rows, True)
            logger.info("captured graphs of %d rows (%d/%d)", rows, number + 1, len(self._sizes))

    def run(
        self,
        inputs: NDArray[np.int64],
        block_tables: list[list[int]],
        runs: Sequence[Run],
        plan_key: object,
        pending: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """One step. Returns the logits, (B, vocab), valid until the next.

        inputs: (3, B), token ids, positions and slots. plan_key: equal where the runs are.
        pending: for the first rows, whether their ids are unknown here, and those to take instead,
        on the device.
        """
        count = inputs.shape[1]
        rows = next(n for n in self._sizes if n >= count)
        graph = self._graph(rows, bool(runs))
        self._load(graph, inputs, block_tables)
        if pending is not None:
            known = graph.inputs[0, : len(pending[0])]
            torch.where(*pending, known, out=known)
        if graph.plan is not None and graph.plan_key != plan_key:
            graph.plan.load(runs)
            graph.plan_key = plan_key
        assert graph.graph is not None
        assert graph.logits is not None
        graph.graph.replay()
        return graph.logits[:count]

    def _load(
        self, graph: _Graph, inputs: NDArray[np.int64], block_tables: list[list[int]]
    ) -> None:
        rows, count = graph.inputs.shape[1], inputs.shape[1]
        spare = rows - count
        if spare:
            filler = np.array([[0], [0], [self._spare_block * self._block_size]])
            inputs = np.concatenate([inputs, np.repeat(filler, spare, axis=1)], axis=1)
            block_tables = block_tables + [[self._spare_block]] * spare
        graph.inputs.copy_(torch.from_numpy(inputs).pin_memory(), non_blocking=True)
        pages = Pages.of(inputs[1], np.ones(rows, np.int64), block_tables, self._block_size)
        graph.step.load(graph.inputs[2], pages)

    def _graph(self, rows: int, adapted: bool) -> _Graph:
        # The scratch memory that a graph knows is as large as the adapters were.
        key = rows, self._adapters.sizes if adapted else None
        if key not in self._graphs:
            self._graphs = {
                (n, sizes): graph
                for (n, sizes), graph in self._graphs.items()
                if n != rows or sizes is None or not adapted
            }
            self._graphs[key] = self._captured(rows, adapted)
        return self._graphs[key]

    @torch.inference_mode()
    def _captured(self, rows: int, adapted: bool) -> _Graph:
        device = self._loaded.device
        graph = _Graph(
            torch.zeros((3, rows), dtype=torch.int64, device=device),
            FlashStep(device, (rows, rows * self._max_blocks)),
            SmallBatchPlan(rows, self._adapters, any_mix=True) if adapted else None,
        )
        self._load(graph, np.zeros((3, 0), np.int64), [])
        self._attention.step = graph.step
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # compiles and plans what a capture may not
            self._forward(graph)
        side.synchronize()
        graph.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph.graph, pool=self._pool):
            graph.logits = self._forward(graph)
        return graph

    def _forward(self, graph: _Graph) -> Tensor:
        self._loaded.adapters.start(graph.plan)
        logits: Tensor = self._loaded.model(
            input_ids=graph.inputs[:1],
            position_ids=graph.inputs[1:2],
            use_cache=False,
            logits_to_keep=0,
        ).logits
        return logits[0]
