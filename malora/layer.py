"""The adapted linear layer that PEFT puts in place of an nn.Linear."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from malora import basis as bases
from malora.config import LinearShape, MaloraConfig
from malora.format import AdaptedLinear, RouterInput
from malora.kernels.torch import mix_experts, router_logits
from malora.router import gates

MERGE_REFUSED = (
    "A MALoRA adapter cannot be merged into the base weights, since its gates depend on the token: "
    "keep it beside the model, or serve it with malora serve."
)


@dataclass
class RoutingRecord:
    """Router logits of one training forward, kept for the load-balancing loss.

    Only logits are kept, and only while `active`: whatever a checkpointed layer saves for backward
    must be the same when it is recomputed, and a recomputation must add nothing here.
    """

    active: bool = False
    logits: dict[str, list[Tensor]] = field(default_factory=dict)
    """By adapter: one (tokens, N) a routed linear."""

    def add(self, adapter: str, logits: Tensor) -> None:
        """Keep logits (..., N) of one linear, if a forward is being recorded."""
        if self.active:
            self.logits.setdefault(adapter, []).append(logits.flatten(0, -2))


@dataclass(frozen=True)
class _Settings:
    """What one adapter does on one linear, beside its tensors."""

    top_k: int
    scaling: float
    router_input: RouterInput
    freeze_basis: bool


class MaloraLinear(nn.Module, BaseTunerLayer):
    """An nn.Linear with any number of adapters; the active ones add to its output.

    Parameters by adapter name: malora_basis (d, n), malora_up (N, m, r), malora_coefficients
    (N, r, d) where learned, malora_router (N, n or d) where there are several experts.
    """

    adapter_layer_names = ("malora_basis", "malora_coefficients", "malora_up", "malora_router")
    other_param_names = ("malora_dropout", "settings")

    # PEFT's properties, declared because PEFT has no types.
    active_adapters: list[str]
    disable_adapters: bool

    def __init__(self, base_layer: nn.Linear, record: RoutingRecord) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.record = record
        self.malora_basis = nn.ParameterDict()
        self.malora_coefficients = nn.ParameterDict()
        self.malora_up = nn.ParameterDict()
        self.malora_router = nn.ParameterDict()
        self.malora_dropout = nn.ModuleDict()
        self.settings: dict[str, _Settings] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(
        self,
        adapter: str,
        config: MaloraConfig,
        shape: LinearShape,
        basis: Tensor | None = None,
    ) -> None:
        """Add an adapter, or start it anew.

        Args:
            adapter: its name.
            config: its configuration.
            shape: its sizes on this linear.
            basis: (d, n) to start from; None draws one as the configuration says.

        Raises ValueError where the basis does not fit this linear.
        """
        n_experts = config.num_experts
        if basis is None:
            basis = self._new_basis(config, shape)
        elif tuple(basis.shape) != (shape.basis_dim, self.in_features):
            raise ValueError(
                f"a basis of shape {tuple(basis.shape)} does not fit a linear of "
                f"{self.in_features} inputs with basis_dim {shape.basis_dim}."
            )
        self.settings[adapter] = _Settings(
            config.top_k, shape.scaling, config.router_input, config.freeze_basis
        )
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.malora_dropout[adapter] = dropout
        self.malora_basis[adapter] = nn.Parameter(basis.float())
        self.malora_up[adapter] = nn.Parameter(torch.zeros(n_experts, self.out_features, shape.r))
        if config.coefficients == "learned":
            coefficients = bases.kaiming_coefficients(n_experts, shape.r, basis)
            self.malora_coefficients[adapter] = nn.Parameter(coefficients)
        if n_experts > 1:
            reads = self.in_features if config.router_input == "hidden" else shape.basis_dim
            self.malora_router[adapter] = nn.Parameter(bases.kaiming(n_experts, reads))
        BaseTunerLayer._move_adapter_to_device_of_base_layer(self, adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _new_basis(self, config: MaloraConfig, shape: LinearShape) -> Tensor:
        if config.coefficients != "learned":
            # The basis is the experts' own A here, so it starts as LoRA starts it.
            return bases.kaiming(shape.basis_dim, self.in_features)
        if shape.basis_dim > self.in_features:
            raise ValueError(
                f"basis_dim is {shape.basis_dim}, but a linear of {self.in_features} inputs has "
                f"room for {self.in_features} independent rows: lower basis_dim or exclude it."
            )
        if config.init_basis == "svd":
            return bases.svd_basis(config.num_experts, shape.r, shape.basis_dim, self.in_features)
        return bases.orthonormal_basis(shape.basis_dim, self.in_features)

    def adapted_linear(self, adapter: str, dtype: torch.dtype | None = None) -> AdaptedLinear:
        """Return this layer's share of an adapter: its parameters, cast to `dtype` if given."""

        def tensor(parameters: nn.ParameterDict) -> Tensor | None:
            if adapter not in parameters:
                return None
            parameter = parameters[adapter]
            return parameter if dtype is None else parameter.to(dtype)

        basis, up = tensor(self.malora_basis), tensor(self.malora_up)
        if basis is None or up is None:
            raise KeyError(f"this linear has no adapter named {adapter!r}")
        settings = self.settings[adapter]
        return AdaptedLinear(
            basis=basis,
            up=up,
            coefficients=tensor(self.malora_coefficients),
            router=tensor(self.malora_router),
            router_input=settings.router_input,
            top_k=settings.top_k,
            scaling=settings.scaling,
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., n) → (..., m) in the base layer's output dtype; adapters compute in x's dtype."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for adapter in self.active_adapters:
            if adapter in self.settings:
                result = result + self._delta(x, adapter).to(result.dtype)
        return result

    def _delta(self, x: Tensor, adapter: str) -> Tensor:
        linear = self.adapted_linear(adapter, x.dtype)
        z = nn.functional.linear(self.malora_dropout[adapter](x), linear.basis)
        logits = router_logits(x, z, linear)
        if logits is None:
            return mix_experts(z, None, linear)
        self.record.add(adapter, logits)
        return mix_experts(z, gates(logits, linear.top_k)[0], linear)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Activate adapters as PEFT does, but leave frozen bases frozen."""
        super().set_adapter(*args, **kwargs)
        self._freeze_bases()

    def set_requires_grad(self, *args: Any, **kwargs: Any) -> None:
        """Switch gradients as PEFT does, but leave frozen bases frozen."""
        super().set_requires_grad(*args, **kwargs)
        self._freeze_bases()

    def _freeze_bases(self) -> None:
        for adapter, settings in self.settings.items():
            if settings.freeze_basis:
                self.malora_basis[adapter].requires_grad_(False)

    def merge(self, *_: Any, **__: Any) -> None:
        """Always raises ValueError: there is no one weight that all tokens share."""
        raise ValueError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """Does nothing: nothing is ever merged."""
