"""Loading the base model: transformers' own implementation, our attention and linears inside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from malora.format import BaseModelSpec
from malora.kernels.resident import Group
from malora_server.model.attention import IMPLEMENTATION, attention_layers
from malora_server.model.linears import AdapterContext, decoder_layers, group_linears

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


def load_model(base: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """Load a model from a folder or a hub id.

    dtype: "auto" is float32 on the CPU and the checkpoint's own elsewhere. Raises OSError or
    ValueError where the model is missing or broken.
    """
    if dtype == "auto":
        chosen: torch.dtype | str = torch.float32 if device.type == "cpu" else "auto"
    else:
        chosen = DTYPES[dtype]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=chosen, trust_remote_code=False)
    return model.to(device)


def prepare_model(model: PreTrainedModel) -> LoadedModel:
    """Put our attention and linears into a decoder, where it lies.

    Raises ValueError where it is not of a kind that can be served.
    """
    device = model.device
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    model.set_attn_implementation(IMPLEMENTATION)
    model = model.eval().requires_grad_(False)
    attention_layers(model)  # refuses what cannot be served, before any more work
    spec = BaseModelSpec.from_model(model)
    adapters = AdapterContext()
    groups = group_linears(model, adapters)
    if device.type == "cuda":
        # One compilation for all layers, whatever the batch: their elementwise work becomes a few
        # kernels between products and attention.
        for _, _, layer in decoder_layers(model):
            layer.compile(dynamic=True, fullgraph=True)
    config = model.config.get_text_config()
    return LoadedModel(
        model=model,
        spec=spec,
        groups=groups,
        adapters=adapters,
        dtype=model.dtype,
        device=device,
        num_bytes=num_bytes,
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
