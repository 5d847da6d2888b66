"""What the engine reports about once a second: steps by size, and sampled routing."""

from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

from malora_server.engine.config import EngineConfig
from malora_server.engine.core import EngineCore
from malora_server.engine.messages import (
    STEP_TOKEN_BUCKETS,
    AdapterVersion,
    SamplingParams,
    Submit,
)
from malora_server.engine.monitor import Monitor, RoutedChunks

NUM_LAYERS, NUM_EXPERTS = 7, 5


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def adapter(*num_experts: int) -> SimpleNamespace:
    linears = [SimpleNamespace(num_experts=n) for n in num_experts]
    return SimpleNamespace(packed=SimpleNamespace(linears=linears))


def gates_of(rng, num_tokens, experts, linears):
    """Top-2 gates, summed over `linears` linears a layer, as the kernels add them."""
    taken = torch.zeros(num_tokens, NUM_LAYERS, NUM_EXPERTS)
    for _ in range(linears):
        gates = rng.random((num_tokens, NUM_LAYERS, experts))
        gates[gates < np.sort(gates, -1)[..., [-2]]] = 0
        taken[..., :experts] += torch.tensor(gates / gates.sum(-1, keepdims=True))
    return taken


def test_sums_are_those_of_float64_by_adapter_and_third_of_the_layers():
    rng = np.random.default_rng(3)
    counts = [1, 4, 2, 3]
    taken = gates_of(rng, sum(counts), 3, linears=4)
    taken[5:7] = 0  # the third chunk has no experts to choose from
    taken[0, 0] = 0  # the first adapts no linear of the first layer
    names = ["a", "b", "lora", "a"]
    adapters = [adapter(2, 3), adapter(3), adapter(1), adapter(3)]
    monitor = Monitor(samples_decodes=True)
    monitor.add_routing(RoutedChunks.of(taken, names, adapters, counts))
    monitor.count_step(sum(counts))
    report = monitor.report()
    assert report is not None
    samples = {sample.adapter: sample for sample in report.routing}
    assert sorted(samples) == ["a", "b"]
    exact = taken.double().numpy()
    rows = {"a": [0, 7, 8, 9], "b": [1, 2, 3, 4]}
    thirds = [slice(0, 2), slice(2, 5), slice(5, 7)]
    for name, tokens in rows.items():
        for group, third in enumerate(thirds):
            gates, entropy, count = np.zeros(3), 0.0, 0
            for token in tokens:
                for layer in range(NUM_LAYERS)[third]:
                    total = exact[token, layer].sum()
                    if total == 0:
                        continue
                    p = exact[token, layer, :3] / total
                    gates += p
                    entropy -= sum(x * np.log(x) for x in p if x)
                    count += 1
            assert samples[name].gates[group] == pytest.approx(gates, rel=1e-5)
            assert samples[name].entropy[group] == pytest.approx(entropy, rel=1e-5)
            assert samples[name].count[group] == count
            assert sum(samples[name].gates[group]) == pytest.approx(count, rel=1e-5)
    assert samples["a"].count == [7, 12, 8]


def test_two_generations_of_other_sizes_add_up():
    monitor = Monitor(samples_decodes=True)
    for experts in (2, 4):
        taken = torch.zeros(1, 3, 4)
        taken[..., experts - 1] = 2.0
        monitor.add_routing(RoutedChunks.of(taken, ["a"], [adapter(experts)], [1]))
    monitor.count_step(1)
    report = monitor.report()
    assert report is not None
    (sample,) = report.routing
    assert sample.gates == [[0.0, 1.0, 0.0, 1.0]] * 3
    assert sample.entropy == [0.0] * 3
    assert sample.count == [2] * 3


def test_steps_are_counted_by_size_and_told_once_a_second():
    clock = Clock()
    monitor = Monitor(samples_decodes=True, clock=clock)
    assert monitor.report() is None, "nothing has happened"
    sizes = [1, 1, 2, 8, 9, 16384, 16385]
    for size in sizes:
        monitor.count_step(size)
    report = monitor.report()
    assert report is not None
    assert report.num_tokens == sum(sizes)
    by_bucket = dict(zip([*STEP_TOKEN_BUCKETS, None], report.num_steps, strict=True))
    assert {k: n for k, n in by_bucket.items() if n} == {1: 2, 8: 2, 16: 1, 16384: 1, None: 1}
    monitor.count_step(3)
    clock.now += 0.9
    assert monitor.report() is None
    clock.now += 0.2
    report = monitor.report()
    assert report is not None
    assert report.num_tokens == 3
    assert report.routing == []


def test_one_step_a_second_is_sampled_and_no_decode_where_graphs_run_it():
    clock = Clock()
    monitor = Monitor(samples_decodes=False, clock=clock)
    assert not monitor.wants_routing([None], decodes_alone=False)
    assert not monitor.wants_routing([None, adapter(2)], decodes_alone=True)
    assert monitor.wants_routing([None, adapter(2)], decodes_alone=False)
    clock.now += 0.9
    assert not monitor.wants_routing([None, adapter(2)], decodes_alone=False)
    clock.now += 0.2
    assert monitor.wants_routing([None, adapter(2)], decodes_alone=False)
    on_the_cpu = Monitor(samples_decodes=True, clock=clock)
    assert on_the_cpu.wants_routing([None, adapter(2)], decodes_alone=True)


@pytest.mark.parametrize("pipelined", [False, True])
def test_of_an_engine_whose_decodes_have_graphs_the_prompts_are_sampled(
    tiny_base, make_adapter, tmp_path, pipelined
):
    base = tiny_base("llama")
    make_adapter(base, tmp_path / "mine", 1, num_experts=4, top_k=2, r=3, basis_dim=8)
    config = EngineConfig(base=str(base), adapters=str(tmp_path), num_threads=1)
    core = EngineCore(config, pipelined=pipelined)
    clock = Clock()
    core._monitor = Monitor(samples_decodes=False, clock=clock)
    sampling = SamplingParams(max_tokens=6, seed=0, temperature=0.0, ignore_eos=True)
    submit = Submit(
        request_id="a",
        prompt_token_ids=list(range(1, 12)),
        sampling=sampling,
        adapter=AdapterVersion("mine", path=str(tmp_path / "mine")),
    )
    assert core.add(submit) is None
    while core.has_work:
        clock.now += 2
        if not core.is_runnable:
            core.wait(1)
        core.step()
    report = core.report()
    assert report is not None
    assert [sample.count for sample in report.routing] == [[11, 11, 11]]
    assert report.num_tokens >= 11 + 5


def test_the_engine_reports_the_gates_that_its_tokens_took(tiny_base, make_adapter, tmp_path):
    base = tiny_base("llama")
    make_adapter(base, tmp_path / "mine", 1, num_experts=4, top_k=2, r=3, basis_dim=8)
    core = EngineCore(EngineConfig(base=str(base), adapters=str(tmp_path), num_threads=1))
    clock = Clock()
    core._monitor = Monitor(samples_decodes=True, clock=clock)
    sampling = SamplingParams(
        max_tokens=6, seed=0, temperature=0.0, ignore_eos=True, routing="layers"
    )
    # A prompt of one token: every token that is computed predicts one that is returned.
    submit = Submit(
        request_id="a",
        prompt_token_ids=[7],
        sampling=sampling,
        adapter=AdapterVersion("mine", path=str(tmp_path / "mine")),
    )
    assert core.add(submit) is None
    alone = msgspec.structs.replace(submit, request_id="b", adapter=None)
    assert core.add(alone) is None
    told, starts = [], []
    while core.has_work:
        clock.now += 2
        if not core.is_runnable:
            core.wait(1)
        for output in core.step().outputs:
            starts.append(output.start)
            told += [entry.layers for entry in output.routing or []]
    assert len(told) == 6
    clock.now += 2
    report = core.report()
    assert report is not None
    (sample,) = report.routing
    assert sample.adapter == "mine"
    assert sample.count == [6, 6, 6]  # three layers, one a group
    for layer in range(3):
        gates = np.array([entry[layer] for entry in told])
        assert sample.gates[layer] == pytest.approx(gates.sum(0)[:4], rel=1e-4)
        entropy = -(gates * np.log(np.maximum(gates, 1e-20))).sum()
        assert sample.entropy[layer] == pytest.approx(entropy, rel=1e-4)
    assert report.num_tokens == 12
    # Both sequences tell how they started, once.
    assert sum(start is not None for start in starts) == 2
    assert all(s.queue_seconds >= 0 and s.prefill_seconds > 0 for s in starts if s)
