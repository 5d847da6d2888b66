"""Other adapters of the family, brought to MALoRA's form: LoRA, HydraLoRA and MoLoRA.

Every `from_*` function takes the configuration as its JSON object and the tensors by their names in
the file, and moves numbers without changing any. What they cannot express they refuse:

- **LoRA**, as PEFT saves it: one expert, the basis is A. Only W + s · B A: no DoRA, no trained
  biases or other modules, no initialisation that changes the base weights.
- **HydraLoRA** (github.com/Clin0212/HydraLoRA): peft_type LORA with `lora_nums`, and in each linear
  lora_A.weight (r, n), lora_B0.weight … lora_B{N-1}.weight (m, r), lora_route.weight (N, n). One
  basis, a dense softmax.
- **MoLoRA**, as MoE-PEFT saves its MoLA adapters (github.com/TUDB-Labs/MoE-PEFT): peft_type MOLA
  with `num_experts` and `top_k`, tensors mola.layers.{i}.{self_attn|mlp}.{name}.moe_gate.weight
  (N, n) and ….experts.{t}.lora_A.weight (r, n), ….experts.{t}.lora_B.weight (m, r). The experts' A
  stacked are the basis.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from malora.basis import PEFT_PREFIX
from malora.config import LinearShape, MaloraConfig
from malora.files import open_weights, read_config
from malora.format import (
    AdaptedLinear,
    Adapter,
    check_adapter,
    config_of,
    load_adapter,
    save_adapter,
    shape_of,
)
from malora.limits import AdapterFormatError

Converted = tuple[MaloraConfig, dict[str, AdaptedLinear]]

_COPIED = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)
_IGNORED = frozenset(
    {
        "peft_type",
        "peft_version",
        "auto_mapping",
        "inference_mode",
        "init_lora_weights",
        # Read only by methods whose own switches are refused, or during training.
        "arrow_config",
        "corda_config",
        "eva_config",
        "ensure_weight_tying",
        "loftq_config",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "lora_nums",
        "blc_alpha",
        "blc_weight",
        "merge_weights",
        "num_experts",
        "top_k",
        "routing_strategy",
        "name",
        "task_name",
    }
)
_REASONS = {
    "use_dora": "DoRA rescales the base weights by trained magnitudes",
    "lora_bias": "its B has a bias",
    "fan_in_fan_out": "its base layers store transposed weights",
    "modules_to_save": "it replaces whole modules of the base model",
    "trainable_token_indices": "it changes token embeddings",
    "layer_replication": "it changes the base model's layers",
    "target_parameters": "it adapts parameters that belong to no linear layer",
    "alora_invocation_tokens": "it is active for a part of the tokens alone",
}
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def from_lora(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Converted:
    """One expert whose basis is A (r, n) and whose up-projection is B (m, r).

    Raises AdapterFormatError for anything that is not W + s · B A.
    """
    config = _family_config(document, num_experts=1, top_k=1, coefficients="identity")
    linears = {}
    for path, parts in _grouped(tensors, PEFT_PREFIX, ("lora_A.weight", "lora_B.weight")).items():
        shape = shape_of(config, path)
        basis = _matrix(path, parts, "lora_A.weight", rows=shape.r)
        up = _matrix(path, parts, "lora_B.weight", columns=shape.r)
        linears[path] = _linear(config, shape, basis, up.unsqueeze(0), None)
    return config, linears


def from_hydralora(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Converted:
    """One A for all experts, a B each, and a dense softmax over them.

    Raises AdapterFormatError where a tensor is missing or has no place.
    """
    experts = _count(document, "lora_nums")
    config = _family_config(document, num_experts=experts, top_k=experts, coefficients="identity")
    names = [f"lora_B{t}.weight" for t in range(experts)]
    wanted = ("lora_A.weight", *names, "lora_route.weight")
    linears = {}
    for path, parts in _grouped(tensors, PEFT_PREFIX, wanted).items():
        shape = shape_of(config, path)
        basis = _matrix(path, parts, "lora_A.weight", rows=shape.r)
        ups = _alike(path, [_matrix(path, parts, name, columns=shape.r) for name in names])
        # With one expert the softmax is 1 whatever the router says.
        router = _matrix(path, parts, "lora_route.weight", rows=experts) if experts > 1 else None
        linears[path] = _linear(config, shape, basis, torch.stack(ups), router)
    return config, linears


def from_molora(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Converted:
    """An A and a B for each expert, and a router that takes the top k.

    Raises AdapterFormatError where a tensor is missing or has no place.
    """
    experts = _count(document, "num_experts")
    top_k = _count(document, "top_k")
    config = _family_config(document, num_experts=experts, top_k=top_k, coefficients="block")
    downs = [f"experts.{t}.lora_A.weight" for t in range(experts)]
    ups = [f"experts.{t}.lora_B.weight" for t in range(experts)]
    grouped = _grouped(tensors, "mola.", ("moe_gate.weight", *downs, *ups))
    linears = {}
    for path, parts in grouped.items():
        # MoE-PEFT counts layers from the decoder, whose name in transformers is "model".
        target = f"model.{path}"
        shape = shape_of(config, target)
        matrices = [_matrix(path, parts, name, rows=shape.r) for name in downs]
        basis = torch.cat(_alike(path, matrices))
        matrices = [_matrix(path, parts, name, columns=shape.r) for name in ups]
        up = torch.stack(_alike(path, matrices))
        router = _matrix(path, parts, "moe_gate.weight", rows=experts) if experts > 1 else None
        linears[target] = _linear(config, shape, basis, up, router)
    return config, linears


def convert(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> Adapter:
    """Convert an adapter folder of any kind in the family to a MALORA folder at `out`.

    Returns the adapter written. Raises AdapterFormatError for what is not in the family: MixLoRA,
    whose experts are whole feed-forward blocks, and Lily, whose gates average over the batch.
    """
    document = read_config(Path(folder))
    kind = document["peft_type"]
    if kind == "MOLA":
        read = from_molora
    elif kind == "LORA" and document.get("lora_nums"):
        read = from_hydralora
    elif kind in ("LORA", "MALORA"):
        adapter = load_adapter(folder)
        save_adapter(adapter, out)
        return adapter
    else:
        reason = {
            "MIXLORA": "its experts are whole feed-forward blocks, not single linears",
            "LILY": "its gates average over the batch, so no token's result is its own",
        }.get(kind, "it is not LoRA, HydraLoRA, MoLoRA (MOLA) or MALoRA")
        raise AdapterFormatError(
            "adapter_type_unsupported", f"A {kind} adapter cannot be converted: {reason}."
        )
    with open_weights(Path(folder)) as weights:
        weights.read()
        config, linears = read(document, weights.tensors)
        check_adapter(config, linears, None)
        adapter = Adapter.of(config, linears)
    save_adapter(adapter, out)
    return adapter


def _family_config(document: Mapping[str, Any], **family: Any) -> MaloraConfig:
    for name, value in document.items():
        if name in _IGNORED or name in _COPIED or not value:
            continue
        if name == "bias" and value == "none":
            continue
        reason = _REASONS.get(name, "it asks for more than W + s · B A")
        raise AdapterFormatError(
            "adapter_type_unsupported",
            f"Field {name} of the LoRA configuration is {value!r}, which cannot be served: "
            f"{reason}.",
        )
    init = document.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise AdapterFormatError(
            "adapter_type_unsupported",
            f"Field init_lora_weights is {init!r}, which changes the base weights: save the "
            "adapter converted to plain LoRA (path_initial_model_for_weight_conversion in PEFT).",
        )
    copied = {name: document[name] for name in _COPIED if document.get(name) is not None}
    r, experts = document.get("r"), family["num_experts"]
    if isinstance(r, int):
        copied["basis_dim"] = r * experts if family["coefficients"] == "block" else r
    return config_of({**copied, **family, "router_input": "hidden"})


def _count(document: Mapping[str, Any], name: str) -> int:
    value = document.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterFormatError(
            "adapter_config_invalid", f"Field {name} must be a positive integer, not {value!r}."
        )
    return value


def _grouped(
    tensors: Mapping[str, Tensor], prefix: str, wanted: tuple[str, ...]
) -> dict[str, dict[str, Tensor]]:
    """Tensors by module path, then by what follows it; all of `wanted` in each, and no other."""
    expression = re.compile(
        re.escape(prefix) + r"(.+?)\.(" + "|".join(re.escape(name) for name in wanted) + ")"
    )
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = expression.fullmatch(name)
        if found is None:
            raise AdapterFormatError(
                "adapter_tensor_unexpected",
                f"Tensor {name} does not belong in such an adapter, whose tensors are "
                f"{prefix}<module path>. with {', '.join(wanted)}.",
            )
        groups.setdefault(found[1], {})[found[2]] = tensor
    for path, parts in groups.items():
        for name in wanted:
            if name not in parts:
                raise AdapterFormatError(
                    "adapter_tensor_missing", f"Tensor {prefix}{path}.{name} is missing."
                )
    return groups


def _matrix(
    path: str,
    parts: Mapping[str, Tensor],
    name: str,
    *,
    rows: int | None = None,
    columns: int | None = None,
) -> Tensor:
    shape = tuple(parts[name].shape)
    if len(shape) != 2 or rows not in (None, shape[0]) or columns not in (None, shape[1]):
        raise AdapterFormatError(
            "adapter_shape_mismatch",
            f"Tensor {path}.{name} has shape {shape}, but should be a matrix of "
            f"{rows or 'any number of'} rows and {columns or 'any number of'} columns.",
        )
    return parts[name]


def _alike(path: str, matrices: list[Tensor]) -> list[Tensor]:
    """The matrices, if one shape and dtype fits all (so that they can be stacked)."""
    if len({(each.shape, each.dtype) for each in matrices}) > 1:
        raise AdapterFormatError(
            "adapter_shape_mismatch", f"The experts of {path} differ in shape or dtype."
        )
    return matrices


def _linear(
    config: MaloraConfig, shape: LinearShape, basis: Tensor, up: Tensor, router: Tensor | None
) -> AdaptedLinear:
    return AdaptedLinear(
        basis=basis,
        up=up,
        coefficients=None,
        router=router,
        router_input="hidden",
        top_k=config.top_k,
        scaling=shape.scaling,
    )
