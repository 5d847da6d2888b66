"""How long a step takes by the number of its tokens, learnt from the steps there were."""

from __future__ import annotations

from collections import deque

_REMEMBERED = 15
"""Steps of about one size whose median counts, so that a few that took long change nothing."""
_ENOUGH = 3
"""Fewer steps of a size tell nothing: the first ones compile kernels."""
_FIXED_TOKENS = 64.0
"""A guess, before steps of two sizes are known."""
_MOST_FIXED_TOKENS = 1e6


class StepTimes:
    """The line `fixed + each * tokens` through the steps' times, with the least relative error.

    Each size, a power of two, has its own memory: many steps of one size leave what is known of
    the others as it is.
    """

    def __init__(self) -> None:
        self._steps: dict[int, deque[tuple[float, int]]] = {}
        self._fixed_tokens = _FIXED_TOKENS

    @property
    def fixed_tokens(self) -> float:
        """How many tokens take as long as the part of a step that depends on none.

        A million where more tokens take no longer.
        """
        return self._fixed_tokens

    def add(self, num_tokens: int, seconds: float) -> None:
        """Take in a step of so many tokens, at least one."""
        size = num_tokens.bit_length()
        self._steps.setdefault(size, deque(maxlen=_REMEMBERED)).append((seconds, num_tokens))
        self._fit()

    def _fit(self) -> None:
        # The least sum of count * (fixed * u + each * v - 1)², u being 1/seconds, v tokens/seconds.
        num_sizes = 0
        uu = uv = vv = u_sum = v_sum = 0.0
        for steps in self._steps.values():
            count = len(steps)
            if count < _ENOUGH:
                continue
            num_sizes += 1
            seconds, num_tokens = sorted(steps)[count // 2]
            u, v = 1 / seconds, num_tokens / seconds
            uu += count * u * u
            uv += count * u * v
            vv += count * v * v
            u_sum += count * u
            v_sum += count * v
        if num_sizes < 2:
            return
        fixed = u_sum * vv - v_sum * uv
        each = v_sum * uu - u_sum * uv
        most = _MOST_FIXED_TOKENS
        self._fixed_tokens = min(max(0.0, fixed) / each, most) if each > 0 else most
