"""The functions that a chat offers the model: in its prompt, and in what it may answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from malora_server.api.errors import invalid
from malora_server.api.protocol import (
    ChatCompletionRequest,
    ChatMessage,
    FunctionTool,
    NamedToolChoice,
)
from malora_server.api.tool_parser import CallFormat, ToolCallParser

_NO_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}
_MAX_CALLS = 16
"""Calls of one reply, where it must have one: a weak model would go on to the end."""


class OfferedTools:
    """The functions of one request, and what its tool_choice says of them."""

    def __init__(
        self, format: CallFormat, tools: Sequence[FunctionTool], body: ChatCompletionRequest
    ) -> None:
        self.format = format
        self.tools = tools
        choice = body.tool_choice or "auto"
        self._named = choice.function.name if isinstance(choice, NamedToolChoice) else None
        self._must_call = choice != "auto"
        self._parallel = body.parallel_tool_calls is not False and self._named is None

    def parser(self) -> ToolCallParser:
        """A parser for one choice's text."""
        names = {tool.function.name for tool in self.tools}
        return ToolCallParser(self.format, names, None if self._parallel else 1)

    def grammar(self) -> str | None:
        """The calls that the reply must be, as `grammar_worker` takes them; None: it need not."""
        if not self._must_call:
            return None
        functions = [tool.function for tool in self.tools]
        if self._named is not None:
            functions = [function for function in functions if function.name == self._named]
        return json.dumps(
            {
                "calls": [
                    {
                        "head": self.format.head(function.name),
                        "schema": function.parameters or _NO_PARAMETERS,
                        "tail": self.format.tail,
                    }
                    for function in functions
                ],
                "separator": self.format.separator,
                "max_calls": _MAX_CALLS if self._parallel else 1,
            }
        )


def offered_tools(format: CallFormat, body: ChatCompletionRequest) -> OfferedTools | None:
    """What a request offers; None where nothing may be called. ApiError 400 for a contradiction."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none"):
            raise invalid("tool_choice", "tool_choice needs tools.")
        return None
    names = [tool.function.name for tool in body.tools]
    if len(set(names)) < len(names):
        raise invalid("tools", "Two tools have the same name.")
    if choice == "none":
        return None
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        raise invalid(
            "tool_choice", f"tool_choice names {choice.function.name!r}, which no tool is called."
        )
    formatted = body.response_format is not None and body.response_format.type != "text"
    if formatted or body.structured_outputs is not None:
        raise invalid(
            "tools",
            "A reply can't both follow a form of its own and call tools: leave out "
            "response_format and structured_outputs, or say tool_choice: none.",
        )
    return OfferedTools(format, body.tools, body)


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The conversation as chat templates know it: calls with their arguments as objects."""
    return [
        {
            "role": message.role,
            "content": message.text,
            **({"name": message.name} if message.name is not None else {}),
            **({"tool_call_id": message.tool_call_id} if message.tool_call_id else {}),
            **(
                {
                    "tool_calls": [
                        {
                            "id": call.id,
                            "type": "function",
                            "function": {
                                "name": call.function.name,
                                "arguments": _arguments(call.function.arguments),
                            },
                        }
                        for call in message.tool_calls
                    ]
                }
                if message.tool_calls
                else {}
            ),
        }
        for message in messages
    ]


def plain_messages(
    messages: Sequence[ChatMessage], tools: Sequence[FunctionTool], format: CallFormat
) -> list[dict[str, Any]]:
    """The conversation for a template that knows no tools: they become text of the others' turns.

    The functions stand at the end of the system message, calls in the assistant's, results in the
    user's.
    """
    plain: list[dict[str, Any]] = []
    for message in messages:
        role, content = message.role, message.text
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        elif message.tool_calls:
            calls = format.separator.join(
                format.write(call.function.name, call.function.arguments)
                for call in message.tool_calls
            )
            content = f"{content}\n{calls}" if content else calls
        name = {"name": message.name} if message.name is not None else {}
        plain.append({"role": role, "content": content, **name})
    if tools:
        text = _instructions(tools, format)
        if plain[0]["role"] == "system":
            plain[0]["content"] += "\n\n" + text
        else:
            plain.insert(0, {"role": "system", "content": text})
    return plain


def _instructions(tools: Sequence[FunctionTool], format: CallFormat) -> str:
    functions = "\n".join(
        json.dumps(tool.function.model_dump(exclude_none=True), ensure_ascii=False)
        for tool in tools
    )
    call = format.write("function-name", '{"parameter": "value"}')
    return (
        "You may call these functions, whose parameters are JSON schemas:\n"
        f"<tools>\n{functions}\n</tools>\n"
        f"To call one, answer with\n{call}"
    )


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
