"""Replies of /v1/completions."""

from __future__ import annotations

from malora_client.types.shared import Reply, Routing, Usage


class Logprobs(Reply):
    """Log-probabilities (nats), one entry for each token.

    An echoed prompt's first token has None, since nothing predicts it. `text_offset` counts
    characters from the beginning of the text.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int]


class CompletionChoice(Reply):
    """One completion, or in a stream what a chunk adds to it.

    `finish_reason`: "stop", "length", "abort" or "error"; None while it goes on. `stop_reason`:
    the stop string or stop token id that ended it, if one did.
    """

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    routing: list[Routing] | None = None


class Completion(Reply):
    """A whole reply; `model` is the adapter's name, or the base model's."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class CompletionChunk(Completion):
    """Part of a streamed reply. The chunk that carries `usage` has no choices."""
