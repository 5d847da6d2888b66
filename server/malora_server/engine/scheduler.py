"""Which sequences run in the next step, and how many tokens of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from malora_server.adapters.store import AdapterStore, StoredAdapter
from malora_server.engine.fairness import (
    ADAPTER_QUANTUM,
    GUARDED_SHARE,
    GUARDED_STEPS,
    OUTPUT_TOKEN_COST,
    PROMPT_TOKEN_COST,
    FloodLimit,
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

    A step's length is everybody's, so where tenants flood (`ServiceCounter.floods`) their tokens in
    it are limited, and others pass them in the line. Sequences beyond the limit keep their places
    and blocks, and are no part of the step; those earlier in order are, so all finish in the end.

    A sequence whose adapter is not on the device waits beside that line, and holds up nobody; those
    whose adapters find no place there go in the same order. Where adapters that are used leave no
    room for the first one's, the most served of them give way, with all their sequences, once they
    are ahead by ADAPTER_QUANTUM: so of adapters that all flood, more than there is memory for,
    each gets its share in turns. A place is held for sequences that run or wait for the batch.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        adapters: AdapterStore | None = None,
        flood_tokens: Callable[[], int] | None = None,
    ) -> None:
        """adapters: whose places sequences need that have one.

        flood_tokens: how many tokens of a step tenants that flood may have together where there are
        others, if that is no less than an equal share; None: any number.
        """
        self.block_manager = block_manager
        self._adapters = adapters
        self._flood_tokens = flood_tokens
        self._num_guarded = 0
        """Steps for which floods are limited though they hold up nobody now."""
        self._urgency = 0
        """Of the most urgent sequence that a flood held up last."""
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_preemptions = 0
        self._sequences: dict[str, Sequence] = {}
        self._service = ServiceCounter()
        self._waiting = WaitingQueue(self._service)
        self._placing = WaitingQueue(self._service)
        self._sequences_of: dict[StoredAdapter, dict[str, Sequence]] = {}
        # In order, unless `_unordered`.
        self._running: list[Sequence] = []
        self._unordered = False

    @property
    def num_waiting(self) -> int:
        """Those that do not run, for whatever reason."""
        return len(self._sequences) - len(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def is_runnable(self) -> bool:
        """Whether any sequence does not wait for its adapter to be loaded."""
        return bool(self._running or len(self._waiting) or len(self._placing))

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
        if seq.adapter is not None:
            self._sequences_of.setdefault(seq.adapter, {})[seq.request_id] = seq
        self._line_up(seq)

    def abort(self, request_id: str, reason: FinishReason = "abort") -> Sequence | None:
        """Finish a sequence now and free its blocks; None if the id is unknown."""
        seq = self._sequences.get(request_id)
        if seq is None:
            return None
        self._leave(seq)
        seq.finish_reason = reason
        self._finish(seq)
        return seq

    def adapter_loaded(self, adapter: StoredAdapter) -> None:
        """Its sequences may ask for a place on the device."""
        for seq in self._waiting_for(adapter, Status.LOADING):
            seq.status = Status.PLACING
            self._placing.push(seq)

    def adapter_ready(self, adapter: StoredAdapter) -> list[Sequence]:
        """Its sequences may run; those that cannot go on are returned: they began with other
        weights, which nobody has any more.
        """
        strangers = []
        for seq in self._waiting_for(adapter, Status.LOADING, Status.PLACING):
            if not seq.bind(adapter.digest):
                strangers.append(seq)
                continue
            self._leave(seq)
            self._wait(seq)
        return strangers

    def waiting_for(self, adapter: StoredAdapter) -> list[Sequence]:
        """The sequences that wait for an adapter to be loaded."""
        return self._waiting_for(adapter, Status.LOADING)

    def without_hope(self) -> list[Sequence]:
        """The first in line for a place on the device, where its adapter can never have one."""
        seq = self._placing.first()
        if seq is None or seq.adapter is None or self._adapters is None:
            return []
        if self._adapters.can_ever_fit(seq.adapter):
            return []
        return self._waiting_for(seq.adapter, Status.PLACING)

    def place_adapters(self) -> None:
        """Bring adapters to the device and into host memory, as far as others make room."""
        if self._adapters is not None:
            self._place_adapters(self._adapters)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks: first the decodes, one token each, then parts of prompts.

        Every chunk's tokens have their blocks. Depends on how many tokens sequences have, never
        on which: so the next step can be scheduled while this one's tokens are still unknown.
        """
        limit = self._limit_floods()
        self._reclaim(limit)
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
            if limit is not None and limit.left_for(seq) <= 0:
                continue
            if start == len(seq.block_table) * block_size and not self._make_room(seq):
                break
            chunks.append(Chunk(seq, start, 1))
            budget -= 1
            if limit is not None:
                limit.take(seq, 1)
        for seq in prefills:
            if budget == 0:
                return chunks
            budget -= self._prefill(seq, budget, limit, chunks)
        if self.num_preemptions == preempted_before:
            self._admit(budget, limit, chunks)
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
            self._leave(seq)
            self._finish(seq)
        return finished

    def _limit_floods(self) -> FloodLimit | None:
        """What tenants that flood may have of the next step; None where they hold up nobody."""
        if self._flood_tokens is None:
            return None
        fewest = self._service.fewest()
        floods = self._service.floods(fewest, self.max_num_seqs)
        if floods:
            others = [seq for seq in self._running if seq.tenant not in floods]
            first = self._waiting.first(but=floods)
            if first is not None:
                others.append(first)
            self._urgency = min(seq.priority for seq in others)
            self._num_guarded = GUARDED_STEPS
            num_tokens = max(self._flood_tokens(), len(floods) * fewest)
            return FloodLimit(floods, self._urgency, num_tokens)
        if self._num_guarded == 0:
            return None
        self._num_guarded -= 1
        floods = self._service.floods(1, self.max_num_seqs)
        num_tokens = GUARDED_SHARE * self._flood_tokens()
        return FloodLimit(floods, self._urgency, num_tokens) if floods else None

    def _prefill(
        self, seq: Sequence, budget: int, limit: FloodLimit | None, chunks: list[Chunk]
    ) -> int:
        start = seq.num_computed_tokens
        num_tokens = min(budget, len(seq.token_ids) - start)
        if limit is not None:
            num_tokens = min(num_tokens, limit.left_for(seq))
            if num_tokens <= 0:
                return 0
            limit.take(seq, num_tokens)
        chunks.append(Chunk(seq, start, num_tokens))
        return num_tokens

    def _admit(self, budget: int, limit: FloodLimit | None, chunks: list[Chunk]) -> None:
        while budget > 0 and len(self._running) < self.max_num_seqs:
            seq = self._first_waiting(limit)
            if seq is None or seq.num_pending:
                return  # it gave way with its last token under way: the next step knows it
            if limit is not None and limit.left_for(seq) <= 0:
                return
            prefix, num_found = self.block_manager.match_prefix(seq)
            # Nobody overtakes the first in order: it would starve while smaller ones pass.
            if not self.block_manager.allocate(seq, len(seq.token_ids) - num_found, prefix):
                return
            self._waiting.remove(seq)
            seq.status = Status.RUNNING  # its adapter's place stays held
            self._running.append(seq)
            self._unordered = True
            tenant = self._service[seq]
            tenant.num_running += 1
            if seq.num_preemptions == 0:
                # At once, not as chunks are computed: the next to be admitted depends on it.
                tenant.service += PROMPT_TOKEN_COST * (seq.num_prompt_tokens - num_found)
            budget -= self._prefill(seq, budget, limit, chunks)

    def _first_waiting(self, limit: FloodLimit | None) -> Sequence | None:
        """The next to be admitted: a tenant that floods, and runs something, lets others pass."""
        seq = self._waiting.first()
        if seq is None or limit is None or not limit.holds(seq):
            return seq
        other = self._waiting.first(but=limit.floods)
        if other is None or other.priority > seq.priority:
            return seq
        return other if self._service[seq].num_running else seq

    def _reclaim(self, limit: FloodLimit | None) -> None:
        """Make room for the first in line, as far as it may take it from others."""
        seq = self._first_waiting(limit)
        while seq is not None and not self._has_room(seq):
            victim = self._yielding_to(seq, limit)
            if victim is None:
                return
            self._preempt(victim)

    def _has_room(self, seq: Sequence) -> bool:
        return len(self._running) < self.max_num_seqs and self.block_manager.fits(seq)

    def _yielding_to(self, seq: Sequence, limit: FloodLimit | None) -> Sequence | None:
        service = self._service
        mine = service[seq]
        best: Sequence | None = None
        best_key = (0, 0, 0)
        for other in self._running:
            tenant = service[other]
            if tenant.num_running <= mine.num_running + 1 or other.priority < seq.priority:
                continue
            if (
                other.priority == seq.priority
                and tenant.service <= mine.service
                and (limit is None or limit.holds(seq) or not limit.holds(other))
            ):
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

    def _line_up(self, seq: Sequence) -> None:
        """Let a sequence wait for whatever it needs first."""
        adapter = seq.adapter
        if adapter is None or adapter.is_ready:
            if adapter is not None:
                seq.bind(adapter.digest)
            self._wait(seq)
        elif adapter.host is not None and not adapter.is_arriving:
            seq.status = Status.PLACING
            self._placing.push(seq)
        else:
            seq.status = Status.LOADING
            if self._adapters is not None and adapter.host is None:
                self._adapters.fetch(adapter)

    def _wait(self, seq: Sequence) -> None:
        seq.status = Status.WAITING
        self._waiting.push(seq)
        self._service[seq].num_ready += 1
        if seq.adapter is not None:
            seq.adapter.num_using += 1

    def _leave(self, seq: Sequence) -> None:
        """Take a sequence out of the line that it is in, or out of the batch."""
        if seq.status is Status.PLACING:
            self._placing.remove(seq)
        elif seq.status is not Status.LOADING:
            if seq.status is Status.WAITING:
                self._waiting.remove(seq)
            else:
                self._stop_running(seq)
            self._service[seq].num_ready -= 1
            if seq.adapter is not None:
                seq.adapter.num_using -= 1

    def _waiting_for(self, adapter: StoredAdapter, *statuses: Status) -> list[Sequence]:
        sequences = self._sequences_of.get(adapter, {}).values()
        return [seq for seq in sequences if seq.status in statuses]

    def _place_adapters(self, store: AdapterStore) -> None:
        for pinned in store.unplaced_pins():
            if self._make_place(store, pinned, None):
                self._await_arrival(pinned)
        while (seq := self._placing.first()) is not None:
            assert seq.adapter is not None
            # Nobody overtakes the first in order: it would starve while smaller ones pass.
            if not self._make_place(store, seq.adapter, seq):
                break
            self._await_arrival(seq.adapter)
        adapter = store.waits_for_room()
        if adapter is not None:
            asking = self._waiting_for(adapter, Status.LOADING)
            first = min(asking, key=lambda seq: (seq.priority, seq.arrival), default=None)
            victims = self._yielding_adapters(store.in_host(), first, store.would_fit_in_host)
            for victim in victims:
                self._displace(victim)
                store.evict_wholly(victim)
                for seq in self._waiting_for(victim, Status.PLACING):
                    self._placing.remove(seq)
                    self._line_up(seq)

    def _make_place(
        self, store: AdapterStore, adapter: StoredAdapter, seq: Sequence | None
    ) -> bool:
        if store.place(adapter):
            return True
        victims = self._yielding_adapters(
            store.on_device(), seq, lambda gone: store.would_fit(adapter, gone)
        )
        for victim in victims:
            self._displace(victim)
            store.evict(victim)
        return bool(victims) and store.place(adapter)

    def _await_arrival(self, adapter: StoredAdapter) -> None:
        for seq in self._waiting_for(adapter, Status.PLACING):
            self._placing.remove(seq)
            seq.status = Status.LOADING

    def _yielding_adapters(
        self,
        candidates: list[StoredAdapter],
        seq: Sequence | None,
        suffices: Callable[[list[StoredAdapter]], bool],
    ) -> list[StoredAdapter]:
        """The most served of the adapters that may give way to a sequence (None: to whoever asks
        beside all requests), as many as it takes; none where that is not enough.
        """
        ranked: list[tuple[tuple[int, int], int, StoredAdapter]] = []
        for number, adapter in enumerate(candidates):
            users = list(self._sequences_of.get(adapter, {}).values())
            if not users or not all(self._may_take(seq, user) for user in users):
                continue
            rank = max((user.priority, self._service[user].service) for user in users)
            ranked.append((rank, number, adapter))
        ranked.sort(reverse=True)
        yielding: list[StoredAdapter] = []
        for _, _, adapter in ranked:
            yielding.append(adapter)
            if suffices(yielding):
                return yielding
        return []

    def _may_take(self, seq: Sequence | None, user: Sequence) -> bool:
        if seq is None or user.priority != seq.priority:
            return seq is None or user.priority > seq.priority
        lead = self._service[user].service - self._service[seq].service
        return lead > ADAPTER_QUANTUM

    def _displace(self, adapter: StoredAdapter) -> None:
        """Make an adapter's sequences ask for a place again."""
        for seq in self._waiting_for(adapter, Status.RUNNING):
            self._preempt(seq)
        for seq in self._waiting_for(adapter, Status.WAITING):
            self._leave(seq)
            seq.status = Status.PLACING
            self._placing.push(seq)

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
        if seq.adapter is not None:
            others = self._sequences_of[seq.adapter]
            del others[seq.request_id]
            if not others:
                del self._sequences_of[seq.adapter]
