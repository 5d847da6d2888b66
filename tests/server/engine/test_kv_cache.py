import itertools

import pytest

from malora_server.engine.kv_cache import BlockManager
from malora_server.engine.messages import SamplingParams, Submit
from malora_server.engine.sequence import Sequence

BLOCK = 4
arrivals = itertools.count()


def append(seq, token):
    """Adds a sampled token; True when it was the last."""
    seq.expect()
    return seq.settle(len(seq.token_ids) - 1, token)


def make(tokens, digest=None, **sampling):
    params = SamplingParams(max_tokens=50, seed=1, **sampling)
    submit = Submit(request_id="a", prompt_token_ids=list(tokens), sampling=params)
    sequence = Sequence(submit, next(arrivals), [], max_model_len=1000)
    sequence.bind(digest or "")
    return sequence


def run(manager, seq):
    """Admits a sequence, computes all its tokens and registers them."""
    prefix, found = manager.match_prefix(seq)
    assert manager.allocate(seq, len(seq.token_ids) - found, prefix)
    seq.num_computed_tokens = len(seq.token_ids)
    manager.commit(seq)
    return found


@pytest.fixture
def manager():
    return BlockManager(8, BLOCK, enable_prefix_caching=True)


def test_allocates_only_what_is_missing(manager):
    seq = make(range(6))
    assert manager.allocate(seq, 6)
    assert len(seq.block_table) == 2
    seq.num_computed_tokens = 6
    assert manager.allocate(seq, 2)
    assert len(seq.block_table) == 2
    assert manager.allocate(seq, 3)
    assert len(set(seq.block_table)) == 3
    assert manager.usage == 3 / 8


def test_a_refused_allocation_changes_nothing(manager):
    first = make(range(16))
    run(manager, first)
    manager.free(first)
    holder = make(range(100, 116))
    run(manager, holder)
    seq = make([*range(16), *range(50, 70)])
    prefix, found = manager.match_prefix(seq)
    assert found == 16
    # Four free blocks, all of them the prefix itself.
    assert not manager.allocate(seq, 20, prefix)
    assert (seq.block_table, seq.num_computed_tokens) == ([], 0)
    assert manager.num_free_blocks == 4
    assert manager.match_prefix(seq) == (prefix, 16)
    assert manager.num_queried_tokens == 16 + 16


def test_full_blocks_are_found_again_while_held_and_after(manager):
    first = make(range(10))
    assert run(manager, first) == 0
    second = make(range(12))
    assert run(manager, second) == 8
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    assert second.num_cached_tokens == 8
    manager.free(first)
    manager.free(second)
    assert manager.num_free_blocks == 8
    assert run(manager, make(range(13))) == 12
    assert (manager.num_queried_tokens, manager.num_hit_tokens) == (35, 20)


def test_the_last_token_is_always_computed(manager):
    run(manager, make(range(8)))
    assert manager.match_prefix(make(range(8)))[1] == 4
    assert manager.match_prefix(make(range(9)))[1] == 8


def test_outputs_are_found_again_too(manager):
    seq = make(range(3))
    run(manager, seq)
    for token in range(3, 9):
        append(seq, token)
    assert manager.allocate(seq, 6)
    seq.num_computed_tokens = 9
    manager.commit(seq)
    assert manager.match_prefix(make(range(9)))[1] == 8


def test_another_salt_or_another_beginning_finds_nothing(manager):
    run(manager, make(range(12), digest="one"))
    assert manager.match_prefix(make(range(12), digest="one"))[1] == 8
    assert manager.match_prefix(make(range(12), digest="two"))[1] == 0
    assert manager.match_prefix(make(range(12)))[1] == 0
    assert manager.match_prefix(make([99, *range(1, 12)], digest="one"))[1] == 0
    # The same block of tokens, behind another one.
    assert manager.match_prefix(make([*range(4, 12), 0], digest="one"))[1] == 0


def test_prompt_logprobs_use_no_cache_and_fill_it(manager):
    run(manager, make(range(12)))
    asking = make(range(12), prompt_logprobs=0)
    assert run(manager, asking) == 0
    assert manager.num_queried_tokens == 12
    manager.reset()
    manager.free(asking)
    other = make(range(100, 112), prompt_logprobs=0)
    run(manager, other)
    assert manager.match_prefix(make(range(100, 112)))[1] == 8


def test_no_cache_when_disabled():
    manager = BlockManager(8, BLOCK, enable_prefix_caching=False)
    seq = make(range(12))
    run(manager, seq)
    assert manager.match_prefix(make(range(12))) == ([], 0)
    manager.free(seq)
    assert manager.num_free_blocks == 8


def test_the_same_tokens_computed_twice_at_once_stay_apart(manager):
    first, second = make(range(8)), make(range(8))
    assert manager.allocate(first, 8)
    assert manager.allocate(second, 8)
    for seq in (first, second):
        seq.num_computed_tokens = 8
        manager.commit(seq)
    assert not set(first.block_table) & set(second.block_table)
    assert manager.match_prefix(make(range(9)))[0] == first.block_table
    manager.free(first)
    manager.free(second)
    assert manager.num_free_blocks == 8


def test_the_least_recently_used_goes_first_and_tails_before_heads(manager):
    old, new = make(range(16)), make(range(100, 112))
    run(manager, old)
    run(manager, new)
    manager.free(old)
    manager.free(new)
    # One block is blank; two more must come from the end of the older one.
    assert manager.allocate(make(range(200, 212)), 12)
    assert manager.match_prefix(make(range(17)))[1] == 8
    assert manager.match_prefix(make(range(100, 113)))[1] == 12


def test_a_hit_makes_a_prefix_recent_again(manager):
    one, two = make(range(16)), make(range(100, 116))
    for seq in (one, two):
        run(manager, seq)
        manager.free(seq)
    again = make(range(16))
    assert run(manager, again) == 12
    manager.free(again)
    assert manager.allocate(make(range(200, 216)), 16)
    assert manager.match_prefix(make(range(13)))[1] == 12
    assert manager.match_prefix(make(range(100, 117)))[1] == 0


def test_reset_forgets_contents_and_keeps_what_is_held(manager):
    held, left = make(range(8)), make(range(100, 108))
    run(manager, held)
    run(manager, left)
    manager.free(left)
    table = list(held.block_table)
    manager.reset()
    assert manager.match_prefix(make(range(9)))[1] == 0
    assert manager.match_prefix(make(range(100, 109)))[1] == 0
    assert held.block_table == table
    assert manager.num_free_blocks == 6
    # The held one goes on growing; what it adds can't be found, since its head can't.
    for token in range(8, 12):
        append(held, token)
    assert manager.allocate(held, 4)
    held.num_computed_tokens = 12
    manager.commit(held)
    assert manager.match_prefix(make(range(13)))[1] == 0
    manager.free(held)
    assert manager.num_free_blocks == 8


def test_a_preempted_sequence_does_not_count_as_a_hit(manager):
    seq = make(range(12))
    run(manager, seq)
    manager.free(seq)
    seq.num_computed_tokens, seq.num_preemptions = 0, 1
    assert run(manager, seq) == 8
    assert (manager.num_queried_tokens, manager.num_hit_tokens) == (12, 0)
    assert seq.num_cached_tokens == 0
