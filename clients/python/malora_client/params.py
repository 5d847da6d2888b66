"""The fields of a request, as keyword arguments. None leaves a field out: the server's default."""

# No `from __future__ import annotations` here: TypedDict would no longer see `Required`.

from collections.abc import Mapping, Sequence
from typing import Literal, Required, TypedDict

from malora_client.types import ChatMessage


class StreamOptions(TypedDict, total=False):
    """include_usage: end the stream with a chunk that has `usage` and no choices."""

    include_usage: bool


class JsonSchema(TypedDict, total=False):
    """A named schema. It is followed to the letter, whatever `strict` says."""

    name: Required[str]
    schema: Required[Mapping[str, object]]
    description: str
    strict: bool


class ResponseFormat(TypedDict, total=False):
    """OpenAI's way to say a reply's form; `json_schema` goes with the type of that name."""

    type: Required[Literal["text", "json_object", "json_schema"]]
    json_schema: JsonSchema


class StructuredOutputs(TypedDict, total=False):
    """vLLM's way to say a reply's form: exactly one of these.

    json: a schema, or its JSON text. regex: matches the whole reply. choice: one of these texts.
    grammar: context-free, in Lark's notation or GBNF's. json_object: any JSON object.
    """

    json: Mapping[str, object] | str
    regex: str
    choice: Sequence[str]
    grammar: str
    json_object: Literal[True]


class TextPart(TypedDict):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class FunctionCallParam(TypedDict):
    """A call's function, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCallParam(TypedDict):
    """A call that the assistant made."""

    id: str
    type: Literal["function"]
    function: FunctionCallParam


class ChatMessageParam(TypedDict, total=False):
    """A message of a conversation: role "system", "user", "assistant" or "tool".

    The assistant's may have `tool_calls` in place of content; a tool's result names its call.
    """

    role: Required[str]
    content: Required[str | Sequence[TextPart] | None]
    name: str
    tool_calls: Sequence[ToolCallParam]
    tool_call_id: str


class FunctionParam(TypedDict, total=False):
    """A function that the model may call; parameters: a JSON schema, an object's."""

    name: Required[str]
    description: str
    parameters: Mapping[str, object]
    strict: bool


class ToolParam(TypedDict):
    """A tool; there is one type."""

    type: Literal["function"]
    function: FunctionParam


class _FunctionName(TypedDict):
    name: str


class ToolChoiceParam(TypedDict):
    """The function that the reply must call."""

    type: Literal["function"]
    function: _FunctionName


class GenerationParams(TypedDict, total=False):
    """What completions and chat share: OpenAI's fields, then vLLM's, then ours.

    model: the adapter's name, or the base model's. priority: lower runs first.
    include_routing: True for the experts each generated token took, "layers" for them by layer
    too.
    """

    model: Required[str]
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    n: int | None
    stop: str | Sequence[str] | None
    seed: int | None
    stream_options: StreamOptions | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[str, float] | Mapping[int, float] | None
    response_format: ResponseFormat | None
    user: str | None

    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    min_tokens: int | None
    add_special_tokens: bool | None
    skip_special_tokens: bool | None
    include_stop_str_in_output: bool | None
    structured_outputs: StructuredOutputs | None
    priority: int | None

    include_routing: bool | Literal["layers"] | None


class CompletionParams(GenerationParams, total=False):
    """prompt: text or token ids, or several of either. logprobs: how many alternatives a token."""

    prompt: Required[str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]]
    logprobs: int | None
    echo: bool | None


class ChatParams(GenerationParams, total=False):
    """logprobs: whether to send them; top_logprobs: how many alternatives a token.

    tools: what the model may call; tool_choice: whether it may ("auto", "none"), or what it must.
    """

    messages: Required[Sequence[ChatMessageParam | ChatMessage]]
    max_completion_tokens: int | None
    tools: Sequence[ToolParam] | None
    tool_choice: Literal["none", "auto", "required"] | ToolChoiceParam | None
    parallel_tool_calls: bool | None
    logprobs: bool | None
    top_logprobs: int | None


class TokenizeParams(TypedDict, total=False):
    """What to tokenize: `prompt`, or `messages` through the chat template."""

    model: str | None
    prompt: str | None
    messages: Sequence[ChatMessageParam | ChatMessage] | None
    tools: Sequence[ToolParam] | None
    add_special_tokens: bool | None
    return_token_strs: bool | None


class DetokenizeParams(TypedDict, total=False):
    """tokens: ids."""

    model: str | None
    tokens: Required[Sequence[int]]
