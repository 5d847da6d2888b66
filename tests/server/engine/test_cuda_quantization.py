"""A quantised base on a GPU (compiled layers, graphs, adapters) against itself on the CPU.

What is generated there is scored here in float32, from a checkpoint of the same quantised weights,
which test_quantization.py holds to float64.
"""

import shutil

import numpy as np
import pytest
import torch
import transformers

from malora_server.engine.config import EngineConfig
from malora_server.engine.llm import LLM
from malora_server.engine.messages import SamplingParams
from malora_server.model.loader import load_model, prepare_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ADAPTERS = {
    "hidden": {"num_experts": 4, "top_k": 2, "r": 8, "basis_dim": 16, "lora_alpha": 3},
    "basis": {
        "num_experts": 8,
        "top_k": 2,
        "r": 4,
        "basis_dim": 32,
        "lora_alpha": 3,
        "router_input": "basis",
    },
    "lora": {"lora": True, "r": 16, "lora_alpha": 3, "target_modules": "all-linear"},
}
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def base(tiny_base, make_adapter, tmp_path_factory):
    """A folder of a random Llama in bfloat16; its adapters lie in `adapters` under it."""
    folder = tmp_path_factory.mktemp("base")
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=None,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base("llama") / file, folder)
    for seed, name in enumerate(ADAPTERS):
        make_adapter(folder, folder / "adapters" / name, seed, **ADAPTERS[name])
    return folder


def logprobs(result):
    """Of the tokens that were generated, or scored in their place."""
    return np.array([x.logprob for x in (result.prompt_logprobs or result.logprobs)[-NEW_TOKENS:]])


# bfloat16's error moves an activation to the next float8 value, or a token to another expert, now
# and then.
@pytest.mark.parametrize(("quantization", "most"), [("fp8", 0.12), ("int8", 0.04)])
def test_a_quantised_base_is_right_for_every_mix(base, quantization, most, tmp_path):
    load_model(str(base), "auto", torch.device("cuda"), quantization).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / file, tmp_path)
    options = {"adapters": str(base / "adapters"), "max_model_len": 128, "max_num_seqs": 32}
    gpu = LLM(EngineConfig(base=str(base), quantization=quantization, **options))
    saved = LLM(EngineConfig(base=str(tmp_path), **options))
    cpu = LLM(EngineConfig(base=str(tmp_path), device="cpu", **options))
    assert gpu._core._loaded.num_bytes == saved._core._loaded.num_bytes
    generator = torch.Generator().manual_seed(0)
    for names in ([None] * 5, [None, *ADAPTERS] * 8, ["hidden"] * 3, [None] * 6 + ["lora"]):
        lengths = torch.randint(3, 60, (len(names),), generator=generator).tolist()
        texts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
        greedy = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, seed=0, logprobs=0)
        generated = gpu.generate(texts, greedy, names)
        forced = [text + g.token_ids for text, g in zip(texts, generated, strict=True)]
        score = SamplingParams(max_tokens=1, temperature=0.0, seed=0, prompt_logprobs=0)
        want = np.stack([logprobs(x) for x in cpu.generate(forced, score, names)])
        for results in (generated, saved.generate(forced, score, names)):
            got = np.stack([logprobs(x) for x in results])
            assert np.abs(got - want).mean() < most, names
        # An adapter that changes nothing would make the comparison empty.
        plain = np.stack([logprobs(x) for x in cpu.generate(forced, score)])
        adapted = np.array([name is not None for name in names])
        changes = np.abs(plain - want)
        # The CPU's sums may be in another order where a batch has other adapters.
        assert (changes[~adapted] < 1e-4).all()
        assert not adapted.any() or changes[adapted].mean() > 2 * most


@pytest.mark.parametrize("quantization", [None, "fp8", "int8"])
def test_loading_takes_little_more_than_the_weights(tmp_path, quantization):
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    with torch.device("cuda"):
        transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    model = load_model(str(tmp_path), "bfloat16", torch.device("cuda"), quantization)
    loaded = prepare_model(model)
    assert torch.cuda.max_memory_reserved() - before < 1.5 * loaded.num_bytes
    assert torch.cuda.memory_reserved() - before < 1.3 * loaded.num_bytes
