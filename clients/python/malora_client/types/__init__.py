"""Typed replies."""

from malora_client.types.chat import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    FunctionCall,
    FunctionCallDelta,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
)
from malora_client.types.completion import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    Logprobs,
)
from malora_client.types.server import Adapter, Deleted, Health, Model, Text, Tokens
from malora_client.types.shared import (
    ExpertGate,
    Listing,
    PromptTokensDetails,
    Reply,
    Routing,
    Usage,
)

__all__ = [
    "Adapter",
    "ChatChoice",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatDelta",
    "ChatLogprobs",
    "ChatMessage",
    "ChatTokenLogprob",
    "Completion",
    "CompletionChoice",
    "CompletionChunk",
    "Deleted",
    "ExpertGate",
    "FunctionCall",
    "FunctionCallDelta",
    "Health",
    "Listing",
    "Logprobs",
    "Model",
    "PromptTokensDetails",
    "Reply",
    "Routing",
    "Text",
    "Tokens",
    "ToolCall",
    "ToolCallDelta",
    "TopLogprob",
    "Usage",
]
