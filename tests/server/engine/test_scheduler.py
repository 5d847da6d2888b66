import itertools
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from malora_server.engine.fairness import FLOOD
from malora_server.engine.kv_cache import BlockManager
from malora_server.engine.messages import AdapterVersion, SamplingParams, Submit
from malora_server.engine.scheduler import Chunk, Scheduler
from malora_server.engine.sequence import Sequence, Status

EOS = 2


def update(scheduler, chunks, token_ids):
    """A step that is over before the next one is scheduled."""
    scheduler.advance(chunks)
    return scheduler.settle(chunks, token_ids)


def make(
    request_id,
    prompt,
    arrival,
    digest=None,
    adapter=None,
    priority=0,
    max_model_len=1000,
    **sampling,
):
    params = SamplingParams(**{"max_tokens": 4, "seed": 1, **sampling})
    submit = Submit(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling=params,
        adapter=None if adapter is None else AdapterVersion(adapter),
        priority=priority,
    )
    sequence = Sequence(submit, arrival, [EOS], max_model_len)
    sequence.bind(digest or "")
    return sequence


class Engine:
    """A scheduler over a small pool, with sequences made in order of arrival."""

    def __init__(self, num_blocks=16, block_size=4, max_num_seqs=8, max_num_batched_tokens=16):
        self.manager = BlockManager(num_blocks, block_size, enable_prefix_caching=True)
        self.scheduler = Scheduler(self.manager, max_num_seqs, max_num_batched_tokens)
        self.arrivals = itertools.count()

    def add(self, request_id, prompt, **kwargs):
        seq = make(request_id, prompt, next(self.arrivals), **kwargs)
        self.scheduler.add(seq)
        return seq

    def step(self, token=9):
        """Schedules, appends `token` wherever one is sampled; what ran as (id, start, tokens)."""
        chunks = self.scheduler.schedule()
        ran = [(chunk.seq.request_id, chunk.start, chunk.num_tokens) for chunk in chunks]
        update(self.scheduler, chunks, [token for chunk in chunks if chunk.samples])
        return ran


def test_prompts_are_computed_in_chunks_beside_decodes():
    engine = Engine(max_num_batched_tokens=6)
    engine.add("a", range(4))
    engine.add("b", range(10, 20))
    assert engine.step() == [("a", 0, 4), ("b", 0, 2)]
    assert engine.step() == [("a", 4, 1), ("b", 2, 5)]
    assert engine.step() == [("a", 5, 1), ("b", 7, 3)]
    assert engine.step() == [("a", 6, 1), ("b", 10, 1)]
    assert engine.step() == [("b", 11, 1)]


def test_decodes_come_first_even_behind_an_earlier_prompt():
    engine = Engine(max_num_batched_tokens=4)
    engine.add("late", range(3), priority=1, max_tokens=10)
    engine.step()
    engine.add("soon", range(10, 20), priority=0)
    assert engine.step() == [("late", 3, 1), ("soon", 0, 3)]
    assert engine.step() == [("late", 4, 1), ("soon", 3, 3)]


def test_only_the_chunk_that_reaches_the_end_samples():
    seq = make("a", range(10), 0)
    assert not Chunk(seq, 0, 9).samples
    assert Chunk(seq, 4, 6).samples


def test_waiting_requests_go_by_priority_then_arrival():
    engine = Engine(max_num_seqs=1, max_num_batched_tokens=64)
    for request_id, priority in [("c", 1), ("a", 0), ("d", 1), ("b", 0), ("first", -5)]:
        engine.add(request_id, range(3), priority=priority, max_tokens=1)
    assert [engine.step()[0][0] for _ in range(5)] == ["first", "a", "b", "c", "d"]


def test_nobody_overtakes_the_first_in_line():
    engine = Engine(num_blocks=4, max_num_batched_tokens=64)
    engine.add("running", range(5), max_tokens=8)
    engine.step()
    engine.add("large", range(10, 20))
    engine.add("small", range(20, 22))
    assert engine.step() == [("running", 5, 1)]
    assert engine.scheduler.num_waiting == 2


def test_the_last_in_order_is_preempted_and_goes_on_where_it_was():
    engine = Engine(num_blocks=4, max_num_batched_tokens=64)
    first = engine.add("first", range(7), max_tokens=6)
    last = engine.add("last", range(10, 17), max_tokens=6)
    engine.step(token=50)
    engine.step(token=51)
    # Both hold two full blocks, and there is no other.
    assert engine.step(token=52) == [("first", 8, 1)]
    assert (first.status, last.status) == (Status.RUNNING, Status.WAITING)
    assert (last.block_table, last.num_computed_tokens) == ([], 0)
    assert (last.num_preemptions, engine.scheduler.num_preemptions) == (1, 1)
    assert last.token_ids == [*range(10, 17), 50, 51]
    for _ in range(3):
        engine.step(token=53)
    assert first.status is Status.FINISHED
    # Its first block was left alone, so that the rest is all there is to compute.
    assert engine.step(token=54) == [("last", 4, 5)]
    assert last.num_cached_tokens == 0
    for _ in range(3):
        engine.step(token=55)
    assert last.token_ids == [*range(10, 17), 50, 51, 54, 55, 55, 55]
    assert engine.manager.num_free_blocks == 4


def test_a_more_urgent_request_is_not_preempted_for_an_earlier_one():
    engine = Engine(num_blocks=4, max_num_batched_tokens=64)
    engine.add("early", range(7), max_tokens=6, priority=1)
    engine.add("urgent", range(10, 17), max_tokens=6, priority=0)
    engine.step()
    engine.step()
    assert engine.step() == [("urgent", 8, 1)]


def test_a_shared_prefix_is_computed_once():
    engine = Engine(max_num_batched_tokens=64)
    engine.add("a", range(10), digest="x")
    engine.step()
    engine.add("same", range(10), digest="x")
    engine.add("other", range(10), digest="y")
    assert engine.step() == [("a", 10, 1), ("same", 8, 2), ("other", 0, 10)]


def test_what_an_aborted_prompt_did_not_compute_is_not_found():
    engine = Engine(max_num_batched_tokens=8)
    engine.add("cut short", range(16))
    engine.step()
    engine.scheduler.abort("cut short")
    engine.add("same", range(16))
    assert engine.step() == [("same", 8, 8)]


def test_refuses_what_could_outgrow_the_cache():
    engine = Engine(num_blocks=4)
    engine.add("fits", range(12), max_tokens=5)
    with pytest.raises(ValueError, match="may grow to 18 tokens, which takes 5 cache blocks of"):
        engine.add("never", range(13), max_tokens=5)
    engine.add("short", range(13), max_tokens=50, max_model_len=17)
    assert engine.scheduler.num_waiting == 2


def test_refuses_an_id_in_use():
    engine = Engine()
    engine.add("a", range(3))
    with pytest.raises(ValueError, match="'a' is in use"):
        engine.add("a", range(3))
    engine.scheduler.abort("a")
    engine.add("a", range(3))


def test_abort_frees_at_once_wherever_the_sequence_is():
    engine = Engine(max_num_seqs=1)
    running = engine.add("running", range(6))
    waiting = engine.add("waiting", range(10, 16))
    chunks = engine.scheduler.schedule()
    engine.scheduler.advance(chunks)
    assert engine.scheduler.abort("waiting") is waiting
    # In flight: the step's token for it arrives later, and is dropped.
    assert engine.scheduler.abort("running", "error") is running
    assert engine.manager.num_free_blocks == 16
    assert engine.scheduler.settle(chunks, [9]) == []
    assert (running.finish_reason, waiting.finish_reason) == ("error", "abort")
    assert len(running.token_ids) == 6
    assert engine.scheduler.abort("running") is None
    assert not engine.scheduler.has_work


def test_tokens_that_do_not_match_the_chunks_are_refused():
    engine = Engine()
    engine.add("a", range(3))
    chunks = engine.scheduler.schedule()
    with pytest.raises(ValueError, match="samples 1 tokens but brought 2"):
        update(engine.scheduler, chunks, [9, 9])


def order(seq):
    return seq.priority, seq.arrival


def same_tenant(a, b):
    return a.tenant == b.tenant


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests against tiny pools.

    `cache` stands for the tensors: what was written to (block, slot) is the salt and all tokens
    up to that one, which is what keys and values depend on. Reading a sequence's table back must
    give its own tokens, or blocks were shared or reused wrongly.
    """

    @initialize(
        num_blocks=st.integers(2, 12),
        block_size=st.integers(1, 4),
        max_num_seqs=st.sampled_from([1, 2, 3, 4, 24]),
        max_num_batched_tokens=st.integers(1, 12),
        caching=st.booleans(),
        pipelined=st.booleans(),
        limits=st.lists(st.integers(0, 6), max_size=3),
    )
    def start(
        self,
        num_blocks,
        block_size,
        max_num_seqs,
        max_num_batched_tokens,
        caching,
        pipelined,
        limits,
    ):
        self.pipelined = pipelined
        self.in_flight = []
        self.manager = BlockManager(num_blocks, block_size, caching)
        self.limits = itertools.cycle(limits)
        self.limit = 0
        self.scheduler = Scheduler(
            self.manager,
            max_num_seqs,
            max_num_batched_tokens,
            flood_tokens=(lambda: self.limit) if limits else None,
        )
        self.arrivals = itertools.count()
        self.live = {}
        self.expected = {}
        self.cache = {}

    # Two tokens and two salts, so that prefixes meet often.
    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        digest=st.sampled_from([None, "a"]),
        adapter=st.sampled_from([None, None, "a", "b"]),
        priority=st.integers(-1, 1),
        max_tokens=st.integers(1, 8),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        number=st.sampled_from([1, 1, 1, 2 * FLOOD]),
    )
    def add(self, prompt, digest, adapter, priority, max_tokens, prompt_logprobs, number):
        for _ in range(number):
            self.add_one(prompt, digest, adapter, priority, max_tokens, prompt_logprobs)

    def add_one(self, prompt, digest, adapter, priority, max_tokens, prompt_logprobs):
        arrival = next(self.arrivals)
        seq = make(
            f"r{arrival}",
            prompt,
            arrival,
            digest=digest,
            adapter=adapter,
            priority=priority,
            max_tokens=max_tokens,
            prompt_logprobs=prompt_logprobs,
        )
        pool = self.manager.num_blocks * self.manager.block_size
        if len(prompt) + max_tokens - 1 > pool:
            with pytest.raises(ValueError, match="cache blocks"):
                self.scheduler.add(seq)
        else:
            self.scheduler.add(seq)
            self.live[seq.request_id] = seq
            self.expected[seq.request_id] = list(prompt)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        self.abort_one(request_id)

    @rule()
    def reset(self):
        self.manager.reset()

    @rule(data=st.data())
    def step(self, data):
        tokens = st.sampled_from([0, 1, 0, 1, 0, 1, EOS])
        aborts = data.draw(st.integers(0, 9)) == 0
        self.run(lambda: data.draw(tokens), lambda ids: aborts and data.draw(st.sampled_from(ids)))

    def run(self, draw, draw_aborted):
        """One step; where steps are pipelined, its tokens come after the next is scheduled."""
        chunks = self.schedule()
        self.compute(chunks)
        self.scheduler.advance(chunks)
        sampled = [draw() for chunk in chunks if chunk.samples]
        for chunk, token in zip([c for c in chunks if c.samples], sampled, strict=True):
            self.expected[chunk.seq.request_id].append(token)
        if chunks:
            self.in_flight.append((chunks, sampled))
            aborted = draw_aborted([chunk.seq.request_id for chunk in chunks])
            if aborted:
                self.abort_one(aborted)
        if len(self.in_flight) > (1 if self.pipelined and chunks else 0):
            self.settle(*self.in_flight.pop(0))

    def abort_one(self, request_id):
        seq = self.live.pop(request_id)
        assert self.scheduler.abort(request_id) is seq
        assert (seq.status, seq.finish_reason) == (Status.FINISHED, "abort")
        assert seq.block_table == []

    def schedule(self):
        before = {r: seq.status for r, seq in self.live.items()}
        if self.scheduler._flood_tokens is not None:
            self.limit = next(self.limits)
        chunks = self.scheduler.schedule()
        if self.scheduler._flood_tokens is not None:
            self.check_floods(chunks)
        assert bool(chunks or self.in_flight) == bool(self.live or self.in_flight), "no progress"
        assert sum(chunk.num_tokens for chunk in chunks) <= self.scheduler.max_num_batched_tokens
        assert all(chunk.num_tokens > 0 for chunk in chunks)
        assert len({chunk.seq.request_id for chunk in chunks}) == len(chunks)

        def those(old, new):
            return [s for r, s in self.live.items() if (before[r], s.status) == (old, new)]

        running = [s for s in self.live.values() if s.status is Status.RUNNING]
        waiting = [s for s in self.live.values() if s.status is Status.WAITING]
        for victim in those(Status.RUNNING, Status.WAITING):
            # Of its own tenant it was the last in (priority, arrival).
            assert all(order(seq) < order(victim) for seq in running if same_tenant(seq, victim))
        for admitted in those(Status.WAITING, Status.RUNNING):
            assert all(
                order(seq) > order(admitted) for seq in waiting if same_tenant(seq, admitted)
            )
            assert all(seq.priority >= admitted.priority for seq in waiting)
        decodes = [
            before[chunk.seq.request_id] is Status.RUNNING
            and len(chunk.seq.token_ids) - chunk.start == 1
            for chunk in chunks
        ]
        assert decodes == sorted(decodes, reverse=True)
        return chunks

    def check_floods(self, chunks):
        """Those that flood have no more of the step than the limit or an equal share."""
        ready = Counter(seq.tenant for seq in self.live.values())
        fewest = min(ready.values(), default=0)
        share = self.scheduler.max_num_seqs / max(2, len(ready))
        floods = {t for t, number in ready.items() if number > max(FLOOD * fewest, share)}
        others = [seq.priority for seq in self.live.values() if seq.tenant not in floods]
        if floods:
            held = [c for c in chunks if c.seq.tenant in floods and c.seq.priority >= min(others)]
            most = max(self.limit, fewest * len(floods))
            assert sum(chunk.num_tokens for chunk in held) <= most

    def settle(self, chunks, sampled):
        for seq in self.scheduler.settle(chunks, sampled):
            assert self.live.pop(seq.request_id) is seq
            assert seq.token_ids == self.expected[seq.request_id][: len(seq.token_ids)]
            assert seq.finish_reason == ("stop" if seq.token_ids[-1] == EOS else "length")
            if seq.finish_reason == "length":
                assert seq.num_output_tokens == seq.sampling.max_tokens

    def compute(self, chunks):
        """Writes the chunks' tokens to `cache` and reads all that their attention would read."""
        size = self.manager.block_size
        holders = Counter(b for seq in self.live.values() for b in seq.block_table)
        for seq, start, end in ((c.seq, c.start, c.start + c.num_tokens) for c in chunks):
            assert start == seq.num_computed_tokens
            for position in range(start, end):
                block = seq.block_table[position // size]
                assert holders[block] == 1, "wrote to a shared block"
                content = (seq.cache_salt, self.tokens(seq, position + 1))
                self.cache[block, position % size] = content
        for chunk in chunks:
            seq = chunk.seq
            for position in range(chunk.start + chunk.num_tokens):
                block = seq.block_table[position // size]
                expected = (seq.cache_salt, self.tokens(seq, position + 1))
                assert self.cache[block, position % size] == expected

    def tokens(self, seq, count):
        """The first tokens as the device knows them, also where the sequence does not yet."""
        return tuple(self.expected[seq.request_id][:count])

    @invariant()
    def nothing_is_lost_and_nothing_twice(self):
        if not hasattr(self, "live"):
            return
        statuses = Counter(seq.status for seq in self.live.values())
        assert self.scheduler.num_running == statuses[Status.RUNNING]
        assert self.scheduler.num_waiting == statuses[Status.WAITING]
        assert self.scheduler.num_running <= self.scheduler.max_num_seqs
        assert self.scheduler.has_work == bool(self.live)
        served = self.scheduler._service
        assert served._active.keys() == {seq.tenant for seq in self.live.values()}
        for name, tenant in served._active.items():
            own = [seq.status for seq in self.live.values() if seq.tenant == name]
            assert tenant.num_sequences == len(own)
            assert tenant.num_running == own.count(Status.RUNNING)
            assert tenant.num_ready == len(own)
        for request_id, seq in self.live.items():
            known = len(seq.token_ids) - seq.num_pending
            assert seq.token_ids[:known] == self.expected[request_id][:known]
            assert len(seq.token_ids) == len(self.expected[request_id])
            assert seq.num_pending <= (1 if self.pipelined else 0)
            if seq.status is Status.WAITING:
                assert (seq.block_table, seq.num_computed_tokens) == ([], 0)
            else:
                assert len(set(seq.block_table)) == len(seq.block_table)
                room = len(seq.block_table) * self.manager.block_size
                assert seq.num_computed_tokens <= min(room, len(seq.token_ids) - 1)

    @invariant()
    def every_block_is_in_one_place(self):
        if not hasattr(self, "live"):
            return
        manager = self.manager
        held = Counter(b for seq in self.live.values() for b in seq.block_table)
        assert manager._references == [held[b] for b in range(manager.num_blocks)]
        places = [*held, *manager._blank, *manager._idle]
        assert sorted(places) == list(range(manager.num_blocks))
        assert manager.num_free_blocks == manager.num_blocks - len(held)
        registered = {key: b for b, key in enumerate(manager._hashes) if key is not None}
        assert manager._registered == registered
        assert set(manager._idle) <= set(registered.values())

    def teardown(self):
        if not hasattr(self, "live"):
            return
        for _ in range(5000):
            if not (self.scheduler.has_work or self.in_flight):
                break
            self.run(lambda: 0, lambda ids: None)
            self.nothing_is_lost_and_nothing_twice()
            self.every_block_is_in_one_place()
        assert not self.live, "requests that never finish"
        assert self.manager.num_free_blocks == self.manager.num_blocks


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestScheduler = SchedulerMachine.TestCase
