"""An adapter in memory and on disk: what the kernels, the server and the converters share.

On disk it is a folder shaped as PEFT shapes it: `adapter_config.json` and
`adapter_model.safetensors`. Folders come from strangers, so everything a header says is checked
before any value is read, and nothing but safetensors is ever read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save_file
from torch import Tensor

from malora.basis import BASIS_NAME, PEFT_PREFIX, basis_digest
from malora.config import LinearShape, MaloraConfig, RouterInput
from malora.digests import bytes_digest, content_key, values_digest
from malora.files import Map, Weights, open_weights, read_config
from malora.limits import CONFIG_NAME, MAX_WEIGHTS_BYTES, WEIGHTS_NAME, AdapterFormatError
from malora.spec import BaseModelSpec

__all__ = [
    "AdaptedLinear",
    "Adapter",
    "AdapterFormatError",
    "BaseModelSpec",
    "OpenAdapter",
    "RouterInput",
    "load_adapter",
    "open_adapter",
    "save_adapter",
    "write_adapter",
]

MAX_RANK = 1024
MAX_EXPERTS = 256


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

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors, by the names that follow the module path in a saved adapter."""
        named = {
            BASIS_NAME: self.basis,
            "malora_coefficients": self.coefficients,
            "malora_router": self.router,
            "malora_up": self.up,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True)
class Adapter:
    """A whole adapter. Make one with `load_adapter` or `Adapter.of`.

    linears: by module path in the base model ("model.layers.0.self_attn.q_proj").
    digest: BLAKE3, in hex, of all that decides the adapter's outputs: paths, shapes, dtypes, bytes,
    top_k, scaling and router_input. The same weights under another name have the same digest.
    basis_keys: `content_key` of each linear's basis, by path.
    """

    config: MaloraConfig
    linears: dict[str, AdaptedLinear]
    digest: str
    basis_keys: dict[str, str]
    num_parameters: int
    num_bytes: int

    @classmethod
    def of(
        cls,
        config: MaloraConfig,
        linears: Mapping[str, AdaptedLinear],
        digest_of: Callable[[Tensor], str] = values_digest,
    ) -> Adapter:
        """The adapter that these linears make; reads every byte, where digests are not known."""
        lines = []
        basis_keys = {}
        num_parameters = num_bytes = 0
        for path in sorted(linears):
            linear = linears[path]
            lines.append(f"{path} {linear.top_k} {linear.scaling!r} {linear.router_input}")
            for name, tensor in linear.tensors().items():
                content = content_key(tensor, digest_of(tensor))
                lines.append(f"{name} {content}")
                if name == BASIS_NAME:
                    basis_keys[path] = content
                num_parameters += tensor.numel()
                num_bytes += tensor.nbytes
        digest = bytes_digest("\n".join(lines).encode())
        return cls(config, dict(linears), digest, basis_keys, num_parameters, num_bytes)


class OpenAdapter:
    """An adapter's files, opened: the sizes in their headers are checked, the values not read."""

    def __init__(
        self, document: Mapping[str, Any], weights: Weights, base: BaseModelSpec | None
    ) -> None:
        """Use `open_adapter`."""
        self.weights = weights
        self._of = (weights, repr(document), base)
        self._config, self.linears = _interpret(document, weights.tensors)
        """By path, of tensors without values."""
        check_adapter(self._config, self.linears, base)
        self._verified: Mapping[str, str] | None = None
        """`Adapter.basis_keys` of the bases last found to be those of the configuration."""

    def is_of(
        self, document: Mapping[str, Any], weights: Weights, base: BaseModelSpec | None
    ) -> bool:
        """Whether another one of these would be the same, and pass the same checks."""
        return self._of == (weights, repr(document), base)

    def read(self, map: Map = map) -> Adapter:
        """The adapter on the CPU, in the dtypes it was saved in, independent of the file.

        Raises AdapterFormatError: adapter_file_invalid, adapter_not_finite, adapter_basis_mismatch.
        """
        digests = self.weights.read(map)
        adapter = Adapter.of(self._config, self.linears, lambda tensor: digests[tensor.data_ptr()])
        expected = self._config.basis_digest
        if expected is not None and adapter.basis_keys != self._verified:
            bases = {path: linear.basis for path, linear in self.linears.items()}
            if basis_digest(bases, map) != expected:
                raise AdapterFormatError(
                    "adapter_basis_mismatch",
                    f"Field basis_digest of {CONFIG_NAME} does not belong to the basis in "
                    f"{WEIGHTS_NAME}: the two files come from different adapters.",
                )
            self._verified = adapter.basis_keys
        return adapter


def load_adapter(
    folder: str | os.PathLike[str],
    base: BaseModelSpec | None = None,
    *,
    max_bytes: int = MAX_WEIGHTS_BYTES,
) -> Adapter:
    """Read an adapter folder: MALORA, or LORA as PEFT itself saves it.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        base: the model it is to run on; None checks the adapter against itself alone.
        max_bytes: the largest weights file to accept.

    Returns:
        The adapter on the CPU, in the dtypes it was saved in, independent of the file.

    Raises AdapterFormatError, its code one of adapter_not_found, adapter_config_invalid,
    adapter_type_unsupported, adapter_file_missing, adapter_file_unsafe, adapter_file_invalid,
    adapter_too_large, adapter_rank_too_large, adapter_too_many_experts, adapter_tensor_missing,
    adapter_tensor_unexpected, adapter_shape_mismatch, adapter_dtype_unsupported,
    adapter_base_mismatch, adapter_not_finite, adapter_basis_mismatch.
    """
    with open_adapter(folder, base, max_bytes=max_bytes) as adapter:
        return adapter.read()


@contextmanager
def open_adapter(
    folder: str | os.PathLike[str],
    base: BaseModelSpec | None = None,
    *,
    max_bytes: int = MAX_WEIGHTS_BYTES,
    last: OpenAdapter | None = None,
) -> Iterator[OpenAdapter]:
    """Open an adapter folder and check it as far as its headers go; as `load_adapter`.

    last: another one, which nobody uses any more. Its memory is used again, and it itself where the
    headers and configurations are the same: many adapters are, but for their values.
    """
    folder = Path(folder)
    document = read_config(folder)
    with open_weights(folder, max_bytes, None if last is None else last.weights) as weights:
        if last is None or not last.is_of(document, weights, base):
            last = OpenAdapter(document, weights, base)
        yield last


def save_adapter(adapter: Adapter, folder: str | os.PathLike[str]) -> None:
    """Write a MALORA folder that `load_adapter` and `PeftModel.from_pretrained` both read."""
    tensors = {
        f"{PEFT_PREFIX}{path}.{name}": tensor.detach().cpu().contiguous()
        for path, linear in adapter.linears.items()
        for name, tensor in linear.tensors().items()
    }
    document = adapter.config.to_dict()
    document["basis_digest"] = basis_digest(
        {path: linear.basis for path, linear in adapter.linears.items()}
    )
    write_adapter(folder, document, tensors)


def write_adapter(
    folder: str | os.PathLike[str], document: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write an adapter's two files, as PEFT names them.

    Makes the folder if need be. The weights are complete before they take their final name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{WEIGHTS_NAME}.partial"
    save_file(dict(tensors), partial, metadata={"format": "pt"})
    partial.replace(folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def _interpret(
    document: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[MaloraConfig, dict[str, AdaptedLinear]]:
    if document["peft_type"] == "MALORA":
        config = config_of(document)
        return config, linears_of(config, tensors)
    if document["peft_type"] == "LORA":
        from malora.convert import from_lora  # which builds on this module

        return from_lora(document, tensors)
    raise AdapterFormatError(
        "adapter_type_unsupported",
        f"Field peft_type of {CONFIG_NAME} is {document['peft_type']!r}, but only MALORA and LORA "
        "adapters can be used: try malora convert.",
    )


def config_of(document: Mapping[str, Any]) -> MaloraConfig:
    # Fields this version does not know are ignored, as PEFT ignores them.
    known = {field.name for field in fields(MaloraConfig)} - {"basis_path"}
    try:
        return MaloraConfig(**{name: document[name] for name in known & document.keys()})
    except (ValueError, TypeError) as error:
        raise AdapterFormatError("adapter_config_invalid", f"{CONFIG_NAME}: {error}") from error


def linears_of(config: MaloraConfig, tensors: Mapping[str, Tensor]) -> dict[str, AdaptedLinear]:
    """Put the tensors of a MALORA file together, by module path.

    Raises AdapterFormatError: adapter_tensor_missing, adapter_tensor_unexpected.
    """
    wanted = {BASIS_NAME, "malora_up"}
    if config.coefficients == "learned":
        wanted.add("malora_coefficients")
    if config.num_experts > 1:
        wanted.add("malora_router")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, part = name.removeprefix(PEFT_PREFIX).rpartition(".")
        if not name.startswith(PEFT_PREFIX) or not path or part not in wanted:
            raise AdapterFormatError(
                "adapter_tensor_unexpected",
                f"Tensor {name} does not belong in this adapter: expected "
                f"{PEFT_PREFIX}<module path>. with {', '.join(sorted(wanted))}.",
            )
        parts.setdefault(path, {})[part] = tensor
    linears = {}
    for path, found in parts.items():
        for part in sorted(wanted - found.keys()):
            raise AdapterFormatError(
                "adapter_tensor_missing", f"Tensor {PEFT_PREFIX}{path}.{part} is missing."
            )
        linears[path] = AdaptedLinear(
            basis=found[BASIS_NAME],
            up=found["malora_up"],
            coefficients=found.get("malora_coefficients"),
            router=found.get("malora_router"),
            router_input=config.router_input,
            top_k=config.top_k,
            scaling=shape_of(config, path).scaling,
        )
    return linears


def check_adapter(
    config: MaloraConfig, linears: Mapping[str, AdaptedLinear], base: BaseModelSpec | None
) -> None:
    """Check sizes against the configuration, the limits and the base model; needs no values.

    Raises AdapterFormatError: adapter_rank_too_large, adapter_too_many_experts,
    adapter_tensor_missing, adapter_shape_mismatch, adapter_base_mismatch.
    """
    rank = max([config.r, *config.rank_pattern.values()])
    if rank > MAX_RANK:
        raise AdapterFormatError(
            "adapter_rank_too_large",
            f"The adapter's rank r is {rank}, but at most {MAX_RANK} is served.",
        )
    if config.num_experts > MAX_EXPERTS:
        raise AdapterFormatError(
            "adapter_too_many_experts",
            f"Field num_experts is {config.num_experts}, but at most {MAX_EXPERTS} are served.",
        )
    if not linears:
        raise AdapterFormatError(
            "adapter_tensor_missing", f"{WEIGHTS_NAME} holds no adapted linear."
        )
    for path, linear in linears.items():
        _check_shapes(config, path, linear)
    if base is not None:
        _check_base(config, linears, base)


def _check_shapes(config: MaloraConfig, path: str, linear: AdaptedLinear) -> None:
    shape = shape_of(config, path)
    n, m = linear.basis.shape[-1:], linear.up.shape[1:2]
    experts, r, d = config.num_experts, shape.r, shape.basis_dim
    expected = {
        BASIS_NAME: (d, *n),
        "malora_up": (experts, *m, r),
        "malora_coefficients": (experts, r, d),
        "malora_router": (experts, *n) if config.router_input == "hidden" else (experts, d),
    }
    for name, tensor in linear.tensors().items():
        if tuple(tensor.shape) != expected[name]:
            raise AdapterFormatError(
                "adapter_shape_mismatch",
                f"Tensor {path}.{name} has shape {tuple(tensor.shape)}, but {CONFIG_NAME} "
                f"makes it {expected[name]}.",
            )


def _check_base(
    config: MaloraConfig, linears: Mapping[str, AdaptedLinear], base: BaseModelSpec
) -> None:
    if config.base_model_fingerprint not in (None, base.fingerprint):
        raise AdapterFormatError(
            "adapter_base_mismatch",
            "Field base_model_fingerprint names another base model than the one served: the "
            "adapter was trained on other weights, so its results would be meaningless.",
        )
    for path, linear in linears.items():
        if path not in base.linears:
            raise AdapterFormatError(
                "adapter_base_mismatch",
                f"The adapter adapts {path}, but the base model has no such linear.",
            )
        if (linear.in_features, linear.out_features) != base.linears[path]:
            raise AdapterFormatError(
                "adapter_base_mismatch",
                f"The adapter's {path} maps {linear.in_features} to {linear.out_features} "
                f"features, but the base model's maps {base.linears[path][0]} to "
                f"{base.linears[path][1]}.",
            )
    if config.target_modules is None:
        return
    for path in base.linears:
        if path not in linears and _targets(config, path):
            raise AdapterFormatError(
                "adapter_tensor_missing",
                f"Field target_modules names {path}, but {WEIGHTS_NAME} has no tensors for it.",
            )


def _targets(config: MaloraConfig, path: str) -> bool:
    try:
        return bool(check_target_module_exists(config, path))
    except re.error as error:
        raise AdapterFormatError(
            "adapter_config_invalid",
            f"Field target_modules or exclude_modules is a malformed expression: {error}.",
        ) from error


def shape_of(config: MaloraConfig, path: str) -> LinearShape:
    """`config.shape_of(path)` for a configuration from a file, whose patterns may be malformed."""
    try:
        return config.shape_of(path)
    except re.error as error:
        raise AdapterFormatError(
            "adapter_config_invalid",
            f"Field rank_pattern or alpha_pattern holds a malformed expression: {error}.",
        ) from error
