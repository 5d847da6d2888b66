"""The engine on a GPU (bfloat16, graphs, FlashInfer, Triton) against itself on the CPU (float32).

What is generated there is scored here: log-probabilities must agree within bfloat16's precision.
"""

import pytest
import torch
import transformers

from malora import MaloraConfig
from malora.format import AdaptedLinear, Adapter, save_adapter
from malora_server.engine.config import EngineConfig
from malora_server.engine.core import EngineCore
from malora_server.engine.messages import AdapterVersion, SamplingParams, Submit
from malora_server.engine.monitor import Monitor
from malora_server.model.pieces import PiecewiseGraph

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

KINDS = {
    "lora": (1, 1, 16, 16, "hidden"),
    "family": (8, 2, 8, 32, "basis"),
    "own": (4, 2, 8, 16, "hidden"),
    "wide": (1, 1, 96, 96, "hidden"),
}
COUNT = 64
FULL_STEP = 4096
DEVICE = "cuda"


def make_linears(core, kind, seed):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(shape, generator=generator).mul(0.1).bfloat16()

    n_experts, top_k, r, d, reads = KINDS[kind]
    return {
        site.path: AdaptedLinear(
            basis=rand(d, group.in_features),
            up=rand(n_experts, site.width, r),
            coefficients=rand(n_experts, r, d) if n_experts > 1 else None,
            router=None
            if n_experts == 1
            else rand(n_experts, d if reads == "basis" else group.in_features) * 20,
            router_input=reads,
            top_k=top_k,
            scaling=0.5,
        )
        for group in core._loaded.groups
        for site in group.sites
    }


def small_config():
    return transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=None,
        bos_token_id=None,
        initializer_range=0.1,
    )


def half_precision_model(config):
    """As a checkpoint is loaded: positions' frequencies stay in single precision."""
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def cores():
    config = small_config()
    torch.manual_seed(0)
    model = half_precision_model(config)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    reference = transformers.LlamaForCausalLM(config)
    reference.load_state_dict(state)
    engine = EngineConfig(
        base="",
        max_num_seqs=COUNT,
        kv_cache_memory=1 << 25,
        adapter_device_memory=1 << 28,
        max_model_len=800,
        max_num_batched_tokens=FULL_STEP,
    )
    gpu = EngineCore(engine, model.cuda())
    # Captured before there is any adapter, and before the widest of them.
    gpu._runner.capture(adapted=True)
    cpu = EngineCore(engine, reference)
    for number in range(COUNT):
        kind = list(KINDS)[number % len(KINDS)]
        linears = make_linears(gpu, kind, number)
        for core in (gpu, cpu):
            core.adapters.add(str(number), linears)
    return gpu, cpu


def generate(core, requests, sampling, steps_apart=0):
    """requests: (prompt, adapter) each. Returns (ids, log-probabilities) of each."""
    results = [([], []) for _ in requests]

    def step():
        for output in core.step().outputs:
            assert output.error is None, output.error
            ids, logprobs = results[int(output.request_id)]
            ids += output.token_ids
            logprobs += output.prompt_logprobs or []
            logprobs += output.logprobs or []

    for number, (prompt, adapter) in enumerate(requests):
        failure = core.add(
            Submit(
                request_id=str(number),
                prompt_token_ids=prompt,
                sampling=sampling,
                adapter=None if adapter is None else AdapterVersion(adapter),
            )
        )
        assert failure is None
        for _ in range(steps_apart):
            step()
    while core.has_work:
        step()
    return results


def prompts(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 60, (count,), generator=generator).tolist()
    return [torch.randint(0, 512, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("count", [1, 3, 17, 64])
@pytest.mark.parametrize("mix", ["none", "one", "all", "some", "same"])
def test_a_graph_is_right_for_every_mix(cores, count, mix):
    gpu, cpu = cores
    names = {
        "none": [None] * count,
        "one": ["5"] + [None] * (count - 1),
        "all": [str(i) for i in range(count)],
        "some": [str(i % 7) if i % 3 else None for i in range(count)],
        "same": ["2"] * count,
    }[mix]
    requests = list(zip(prompts(count), names, strict=True))
    generated = generate(
        gpu, requests, SamplingParams(max_tokens=12, temperature=0.0, seed=0, logprobs=0)
    )
    assert_scored_alike(cpu, requests, generated)


@pytest.mark.parametrize("name", ["none", "own", "others"])
def test_prompts_that_join_others_are_right(cores, name, monkeypatch):
    """Some sequences of every step decode, one or two have prompts: some long, some short."""
    gpu, cpu = cores
    replays = []
    replay = PiecewiseGraph.replay
    monkeypatch.setattr(PiecewiseGraph, "replay", lambda graph: replays.append(replay(graph)))
    names = {
        "none": [None] * 40,
        "own": [str(i) for i in range(40)],
        "others": [str(i % 5) if i % 2 else None for i in range(40)],
    }[name]
    generator = torch.Generator().manual_seed(len(name))
    lengths = torch.tensor([2, 3, 17, 60, 200, 700])[
        torch.randint(0, 6, (40,), generator=generator)
    ]
    requests = [
        (torch.randint(0, 512, (length,), generator=generator).tolist(), adapter)
        for length, adapter in zip(lengths.tolist(), names, strict=True)
    ]
    sampling = SamplingParams(max_tokens=12, temperature=0.0, seed=0, logprobs=0)
    generated = generate(gpu, requests, sampling, steps_apart=1)
    assert len(replays) >= 30
    assert_scored_alike(cpu, requests, generated)


@pytest.mark.parametrize("name", ["none", "own"])
def test_full_steps_of_prompts_are_right(cores, name, monkeypatch):
    """Prompts that fill steps of more tokens than most graphs have, a part of one in the next."""
    gpu, cpu = cores
    graphs = gpu._runner._graphs
    rows = []
    take = type(graphs)._graph
    monkeypatch.setattr(
        type(graphs), "_graph", lambda self, kind, *of: rows.append(of[0]) or take(self, kind, *of)
    )
    generator = torch.Generator().manual_seed(len(name))
    requests = [
        (torch.randint(0, 512, (700,), generator=generator).tolist(), adapter)
        for adapter in ([None] * 16 if name == "none" else map(str, range(16)))
    ]
    sampling = SamplingParams(max_tokens=12, temperature=0.0, seed=0, logprobs=0)
    generated = generate(gpu, requests, sampling)
    assert rows.count(FULL_STEP) >= 2
    assert_scored_alike(cpu, requests, generated)


def assert_scored_alike(cpu, requests, generated):
    """The log-probabilities of 12 tokens each are those that the CPU gives these tokens."""
    forced = [
        (prompt + ids, adapter)
        for (prompt, adapter), (ids, _) in zip(requests, generated, strict=True)
    ]
    scored = generate(
        cpu, forced, SamplingParams(max_tokens=1, temperature=0.0, seed=0, prompt_logprobs=0)
    )
    errors = []
    for (prompt, _), (ids, got), (_, want) in zip(requests, generated, scored, strict=True):
        assert len(ids) == 12
        expected = want[len(prompt) - 1 : len(prompt) + 11]
        errors += [abs(a.logprob - b.logprob) for a, b in zip(got, expected, strict=True)]
    # Where two experts are nearly equal, the other precision may choose the other.
    assert sum(error > 0.4 for error in errors) <= len(errors) // 100
    assert max(errors) < 1
    assert sum(errors) / len(errors) < 0.05


def test_a_prompts_routing_is_sampled_as_on_the_cpu(cores):
    requests = list(zip(prompts(8, seed=99), map(str, range(8)), strict=True))
    sampling = SamplingParams(max_tokens=3, temperature=0.0, seed=0, ignore_eos=True)
    of_gpu, of_cpu = ({}, {})
    for core, samples in zip(cores, (of_gpu, of_cpu), strict=True):
        core._monitor = Monitor(samples_decodes=False)
        generate(core, requests, sampling)
        report = core.report()
        assert report is not None
        samples |= {sample.adapter: sample for sample in report.routing}
    # LoRAs route nothing.
    assert of_gpu.keys() == of_cpu.keys() == {"1", "2", "5", "6"}
    for name, sample in of_gpu.items():
        length = len(requests[int(name)][0])
        assert sample.count == of_cpu[name].count == [length] * 3
        for group in range(3):
            gates = torch.tensor([sample.gates[group], of_cpu[name].gates[group]]) / length
            assert gates.sum(1).tolist() == pytest.approx([1, 1], abs=1e-3)
            assert (gates[0] - gates[1]).abs().max() < 0.1
            entropies = sample.entropy[group] / length, of_cpu[name].entropy[group] / length
            assert entropies[0] == pytest.approx(entropies[1], abs=0.1)


def test_a_larger_adapter_replaces_the_only_graph():
    config = EngineConfig(
        base="",
        max_num_seqs=1,
        kv_cache_memory=1 << 25,
        adapter_device_memory=1 << 28,
        max_model_len=512,
    )
    core = EngineCore(config, half_precision_model(small_config()).to(DEVICE))
    # Those without adapters, captured at start, would keep the memory pool alive.
    graphs = core._runner._graphs
    graphs._graphs.clear()
    graphs._shared.pool = torch.cuda.graph_pool_handle()
    sampling = SamplingParams(max_tokens=4, temperature=0.0, seed=0, ignore_eos=True)
    for kind in ("lora", "wide"):
        core.adapters.add(kind, make_linears(core, kind, 0))
        # A prompt of one token takes the graph of decode steps: there is never another.
        [(ids, _)] = generate(core, [([7], kind)], sampling)
        assert len(ids) == 4
        assert len(graphs._graphs) == 1


def test_an_adapter_from_disk_is_right_from_its_first_step_on(tmp_path):
    """Each comes while others decode; its prompt is scored as soon as it may be, and once more."""
    torch.manual_seed(1)
    model = half_precision_model(small_config()).to(DEVICE)
    core = EngineCore(
        EngineConfig(
            base="",
            adapters=str(tmp_path),
            max_num_seqs=8,
            kv_cache_memory=1 << 25,
            adapter_device_memory=1 << 22,  # has room for a few alone
            adapter_host_memory=1 << 28,
            max_model_len=512,
            enable_prefix_caching=False,
        ),
        model,
    )
    versions = []
    for number in range(24):
        n_experts, top_k, r, d, reads = KINDS["own"]
        config = MaloraConfig(
            r=r, num_experts=n_experts, top_k=top_k, basis_dim=d, router_input=reads, lora_alpha=4
        )
        folder = tmp_path / str(number)
        save_adapter(Adapter.of(config, make_linears(core, "own", number)), folder)
        versions.append(AdapterVersion(str(number), 0, str(folder)))
    sampling = SamplingParams(max_tokens=1, temperature=0.0, seed=0, prompt_logprobs=0)
    decoding = SamplingParams(max_tokens=400, temperature=0.0, seed=0, ignore_eos=True)
    prompt = prompts(1, seed=5)[0]

    def score(request_id, version):
        submit = Submit(
            request_id=request_id, prompt_token_ids=prompt, sampling=sampling, adapter=version
        )
        assert core.add(submit) is None
        while True:
            if not core.is_runnable:
                core.wait(1.0)
            for output in core.step().outputs:
                assert output.error is None, output.error
                if output.request_id == request_id:
                    return torch.tensor([each.logprob for each in output.prompt_logprobs])

    base = score("base", None)
    for number, version in enumerate(versions):
        core.abort_all()
        for other, ids in enumerate(prompts(4)):
            assert (
                core.add(
                    Submit(request_id=f"{number} {other}", prompt_token_ids=ids, sampling=decoding)
                )
                is None
            )
        first, again = (score(f"{number} {turn}", version) for turn in ("first", "again"))
        torch.testing.assert_close(first, again, atol=0.1, rtol=0)
        assert (first - base).abs().max() > 0.5
