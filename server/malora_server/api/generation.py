"""Runs a request's sequences in the engine and turns their tokens into text as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import msgspec

from malora_server.api.admission import Place
from malora_server.api.errors import ApiError, engine_dead
from malora_server.api.protocol import GenerationRequest
from malora_server.api.registry import ServedModel, refusal
from malora_server.api.sampling import nth_choice
from malora_server.api.state import RequestRecord, ServerState
from malora_server.engine.client import EngineDeadError
from malora_server.engine.detokenizer import IncrementalDetokenizer
from malora_server.engine.messages import (
    SamplingParams,
    SequenceOutput,
    SequenceStart,
    Submit,
    TokenLogprobs,
    TokenRouting,
)

if TYPE_CHECKING:
    from malora_server.metrics import ModelMetrics


class Delta(msgspec.Struct):
    """What one step of the engine adds to one choice of the reply."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    offsets: list[int] | None = None
    """Where each token's text begins, in characters of the choice's text; with logprobs only."""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    routing: list[TokenRouting] | None = None


class Choice:
    """One sequence, from its submission to its end."""

    def __init__(
        self,
        index: int,
        submit: Submit,
        detokenizer: IncrementalDetokenizer,
        metrics: ModelMetrics,
        received: float,
        *,
        show_stop_token: bool,
        prompt_only: bool,
    ) -> None:
        """`received`: when the request came, in seconds of `time.perf_counter`.

        `prompt_only`: what is generated (the engine makes one token at least) is dropped.
        """
        self.index = index
        self.submit = submit
        self.num_generated = 0
        self.num_cached_tokens = 0
        self.reason: str | None = None
        """How it ended: its finish reason, abort where it was left, error where it failed."""
        self.start: SequenceStart | None = None
        self.time_to_first_token: float | None = None
        self._received = received
        self._detokenizer = detokenizer
        self._metrics = metrics
        self._show_stop_token = show_stop_token
        self._prompt_only = prompt_only
        self._wants_logprobs = submit.sampling.logprobs is not None

    async def run(self, server: ServerState, place: Place) -> AsyncGenerator[Delta]:
        """The choice's deltas; the last one has a finish reason. ApiError where it fails."""
        metrics = self._metrics
        first = last = time.perf_counter()
        self.reason = "abort"  # until the engine says otherwise
        try:
            async with aclosing(server.engine.generate(self.submit)) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    now = time.perf_counter()
                    if self.time_to_first_token is None:
                        first = now
                        place.started()
                        self._started(output, now - self._received)
                    else:
                        metrics.inter_token_latency.observe(now - last)
                    last = now
                    delta = self._advance(output)
                    metrics.generation_tokens.inc(len(delta.token_ids))
                    # Known before the consumer sees it, who may not come back for more.
                    self.reason = delta.finish_reason or self.reason
                    yield delta
                    if delta.finish_reason is not None:
                        return
        except EngineDeadError:
            self.reason = "error"
            raise engine_dead(
                "The engine has stopped; the request was not finished.", server.engine.retry_after
            ) from None
        except ApiError:
            self.reason = "error"
            raise
        finally:
            self._finished(self.reason, last - first)

    def _started(self, output: SequenceOutput, seconds: float) -> None:
        self.start = output.start
        self.num_cached_tokens = output.num_cached_tokens
        if output.token_ids:
            self.time_to_first_token = seconds
            self._metrics.time_to_first_token.observe(seconds)
            self._metrics.prompt_tokens.inc(len(self.submit.prompt_token_ids))
            self._metrics.prompt_tokens_cached.inc(output.num_cached_tokens)

    def _finished(self, reason: str, decode_seconds: float) -> None:
        seconds = time.perf_counter() - self._received
        prompt_length = len(self.submit.prompt_token_ids)
        self._metrics.finished(reason, seconds, prompt_length, self.num_generated)
        if self.start is not None:
            self._metrics.spent(self.start, decode_seconds, self.num_generated)

    def _advance(self, output: SequenceOutput) -> Delta:
        finish_reason: str | None = output.finish_reason
        if finish_reason == "error" and output.error_code == "invalid_grammar":
            raise ApiError(400, f"{output.error}.", code=output.error_code)
        if finish_reason == "error" and output.error_code and self.submit.adapter is not None:
            name = self.submit.adapter.name
            raise refusal(name, output.error, output.error_code, "model")
        if finish_reason == "error":
            raise ApiError(
                500, f"The engine refused the request: {output.error}.", code="engine_error"
            )
        if finish_reason == "abort":
            raise ApiError(
                503, "The server is shutting down; the request was not finished.", code="shutdown"
            )
        if self._prompt_only:
            return Delta(
                self.index,
                "",
                [],
                finish_reason="length",
                offsets=[],
                logprobs=[],
                prompt_logprobs=output.prompt_logprobs,
                routing=None if output.routing is None else [],
            )
        detokenizer = self._detokenizer
        token_ids = output.token_ids
        stop_reason: str | int | None = output.stop_reason
        # An engine that stops by itself does so at a token that is no part of the text.
        num_hidden = int(finish_reason == "stop" and not self._show_stop_token)
        num_shown = len(token_ids) - num_hidden
        text = ""
        offsets: list[int] | None = [] if self._wants_logprobs else None
        for position, token_id in enumerate(token_ids):
            if offsets is not None:
                offsets.append(detokenizer.length)
            if position < num_shown:
                text += detokenizer.push(token_id)
                if detokenizer.matched is not None:
                    token_ids = token_ids[: position + 1]
                    break
        if finish_reason is not None and detokenizer.matched is None:
            text += detokenizer.finish()
        if detokenizer.matched is not None:
            finish_reason, stop_reason = "stop", detokenizer.matched
        count = len(token_ids)
        self.num_generated += count
        return Delta(
            self.index,
            text,
            token_ids,
            finish_reason,
            stop_reason,
            offsets,
            output.logprobs[:count] if output.logprobs is not None else None,
            output.prompt_logprobs,
            output.routing[:count] if output.routing is not None else None,
        )


class Generation:
    """All sequences of one request: `n` choices of each prompt, in order."""

    def __init__(
        self,
        server: ServerState,
        record: RequestRecord,
        model: ServedModel,
        body: GenerationRequest,
        prompts: Sequence[tuple[list[int], SamplingParams]],
        *,
        prompt_only: bool = False,
    ) -> None:
        """`prompts`: token ids and the parameters of the prompt's first choice."""
        self.model = model
        self.created = int(time.time())
        self.request_id = record.request_id
        self._fingerprint = ""
        self._server = server
        self._record = record
        self._num_choices = body.n or 1
        self._num_prompt_tokens = sum(len(token_ids) for token_ids, _ in prompts)
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        self._metrics = server.metrics.model(model.name)
        include_stop = bool(body.include_stop_str_in_output)
        self.choices = [
            Choice(
                index,
                Submit(
                    request_id=f"{record.engine_id}-{index}",
                    prompt_token_ids=token_ids,
                    sampling=nth_choice(params, nth),
                    adapter=model.version,
                    priority=body.priority or 0,
                ),
                IncrementalDetokenizer(
                    server.tokenizer.backend,
                    token_ids,
                    stop=stop,
                    include_stop=include_stop,
                    skip_special_tokens=body.skip_special_tokens is not False,
                    min_tokens=params.min_tokens,
                ),
                self._metrics,
                record.received,
                show_stop_token=include_stop,
                prompt_only=prompt_only,
            )
            for index, (token_ids, params, nth) in enumerate(
                (token_ids, params, nth)
                for token_ids, params in prompts
                for nth in range(self._num_choices)
            )
        ]
        record.sampling = prompts[0][1]
        record.num_choices = self._num_choices
        record.stream = bool(body.stream)
        record.prompt_tokens = self._num_prompt_tokens

    async def batches(self) -> AsyncGenerator[list[Delta]]:
        """Deltas as they come, those that are there at once together. ApiError where one fails.

        Leaving early ends every sequence in the engine.
        """
        try:
            prompt_lengths = [len(choice.submit.prompt_token_ids) for choice in self.choices]
            with (
                self._server.admission.admit(prompt_lengths) as places,
                self._server.registry.in_use(self.model),
            ):
                if len(self.choices) == 1:
                    async with aclosing(self.choices[0].run(self._server, places[0])) as deltas:
                        async for delta in deltas:
                            yield [delta]
                else:
                    async with aclosing(self._merged(places)) as batches:
                        async for batch in batches:
                            yield batch
        finally:
            self._finished()

    def _finished(self) -> None:
        reasons = [choice.reason for choice in self.choices if choice.reason is not None]
        if not reasons:
            return  # it was not admitted
        record = self._record
        record.completion_tokens = self.num_generated
        record.cached_tokens = self.num_cached_tokens
        record.finish_reasons = reasons
        record.generation = self.fingerprint
        started = [c for c in self.choices if c.time_to_first_token is not None]
        if started:
            first = min(started, key=lambda choice: choice.time_to_first_token or 0.0)
            record.time_to_first_token = first.time_to_first_token
            if first.start is not None:
                record.queue_time = first.start.queue_seconds
                record.prefill_time = first.start.prefill_seconds
        self._metrics.request_finished(
            self._num_choices,
            self.choices[0].submit.sampling.max_tokens,
            max(choice.num_generated for choice in self.choices),
        )

    async def _merged(self, places: list[Place]) -> AsyncGenerator[list[Delta]]:
        queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()

        async def pump(choice: Choice, place: Place) -> None:
            try:
                async for delta in choice.run(self._server, place):
                    queue.put_nowait(delta)
            except Exception as error:
                queue.put_nowait(error)
            else:
                queue.put_nowait(None)

        tasks = [
            asyncio.create_task(pump(*both)) for both in zip(self.choices, places, strict=True)
        ]
        unfinished = len(tasks)
        try:
            while unfinished:
                items = [await queue.get()]
                while not queue.empty():
                    items.append(queue.get_nowait())
                batch = []
                for item in items:
                    if isinstance(item, BaseException):
                        raise item
                    if item is None:
                        unfinished -= 1
                    else:
                        batch.append(item)
                if batch:
                    yield batch
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def fingerprint(self) -> str:
        """Which generation of the model serves it; known from the first token on."""
        if not self._fingerprint:
            self._fingerprint = self.model.fingerprint
        return self._fingerprint

    @property
    def num_generated(self) -> int:
        """Tokens of all choices so far."""
        return sum(choice.num_generated for choice in self.choices)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache had, of each prompt's first choice."""
        return sum(choice.num_cached_tokens for choice in self.choices[:: self._num_choices])

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object; a prompt counts once, however many choices it has."""
        generated = self.num_generated
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._num_prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }
