"""The engine in-process: the same tokens as transformers and PEFT, however they were batched."""

import json

import msgspec
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from malora_server.engine.config import EngineConfig
from malora_server.engine.llm import LLM
from malora_server.engine.messages import SamplingParams

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi3"]
GREEDY = SamplingParams(max_tokens=12, seed=0, temperature=0.0, ignore_eos=True, logprobs=2)
ADAPTERS = {
    "hidden": {"num_experts": 4, "top_k": 2, "r": 3, "basis_dim": 8},
    "basis": {"num_experts": 3, "top_k": 1, "r": 2, "basis_dim": 4, "router_input": "basis"},
    "hydra": {"num_experts": 3, "top_k": 3, "r": 4, "basis_dim": 4, "coefficients": "identity"},
    "molora": {"num_experts": 2, "top_k": 1, "r": 4, "basis_dim": 8, "coefficients": "block"},
    "some": {"num_experts": 4, "top_k": 2, "r": 4, "basis_dim": 8},
    "lora": {"lora": True, "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
}


def prompts(count: int, lengths: tuple[int, int] = (3, 40), seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, rng.integers(*lengths)).tolist() for _ in range(count)]


@pytest.fixture(scope="session")
def served(tiny_base, make_adapter, tmp_path_factory):
    """`served(family)`: (base folder, folder of the adapters)."""
    made = {}

    def make(family):
        if family not in made:
            base, root = tiny_base(family), tmp_path_factory.mktemp(f"adapters-{family}")
            names = list(ADAPTERS) if family in ("llama", "phi3") else ["hidden", "lora"]
            for seed, name in enumerate(names):
                options = dict(ADAPTERS[name])
                if name == "some":
                    fused = family == "phi3"
                    options["target_modules"] = ["qkv_proj" if fused else "v_proj", "down_proj"]
                make_adapter(base, root / name, seed, **options)
            made[family] = base, root
        return made[family]

    return make


def by_transformers(base, prompt, count, adapter=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    model.generation_config.eos_token_id = None
    out = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_and_peft(served, family):
    base, root = served(family)
    names = [None, *sorted(p.name for p in root.iterdir())]
    llm = LLM(EngineConfig(base=str(base), adapters=str(root)))
    assert llm.adapters == names[1:]
    texts = prompts(len(names))
    mixed = llm.generate(texts, GREEDY, names)
    for name, prompt, generation in zip(names, texts, mixed, strict=True):
        folder = None if name is None else root / name
        assert generation.token_ids == by_transformers(base, prompt, 12, folder), name
    # An adapter that changes nothing would make the comparison empty.
    plain = llm.generate(texts, GREEDY)
    for name, a, b in zip(names[1:], mixed[1:], plain[1:], strict=True):
        assert abs(a.logprobs[0].logprob - b.logprobs[0].logprob) > 1e-3, name


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.error is None
        assert a.token_ids == b.token_ids
        np.testing.assert_allclose(
            [x.logprob for x in a.logprobs], [x.logprob for x in b.logprobs], atol=2e-4
        )


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_request_does_not_depend_on_how_it_was_run(served, family, temperature):
    base, root = served(family)
    config = EngineConfig(base=str(base), adapters=str(root))
    names = [None, *sorted(p.name for p in root.iterdir())] * 3
    texts = prompts(len(names), seed=2)
    sampling = [
        msgspec.structs.replace(GREEDY, temperature=temperature, seed=i, max_tokens=8 + i)
        for i in range(len(names))
    ]
    llm = LLM(config)
    alone = [llm.generate([t], s, n)[0] for t, s, n in zip(texts, sampling, names, strict=True)]
    again = llm.generate(texts, sampling, names)
    assert_same(again, alone)
    assert any(g.num_cached_tokens for g in again), "the second time hits the prefix cache"
    variants = {
        "mixed": config,
        "chunked": msgspec.structs.replace(config, max_num_batched_tokens=7),
        "few seqs": msgspec.structs.replace(config, max_num_seqs=2),
        "no prefix cache": msgspec.structs.replace(config, enable_prefix_caching=False),
    }
    for variant in variants.values():
        assert_same(LLM(variant).generate(texts, sampling, names), alone)


@pytest.mark.parametrize("pipelined", [False, True])
def test_a_flood_that_is_held_back_gets_the_same_tokens(served, pipelined):
    base, root = served("llama")
    config = EngineConfig(base=str(base), adapters=str(root), max_slowdown=None, max_num_seqs=16)
    names = ["lora"] * 12 + ["hidden", None]
    texts = prompts(len(names), seed=5)
    sampling = [
        msgspec.structs.replace(GREEDY, max_tokens=30 if name == "hidden" else 6) for name in names
    ]
    results, steps = [], []
    for max_slowdown in (None, 1.0):
        llm = LLM(msgspec.structs.replace(config, max_slowdown=max_slowdown))
        llm._core._pipelined = pipelined
        llm.generate(texts[-2:], GREEDY, ["lora", "hidden"])  # loads them
        before = llm.stats().steps
        results.append(llm.generate(texts, sampling, names))
        steps.append(llm.stats().steps - before)
    assert_same(results[1], results[0])
    assert steps[1] > 1.5 * steps[0], "nothing was held back"


@pytest.mark.parametrize("num_blocks", [14, 400])
def test_a_pipelined_engine_gives_the_same(served, num_blocks):
    base, root = served("llama")
    config = EngineConfig(
        base=str(base),
        adapters=str(root),
        max_model_len=96,
        max_num_batched_tokens=48,
        kv_cache_memory=num_blocks * 3 * 2 * 24 * 16 * 4,
    )
    options: list[dict[str, object]] = [
        {},
        {"temperature": 0.9, "top_p": 0.9},
        {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"stop_token_ids": list(range(0, 256, 3)), "min_tokens": 4},
        {"max_tokens": 1},
        {"routing": "layers", "temperature": 0.7},
        {"prompt_logprobs": 1, "logprobs": 2},
        {"stop_token_ids": list(range(0, 256, 2))},
    ]
    sampling = [
        msgspec.structs.replace(GREEDY, seed=i, **{"max_tokens": 20 + i, **options[i % 8]})
        for i in range(24)
    ]
    texts = prompts(len(sampling), (5, 40), seed=6)
    names = ["hidden", "lora", None, "basis", "hidden", "hidden"] * 4
    results = []
    for pipelined in (False, True):
        # Where penalties are about, a step waits for the one before: run with and without them.
        for chosen in (slice(None), [i for i in range(24) if i % 8 != 2]):
            llm = LLM(config)
            llm._core._pipelined = pipelined
            pick = range(24)[chosen] if isinstance(chosen, slice) else chosen
            results.append(
                llm.generate(
                    [texts[i] for i in pick], [sampling[i] for i in pick], [names[i] for i in pick]
                )
            )
            assert (llm.stats().preemptions > 0) == (num_blocks == 14)
            assert llm.stats().kv_cache_usage_ratio == 0
    for plain, piped in ((results[0], results[2]), (results[1], results[3])):
        assert_same(piped, plain)
        for a, b in zip(piped, plain, strict=True):
            assert (a.finish_reason, len(a.routing), len(a.prompt_logprobs)) == (
                b.finish_reason,
                len(b.routing),
                len(b.prompt_logprobs),
            )
            for x, y in zip(a.routing, b.routing, strict=True):
                np.testing.assert_allclose(x.mean, y.mean, atol=1e-4)
    reasons = {generation.finish_reason for generation in results[3]}
    assert reasons == {"stop", "length"}


def test_a_preempted_request_goes_on_as_it_began(served):
    base, root = served("llama")
    config = EngineConfig(
        base=str(base),
        adapters=str(root),
        max_model_len=96,
        kv_cache_memory=14 * 3 * 2 * 24 * 16 * 4,
    )
    texts = prompts(8, (20, 30), seed=3)
    sampling = msgspec.structs.replace(GREEDY, max_tokens=50, temperature=0.8)
    names = ["hidden", "lora", None, "basis"] * 2
    llm = LLM(config)
    squeezed = llm.generate(texts, sampling, names)
    assert llm.stats().preemptions > 0
    roomy = LLM(msgspec.structs.replace(config, kv_cache_memory=None))
    want = [roomy.generate([t], sampling, n)[0] for t, n in zip(texts, names, strict=True)]
    assert_same(squeezed, want)


def test_the_prefix_cache_never_crosses_adapters(served):
    base, root = served("llama")
    llm = LLM(EngineConfig(base=str(base), adapters=str(root)))
    prompt = prompts(1, (64, 65), seed=4)[0]
    first = llm.generate([prompt], GREEDY, "hidden")[0]
    assert first.num_cached_tokens == 0
    for other in (None, "basis", "lora"):
        assert llm.generate([prompt], GREEDY, other)[0].num_cached_tokens == 0
    assert llm.generate([prompt], GREEDY, "hidden")[0].num_cached_tokens == 48


def test_prompt_logprobs_are_the_models(served):
    base, root = served("llama")
    prompt = prompts(1, (30, 31), seed=5)[0]
    sampling = msgspec.structs.replace(GREEDY, prompt_logprobs=3, max_tokens=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    want = torch.log_softmax(model(torch.tensor([prompt])).logits[0].double(), -1)
    for budget in (2048, 7):
        config = EngineConfig(base=str(base), adapters=str(root), max_num_batched_tokens=budget)
        got = LLM(config).generate([prompt, prompt[:9]], sampling)[0]
        assert [x.token_id for x in got.prompt_logprobs] == prompt[1:]
        np.testing.assert_allclose(
            [x.logprob for x in got.prompt_logprobs],
            want[torch.arange(29), torch.tensor(prompt[1:])].tolist(),
            atol=1e-4,
        )
        assert got.prompt_logprobs[4].top_token_ids == want[4].topk(3).indices.tolist()
        np.testing.assert_allclose(got.logprobs[0].logprob, want[-1].max().item(), atol=1e-4)


def test_routing_reports_the_gates_of_each_generated_token(served):
    base, root = served("llama")
    llm = LLM(EngineConfig(base=str(base), adapters=str(root)))
    sampling = msgspec.structs.replace(GREEDY, routing="layers", max_tokens=5)
    texts = prompts(4, seed=6)
    hidden, lora, plain, basis = llm.generate(texts, sampling, ["hidden", "lora", None, "basis"])
    assert len(hidden.routing) == 5
    assert lora.routing == plain.routing == []
    for routing in hidden.routing:
        assert sum(routing.mean) == pytest.approx(1)
        assert len(routing.layers) == 3
        for gates in routing.layers:
            assert sum(gates) == pytest.approx(1)
        np.testing.assert_allclose(np.mean(routing.layers, axis=0), routing.mean, atol=1e-5)
    for routing in basis.routing:  # top-1: every linear's gate is 0 or 1, of 3 experts
        sevenths = np.array(routing.layers) * 7
        np.testing.assert_allclose(sevenths, sevenths.round(), atol=1e-4)
        assert not routing.mean[3:] or max(routing.mean[3:]) == 0


def test_a_bad_request_harms_nobody(served, tmp_path):
    base, root = served("llama")
    llm = LLM(EngineConfig(base=str(base), adapters=str(root)))
    texts = prompts(4, seed=7)
    want = llm.generate(texts[:2], GREEDY, ["hidden", None])
    got = llm.generate(
        [texts[0], texts[1], texts[2], [1] * 300, []],
        GREEDY,
        ["hidden", None, "absent", None, None],
    )
    assert_same(got[:2], want)
    assert [g.finish_reason for g in got[2:]] == ["error"] * 3
    assert "'absent' does not exist" in got[2].error
    assert "300 tokens" in got[3].error


@pytest.mark.parametrize("scale", [1e6, 1e18, 1e30])
def test_an_adapter_that_overflows_fails_alone(served, make_adapter, tmp_path, scale):
    base, _ = served("llama")
    make_adapter(base, tmp_path / "good", 1, **ADAPTERS["hidden"])
    make_adapter(base, tmp_path / "wild", 2, **ADAPTERS["hidden"])
    weights = tmp_path / "wild" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({k: v * scale if k.endswith("malora_up") else v for k, v in tensors.items()}, weights)
    config = EngineConfig(base=str(base), adapters=str(tmp_path), max_model_len=96)
    config = msgspec.structs.replace(config, kv_cache_memory=24 * 3 * 2 * 24 * 16 * 4)
    texts = prompts(6, (3, 50), seed=9)
    want = LLM(config).generate(texts[1:], GREEDY, [None, "good"] * 2 + [None])
    llm = LLM(config)
    for _ in range(4):  # the wild one's blocks go to others in the next round
        wild, *rest = llm.generate(texts, GREEDY, ["wild", None, "good", None, "good", None])
        assert_same(rest, want)
    if scale == 1e30:
        assert wild.finish_reason == "error"
        assert "finite" in wild.error


def test_a_broken_adapter_fails_with_its_reason_and_the_rest_is_served(
    served, make_adapter, tmp_path
):
    base, _ = served("llama")
    make_adapter(base, tmp_path / "good", 1, **ADAPTERS["hidden"])
    make_adapter(base, tmp_path / "nan", 2, **ADAPTERS["hidden"])
    weights = tmp_path / "nan" / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, weights)
    (tmp_path / "empty").mkdir()
    (tmp_path / "malformed").mkdir()
    (tmp_path / "malformed" / "adapter_config.json").write_text("{")
    make_adapter(base, tmp_path / "other", 3, **ADAPTERS["hidden"])
    config = tmp_path / "other" / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_fingerprint": "0" * 64})
    )
    llm = LLM(EngineConfig(base=str(base), adapters=str(tmp_path)))
    assert llm.adapters == ["empty", "good", "malformed", "nan", "other"]
    for _ in range(2):  # read, then known to be broken
        broken = llm.generate(prompts(5, seed=8), GREEDY, llm.adapters)
        good = broken.pop(1)
        assert (good.finish_reason, good.error) == ("length", None)
        codes = [
            "adapter_file_missing",
            "adapter_config_invalid",
            "adapter_not_finite",
            "adapter_base_mismatch",
        ]
        assert [generation.error_code for generation in broken] == codes
        for generation in broken:
            assert generation.finish_reason == "error"
            assert "\n" not in generation.error
            assert str(tmp_path) not in generation.error
    stats = llm.stats().adapters
    assert (stats.loads, stats.load_failures) == (1, 4)


def test_a_missing_base_or_folder_is_one_clear_error(tmp_path, tiny_base):
    with pytest.raises((OSError, ValueError)):
        LLM(EngineConfig(base=str(tmp_path / "nothing")))
    with pytest.raises(FileNotFoundError, match="adapters folder"):
        LLM(EngineConfig(base=str(tiny_base("llama")), adapters=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="--kv-cache-memory"):
        LLM(EngineConfig(base=str(tiny_base("llama")), kv_cache_memory=1000))


def test_nothing_leaks(served):
    base, root = served("llama")
    llm = LLM(EngineConfig(base=str(base), adapters=str(root), kv_cache_memory=2**22))
    for seed in range(3):
        llm.generate(prompts(6, seed=seed), GREEDY, ["hidden", None] * 3)
    stats = llm.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting) == (0, 0)
    assert stats.kv_cache_usage_ratio == 0
