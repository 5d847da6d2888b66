"""The engine: takes requests, runs steps, gives back tokens. One thread, no I/O of its own."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from malora.kernels.batched import Routing
from malora.kernels.resident import ResidentAdapter, ResidentAdapters
from malora_server.adapters.store import AdapterStore
from malora_server.engine.config import EngineConfig
from malora_server.engine.kv_cache import BlockManager
from malora_server.engine.messages import (
    EngineStats,
    Outputs,
    Ready,
    SequenceOutput,
    Submit,
    TokenLogprobs,
    TokenRouting,
)
from malora_server.engine.sampler import Sampled, Sampler, prompt_logprobs
from malora_server.engine.scheduler import Chunk, Scheduler
from malora_server.engine.sequence import Sequence
from malora_server.model.attention import cache_bytes_per_block
from malora_server.model.loader import LoadedModel, choose_device, load_model, prepare_model
from malora_server.model.runner import ChunkInput, ModelRunner

logger = logging.getLogger(__name__)

CACHE_SHARE = 0.5
"""The share of the free memory that the KV cache takes where `kv_cache_memory` is not given."""


@dataclass(slots=True)
class _Request:
    """What the engine keeps of a request beside its sequence."""

    adapter: ResidentAdapter | None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    started: bool = False


class EngineCore:
    """Loads the base model and the adapters, then serves requests step by step."""

    def __init__(self, config: EngineConfig, model: PreTrainedModel | None = None) -> None:
        """model: the base model, where it is in memory already; it is changed.

        Raises OSError or ValueError, with a message for the user, where it cannot start.
        """
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        if model is None:
            model = load_model(config.base, config.dtype, choose_device(config.device))
        self._loaded = loaded = prepare_model(model)
        device = loaded.device
        if device.type == "cpu":  # whose kernel reads single precision
            from malora.kernels import cpu

            cpu.compile_kernels()
            resident = ResidentAdapters(loaded.groups, torch.float32, device)
        else:
            resident = ResidentAdapters(loaded.groups, loaded.dtype, device)
        root = Path(config.adapters) if config.adapters is not None else None
        self._adapters = AdapterStore(root, loaded.spec, resident)
        self._adapters.load_all()
        self._max_model_len = min(
            loaded.max_model_len, config.max_model_len or loaded.max_model_len
        )
        num_blocks = _count_blocks(config, loaded, self._max_model_len)
        self._runner = ModelRunner(
            loaded,
            resident,
            num_blocks,
            config.block_size,
            config.max_num_seqs,
            self._max_model_len,
        )
        self._runner.capture(adapted=config.adapters is not None)
        self._blocks = BlockManager(num_blocks, config.block_size, config.enable_prefix_caching)
        self._scheduler = Scheduler(
            self._blocks, config.max_num_seqs, config.max_num_batched_tokens
        )
        self._sampler = Sampler()
        self._requests: dict[str, _Request] = {}
        self._arrivals = count()
        self._steps = 0
        self.ready = Ready(
            max_model_len=self._max_model_len,
            vocab_size=loaded.vocab_size,
            num_blocks=num_blocks,
            block_size=config.block_size,
            dtype=str(loaded.dtype).removeprefix("torch."),
            device=str(device),
            adapters=self._adapters.infos(),
        )

    @property
    def has_work(self) -> bool:
        """Whether any sequence is waiting or running."""
        return self._scheduler.has_work

    def add(self, submit: Submit) -> SequenceOutput | None:
        """Queue a request; returns its end at once where it cannot be served."""
        try:
            adapter = None if submit.adapter is None else self._adapters.get(submit.adapter)
            sequence = Sequence(
                submit, next(self._arrivals), self._loaded.eos_token_ids, self._max_model_len
            )
            self._scheduler.add(sequence)
        except (KeyError, ValueError) as error:
            return _failure(submit.request_id, str(error.args[0]))
        self._requests[submit.request_id] = _Request(adapter)
        return None

    def abort(self, request_ids: list[str]) -> None:
        """Forget requests and free what they hold. Unknown ids are ignored."""
        for request_id in request_ids:
            if self._scheduler.abort(request_id) is not None:
                del self._requests[request_id]

    def abort_all(self) -> Outputs:
        """Abort every request; the outputs tell whoever waits for them."""
        request_ids = list(self._requests)
        self.abort(request_ids)
        ends = [SequenceOutput(i, [], finish_reason="abort") for i in request_ids]
        return Outputs(ends, self.stats())

    def stats(self) -> EngineStats:
        """The state after the last step."""
        return EngineStats(
            num_requests_running=self._scheduler.num_running,
            num_requests_waiting=self._scheduler.num_waiting,
            kv_cache_usage_ratio=self._blocks.usage,
            prefix_cache_queries=self._blocks.num_queried_tokens,
            prefix_cache_hits=self._blocks.num_hit_tokens,
            preemptions=self._scheduler.num_preemptions,
            steps=self._steps,
        )

    def step(self) -> Outputs:
        """Run one step; what it added to each sequence, and what it ended."""
        chunks = self._scheduler.schedule()
        if not chunks:
            return Outputs([], self.stats())
        try:
            outputs = self._run(chunks)
        except Exception:
            # Whatever broke, it broke these sequences alone: they end, the engine goes on.
            logger.exception("a step of %d sequences failed", len(chunks))
            ids = [chunk.seq.request_id for chunk in chunks]
            self.abort(ids)
            outputs = [_failure(i, "the engine failed on this request; see its log") for i in ids]
        self._steps += 1
        return Outputs(outputs, self.stats())

    def _run(self, chunks: list[Chunk]) -> list[SequenceOutput]:
        inputs = [
            ChunkInput(
                chunk.seq.token_ids[chunk.start : chunk.start + chunk.num_tokens],
                chunk.start,
                chunk.seq.block_table,
                self._requests[chunk.seq.request_id].adapter,
            )
            for chunk in chunks
        ]
        wanted: list[int] = []
        prompts: list[tuple[Chunk, slice]] = []
        sampled_rows: list[int] = []
        sampled_at: list[int] = []
        sequences: list[Sequence] = []
        first = 0
        for chunk in chunks:
            predicted = _num_predicted_prompt_tokens(chunk)
            if predicted:
                prompts.append((chunk, slice(len(wanted), len(wanted) + predicted)))
                wanted.extend(range(first, first + predicted))
            if chunk.samples:
                sampled_rows.append(len(wanted))
                sampled_at.append(first + chunk.num_tokens - 1)
                sequences.append(chunk.seq)
                wanted.append(first + chunk.num_tokens - 1)
            first += chunk.num_tokens
        routed = any(seq.sampling.routing is not None for seq in sequences)
        logits, routing = self._runner.run(inputs, wanted, routed)
        for chunk, rows in prompts:
            self._keep_prompt_logprobs(chunk, logits[rows])
        if prompts:
            logits = logits[torch.tensor(sampled_rows, device=logits.device, dtype=torch.int64)]
        if not sequences:
            self._scheduler.update(chunks, [])
            return []
        sampled = self._sampler.sample(logits, sequences)
        token_ids = sampled.token_ids.tolist()
        bad = [seq for seq, is_bad in zip(sequences, sampled.bad.tolist(), strict=True) if is_bad]
        self.abort([seq.request_id for seq in bad])
        self._scheduler.update(chunks, token_ids)
        gates = _gates(routing, sampled_at, sequences) if routed else [None] * len(sequences)
        logprobs = _token_logprobs(sampled, token_ids, sequences)
        return [
            self._output(seq, token, logprob, gate)
            for seq, token, logprob, gate in zip(sequences, token_ids, logprobs, gates, strict=True)
        ]

    def _output(
        self,
        seq: Sequence,
        token_id: int,
        logprobs: TokenLogprobs | None,
        routing: TokenRouting | None,
    ) -> SequenceOutput:
        request_id = seq.request_id
        if request_id not in self._requests:
            return _failure(request_id, "the model gave no finite scores for the next token")
        request = self._requests[request_id]
        first = not request.started
        request.started = True
        if seq.finish_reason is not None:
            del self._requests[request_id]
        return SequenceOutput(
            request_id,
            [token_id],
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
            num_cached_tokens=seq.num_cached_tokens,
            logprobs=None if logprobs is None else [logprobs],
            prompt_logprobs=(
                request.prompt_logprobs
                if first and seq.sampling.prompt_logprobs is not None
                else None
            ),
            routing=None if routing is None else [routing],
        )

    def _keep_prompt_logprobs(self, chunk: Chunk, logits: Tensor) -> None:
        """logits: those that predict the prompt's tokens start + 1, …"""
        top_n = chunk.seq.sampling.prompt_logprobs or 0
        begin = chunk.start + 1
        targets = chunk.seq.token_ids[begin : begin + len(logits)]
        values = prompt_logprobs(logits, torch.tensor(targets, device=logits.device), top_n)
        logprobs, top_ids, top_logprobs = (v.tolist() for v in values)
        kept = self._requests[chunk.seq.request_id].prompt_logprobs
        # A sequence preempted in its prompt computes these positions again.
        del kept[chunk.start :]
        kept.extend(map(TokenLogprobs, targets, logprobs, top_ids, top_logprobs))


def _num_predicted_prompt_tokens(chunk: Chunk) -> int:
    """How many of the chunk's leading positions predict prompt tokens that somebody asked for."""
    seq = chunk.seq
    if seq.sampling.prompt_logprobs is None or seq.num_output_tokens:
        return 0
    return max(0, min(chunk.start + chunk.num_tokens, seq.num_prompt_tokens - 1) - chunk.start)


def _token_logprobs(
    sampled: Sampled, token_ids: list[int], sequences: list[Sequence]
) -> list[TokenLogprobs | None]:
    if sampled.logprobs is None:
        return [None] * len(sequences)
    logprobs = sampled.logprobs.tolist()
    empty: list[list[int]] = [[]] * len(sequences)
    top_ids = empty if sampled.top_ids is None else sampled.top_ids.tolist()
    top_logprobs = empty if sampled.top_logprobs is None else sampled.top_logprobs.tolist()
    return [
        None
        if (top := seq.sampling.logprobs) is None
        else TokenLogprobs(token, logprob, ids[:top], values[:top])
        for seq, token, logprob, ids, values in zip(
            sequences, token_ids, logprobs, top_ids, top_logprobs, strict=True
        )
    ]


def _gates(
    routing: Routing | None, rows: list[int], sequences: list[Sequence]
) -> list[TokenRouting | None]:
    """The gates of the tokens at `rows`, averaged over all routed linears and by layer."""
    if routing is None:
        return [None] * len(sequences)
    gates = routing.gates[rows]
    layers = gates / gates.sum(-1, keepdim=True).clamp_min(1e-20)
    mean = gates.sum(1)
    mean /= mean.sum(-1, keepdim=True).clamp_min(1e-20)
    return [
        None
        if seq.sampling.routing is None or not any(row)
        else TokenRouting(row, by_layer if seq.sampling.routing == "layers" else None)
        for seq, row, by_layer in zip(sequences, mean.tolist(), layers.tolist(), strict=True)
    ]


def _failure(request_id: str, error: str) -> SequenceOutput:
    return SequenceOutput(request_id, [], finish_reason="error", error=error)


def _count_blocks(config: EngineConfig, loaded: LoadedModel, max_model_len: int) -> int:
    """How many blocks the KV cache has. Raises ValueError where not one sequence would fit."""
    per_block = cache_bytes_per_block(loaded.model, config.block_size, loaded.dtype)
    a_sequence = math.ceil(max_model_len / config.block_size)
    if config.kv_cache_memory is not None:
        blocks = config.kv_cache_memory // per_block
        if blocks < a_sequence:
            raise ValueError(
                f"the KV cache's {config.kv_cache_memory:,} bytes hold {blocks} blocks, but one "
                f"sequence of {max_model_len} tokens takes {a_sequence} ({a_sequence * per_block:,}"
                " bytes): raise --kv-cache-memory or lower --max-model-len"
            )
        return blocks
    if loaded.device.type == "cuda":
        free = torch.cuda.mem_get_info(loaded.device)[0]
    else:
        free = psutil.virtual_memory().available
    fits = int(free * CACHE_SHARE) // per_block
    if fits < a_sequence:
        raise ValueError(
            f"{free:,} bytes are free, half of which the KV cache may take: that holds "
            f"{fits} blocks of {per_block:,} bytes, but one sequence of {max_model_len} tokens "
            f"takes {a_sequence}: lower --max-model-len or free memory"
        )
    # More than every running sequence at its longest, twice over for cached prefixes, is waste.
    return min(fits, 2 * a_sequence * config.max_num_seqs)
