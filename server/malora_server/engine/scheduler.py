"""Which sequences run in the next step, and how many tokens of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from malora_server.engine.fairness import (
    OUTPUT_TOKEN_COST,
    PROMPT_TOKEN_COST,
    ServiceCounter,
    WaitingQueue,
)
from malora_server.engine.kv_cache import BlockManager
from malora_server.engine.messages import FinishReason
from malora_server.engine.sequence import Sequence, Status


@dataclass(slots=True)
class Chunk:
    """A sequence's share of a step: its tokens start, …, start + num_tokens - 1."""

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool = field(init=False)
    """Whether it reaches the sequence's last token, so that its logits give the next one."""

    def __post_init__(self) -> None:
        self.samples = self.start + self.num_tokens == len(self.seq.token_ids)


class Scheduler:
    """Continuous batching: at most `max_num_seqs` sequences, `max_num_batched_tokens` a step.

    Waiting sequences go in order of (priority, service that their tenant has had, arrival). One is
    admitted once the cache has room for all its known tokens, so that a prompt computed in chunks
    never runs out of blocks half-way, and a sequence just preempted does not come straight back
    for the blocks it was made to give up. A tenant pays for the prompt tokens that its sequences
    compute when first admitted, and for every token they generate; what a preempted one computes
    again is free, as giving way was not its tenant's choice.

    Running sequences go in order of (priority, earlier running ones of the same tenant, arrival):
    every tenant's first, then every tenant's second, and so on. A sequence that decodes and finds
    no block takes those of the last in order, the youngest of the tenant that holds most places.

    Where the first waiting one finds no room, the youngest of a tenant that has been served more
    and runs at least two more gives way: so a tenant that floods the batch keeps others waiting
    for a step, not for a generation. With the counters as they are between two tokens, places
    only ever move to the less served; so preemption comes to rest, somebody gets a token, and all
    finish in the end.
    """

    def __init__(
        self, block_manager: BlockManager, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_preemptions = 0
        self._sequences: dict[str, Sequence] = {}
        self._service = ServiceCounter()
        self._waiting = WaitingQueue(self._service)
        # In order, unless `_unordered`.
        self._running: list[Sequence] = []
        self._unordered = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence.

        Raises ValueError where its id is in use, or where it could outgrow the whole cache.
        """
        if seq.request_id in self._sequences:
            raise ValueError(f"request id {seq.request_id!r} is in use: choose another")
        # The last token's keys and values are never needed.
        needed = self.block_manager.blocks_for(seq.max_len - 1)
        if needed > self.block_manager.num_blocks:
            raise ValueError(
                f"request {seq.request_id!r} may grow to {seq.max_len} tokens, which takes "
                f"{needed} cache blocks of the {self.block_manager.num_blocks} there are: "
                "shorten the prompt, lower max_tokens or give the cache more memory"
            )
        self._sequences[seq.request_id] = seq
        self._service.add(seq)
        self._waiting.push(seq)

    def abort(self, request_id: str, reason: FinishReason = "abort") -> Sequence | None:
        """Finish a sequence now and free its blocks; None if the id is unknown."""
        seq = self._sequences.get(request_id)
        if seq is None:
            return None
        if seq.status is Status.WAITING:
            self._waiting.remove(seq)
        else:
            self._stop_running(seq)
        seq.finish_reason = reason
        self._finish(seq)
        return seq

    def schedule(self) -> list[Chunk]:
        """The next step's chunks: first the decodes, one token each, then parts of prompts.

        Every chunk's tokens have their blocks. Depends on how many tokens sequences have, never
        on which: so the next step can be scheduled while this one's tokens are still unknown.
        """
        self._reclaim()
        self._sort_running()
        budget = self.max_num_batched_tokens
        block_size = self.block_manager.block_size
        preempted_before = self.num_preemptions
        chunks: list[Chunk] = []
        prefills: list[Sequence] = []
        # Preemption takes from the end of this very list: those not yet visited.
        for seq in self._running:
            if budget == 0:
                return chunks
            if seq.num_pending and len(seq.token_ids) >= seq.max_len:
                continue  # its last token is on its way
            start = seq.num_computed_tokens
            if len(seq.token_ids) - start > 1:
                prefills.append(seq)
                continue
            if start == len(seq.block_table) * block_size and not self._make_room(seq):
                break
            chunks.append(Chunk(seq, start, 1))
            budget -= 1
        for seq in prefills:
            if budget == 0:
                return chunks
            budget -= self._prefill(seq, budget, chunks)
        if self.num_preemptions == preempted_before:
            self._admit(budget, chunks)
        return chunks

    def advance(self, chunks: list[Chunk]) -> None:
        """Take a step as under way: what it computes counts, its tokens are expected."""
        for chunk in chunks:
            chunk.seq.num_computed_tokens = chunk.start + chunk.num_tokens
            if chunk.samples:
                chunk.seq.expect()

    def settle(self, chunks: list[Chunk], token_ids: SequenceOf[int]) -> list[Sequence]:
        """Take in the tokens of a step under way; returns the sequences that they finished.

        `token_ids` has one token for each chunk that `samples`, in the chunks' order, also for
        those finished or aborted since, whose tokens are dropped. What finishes frees its blocks at
        once, though the next step, under way too, may still write there: whoever is given them
        does so after it.
        """
        finished: list[Sequence] = []
        block_manager = self.block_manager
        block_size = block_manager.block_size
        num_sampled = 0
        for chunk in chunks:
            seq = chunk.seq
            num_sampled += chunk.samples
            if seq.status is Status.FINISHED:
                continue
            end = chunk.start + chunk.num_tokens
            done = False
            if chunk.samples:
                self._service[seq].service += OUTPUT_TOKEN_COST
                done = seq.settle(end, token_ids[num_sampled - 1])
            if seq.num_computed_tokens >= (seq.num_registered_blocks + 1) * block_size:
                block_manager.commit(seq)
            if done:
                finished.append(seq)
        if num_sampled != len(token_ids):
            raise ValueError(f"a step samples {num_sampled} tokens but brought {len(token_ids)}")
        for seq in finished:
            if seq.status is Status.WAITING:
                self._waiting.remove(seq)
            else:
                self._stop_running(seq)
            self._finish(seq)
        return finished

    def _prefill(self, seq: Sequence, budget: int, chunks: list[Chunk]) -> int:
        start = seq.num_computed_tokens
        num_tokens = min(budget, len(seq.token_ids) - start)
        chunks.append(Chunk(seq, start, num_tokens))
        return num_tokens

    def _admit(self, budget: int, chunks: list[Chunk]) -> None:
        while budget > 0 and len(self._running) < self.max_num_seqs:
            seq = self._waiting.first()
            if seq is None or seq.num_pending:
                return  # it gave way with its last token under way: the next step knows it
            prefix, num_found = self.block_manager.match_prefix(seq)
            # Nobody overtakes the first in order: it would starve while smaller ones pass.
            if not self.block_manager.allocate(seq, len(seq.token_ids) - num_found, prefix):
                return
            self._waiting.remove(seq)
            seq.status = Status.RUNNING
            self._running.append(seq)
            self._unordered = True
            tenant = self._service[seq]
            tenant.num_running += 1
            if seq.num_preemptions == 0:
                # At once, not as chunks are computed: the next to be admitted depends on it.
                tenant.service += PROMPT_TOKEN_COST * (seq.num_prompt_tokens - num_found)
            budget -= self._prefill(seq, budget, chunks)

    def _reclaim(self) -> None:
        """Make room for the first in line, as far as it may take it from others."""
        seq = self._waiting.first()
        while seq is not None and not self._has_room(seq):
            victim = self._yielding_to(seq)
            if victim is None:
                return
            self._preempt(victim)

    def _has_room(self, seq: Sequence) -> bool:
        return len(self._running) < self.max_num_seqs and self.block_manager.fits(seq)

    def _yielding_to(self, seq: Sequence) -> Sequence | None:
        service = self._service
        mine = service[seq]
        best: Sequence | None = None
        best_key = (0, 0, 0)
        for other in self._running:
            tenant = service[other]
            if tenant.num_running <= mine.num_running + 1 or other.priority < seq.priority:
                continue
            if other.priority == seq.priority and tenant.service <= mine.service:
                continue
            key = (other.priority, tenant.num_running, other.arrival)
            if best is None or key > best_key:
                best, best_key = other, key
        return best

    def _sort_running(self) -> None:
        if not self._unordered:
            return
        seen: Counter[str | None] = Counter()
        ranks: dict[str, tuple[int, int, int]] = {}
        for seq in sorted(self._running, key=lambda seq: (seq.priority, seq.arrival)):
            ranks[seq.request_id] = (seq.priority, seen[seq.tenant], seq.arrival)
            seen[seq.tenant] += 1
        self._running.sort(key=lambda seq: ranks[seq.request_id])
        self._unordered = False

    def _make_room(self, seq: Sequence) -> bool:
        while not self.block_manager.allocate(seq, 1):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self._stop_running(seq)
        self.block_manager.free(seq)
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        seq.status = Status.WAITING
        self.num_preemptions += 1
        self._waiting.push(seq)

    def _stop_running(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self._service[seq].num_running -= 1
        self._unordered = True

    def _finish(self, seq: Sequence) -> None:
        seq.forget_pending()
        self.block_manager.free(seq)
        seq.status = Status.FINISHED
        self._service.remove(seq)
        del self._sequences[seq.request_id]
