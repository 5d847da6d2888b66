"""Quantised base models with adapters on top, against their dequantised weights in float64."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import torchao.quantization.quant_api
from peft import PeftModel
from torch import nn
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8Tensor,
    Int8WeightOnlyConfig,
    PerRow,
    PerTensor,
)
from transformers import AutoModelForCausalLM, TorchAoConfig

from malora_server.engine import memory
from malora_server.engine.config import EngineConfig
from malora_server.engine.llm import LLM
from malora_server.engine.messages import SamplingParams
from malora_server.model import loader, quantization
from malora_server.model.linears import GroupedLinear, decoder_layers
from malora_server.model.loader import load_model
from malora_server.model.quantization import Float8Weight, num_bytes, quantise_rows

CPU = torch.device("cpu")
SCORE = SamplingParams(max_tokens=1, seed=0, temperature=0.0, prompt_logprobs=0)
ADAPTERS = {
    "hidden": {"num_experts": 4, "top_k": 2, "r": 3, "basis_dim": 8},
    "lora": {"lora": True, "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
}
INT8 = Int8WeightOnlyConfig(set_inductor_config=False)
FP8 = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
FAMILIES = ["llama", "qwen3", "phi3"]
"""llama: biases, and keys and values of 24 rows, which torchao leaves as they are in fp8. qwen3:
all of a layer's linears in fp8. phi3: linears that are stacked already."""


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, rng.integers(10, 40)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def adapters(tiny_base, make_adapter, tmp_path_factory):
    """`adapters(family)`: a folder of adapters, made on the unquantised base."""
    made: dict[str, Path] = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(f"adapters-{family}")
            for seed, name in enumerate(ADAPTERS):
                make_adapter(tiny_base(family), made[family] / name, seed, **ADAPTERS[name])
        return made[family]

    return make


@pytest.fixture(scope="module")
def checkpoint(tiny_base, tmp_path_factory):
    """`checkpoint(family, config)`: the base as a checkpoint that torchao quantised."""

    def make(family, config):
        folder = tmp_path_factory.mktemp(f"quantised-{family}")
        with pytest.MonkeyPatch.context() as patch:
            # torchao quantises to float8 on GPUs alone; what it makes runs here too.
            patch.setattr(torchao.quantization.quant_api, "_check_hardware_support", lambda _: None)
            model = AutoModelForCausalLM.from_pretrained(
                tiny_base(family), dtype=torch.bfloat16, quantization_config=TorchAoConfig(config)
            )
        model.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_base(family) / file, folder)
        return folder

    return make


class _Float8Linear(nn.Linear):
    """A linear in float64 whose activations are rounded to float8, a token at a time."""

    def forward(self, x):
        scale = x.abs().amax(-1, keepdim=True) / 448
        return super().forward((x / scale).to(torch.float8_e4m3fn).double() * scale)


def dequantised(model, adapter=None):
    """torchao's model in float64, with the adapter."""
    found = 0
    for _, module in model.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module.weight, "qdata"):
            found += 1
            weight = module.weight
            if weight.act_quant_kwargs is not None:
                module.__class__ = _Float8Linear
            exact = weight.qdata.double() * weight.scale.double()
            module.weight = nn.Parameter(exact, requires_grad=False)
    assert found
    model = model.double()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).double()
    return model.eval()


def reference(model, prompt):
    """The log-probabilities of prompt[1:]."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, :-1]
    return torch.log_softmax(logits, -1)[range(len(prompt) - 1), prompt[1:]].numpy()


def scores(llm, texts, names):
    results = llm.generate(texts, SCORE, names)
    assert [r.error for r in results] == [None] * len(texts)
    return [np.array([x.logprob for x in r.prompt_logprobs]) for r in results]


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_equals_the_dequantised_weights_with_every_adapter(tiny_base, adapters, family):
    base, root = tiny_base(family), adapters(family)
    config = EngineConfig(base=str(base), adapters=str(root), quantization="int8")
    llm = LLM(config)
    assert llm.adapters == sorted(ADAPTERS)
    names = [None, *ADAPTERS] * 2
    texts = prompts(len(names))
    got = scores(llm, texts, names)
    plain = scores(LLM(EngineConfig(base=str(base), adapters=str(root))), texts, names)
    for name, text, a, unquantised in zip(names, texts, got, plain, strict=True):
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, quantization_config=TorchAoConfig(INT8)
        )
        want = reference(dequantised(model, None if name is None else root / name), text)
        np.testing.assert_allclose(a, want, atol=1e-4)
        # Eight bits are close to the base model, and are not the base model.
        assert 1e-3 < np.abs(a - unquantised).mean() < 0.2


@pytest.fixture(scope="module")
def fp8(checkpoint):
    """`fp8(family)`: a checkpoint in float8."""
    made: dict[str, Path] = {}

    def make(family):
        if family not in made:
            made[family] = checkpoint(family, FP8)
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_an_fp8_checkpoint_equals_its_weights_and_activations_with_every_adapter(
    fp8, adapters, family
):
    base, root = fp8(family), adapters(family)
    llm = LLM(EngineConfig(base=str(base), adapters=str(root)))
    assert llm.adapters == sorted(ADAPTERS)
    names = [None, *ADAPTERS] * 3
    texts = prompts(len(names))
    errors = []
    for name, text, got in zip(names, texts, scores(llm, texts, names), strict=True):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = dequantised(model, None if name is None else root / name)
        errors.append(np.abs(got - reference(model, text)))
    # An activation on the edge between two float8 values may fall to either side, by the processor,
    # and all tokens behind it differ: in one prompt of twenty, not in all of an adapter's.
    for name in (None, *ADAPTERS):
        assert min(e.max() for n, e in zip(names, errors, strict=True) if n == name) < 1e-4
    assert np.median(np.concatenate(errors)) < 1e-4
    assert np.concatenate(errors).max() < 0.2


def test_an_fp8_request_does_not_depend_on_its_neighbours(fp8, adapters):
    llm = LLM(EngineConfig(base=str(fp8("qwen3")), adapters=str(adapters("qwen3"))))
    names = [None, *ADAPTERS] * 2
    texts = prompts(len(names))
    together = scores(llm, texts, names)
    for name, text, want in zip(names, texts, together, strict=True):
        (alone,) = scores(llm, [text], [name])
        assert np.median(np.abs(alone - want)) < 1e-5


def test_compiled_layers_quantise_before_the_product_and_are_compiled_once(fp8, adapters):
    config = EngineConfig(base=str(fp8("qwen3")), adapters=str(adapters("qwen3")))
    names = [None, *ADAPTERS]
    texts = prompts(len(names))
    want = scores(LLM(config), texts, names)
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph

    llm = LLM(config)
    for _, _, layer in decoder_layers(llm._core._loaded.model):
        layer.compile(dynamic=True, fullgraph=True, backend=keep)
    for got, expected in zip(scores(llm, texts, names), want, strict=True):
        assert np.median(np.abs(got - expected)) < 1e-5
    (code,) = graphs
    assert code.count("float8_e4m3fn") == code.count("grouped_linear") == 4


@pytest.mark.parametrize("has_product", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (17, 64), (1, 3, 64)])
def test_the_fp8_product_equals_float64(shape, has_product, monkeypatch):
    if has_product and not quantization.CPU_HAS_PRODUCT:
        pytest.skip("torch has it on GPUs alone")
    monkeypatch.setattr(quantization, "CPU_HAS_PRODUCT", has_product)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator, dtype=torch.bfloat16)
    weight[5] = 0
    bias = torch.randn(48, generator=generator)
    x = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[-2])[:, None]
    x[..., 0, :] = 0
    made = Float8Tensor.from_hp(weight, granularity=PerRow())
    float8 = Float8Weight(made.qdata, made.scale)
    rows, scales = quantise_rows(x)
    got = float8.product(rows, scales, bias, torch.float32)
    # Three bits of mantissa: what each step leaves out is at most a sixteenth.
    exact = float8.values.double() * float8.scales.double()
    assert ((exact - weight.double()).abs() <= weight.double().abs() / 16 + 1e-2).all()
    read = rows.double() * scales.double()
    assert ((read - x.double()).abs() <= x.abs().amax(-1, keepdim=True) / 16).all()
    want = read @ exact.T + bias.double()
    assert got.isfinite().all()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_the_sum_of_the_weights_is_the_quantised_one(tiny_base):
    base = str(tiny_base("llama"))
    plain = LLM(EngineConfig(base=base))._core._loaded
    small = LLM(EngineConfig(base=base, quantization="int8"))._core._loaded
    linears = [site.width * g.in_features for g in plain.groups for site in g.sites]
    rows = sum(site.width for g in plain.groups for site in g.sites)
    assert plain.num_bytes - small.num_bytes == 3 * sum(linears) - (4 + 1) * rows
    groups = {m._group[0] for m in small.model.modules() if isinstance(m, GroupedLinear)}
    assert sum(num_bytes(g.weight) for g in groups) == sum(linears) + (4 + 1) * rows


def test_weights_that_do_not_fit_are_refused_before_they_are_read(tiny_base, monkeypatch):
    base = str(tiny_base("llama"))
    need = LLM(EngineConfig(base=base))._core._loaded.num_bytes
    monkeypatch.setattr(loader, "free_memory", lambda _: need - 1)
    with pytest.raises(ValueError, match=f"{need:,} bytes, and {need - 1:,} are free on cpu"):
        load_model(base, "auto", CPU)
    load_model(base, "auto", CPU, "int8")
    load_model(base, "bfloat16", CPU)
    monkeypatch.setattr(loader, "free_memory", lambda _: need // 4)
    with pytest.raises(ValueError, match="bytes quantised, and"):
        load_model(base, "auto", CPU, "int8")


def test_what_weights_and_adapters_leave_is_shown_where_it_is_too_little(tiny_base, monkeypatch):
    config = EngineConfig(
        base=str(tiny_base("llama")), quantization="int8", adapter_device_memory=3_000_000
    )
    small = f"({LLM(config)._core._loaded.num_bytes:,}) and the adapters (3,000,000)"
    monkeypatch.setattr(memory, "free_memory", lambda _: 3_400_000)
    asks = "of --kv-cache-memory: 400,000 bytes are free beside the weights "
    with pytest.raises(ValueError, match=re.escape(asks + small)):
        LLM(msgspec.structs.replace(config, kv_cache_memory=400_001))
    LLM(msgspec.structs.replace(config, kv_cache_memory=400_000))
    monkeypatch.setattr(memory, "free_memory", lambda _: 3_010_000)
    with pytest.raises(ValueError, match=re.escape("10,000 bytes are free beside the weights")):
        LLM(config)


def test_what_cannot_be_quantised_says_why(tiny_base, fp8, checkpoint, monkeypatch):
    base = str(tiny_base("qwen3"))
    for dtype, name, words in (
        ("auto", "fp8", r"compute capability 8\.9.*int8 runs anywhere"),
        ("float16", "int8", "not float16"),
    ):
        with pytest.raises(ValueError, match=words):
            load_model(base, dtype, CPU, name)
    with pytest.raises(ValueError, match="quantised already: leave out --quantization"):
        load_model(str(fp8("qwen3")), "auto", CPU, "int8")
    with pytest.raises(ValueError, match="not float16"):
        LLM(EngineConfig(base=str(fp8("qwen3")), dtype="float16"))
    whole = replace(FP8, granularity=PerTensor())
    with pytest.raises(ValueError, match=r"q_proj scales its activations by PerTensor"):
        LLM(EngineConfig(base=str(checkpoint("qwen3", whole))))
    monkeypatch.setattr(quantization, "find_spec", lambda _: None)
    for path, name in ((base, "int8"), (str(fp8("qwen3")), None)):
        with pytest.raises(ValueError, match=r"pip install 'malora\[quantization\]'"):
            load_model(path, "auto", CPU, name)


def test_another_method_s_checkpoint_is_refused(tiny_base, tmp_path):
    shutil.copytree(tiny_base("llama"), tmp_path / "gptq")
    config = tmp_path / "gptq" / "config.json"
    config.write_text(
        json.dumps(
            json.loads(config.read_text())
            | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
        )
    )
    with pytest.raises(ValueError, match="quantised by gptq, which is not served"):
        load_model(str(tmp_path / "gptq"), "auto", CPU)
