"""Base models as they lie on disk: half precision, in one file or many, and never a pickle."""

import gc
import json
import re
import shutil
import weakref

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from malora.training import base
from malora_server.engine.config import EngineConfig
from malora_server.engine.llm import LLM
from malora_server.engine.messages import SamplingParams
from malora_server.model.linears import decoder_layers
from malora_server.model.loader import load_model, prepare_model

CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ADAPTERS = {
    "hidden": {"num_experts": 4, "top_k": 4, "r": 3, "basis_dim": 8},
    "lora": {"lora": True, "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
}
SCORE = SamplingParams(max_tokens=1, seed=0, temperature=0.0, prompt_logprobs=0)


@pytest.fixture(scope="module")
def served(tiny_base, make_adapter, tmp_path_factory):
    """`served(dtype)`: a base of many small files in this dtype, and a folder of its adapters."""
    made = {}

    def make(dtype):
        if dtype not in made:
            base, root = tmp_path_factory.mktemp(dtype), tmp_path_factory.mktemp("adapters")
            model = AutoModelForCausalLM.from_pretrained(tiny_base("llama"), dtype=DTYPES[dtype])
            model.save_pretrained(base, max_shard_size="40KB")
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(tiny_base("llama") / file, base)
            for seed, name in enumerate(ADAPTERS):
                make_adapter(base, root / name, seed, **ADAPTERS[name])
            made[dtype] = base, root
        return made[dtype]

    return make


def logprobs(base, dtype, prompt, adapter):
    """Of prompt[1:], by transformers and PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
        if dtype == torch.float64:
            model = model.double()
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompt])).logits[0, :-1].double()
    return torch.log_softmax(logits, -1)[range(len(prompt) - 1), prompt[1:]].numpy()


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_is_as_near_the_truth_as_transformers_with_every_adapter(served, dtype):
    folder, root = served(dtype)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    rng = np.random.default_rng(0)
    names = [None, *ADAPTERS] * 3
    texts = [rng.integers(0, 256, rng.integers(20, 40)).tolist() for _ in names]
    for chosen in ("auto", dtype):  # auto: in float32, on the CPU
        llm = LLM(EngineConfig(base=str(folder), adapters=str(root), dtype=chosen))
        assert llm.adapters == sorted(ADAPTERS)
        ours, theirs = [], []
        for name, text, got in zip(names, texts, llm.generate(texts, SCORE, names), strict=True):
            adapter = None if name is None else root / name
            truth = logprobs(folder, torch.float64, text, adapter)
            ours.append(np.abs([x.logprob for x in got.prompt_logprobs] - truth))
            if chosen != "auto":
                theirs.append(np.abs(logprobs(folder, DTYPES[dtype], text, adapter) - truth))
        if chosen == "auto":
            assert np.concatenate(ours).max() < 1e-4
        else:
            assert llm._core._loaded.dtype == DTYPES[dtype]
            assert np.concatenate(ours).mean() < 1.5 * np.concatenate(theirs).mean()


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_stacking_holds_no_weight_twice(served, quantization):
    folder, _ = served("bfloat16")
    model = load_model(str(folder), "bfloat16", CPU, quantization)
    before = [
        weakref.ref(linear.weight)
        for _, _, layer in decoder_layers(model)
        for linear in layer.modules()
        if isinstance(linear, nn.Linear)
    ]
    gc.disable()  # torchao's linears refer to themselves
    try:
        prepare_model(model)
        assert len(before) == 21
        assert [ref() for ref in before] == [None] * 21
    finally:
        gc.enable()


def _copy(base, folder):
    shutil.copytree(base, folder)
    return folder / "model.safetensors"


def test_a_pickled_base_is_refused_unread(tiny_base, tmp_path):
    weights = _copy(tiny_base("llama"), tmp_path / "base")
    weights.unlink()
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ValueError, match="weights are pickled"):
        load_model(str(tmp_path / "base"), "auto", CPU)
    with pytest.raises(ValueError, match="weights are pickled"):
        base.load_model(tmp_path / "base", "float32")


@pytest.mark.parametrize("fault", ["truncated", "empty", "missing", "shape", "no shard"])
def test_broken_weights_say_what_is_wrong(tiny_base, tmp_path, fault):
    weights = _copy(tiny_base("llama"), tmp_path / "base")
    tensors = load_file(weights)
    name = "model.layers.1.mlp.down_proj.weight"
    words = "weights are broken"
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif fault == "empty":
        weights.write_bytes(b"")
    elif fault == "missing":
        del tensors[name], tensors["model.norm.weight"]
        words = f"files lack {re.escape(name)} and 1 more"
    elif fault == "shape":
        tensors[name] = tensors[name][1:]
        words = f"files hold {re.escape(name)} in shapes"
    else:
        index = {"metadata": {}, "weight_map": {name: "model-00001-of-00002.safetensors"}}
        weights.with_name("model.safetensors.index.json").write_text(json.dumps(index))
        weights.unlink()
        words = "model-00001-of-00002.safetensors"
    if fault in ("missing", "shape"):
        save_file(tensors, weights, {"format": "pt"})
    with pytest.raises((OSError, ValueError), match=words):
        load_model(str(tmp_path / "base"), "auto", CPU)
    with pytest.raises(ValueError, match=words):
        base.load_model(tmp_path / "base", "float32")
