"""Choosing the next token of every sequence of a batch.

A row's result must not depend on its batch mates, not even in the last bit, while the order in
which a device adds floating point numbers depends on the batch's shape. So every sum here is one
of integers: probabilities become fixed-point weights, relative to the row's largest, whose sums
are exact in any order. For the same reason ranks are taken over keys that are never equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from malora_server.engine.grammar import Grammars, Matcher, forbid
from malora_server.engine.penalties import Penalties, is_penalised
from malora_server.engine.sequence import Sequence

_GREEDY_BELOW = 1e-5
"""Temperatures under this are 0."""
_LARGEST = 2**40
"""The weight of a row's likeliest token; 2^22 of them still sum below 2^63."""
_NUCLEUS = 256
"""Candidates ranked at first for top-p; the whole vocabulary only where they fall short."""
_PROMPT_ROWS = 256
"""Prompt positions at a time: the weights take several times the logits' memory."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token for each of B sequences.

    token_ids: (B,) int64. bad: (B,) bool, True where the logits were NaN or left no token to
    choose; such a row's token means nothing. logprobs: (B,) float32, NaN in rows that asked for
    none; None if no row asked. top_ids (int64) and top_logprobs (float32): (B, N), the likeliest
    tokens first, N being the most that any row asked for; None if N is 0.
    """

    token_ids: Tensor
    bad: Tensor
    logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None


class Sampler:
    """Samples batches of sequences; keeps what it derived from a batch while that stays the same.

    One instance belongs to one engine, one vocabulary and one device.
    """

    def __init__(self, grammars: Grammars | None = None) -> None:
        """grammars: whose the sequences' matchers are."""
        self._grammars = grammars
        self._batch: _Batch | None = None

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: list[Sequence]) -> Sampled:
        """Choose the token that follows each sequence.

        logits: (B, V), any float dtype, one row a sequence; left unchanged. Log-probabilities are
        those of the logits as they came, before grammars, penalties, biases and temperature.
        """
        if self._batch is None or self._batch.sequences != sequences:
            self._batch = _Batch(sequences, logits, self._batch, self._grammars)
        batch = self._batch
        positions = np.fromiter((len(seq.token_ids) for seq in sequences), np.int64, len(sequences))
        edited = batch.edit(logits, positions)
        best, token_ids = edited.max(dim=-1)
        bad = ~best.isfinite()
        if batch.groups:
            uniforms = torch.from_numpy(_uniforms(batch.seeds, positions)).to(logits.device)
            for group in batch.groups:
                drawn = group.draw(edited, best, uniforms)
                token_ids = token_ids.index_copy(0, group.rows, drawn)
        token_ids = token_ids.masked_fill(bad, 0)
        if batch.logprob_rows is None:
            return Sampled(token_ids, bad)

        rows, width = batch.logprob_rows, batch.num_alternatives
        some = _logprobs(logits[rows], token_ids[rows], width)
        size, device = len(sequences), logits.device
        logprobs = torch.full((size,), torch.nan, device=device).index_copy(0, rows, some[0])
        if width == 0:
            return Sampled(token_ids, bad, logprobs)
        top_ids = torch.zeros((size, width), dtype=torch.int64, device=device)
        top_logprobs = torch.full((size, width), torch.nan, device=device)
        return Sampled(
            token_ids,
            bad,
            logprobs,
            top_ids.index_copy(0, rows, some[1]),
            top_logprobs.index_copy(0, rows, some[2]),
        )


@torch.inference_mode()
def prompt_logprobs(
    logits: Tensor, target_ids: Tensor, top_n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """How likely the model held each token of a prompt.

    logits: (T, V); target_ids: (T,) int64, the token that followed each position. Returns the
    targets' log-probabilities (T,), and the `top_n` likeliest tokens' ids (T, top_n) int64 and
    log-probabilities (T, top_n), float32. A row with a NaN is NaN throughout.
    """
    parts = [
        _logprobs(part, targets, top_n)
        for part, targets in zip(
            logits.split(_PROMPT_ROWS), target_ids.split(_PROMPT_ROWS), strict=True
        )
    ]
    logprobs, top_ids, top_logprobs = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(top_ids), torch.cat(top_logprobs)


class _Batch:
    """The parameters of a batch's sequences as tensors; `groups` are the rows that draw."""

    def __init__(
        self,
        sequences: list[Sequence],
        logits: Tensor,
        before: _Batch | None,
        grammars: Grammars | None,
    ) -> None:
        device, vocab_size = logits.device, logits.shape[1]
        self.sequences = list(sequences)
        params = [seq.sampling for seq in sequences]
        self.seeds = np.array([param.seed % 2**64 for param in params], dtype=np.uint64)

        # An id outside the vocabulary can't be sampled, so there is nothing to mask or to bias;
        # on a GPU, indexing with it would end the process.
        stops = [
            (row, token, seq.min_len)
            for row, seq in enumerate(sequences)
            if seq.num_output_tokens < seq.sampling.min_tokens and seq.matcher is None
            for token in seq.stop_ids
            if 0 <= token < vocab_size
        ]
        self.stops = torch.tensor(stops, device=device).T if stops else None
        biases = [
            (row, token, bias)
            for row, param in enumerate(params)
            for token, bias in param.logit_bias.items()
            if 0 <= token < vocab_size
        ]
        self.biases: tuple[Tensor, Tensor, Tensor] | None = None
        if biases:
            rows, tokens, values = zip(*biases, strict=True)
            self.biases = (
                torch.tensor(rows, device=device),
                torch.tensor(tokens, device=device),
                torch.tensor(values, dtype=torch.float32, device=device),
            )
        penalised = [(row, seq) for row, seq in enumerate(sequences) if is_penalised(seq)]
        known = before.penalties if before else None
        self.penalties: Penalties | None = (
            Penalties(penalised, logits, known) if penalised else None
        )
        constrained = [
            (row, seq, seq.matcher) for row, seq in enumerate(sequences) if seq.matcher is not None
        ]
        self.masks: _GrammarMasks | None = None
        if constrained:
            assert grammars is not None
            self.masks = _GrammarMasks(constrained, logits, grammars)
        drawing = [row for row, param in enumerate(params) if param.temperature >= _GREEDY_BELOW]
        ranked = [row for row in drawing if params[row].top_k > 0 or params[row].top_p < 1.0]
        plain = [row for row in drawing if params[row].top_k <= 0 and params[row].top_p >= 1.0]
        self.groups = [_Group(rows, sequences, logits) for rows in (plain, ranked) if rows]

        asked = {row: n for row, p in enumerate(params) if (n := p.logprobs) is not None}
        self.logprob_rows = torch.tensor(list(asked), device=device) if asked else None
        self.num_alternatives = min(max(asked.values(), default=0), vocab_size)

    def edit(self, logits: Tensor, positions: np.ndarray) -> Tensor:
        """The logits after masks, penalties and biases: a float32 copy where there are any."""
        edits = (self.stops, self.penalties, self.biases, self.masks)
        if all(edit is None for edit in edits):
            return logits
        logits = logits.to(torch.float32, copy=True)
        if self.stops is not None:
            rows, tokens, until = self.stops
            early = torch.from_numpy(positions).to(logits.device)[rows] < until
            logits[rows, tokens] = logits[rows, tokens].masked_fill(early, -torch.inf)
        if self.penalties is not None:
            self.penalties.apply(logits)
        if self.biases is not None:
            rows, tokens, values = self.biases
            logits[rows, tokens] += values
        if self.masks is not None:
            self.masks.apply(logits)
        return logits


class _GrammarMasks:
    """Rows of a batch whose text follows a grammar."""

    def __init__(
        self,
        constrained: list[tuple[int, Sequence, Matcher]],
        logits: Tensor,
        grammars: Grammars,
    ) -> None:
        """constrained: a row of the batch, its sequence and matcher each."""
        device = logits.device
        self._grammars = grammars
        self._sequences = [seq for _, seq, _ in constrained]
        self._matchers = [matcher for _, _, matcher in constrained]
        self._rows = torch.tensor([row for row, _, _ in constrained], device=device)
        self._bits = torch.arange(8, dtype=torch.uint8, device=device)

    def apply(self, logits: Tensor) -> None:
        """Leave to (B, V) logits, in place, the tokens that the grammars allow next."""
        device = logits.device
        shape = (len(self._matchers), self._grammars.num_words)
        masks = torch.empty(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        words = masks.numpy()
        self._grammars.fill(self._matchers, words)
        for row, (seq, matcher) in enumerate(zip(self._sequences, self._matchers, strict=True)):
            # These give way where the grammar leaves nothing else.
            if len(seq.token_ids) < seq.min_len:
                forbid(words[row], seq.stop_ids | matcher.eos_token_ids)
            elif seq.sampling.ignore_eos:
                forbid(words[row], matcher.eos_token_ids)
        octets = masks.to(device, non_blocking=True).view(torch.uint8)
        allowed = (octets[:, :, None] >> self._bits & 1).flatten(1)[:, : logits.shape[1]]
        some = logits[self._rows].masked_fill_(allowed == 0, -torch.inf)
        logits.index_copy_(0, self._rows, some)


class _Group:
    """Rows of a batch that draw in the same way: all by rank (top-k, top-p), or none."""

    def __init__(self, rows: list[int], sequences: list[Sequence], logits: Tensor) -> None:
        device, vocab_size = logits.device, logits.shape[1]
        params = [sequences[row].sampling for row in rows]
        top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
        limits = [k for k in top_k if k < vocab_size]
        self.rows = torch.tensor(rows, device=device)
        self._temperature = torch.tensor([p.temperature for p in params], device=device)[:, None]
        self._top_k = torch.tensor(top_k, device=device)[:, None]
        self._top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
        self._unlimited = self._top_k[:, 0] == vocab_size
        self._any_unlimited = len(limits) < len(rows)
        self._ranked = bool(limits) or any(param.top_p < 1.0 for param in params)
        self._width = max([min(_NUCLEUS, vocab_size) if self._any_unlimited else 1, *limits])
        self._least = (
            torch.tensor([[math.ceil(p.min_p * _LARGEST)] for p in params], device=device)
            if any(param.min_p > 0 for param in params)
            else None
        )

    def draw(self, logits: Tensor, best: Tensor, uniforms: Tensor) -> Tensor:
        """Token ids (R,) of the group's rows, from (B, V) logits, their maxima and uniforms."""
        # The maximum goes first, so that a tiny temperature can't overflow.
        shifted = logits.index_select(0, self.rows).float() - best[self.rows].float()[:, None]
        weights = _weights(shifted / self._temperature)
        ids: Tensor | None = None
        if self._ranked:
            ids, weights = self._filter(shifted, weights)
        if self._least is not None:
            weights = weights.masked_fill(weights < self._least, 0)

        sums = weights.cumsum(1)
        total = sums[:, -1]
        target = (uniforms[self.rows] * total).long().minimum(total - 1)
        index = torch.searchsorted(sums, target[:, None], right=True)
        # Only the weights of a NaN row can lead beyond the end.
        index = index.clamp(max=sums.shape[1] - 1)
        return (index if ids is None else ids.gather(1, index)).squeeze(1)

    def _filter(self, shifted: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (R, W) from the likeliest down, and their weights, 0 outside top-k and top-p."""
        vocab_size, total = shifted.shape[1], weights.sum(1)
        ids = _rank(shifted, self._width)
        ranked = weights.gather(1, ids)
        if self._any_unlimited and self._width < vocab_size:
            short = ranked.sum(1) < (self._top_p * total).ceil()
            # A wider ranking begins with the narrower one, so this changes no other row's draw.
            if bool((short & self._unlimited).any()):
                ids = _rank(shifted, vocab_size)
                ranked = weights.gather(1, ids)
        rank = torch.arange(ids.shape[1], device=ids.device)
        ranked = ranked.masked_fill(rank >= self._top_k, 0)
        # top_p is a share of what top_k left.
        total = torch.where(self._unlimited, total, ranked.sum(1))
        before = ranked.cumsum(1) - ranked
        outside = before >= (self._top_p * total).ceil()[:, None]
        return ids, ranked.masked_fill(outside & (rank > 0), 0)


def _weights(shifted: Tensor) -> Tensor:
    """Exp of float32 logits of at most 0, in fixed point: int64, the largest being _LARGEST."""
    # Scaling by a power of two rounds nothing.
    return shifted.exp().mul_(_LARGEST).long()


def _rank(values: Tensor, width: int) -> Tensor:
    """Ids (R, width) of each row's largest float32 values, descending, ties by the lower id."""
    bits = values.contiguous().view(torch.int32)
    # Negative floats order backwards as integers: turn all but their sign around.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    size = values.shape[1]
    backwards = torch.arange(size - 1, -1, -1, device=values.device)
    keys = (ordered.long() << 32) | backwards
    best = keys.topk(width, dim=1).values if width < size else keys.sort(1, descending=True).values
    return size - 1 - (best & 0xFFFFFFFF)


def _logprobs(logits: Tensor, chosen: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """log_softmax of (R, V) logits at the (R,) chosen ids, and at each row's `width` best."""
    values = logits.float()
    shifted = values - values.amax(1, keepdim=True)
    total = _weights(shifted).sum(1).double() / _LARGEST
    log_total = total.log().float()[:, None]
    logprobs = (shifted.gather(1, chosen[:, None]) - log_total).squeeze(1)
    top_ids = _rank(shifted, width)
    return logprobs, top_ids, shifted.gather(1, top_ids) - log_total


def _uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each row, float64, made from (seed, position) alone."""
    step = np.uint64(0x9E3779B97F4A7C15)
    state = _mix(_mix(seeds + step) + positions.astype(np.uint64) * step)
    return (state >> np.uint64(11)) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every bit of the result depends on every bit of the state."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
