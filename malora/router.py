"""From router logits to gates, and the loss that keeps the experts evenly used."""

from __future__ import annotations

import torch
from torch import Tensor


def gates(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weigh the `top_k` likeliest of N experts; the others get exactly zero.

    The gates are a softmax over all N, cut to the top k and renormalised, which is the softmax
    over the selected logits alone. They depend on the token's own logits only.

    Args:
        logits: (..., N), any float dtype.
        top_k: experts to keep, 1..N.

    Returns:
        The gates (..., N), float32 at least, each row summing to 1; and the selected experts'
        indices (..., top_k), int64, likeliest first.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    selected, indices = wide.topk(top_k, dim=-1)
    return torch.zeros_like(wide).scatter(-1, indices, selected.softmax(-1)), indices


def load_balancing_loss(logits: Tensor, top_k: int, mask: Tensor | None = None) -> Tensor:
    """N · Σ_t f_t · p_t, averaged over the leading dimension; 1 when the experts share evenly.

    f_t is the share of the tokens' top-k choices that fell on expert t, and p_t the mean
    probability the whole softmax gave it (Switch Transformer's loss, with Mixtral's top-k).

    Args:
        logits: (L, T, N): L routed linears that saw the same T tokens.
        top_k: experts each token takes.
        mask: (T,), true for a token that counts, false for padding; None counts all.

    Returns:
        A float32 (float64 for float64 logits) scalar, differentiable through p alone.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    num_experts = wide.shape[-1]
    weight = wide.new_ones(wide.shape[1]) if mask is None else mask.to(wide)
    # A batch of padding alone has nothing to balance; without the clamp it would be 0 / 0.
    weight = weight / weight.sum().clamp(min=1)
    chosen = torch.zeros_like(wide).scatter(-1, wide.topk(top_k, dim=-1).indices, 1 / top_k)
    share = torch.einsum("ltn,t->ln", chosen, weight)
    probability = torch.einsum("ltn,t->ln", wide.softmax(-1), weight)
    return num_experts * (share * probability).sum(-1).mean()
