"""Opening an adapter folder that may come from anyone: what is checked before it is believed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from malora.digests import bytes_digest
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
Header = list[tuple[str, str, list[int]]]
"""A weights file's tensors in the order of their values: name, dtype as DTYPES names it, shape."""
_BYTES_AT_A_TIME = 2**20
"""What one thread reads and checks, unless a tensor is larger."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes an adapter's tensors may have, by their names in a safetensors header."""


def threaded_map(num_threads: int) -> Map:
    """`map` in so many threads. Each takes the next item by itself: handing one over costs more
    than reading a small tensor. When it returns or raises, none is at work any more.
    """
    if num_threads == 1:
        return map
    pool = ThreadPoolExecutor(num_threads)

    def run(work: Callable[..., Any], items: Iterable[Any]) -> Iterable[Any]:
        items = list(items)
        results: list[Any] = [None] * len(items)
        indices = iter(range(len(items)))

        def take() -> None:
            try:
                for index in indices:
                    results[index] = work(items[index])
            finally:  # where it failed, the others stop as well
                for _ in indices:
                    pass

        threads = [pool.submit(take) for _ in range(num_threads)]
        wait(threads)
        for thread in threads:
            thread.result()
        return results

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


@dataclass
class _Stretch:
    """Tensors of one dtype that follow each other, in the file as in memory."""

    at: int
    """Where they begin among the file's values."""
    start: int
    """Where they begin in memory."""
    dtype: torch.dtype
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Of each, in bytes."""
    nbytes: int = 0
    values: Tensor = field(init=False)
    """All of them, in memory."""


class Weights:
    """The tensors of a weights file, in one memory, and the file that is open to fill them."""

    file: BinaryIO
    start: int
    """Of the values in the file."""

    def __init__(self, header: Header, memory: Tensor) -> None:
        """header: checked by safetensors. memory: to be used, where it is large enough."""
        self.header = header
        self._stretches: list[_Stretch] = []
        last = _Stretch(0, 0, torch.uint8)
        # Values follow each other without gaps, as safetensors sees to.
        for name, dtype_name, shape in header:
            dtype = DTYPES.get(dtype_name)
            if dtype is None:
                raise AdapterFormatError(
                    "adapter_dtype_unsupported",
                    f"Tensor {name} is {dtype_name}, but an adapter's tensors are "
                    f"{', '.join(DTYPES)}: save it in one of these.",
                )
            if 0 in shape:
                raise AdapterFormatError(
                    "adapter_shape_mismatch",
                    f"Tensor {name} has shape {tuple(shape)}, but none of an adapter's is empty.",
                )
            if last.dtype != dtype or last.nbytes >= _BYTES_AT_A_TIME:
                last = _Stretch(last.at + last.nbytes, aligned(last.start + last.nbytes), dtype)
                self._stretches.append(last)
            size = math.prod(shape) * dtype.itemsize
            last.names.append(name)
            last.sizes.append(size)
            last.nbytes += size
        nbytes = last.start + last.nbytes
        self.memory = memory if len(memory) >= nbytes else torch.empty(nbytes, dtype=torch.uint8)
        shapes = {name: shape for name, _, shape in header}
        tensors = {}
        for stretch in self._stretches:
            counts = [size // stretch.dtype.itemsize for size in stretch.sizes]
            memory = self.memory[stretch.start :][: stretch.nbytes]
            stretch.values = memory.view(stretch.dtype)
            parts = stretch.values.split_with_sizes(counts)
            for name, of_tensor in zip(stretch.names, parts, strict=True):
                tensors[name] = of_tensor.view(shapes[name])
        self.tensors = {name: tensors[name] for name in sorted(tensors)}
        """On the CPU, independent of the file, and without values until `read`."""

    def read(self, map: Map = map) -> dict[int, str]:
        """Read all values, and check that they are finite.

        They are read, not mapped: faster by what the many pages cost, and a file that is cut short
        meanwhile is an error instead of a signal.

        Returns the digests of the tensors' values, by where these lie (`data_ptr`).
        """
        data = self.memory.numpy().data
        address = self.memory.data_ptr()

        def read(stretch: _Stretch) -> list[tuple[int, str]]:
            # Every value is read, checked and digested while the core has it in its cache.
            start = stretch.start
            stop = start + stretch.nbytes
            _read_into(data[start:stop], self.file.fileno(), self.start + stretch.at)
            if not _is_finite(stretch.values):
                raise self._not_finite(stretch.names)
            digests = []
            for size in stretch.sizes:
                digests.append((address + start, bytes_digest(data[start : start + size])))
                start += size
            return digests

        return dict(chain.from_iterable(map(read, self._stretches)))

    def _not_finite(self, names: list[str]) -> AdapterFormatError:
        name = next(name for name in names if not _is_finite(self.tensors[name]))
        return AdapterFormatError(
            "adapter_not_finite",
            f"Tensor {name} holds NaN or infinity: the adapter's training diverged, or its file "
            "is damaged.",
        )


def _read_into(memory: memoryview, fd: int, start: int) -> None:
    """Fill this from a file."""
    while memory:
        count = os.preadv(fd, [memory], start)
        if count == 0:
            raise AdapterFormatError(
                "adapter_file_invalid", f"{WEIGHTS_NAME} is shorter than its header says."
            )
        start += count
        memory = memory[count:]


def _is_finite(tensor: Tensor) -> bool:
    # NaN among the values is both the least and the greatest.
    return all(math.isfinite(extreme) for extreme in tensor.aminmax())


@contextmanager
def open_weights(
    folder: Path, max_bytes: int = MAX_WEIGHTS_BYTES, last: Weights | None = None
) -> Iterator[Weights]:
    """Open the folder's weights, reading no more than the header.

    last: others, which nobody reads any more. Their memory is used again, and they themselves where
    the header says the same.

    Raises AdapterFormatError: adapter_not_found, adapter_file_missing, adapter_file_unsafe,
    adapter_file_invalid, adapter_too_large, adapter_dtype_unsupported, adapter_shape_mismatch;
    later adapter_not_finite.
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
                slices = [(name, handle.get_slice(name)) for name in handle.offset_keys()]
                header = [(name, each.get_dtype(), each.get_shape()) for name, each in slices]
            if last is None:
                weights = Weights(header, torch.empty(0, dtype=torch.uint8))
            elif last.header == header:
                weights = last
            else:
                weights = Weights(header, last.memory)
            weights.file, weights.start = raw, 8 + header_bytes
            yield weights
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
