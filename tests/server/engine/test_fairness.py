import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from malora_server.engine.fairness import (
    FLOOD,
    GUARDED_SHARE,
    GUARDED_STEPS,
    ServiceCounter,
    WaitingQueue,
)
from malora_server.engine.kv_cache import BlockManager
from malora_server.engine.messages import AdapterVersion, SamplingParams, Submit
from malora_server.engine.scheduler import Scheduler
from malora_server.engine.sequence import Sequence, Status
from malora_server.engine.step_times import StepTimes


def update(scheduler, chunks, token_ids):
    """A step that is over before the next one is scheduled."""
    scheduler.advance(chunks)
    return scheduler.settle(chunks, token_ids)


class Engine:
    """A scheduler, a count of its steps and the sequences that ended, with the step they did."""

    def __init__(
        self, num_blocks=4096, max_num_seqs=8, max_num_batched_tokens=512, flood_tokens=None
    ):
        self.manager = BlockManager(num_blocks, 4, enable_prefix_caching=True)
        self.scheduler = Scheduler(
            self.manager, max_num_seqs, max_num_batched_tokens, flood_tokens=flood_tokens
        )
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


@settings(max_examples=150)
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


@settings(max_examples=40)
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


def counts(ran):
    total = Counter()
    for tenant, num_tokens in ran:
        total[tenant] += num_tokens
    return dict(total)


def test_a_flood_has_few_tokens_of_the_others_steps_and_for_a_while_of_its_own():
    engine = Engine(max_num_seqs=64, flood_tokens=lambda: 3)
    flood = [engine.add("flood", prompt=8, max_tokens=500) for _ in range(40)]
    assert counts(engine.step()) == {"flood": 320}
    assert counts(engine.step()) == {"flood": 40}
    light = engine.add("light", prompt=20, max_tokens=3)
    assert counts(engine.step()) == {"flood": 3, "light": 20}
    assert counts(engine.step()) == {"flood": 3, "light": 1}
    engine.step()
    assert light.status is Status.FINISHED
    for _ in range(GUARDED_STEPS):
        assert counts(engine.step()) == {"flood": 3 * GUARDED_SHARE}
    assert counts(engine.step()) == {"flood": 40}
    # The first ones were served throughout, and nobody lost a place.
    assert [seq.num_output_tokens for seq in flood[:3]] == [2 + 3 + GUARDED_STEPS + 1] * 3
    assert engine.scheduler.num_preemptions == 0


def test_prompts_of_a_flood_come_in_parts_too():
    engine = Engine(max_num_seqs=8, flood_tokens=lambda: 3)
    engine.add("light", max_tokens=50)
    flood = [engine.add("flood", prompt=8, max_tokens=2) for _ in range(FLOOD + 1)]
    assert counts(engine.step()) == {"light": 4, "flood": 3}
    # One at a time: what would not be computed waits where it holds nothing.
    assert [seq.status for seq in flood[:2]] == [Status.RUNNING, Status.WAITING]
    steps = 1
    while flood[0].status is not Status.FINISHED:
        assert counts(engine.step()) == {"light": 1, "flood": 3}
        steps += 1
    assert steps == 4


def test_a_step_without_floods_has_no_limit():
    engine = Engine(max_num_seqs=64, flood_tokens=lambda: 0)
    for tenant, number in [("a", 2), ("b", 2 * FLOOD), (None, 3)]:
        for _ in range(number):
            engine.add(tenant)
    assert counts(engine.step()) == {"a": 8, "b": 8 * FLOOD, None: 12}
    popular = Engine(max_num_seqs=64, flood_tokens=lambda: 0)
    for tenant, number in [("a", 32), ("b", 1)]:  # half the places, of two tenants
        for _ in range(number):
            popular.add(tenant)
    assert counts(popular.step()) == {"a": 128, "b": 4}
    alone = Engine(max_num_seqs=64, flood_tokens=lambda: 0)
    for _ in range(30):
        alone.add("a")
    assert counts(alone.step()) == {"a": 120}


def test_each_of_several_floods_has_as_much_as_who_sends_least():
    engine = Engine(max_num_seqs=48, flood_tokens=lambda: 0)
    for tenant, number in [("a", 20), ("b", 20), ("light", 2)]:
        for _ in range(number):
            engine.add(tenant, prompt=1, max_tokens=30)
    served = Counter()
    for _ in range(20):
        ran = counts(engine.step())
        assert (ran["light"], ran["a"] + ran["b"]) == (2, 4)
        served.update(ran)
    assert min(served["a"], served["b"]) >= 20


def test_a_flood_is_not_held_back_for_the_less_urgent():
    engine = Engine(max_num_seqs=16, flood_tokens=lambda: 2)
    for _ in range(10):
        engine.add("flood", prompt=1, max_tokens=20, priority=1)
    engine.add("patient", prompt=1, max_tokens=3, priority=2)
    assert counts(engine.step()) == {"flood": 10, "patient": 1}
    engine.add("equal", prompt=1, max_tokens=1, priority=1)
    assert counts(engine.step()) == {"flood": 2, "patient": 1, "equal": 1}
    # Nor while those are away for whose sake it was.
    engine.add("flood", prompt=1, max_tokens=20, priority=0)
    assert counts(engine.step())["flood"] >= 3


def test_a_flood_leaves_another_one_its_share_though_that_has_a_prompt():
    engine = Engine(max_num_seqs=24, flood_tokens=lambda: 4)
    engine.add("light", prompt=1, max_tokens=100)
    for _ in range(10):
        engine.add("a", prompt=1, max_tokens=100)
    for _ in range(10):
        engine.step()
    for _ in range(10):
        engine.add("b", prompt=50, max_tokens=2)
    assert counts(engine.step()) == {"light": 1, "a": 3, "b": 1}


@pytest.mark.parametrize("limit", [1, 50])
def test_others_pass_a_flood_in_the_line_and_take_its_places_however_much_they_were_served(limit):
    engine = Engine(max_num_seqs=8, flood_tokens=lambda: limit)
    engine.add("poor", prompt=1, max_tokens=100)
    light = engine.add("light", prompt=100, max_tokens=100)
    engine.step()
    for _ in range(20):
        engine.add("flood", prompt=1, max_tokens=100)
    for _ in range(2):
        engine.step()
    flood = engine.scheduler._service._active["flood"]
    assert flood.num_running == min(limit, 6)
    later = engine.add("light", max_tokens=2)
    for _ in range(2):
        engine.step()
    assert engine.service(light) > flood.service
    assert later.status is Status.FINISHED
    assert engine.scheduler.num_preemptions == (limit == 50)


def simulate(flood, new_tokens, limited=True, each=0.001, max_num_seqs=256):
    """Latencies of nine tenants' requests, one a second each; `flood`: a tenth's backlog.

    Steps take 6 ms and `each` s a token, give or take 5 %. Requests come at fixed times.
    """
    times = StepTimes()
    engine = Engine(
        num_blocks=20_000,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=1024,
        flood_tokens=(lambda: int(0.25 * times.fixed_tokens)) if limited else None,
    )
    rng = np.random.default_rng(0)
    todo = sorted((i / 9 + second, i) for i in range(9) for second in range(15))
    started, latencies, backlog, now, flood_tokens = {}, [], [], 0.0, 0
    while todo or started:
        while todo and todo[0][0] <= now:
            at, i = todo.pop(0)
            started[engine.add(f"light-{i}", 32, new_tokens)] = at
        if flood:
            backlog = [s for s in backlog if s.status is not Status.FINISHED]
            while len(backlog) < max_num_seqs + 64:
                backlog.append(engine.add("flood", 32, 128))
        if not engine.scheduler.has_work:
            now = todo[0][0]
            continue
        ran = counts(engine.step())
        num_tokens = sum(ran.values())
        flood_tokens += ran.get("flood", 0)
        seconds = (0.006 + each * num_tokens) * rng.lognormal(0, 0.05)
        times.add(num_tokens, seconds)
        now += seconds
        for seq in [s for s in started if s.status is Status.FINISHED]:
            latencies.append(now - started.pop(seq))
    return np.percentile(latencies, [50, 95]), flood_tokens


@pytest.mark.parametrize("new_tokens", [8, 32])
@pytest.mark.parametrize("each", [0.001, 0.00003], ids=["CPU", "GPU"])
def test_a_flood_leaves_the_others_latency_within_one_and_a_half(new_tokens, each):
    alone, _ = simulate(False, new_tokens, each=each)
    flooded, flood_tokens = simulate(True, new_tokens, each=each)
    assert (flooded / alone < 1.5).all(), flooded / alone
    assert flood_tokens > 15 * 32, "the flood has its share"
    unlimited, _ = simulate(True, new_tokens, limited=False, each=each)
    assert (unlimited / alone > 1.5).all(), "nothing was to be limited"
