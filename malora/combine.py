"""Several adapters as one: their weighted sum, which is a LoRA again, with the ranks added up."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from malora.basis import PEFT_PREFIX
from malora.config import DEFAULT_TARGET_MODULES, MaloraConfig
from malora.convert import from_lora
from malora.format import (
    MAX_RANK,
    AdaptedLinear,
    Adapter,
    check_adapter,
    load_adapter,
    write_adapter,
)
from malora.limits import AdapterFormatError


@dataclass(frozen=True)
class _Part:
    """One summand. name: the folder's own, for errors."""

    name: str
    weight: float
    adapter: Adapter

    @property
    def config(self) -> MaloraConfig:
        return self.adapter.config


_Share = tuple[_Part, AdaptedLinear]
"""What one part adds to one linear."""


def combine(
    parts: Sequence[tuple[str | os.PathLike[str], float]], out: str | os.PathLike[str]
) -> Adapter:
    """Write the LoRA folder at `out` that adds Σ weight · delta of the parts to every linear.

    In each linear A is the parts' A below each other, and B their B side by side, times weight and
    scaling: PEFT's `add_weighted_adapter` with "cat", for parts of any targets, ranks and scalings.
    Tensors are float32, each rounded once, so that weights cost no accuracy in half precision.

    Args:
        parts: adapter folders of one expert each (LoRA, or MALORA with num_experts 1), and weights
            of any sign.
        out: the folder to make.

    Returns:
        The adapter written.

    Raises ValueError for weights that are no finite numbers, and AdapterFormatError for what
    `load_adapter` refuses, or with one of these codes: adapter_type_unsupported (experts that a
    router chooses), adapter_base_mismatch, adapter_shape_mismatch, adapter_rank_too_large,
    adapter_not_finite.
    """
    if not parts:
        raise ValueError("there is no adapter to combine")
    loaded = []
    for folder, weight in parts:
        name = os.path.basename(os.path.normpath(folder))
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {name} must be a finite number, not {weight}")
        try:
            loaded.append(_Part(name, weight, load_adapter(folder)))
        except AdapterFormatError as error:
            raise AdapterFormatError(error.code, f"{name}: {error}") from error
    for part in loaded:
        _check_one_expert(part)
    _check_one_base(loaded)
    shares: dict[str, list[_Share]] = {}
    for part in loaded:
        for path, linear in part.adapter.linears.items():
            shares.setdefault(path, []).append((part, linear))
    tensors, ranks = {}, {}
    for path in sorted(shares):
        ranks[path] = _checked_rank(path, shares[path])
        a, b = _sum(path, shares[path])
        tensors[f"{PEFT_PREFIX}{path}.lora_A.weight"] = a
        tensors[f"{PEFT_PREFIX}{path}.lora_B.weight"] = b
    document = _document(loaded, ranks)
    config, linears = from_lora(document, tensors)
    check_adapter(config, linears, None)
    write_adapter(out, document, tensors)
    return Adapter.of(config, linears)


def _check_one_expert(part: _Part) -> None:
    if part.config.num_experts > 1:
        raise AdapterFormatError(
            "adapter_type_unsupported",
            f"{part.name} has {part.config.num_experts} experts, weighted anew for every token, so "
            "that no fixed sum of adapters is equal to it: only LoRA and adapters of one expert "
            "can be combined.",
        )


def _check_one_base(parts: Sequence[_Part]) -> None:
    first = parts[0]
    for part in parts[1:]:
        prints = [each.config.base_model_fingerprint for each in (first, part)]
        if None not in prints and prints[0] != prints[1]:
            raise AdapterFormatError(
                "adapter_base_mismatch",
                f"{first.name} and {part.name} were trained on base models of different weights "
                "(field base_model_fingerprint), so that their sum means nothing on either.",
            )
        names = [each.config.base_model_name_or_path for each in (first, part)]
        if None in prints and all(names) and names[0] != names[1]:
            raise AdapterFormatError(
                "adapter_base_mismatch",
                f"{first.name} was trained on the base model {names[0]!r}, {part.name} on "
                f"{names[1]!r}: where these are the same, give field base_model_name_or_path the "
                "same value in both.",
            )


def _checked_rank(path: str, shares: Sequence[_Share]) -> int:
    """The sum's rank on one linear, where all map it alike and the sum may be served."""
    first, linear = shares[0]
    sizes = (linear.in_features, linear.out_features)
    for part, other in shares:
        if (other.in_features, other.out_features) != sizes:
            raise AdapterFormatError(
                "adapter_shape_mismatch",
                f"In {first.name} {path} maps {sizes[0]} to {sizes[1]} features, in {part.name} "
                f"{other.in_features} to {other.out_features}: their base models differ.",
            )
    rank = sum(linear.r for _, linear in shares)
    if rank > MAX_RANK:
        raise AdapterFormatError(
            "adapter_rank_too_large",
            f"The ranks of {path} add up to {rank}, but at most {MAX_RANK} is served.",
        )
    return rank


def _sum(path: str, shares: Sequence[_Share]) -> tuple[Tensor, Tensor]:
    """A (Σ r, n) and B (m, Σ r) of one linear, float32."""
    downs, ups = [], []
    for part, linear in shares:
        down = linear.basis.double()
        if linear.coefficients is not None:
            down = linear.coefficients[0].double() @ down
        downs.append(down)
        ups.append(linear.up[0].double() * (part.weight * linear.scaling))
    a, b = torch.cat(downs).float(), torch.cat(ups, dim=1).float()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise AdapterFormatError(
            "adapter_not_finite", f"The sum of {path} exceeds float32: lower the weights."
        )
    return a, b


def _document(parts: Sequence[_Part], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The combination's adapter_config.json. ranks: by module path."""
    (rank, _) = Counter(ranks.values()).most_common(1)[0]
    others = _rank_pattern(ranks, rank)
    known = [part.config for part in parts if part.config.base_model_name_or_path]
    document = LoraConfig(
        task_type=next((p.config.task_type for p in parts if p.config.task_type), None),
        base_model_name_or_path=known[0].base_model_name_or_path if known else None,
        revision=known[0].revision if known else None,
        inference_mode=True,
        target_modules=_targets(parts, ranks),
        # Weights and scalings are in B, so the scaling left is rank / rank.
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=others,
    ).to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in document.items()}


def _rank_pattern(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """PEFT's rank_pattern: by name where all linears of a name agree, else by whole path."""
    of_name: dict[str, set[int]] = {}
    for path, rank in ranks.items():
        of_name.setdefault(_name(path), set()).add(rank)
    pattern = {}
    for path, rank in ranks.items():
        if rank != usual:
            alike = len(of_name[_name(path)]) == 1
            # A key is an expression that may match the end of a path, but for the mark "^".
            escaped = path.replace(".", r"\.")
            pattern[_name(path) if alike else f"^{escaped}"] = rank
    return pattern


def _targets(parts: Sequence[_Part], paths: Mapping[str, int]) -> list[str]:
    """PEFT's target_modules for these linears: names where the parts have names, else paths."""
    names: set[str] = set()
    for part in parts:
        config = part.config
        of_layers = config.layers_to_transform is not None or config.exclude_modules
        if isinstance(config.target_modules, str) or of_layers:
            return sorted(paths)
        if config.target_modules is None:
            names.update({_name(path) for path in part.adapter.linears} & {*DEFAULT_TARGET_MODULES})
        else:
            names.update(config.target_modules)
    return sorted(names)


def _name(path: str) -> str:
    return path.rpartition(".")[2]
