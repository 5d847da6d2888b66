"""One choice's reply that may call tools, as OpenAI's messages and deltas show it."""

from __future__ import annotations

import secrets
from typing import Any

from malora_server.api.generation import Delta
from malora_server.api.tool_parser import CallPiece, ToolCallParser


class ToolReply:
    """Gathers content and calls from a choice's deltas."""

    def __init__(self, parser: ToolCallParser) -> None:
        self._parser = parser
        self._content = ""
        self._calls: list[dict[str, Any]] = []

    def add(self, delta: Delta) -> dict[str, Any]:
        """Take in the next delta; what it adds to the message: content, tool_calls, or nothing."""
        pieces = self._parser.push(delta.text)
        if delta.finish_reason is not None:
            pieces += self._parser.finish()
        content = ""
        calls: dict[int, dict[str, Any]] = {}
        for piece in pieces:
            if isinstance(piece, CallPiece):
                self._add_call(piece, calls)
            else:
                content += piece
        self._content += content
        added: dict[str, Any] = {"content": content} if content else {}
        if calls:
            added["tool_calls"] = list(calls.values())
        return added

    def message(self) -> dict[str, Any]:
        """The whole message."""
        message: dict[str, Any] = {"role": "assistant", "content": self._content}
        if self._calls:
            message["content"] = self._content or None
            message["tool_calls"] = self._calls
        return message

    def finish_reason(self, delta: Delta) -> str | None:
        """As the engine's, but "tool_calls" for a reply that ended with calls."""
        called = delta.finish_reason == "stop" and self._calls
        return "tool_calls" if called else delta.finish_reason

    def _add_call(self, piece: CallPiece, added: dict[int, dict[str, Any]]) -> None:
        if piece.name is not None:
            call = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
            function = {"name": piece.name, "arguments": piece.arguments}
            self._calls.append({**call, "function": function})
            added[piece.index] = {"index": piece.index, **call, "function": dict(function)}
            return
        self._calls[piece.index]["function"]["arguments"] += piece.arguments
        entry = added.setdefault(piece.index, {"index": piece.index, "function": {"arguments": ""}})
        entry["function"]["arguments"] += piece.arguments
