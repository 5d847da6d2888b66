"""Loading the base model: transformers' own implementation, our attention and linears inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from malora.format import BaseModelSpec
from malora.kernels.resident import Group
from malora.pretrained import load_pretrained
from malora_server.model.attention import IMPLEMENTATION, attention_layers
from malora_server.model.linears import AdapterContext, decoder_layers, group_linears
from malora_server.model.quantization import Quantization, is_quantised, num_bytes, quantizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class LoadedModel:
    """The base model, ready to run with adapters."""

    model: PreTrainedModel
    spec: BaseModelSpec
    groups: list[Group]
    adapters: AdapterContext
    dtype: torch.dtype
    device: torch.device
    num_bytes: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]


def choose_device(device: str) -> torch.device:
    """`auto` takes the GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def load_model(
    base: str, dtype: str, device: torch.device, quantization: Quantization | None = None
) -> PreTrainedModel:
    """Load a model from a folder or a hub id, tensor by tensor onto the device.

    dtype: "auto" is float32 on the CPU; elsewhere the checkpoint's own, or bfloat16 where it is to
    be quantised. Raises OSError or ValueError where the model is missing or broken, is too large,
    or cannot be quantised so.
    """
    chosen: torch.dtype | str = "auto"
    if dtype != "auto":
        chosen = DTYPES[dtype]
    elif device.type == "cpu":
        chosen = torch.float32
    elif quantization is not None:
        chosen = torch.bfloat16
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    quantised = is_quantised(config)
    options: dict[str, Any] = {}
    if quantization is not None and isinstance(chosen, torch.dtype):
        if quantised:
            raise ValueError("the base model is quantised already: leave out --quantization")
        options["quantization_config"] = quantizer(quantization, chosen, device)
    if not quantised:
        _check_fits(config, chosen, device, quantization is not None)
    if device.type != "cpu":
        options["device_map"] = device
    try:
        return load_pretrained(base, config=config, dtype=chosen, **options)
    except ValueError as error:
        raise ValueError(f"the base model {base} cannot be loaded: {error}") from error


def _check_fits(
    config: PretrainedConfig, dtype: torch.dtype | str, device: torch.device, quantised: bool
) -> None:
    """Raises ValueError where the weights alone take more than the device has free."""
    if not isinstance(dtype, torch.dtype):
        # A configuration may not say; then this is the least that is common.
        dtype = config.get_text_config().dtype or torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    narrow = set()
    if quantised:
        linears = (m for _, _, layer in decoder_layers(model) for m in layer.modules())
        narrow = {m.weight for m in linears if isinstance(m, nn.Linear)}
    needed = sum(p.numel() * (1 if p in narrow else dtype.itemsize) for p in model.parameters())
    free = free_memory(device)
    if needed > free:
        raise ValueError(
            f"the base model's weights take {needed:,} bytes{' quantised' * quantised}, and "
            f"{free:,} are free on {device.type}"
        )


def prepare_model(model: PreTrainedModel) -> LoadedModel:
    """Put our attention and linears into a decoder, where it lies.

    Raises ValueError where it is not of a kind that can be served.
    """
    device = model.device
    weights = sum(num_bytes(parameter.data) for parameter in model.parameters())
    model.set_attn_implementation(IMPLEMENTATION)
    model = model.eval().requires_grad_(False)
    attention_layers(model)  # refuses what cannot be served, before any more work
    spec = BaseModelSpec.from_model(model)
    adapters = AdapterContext()
    groups = group_linears(model, adapters)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the single linears, which lie stacked now
        # One compilation for all layers, whatever the batch: their elementwise work becomes a few
        # kernels between products and attention, with what can be beside one another in one.
        # Every model that this process loads counts to the limit, with all forms of its layers.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for _, _, layer in decoder_layers(model):
            layer.compile(dynamic=True, fullgraph=True, options={"combo_kernels": True})
    config = model.config.get_text_config()
    return LoadedModel(
        model=model,
        spec=spec,
        groups=groups,
        adapters=adapters,
        dtype=model.dtype,
        device=device,
        num_bytes=weights,
        max_model_len=_context_length(config),
        vocab_size=config.vocab_size,
        eos_token_ids=_eos_token_ids(model),
    )


def _context_length(config: PretrainedConfig) -> int:
    """The longest sequence whose tokens depend on nothing but themselves.

    Dynamic and long RoPE change every position's frequencies once any sequence of the batch grows
    past the original length, so such a model is served up to that length.
    """
    length = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    scalings = [rope, *(v for v in rope.values() if isinstance(v, dict))]
    for scaling in scalings:
        if scaling.get("rope_type") in ("dynamic", "longrope"):
            original = scaling.get("original_max_position_embeddings")
            length = min(length, int(original or length))
    return length


def _eos_token_ids(model: PreTrainedModel) -> list[int]:
    eos: int | list[int] | None = model.generation_config.eos_token_id
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    if eos is None:
        return []
    return list(eos) if isinstance(eos, list | tuple) else [int(eos)]
