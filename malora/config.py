"""The configuration of one adapter, as PEFT keeps it and as `adapter_config.json` holds it."""

from __future__ import annotations

import importlib
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from malora.basis import basis_digest, load_basis

RouterInput = Literal["hidden", "basis"]

Coefficients = Literal["learned", "identity", "block"]

DEFAULT_TARGET_MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "qkv_proj",
    "gate_up_proj",
)
"""What is adapted where `target_modules` is not given: those of these that the model has."""


@dataclass(frozen=True)
class LinearShape:
    """The sizes one adapted linear takes from the configuration (see `MaloraConfig.shape_of`)."""

    r: int
    basis_dim: int
    scaling: float


@dataclass
class MaloraConfig(PeftConfig):
    """Configures y = W0 x + scaling · Σ_t g_t(x) · up_t P_t basis x on every targeted linear.

    One form covers a family: LoRA is `num_experts=1, coefficients="identity", basis_dim=r`;
    HydraLoRA is `coefficients="identity", basis_dim=r, top_k=num_experts`; MoLoRA is
    `coefficients="block", basis_dim=num_experts * r`; MALoRA is `coefficients="learned"`.

    Attributes:
        r: rank of each expert.
        num_experts: N. With 1 there is no router and the gate is 1.
        top_k: experts each token takes; num_experts means a dense softmax.
        basis_dim: d, rows of the shared basis (≥ r: a product's rank is at most min(d, r)).
        lora_alpha, use_rslora: scaling is alpha / r, or alpha / √r with use_rslora.
        lora_dropout: dropout on the input of the basis; a "hidden" router reads the input whole.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, rank_pattern,
            alpha_pattern: as in PEFT's LoRA. None targets `DEFAULT_TARGET_MODULES`.
        coefficients: "learned", or what P_t is where it is not stored: "identity" or "block".
        router_input: "hidden" routes on the linear's input x, "basis" on basis · x.
        router_aux_loss_coef: weight of the load-balancing loss in training.
        init_basis: how a learned adapter's basis starts: random orthonormal rows, or the leading
            right singular vectors of stacked Kaiming draws.
        freeze_basis: keep the basis as it is in training.
        basis_path: an adapter folder, or a .safetensors file of bases, whose basis is loaded and
            frozen when the adapter is created; never saved.
        basis_digest: digest of the basis, filled in when the adapter is saved.
        base_model_fingerprint: filled in when the adapter is put on a model; where it is already
            set, another base model is refused.

    Raises ValueError, in one sentence, for values that make no adapter.
    """

    r: int = 8
    num_experts: int = 8
    top_k: int = 2
    basis_dim: int = 64
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    coefficients: Coefficients = "learned"
    router_input: RouterInput = "hidden"
    router_aux_loss_coef: float = 0.01
    init_basis: Literal["orthonormal", "svd"] = "orthonormal"
    freeze_basis: bool = False
    basis_path: str | None = None
    basis_digest: str | None = None
    base_model_fingerprint: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # A configuration is of no use before PEFT knows the method.
        importlib.import_module("malora.tuner")
        self.peft_type = PeftType("MALORA")
        self._check_types()
        self._check_values()
        if self.basis_path is not None:
            self.freeze_basis = True
        # PEFT matches names against sets; JSON knows lists alone.
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    def to_dict(self) -> dict[str, Any]:
        """The configuration without what belongs to this machine alone (`basis_path`)."""
        fields = asdict(self)
        del fields["basis_path"]
        # A set's order changes from run to run; a saved file should not.
        return {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, with the digest of the basis that lies beside it.

        PEFT writes an adapter's weights first, so they are there to be read.
        """
        try:
            self.basis_digest = basis_digest(load_basis(save_directory))
        except ValueError:
            self.basis_digest = None  # the configuration is saved by itself
        super().save_pretrained(save_directory, **kwargs)

    def shape_of(self, module_path: str) -> LinearShape:
        """The rank, basis rows and scaling of the linear at `module_path` of the base model.

        `rank_pattern` and `alpha_pattern` follow PEFT: a key matches the end of the path.
        """
        r, alpha = self.r, self.lora_alpha
        if self.rank_pattern:
            r = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module_path), r)
        if self.alpha_pattern:
            key = get_pattern_key(list(self.alpha_pattern), module_path)
            alpha = self.alpha_pattern.get(key, alpha)
        basis_dim = {
            "identity": r,
            "block": self.num_experts * r,
            "learned": self.basis_dim,
        }[self.coefficients]
        return LinearShape(r, basis_dim, alpha / (math.sqrt(r) if self.use_rslora else r))

    def _check_types(self) -> None:
        for name in ("r", "num_experts", "top_k", "basis_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}.")
        for name in ("lora_alpha", "lora_dropout", "router_aux_loss_coef"):
            if not _is_finite_number(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, not {getattr(self, name)!r}.")
        for name in ("use_rslora", "freeze_basis"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}.")
        for name in ("basis_path", "basis_digest", "base_model_fingerprint"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} must be a string, not {getattr(self, name)!r}.")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            names = value if isinstance(value, list | set) else [] if value is None else [value]
            if not all(isinstance(item, str) for item in names):
                raise ValueError(f"{name} must be a string or a list of strings, not {value!r}.")
        layers = self.layers_to_transform
        for layer in layers if isinstance(layers, list) else [layers or 0]:
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise ValueError(f"layers_to_transform must hold layer indices, not {layers!r}.")
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if not isinstance(value, dict) or not all(
                isinstance(key, str) and _is_finite_number(number) for key, number in value.items()
            ):
                raise ValueError(f"{name} must map module names to numbers, not {value!r}.")

    def _check_values(self) -> None:
        choices = {
            "coefficients": ("learned", "identity", "block"),
            "router_input": ("hidden", "basis"),
            "init_basis": ("orthonormal", "svd"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}."
                )
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k must lie in 1..num_experts, but it is {self.top_k} of {self.num_experts}."
            )
        if self.coefficients == "identity" and self.basis_dim != self.r:
            raise ValueError(
                f'coefficients="identity" needs basis_dim == r, but basis_dim is '
                f"{self.basis_dim} and r is {self.r}."
            )
        if self.coefficients == "block" and self.basis_dim != self.num_experts * self.r:
            raise ValueError(
                f'coefficients="block" needs basis_dim == num_experts * r, which is '
                f"{self.num_experts * self.r}, but basis_dim is {self.basis_dim}."
            )
        for name, rank in self.rank_pattern.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(
                    f"rank_pattern[{name!r}] must be a positive integer, not {rank!r}."
                )
        largest = max([self.r, *self.rank_pattern.values()])
        if self.coefficients == "learned" and self.basis_dim < largest:
            raise ValueError(
                f"basis_dim must be at least the rank, but it is {self.basis_dim} and r is "
                f"{largest}: a narrower basis would cut every expert's rank."
            )
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), not {self.lora_dropout}.")
        if self.router_aux_loss_coef < 0:
            raise ValueError(
                f"router_aux_loss_coef must not be negative, but it is {self.router_aux_loss_coef}."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is set, so layers_to_transform must be set too.")


def _is_finite_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False
