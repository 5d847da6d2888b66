"""A forward pass as CUDA graphs with what a graph cannot hold launched in between.

Attention over prompts is launched by how long they are, so its launches differ from step to step;
all else of a step is the same for as many tokens. What lies between two attentions is a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class PiecewiseGraph:
    """Captured by one forward pass within `capture`; replayed whole."""

    def __init__(self, pool: Any) -> None:
        """pool: where temporaries lie, also those of other graphs that replay before or after."""
        self._pool = pool
        self._launches: list[Callable[[], None]] = []

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Capture what is launched within, on a stream of its own."""
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            self._begin()
            try:
                yield
            finally:  # or nothing could be captured, nor allocated, after a failure
                self._end()

    def between(self, launch: Callable[..., None], *tensors: Tensor) -> None:
        """End a graph and begin the next: `launch` is called between their replays, not now.

        tensors: what it is called with, temporaries of the graphs.
        """
        self._end()
        memories = [unowned(tensor) for tensor in tensors]
        self._launches.append(lambda: launch(*memories))
        self._begin()

    def replay(self) -> None:
        """Launch all on the current stream."""
        for launch in self._launches:
            launch()

    def _begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool=self._pool)

    def _end(self) -> None:
        self._graph.capture_end()
        self._launches.append(self._graph.replay)


class _Memory:
    """A tensor's memory, by its address alone."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.itemsize
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
            "typestr": f"<i{size}",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def unowned(tensor: Tensor) -> Tensor:
    """A tensor of a graph's memory, not kept: others of its pool may use it once it was read."""
    return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)
