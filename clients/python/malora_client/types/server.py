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
    """An adapter the server knows.

    `state` tells where its weights are: unloaded (on disk alone), loading, host, device (and host),
    or failed, for a reason that `error` tells. What only the weights tell is 0 or None until they
    were read once.
    """

    name: str
    state: str
    source: str
    """Where it came from: a folder under the adapters folder, hf://… or s3://…."""
    generation: str | None = None
    """Names the content; the replies it serves have it as their `system_fingerprint`."""
    digest: str | None = None
    """BLAKE3 of all that decides its outputs; `generation` is its beginning."""
    pinned: bool = False
    device_bytes: int = 0
    host_bytes: int = 0
    """A basis that several adapters share is counted for each of them."""
    load_seconds: float | None = None
    in_flight: int = 0
    """Requests of this generation that run or wait."""
    last_used: float | None = None
    """Unix seconds."""
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
    error_code: str | None = None


class Deleted(Reply):
    """An adapter that is served no more."""

    id: str
    deleted: bool


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
