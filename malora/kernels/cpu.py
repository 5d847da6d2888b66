"""Tokens of a mixed batch on the CPU: each with its own adapter, read where it lies.

A decode step is bound by the bytes of the adapters' rows, so each token reads the rows that it
needs once, in long stretches, whatever its batch mates are. Threads take tokens in turn and write
to nothing that another one reads: one parallel region a group of linears, and a result that does
not depend on the batch. Compiled by numba on first use, and kept in its cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, njit, prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch.nn import functional as F

from malora.kernels.batched import BaseProduct, Routing, Run
from malora.kernels.long_runs import LongRuns, long_runs
from malora.kernels.packed import row_length
from malora.kernels.resident import FIELDS, Group

logger = logging.getLogger(__name__)

# The threads that torch computes with too, where both load the same OpenMP: a second pool would
# spin against the first.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

_REORDER = {"reassoc", "contract", "nsz"}
"""Sums may be reordered, to use vectors; infinities and NaN keep their meaning."""

_NUM_FIELDS = len(FIELDS)
_HEADER_BYTES = 8 * _NUM_FIELDS
_BASIS, _ROUTER, _COEFFICIENTS, _UP = (FIELDS.index(f) for f in FIELDS[:4])
_NUM_EXPERTS, _TOP_K, _RANK, _BASIS_DIM = (FIELDS.index(f) for f in FIELDS[4:8])
_STRIDE, _ROUTER_READS_BASIS = (FIELDS.index(f) for f in FIELDS[8:])


def _kernel(**options: bool) -> Callable[[Callable[..., Any]], Any]:
    """Compiled by numba at its first call, and kept in its cache where that has a place."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(function, fastmath=_REORDER, cache=True, **options)
        except RuntimeError:  # no folder that it may write to
            return njit(function, fastmath=_REORDER, **options)

    return decorate


@intrinsic
def _pointer(typing_context: Any, address: Any, like: Any) -> Any:  # noqa: ARG001
    """A pointer to elements of the array `like`'s type."""

    def cast(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), cast


_row_length = _kernel()(row_length)


@_kernel()
def _dots(out, rows, x):  # type: ignore[no-untyped-def]
    """out[i] = rows[i] · x, of rows as long or longer."""
    for i in range(0, rows.shape[0] - 1, 2):
        first, second = rows[i], rows[i + 1]
        a = b = x.dtype.type(0)
        for column in range(x.shape[0]):
            a += first[column] * x[column]
            b += second[column] * x[column]
        out[i], out[i + 1] = a, b
    if rows.shape[0] % 2:
        last = rows[rows.shape[0] - 1]
        a = x.dtype.type(0)
        for column in range(x.shape[0]):
            a += last[column] * x[column]
        out[rows.shape[0] - 1] = a


@_kernel()
def _add_rows(out, rows, weights):  # type: ignore[no-untyped-def]
    """out += Σ weights[i] · rows[i]; four rows at a time, so that `out` is read less often."""
    fours = rows.shape[0] // 4 * 4
    for i in range(0, fours, 4):
        a, b, c, d = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
        u, v, w, z = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
        for column in range(out.shape[0]):
            out[column] += u * a[column] + v * b[column] + w * c[column] + z * d[column]
    for i in range(fours, rows.shape[0]):
        row, weight = rows[i], weights[i]
        for column in range(out.shape[0]):
            out[column] += weight * row[column]


@_kernel()
def _route(site, z, x, taken):  # type: ignore[no-untyped-def]
    """The experts that a token takes and their gates; `taken` (N or more,) adds the gates up.

    The renormalised top-k of a softmax is the softmax of the top-k logits.
    """
    count, top_k = site[_NUM_EXPERTS], site[_TOP_K]
    if site[_ROUTER_READS_BASIS]:
        source, length = z, _row_length(z.shape[0])
    else:
        source, length = x, x.shape[0]
    logits = np.empty(count, x.dtype)
    _dots(logits, carray(_pointer(site[_ROUTER], x), (count, length)), source)
    experts = np.empty(top_k, np.int64)
    gates = np.empty(top_k, x.dtype)
    for i in range(top_k):
        best = 0
        for expert in range(1, count):
            if logits[expert] > logits[best]:
                best = expert
        experts[i], gates[i] = best, logits[best]
        logits[best] = -np.inf
    gates = np.exp(gates - gates[0])
    gates /= gates.sum()
    if taken.shape[0] > 0:
        for i in range(top_k):
            taken[experts[i]] += gates[i]
    return experts, gates


@_kernel()
def _add_site(out, x, site, taken):  # type: ignore[no-untyped-def]
    """Add one adapted linear's delta for one token: out (m,), x (n,)."""
    count, r, d = site[_NUM_EXPERTS], site[_RANK], site[_BASIS_DIM]
    z = np.empty(d, x.dtype)
    _dots(z, carray(_pointer(site[_BASIS], x), (d, x.shape[0])), x)
    up = carray(_pointer(site[_UP], x), (count, r, out.shape[0]))
    if count == 1:
        experts, gates = np.zeros(1, np.int64), np.ones(1, x.dtype)
    else:
        experts, gates = _route(site, z, x, taken)
    coordinates = np.empty(r, x.dtype)
    for i in range(experts.shape[0]):
        expert = experts[i]
        if site[_COEFFICIENTS]:
            shape = count, r, _row_length(d)
            _dots(coordinates, carray(_pointer(site[_COEFFICIENTS], x), shape)[expert], z)
        else:
            start = expert * site[_STRIDE]
            coordinates[:] = z[start : start + r]
        coordinates *= gates[i]
        _add_rows(out, up[expert], coordinates)


@_kernel(parallel=True, nogil=True)
def _add_tokens(out, x, tokens, headers, first_site, columns, taken, layer, workers):  # type: ignore[no-untyped-def]
    for worker in prange(workers):
        for i in range(worker, tokens.shape[0], workers):
            token = tokens[i]
            for number in range(columns.shape[0]):
                address = headers[i] + (first_site + number) * _HEADER_BYTES
                site = carray(_pointer(address, tokens), _NUM_FIELDS)
                if site[_BASIS]:
                    _add_site(
                        out[token, columns[number, 0] : columns[number, 1]],
                        x[token],
                        site,
                        taken[token, layer],
                    )


_NOT_TAKEN = np.empty((1, 1, 0), np.float32)
"""For `_add_tokens`, where nobody asked which experts tokens took."""

_MAX_ATTEMPTS = 8
"""More than there are kernels."""

DENSE_TOKENS = 64
"""A run of this many tokens of one adapter, times the experts for each that a token takes, is
faster in the dense form, which computes every expert but reads each row once a run."""


class CpuPlan:
    """A batch's adapters on the CPU: long runs in the dense form, other tokens one by one."""

    separate = False
    activates = False

    def __init__(self, runs: Sequence[Run], num_tokens: int, dtype: torch.dtype) -> None:
        """dtype: the adapters'."""
        self.routing: Routing | None = None
        self._dtype = dtype
        self._long = [
            run
            for run in runs
            if run.stop - run.start >= DENSE_TOKENS * run.adapter.experts_for_each_taken
        ]
        self._dense: dict[Group, list[LongRuns]] = {}
        headers = np.zeros(num_tokens, np.int64)
        for run in runs:
            if run not in self._long:
                headers[run.start : run.stop] = run.adapter.headers.data_ptr()
        self._tokens = np.flatnonzero(headers)
        self._headers = headers[self._tokens]

    def start(self) -> None:
        """Nothing is kept from step to step."""

    def apply(
        self, x: torch.Tensor, group: Group, base: BaseProduct
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base product, (…, m), with every token's adapter added; x: (T, n), contiguous."""
        out = base(F.linear)
        self.add_to(out.view(len(x), -1), x, group)
        return out, None

    def add_to(self, out: torch.Tensor, x: torch.Tensor, group: Group) -> None:
        """Add every token's adapter to the base product, in place.

        x: (T, n), out: (T, m), contiguous.
        """
        x = x.to(self._dtype)
        if len(self._tokens):
            delta = out if out.dtype == x.dtype else torch.zeros_like(out, dtype=x.dtype)
            _add_tokens(
                delta.numpy(),
                x.numpy(),
                self._tokens,
                self._headers,
                group.first_site,
                _columns(group),
                _NOT_TAKEN if self.routing is None else self.routing.gates.numpy(),
                group.layer,
                torch.get_num_threads(),
            )
            if delta is not out:
                out += delta.to(out.dtype)
        if self._long:
            if group not in self._dense:
                self._dense[group] = long_runs(group, self._long)
            for dense in self._dense[group]:
                dense.add_to(out, x, self.routing)


@cache
def _columns(group: Group) -> NDArray[np.int64]:
    """(sites, 2): where each site's columns start and stop."""
    return np.array([(site.start, site.start + site.width) for site in group.sites])


def compile_kernels() -> None:
    """Compile for float32, or read it from numba's cache, before the first request needs it."""
    x, none = np.zeros((0, 1), np.float32), np.zeros(0, np.int64)
    for attempts_left in reversed(range(_MAX_ATTEMPTS)):
        try:
            _add_tokens(x, x, none, none, 0, np.zeros((0, 2), np.int64), _NOT_TAKEN, 0, 1)
        except OSError as error:
            # A full disk, for one. What was compiled is there all the same, for the next attempt.
            if not attempts_left:
                raise
            logger.warning("numba cannot keep a compiled kernel: %s", error.strerror)
        else:
            return
