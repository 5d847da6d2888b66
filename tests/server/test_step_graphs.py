"""Which graph a step takes."""

from hypothesis import given
from hypothesis import strategies as st

from malora_server.model.graphs import fitting_rows, mixed_rows

SMALL, LARGE = 61e6, 218e6
"""Weights of a layer of Llama 3.2 1B and of Llama 3.1 8B."""


@given(st.integers(1, 20_000), st.sampled_from([SMALL, LARGE]))
def test_every_step_of_few_tokens_has_a_graph(max_tokens, layer_weights):
    rows = mixed_rows(max_tokens, layer_weights)
    assert rows == sorted(set(rows))
    for num_tokens in range(1, min(max_tokens, 2048) + 1):
        fits = fitting_rows(rows, num_tokens)
        assert fits is not None
        assert num_tokens <= fits < num_tokens + 256


@given(st.integers(1, 20_000))
def test_a_small_models_full_step_has_a_graph(max_tokens):
    fits = fitting_rows(mixed_rows(max_tokens, SMALL), max_tokens)
    assert fits is not None
    assert max_tokens <= fits < max_tokens + 256


def test_a_full_step_that_keeps_the_device_busy_has_none():
    assert fitting_rows(mixed_rows(8192, LARGE), 8192) is None


@given(st.integers(2049, 20_000), st.data())
def test_a_step_takes_no_graph_much_larger_than_itself(max_tokens, data):
    num_tokens = data.draw(st.integers(2049, max_tokens))
    fits = fitting_rows(mixed_rows(max_tokens, SMALL), num_tokens)
    assert fits is None or num_tokens <= fits <= num_tokens / 0.9


def test_a_larger_step_than_any_graph_has_none():
    assert fitting_rows(mixed_rows(512, SMALL), 513) is None
