"""Repetition, presence and frequency penalties, over the tokens a sequence has had so far."""

from __future__ import annotations

import torch
from torch import Tensor

from malora_server.engine.sequence import Sequence


def is_penalised(seq: Sequence) -> bool:
    """Whether any of the three penalties applies to a sequence."""
    param = seq.sampling
    return bool(
        param.repetition_penalty != 1.0 or param.presence_penalty or param.frequency_penalty
    )


class Penalties:
    """Which tokens each penalised sequence has had: P rows of the batch, over the vocabulary."""

    def __init__(
        self, penalised: list[tuple[int, Sequence]], logits: Tensor, before: Penalties | None
    ) -> None:
        device, shape = logits.device, (len(penalised), logits.shape[1])
        self._rows = torch.tensor([row for row, _ in penalised], device=device)
        self._sequences = [seq for _, seq in penalised]
        self._counts = torch.zeros(shape, dtype=torch.int32, device=device)
        self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=device)
        self._num_counted = [seq.num_prompt_tokens for seq in self._sequences]

        at = {seq: row for row, seq in enumerate(before._sequences)} if before else {}
        kept = [row for row, seq in enumerate(self._sequences) if seq in at]
        if before and kept:
            old = [at[self._sequences[row]] for row in kept]
            self._counts[kept] = before._counts[old]
            self._in_prompt[kept] = before._in_prompt[old]
            for row, old_row in zip(kept, old, strict=True):
                self._num_counted[row] = before._num_counted[old_row]
        prompts = [
            (row, token)
            for row, seq in enumerate(self._sequences)
            if seq not in at
            for token in seq.token_ids[: seq.num_prompt_tokens]
        ]
        if prompts:
            rows, tokens = torch.tensor(prompts, device=device).T
            self._in_prompt[rows, tokens] = True

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=device)[:, None]

        params = [seq.sampling for seq in self._sequences]
        self._repetition = column([param.repetition_penalty for param in params])
        self._presence = column([param.presence_penalty for param in params])
        self._frequency = column([param.frequency_penalty for param in params])

    def apply(self, logits: Tensor) -> None:
        """Penalise (B, V) float32 logits in place.

        Repetition divides positive and multiplies negative logits of all tokens seen; frequency
        and presence are subtracted, for each time and once, from those of generated tokens.
        """
        self._count()
        some = logits[self._rows]
        generated = self._counts > 0
        seen = self._in_prompt | generated
        harder = torch.where(some > 0, some / self._repetition, some * self._repetition)
        some = torch.where(seen, harder, some)
        some = some - self._frequency * self._counts
        some = some - self._presence * generated
        logits[self._rows] = some

    def _count(self) -> None:
        new: list[tuple[int, int]] = []
        for row, seq in enumerate(self._sequences):
            new.extend((row, token) for token in seq.token_ids[self._num_counted[row] :])
            self._num_counted[row] = len(seq.token_ids)
        if new:
            rows, tokens = torch.tensor(new, device=self._counts.device).T
            self._counts.index_put_((rows, tokens), self._counts.new_ones(len(new)), True)
