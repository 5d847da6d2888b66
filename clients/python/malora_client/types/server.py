"""Replies about what the server has: models, adapters, its tokenizer, its health."""

from __future__ import annotations

from malora_client.types.shared import Reply


class Model(Reply):
    """Something a request may name as `model`; an adapter's `parent` is the base model."""

    id: str
    object: str = "model"
    created: int
    owned_by: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class Adapter(Reply):
    """An adapter the server knows. `error` says why it can't be served; then `digest` is ''."""

    name: str
    digest: str
    peft_type: str
    num_experts: int
    top_k: int
    r: int
    basis_dim: int
    target_modules: list[str]
    num_parameters: int
    num_bytes: int
    created: int
    """Unix seconds."""
    error: str | None = None


class Tokens(Reply):
    """A text as the model sees it; `token_strs` only if the request asked for it."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(Reply):
    """The text of some token ids."""

    prompt: str


class Health(Reply):
    """The server is up and takes requests."""

    status: str = "ok"
