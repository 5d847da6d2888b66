"""Drawing a basis for a family of adapters, before any of them is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, set_seed

from malora.basis import orthonormal_basis
from malora.config import DEFAULT_TARGET_MODULES
from malora.training.base import load_tokenizer


def fresh_basis(
    base: str | Path, basis_dim: int, seed: int, target_modules: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Random orthonormal bases (basis_dim, n), float32, by the paths of a base model's linears.

    `target_modules` are the last parts of the paths; None takes the usual ones that the model has.
    Raises ValueError, in one sentence, where the model is missing, has none of them, or one of
    them has fewer than basis_dim inputs.
    """
    config = load_tokenizer(base)[1]
    with torch.device("meta"):  # the sizes are all it takes
        model = AutoModelForCausalLM.from_config(config)
    names = set(target_modules or DEFAULT_TARGET_MODULES)
    sizes = {
        path: module.in_features
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in names
    }
    if not sizes:
        raise ValueError(f"the model at {base} has no linear named {', '.join(sorted(names))}")
    if not 1 <= basis_dim <= min(sizes.values()):
        raise ValueError(
            f"a basis of this model has 1 to {min(sizes.values())} rows, not {basis_dim}"
        )
    set_seed(seed)
    return {path: orthonormal_basis(basis_dim, size) for path, size in sizes.items()}
