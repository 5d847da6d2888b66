"""An adapter in memory: what the kernels, the server and the converters share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

RouterInput = Literal["hidden", "basis"]


@dataclass(frozen=True)
class AdaptedLinear:
    """One linear layer's share of an adapter: y = W0 x + scaling · Σ_t g_t(x) · up_t P_t basis x.

    basis: (d, n). up: (N, m, r). coefficients: (N, r, d), or None where P_t is not stored:
    the identity when d == r (LoRA, HydraLoRA), the t-th block selector when d == N·r (MoLoRA).
    router: (N, n) for router_input "hidden", (N, d) for "basis"; None when N == 1 (gate 1).
    """

    basis: Tensor
    up: Tensor
    coefficients: Tensor | None
    router: Tensor | None
    router_input: RouterInput
    top_k: int
    scaling: float

    @property
    def num_experts(self) -> int:
        return self.up.shape[0]

    @property
    def out_features(self) -> int:
        return self.up.shape[1]

    @property
    def r(self) -> int:
        return self.up.shape[2]

    @property
    def basis_dim(self) -> int:
        return self.basis.shape[0]

    @property
    def in_features(self) -> int:
        return self.basis.shape[1]
