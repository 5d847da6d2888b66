"""One step of the model: the scheduled chunks in, the logits of the wanted positions out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from malora.kernels.batched import BatchPlan, Routing, Run, plan_batch
from malora.kernels.resident import ResidentAdapter, ResidentAdapters
from malora_server.model.attention import (
    AttentionContext,
    AttentionStep,
    GatheredStep,
    QueryBlock,
    attach_cache,
    attention_layers,
)
from malora_server.model.loader import LoadedModel

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ChunkInput:
    """The next tokens of one sequence: positions start to start + len(token_ids).

    pending_row: where the last step's sampled ids hold the chunk's one token, while the host does
    not know it yet.
    """

    token_ids: list[int]
    start: int
    block_table: list[int]
    adapter: ResidentAdapter | None
    pending_row: int | None = None


class ModelRunner:
    """The model, its KV cache and the adapters' plan of the current batch."""

    def __init__(
        self,
        loaded: LoadedModel,
        adapters: ResidentAdapters,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
    ) -> None:
        self._loaded = loaded
        self._adapters = adapters
        self._block_size = block_size
        self._attention = AttentionContext()
        attach_cache(
            loaded.model, self._attention, num_blocks, block_size, loaded.dtype, loaded.device
        )
        self._runs_key: tuple[tuple[int, ResidentAdapter | None], ...] = ()
        self._runs: list[Run] = []
        self._plan: BatchPlan | None = None
        self._num_layers = 1 + max(group.layer for group in loaded.groups)
        self._flash = None
        self._graphs = None
        if _takes_flash(loaded):
            from malora_server.model.flash import FlashStep
            from malora_server.model.graphs import StepGraphs

            self._flash = FlashStep(loaded.device)
            self._graphs = StepGraphs(
                loaded,
                adapters,
                self._attention,
                self._flash,
                max_num_seqs,
                max_num_batched_tokens,
                -(-max_model_len // block_size),
                num_blocks,
                block_size,
            )

    def capture(self, adapted: bool) -> None:
        """Capture the graphs of steps, where there are any; `adapted` with adapters too.

        Elsewhere on a GPU, compile what steps without adapters run: no request should wait for it.
        """
        if self._graphs is not None:
            self._graphs.capture(adapted)
        elif self._loaded.device.type == "cuda":
            for count in 2, 1:  # of which the compiler knows more
                self.run([ChunkInput([0] * count, 0, [0], None)], [0])

    @torch.inference_mode()
    def run(
        self,
        chunks: list[ChunkInput],
        wanted: list[int],
        routing: bool = False,
        sampled: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the chunks' tokens, laid end to end, through the model.

        Chunks of one token come first. wanted: indices into the tokens laid end to end. sampled:
        the last step's ids, which the chunks' `pending_row`s point into. Returns the logits there,
        (len(wanted), vocab), and, when asked and there are adapters, the gates that every token
        took, (T, layers, N), summed over a layer's linears; both valid until the next call.
        """
        device = self._loaded.device
        counts = np.array([len(c.token_ids) for c in chunks])
        starts = np.array([c.start for c in chunks])
        token_ids = np.concatenate([np.asarray(c.token_ids) for c in chunks])
        firsts = np.cumsum(counts) - counts
        positions = np.arange(len(token_ids)) - np.repeat(firsts - starts, counts)
        slots = self._slots(chunks, counts, positions)
        pending = None if sampled is None else self._pending(chunks, firsts, sampled, device)
        tables = [c.block_table for c in chunks]
        self._set_runs(chunks)
        if self._graphs is not None:
            from malora_server.model.graphs import StepInput

            tokens = np.stack([token_ids, positions, slots])
            step = StepInput(tokens, starts, counts, tables, pending, self._runs, self._runs_key)
            result = self._graphs.run(step, wanted, routing)
            if result is not None:
                return result
        ids = _to(np.stack([token_ids, positions]), device)
        if pending is not None:
            known = ids[0, : len(pending[0])]
            torch.where(*pending, known, out=known)
        self._attention.step = self._attention_step(tables, counts, starts, slots)
        plan = self._adapter_plan(len(token_ids))
        gates: Tensor | None = None
        if plan is not None:
            plan.routing = None
            if routing:
                experts = self._adapters.sizes.num_experts
                plan.routing = Routing(len(token_ids), self._num_layers, experts, device)
                gates = plan.routing.gates
        self._loaded.adapters.start(plan)
        output = self._loaded.model(
            input_ids=ids[:1],
            position_ids=ids[1:],
            use_cache=False,
            logits_to_keep=_to(wanted, device),
        )
        return output.logits[0], gates

    def _slots(self, chunks: list[ChunkInput], counts: Ints, positions: Ints) -> Ints:
        size = self._block_size
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
        return slots

    def _pending(
        self, chunks: list[ChunkInput], firsts: Ints, sampled: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        """Which of the first tokens are not known here, and the ids to take for them."""
        rows = [-1 if c.pending_row is None else c.pending_row for c in chunks]
        count = max((i for i, row in enumerate(rows) if row >= 0), default=-1) + 1
        if count == 0:
            return None
        if firsts[count - 1] != count - 1:
            raise ValueError("a chunk whose token is pending comes after one of several tokens")
        index = _to(rows[:count], device)
        return index >= 0, sampled[index.clamp(min=0)]

    def _attention_step(
        self, tables: list[list[int]], counts: Ints, starts: Ints, slots: Ints
    ) -> AttentionStep:
        size, device = self._block_size, self._loaded.device
        if self._flash is not None:
            from malora_server.model.flash import Pages

            self._flash.load(_to(slots, device), Pages.of(starts, counts, tables, size))
            return self._flash
        decodes = int(np.argmax(counts > 1)) if (counts > 1).any() else len(counts)
        blocks = []
        for part in (slice(0, decodes), slice(decodes, len(counts))):
            if part.start < part.stop:
                begin = int(counts[: part.start].sum())
                blocks.append(
                    QueryBlock(
                        slice(begin, begin + int(counts[part].sum())),
                        starts[part],
                        counts[part],
                        tables[part],
                        size,
                        self._loaded.dtype,
                        device,
                    )
                )
        return GatheredStep(_to(slots, device), blocks)

    def _set_runs(self, chunks: list[ChunkInput]) -> None:
        """The runs of the adapters in this order of tokens; the last ones when it is the same."""
        key = tuple((len(c.token_ids), c.adapter) for c in chunks)
        if key == self._runs_key:
            return
        self._runs_key, self._runs, self._plan = key, [], None
        first = 0
        for adapter, adjacent in groupby(chunks, key=attrgetter("adapter")):
            count = sum(len(c.token_ids) for c in adjacent)
            if adapter is not None:
                self._runs.append(Run(first, first + count, adapter))
            first += count

    def _adapter_plan(self, num_tokens: int) -> BatchPlan | None:
        if self._runs and self._plan is None:
            self._plan = plan_batch(self._runs, num_tokens, self._adapters)
        return self._plan


def _to(values: Ints | list[int], device: torch.device) -> Tensor:
    """Int64 on the device, without waiting for it."""
    host = torch.as_tensor(values, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _takes_flash(loaded: LoadedModel) -> bool:
    """Whether FlashInfer has kernels for the model's attention on its device."""
    if loaded.device.type != "cuda":
        return False
    from malora_server.model.flash import DTYPES, HEAD_DIMS

    dims = {dim for _, (_, dim) in attention_layers(loaded.model)}
    return loaded.dtype in DTYPES and dims <= set(HEAD_DIMS)
