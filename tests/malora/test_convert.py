"""LoRA, HydraLoRA and MoLoRA checkpoints, brought to MALoRA's form."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from malora.convert import convert
from malora.format import AdapterFormatError, BaseModelSpec, load_adapter
from malora.kernels.torch import dense_delta

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def base(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def lora(tiny_base: Path, out: Path, **changes: Any) -> PeftModel:
    """A LoRA of PEFT's own with trained-looking weights, saved at `out`."""
    settings = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "up_proj"]}
    model = get_peft_model(base(tiny_base), LoraConfig(**{**settings, **changes}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(out)
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 40}},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"layers_to_transform": [1], "layers_pattern": "layers", "init_lora_weights": "gaussian"},
    ],
)
def test_a_lora_and_its_conversion_give_the_same_logits(
    tiny_base: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    original = lora(tiny_base, tmp_path / "lora", **changes)
    spec = BaseModelSpec.from_model(base(tiny_base))
    adapter = convert(tmp_path / "lora", tmp_path / "malora")
    converted = PeftModel.from_pretrained(base(tiny_base), tmp_path / "malora")
    ids = torch.randint(2, 250, (2, 9))
    expected = original(ids).logits
    torch.testing.assert_close(converted(ids).logits, expected)
    with original.disable_adapter():
        assert not torch.allclose(original(ids).logits, expected, atol=1e-2)
    assert load_adapter(tmp_path / "lora", spec).digest == adapter.digest
    assert load_adapter(tmp_path / "malora", spec).digest == adapter.digest


def hydralora_tensors() -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{Q}."
    return {
        prefix + "lora_A.weight": torch.randn(2, 48),
        prefix + "lora_route.weight": torch.randn(3, 48),
        **{f"{prefix}lora_B{t}.weight": torch.randn(48, 2) for t in range(3)},
    }


HYDRALORA = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 8,
    "lora_nums": 3,
    "lora_dropout": 0.1,
    "blc_alpha": 0.0,
    "blc_weight": 0.0,
    "bias": "none",
    "merge_weights": False,
    "fan_in_fan_out": False,
    "target_modules": ["layers.0.self_attn.q_proj"],
}


def test_a_hydralora_computes_what_its_authors_code_computes(
    tiny_base: Path, tmp_path: Path
) -> None:
    tensors = hydralora_tensors()
    linear = convert(write(tmp_path / "a", HYDRALORA, tensors), tmp_path / "b").linears[Q]
    x = torch.randn(5, 48)
    named = {name.removeprefix(f"base_model.model.{Q}."): t for name, t in tensors.items()}
    route = F.linear(x, named["lora_route.weight"]).softmax(-1)
    low = F.linear(x, named["lora_A.weight"])
    expected = sum(
        route[:, t, None] * F.linear(low, named[f"lora_B{t}.weight"]) * 4 for t in range(3)
    )
    torch.testing.assert_close(dense_delta(x, linear)[0], expected)
    PeftModel.from_pretrained(base(tiny_base), tmp_path / "b")
    load_adapter(tmp_path / "b", BaseModelSpec.from_model(base(tiny_base)))


MOLORA = {
    "peft_type": "MOLA",
    "r": 2,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "bias": "none",
    "routing_strategy": "mola",
    "num_experts": 3,
    "top_k": 2,
    "target_modules": ["layers.0.self_attn.q_proj"],
}


def molora_tensors() -> dict[str, torch.Tensor]:
    prefix = "mola.layers.0.self_attn.q_proj."
    tensors = {prefix + "moe_gate.weight": torch.randn(3, 48)}
    for t in range(3):
        tensors[f"{prefix}experts.{t}.lora_A.weight"] = torch.randn(2, 48)
        tensors[f"{prefix}experts.{t}.lora_B.weight"] = torch.randn(48, 2)
    return tensors


def test_a_molora_computes_its_experts_weighted_by_the_renormalised_top_k(
    tiny_base: Path, tmp_path: Path
) -> None:
    tensors = molora_tensors()
    linear = convert(write(tmp_path / "a", MOLORA, tensors), tmp_path / "b").linears[Q]
    assert linear.coefficients is None
    named = {name.removeprefix("mola.layers.0.self_attn.q_proj."): t for name, t in tensors.items()}
    for x in torch.randn(5, 48):
        probabilities = (named["moe_gate.weight"] @ x).softmax(-1)
        weights, chosen = probabilities.topk(2)
        expected = torch.zeros(48)
        for weight, t in zip(weights / weights.sum(), chosen.tolist(), strict=True):
            low = named[f"experts.{t}.lora_A.weight"] @ x
            expected += weight * 4 * (named[f"experts.{t}.lora_B.weight"] @ low)
        torch.testing.assert_close(dense_delta(x[None], linear)[0][0], expected)
    PeftModel.from_pretrained(base(tiny_base), tmp_path / "b")
    load_adapter(tmp_path / "b", BaseModelSpec.from_model(base(tiny_base)))


def test_a_malora_is_copied(tiny_base: Path, tmp_path: Path) -> None:
    convert(write(tmp_path / "a", MOLORA, molora_tensors()), tmp_path / "b")
    assert convert(tmp_path / "b", tmp_path / "c").digest == load_adapter(tmp_path / "b").digest


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def lora_tensors() -> dict[str, torch.Tensor]:
    return {
        f"base_model.model.{Q}.lora_A.weight": torch.randn(2, 48),
        f"base_model.model.{Q}.lora_B.weight": torch.randn(48, 2),
    }


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.weight"]}, "target_parameters"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"a_method_of_the_future": {"x": 1}}, "a_method_of_the_future"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"peft_type": "MIXLORA"}, "whole feed-forward blocks"),
        ({"peft_type": "LILY"}, "average over the batch"),
        ({"peft_type": "VERA"}, "VERA"),
    ],
)
def test_what_is_not_in_the_family_is_refused(
    tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    folder = write(tmp_path / "a", {**LORA, **fields}, lora_tensors())
    with pytest.raises(AdapterFormatError, match=named) as caught:
        convert(folder, tmp_path / "b")
    assert caught.value.code == "adapter_type_unsupported"
    assert not (tmp_path / "b").exists()


def test_every_switch_of_pefts_lora_is_known_or_refused(tiny_base: Path, tmp_path: Path) -> None:
    lora(tiny_base, tmp_path / "plain")
    load_adapter(tmp_path / "plain")  # what PEFT writes by default is all accepted
    lora(tiny_base, tmp_path / "dora", use_dora=True)
    with pytest.raises(AdapterFormatError, match="use_dora"):
        load_adapter(tmp_path / "dora")


@pytest.mark.parametrize(
    ("name", "tensor", "code"),
    [
        ("lora_A.weight", None, "adapter_tensor_missing"),
        ("lora_embedding_A", torch.ones(2, 2), "adapter_tensor_unexpected"),
        ("lora_B.bias", torch.ones(48), "adapter_tensor_unexpected"),
        ("lora_A.weight", torch.ones(3, 48), "adapter_shape_mismatch"),
        ("lora_B.weight", torch.ones(48), "adapter_shape_mismatch"),
    ],
)
def test_tensors_that_make_no_lora(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, code: str
) -> None:
    tensors = lora_tensors()
    if tensor is None:
        del tensors[f"base_model.model.{Q}.{name}"]
    else:
        tensors[f"base_model.model.{Q}.{name}"] = tensor
    with pytest.raises(AdapterFormatError, match=name) as caught:
        load_adapter(write(tmp_path / "a", LORA, tensors))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("config", "change", "code"),
    [
        (HYDRALORA, {"lora_nums": 4}, "adapter_tensor_missing"),
        (HYDRALORA, {"lora_nums": 2}, "adapter_tensor_unexpected"),
        (HYDRALORA, {"lora_nums": "3"}, "adapter_config_invalid"),
        (HYDRALORA, {"r": 3}, "adapter_shape_mismatch"),
        (MOLORA, {"top_k": None}, "adapter_config_invalid"),
        (MOLORA, {"top_k": 4}, "adapter_config_invalid"),
        (MOLORA, {"num_experts": 4}, "adapter_tensor_missing"),
    ],
)
def test_mixtures_whose_parts_disagree(
    tmp_path: Path, config: dict[str, Any], change: dict[str, Any], code: str
) -> None:
    tensors = hydralora_tensors() if config is HYDRALORA else molora_tensors()
    with pytest.raises(AdapterFormatError) as caught:
        convert(write(tmp_path / "a", {**config, **change}, tensors), tmp_path / "b")
    assert caught.value.code == code


def test_experts_of_different_shapes_are_refused(tmp_path: Path) -> None:
    tensors = molora_tensors()
    tensors["mola.layers.0.self_attn.q_proj.experts.1.lora_A.weight"] = torch.randn(2, 47)
    with pytest.raises(AdapterFormatError, match="differ in shape or dtype") as caught:
        convert(write(tmp_path / "a", MOLORA, tensors), tmp_path / "b")
    assert caught.value.code == "adapter_shape_mismatch"


def test_an_old_pickled_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", MOLORA, molora_tensors())
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.bin is a pickle") as caught:
        convert(folder, tmp_path / "b")
    assert caught.value.code == "adapter_file_unsafe"


def test_no_number_changes(tmp_path: Path) -> None:
    tensors = {name: t.bfloat16() for name, t in molora_tensors().items()}
    convert(write(tmp_path / "a", MOLORA, tensors), tmp_path / "b")
    written = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert {t.dtype for t in written.values()} == {torch.bfloat16}
    basis = written[f"base_model.model.{Q}.malora_basis"]
    prefix = "mola.layers.0.self_attn.q_proj.experts."
    assert torch.equal(basis[2:4], tensors[f"{prefix}1.lora_A.weight"])
