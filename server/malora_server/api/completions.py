"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from fastapi import APIRouter, Request, Response

from malora_server.api.details import CompletionLogprobs, routing_entries
from malora_server.api.errors import invalid
from malora_server.api.generation import Delta, Generation
from malora_server.api.grammars import grammar_of
from malora_server.api.limits import check_limits
from malora_server.api.protocol import CompletionRequest
from malora_server.api.sampling import (
    DEFAULT_COMPLETION_TOKENS,
    TokenLimits,
    check_logprobs,
    check_token_ids,
    sampling_params,
)
from malora_server.api.state import Record, Server, ServerState
from malora_server.api.streaming import (
    CLIENT_CLOSED_REQUEST,
    ChunkFrame,
    EventStream,
    collect_until_disconnect,
    encode_json,
)
from malora_server.api.tokenizer import Tokenizer

router = APIRouter()


class CompletionWriter:
    """A completion's choices, whole or in chunks."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        generation: Generation,
        body: CompletionRequest,
        echoes: Sequence[str],
    ) -> None:
        """`echoes`: by choice, the prompt's text where it is to be repeated, or ''."""
        self._tokenizer = tokenizer
        self._generation = generation
        self._echoes = echoes
        self._wants_logprobs = body.logprobs is not None
        self._wants_routing = bool(body.include_routing)
        self._skip_special_tokens = body.skip_special_tokens is not False
        self._unstarted = {i for i, echo in enumerate(echoes) if echo}
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._frame = frame = ChunkFrame(
            generation, self._id, "text_completion", with_usage=with_usage
        )
        self.usage_chunk = frame.usage_chunk
        self._tail = frame.tail
        self._plain_tail = b',"logprobs":null,"finish_reason":null,"stop_reason":null' + frame.tail
        self._plain = not self._wants_logprobs and not self._wants_routing

    @cached_property
    def _heads(self) -> list[bytes]:
        return self._frame.heads(b',"text":')

    @property
    def _id(self) -> str:
        return f"cmpl-{self._generation.request_id}"

    def chunk(self, delta: Delta) -> bytes:
        """The event for a delta."""
        index = delta.index
        if self._plain and delta.finish_reason is None and index not in self._unstarted:
            if not delta.text:
                return b""
            return self._heads[index] + encode_json(delta.text) + self._plain_tail
        starts = index in self._unstarted
        self._unstarted.discard(index)
        choice = self._choice([delta], echo=starts)
        text = encode_json(choice.pop("text"))
        return self._heads[index] + text + b"," + encode_json(choice)[1:-1] + self._tail

    def reply(self, collected: list[list[Delta]]) -> bytes:
        """The whole reply."""
        model = self._generation.model
        return encode_json(
            {
                "id": self._id,
                "object": "text_completion",
                "created": self._generation.created,
                "model": model.name,
                "system_fingerprint": self._generation.fingerprint,
                "choices": [
                    {"index": index, **self._choice(deltas, echo=True)}
                    for index, deltas in enumerate(collected)
                ],
                "usage": self._generation.usage(),
            }
        )

    def _choice(self, deltas: list[Delta], *, echo: bool) -> dict[str, Any]:
        index = deltas[0].index
        prefix = self._echoes[index] if echo else ""
        choice: dict[str, Any] = {
            "text": prefix + "".join(delta.text for delta in deltas),
            "logprobs": self._logprobs(deltas, echo=echo) if self._wants_logprobs else None,
            "finish_reason": deltas[-1].finish_reason,
            "stop_reason": deltas[-1].stop_reason,
        }
        if self._wants_routing:
            choice["routing"] = routing_entries(self._tokenizer, deltas)
        return choice

    def _logprobs(self, deltas: list[Delta], *, echo: bool) -> dict[str, Any]:
        index = deltas[0].index
        logprobs = CompletionLogprobs(self._tokenizer)
        if echo and self._echoes[index]:
            logprobs.add_prompt(
                self._generation.choices[index].submit.prompt_token_ids,
                deltas[0].prompt_logprobs or (),
                self._skip_special_tokens,
            )
        for delta in deltas:
            logprobs.add(delta, len(self._echoes[index]))
        return logprobs.to_json()


@router.post("/v1/completions")
async def completions(
    body: CompletionRequest, request: Request, server: Server, record: Record
) -> Response:
    """Continue prompts."""
    model = server.registry.resolve(body.model)
    record.model = model.name
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise invalid("best_of", "best_of must equal n: every choice is returned.")
    check_logprobs(server, "logprobs", body.logprobs)
    prompt_only = body.max_tokens == 0
    if prompt_only and not body.echo:
        raise invalid("max_tokens", "max_tokens 0 makes sense with echo alone.")
    given = _given_prompts(body)
    check_limits(server, body, num_prompts=len(given))
    prompts = await _tokenised(server, body, given)
    # The engine makes one token at least; a request for none has it dropped.
    requested = 1 if prompt_only else body.max_tokens
    limits = TokenLimits(requested, DEFAULT_COMPLETION_TOKENS)
    grammar = None if prompt_only else await grammar_of(server.grammars, body)
    generation = Generation(
        server,
        record,
        model,
        body,
        [
            (
                token_ids,
                sampling_params(
                    server,
                    body,
                    max_tokens=limits.resolve(len(token_ids), server),
                    logprobs=body.logprobs,
                    prompt_logprobs=body.logprobs if body.echo else None,
                    grammar=grammar,
                ),
            )
            for _, token_ids in prompts
        ],
        prompt_only=prompt_only,
    )
    echoes = [text if body.echo else "" for text, _ in prompts for _ in range(body.n or 1)]
    writer = CompletionWriter(server.tokenizer, generation, body, echoes)
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(generation, writer, record, with_usage=with_usage)
    collected = await collect_until_disconnect(request.receive, generation, record)
    if collected is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(writer.reply(collected), media_type="application/json")


def _given_prompts(body: CompletionRequest) -> list[str | list[int]]:
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given or not all(given):
        raise invalid("prompt", "The prompt is empty.")
    return list(given)


async def _tokenised(
    server: ServerState, body: CompletionRequest, given: Sequence[str | list[int]]
) -> list[tuple[str, list[int]]]:
    """Each prompt's text (where it is needed) and token ids."""
    texts = [prompt for prompt in given if isinstance(prompt, str)]
    if texts:
        add = body.add_special_tokens is not False
        encoded = await server.tokenizer.encode(texts, add_special_tokens=add)
        if not all(encoded):
            raise invalid("prompt", "The prompt has no tokens.")
        return list(zip(texts, encoded, strict=True))
    prompts = []
    for token_ids in (prompt for prompt in given if not isinstance(prompt, str)):
        check_token_ids(server, "prompt", token_ids)
        text = ""
        if body.echo:
            skip = body.skip_special_tokens is not False
            text = await server.tokenizer.decode(token_ids, skip_special_tokens=skip)
        prompts.append((text, token_ids))
    return prompts
