"""The bodies of requests: OpenAI's fields, with vLLM's extensions. null means the default."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_TOOLS = 128
_INT64 = 2**63


def _whole_characters(text: str) -> str:
    # JSON can spell half of a surrogate pair, which no encoding can write.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("value_error", "Input has half a surrogate pair") from None
    return text


TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Text = Annotated[str, AfterValidator(_whole_characters)]
Texts = Annotated[list[Text], Field(fail_fast=True)]
StopString = Annotated[str, Field(min_length=1)]


def _token_keys(value: Any) -> Any:
    # JSON's keys are strings; a dict whose keys are no integers is left for the type to refuse.
    if isinstance(value, dict) and all(isinstance(key, str) and key.isdecimal() for key in value):
        return {int(key): bias for key, bias in value.items()}
    return value


LogitBias = Annotated[
    dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_token_keys)
]


class Strict(BaseModel):
    """Refuses unknown fields, wrong types, NaN and infinity."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class StreamOptions(Strict):
    """What a stream adds to its chunks."""

    include_usage: bool | None = None


class JsonSchema(Strict):
    """A named schema; `strict` changes nothing, as every schema is followed to the letter."""

    name: Text
    description: Text | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form of the reply: free text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise PydanticCustomError(
                "value_error", "Give json_schema with the type json_schema, and with no other"
            )
        return self


class StructuredOutputs(Strict):
    """The form of the reply, as vLLM says it: exactly one of the fields.

    json: a schema, or its JSON text. regex: matches the whole reply (Rust's syntax). choice: one of
    these. grammar: context-free, in Lark's notation or GBNF's. json_object: any JSON object.
    """

    json_schema: dict[str, Any] | Text | None = Field(None, alias="json")
    regex: Text | None = None
    choice: list[Text] | None = Field(None, min_length=1)
    grammar: Text | None = None
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _check_one_is_given(self) -> StructuredOutputs:
        fields = (self.json_schema, self.regex, self.choice, self.grammar, self.json_object)
        if sum(field is not None for field in fields) != 1:
            raise PydanticCustomError(
                "value_error", "Give exactly one of json, regex, choice, grammar, json_object"
            )
        return self


class GenerationRequest(Strict):
    """The fields that completions and chat share."""

    model: Text
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    ignore_eos: bool | None = None
    include_routing: bool | Literal["layers"] | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: LogitBias | None = None
    max_tokens: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    min_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    # Less would take a score beyond what a float holds.
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    response_format: ResponseFormat | None = None
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    skip_special_tokens: bool | None = None
    stop: StopString | list[StopString] | None = None
    stop_token_ids: TokenIds | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=-1)
    top_p: float | None = Field(None, gt=0, le=1)
    user: Text | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("value_error", "stream_options need stream: true")
        return self

    @model_validator(mode="after")
    def _check_one_format(self) -> GenerationRequest:
        formatted = self.response_format is not None and self.response_format.type != "text"
        if formatted and self.structured_outputs is not None:
            raise PydanticCustomError(
                "value_error", "response_format and structured_outputs exclude each other"
            )
        return self


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Text | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    add_special_tokens: bool | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0)
    suffix: Literal[""] | None = None


class TextPart(Strict):
    """A piece of a message's content."""

    type: Literal["text"]
    text: Text


class FunctionCall(Strict):
    """A function's name, and its arguments as JSON text."""

    name: Text
    arguments: Text


class ToolCall(Strict):
    """A call that the assistant made; `index` is what a stream numbers it with."""

    id: Text
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class ChatMessage(Strict):
    """One message of a conversation; the assistant's may have calls in place of content."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: list[ToolCall] | None = None
    content: Text | list[TextPart] | None = Field(None, validate_default=True)
    name: Text | None = None
    tool_call_id: Text | None = None

    @property
    def text(self) -> str:
        """The content's text."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)

    @model_validator(mode="after")
    def _check_role(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("value_error", "Only the assistant has tool_calls")
        return self

    @field_validator("content")
    @classmethod
    def _check_content(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and not info.data.get("tool_calls"):
            raise PydanticCustomError("missing", "A message without tool_calls needs content")
        return content


class Function(Strict):
    """A function that the model may call; parameters: a JSON schema, an object's."""

    name: str = Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Strict):
    """A tool; there is one type."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """Which function."""

    name: Text


class NamedToolChoice(Strict):
    """The function that the reply must call."""

    type: Literal["function"]
    function: FunctionName


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    add_special_tokens: bool | None = None
    logprobs: bool | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    parallel_tool_calls: bool | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_TOOLS)
    top_logprobs: int | None = Field(None, ge=0)


class TokenizeRequest(Strict):
    """POST /tokenize: a prompt, or a conversation."""

    model: Text | None = None
    prompt: Text | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_TOOLS)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: Text | None = None
    tokens: TokenIds
