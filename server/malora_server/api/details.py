"""Log-probabilities and routing as a reply's JSON shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from malora_server.api.generation import Delta
from malora_server.api.tokenizer import Tokenizer
from malora_server.engine.detokenizer import TokenDecoder
from malora_server.engine.messages import TokenLogprobs

_LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON can't say."""


class CompletionLogprobs:
    """OpenAI's `logprobs` object of a completion, filled position by position."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[str] = []
        self._token_logprobs: list[float | None] = []
        self._top_logprobs: list[dict[str, float] | None] = []
        self._text_offset: list[int] = []

    def add_prompt(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], skip_special_tokens: bool
    ) -> None:
        """The echoed prompt; nothing predicts its first token."""
        decoder = TokenDecoder(self._tokenizer.backend, skip_special_tokens=skip_special_tokens)
        self._text_offset.append(0)
        decoder.push(token_ids[0])
        self._tokens.append(self._tokenizer.token_text(token_ids[0]))
        self._token_logprobs.append(None)
        self._top_logprobs.append(None)
        for entry in logprobs:
            self._add(entry, decoder.length)
            decoder.push(entry.token_id)

    def add(self, delta: Delta, shift: int) -> None:
        """What a step generated; `shift` characters come before the choice's own text."""
        for entry, offset in zip(delta.logprobs or (), delta.offsets or (), strict=True):
            self._add(entry, shift + offset)

    def _add(self, entry: TokenLogprobs, offset: int) -> None:
        text = self._tokenizer.token_text(entry.token_id)
        top: dict[str, float] = {text: _finite(entry.logprob)}
        for token_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True):
            # Several tokens may read alike; the likeliest stands for them, the chosen one first.
            top.setdefault(self._tokenizer.token_text(token_id), _finite(logprob))
        self._tokens.append(text)
        self._token_logprobs.append(_finite(entry.logprob))
        self._top_logprobs.append(top)
        self._text_offset.append(offset)

    def to_json(self) -> dict[str, Any]:
        """The object."""
        return {
            "tokens": self._tokens,
            "token_logprobs": self._token_logprobs,
            "top_logprobs": self._top_logprobs,
            "text_offset": self._text_offset,
        }


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprobs]) -> dict[str, Any]:
    """OpenAI's `logprobs` object of a chat choice."""

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = [
        {
            **token(entry.token_id, entry.logprob),
            "top_logprobs": [
                token(token_id, logprob)
                for token_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True)
            ],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def routing_entries(tokenizer: Tokenizer, deltas: Sequence[Delta]) -> list[dict[str, Any]] | None:
    """For every generated token the experts it took, the largest gate first; None if unrouted."""
    if any(delta.routing is None for delta in deltas):
        return None
    return [
        {
            "token": tokenizer.token_text(token_id),
            "experts": _experts(entry.mean),
            "layers": None if entry.layers is None else [_experts(gates) for gates in entry.layers],
        }
        for delta in deltas
        for token_id, entry in zip(delta.token_ids, delta.routing or (), strict=True)
    ]


def _experts(gates: Sequence[float]) -> list[dict[str, Any]]:
    taken = [(expert, gate) for expert, gate in enumerate(gates) if gate > 0]
    taken.sort(key=lambda pair: -pair[1])
    return [{"expert": expert, "gate": gate} for expert, gate in taken]


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
