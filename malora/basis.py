"""The shared basis: how it starts, how it is kept in a file of its own, how it is told apart.

A *basis file* is a .safetensors file that maps module paths of the base model
("model.layers.0.self_attn.q_proj") to bases (d, n). Adapters trained in one frozen basis form a
basis family: the server computes basis · x once for all of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from malora.digests import tensor_digest
from malora.files import Map

PEFT_PREFIX = "base_model.model."
BASIS_NAME = "malora_basis"


def kaiming(*shape: int) -> Tensor:
    """A float32 draw as nn.Linear starts: uniform in ±1/√(last dimension)."""
    tensor = torch.empty(shape)
    nn.init.uniform_(tensor, -1 / math.sqrt(shape[-1]), 1 / math.sqrt(shape[-1]))
    return tensor


def orthonormal_basis(basis_dim: int, in_features: int) -> Tensor:
    """A random float32 basis (basis_dim, in_features) with orthonormal rows; basis_dim ≤ n."""
    return nn.init.orthogonal_(torch.empty(basis_dim, in_features))


def svd_basis(num_experts: int, r: int, basis_dim: int, in_features: int) -> Tensor:
    """The leading right singular vectors (basis_dim, in_features) of stacked Kaiming draws.

    The stack holds one (r, n) draw an expert, or basis_dim rows where those are more.
    """
    draws = kaiming(max(num_experts * r, basis_dim), in_features)
    return torch.linalg.svd(draws, full_matrices=False).Vh[:basis_dim].contiguous()


def kaiming_coefficients(num_experts: int, r: int, basis: Tensor) -> Tensor:
    """Random float32 coefficients (N, r, d) whose products P_t · basis have a Kaiming A's rows.

    A Kaiming draw over d entries has the row norms of one over n entries, and an orthonormal basis
    keeps them; for any other basis each row is rescaled so that its product has them too.
    """
    coefficients = kaiming(num_experts, r, basis.shape[0])
    product = coefficients @ basis.detach().to("cpu", torch.float32)
    scale = coefficients.norm(dim=-1, keepdim=True) / product.norm(dim=-1, keepdim=True)
    return coefficients * scale


def save_basis(bases: Mapping[str, Tensor], path: str | Path) -> None:
    """Write bases, keyed by module path, as a basis file."""
    save_file({name: basis.detach().contiguous() for name, basis in bases.items()}, path)


def load_basis(path: str | Path) -> dict[str, Tensor]:
    """Read the bases, keyed by module path, of a basis file or of a saved MALoRA adapter's folder.

    Raises ValueError where there is no such file, it is no safetensors file, or holds no basis.
    """
    path = Path(path)
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path.name} holds no basis: there is no file {file.name}.")
    bases = {}
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                if path.is_dir() and not name.endswith(f".{BASIS_NAME}"):
                    continue
                module = name.removeprefix(PEFT_PREFIX).removesuffix(f".{BASIS_NAME}")
                # A clone, since the handle's tensors are windows into the file.
                bases[module] = handle.get_tensor(name).clone()
    except SafetensorError as error:
        raise ValueError(f"{file.name} is not a readable safetensors file: {error}.") from error
    for module, basis in bases.items():
        if basis.ndim != 2 or not basis.is_floating_point():
            raise ValueError(
                f"{file.name} holds no basis for {module}: it should be a floating-point matrix "
                f"(d, n), not {basis.dtype} of shape {tuple(basis.shape)}."
            )
    if not bases:
        raise ValueError(f"{path.name} holds no basis: train a MALoRA adapter to make one.")
    return bases


def basis_digest(bases: Mapping[str, Tensor], map: Map = map) -> str:
    """sha256, in hex, of all of an adapter's bases, keyed by module path, in sorted order."""
    digest = hashlib.sha256()
    names = sorted(bases)
    for name, of_basis in zip(names, map(tensor_digest, [bases[n] for n in names]), strict=True):
        digest.update(f"{name} {of_basis}\n".encode())
    return digest.hexdigest()
