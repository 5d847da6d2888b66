"""The bounded queue, requests for one key, and when to come back."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malora_server.api.admission import Admission, Departures, KeyLimit
from malora_server.api.errors import ApiError
from malora_server.engine.messages import EngineStats
from malora_server.settings import Settings


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def admission(clock, **settings):
    engine = SimpleNamespace(stats=EngineStats())
    return Admission(engine, Settings(base="x", **settings), clock)


def refusal(call):
    with pytest.raises(ApiError) as caught:
        call()
    assert caught.value.status == 429
    return caught.value, int(caught.value.headers["Retry-After"])


@given(
    rate=st.floats(0.5, 500),  # what leaves within the ten seconds that are remembered
    seconds=st.floats(2, 100),
    amounts=st.lists(st.integers(1, 50), min_size=1, max_size=20),
)
def test_who_comes_back_when_told_finds_room(rate, seconds, amounts):
    """With a steady drain, each is told the time at which the room for it has come free."""
    clock = Clock()
    departures = Departures(clock)
    for _ in range(max(2, int(seconds * rate))):
        departures.add(1)
        clock.now += 1 / rate
    due = 0.0
    last = 0
    for amount in amounts:
        due += amount / rate
        told = departures.retry_after(amount)
        assert isinstance(told, int)
        assert last <= told <= 60
        # Never far from the truth: the estimate is of what was, in steps of whole seconds.
        assert told >= min(due * 0.5, 60) - 1
        assert told <= max(1, due * 2 + 1)
        last = told


def test_nothing_known_and_nothing_moving():
    clock = Clock()
    departures = Departures(clock)
    assert [departures.retry_after(1) for _ in range(3)] == [1, 1, 1]
    departures.add(1)
    clock.now += 1e6  # the memory of it is gone
    assert departures.retry_after(1) == 60


def test_promises_pass():
    clock = Clock()
    departures = Departures(clock)
    for _ in range(100):
        departures.add(1)
        clock.now += 1
    first = [departures.retry_after(1) for _ in range(5)]
    assert first == sorted(set(first))
    departures.add(20)
    clock.now += 20
    assert departures.retry_after(1) <= first[1]


def test_the_queue_is_bounded_in_requests():
    clock = Clock()
    queue = admission(clock, max_num_seqs=2, max_queued_requests=3)
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(queue.admit([10]))
        error, seconds = refusal(lambda: stack.enter_context(queue.admit([10])))
        assert (error.code, seconds) == ("queue_full", 1)
        refusal(lambda: queue.check(1))
    queue.check(5)
    for _ in range(3):  # all places were given back, and again
        with queue.admit([1] * 5):
            refusal(lambda: queue.check(1))
    with pytest.raises(ApiError) as caught:
        queue.check(6)
    assert (caught.value.status, caught.value.code) == (400, "too_many_sequences")


def test_the_queue_is_bounded_in_tokens():
    clock = Clock()
    queue = admission(clock, max_queued_tokens=100)
    with queue.admit([1000]) as (long,):  # alone, a prompt may be of any length
        error, _ = refusal(lambda: queue.admit([1]).__enter__())
        assert error.code == "queue_full"
        assert "tokens" in str(error)
        long.started()
        long.started()  # more than once is once
        with queue.admit([60, 30]) as (first, _):
            refusal(lambda: queue.admit([11]).__enter__())
            with queue.admit([10]):
                pass
            first.started()
            with queue.admit([70]):
                refusal(lambda: queue.admit([1]).__enter__())
    with queue.admit([100]):
        refusal(lambda: queue.admit([1]).__enter__())


def test_waiting_for_tokens_is_estimated_from_how_they_go():
    clock = Clock()
    queue = admission(clock, max_queued_tokens=1000)
    for _ in range(100):  # 100 tokens a second
        with queue.admit([100]) as (place,):
            clock.now += 1
            place.started()
    with queue.admit([1000]):
        _, seconds = refusal(lambda: queue.admit([500]).__enter__())
    assert 4 <= seconds <= 6


def test_a_failure_gives_places_back():
    queue = admission(Clock(), max_num_seqs=1, max_queued_requests=1, max_queued_tokens=10)
    for _ in range(3):
        with pytest.raises(RuntimeError), queue.admit([5, 5]):
            raise RuntimeError
    queue.check(2)


def test_each_key_has_its_own_limit():
    clock = Clock()
    limit = KeyLimit(2, clock)
    with ExitStack() as stack:
        stack.enter_context(limit.hold(b"a"))
        stack.enter_context(limit.hold(b"a"))
        error, seconds = refusal(lambda: limit.hold(b"a").__enter__())
        assert (error.code, seconds) == ("too_many_requests_per_key", 1)
        with limit.hold(b"b"):
            pass
    with limit.hold(b"a"), limit.hold(b"a"):
        refusal(lambda: limit.hold(b"a").__enter__())
