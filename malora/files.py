"""Opening an adapter folder that may come from anyone: what is checked before it is believed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from malora.kernels.arena import aligned
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
_BYTES_AT_A_TIME = 2 * 2**20
"""What one call reads, unless a tensor is larger."""
_TENSORS_AT_A_TIME = 512
"""The system takes no more than 1,024."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes an adapter's tensors may have, by their names in a safetensors header."""


def threaded_map(num_threads: int) -> Map:
    """`map` in so many threads. Each takes neighbouring items, several at a time: handing one over
    costs more than reading a small tensor.
    """
    if num_threads == 1:
        return map
    pool = ThreadPoolExecutor(num_threads)

    def run(work: Callable[..., Any], items: Iterable[Any]) -> Iterable[Any]:
        items = list(items)
        size = -(-len(items) // (4 * num_threads)) or 1
        parts = [items[i : i + size] for i in range(0, len(items), size)]
        return chain.from_iterable(pool.map(lambda part: [work(item) for item in part], parts))

    return run


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

    def __init__(self, handle: Any, file: BinaryIO, start: int) -> None:
        """handle: safetensors', which has checked the header. start: of the values in the file."""
        self._handle = handle
        self._file = file
        self._start = start

    @cached_property
    def shapes(self) -> dict[str, Tensor]:
        """A tensor without memory (on "meta") for each in the file: names, shapes and dtypes."""
        tensors = {}
        for name in self._handle.keys():  # noqa: SIM118 (the handle is no mapping)
            view = self._handle.get_slice(name)
            dtype = DTYPES.get(view.get_dtype())
            if dtype is None:
                raise AdapterFormatError(
                    "adapter_dtype_unsupported",
                    f"Tensor {name} is {view.get_dtype()}, but an adapter's tensors are "
                    f"{', '.join(DTYPES)}: save it in one of these.",
                )
            tensors[name] = torch.empty(view.get_shape(), dtype=dtype, device="meta")
        return tensors

    def tensors(self, map: Map = map) -> dict[str, Tensor]:
        """All tensors, on the CPU, finite, and independent of the file from here on.

        They are read, not mapped, into one memory: faster by what the many pages cost, and a file
        that is cut short meanwhile is an error instead of a signal.
        """
        sizes = {name: meta.nbytes for name, meta in self.shapes.items()}
        memory = torch.empty(sum(map(aligned, sizes.values())), dtype=torch.uint8)
        data = memory.numpy().data
        tensors = {}
        groups: list[_Group] = []
        at, left, start = self._start, 0, 0
        # Values follow each other without gaps, as safetensors sees to.
        for name in self._handle.offset_keys():
            meta, size = self.shapes[name], sizes[name]
            tensors[name] = memory[start : start + size].view(meta.dtype).view(meta.shape)
            if left <= 0 or len(groups[-1].names) == _TENSORS_AT_A_TIME:
                groups.append(_Group(at, [], []))
                left = _BYTES_AT_A_TIME
            groups[-1].names.append(name)
            groups[-1].parts.append(data[start : start + size])
            at += size
            left -= size
            start += aligned(size)

        def read(group: _Group) -> None:
            _read_into(group.parts, self._file.fileno(), group.at)
            for name in group.names:
                _check_finite(name, tensors[name])

        for _ in map(read, groups):
            pass
        return tensors


class _Group(NamedTuple):
    """Tensors that follow each other in a file from `at` on, and where they are read to."""

    at: int
    names: list[str]
    parts: list[memoryview]


def _read_into(parts: list[memoryview], fd: int, start: int) -> None:
    """Fill these from what follows each other in a file."""
    parts = [part for part in parts if len(part)]
    while parts:
        count = os.preadv(fd, parts, start)
        if count == 0:
            raise AdapterFormatError(
                "adapter_file_invalid", f"{WEIGHTS_NAME} is shorter than its header says."
            )
        start += count
        while parts and count >= len(parts[0]):
            count -= len(parts.pop(0))
        if count:
            parts[0] = parts[0][count:]


def _check_finite(name: str, tensor: Tensor) -> None:
    # A finite sum, which is quicker to make, has finite parts alone.
    total = float(tensor.sum(dtype=torch.float32))
    if not math.isfinite(total) and not torch.isfinite(tensor).all():
        raise AdapterFormatError(
            "adapter_not_finite",
            f"Tensor {name} holds NaN or infinity: the adapter's training diverged, or its file "
            "is damaged.",
        )


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
                yield Weights(handle, raw, 8 + header_bytes)
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
