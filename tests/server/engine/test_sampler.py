import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from malora_server.engine import sampler as sampler_module
from malora_server.engine.messages import SamplingParams, Submit
from malora_server.engine.sampler import Sampler, prompt_logprobs
from malora_server.engine.sequence import Sequence

VOCAB = 37
EOS = 2
counter = itertools.count()


def append(seq, token):
    """Adds a sampled token; True when it was the last."""
    seq.expect()
    return seq.settle(len(seq.token_ids) - 1, token)


def make(prompt=(5, 6, 7), outputs=(), **sampling):
    params = SamplingParams(**{"max_tokens": 100, "seed": 1, "temperature": 0.0, **sampling})
    submit = Submit(request_id=f"r{next(counter)}", prompt_token_ids=list(prompt), sampling=params)
    seq = Sequence(submit, 0, [EOS], max_model_len=1000)
    for token in outputs:
        append(seq, token)
    return seq


def random_logits(rows, seed=0, vocab=VOCAB):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def frequencies(logits, draws=20_000, **sampling):
    """How often each token is drawn from one row of logits, over many seeds."""
    seqs = [make(**{**sampling, "seed": seed}) for seed in range(draws)]
    sampled = Sampler().sample(logits.expand(draws, -1), seqs)
    return torch.bincount(sampled.token_ids, minlength=logits.shape[-1])


def assert_drawn_from(counts, probabilities):
    """Chi-square against the expected counts: 5 standard deviations above its mean at most."""
    expected = probabilities.double() * counts.sum()
    assert counts[expected == 0].sum() == 0
    # Cells too rare for the approximation are taken together.
    rare = (expected > 0) & (expected < 5)
    common = expected >= 5
    observed = torch.cat([counts[common].double(), counts[rare].sum()[None].double()])
    expected = torch.cat([expected[common], expected[rare].sum()[None]])
    kept = expected > 0
    statistic = ((observed - expected) ** 2 / expected)[kept].sum().item()
    freedom = int(kept.sum()) - 1
    assert statistic < freedom + 5 * (2 * max(freedom, 1)) ** 0.5


def test_greedy_takes_the_best_and_of_equals_the_first():
    logits = random_logits(3)
    logits[1, [4, 9]] = logits.max() + 1
    sampled = Sampler().sample(logits, [make() for _ in range(3)])
    assert sampled.token_ids.tolist() == [logits[0].argmax(), 4, logits[2].argmax()]
    assert sampled.token_ids.dtype == torch.int64
    assert not sampled.bad.any()
    assert sampled.logprobs is None
    assert sampled.top_ids is None


@pytest.mark.parametrize(
    ("sampling", "processors"),
    [
        ({"temperature": 1.0}, []),
        ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
        ({"temperature": 2.5, "top_k": 7}, [TemperatureLogitsWarper(2.5), TopKLogitsWarper(7)]),
        ({"temperature": 1.5, "top_p": 0.8}, [TemperatureLogitsWarper(1.5), TopPLogitsWarper(0.8)]),
        ({"temperature": 2.0, "min_p": 0.1}, [TemperatureLogitsWarper(2.0), MinPLogitsWarper(0.1)]),
        (
            {"temperature": 3.0, "top_k": 12, "top_p": 0.7, "min_p": 0.2},
            [
                TemperatureLogitsWarper(3.0),
                TopKLogitsWarper(12),
                TopPLogitsWarper(0.7),
                MinPLogitsWarper(0.2),
            ],
        ),
        (
            {"temperature": 1.2, "repetition_penalty": 1.8, "top_k": 20},
            [
                RepetitionPenaltyLogitsProcessor(1.8),
                TemperatureLogitsWarper(1.2),
                TopKLogitsWarper(20),
            ],
        ),
    ],
)
def test_draws_from_the_distribution_of_transformers(sampling, processors):
    logits = random_logits(1, seed=3)
    prompt, outputs = [5, 6, 7, 30], [8, 8, 9]
    scores = logits.double()
    for processor in processors:
        scores = processor(torch.tensor([prompt + outputs]), scores)
    counts = frequencies(logits, prompt=prompt, outputs=outputs, **sampling)
    assert_drawn_from(counts, scores.softmax(-1)[0])
    # Everything the filters leave is drawn, given enough draws of it.
    likely = scores.softmax(-1)[0] > 0.002
    assert (counts[likely] > 0).all()


def test_the_check_of_frequencies_can_fail():
    logits = random_logits(1, seed=3)
    counts = frequencies(logits, temperature=1.0)
    with pytest.raises(AssertionError):
        assert_drawn_from(counts, (logits[0] / 1.05).softmax(-1))


def test_large_vocabularies_are_filtered_alike(monkeypatch):
    # Flat enough that the nucleus outgrows the first candidates in some rows and not in others.
    logits = random_logits(6, seed=5, vocab=3000) * torch.tensor([[0.1], [3], [0.1], [3], [1], [2]])
    limits = [{}, {}, {"top_k": 700}, {"top_k": 5}, {"top_k": 300}, {}]
    seqs = [
        make(temperature=1.0, top_p=0.9, seed=seed, **limits[row])
        for seed in range(100)
        for row in range(6)
    ]
    logits = logits.repeat(100, 1)
    narrow = Sampler().sample(logits, seqs).token_ids
    monkeypatch.setattr(sampler_module, "_NUCLEUS", 3000)
    assert torch.equal(narrow, Sampler().sample(logits, seqs).token_ids)
    for row in range(6):
        scores = logits[row : row + 1].double()
        if "top_k" in limits[row]:
            scores = TopKLogitsWarper(limits[row]["top_k"])(None, scores)
        allowed = TopPLogitsWarper(0.9)(None, scores)[0].isfinite()
        assert allowed[narrow[row::6]].all()


def test_equal_logits_at_the_edge_of_top_k_go_to_the_lower_ids():
    logits = torch.zeros(1, VOCAB)
    counts = frequencies(logits, draws=2000, temperature=1.0, top_k=3)
    assert (counts > 0).nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}])
def test_the_tightest_limits_leave_the_best(limit):
    logits = random_logits(1, seed=7)
    counts = frequencies(logits, draws=100, temperature=5.0, **limit)
    assert counts[logits.argmax()] == 100


def test_tiny_and_huge_temperatures():
    logits = random_logits(1, seed=7) * 1e4
    tiny = frequencies(logits, draws=50, temperature=1e-4)
    assert tiny[logits.argmax()] == 50
    assert_drawn_from(frequencies(logits, temperature=1e9), torch.full((VOCAB,), 1 / VOCAB))


def test_penalties_match_their_definitions():
    logits = random_logits(1, seed=11)
    prompt, outputs = [3, 4, 4], [8, 8, 9, 3]
    seq = make(
        prompt,
        outputs,
        repetition_penalty=1.3,
        presence_penalty=0.7,
        frequency_penalty=0.4,
        logit_bias={12: 2.5, 8: -1.0},
        logprobs=0,
    )
    expected = logits[0].double().tolist()
    for token in {*prompt, *outputs}:
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    for token in set(outputs):
        expected[token] -= 0.7 + 0.4 * outputs.count(token)
    expected[12] += 2.5
    expected[8] -= 1.0

    sampler = Sampler()
    before = logits.clone()
    sampler.sample(logits, [seq])
    edited = sampler._batch.edit(logits, np.array([7]))[0].double()
    torch.testing.assert_close(
        edited, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5
    )
    assert torch.equal(logits, before)


def test_penalties_follow_the_sequence_while_batches_change():
    """Counts kept from step to step equal counts made afresh, whoever comes and goes."""
    rng = random.Random(4)
    sampling = {"frequency_penalty": 0.9, "repetition_penalty": 1.2, "presence_penalty": -0.3}
    seqs = [make([rng.randrange(VOCAB)] * 2, seed=i, **sampling) for i in range(5)]
    seqs += [make(seed=9)]
    kept = Sampler()
    batch: list[Sequence] = []
    for step in range(25):
        if step % 3 == 0:
            batch = rng.sample(seqs, rng.randint(1, len(seqs)))
        logits = random_logits(len(batch), seed=step) * 0.3
        sampled = kept.sample(logits, batch).token_ids
        assert torch.equal(sampled, Sampler().sample(logits, batch).token_ids)
        for seq, token in zip(batch, sampled.tolist(), strict=True):
            append(seq, token)


def test_no_end_before_min_tokens():
    logits = torch.zeros(2, VOCAB)
    logits[:, EOS], logits[:, 8], logits[:, 20] = 30.0, 20.0, 10.0
    waits = make(min_tokens=2, stop_token_ids=[8, VOCAB + 5])
    free = make(min_tokens=0, stop_token_ids=[8])
    sampler = Sampler()
    chosen = []
    for _ in range(3):
        tokens = sampler.sample(logits, [waits, free]).token_ids.tolist()
        chosen.append(tokens)
        append(waits, tokens[0])
    assert chosen == [[20, EOS], [20, EOS], [EOS, EOS]]


def test_logit_bias_outside_the_vocabulary_does_nothing():
    logits = random_logits(1)
    sampled = Sampler().sample(logits, [make(logit_bias={VOCAB: 100.0, 5: 100.0})])
    assert sampled.token_ids.tolist() == [5]


# One of each kind of row, and mixtures.
sampling_params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 1.8]),
        "top_k": st.sampled_from([0, 0, 1, 5, 600]),
        "top_p": st.sampled_from([1.0, 1.0, 0.3, 0.95]),
        "min_p": st.sampled_from([0.0, 0.0, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.5]),
        "presence_penalty": st.sampled_from([0.0, 0.0, -0.5]),
        "logit_bias": st.sampled_from([{}, {}, {4: 3.0}]),
        "min_tokens": st.sampled_from([0, 0, 50]),
        "logprobs": st.sampled_from([None, 0, 3, 7]),
        "seed": st.integers(-(2**63), 2**63 - 1),
    }
)


@settings(max_examples=40)
@given(
    rows=st.lists(
        st.tuples(sampling_params, st.lists(st.integers(0, 600), max_size=5)),
        min_size=2,
        max_size=9,
    ),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_row_does_not_depend_on_its_batch(rows, seed, dtype):
    # An odd width, so that rows start at every alignment; bfloat16 gives many equal logits.
    logits = random_logits(len(rows), seed, vocab=601).to(dtype)
    seqs = [make(outputs=outputs, **params) for params, outputs in rows]
    together = Sampler().sample(logits, seqs)
    for row, seq in enumerate(seqs):
        alone = Sampler().sample(logits[row : row + 1].clone(), [seq])
        assert alone.token_ids[0] == together.token_ids[row]
        if seq.sampling.logprobs is None:
            assert alone.logprobs is None
        else:
            assert torch.equal(alone.logprobs[0], together.logprobs[row])
            if width := seq.sampling.logprobs:
                assert torch.equal(alone.top_ids[0], together.top_ids[row, :width])
                assert torch.equal(alone.top_logprobs[0], together.top_logprobs[row, :width])


def test_the_draw_depends_on_seed_and_position_alone():
    logits = random_logits(1, vocab=5000).expand(3, -1) * 0.1
    one = make(seed=7, temperature=1.0)
    same = make(prompt=(1, 2), outputs=(3,), seed=7, temperature=1.0)
    later = make(prompt=(1, 2), outputs=(3, 4), seed=7, temperature=1.0)
    first, second, third = Sampler().sample(logits, [one, same, later]).token_ids.tolist()
    assert first == second
    assert first != third


def test_uniforms_are_uniform_and_unrelated_between_seeds_and_positions():
    seeds = np.repeat(np.arange(200, dtype=np.uint64), 200)
    positions = np.tile(np.arange(200, dtype=np.int64), 200)
    grid = sampler_module._uniforms(seeds, positions)
    assert (grid >= 0).all()
    assert (grid < 1).all()
    counts, _ = np.histogram(grid, bins=100, range=(0, 1))
    assert ((counts - 400) ** 2 / 400).sum() < 99 + 5 * (2 * 99) ** 0.5
    table = grid.reshape(200, 200)
    for a, b in [
        (table[:-1], table[1:]),
        (table[:, :-1], table[:, 1:]),
        (table[1:, :-1], table[:-1, 1:]),
    ]:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / 199


def test_one_seed_is_not_another_one_shifted():
    seeds = np.array([5, 5 + 0x9E3779B97F4A7C15], dtype=np.uint64)
    first, second = sampler_module._uniforms(seeds, np.array([9, 8]))
    assert first != second


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("limit", [{}, {"top_p": 0.9}, {"min_p": 1e-6}])
def test_the_ends_of_the_uniforms_stay_inside_what_is_allowed(monkeypatch, uniform, limit):
    logits = random_logits(1, seed=19)
    logits[0, [0, 1, VOCAB - 1]] = -torch.inf
    monkeypatch.setattr(sampler_module, "_uniforms", lambda seeds, _: np.full(len(seeds), uniform))
    token = Sampler().sample(logits, [make(temperature=1.0, **limit)]).token_ids[0]
    assert logits[0, token].isfinite()


def test_logprobs_are_of_the_logits_as_they_came():
    logits = random_logits(4, seed=13)
    seqs = [
        make(temperature=1.5, top_k=3, logit_bias={5: 50.0}, logprobs=2),
        make(),
        make(logprobs=0),
        make(repetition_penalty=2.0, logprobs=4),
    ]
    sampled = Sampler().sample(logits, seqs)
    exact = logits.double().log_softmax(-1)
    for row, width in [(0, 2), (2, 0), (3, 4)]:
        chosen = exact[row, sampled.token_ids[row]]
        torch.testing.assert_close(sampled.logprobs[row].double(), chosen, rtol=0, atol=2e-6)
        best = exact[row].topk(width)
        assert torch.equal(sampled.top_ids[row, :width], best.indices)
        got = sampled.top_logprobs[row, :width].double()
        torch.testing.assert_close(got, best.values, rtol=0, atol=2e-6)
    assert sampled.top_ids.shape == (4, 4)
    assert sampled.logprobs[1].isnan()


def test_more_alternatives_than_tokens():
    sampled = Sampler().sample(random_logits(1), [make(logprobs=VOCAB + 3)])
    assert sorted(sampled.top_ids[0].tolist()) == list(range(VOCAB))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}])
def test_a_poisoned_row_is_reported_and_harms_no_other(poison, params):
    logits = random_logits(3, seed=2)
    seqs = [make(seed=seed, logprobs=1, **params) for seed in range(3)]
    clean = Sampler().sample(logits, seqs)
    if poison == -torch.inf:
        logits[1] = poison
    else:
        logits[1, 17] = poison
    sampled = Sampler().sample(logits, seqs)
    assert sampled.bad.tolist() == [False, True, False]
    for row in (0, 2):
        assert sampled.token_ids[row] == clean.token_ids[row]
        assert sampled.logprobs[row] == clean.logprobs[row]
    assert 0 <= sampled.token_ids[1] < VOCAB


def test_some_logits_of_minus_infinity_are_never_drawn():
    logits = random_logits(1, seed=2)
    logits[0, ::2] = -torch.inf
    assert_drawn_from(frequencies(logits, temperature=1.0), logits[0].double().softmax(-1))


def test_an_empty_batch():
    assert Sampler().sample(torch.zeros(0, VOCAB), []).token_ids.shape == (0,)


def test_prompt_logprobs():
    logits = random_logits(600, seed=17)
    targets = torch.randint(VOCAB, (600,), generator=torch.Generator().manual_seed(1))
    logprobs, top_ids, top_logprobs = prompt_logprobs(logits, targets, 3)
    exact = logits.double().log_softmax(-1)
    chosen = exact.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), chosen, rtol=0, atol=2e-6)
    assert torch.equal(top_ids, exact.topk(3).indices)
    torch.testing.assert_close(top_logprobs.double(), exact.topk(3).values, rtol=0, atol=2e-6)
    alone = prompt_logprobs(logits[77:78], targets[77:78], 0)
    assert torch.equal(alone[0][0], logprobs[77])
    assert alone[1].shape == (1, 0)


def test_logprobs_of_a_large_flat_vocabulary_stay_exact():
    logits = random_logits(2, seed=1, vocab=150_001) * 0.01
    logprobs, _, _ = prompt_logprobs(logits, torch.tensor([3, 150_000]), 0)
    exact = logits.double().log_softmax(-1)[[0, 1], [3, 150_000]]
    torch.testing.assert_close(logprobs.double(), exact, rtol=0, atol=2e-6)
