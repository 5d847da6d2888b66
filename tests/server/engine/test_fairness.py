import itertools
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from malora_server.engine.fairness import ServiceCounter, WaitingQueue
from malora_server.engine.kv_cache import BlockManager
from malora_server.engine.messages import AdapterVersion, SamplingParams, Submit
from malora_server.engine.scheduler import Scheduler
from malora_server.engine.sequence import Sequence, Status


def update(scheduler, chunks, token_ids):
    """A step that is over before the next one is scheduled."""
    scheduler.advance(chunks)
    return scheduler.settle(chunks, token_ids)


class Engine:
    """A scheduler, a count of its steps and the sequences that ended, with the step they did."""

    def __init__(self, num_blocks=4096, max_num_seqs=8, max_num_batched_tokens=512):
        self.manager = BlockManager(num_blocks, 4, enable_prefix_caching=True)
        self.scheduler = Scheduler(self.manager, max_num_seqs, max_num_batched_tokens)
        self.arrivals = itertools.count()

    def add(self, tenant, prompt=4, max_tokens=4, priority=0):
        """`prompt`: its tokens, or how many, then unlike any other's."""
        arrival = next(self.arrivals)
        tokens = [1000 * arrival + i for i in range(prompt)] if isinstance(prompt, int) else prompt
        submit = Submit(
            request_id=str(arrival),
            prompt_token_ids=tokens,
            sampling=SamplingParams(max_tokens=max_tokens, seed=0),
            adapter=None if tenant is None else AdapterVersion(tenant),
            priority=priority,
        )
        seq = Sequence(submit, arrival, [], max_model_len=10_000)
        self.scheduler.add(seq)
        return seq

    def step(self):
        """Runs a step; the tenants that ran, and how many tokens."""
        chunks = self.scheduler.schedule()
        ran = [(chunk.seq.tenant, chunk.num_tokens) for chunk in chunks]
        update(self.scheduler, chunks, [7 for chunk in chunks if chunk.samples])
        return ran

    def service(self, seq):
        return self.scheduler._service[seq].service


def test_the_least_served_goes_first_and_arrival_decides_within_a_tenant():
    engine = Engine(max_num_seqs=1)
    flood = [engine.add("flood", max_tokens=1) for _ in range(3)]
    light = [engine.add("light", max_tokens=1), engine.add(None, max_tokens=1)]
    order = []
    while engine.scheduler.has_work:
        before = [s for s in flood + light if s.status is not Status.FINISHED]
        engine.step()
        order += [s for s in before if s.status is Status.FINISHED]
    assert order == [flood[0], *light, *flood[1:]]


def test_prompt_tokens_cost_one_outputs_two_and_cached_ones_nothing():
    engine = Engine()
    stays = engine.add("a", max_tokens=50)
    engine.add("b", range(9), max_tokens=3)
    other = engine.add("b", max_tokens=50)
    engine.step()
    assert (engine.service(stays), engine.service(other)) == (4 + 2, 9 + 2 + 4 + 2)
    engine.step()
    engine.step()
    assert (engine.service(stays), engine.service(other)) == (4 + 6, 9 + 6 + 4 + 6)
    # Its first two blocks are found.
    engine.add("b", range(9), max_tokens=3)
    engine.step()
    assert engine.service(other) == 25 + 1 + 2 * 2


def test_what_a_preempted_sequence_computes_again_is_free():
    engine = Engine(num_blocks=4)
    first = engine.add("a", 7, max_tokens=6)
    last = engine.add("b", 7, max_tokens=6)
    seen = 0
    while last.status is not Status.FINISHED:
        seen = engine.service(last)
        engine.step()
    assert (first.status, last.num_preemptions) == (Status.FINISHED, 1)
    assert seen == 7 + 5 * 2


def test_idling_earns_no_credit_and_cancels_no_debt():
    engine = Engine(max_num_seqs=1)
    busy = engine.add("busy", max_tokens=100)
    for _ in range(10):
        engine.step()
    assert engine.service(busy) == 24
    late = engine.add("late", max_tokens=1)
    assert engine.service(late) == 24
    engine.scheduler.abort(late.request_id)

    def debtor():
        return engine.add("busy", max_tokens=1)

    newcomer = engine.add("newcomer", max_tokens=200)
    for _ in range(50):
        engine.step()
    served = engine.service(busy)
    engine.scheduler.abort(busy.request_id)
    newcomer_served = engine.service(newcomer)
    assert engine.service(debtor()) == max(served, newcomer_served)


def test_nothing_is_remembered_once_nobody_is_there():
    engine = Engine()
    for i in range(20):
        engine.add(f"tenant-{i}")
    while engine.scheduler.has_work:
        engine.step()
    assert engine.scheduler._service._tenants == {}
    assert engine.service(engine.add("tenant-3")) == 0


def test_a_full_batch_gives_way_to_another_tenant_in_two_steps():
    engine = Engine(max_num_seqs=4)
    flood = [engine.add("flood", max_tokens=1000) for _ in range(10)]
    for _ in range(5):
        engine.step()
    light = engine.add("light", prompt=8)
    engine.step()
    engine.step()
    assert light.num_output_tokens > 0
    # The youngest that ran gave way, and is the first of its tenant to come back.
    assert [s.num_preemptions for s in flood] == [0, 0, 0, 1] + [0] * 6
    while light.status is not Status.FINISHED:
        engine.step()
    engine.step()
    assert flood[3].status is Status.RUNNING


def test_a_full_cache_gives_way_to_another_tenant():
    engine = Engine(num_blocks=40, max_num_seqs=64)
    for _ in range(20):
        engine.add("flood", max_tokens=100)
    for _ in range(20):
        engine.step()
    light = engine.add("light", prompt=30)
    for _ in range(3):
        engine.step()
    assert light.num_output_tokens > 0
    assert light.num_preemptions == 0


def test_equal_tenants_do_not_take_places_from_one_another():
    engine = Engine(max_num_seqs=4)
    for _ in range(8):
        for tenant in "ab":
            engine.add(tenant, max_tokens=10)
    while engine.scheduler.has_work:
        engine.step()
    assert engine.scheduler.num_preemptions == 0


def test_no_place_is_taken_for_a_less_urgent_request_or_within_a_tenant():
    engine = Engine(max_num_seqs=2)
    for _ in range(3):
        engine.add("flood", max_tokens=20)
    engine.step()
    later = engine.add("light", priority=1)
    engine.add("flood", priority=-1)
    for _ in range(10):
        engine.step()
    assert engine.scheduler.num_preemptions == 0
    assert later.status is Status.WAITING


def test_an_obsolete_place_in_the_queue_is_forgotten():
    service = ServiceCounter()
    queue = WaitingQueue(service)
    maker = Engine()
    seqs = [maker.add(tenant) for tenant in ("a", "b", "a")]
    for seq in seqs:
        service.add(seq)
    queue.push(seqs[2])
    queue.push(seqs[1])
    assert queue.first() is seqs[1]
    for _ in range(100):
        queue.push(seqs[0])
        assert queue.first() is seqs[0]
        queue.remove(seqs[0])
        assert queue.first() is seqs[1]
    assert len(queue) == 2
    assert len(queue._heap) <= 12
    service[seqs[1]].service = 5
    assert queue.first() is seqs[2]
    queue.remove(seqs[2])
    queue.remove(seqs[1])
    assert queue.first() is None


requests = st.lists(
    st.tuples(
        st.sampled_from([None, "a", "b", "c"]),
        st.integers(1, 20),
        st.integers(1, 12),
        st.integers(0, 1),
        st.integers(0, 8),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(requests, st.integers(8, 30), st.integers(1, 5), st.integers(1, 16))
def test_everything_finishes_and_no_place_is_idle_while_someone_could_run(
    todo, num_blocks, max_num_seqs, budget
):
    engine = Engine(num_blocks, max_num_seqs, budget)
    scheduler = engine.scheduler
    todo = sorted(todo, key=lambda r: r[4])
    seqs = []
    for step in range(3000):
        while todo and todo[0][4] <= step:
            tenant, prompt, max_tokens, priority, _ = todo.pop(0)
            seqs.append(engine.add(tenant, prompt, max_tokens, priority))
        preemptions = scheduler.num_preemptions
        chunks = scheduler.schedule()
        assert bool(chunks) == scheduler.has_work
        spent = sum(chunk.num_tokens for chunk in chunks)
        assert spent <= budget
        first = scheduler._waiting.first()
        if first is not None and spent < budget and scheduler.num_preemptions == preemptions:
            full = scheduler.num_running == max_num_seqs
            assert full or not engine.manager.fits(first)
        update(scheduler, chunks, [7 for chunk in chunks if chunk.samples])
        if not (todo or scheduler.has_work):
            break
    assert all(seq.status is Status.FINISHED for seq in seqs)
    assert all(seq.num_output_tokens == seq.sampling.max_tokens for seq in seqs)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=2, max_size=4),
)
def test_backlogged_tenants_are_served_alike(max_num_seqs, shapes):
    """While all are backlogged, two differ by no more than a batch of the largest requests."""
    engine = Engine(max_num_seqs=max_num_seqs, max_num_batched_tokens=64)
    bound = max_num_seqs * max(prompt + 2 * new for prompt, new in shapes)
    for _ in range(400):
        waiting = Counter()
        for line in engine.scheduler._waiting._lines.values():
            waiting[line.sequences[0].tenant] += len(line.sequences)
        for tenant, (prompt, new) in enumerate(shapes):
            while waiting[str(tenant)] <= max_num_seqs:
                engine.add(str(tenant), prompt, new)
                waiting[str(tenant)] += 1
        engine.step()
        served = [t.service for t in engine.scheduler._service._active.values()]
        assert len(served) == len(shapes)
        assert max(served) - min(served) <= bound


def simulate(flood, seconds=60.0):
    """Latencies of nine tenants' requests, one a second each; `flood`: a tenth's backlog.

    Steps take 10 ms and 5 µs a token. Requests come at fixed times, of a fixed random shape.
    """
    engine = Engine(num_blocks=20_000, max_num_seqs=256, max_num_batched_tokens=1024)
    rng = np.random.default_rng(0)
    offsets = rng.uniform(0, 1, 9)
    todo = sorted((offsets[i] + s, i) for i in range(9) for s in range(int(seconds)))
    todo = [(at, i, int(rng.integers(20, 200)), int(rng.integers(20, 100))) for at, i in todo]
    started, latencies, backlog, now = {}, [], [], 0.0
    while todo or started:
        while todo and todo[0][0] <= now:
            at, i, prompt, new = todo.pop(0)
            seq = engine.add(f"light-{i}", prompt, new)
            started[seq] = at
        if flood:
            backlog = [s for s in backlog if s.status is not Status.FINISHED]
            while len(backlog) < 400:
                backlog.append(engine.add("flood", 200, 500))
        if not engine.scheduler.has_work:
            now = todo[0][0]
            continue
        tokens = sum(n for _, n in engine.step())
        now += 0.010 + 5e-6 * tokens
        for seq in [s for s in started if s.status is Status.FINISHED]:
            latencies.append(now - started.pop(seq))
    return np.percentile(latencies, [50, 99]), engine.scheduler.num_preemptions


def test_a_flood_leaves_the_others_latency_within_one_and_a_half():
    alone, _ = simulate(flood=False, seconds=15)
    flooded, preemptions = simulate(flood=True, seconds=15)
    assert preemptions > 0
    assert (flooded / alone < 1.5).all(), flooded / alone
