"""Every call to the server as data: what to send, and how to read what comes back.

Both clients make their requests and read their replies here; they add only the waiting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import quote

import httpx
from pydantic import ValidationError
from pydantic_core import from_json, to_json

from malora_client.errors import APIConnectionError, APIError, stream_error
from malora_client.params import ChatParams, CompletionParams, DetokenizeParams, TokenizeParams
from malora_client.sse import EventDecoder
from malora_client.types import (
    Adapter,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    Deleted,
    Health,
    Listing,
    Model,
    Reply,
    Text,
    Tokens,
)

ReplyT = TypeVar("ReplyT", bound=Reply, covariant=True)


@dataclass(frozen=True)
class Call(Generic[ReplyT]):
    """One request. `reply` is the type of its reply, or of each chunk of a stream."""

    path: str
    reply: type[ReplyT]
    body: Mapping[str, object] | None = None
    verb: str | None = None
    """The method, where it is another than the body tells."""
    is_admin: bool = False
    """Whether it changes the server's adapters, which takes the admin key."""

    @property
    def method(self) -> str:
        return self.verb or ("GET" if self.body is None else "POST")

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.body is None else {"Content-Type": "application/json"}

    @property
    def content(self) -> bytes | None:
        return None if self.body is None else to_json(self.body, exclude_none=True)

    def parse(self, response: httpx.Response) -> ReplyT:
        """The reply of a successful request whose body has been read."""
        try:
            # An empty body is an empty object: a health check may say all in its status.
            return self.reply.model_validate_json(response.content or b"{}")
        except ValidationError as exc:
            raise self._unreadable(exc, response) from exc

    def chunks(self, response: httpx.Response) -> ChunkReader[ReplyT]:
        return ChunkReader(self, response)

    def parse_chunk(self, data: str, response: httpx.Response) -> ReplyT:
        """One chunk of a stream; raises the error that the chunk stands for, if it does."""
        try:
            chunk = from_json(data)
        except ValueError as exc:
            raise self._unreadable(exc, response) from exc
        if isinstance(chunk, dict) and chunk.get("error") is not None:
            raise stream_error(chunk["error"], _request_id(response))
        try:
            return self.reply.model_validate(chunk)
        except ValidationError as exc:
            raise self._unreadable(exc, response) from exc

    def _unreadable(self, exc: ValueError, response: httpx.Response) -> APIError:
        reason = str(exc)
        if isinstance(exc, ValidationError):
            first = exc.errors(include_url=False, include_input=False)[0]
            reason = ": ".join([*map(str, first["loc"]), first["msg"]])
        return APIError(
            f"The reply to {self.method} {self.path} is no {self.reply.__name__}: {reason}",
            request_id=_request_id(response),
        )


class ChunkReader(Generic[ReplyT]):
    """Turns the pieces of a stream's body into chunks, up to the end mark."""

    def __init__(self, call: Call[ReplyT], response: httpx.Response) -> None:
        self._call = call
        self._response = response
        self._decoder = EventDecoder()
        self.done = False

    def feed(self, piece: bytes) -> Iterator[ReplyT]:
        for data in self._decoder.feed(piece):
            if data == "[DONE]":
                self.done = True
                return
            yield self._call.parse_chunk(data, self._response)

    def broken_off(self) -> APIConnectionError:
        """The error to raise when the body ended without the end mark."""
        return APIConnectionError(
            "The stream ended before its end mark, so the reply may be cut short.",
            request_id=_request_id(self._response),
        )


def complete(params: Mapping[str, object]) -> Call[Completion]:
    return Call("/v1/completions", Completion, _body(CompletionParams, params))


def stream_completion(params: Mapping[str, object]) -> Call[CompletionChunk]:
    body = {**_body(CompletionParams, params), "stream": True}
    return Call("/v1/completions", CompletionChunk, body)


def chat(params: Mapping[str, object]) -> Call[ChatCompletion]:
    return Call("/v1/chat/completions", ChatCompletion, _body(ChatParams, params))


def stream_chat(params: Mapping[str, object]) -> Call[ChatCompletionChunk]:
    body = {**_body(ChatParams, params), "stream": True}
    return Call("/v1/chat/completions", ChatCompletionChunk, body)


def tokenize(params: Mapping[str, object]) -> Call[Tokens]:
    return Call("/tokenize", Tokens, _body(TokenizeParams, params))


def detokenize(params: Mapping[str, object]) -> Call[Text]:
    return Call("/detokenize", Text, _body(DetokenizeParams, params))


def list_models() -> Call[Listing[Model]]:
    return Call("/v1/models", Listing[Model])


def retrieve_model(model: str) -> Call[Model]:
    return Call(f"/v1/models/{_segment(model)}", Model)


def list_adapters() -> Call[Listing[Adapter]]:
    return Call("/v1/adapters", Listing[Adapter])


def retrieve_adapter(name: str) -> Call[Adapter]:
    return Call(f"/v1/adapters/{_segment(name)}", Adapter)


def load_adapter(
    name: str, source: str | None, pinned: bool | None, expected_generation: str | None
) -> Call[Adapter]:
    fields = {"source": source, "pinned": pinned, "expected_generation": expected_generation}
    body = {field: value for field, value in fields.items() if value is not None}
    return Call(f"/v1/adapters/{_segment(name)}", Adapter, body, "PUT", is_admin=True)


def unload_adapter(name: str) -> Call[Deleted]:
    return Call(f"/v1/adapters/{_segment(name)}", Deleted, verb="DELETE", is_admin=True)


def pin_adapter(name: str, pinned: bool) -> Call[Adapter]:
    action = "pin" if pinned else "unpin"
    return Call(f"/v1/adapters/{_segment(name)}/{action}", Adapter, {}, is_admin=True)


def health() -> Call[Health]:
    return Call("/health", Health)


def _body(fields: type, params: Mapping[str, object]) -> dict[str, object]:
    """The request's fields that were set; a misspelt one is an error here, not at the server."""
    known: frozenset[str] = fields.__required_keys__ | fields.__optional_keys__  # type: ignore[attr-defined]
    for name in params:
        if name not in known:
            raise TypeError(f"There is no parameter {name!r}; there are {sorted(known)}.")
    for name in sorted(fields.__required_keys__):  # type: ignore[attr-defined]
        if params.get(name) is None:
            raise TypeError(f"The parameter {name!r} is missing.")
    return {name: value for name, value in params.items() if value is not None}


def _segment(name: str) -> str:
    if not name:
        raise ValueError("The name is empty; list() gives the names there are.")
    return quote(name, safe="")


def _request_id(response: httpx.Response) -> str | None:
    value: str | None = response.headers.get("x-request-id")
    return value
