"""One step of the model: the scheduled chunks in, the logits of the wanted positions out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from malora.kernels.batched import BatchPlan, Routing, Run, plan_batch
from malora.kernels.resident import ResidentAdapter, ResidentAdapters
from malora_server.model.attention import (
    AttentionContext,
    AttentionStep,
    QueryBlock,
    attach_cache,
)
from malora_server.model.loader import LoadedModel


@dataclass(frozen=True, slots=True)
class ChunkInput:
    """The next tokens of one sequence: positions start to start + len(token_ids)."""

    token_ids: list[int]
    start: int
    block_table: list[int]
    adapter: ResidentAdapter | None


class ModelRunner:
    """The model, its KV cache and the adapters' plan of the current batch."""

    def __init__(
        self, loaded: LoadedModel, adapters: ResidentAdapters, num_blocks: int, block_size: int
    ) -> None:
        self._loaded = loaded
        self._adapters = adapters
        self._block_size = block_size
        self._attention = AttentionContext()
        attach_cache(
            loaded.model, self._attention, num_blocks, block_size, loaded.dtype, loaded.device
        )
        self._plan_key: tuple[tuple[int, ResidentAdapter | None], ...] = ()
        self._plan: BatchPlan | None = None
        self._num_layers = 1 + max(group.layer for group in loaded.groups)

    @torch.inference_mode()
    def run(
        self, chunks: list[ChunkInput], wanted: list[int], routing: bool = False
    ) -> tuple[Tensor, Routing | None]:
        """Run the chunks' tokens, laid end to end, through the model.

        Chunks of one token come first. wanted: indices into the tokens laid end to end. Returns
        the logits there, (len(wanted), vocab), and, when asked, the gates that every token took.
        """
        device = self._loaded.device
        counts = np.array([len(c.token_ids) for c in chunks])
        starts = np.array([c.start for c in chunks])
        token_ids = np.concatenate([np.asarray(c.token_ids) for c in chunks])
        firsts = np.cumsum(counts) - counts
        positions = np.arange(len(token_ids)) - np.repeat(firsts - starts, counts)
        self._attention.step = self._attention_step(chunks, counts, starts, positions)
        self._loaded.adapters.plan = plan = self._adapter_plan(chunks)
        gates: Routing | None = None
        if plan is not None:
            if routing:
                experts = self._adapters.sizes.num_experts
                gates = Routing(len(token_ids), self._num_layers, experts, device)
            plan.routing = gates
        output = self._loaded.model(
            input_ids=torch.from_numpy(token_ids)[None].to(device),
            position_ids=torch.from_numpy(positions)[None].to(device),
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, dtype=torch.int64, device=device),
        )
        return output.logits[0], gates

    def _attention_step(
        self,
        chunks: list[ChunkInput],
        counts: np.ndarray,
        starts: np.ndarray,
        positions: np.ndarray,
    ) -> AttentionStep:
        size, device = self._block_size, self._loaded.device
        slots = np.empty(len(positions), dtype=np.int64)
        first = 0
        for chunk, count in zip(chunks, counts.tolist(), strict=True):
            if count == 1:
                block, offset = divmod(chunk.start, size)
                slots[first] = chunk.block_table[block] * size + offset
            else:
                at = positions[first : first + count]
                table = np.asarray(chunk.block_table)
                slots[first : first + count] = table[at // size] * size + at % size
            first += count
        decodes = int(np.argmax(counts > 1)) if (counts > 1).any() else len(counts)
        blocks = []
        for part in (slice(0, decodes), slice(decodes, len(chunks))):
            if part.start < part.stop:
                begin = int(counts[: part.start].sum())
                blocks.append(
                    QueryBlock(
                        slice(begin, begin + int(counts[part].sum())),
                        starts[part],
                        counts[part],
                        [c.block_table for c in chunks[part]],
                        size,
                        self._loaded.dtype,
                        device,
                    )
                )
        return AttentionStep(torch.from_numpy(slots).to(device), blocks)

    def _adapter_plan(self, chunks: list[ChunkInput]) -> BatchPlan | None:
        """The plan of the adapters in this order of tokens; the last one's when it is the same."""
        key = tuple((len(c.token_ids), c.adapter) for c in chunks)
        if key == self._plan_key:
            return self._plan
        runs: list[Run] = []
        first = 0
        for adapter, adjacent in groupby(chunks, key=attrgetter("adapter")):
            count = sum(len(c.token_ids) for c in adjacent)
            if adapter is not None:
                runs.append(Run(first, first + count, adapter))
            first += count
        self._plan_key = key
        self._plan = plan_batch(runs, first, self._adapters) if runs else None
        return self._plan
