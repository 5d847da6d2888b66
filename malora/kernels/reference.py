"""The formula as plainly as it can be written: the truth the fast kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from malora.format import AdaptedLinear


def delta(x: Tensor, linear: AdaptedLinear) -> tuple[Tensor, Tensor]:
    """What an adapter adds to a linear's output: one token and one expert at a time, in float64.

    Args:
        x: (T, n).
        linear: the adapter's share of this linear.

    Returns:
        The delta (T, m) and the gates (T, N), both float64; differentiable.
    """
    rows, gate_rows = [], []
    basis, up = linear.basis.double(), linear.up.double()
    for token in x.double():
        z = basis @ token
        gates = _gates(token, z, linear)
        total = torch.zeros(linear.out_features, dtype=torch.float64, device=x.device)
        for expert in range(linear.num_experts):
            total = total + gates[expert] * (up[expert] @ _read(z, expert, linear))
        rows.append(linear.scaling * total)
        gate_rows.append(gates)
    return torch.stack(rows), torch.stack(gate_rows)


def _read(z: Tensor, expert: int, linear: AdaptedLinear) -> Tensor:
    """P_t z (r,): what one expert reads from the coordinates z (d,)."""
    if linear.coefficients is not None:
        return linear.coefficients[expert].double() @ z
    if linear.basis_dim == linear.r:
        return z
    return z[expert * linear.r : (expert + 1) * linear.r]


def _gates(token: Tensor, z: Tensor, linear: AdaptedLinear) -> Tensor:
    """(N,): softmax over the experts, the top k kept, renormalised to sum to 1."""
    if linear.router is None:
        return torch.ones(1, dtype=torch.float64, device=token.device)
    logits = linear.router.double() @ (token if linear.router_input == "hidden" else z)
    probabilities = torch.exp(logits - logits.max())
    probabilities = probabilities / probabilities.sum()
    likelihoods = probabilities.tolist()
    chosen = sorted(range(len(likelihoods)), key=lambda t: -likelihoods[t])
    kept = torch.zeros_like(probabilities)
    kept[chosen[: linear.top_k]] = 1.0
    return probabilities * kept / (probabilities * kept).sum()
