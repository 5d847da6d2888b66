"""Quantised base models: torchao's tensors as the weights of the decoder layers' linears.

They are quantised as they are read (`--quantization`), or come from a checkpoint that torchao made.
Whatever is quantised with a token's activations is scaled by that token alone: a scale that covered
the batch would let a request's result depend on its neighbours.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import ScalingType
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PretrainedConfig, TorchAoConfig

Quantization = Literal["fp8", "int8"]

FLOAT8 = torch.float8_e4m3fn
FLOAT8_GPUS = "an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper)"
LARGEST = torch.finfo(FLOAT8).max
CPU_HAS_PRODUCT = torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU")
"""torch 2.11 multiplies float8 rows on GPUs alone."""
SMALLEST_ROW = 1e-12
"""What a row of activations is taken to reach at least: a row of zeros has no scale."""


def quantizer(
    quantization: Quantization, dtype: torch.dtype, device: torch.device
) -> TorchAoConfig:
    """What transformers' loading takes to quantise every linear but the head.

    Raises ValueError where it cannot be on this device, in this dtype or without torchao.
    """
    _require_torchao(f"--quantization {quantization}")
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
    )

    check_dtype(dtype)
    if quantization == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    if device.type != "cuda" or not _has_float8(device):
        raise ValueError(f"--quantization fp8 needs {FLOAT8_GPUS}; int8 runs anywhere")
    if dtype != torch.bfloat16:
        raise ValueError("--quantization fp8 needs --dtype bfloat16")
    return TorchAoConfig(
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    )


def is_quantised(config: PretrainedConfig) -> bool:
    """Whether a checkpoint is quantised already. Raises ValueError where it cannot be served."""
    made: Any = getattr(config, "quantization_config", None)
    if made is None:
        return False
    method = made.get("quant_method") if isinstance(made, dict) else made.quant_method
    if method != "torchao":
        raise ValueError(
            f"the base model is quantised by {method}, which is not served: take a checkpoint that "
            "torchao quantised, or the original with --quantization"
        )
    _require_torchao("this base model")
    return True


def _require_torchao(what: str) -> None:
    if find_spec("torchao") is None:
        raise ValueError(f"{what} needs torchao: pip install 'malora[quantization]'")


def _has_float8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


def check_dtype(dtype: torch.dtype) -> None:
    """Raises ValueError for the dtype whose range the sums of quantised products pass."""
    if dtype == torch.float16:
        raise ValueError("a quantised base model computes in bfloat16 or float32, not float16")


def check_weight(path: str, weight: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError for a quantised weight that cannot be served: in this dtype, on its device,
    or because activations would be scaled over the whole batch.
    """
    if not is_traceable_wrapper_subclass(weight):
        return
    check_dtype(dtype)
    dynamic: Any = getattr(weight, "act_quant_kwargs", None)
    if dynamic is None or getattr(weight, "act_quant_scale", None) is not None:
        return
    from torchao.quantization import Float8Tensor, PerRow

    if isinstance(weight, Float8Tensor) and weight.is_cuda:
        if not _has_float8(weight.device):
            raise ValueError(f"the base model is quantised to float8, which needs {FLOAT8_GPUS}")
        if dtype != torch.bfloat16:
            raise ValueError("a base model in float8 needs --dtype bfloat16 on a GPU")
    if not isinstance(dynamic.granularity, PerRow):
        raise ValueError(
            f"the base model's {path} scales its activations by {dynamic.granularity}: requests "
            "would change their neighbours' results; quantise it with granularity=PerRow()"
        )


def num_bytes(tensor: Tensor) -> int:
    """The bytes that a tensor takes; a quantised one's are its parts'."""
    return sum(part.nbytes for part in _parts(tensor).values())


def _parts(tensor: Tensor) -> dict[str, Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        return {"": tensor}
    names, _ = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}


def _traits(weight: Tensor) -> Any:
    """What weights must have in common to become one: all but their rows."""
    if not is_traceable_wrapper_subclass(weight):
        return weight.dtype
    by_row = all(part.shape[:1] == weight.shape[:1] for part in _parts(weight).values())
    return type(weight), weight.__tensor_flatten__(), None if by_row else id(weight)


def can_stack(weights: list[Tensor]) -> bool:
    """Whether `stack` takes these: of one kind, and with nothing that several rows share."""
    return all(_traits(weight) == _traits(weights[0]) for weight in weights)


def stack(weights: list[Tensor]) -> Tensor:
    """(m₁ + m₂ + …, n): the rows of weights (mᵢ, n), one after the other."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if not is_traceable_wrapper_subclass(first):
        return torch.cat(weights)
    parts = {name: torch.cat([getattr(w, name) for w in weights]) for name in _parts(first)}
    _, attributes = first.__tensor_flatten__()
    shape = torch.Size([sum(len(w) for w in weights), first.shape[1]])
    whole: Tensor = type(first).__tensor_unflatten__(parts, attributes, shape, first.stride())
    return whole


class Float8Weight:
    """A weight of float8 rows, for activations quantised by rows too.

    values: (m, n) float8. scales: (m, 1) float32.
    """

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        self.values, self.scales = values, scales
        # torchao divides a row by its scale; where that is zero, so is the row.
        values.view(torch.uint8).masked_fill_(scales == 0, 0)

    @classmethod
    def of(cls, weight: Tensor) -> Float8Weight | None:
        """The weight of torchao's, where it is one of these."""
        if getattr(weight, "act_quant_kwargs", None) is None:
            return None
        from torchao.quantization import Float8Tensor

        return cls(weight.qdata, weight.scale) if isinstance(weight, Float8Tensor) else None

    def product(self, x: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(…, m) of what `quantise_rows` made of activations (…, n)."""
        if not (x.is_cuda or CPU_HAS_PRODUCT):
            weight = self.values.to(dtype) * self.scales.to(dtype)
            return F.linear(x.to(dtype) * scales.to(dtype), weight, bias)
        out = F.scaled_mm(
            x.reshape(-1, x.shape[-1]),
            self.values.t(),
            scales.reshape(-1, 1),
            ScalingType.RowWise,
            self.scales.t(),
            ScalingType.RowWise,
            bias=bias,
            output_dtype=dtype,
            use_fast_accum=True,
        )
        return out.view(*x.shape[:-1], out.shape[-1])


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations (…, n) as float8, and each row's scale, (…, 1) float32."""
    scales = x.abs().amax(-1, keepdim=True).float().clamp(min=SMALLEST_ROW) / LARGEST
    return (x.float() / scales).to(FLOAT8), scales
