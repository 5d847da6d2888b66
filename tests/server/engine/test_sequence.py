import pytest

from malora_server.engine.messages import AdapterVersion, SamplingParams, Submit
from malora_server.engine.sequence import Sequence

EOS = 2


def append(seq, token):
    """Adds a sampled token; True when it was the last."""
    seq.expect()
    return seq.settle(len(seq.token_ids) - 1, token)


def make(prompt=(5, 6, 7), max_model_len=100, **sampling):
    params = SamplingParams(**{"max_tokens": 10, "seed": 1, **sampling})
    submit = Submit(
        request_id="a",
        prompt_token_ids=list(prompt),
        sampling=params,
        adapter=AdapterVersion("x", 3, "folder"),
    )
    return Sequence(submit, arrival=0, eos_token_ids=[EOS], max_model_len=max_model_len)


def feed(seq, tokens):
    """Appends until the sequence says it is finished; returns how many tokens it took."""
    for count, token in enumerate(tokens, 1):
        if append(seq, token):
            return count
    return None


def test_stops_after_max_tokens():
    seq = make(max_tokens=3)
    assert feed(seq, [9, 9, 9, 9]) == 3
    assert (seq.finish_reason, seq.stop_reason) == ("length", None)
    assert seq.token_ids == [5, 6, 7, 9, 9, 9]
    assert seq.num_output_tokens == 3


def test_stops_when_the_context_is_full():
    seq = make(max_model_len=5)
    assert feed(seq, [9] * 9) == 2
    assert seq.finish_reason == "length"


def test_end_of_text_stops_without_a_stop_reason():
    seq = make(stop_token_ids=[EOS, 8])
    assert feed(seq, [9, EOS]) == 2
    assert (seq.finish_reason, seq.stop_reason) == ("stop", None)


def test_a_stop_token_is_the_stop_reason():
    seq = make(stop_token_ids=[8])
    assert feed(seq, [9, 8]) == 2
    assert (seq.finish_reason, seq.stop_reason) == ("stop", 8)


def test_a_stop_token_at_the_limit_is_a_stop():
    seq = make(max_tokens=2)
    assert feed(seq, [9, EOS]) == 2
    assert seq.finish_reason == "stop"


def test_ignore_eos_ignores_end_of_text_alone():
    seq = make(ignore_eos=True, stop_token_ids=[8])
    assert feed(seq, [EOS, EOS, 8]) == 3
    assert seq.stop_reason == 8
    asked_for = make(ignore_eos=True, stop_token_ids=[EOS])
    assert feed(asked_for, [EOS]) == 1
    assert asked_for.stop_reason == EOS


def test_min_tokens_come_before_any_stop():
    seq = make(min_tokens=2, stop_token_ids=[8])
    assert feed(seq, [8, EOS, 8]) == 3
    assert seq.finish_reason == "stop"


@pytest.mark.parametrize("length", [0, 100, 101])
def test_refuses_a_prompt_that_leaves_no_room(length):
    with pytest.raises(ValueError, match=f"prompt of {length} tokens: give it between 1 and 99"):
        make(prompt=[1] * length)


def test_salt_is_the_digest_never_the_name():
    seq = make()
    assert (seq.tenant, seq.cache_salt, seq.is_bound) == ("x", b"", False)
    assert seq.bind("abc")
    assert seq.cache_salt == b"abc"


def test_a_sequence_goes_on_with_the_weights_it_began_with_alone():
    seq = make()
    assert seq.bind("abc")
    assert not seq.bind("other")
    assert seq.bind("abc")
    assert seq.cache_salt == b"abc"
