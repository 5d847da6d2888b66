"""Which graph a step takes."""

from hypothesis import given
from hypothesis import strategies as st

from malora_server.model.graphs import fitting_rows, mixed_rows


@given(st.integers(1, 40_000))
def test_every_step_of_few_tokens_and_every_full_one_has_a_graph(max_tokens):
    rows = mixed_rows(max_tokens)
    assert rows == sorted(set(rows))
    for num_tokens in range(1, min(max_tokens, 2048) + 1):
        fits = fitting_rows(rows, num_tokens)
        assert fits is not None
        assert num_tokens <= fits < num_tokens + 256
    full = fitting_rows(rows, max_tokens)
    assert full is not None
    assert max_tokens <= full < max_tokens + 256


@given(st.integers(2049, 40_000), st.data())
def test_a_step_takes_no_graph_much_larger_than_itself(max_tokens, data):
    num_tokens = data.draw(st.integers(2049, max_tokens))
    fits = fitting_rows(mixed_rows(max_tokens), num_tokens)
    assert fits is None or num_tokens <= fits <= num_tokens / 0.9


def test_a_larger_step_than_any_graph_has_none():
    assert fitting_rows(mixed_rows(512), 513) is None
