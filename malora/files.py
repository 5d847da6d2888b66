"""Opening an adapter folder that may come from anyone: what is checked before it is believed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from malora.limits import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    MAX_HEADER_BYTES,
    MAX_WEIGHTS_BYTES,
    WEIGHTS_NAME,
    AdapterFormatError,
)

Map = Callable[[Callable[..., Any], Iterable[Any]], Iterable[Any]]
"""`map`, or a thread pool's: how to do the same for each of many tensors."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes an adapter's tensors may have, by their names in a safetensors header."""


def read_config(folder: Path) -> dict[str, Any]:
    """The JSON object in the folder's adapter_config.json.

    Raises AdapterFormatError: adapter_not_found, adapter_config_invalid, adapter_file_missing,
    adapter_file_unsafe.
    """
    file = _file_in(folder, CONFIG_NAME)
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterFormatError(
            "adapter_config_invalid",
            f"{CONFIG_NAME} has more than {MAX_CONFIG_BYTES} bytes, which no configuration needs.",
        )
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise AdapterFormatError(
            "adapter_config_invalid", f"{CONFIG_NAME} is not valid JSON: {reason}."
        ) from error
    if not isinstance(document, dict) or not isinstance(document.get("peft_type"), str):
        raise AdapterFormatError(
            "adapter_config_invalid", f"{CONFIG_NAME} has no field peft_type naming its method."
        )
    return document


class Weights:
    """The folder's adapter_model.safetensors, opened: its header, then its tensors."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def shapes(self) -> dict[str, Tensor]:
        """A tensor without memory (on "meta") for each in the file: names, shapes and dtypes."""
        tensors = {}
        for name in self._handle.keys():  # noqa: SIM118 (the handle is no mapping)
            view = self._handle.get_slice(name)
            if view.get_dtype() not in DTYPES:
                raise AdapterFormatError(
                    "adapter_dtype_unsupported",
                    f"Tensor {name} is {view.get_dtype()}, but an adapter's tensors are "
                    f"{', '.join(DTYPES)}: save it in one of these.",
                )
            dtype = DTYPES[view.get_dtype()]
            tensors[name] = torch.empty(view.get_shape(), dtype=dtype, device="meta")
        return tensors

    def tensors(self, map: Map = map) -> dict[str, Tensor]:
        """All tensors, on the CPU, finite, and independent of the file from here on."""
        names = list(self._handle.keys())
        return dict(zip(names, map(self._read, names), strict=True))

    def _read(self, name: str) -> Tensor:
        # The handle's own tensors are windows into the file, which its owner may overwrite.
        tensor: Tensor = self._handle.get_tensor(name).clone()
        # A finite sum, which is quicker to make, has finite parts alone.
        if not tensor.sum(dtype=torch.float32).isfinite() and not torch.isfinite(tensor).all():
            raise AdapterFormatError(
                "adapter_not_finite",
                f"Tensor {name} holds NaN or infinity: the adapter's training diverged, or "
                "its file is damaged.",
            )
        return tensor


@contextmanager
def open_weights(folder: Path, max_bytes: int = MAX_WEIGHTS_BYTES) -> Iterator[Weights]:
    """Open the folder's weights, reading no more than the header.

    Raises AdapterFormatError: adapter_not_found, adapter_file_missing, adapter_file_unsafe,
    adapter_file_invalid, adapter_too_large; later adapter_dtype_unsupported, adapter_not_finite.
    """
    file = _file_in(folder, WEIGHTS_NAME)
    size = file.stat().st_size
    if size > max_bytes:
        raise AdapterFormatError(
            "adapter_too_large",
            f"{WEIGHTS_NAME} has {size} bytes, but at most {max_bytes} are accepted.",
        )
    try:
        with file.open("rb") as raw:
            header_bytes = int.from_bytes(raw.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise AdapterFormatError(
                "adapter_file_invalid",
                f"The header of {WEIGHTS_NAME} has {header_bytes} bytes, but at most "
                f"{MAX_HEADER_BYTES} are accepted.",
            )
        with safe_open(file, framework="pt") as handle:
            yield Weights(handle)
    except (SafetensorError, OSError) as error:
        raise AdapterFormatError(
            "adapter_file_invalid",
            f"{WEIGHTS_NAME} is not a readable safetensors file: it is damaged or incomplete.",
        ) from error


def _file_in(folder: Path, name: str) -> Path:
    """The path of a plain file in the folder, following no link out of it."""
    if not folder.is_dir():
        raise AdapterFormatError("adapter_not_found", f"There is no adapter folder {folder.name}.")
    root = os.path.realpath(folder)
    file = os.path.realpath(os.path.join(root, name))
    if os.path.commonpath([root, file]) != root:
        raise AdapterFormatError(
            "adapter_file_unsafe",
            f"{name} is a link that leads out of the adapter's folder: put the file itself there.",
        )
    if os.path.isfile(file):
        return Path(file)
    pickled = sorted(
        entry for entry in os.listdir(root) if entry.endswith((".bin", ".pt", ".pth", ".ckpt"))
    )
    if name == WEIGHTS_NAME and pickled:
        raise AdapterFormatError(
            "adapter_file_unsafe",
            f"{pickled[0]} is a pickle, which can run code when it is read: load it where you "
            f"trust it and save its tensors as {WEIGHTS_NAME}.",
        )
    raise AdapterFormatError(
        "adapter_file_missing", f"The adapter folder {folder.name} has no file {name}."
    )
