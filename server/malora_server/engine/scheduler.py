"""Which sequences run in the next step, and how many tokens of each."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from operator import attrgetter

from malora_server.engine.kv_cache import BlockManager
from malora_server.engine.messages import FinishReason
from malora_server.engine.sequence import Sequence, Status

_order = attrgetter("order")


@dataclass(slots=True)
class Chunk:
    """A sequence's share of a step: its tokens start, …, start + num_tokens - 1."""

    seq: Sequence
    start: int
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether it reaches the last known token, so that its logits give the next one.

        Ask before the step's tokens are appended.
        """
        return self.start + self.num_tokens == len(self.seq.token_ids)


class Scheduler:
    """Continuous batching: at most `max_num_seqs` sequences, `max_num_batched_tokens` a step.

    Sequences go in order of (priority, arrival). One is admitted once the cache has room for all
    its known tokens, so that a prompt computed in chunks never runs out of blocks half-way, and
    a sequence just preempted does not come straight back for the blocks it was made to give up.
    A sequence that decodes and finds no block takes those of the last in order, which is
    computed again later; so the first in order always proceeds, and all finish in the end.
    """

    def __init__(
        self, block_manager: BlockManager, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_preemptions = 0
        self._sequences: dict[str, Sequence] = {}
        # Both sorted by `order`.
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []

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
        insort(self._waiting, seq, key=_order)

    def abort(self, request_id: str, reason: FinishReason = "abort") -> Sequence | None:
        """Finish a sequence now and free its blocks; None if the id is unknown."""
        seq = self._sequences.get(request_id)
        if seq is None:
            return None
        queue = self._waiting if seq.status is Status.WAITING else self._running
        del queue[bisect_left(queue, seq.order, key=_order)]
        seq.finish_reason = reason
        self._finish(seq)
        return seq

    def schedule(self) -> list[Chunk]:
        """The next step's chunks: first the decodes, one token each, then parts of prompts.

        Every chunk's tokens have their blocks. Depends on how many tokens sequences have, never
        on which.
        """
        budget = self.max_num_batched_tokens
        block_size = self.block_manager.block_size
        preempted_before = self.num_preemptions
        chunks: list[Chunk] = []
        prefills: list[Sequence] = []
        # Preemption takes from the end of this very list: those not yet visited.
        for seq in self._running:
            if budget == 0:
                return chunks
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

    def update(self, chunks: list[Chunk], token_ids: SequenceOf[int]) -> list[Sequence]:
        """Take in what a step computed; returns the sequences it finished, their blocks freed.

        `token_ids` has one token for each chunk that `samples`, in the chunks' order, also for
        those aborted since, whose tokens are dropped.
        """
        finished: list[Sequence] = []
        block_manager = self.block_manager
        block_size = block_manager.block_size
        num_sampled = 0
        for chunk in chunks:
            seq = chunk.seq
            end = chunk.start + chunk.num_tokens
            samples = end == len(seq.token_ids)
            num_sampled += samples
            if seq.status is not Status.RUNNING:
                continue
            seq.num_computed_tokens = end
            if end >= (seq.num_registered_blocks + 1) * block_size:
                block_manager.commit(seq)
            if samples and seq.append(token_ids[num_sampled - 1]):
                finished.append(seq)
        if num_sampled != len(token_ids):
            raise ValueError(f"a step samples {num_sampled} tokens but brought {len(token_ids)}")
        if finished:
            for seq in finished:
                self._finish(seq)
            self._running = [seq for seq in self._running if seq.status is Status.RUNNING]
        return finished

    def _prefill(self, seq: Sequence, budget: int, chunks: list[Chunk]) -> int:
        start = seq.num_computed_tokens
        num_tokens = min(budget, len(seq.token_ids) - start)
        chunks.append(Chunk(seq, start, num_tokens))
        return num_tokens

    def _admit(self, budget: int, chunks: list[Chunk]) -> None:
        while budget > 0 and self._waiting and len(self._running) < self.max_num_seqs:
            seq = self._waiting[0]
            prefix, num_found = self.block_manager.match_prefix(seq)
            # Nobody overtakes the first in order: it would starve while smaller ones pass.
            if not self.block_manager.allocate(seq, len(seq.token_ids) - num_found, prefix):
                return
            del self._waiting[0]
            seq.status = Status.RUNNING
            insort(self._running, seq, key=_order)
            budget -= self._prefill(seq, budget, chunks)

    def _make_room(self, seq: Sequence) -> bool:
        while not self.block_manager.allocate(seq, 1):
            victim = self._running.pop()
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.block_manager.free(seq)
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        seq.status = Status.WAITING
        self.num_preemptions += 1
        insort(self._waiting, seq, key=_order)

    def _finish(self, seq: Sequence) -> None:
        self.block_manager.free(seq)
        seq.status = Status.FINISHED
        del self._sequences[seq.request_id]
