"""Replies of /v1/chat/completions."""

from __future__ import annotations

from malora_client.types.shared import Reply, Routing, Usage


class FunctionCall(Reply):
    """The function's name, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Reply):
    """A call that the model wants made; answer with a message of role "tool" and its id."""

    id: str
    type: str = "function"
    function: FunctionCall


class ChatMessage(Reply):
    """A message of a conversation; may be sent back as it is."""

    role: str
    content: str | None = None
    tool_calls: list[ToolCall] | None = None


class FunctionCallDelta(Reply):
    """What a chunk adds to a call: its name at first, then pieces of its arguments."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Reply):
    """What a chunk adds to the message's call of that index; `id` comes at first."""

    index: int
    id: str | None = None
    type: str | None = None
    function: FunctionCallDelta


class ChatDelta(Reply):
    """What a chunk adds to a message."""

    role: str | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class TopLogprob(Reply):
    """A token that could have stood at a position, and its log-probability (nats)."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class ChatTokenLogprob(TopLogprob):
    """The token that stands at a position, and the likeliest ones there."""

    top_logprobs: list[TopLogprob] | None = None


class ChatLogprobs(Reply):
    """One entry for each generated token."""

    content: list[ChatTokenLogprob] | None = None


class _Choice(Reply):
    index: int
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    routing: list[Routing] | None = None


class ChatChoice(_Choice):
    """One answer; `finish_reason` and `stop_reason` as in `CompletionChoice`."""

    message: ChatMessage


class ChatChunkChoice(_Choice):
    """What a chunk adds to an answer."""

    delta: ChatDelta


class _ChatReply(Reply):
    id: str
    created: int
    model: str
    usage: Usage | None = None


class ChatCompletion(_ChatReply):
    """A whole reply; `model` is the adapter's name, or the base model's."""

    object: str = "chat.completion"
    choices: list[ChatChoice]


class ChatCompletionChunk(_ChatReply):
    """Part of a streamed reply. The chunk that carries `usage` has no choices."""

    object: str = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
