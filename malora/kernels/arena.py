"""Ranges of one memory of fixed size: who has which bytes of it.

Bookkeeping alone: ranges are offsets, the memory itself is somebody else's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable

ALIGNMENT = 64
"""Bytes. Every range starts at a multiple of it, as torch's own memory does, so that kernels may
read 16 bytes at a time."""


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to a multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Arena:
    """Hands out ranges of `capacity` bytes: the smallest hole that fits. Holes merge."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self.used = 0
        """Bytes in ranges, their alignment included."""
        self._ranges: dict[int, int] = {}
        # The holes in order: where each starts, and how long it is.
        self._starts = [0] if self.capacity else []
        self._holes = [self.capacity] if self.capacity else []

    def allocate(self, nbytes: int) -> int | None:
        """The start of a new range of at least `nbytes`; None where no hole is as large."""
        size = aligned(nbytes)
        if size <= 0:
            raise ValueError(f"a range has a positive number of bytes, not {nbytes}")
        best = -1
        for index, hole in enumerate(self._holes):
            if hole >= size and (best < 0 or hole < self._holes[best]):
                best = index
        if best < 0:
            return None
        start = self._starts[best]
        if self._holes[best] == size:
            del self._starts[best], self._holes[best]
        else:
            self._starts[best] += size
            self._holes[best] -= size
        self._ranges[start] = size
        self.used += size
        return start

    def free(self, start: int) -> int:
        """Give back the range that starts there; its size. KeyError where there is none."""
        size = freed = self._ranges.pop(start)
        self.used -= size
        index = bisect_left(self._starts, start)
        if index < len(self._starts) and start + size == self._starts[index]:
            size += self._holes[index]
            del self._starts[index], self._holes[index]
        if index > 0 and self._starts[index - 1] + self._holes[index - 1] == start:
            self._holes[index - 1] += size
        else:
            self._starts.insert(index, start)
            self._holes.insert(index, size)
        return freed

    def fits(self, sizes: Iterable[int], without: Collection[int] = ()) -> bool:
        """Whether ranges of these sizes would all be found, once those in `without` are freed."""
        trial = Arena(0)
        trial.capacity = self.capacity
        trial._ranges, trial.used = dict(self._ranges), self.used
        trial._starts, trial._holes = list(self._starts), list(self._holes)
        for start in without:
            trial.free(start)
        return all(trial.allocate(size) is not None for size in sizes)
