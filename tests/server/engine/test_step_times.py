import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from malora_server.engine.step_times import StepTimes


def fed(sizes, seconds):
    times = StepTimes()
    for size, value in zip(sizes, seconds, strict=True):
        times.add(int(size), float(value))
    return times.fixed_tokens


@given(
    st.floats(1e-4, 1.0), st.floats(1e-6, 1e-2), st.integers(0, 2**32 - 1), st.floats(0.001, 1000)
)
def test_a_line_is_found_whatever_the_clock_counts_in(fixed, each, seed, unit):
    sizes = np.random.default_rng(seed).integers(1, 2048, 200)
    assert fed(sizes, (fixed + each * sizes) * unit) == pytest.approx(fixed / each, rel=1e-3)


def test_steps_that_took_long_change_nothing():
    rng = np.random.default_rng(0)
    sizes = 2 ** rng.integers(0, 9, 1000)
    seconds = (0.006 + 0.001 * sizes) * rng.lognormal(0, 0.05, 1000)
    slow = seconds.copy()
    slow[:3] *= 500  # kernels are compiled
    slow[rng.random(1000) < 0.2] *= 20
    assert fed(sizes, seconds) == pytest.approx(6, rel=0.15)
    assert fed(sizes, slow) == pytest.approx(6, rel=0.3)


def test_many_steps_of_one_size_leave_the_line_as_it_is():
    rng = np.random.default_rng(1)
    sizes = [1, 2, 4, 8] * 5 + [256] * 5000
    seconds = [(0.006 + 0.001 * size) * rng.lognormal(0, 0.05) for size in sizes]
    assert fed(sizes, seconds) == pytest.approx(6, rel=0.2)


def test_a_machine_that_gets_slower_is_followed():
    sizes = [1, 16, 256] * 40
    seconds = [(0.006 + 0.001 * size) for size in sizes[:60]]
    seconds += [(0.050 + 0.001 * size) for size in sizes[60:]]
    assert fed(sizes, seconds) == pytest.approx(50, rel=0.01)


def test_before_anything_is_known_a_guess_has_to_do():
    guess = StepTimes().fixed_tokens
    assert 1 < guess < 1000
    assert fed([8] * 100, [0.01] * 100) == guess
    assert fed([8] * 100 + [1] * 2, [0.01] * 102) == guess


def test_where_more_tokens_take_no_longer_any_number_may_come():
    assert fed([1, 64] * 10, [0.01, 0.0099] * 10) > 1e5
    assert fed([64, 128] * 10, [0.01, 0.03] * 10) == 0
