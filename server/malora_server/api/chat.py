"""POST /v1/chat/completions."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from fastapi import APIRouter, Request, Response

from malora_server.api.details import chat_logprobs, routing_entries
from malora_server.api.errors import invalid
from malora_server.api.generation import Delta, Generation
from malora_server.api.grammars import grammar_of
from malora_server.api.limits import check_limits
from malora_server.api.protocol import ChatCompletionRequest
from malora_server.api.sampling import TokenLimits, check_logprobs, sampling_params
from malora_server.api.state import Record, Server, ServerState
from malora_server.api.streaming import (
    CLIENT_CLOSED_REQUEST,
    ChunkFrame,
    EventStream,
    collect_until_disconnect,
    encode_json,
)
from malora_server.api.tokenizer import Tokenizer
from malora_server.api.tool_parser import FORMATS
from malora_server.api.tool_reply import ToolReply
from malora_server.api.tools import OfferedTools, offered_tools

router = APIRouter()


class ChatWriter:
    """A chat completion's choices, whole or in chunks."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        generation: Generation,
        body: ChatCompletionRequest,
        offered: OfferedTools | None,
    ) -> None:
        """offered: the tools that the replies may call."""
        self._replies = (
            None if offered is None else [ToolReply(offered.parser()) for _ in generation.choices]
        )
        self._tokenizer = tokenizer
        self._generation = generation
        self._wants_logprobs = bool(body.logprobs)
        self._wants_routing = bool(body.include_routing)
        self._plain = not self._wants_logprobs and not self._wants_routing
        self._unstarted = {choice.index for choice in generation.choices}
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._frame = frame = ChunkFrame(
            generation, self._id, "chat.completion.chunk", with_usage=with_usage
        )
        self.usage_chunk = frame.usage_chunk
        self._tail = frame.tail
        self._plain_tail = b'},"logprobs":null,"finish_reason":null' + frame.tail

    @cached_property
    def _bare_heads(self) -> list[bytes]:
        return self._frame.heads(b"")

    @cached_property
    def _heads(self) -> list[bytes]:
        return self._frame.heads(b',"delta":{"content":')

    @cached_property
    def _first_heads(self) -> list[bytes]:
        return self._frame.heads(b',"delta":{"role":"assistant","content":')

    @property
    def _id(self) -> str:
        return f"chatcmpl-{self._generation.request_id}"

    def chunk(self, delta: Delta) -> bytes:
        """The event for a delta; a choice's first one names the role."""
        index = delta.index
        if self._replies is not None:
            return self._chunk_with_calls(delta, self._replies[index])
        heads = self._heads
        if index in self._unstarted:
            self._unstarted.discard(index)
            heads = self._first_heads
        elif not delta.text and self._plain and delta.finish_reason is None:
            return b""
        text = encode_json(delta.text)
        if self._plain and delta.finish_reason is None:
            return heads[index] + text + self._plain_tail
        details = encode_json(self._details([delta]))
        return heads[index] + text + b"}," + details[1:-1] + self._tail

    def _chunk_with_calls(self, delta: Delta, reply: ToolReply) -> bytes:
        index = delta.index
        added = reply.add(delta)
        if index in self._unstarted:
            self._unstarted.discard(index)
            added = {"role": "assistant", "content": None, **added}
        elif not added and self._plain and delta.finish_reason is None:
            return b""
        details = self._details([delta])
        details["finish_reason"] = reply.finish_reason(delta)
        fields = encode_json({"delta": added, **details})
        return self._bare_heads[index] + b"," + fields[1:-1] + self._tail

    def reply(self, collected: list[list[Delta]]) -> bytes:
        """The whole reply."""
        model = self._generation.model
        return encode_json(
            {
                "id": self._id,
                "object": "chat.completion",
                "created": self._generation.created,
                "model": model.name,
                "system_fingerprint": self._generation.fingerprint,
                "choices": [
                    {"index": index, **self._choice(deltas)}
                    for index, deltas in enumerate(collected)
                ],
                "usage": self._generation.usage(),
            }
        )

    def _choice(self, deltas: list[Delta]) -> dict[str, Any]:
        details = self._details(deltas)
        if self._replies is None:
            content = "".join(delta.text for delta in deltas)
            return {"message": {"role": "assistant", "content": content}, **details}
        reply = self._replies[deltas[0].index]
        for delta in deltas:
            reply.add(delta)
        details["finish_reason"] = reply.finish_reason(deltas[-1])
        return {"message": reply.message(), **details}

    def _details(self, deltas: list[Delta]) -> dict[str, Any]:
        details: dict[str, Any] = {
            "logprobs": None,
            "finish_reason": deltas[-1].finish_reason,
            "stop_reason": deltas[-1].stop_reason,
        }
        if self._wants_logprobs:
            entries = (entry for delta in deltas for entry in delta.logprobs or ())
            details["logprobs"] = chat_logprobs(self._tokenizer, entries)
        if self._wants_routing:
            details["routing"] = routing_entries(self._tokenizer, deltas)
        return details


async def _grammar(
    server: ServerState, body: ChatCompletionRequest, offered: OfferedTools | None
) -> str | None:
    calls = None if offered is None else offered.grammar()
    if calls is not None:
        return await server.grammars.check("calls", calls, "tools")
    return await grammar_of(server.grammars, body)


@router.post("/v1/chat/completions")
async def chat_completions(
    body: ChatCompletionRequest, request: Request, server: Server, record: Record
) -> Response:
    """Continue a conversation."""
    model = server.registry.resolve(body.model)
    record.model = model.name
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs: true.")
    check_logprobs(server, "top_logprobs", body.top_logprobs)
    if body.max_tokens == 0:
        raise invalid("max_tokens", "max_tokens must be at least 1.")
    check_limits(server, body, num_prompts=1)
    format = FORMATS[server.settings.tool_call_parser]
    offered = offered_tools(format, body)
    tools = () if offered is None else offered.tools
    prompt = server.tokenizer.render_chat(body.messages, tools, format)
    add = bool(body.add_special_tokens)
    [token_ids] = await server.tokenizer.encode([prompt], add_special_tokens=add)
    if not token_ids:
        raise invalid("messages", "The conversation has no tokens.")
    if body.max_completion_tokens is not None:
        limits = TokenLimits(body.max_completion_tokens, None, "max_completion_tokens")
    else:
        limits = TokenLimits(body.max_tokens, None)
    params = sampling_params(
        server,
        body,
        max_tokens=limits.resolve(len(token_ids), server),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=await _grammar(server, body, offered),
    )
    generation = Generation(server, record, model, body, [(token_ids, params)])
    writer = ChatWriter(server.tokenizer, generation, body, offered)
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(generation, writer, record, with_usage=with_usage)
    collected = await collect_until_disconnect(request.receive, generation, record)
    if collected is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(writer.reply(collected), media_type="application/json")
