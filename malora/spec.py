"""A base model's description: what an adapter must fit, and how one model is told from another."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from malora.digests import tensor_digest


@dataclass(frozen=True)
class BaseModelSpec:
    """What an adapter must fit: the sizes (in, out) of a base model's linears, and which it is."""

    name: str
    linears: dict[str, tuple[int, int]]
    fingerprint: str

    @classmethod
    def from_model(cls, model: nn.Module) -> BaseModelSpec:
        """Describe a transformers model that has its weights, and no adapters on it.

        Raises ValueError for a model whose weights are not there to be recognised by.
        """
        fingerprint = base_model_fingerprint(model)
        if fingerprint is None:
            raise ValueError(
                f"A {type(model).__name__} cannot be recognised as a base model: it needs a "
                "transformers configuration and loaded input embeddings."
            )
        linears = {
            path: (module.in_features, module.out_features)
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
        name = getattr(model, "name_or_path", "") or type(model).__name__
        return cls(name, linears, fingerprint)


def base_model_fingerprint(model: nn.Module) -> str | None:
    """sha256, in hex, that tells base models apart; None for a model that has no such marks.

    Covers the sizes in the configuration, the first 8 embedding rows and the norm weights. It is
    the same whether bfloat16 weights are loaded as bfloat16 or float32, with adapters or without.
    """
    known: Any = model
    config = getattr(known, "config", None)
    if config is None or not hasattr(known, "get_input_embeddings"):
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    weight = getattr(known.get_input_embeddings(), "weight", None)
    if weight is None or weight.ndim != 2 or weight.is_meta:
        return None
    sizes = {
        name: getattr(text, name, None)
        for name in (
            "model_type",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
    }
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
    norms = (p for name, p in model.named_parameters() if p.ndim == 1 and name.endswith(".weight"))
    for tensor in (weight[:8], *norms):
        # bfloat16 is what both a float32 and a bfloat16 load can be brought to without loss.
        digest.update(tensor_digest(tensor.detach().to("cpu", torch.bfloat16)).encode())
    return digest.hexdigest()
