"""The client for asyncio."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Literal, Self, TypeVar, Unpack, overload

import httpx

from malora_client import calls
from malora_client.base_client import BaseClient
from malora_client.calls import Call
from malora_client.params import ChatParams, CompletionParams, DetokenizeParams, TokenizeParams
from malora_client.retries import Retries
from malora_client.settings import (
    DEFAULT_MAX_RETRIES,
    DEFAULT_TIMEOUT,
    LIMITS,
    Settings,
    Timeout,
)
from malora_client.streaming import AsyncStream
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

ReplyT = TypeVar("ReplyT", bound=Reply)


class AsyncClient(BaseClient[httpx.AsyncClient]):
    """A MALoRA server's client, for the tasks of one event loop.

    base_url: the server, else MALORA_BASE_URL, else http://127.0.0.1:8000. api_key: else
    MALORA_API_KEY; sent as a bearer token. admin_key: else MALORA_ADMIN_KEY, else the API key; sent
    to load, unload and pin adapters. timeout: seconds, an `httpx.Timeout`, or None for
    ever; in a stream it bounds each wait for the next chunk. max_retries: how often a request is
    sent again after a failure that may pass. http_client: one of yours, for proxies or
    certificates; closing it stays yours.

    Every method raises a `MaloraError` when the server cannot be reached or refuses.
    """

    def __init__(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: Timeout = DEFAULT_TIMEOUT,
        max_retries: int = DEFAULT_MAX_RETRIES,
        http_client: httpx.AsyncClient | None = None,
    ) -> None:
        super().__init__(
            Settings.resolve(base_url, api_key, admin_key, timeout, max_retries),
            http_client or httpx.AsyncClient(limits=LIMITS),
            owns_http=http_client is None,
        )

    @property
    def completions(self) -> AsyncCompletions:
        return AsyncCompletions(self)

    @property
    def chat(self) -> AsyncChat:
        return AsyncChat(self)

    @property
    def models(self) -> AsyncModels:
        return AsyncModels(self)

    @property
    def adapters(self) -> AsyncAdapters:
        return AsyncAdapters(self)

    async def tokenize(self, **params: Unpack[TokenizeParams]) -> Tokens:
        return await self._request(calls.tokenize(params))

    async def detokenize(self, **params: Unpack[DetokenizeParams]) -> Text:
        return await self._request(calls.detokenize(params))

    async def health(self) -> Health:
        """Return if the server takes requests; raise if it does not."""
        return await self._request(calls.health())

    async def close(self) -> None:
        """Close the connections; those of an `http_client` that was given stay open."""
        if self._owns_http:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _request(self, call: Call[ReplyT]) -> ReplyT:
        return call.parse(await self._send(call, stream=False))

    async def _stream(self, call: Call[ReplyT]) -> AsyncStream[ReplyT]:
        return AsyncStream(call, await self._send(call, stream=True))

    async def _send(self, call: Call[ReplyT], *, stream: bool) -> httpx.Response:
        """The successful response; of a stream only the head has been read."""
        request = self._build(call)
        retries = Retries(self._settings.max_retries)
        while True:
            try:
                response = await self._http.send(request, stream=stream)
                if response.is_success:
                    return response
                await response.aread()
            except httpx.RequestError as exc:
                delay = retries.after_failure(exc)
            else:
                delay = retries.after_status(response)
            await asyncio.sleep(delay)


class AsyncCompletions:
    """/v1/completions."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @overload
    async def create(
        self, *, stream: Literal[False] | None = None, **params: Unpack[CompletionParams]
    ) -> Completion: ...

    @overload
    async def create(
        self, *, stream: Literal[True], **params: Unpack[CompletionParams]
    ) -> AsyncStream[CompletionChunk]: ...

    @overload
    async def create(
        self, *, stream: bool, **params: Unpack[CompletionParams]
    ) -> Completion | AsyncStream[CompletionChunk]: ...

    async def create(
        self, *, stream: bool | None = None, **params: Unpack[CompletionParams]
    ) -> Completion | AsyncStream[CompletionChunk]:
        """Continue the prompt; `CompletionParams` and `GenerationParams` say what can be set."""
        if stream:
            return await self._client._stream(calls.stream_completion(params))
        return await self._client._request(calls.complete(params))


class AsyncChat:
    """/v1/chat."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @property
    def completions(self) -> AsyncChatCompletions:
        return AsyncChatCompletions(self._client)


class AsyncChatCompletions:
    """/v1/chat/completions."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @overload
    async def create(
        self, *, stream: Literal[False] | None = None, **params: Unpack[ChatParams]
    ) -> ChatCompletion: ...

    @overload
    async def create(
        self, *, stream: Literal[True], **params: Unpack[ChatParams]
    ) -> AsyncStream[ChatCompletionChunk]: ...

    @overload
    async def create(
        self, *, stream: bool, **params: Unpack[ChatParams]
    ) -> ChatCompletion | AsyncStream[ChatCompletionChunk]: ...

    async def create(
        self, *, stream: bool | None = None, **params: Unpack[ChatParams]
    ) -> ChatCompletion | AsyncStream[ChatCompletionChunk]:
        """Answer the conversation; `ChatParams` and `GenerationParams` say what can be set."""
        if stream:
            return await self._client._stream(calls.stream_chat(params))
        return await self._client._request(calls.chat(params))


class AsyncModels:
    """/v1/models: what a request may name as `model`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> Listing[Model]:
        return await self._client._request(calls.list_models())

    async def retrieve(self, model: str) -> Model:
        return await self._client._request(calls.retrieve_model(model))


class AsyncAdapters:
    """/v1/adapters: the adapters there are, those that cannot be served with their reason too."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> Listing[Adapter]:
        return await self._client._request(calls.list_adapters())

    async def retrieve(self, name: str) -> Adapter:
        return await self._client._request(calls.retrieve_adapter(name))

    async def load(
        self,
        name: str,
        *,
        source: str | None = None,
        pinned: bool | None = None,
        expected_generation: str | None = None,
    ) -> Adapter:
        """Load an adapter, in place of what the name stood for; requests in flight keep that.

        source: a folder under the server's adapters folder, hf://org/name[@revision][/folder] or
        s3://bucket/prefix; else where it came from before, or the folder of its name. pinned: keep
        it on the device. expected_generation: replace that one alone, else `ConflictError`.
        """
        return await self._client._request(
            calls.load_adapter(name, source, pinned, expected_generation)
        )

    async def unload(self, name: str) -> Deleted:
        """Serve an adapter no more; its memory is free once requests in flight are done."""
        return await self._client._request(calls.unload_adapter(name))

    async def pin(self, name: str) -> Adapter:
        """Keep an adapter on the device."""
        return await self._client._request(calls.pin_adapter(name, True))

    async def unpin(self, name: str) -> Adapter:
        """Let an adapter leave the device when others need the room."""
        return await self._client._request(calls.pin_adapter(name, False))
