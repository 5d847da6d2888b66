"""One adapted linear, and the configuration that shapes it."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from malora import MaloraConfig
from malora.kernels import reference
from malora.layer import MaloraLinear, RoutingRecord

FAMILY: dict[str, dict[str, Any]] = {
    "lora": {"num_experts": 1, "top_k": 1, "coefficients": "identity", "basis_dim": 4},
    "hydralora": {"num_experts": 3, "top_k": 3, "coefficients": "identity", "basis_dim": 4},
    "molora": {"num_experts": 3, "top_k": 2, "coefficients": "block", "basis_dim": 12},
    "malora": {"num_experts": 3, "top_k": 2, "basis_dim": 6},
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def config_of(kind: str = "malora", **changes: Any) -> MaloraConfig:
    return MaloraConfig(**{"r": 4, **FAMILY[kind], **changes})


def layer_of(config: MaloraConfig, dtype: torch.dtype = torch.float32) -> MaloraLinear:
    layer = MaloraLinear(nn.Linear(8, 5, dtype=dtype), RoutingRecord())
    layer.update_layer("a", config, config.shape_of("q_proj"))
    layer.set_adapter("a")
    return layer


def train_a_little(layer: MaloraLinear) -> MaloraLinear:
    """Give the up-projections values, as training would."""
    for up in layer.malora_up.values():
        nn.init.normal_(up)
    return layer


@pytest.mark.parametrize("kind", FAMILY)
def test_a_fresh_layer_is_the_base_layer_to_the_bit(kind: str) -> None:
    layer = layer_of(config_of(kind))
    x = torch.randn(3, 6, 8)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("router_input", ["hidden", "basis"])
@pytest.mark.parametrize("kind", FAMILY)
def test_a_trained_layer_adds_the_reference_delta(kind: str, router_input: str) -> None:
    config = config_of(kind, router_input=router_input)
    layer = train_a_little(layer_of(config, torch.float64).double())
    x = torch.randn(6, 8, dtype=torch.float64)
    delta, _ = reference.delta(x, layer.adapted_linear("a"))
    torch.testing.assert_close(layer(x), layer.base_layer(x) + delta)
    assert delta.abs().max() > 0.1


def test_scaling_is_alpha_over_r_or_over_its_root() -> None:
    assert config_of(lora_alpha=6).shape_of("x").scaling == 1.5
    assert config_of(lora_alpha=6, use_rslora=True).shape_of("x").scaling == 3


def test_patterns_change_rank_and_alpha_of_the_modules_they_match() -> None:
    config = config_of(
        "molora", rank_pattern={"layers.1.q_proj": 2}, alpha_pattern={"v_proj": 8}, lora_alpha=4
    )
    changed = config.shape_of("model.layers.1.q_proj")
    assert (changed.r, changed.basis_dim, changed.scaling) == (2, 6, 2)
    plain = config.shape_of("model.layers.11.q_proj")
    assert (plain.r, plain.basis_dim, plain.scaling) == (4, 12, 1)
    assert config.shape_of("model.layers.1.v_proj").scaling == 2


def test_parameters_have_the_documented_shapes() -> None:
    layer = layer_of(config_of(router_input="basis"))
    shapes = {name: tuple(t.shape) for name, t in layer.adapted_linear("a").tensors().items()}
    assert shapes == {
        "malora_basis": (6, 8),
        "malora_coefficients": (3, 4, 6),
        "malora_router": (3, 6),
        "malora_up": (3, 5, 4),
    }


@pytest.mark.parametrize("kind", ["hydralora", "molora"])
def test_fixed_coefficients_are_not_stored(kind: str) -> None:
    assert layer_of(config_of(kind)).adapted_linear("a").coefficients is None


def test_one_expert_has_no_router() -> None:
    assert layer_of(config_of("lora")).adapted_linear("a").router is None


def test_a_frozen_basis_stays_frozen() -> None:
    layer = layer_of(config_of(freeze_basis=True))
    layer.set_requires_grad("a", True)
    layer.enable_adapters(False)
    layer.enable_adapters(True)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained >= {"malora_up.a", "malora_coefficients.a", "malora_router.a"}
    assert "malora_basis.a" not in trained


def test_a_hidden_router_reads_the_input_without_dropout() -> None:
    layer = train_a_little(layer_of(config_of(lora_dropout=0.5)))
    layer.record.active = True
    x = torch.randn(4, 8)
    layer(x), layer(x)
    first, second = layer.record.logits["a"]
    assert torch.equal(first, second)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_compute_in_the_inputs_dtype(dtype: torch.dtype) -> None:
    layer = train_a_little(layer_of(config_of("hydralora")))
    layer.base_layer.to(dtype)
    x = torch.randn(6, 8).to(dtype)
    y = layer(x)
    delta, _ = reference.delta(x, layer.adapted_linear("a"))
    assert y.dtype == dtype
    assert ((y - layer.base_layer(x)).double() - delta).norm() < 0.03 * delta.norm()


def test_autocast_is_respected() -> None:
    layer = train_a_little(layer_of(config_of("hydralora")))
    x = torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=0.1, rtol=0.05)
    y.float().sum().backward()
    assert layer.malora_up["a"].grad.dtype == torch.float32


@pytest.mark.parametrize("init", ["orthonormal", "svd"])
def test_a_learned_basis_starts_orthonormal(init: str) -> None:
    rows = layer_of(config_of(init_basis=init)).malora_basis["a"]
    torch.testing.assert_close(rows @ rows.T, torch.eye(6))


def test_a_basis_wider_than_the_input_is_refused() -> None:
    with pytest.raises(ValueError, match="basis_dim is 9, but a linear of 8 inputs"):
        layer_of(config_of(basis_dim=9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 4}, r"top_k must lie in 1\.\.num_experts, but it is 4 of 3"),
        ({"top_k": 0}, "top_k must be a positive integer, not 0"),
        ({"r": "8"}, "r must be a positive integer, not '8'"),
        ({"num_experts": True}, "num_experts must be a positive integer, not True"),
        ({"basis_dim": 3}, "basis_dim must be at least the rank, but it is 3 and r is 4"),
        ({"rank_pattern": {"q_proj": 7}}, "basis_dim must be at least the rank"),
        ({"rank_pattern": {"q_proj": 1.5}}, r"rank_pattern\['q_proj'\] must be a positive"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern must map module names to numbers"),
        ({"coefficients": "identity"}, r"identity\" needs basis_dim == r"),
        ({"coefficients": "block"}, r"block\" needs basis_dim == num_experts \* r, which is 12"),
        ({"coefficients": "other"}, "coefficients must be one of learned, identity, block"),
        ({"router_input": "x"}, "router_input must be one of hidden, basis"),
        ({"init_basis": "zeros"}, "init_basis must be one of orthonormal, svd"),
        ({"lora_dropout": 1.0}, r"lora_dropout must lie in \[0, 1\)"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a finite number"),
        ({"router_aux_loss_coef": -1}, "router_aux_loss_coef must not be negative"),
        ({"use_rslora": 1}, "use_rslora must be true or false"),
        ({"target_modules": [1]}, "target_modules must be a string or a list of strings"),
        ({"layers_to_transform": "0"}, "layers_to_transform must hold layer indices"),
        ({"layers_pattern": "layers"}, "layers_to_transform must be set too"),
        ({"basis_path": 3}, "basis_path must be a string"),
    ],
)
def test_a_configuration_that_makes_no_adapter_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**changes)
