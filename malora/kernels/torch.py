"""The vectorised form of the formula, on any device: all experts at once, no dispatch.

Training and prefill share it. Each function takes any leading dimensions for the tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from malora.format import AdaptedLinear
from malora.router import gates


def dense_delta(x: Tensor, linear: AdaptedLinear) -> tuple[Tensor, Tensor | None]:
    """What an adapter adds to a linear's output, with every expert computed.

    Args:
        x: (..., n), in the dtype of the adapter's tensors.
        linear: the adapter's share of this linear.

    Returns:
        The delta (..., m) in x's dtype, and the gates (..., N), float32 at least, or None
        where there is one expert and no router.
    """
    z = F.linear(x, linear.basis)
    logits = router_logits(x, z, linear)
    weights = None if logits is None else gates(logits, linear.top_k)[0]
    return mix_experts(z, weights, linear), weights


def router_logits(x: Tensor, z: Tensor, linear: AdaptedLinear) -> Tensor | None:
    """The experts' logits (..., N) for inputs x (..., n) and coordinates z (..., d)."""
    if linear.router is None:
        return None
    return F.linear(x if linear.router_input == "hidden" else z, linear.router)


def mix_experts(z: Tensor, weights: Tensor | None, linear: AdaptedLinear) -> Tensor:
    """scaling · Σ_t weights_t · up_t P_t z, as one product with the stacked up-projections.

    Args:
        z: (..., d), the tokens' coordinates in the basis.
        weights: (..., N) gates, zero for experts not taken; None for a gate of 1.
        linear: the adapter's share of this linear.

    Returns:
        (..., m) in z's dtype.
    """
    n_experts, r = linear.num_experts, linear.r
    if linear.coefficients is not None:
        coordinates = F.linear(z, linear.coefficients.reshape(n_experts * r, linear.basis_dim))
        coordinates = coordinates.unflatten(-1, (n_experts, r))
    elif linear.basis_dim == r:
        coordinates = z.unsqueeze(-2)  # the identity: every expert reads the same r numbers
    else:
        coordinates = z.unflatten(-1, (n_experts, r))  # the block selectors
    if weights is None:
        weighted = coordinates * linear.scaling
    else:
        weighted = coordinates * (weights * linear.scaling).to(z.dtype).unsqueeze(-1)
    stacked = linear.up.transpose(0, 1).flatten(1)
    return F.linear(weighted.flatten(-2), stacked)
